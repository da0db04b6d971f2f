"""What is sent to the engine names the spans; what it returns is cut into vectors only if its size is the right one.

No vLLM can be had that returns another size, so a stub stands for it.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jina_v4_serve.api.request import EmbedRequest, Output
from jina_v4_serve.facts import MODEL

HIDDEN = 8
N_TOKENS = 3


def request(*outputs: Output, dimensions: int | None = None) -> EmbedRequest:
    return EmbedRequest("retrieval", MODEL, (), "none", "", frozenset(outputs), dimensions=dimensions)


class Stub:
    """As much of vLLM's `EngineClient` as one request meets."""

    def __init__(self, n_values: int) -> None:
        self.model_config = SimpleNamespace(get_hidden_size=lambda: HIDDEN, max_model_len=1000)
        self.encoding: list[str] = []  # what is in the engine, or is handed to it
        self.finish = asyncio.Event()
        self.finish.set()
        self.renderer = self
        self.n_values = n_values
        self.rendered: dict[str, Any] | None = None  # of an image

    def render_cmpl(self, prompts: list[Any]) -> list[Any]:
        return prompts

    async def render_cmpl_async(self, prompts: list[Any]) -> list[Any]:
        assert [prompt["multi_modal_data"].keys() for prompt in prompts] == [{"image"}]
        return [self.rendered]

    async def encode(
        self, prompt: Any, _: object, request_id: str, *, priority: int, **__: object
    ) -> AsyncIterator[Any]:
        self.encoding.append(f"{request_id} {priority}")
        await self.finish.wait()
        outputs = SimpleNamespace(data=torch.ones(self.n_values))
        yield SimpleNamespace(outputs=outputs, error=None)


@pytest.mark.filterwarnings("ignore")  # vLLM's imports
@pytest.mark.parametrize(
    ("dense", "multivector", "dimensions", "n_values"),
    [(True, False, None, HIDDEN), (True, False, 4, 4), (True, True, 4, 4 + N_TOKENS * 128), (False, True, None, 384)],
    ids=["dense", "cut", "both", "multi-vector"],
)
@pytest.mark.parametrize("extra", [0, 1, -1, 128, HIDDEN])
def test_a_vector_of_another_size_is_an_error(
    dense: bool, multivector: bool, dimensions: int | None, n_values: int, extra: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jina_v4_serve.api.prompts import Prompt
    from jina_v4_serve.vllm_side import engine as module

    monkeypatch.setattr(module, "pooling_params", lambda _: None)
    engine = module.VllmEngine(Stub(n_values + extra), {}, 1)

    async def embed() -> Any:
        outputs: list[Output] = [*["dense"] * dense, *["multivector"] * multivector]
        return await engine.embed([Prompt([1] * N_TOKENS)], "some-id", request(*outputs, dimensions=dimensions))

    if extra:
        with pytest.RaisesGroup(pytest.RaisesExc(RuntimeError, match=f"returned {n_values + extra} numbers")):
            asyncio.run(embed())
        return
    (found,) = asyncio.run(embed())
    assert found.dense.shape == ((1, dimensions or HIDDEN) if dense else (0, HIDDEN))
    assert found.multivector.shape == (N_TOKENS if multivector else 0, 128)


@pytest.mark.filterwarnings("ignore")  # vLLM's imports
@pytest.mark.parametrize("kind", ["text", "late-chunked", "image", "no dense vector"])
def test_every_request_names_its_spans(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else vLLM would be asked for token ids, of which its model runner V2 makes a large matrix each step."""
    from jina_v4_serve.api.prompts import Prompt
    from jina_v4_serve.pooling import Span
    from jina_v4_serve.vllm_side import engine as module
    from PIL import Image
    from vllm.multimodal.inputs import PlaceholderRange

    sent: list[Any] = []
    monkeypatch.setattr(module, "pooling_params", sent.append)
    stub = Stub(2 * HIDDEN if kind == "late-chunked" else 3 * 128 if kind == "no dense vector" else HIDDEN)
    place = PlaceholderRange(offset=4, length=6)
    stub.rendered = {"prompt_token_ids": [1] * 20, "mm_placeholders": {"image": [place]}}
    prompt = {
        "text": Prompt([1] * N_TOKENS),
        "late-chunked": Prompt([1] * 20, spans=(Span(0, 9), Span(9, 20))),
        "image": Prompt([1] * 9, lambda: nullcontext(Image.new("RGB", (28, 28)))),
        "no dense vector": Prompt([1] * N_TOKENS),
    }[kind]
    output = "multivector" if kind == "no dense vector" else "dense"
    asyncio.run(module.VllmEngine(stub, {}, 1).embed([prompt], "some-id", request(output)))
    assert [wanted.spans for wanted in sent] == [
        {
            "text": (Span(0, N_TOKENS),),
            "late-chunked": (Span(0, 9), Span(9, 20)),
            "image": (Span(3, 11),),
            "no dense vector": (),
        }[kind]
    ]


@pytest.mark.filterwarnings("ignore")  # vLLM's imports
async def test_a_picture_is_closed_when_it_is_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    from jina_v4_serve.api.prompts import Prompt
    from jina_v4_serve.vllm_side import engine as module
    from PIL import Image
    from vllm.multimodal.inputs import PlaceholderRange

    monkeypatch.setattr(module, "pooling_params", lambda _: None)
    seen: list[str] = []

    @asynccontextmanager
    async def opened() -> AsyncIterator[Image.Image]:
        seen.append("opened")
        yield Image.new("RGB", (28, 28))
        seen.append("closed")

    stub = Stub(HIDDEN)
    stub.finish.clear()
    place = PlaceholderRange(offset=4, length=6)
    stub.rendered = {"prompt_token_ids": [1] * 20, "mm_placeholders": {"image": [place]}}
    engine = module.VllmEngine(stub, {}, 1)
    work = asyncio.create_task(engine.embed([Prompt([1] * 9, opened)], "some-id", request("dense")))
    while not stub.encoding:
        await asyncio.sleep(0)
    assert seen == ["opened", "closed"], "before the engine is done with it"
    stub.finish.set()
    await work
