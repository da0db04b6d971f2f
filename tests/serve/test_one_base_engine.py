"""In the engine: each token has its own adapter, each request its own projector, and one without a task no vector."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's imports are not ours to mend

HIDDEN, DIM, RANK = 16, 8, 4


@pytest.fixture(scope="module")
def engine() -> Any:
    from jina_v4_serve.vllm_side import model as engine

    return engine


def projector(seed: int) -> Any:
    from jina_v4_serve.pooling import Projector

    random = torch.Generator().manual_seed(seed)
    return Projector(torch.randn(DIM, HIDDEN, generator=random), torch.randn(DIM, generator=random))


def pooled(engine: Any, projectors: dict[str | None, Any], hidden: torch.Tensor, params: Sequence[Any]) -> Any:
    """Give a pooler one step with the whole prompts of some requests of equal length."""
    from vllm.v1.pool.metadata import PoolingStates

    n_tokens = len(hidden) // len(params)
    lengths = torch.full((len(params),), n_tokens)
    cursor = SimpleNamespace(num_scheduled_tokens_cpu=lengths, seq_lens_cpu=lengths, prompt_lens_cpu=lengths)
    metadata = SimpleNamespace(
        get_pooling_cursor=lambda: cursor,
        get_prompt_token_ids_cpu=lambda: [torch.ones(n_tokens, dtype=torch.int64)] * len(params),
        pooling_states=[PoolingStates() for _ in params],
        pooling_params=list(params),
    )
    special = engine.SpecialTokens(image=7, vision_start=8, vision_end=9)
    return engine.JinaPooler(special, projectors).forward(hidden, metadata)


def test_each_request_gets_its_own_tasks_projector(engine: Any) -> None:
    projectors = {"retrieval": projector(1), "code": projector(2)}
    hidden = torch.randn(9, HIDDEN)
    tasks = ["code", "retrieval", "code"]
    asked = [engine.PoolingRequest(spans=None, multivector=True, task=task) for task in tasks]
    found = pooled(engine, projectors, hidden, [engine.pooling_params(each) for each in asked])
    for i, task in enumerate(tasks):
        own = hidden[3 * i : 3 * i + 3]
        torch.testing.assert_close(found[i][:HIDDEN], torch.nn.functional.normalize(own.mean(0), dim=-1))
        torch.testing.assert_close(found[i][HIDDEN:].reshape(3, DIM), projectors[task](own))


@pytest.mark.parametrize("task", [None, "clustering"])
@pytest.mark.parametrize(
    ("spans", "multivector"), [(None, False), ((), True), (None, True)], ids=["dense", "multi-vector", "both"]
)
def test_without_a_task_that_is_served_nothing_looks_like_a_vector(
    engine: Any, task: str | None, spans: Any, multivector: bool
) -> None:
    lost = engine.pooling_params(engine.PoolingRequest(spans=spans, multivector=multivector, task=task))
    right = engine.pooling_params(engine.PoolingRequest(spans=spans, multivector=multivector, task="code"))
    first, second = pooled(
        engine, {"retrieval": projector(1), "code": projector(2)}, torch.randn(6, HIDDEN), [lost, right]
    )
    assert first.isnan().all()
    assert second.isfinite().all()
    assert len(first) == len(second)


def test_vllms_warm_up_names_no_task(engine: Any) -> None:
    from vllm import PoolingParams

    for name, n_values in (("embed", HIDDEN), ("token_embed", 6 * DIM)):
        for projectors in ({"code": projector(2)}, {None: projector(2)}):
            (found,) = pooled(engine, projectors, torch.randn(6, HIDDEN), [PoolingParams(task=name)])
            assert len(found) == n_values


@pytest.mark.parametrize("task", [None, "code"])
def test_a_pooling_request_passes_through_vllm_unchanged(engine: Any, task: str | None) -> None:
    from jina_v4_serve.pooling import PoolingRequest, Span

    for request in (
        PoolingRequest(None, False, 128, task),
        PoolingRequest((), True, None, task),
        PoolingRequest((Span(0, 2),), True, 64, task),
    ):
        assert engine.read_params(engine.pooling_params(request)) == request


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "slots",
    [[0, 0, 2, 2, 1, 0], [1, 1, 1, 1, 1, 1], [-1, 2, -1, 0, 0, -1], [-1] * 6],
    ids=["mixed", "one adapter", "some without", "all without"],
)
def test_each_token_gets_what_its_own_adapter_adds(slots: list[int], dtype: torch.dtype) -> None:
    from jina_v4_serve.vllm_side.cpu_lora import GroupedProducts
    from vllm.lora.layers import LoRAMapping

    random = torch.Generator().manual_seed(0)
    sizes = (HIDDEN, DIM)  # two slices, as of queries and keys
    a = tuple(torch.randn(3, 1, RANK, HIDDEN, generator=random).to(dtype) for _ in sizes)
    b = tuple(torch.randn(3, 1, size, RANK, generator=random).to(dtype) for size in sizes)
    x = torch.randn(len(slots), HIDDEN, generator=random).to(dtype)
    y = torch.randn(len(slots), sum(sizes), generator=random).to(dtype)
    expected = y.double()
    for i, slot in enumerate(slots):
        if slot >= 0:
            sums = [
                bs[slot, 0].double() @ (as_[slot, 0].double() @ x[i].double()) for as_, bs in zip(a, b, strict=True)
            ]
            expected[i] += 0.5 * torch.cat(sums)
    products = GroupedProducts(16, 16, "cpu")
    ids = tuple(slot + 1 for slot in slots)
    products.update_metadata(LoRAMapping(ids, ids, is_prefill=True), [1, 2, 3], 4, 100)
    products.add_lora_linear(y, x, a, b, 0.5, sizes)
    rounding = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(y.double(), expected, rtol=rounding, atol=rounding)


def test_vllm_takes_our_grouped_products(monkeypatch: pytest.MonkeyPatch) -> None:
    from jina_v4_serve.vllm_side import cpu_lora
    from vllm.lora.punica_wrapper import punica_selector

    platform = SimpleNamespace(get_punica_wrapper=lambda: "vllm's")
    monkeypatch.setattr(cpu_lora, "current_platform", platform)
    cpu_lora.use_grouped_products()
    monkeypatch.setattr(punica_selector, "current_platform", platform)
    assert type(punica_selector.get_punica_wrapper(16, 16, "cpu")) is cpu_lora.GroupedProducts


def test_the_projector_is_where_vllm_computes_though_parameters_are_nowhere_yet(
    engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As while weights are quantized as they are read: they are on `meta` then."""
    weight, bias = torch.randn(DIM, HIDDEN, dtype=torch.bfloat16), torch.randn(DIM, dtype=torch.bfloat16)
    tensors = {"multi_vector_projector.weight": weight, "multi_vector_projector.bias": bias}
    save_file(tensors, tmp_path / engine.PROJECTOR)

    def build(self: torch.nn.Module, **_: Any) -> None:
        torch.nn.Module.__init__(self)
        self.register_parameter("weight", torch.nn.Parameter(torch.empty(1, device="meta")))

    monkeypatch.setattr(engine.Qwen2_5_VLForConditionalGeneration, "__init__", build)
    monkeypatch.setattr(engine, "replacement", lambda _: None)
    monkeypatch.setattr(engine, "trim_regularly", lambda: None)
    tokens = SimpleNamespace(image_token_id=7, vision_start_token_id=8, vision_end_token_id=9)
    vllm_config = SimpleNamespace(
        cache_config=SimpleNamespace(enable_prefix_caching=False),
        device_config=SimpleNamespace(device_type="cpu"),
        lora_config=None,
        model_config=SimpleNamespace(hf_config=tokens, model=str(tmp_path)),
    )
    (found,) = engine.JinaEmbeddingsV4ForEmbedding(vllm_config=vllm_config).pooler.projectors.values()
    assert (found.weight.device.type, found.weight.dtype) == ("cpu", torch.float32)
    torch.testing.assert_close(found.weight, weight.float())
