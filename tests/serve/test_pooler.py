"""The pooler between vLLM and the maths: which token ids it asks for, and what it keeps of a request between steps."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's imports are not ours to mend

HIDDEN = 16
IMAGE_PROMPT = [1, 8, 7, 7, 7, 9, 2]  # the picture's tokens are 1 to 5


@pytest.fixture(scope="module")
def engine() -> Any:
    from jina_v4_serve.vllm_side import model as engine

    return engine


@dataclass
class Vllm:
    """As much of vLLM's runners as the pooler meets: requests with parameters and states, steps with metadata."""

    engine: Any
    pooler: Any
    requests: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, prompt: Sequence[int], request: Any, *, params: Any = None) -> None:
        from vllm.v1.pool.metadata import PoolingStates

        params = params or self.engine.pooling_params(request)
        self.pooler.get_pooling_updates(params.task).apply(params)
        hidden = torch.randn(len(prompt), HIDDEN)
        self.requests[name] = SimpleNamespace(params=params, state=PoolingStates(), prompt=prompt, hidden=hidden)

    def step(self, *scheduled: tuple[str, int, int]) -> list[torch.Tensor | None]:
        """Compute tokens start to stop of each request."""
        from vllm.v1.pool.metadata import PoolingMetadata

        requests = [self.requests[name] for name, _, _ in scheduled]
        needs_ids = any(each.params.requires_token_ids for each in requests)
        ids = torch.zeros(len(requests), max(len(each.prompt) for each in requests), dtype=torch.int64)
        for row, each in zip(ids, requests, strict=True):
            row[: len(each.prompt)] = torch.tensor(each.prompt)
        metadata = PoolingMetadata(
            prompt_lens=torch.tensor([len(each.prompt) for each in requests]),
            prompt_token_ids=None,
            prompt_token_ids_cpu=ids if needs_ids else None,
            pooling_params=[each.params for each in requests],
            pooling_states=[each.state for each in requests],
        )
        lengths = torch.tensor([stop - start for _, start, stop in scheduled])
        stops = torch.tensor([stop for _, _, stop in scheduled])
        metadata.build_pooling_cursor(lengths.numpy(), stops, torch.device("cpu"))
        rows = [each.hidden[start:stop] for each, (_, start, stop) in zip(requests, scheduled, strict=True)]
        outputs: list[torch.Tensor | None] = self.pooler(torch.cat(rows), metadata)
        return outputs

    def mean(self, name: str, start: int, stop: int) -> torch.Tensor:
        return torch.nn.functional.normalize(self.requests[name].hidden[start:stop].mean(0), dim=-1)


@pytest.fixture
def vllm(engine: Any) -> Vllm:
    special = engine.SpecialTokens(image=7, vision_start=8, vision_end=9)
    return Vllm(engine, engine.JinaPooler(special, {None: None}))


def test_a_request_with_spans_needs_no_token_ids(engine: Any, vllm: Vllm) -> None:
    vllm.add("image", IMAGE_PROMPT, engine.PoolingRequest((engine.Span(1, 6),)))
    assert not vllm.requests["image"].params.requires_token_ids
    (found,) = vllm.step(("image", 0, 7))
    torch.testing.assert_close(found, vllm.mean("image", 1, 6))


@pytest.mark.parametrize("task", ["embed", "token_embed"])
def test_one_without_spans_is_pooled_by_its_token_ids_also_beside_others(engine: Any, vllm: Vllm, task: str) -> None:
    from vllm import PoolingParams

    stock = PoolingParams(task=task, extra_kwargs=None if task == "embed" else {"spans": None, "multivector": False})
    vllm.add("image", IMAGE_PROMPT, None, params=stock)
    vllm.add("text", [3, 4, 5], engine.PoolingRequest((engine.Span(0, 3),)))
    vllm.add("stock text", [3, 4, 5, 6], None, params=PoolingParams(task="embed"))
    found = vllm.step(("text", 0, 3), ("image", 0, 7), ("stock text", 0, 4))
    for output, expected in zip(
        found, (vllm.mean("text", 0, 3), vllm.mean("image", 1, 6), vllm.mean("stock text", 0, 4)), strict=True
    ):
        torch.testing.assert_close(output, expected)


def test_a_request_that_begins_anew_forgets_its_first_steps(engine: Any, vllm: Vllm) -> None:
    """After a preemption: model runner V1 hands over the same state, V2 another one."""
    for name in ("V1", "V2"):
        vllm.add(name, range(8), engine.PoolingRequest((engine.Span(0, 8),)))
        assert vllm.step((name, 0, 3)) == [None]
        if name == "V2":
            vllm.requests[name].state = type(vllm.requests[name].state)()
        assert vllm.step((name, 0, 5)) == [None]
        (found,) = vllm.step((name, 5, 8))
        torch.testing.assert_close(found, vllm.mean(name, 0, 8))


def test_tokens_that_were_skipped_are_an_error(engine: Any, vllm: Vllm) -> None:
    vllm.add("text", range(8), engine.PoolingRequest((engine.Span(0, 8),)))
    vllm.step(("text", 0, 3))
    with pytest.raises(RuntimeError, match="hidden states of tokens 3 to 4 were not computed"):
        vllm.step(("text", 4, 8))


def test_nothing_is_kept_of_requests_that_have_ended(engine: Any, vllm: Vllm) -> None:
    for i in range(4):
        vllm.add("text", range(8), engine.PoolingRequest((engine.Span(0, 8),)))
        vllm.step(("text", 0, 3))
        if i % 2:
            vllm.step(("text", 3, 8))
    vllm.requests.clear()
    assert not vllm.pooler.kept
