"""The model between vLLM and its own Qwen2.5-VL."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's imports are not ours to mend


@pytest.mark.parametrize("n_tokens", [1, 2, 17, 32768])
def test_the_positions_of_a_text_are_those_that_vllm_computes(n_tokens: int) -> None:
    from jina_v4_serve.vllm_side.model import JinaEmbeddingsV4ForEmbedding
    from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration as Vllms

    model: Any = JinaEmbeddingsV4ForEmbedding.__new__(JinaEmbeddingsV4ForEmbedding)  # without weights
    model.__dict__["config"] = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2))
    tokens = list(range(n_tokens))
    expected, expected_delta = Vllms.get_mrope_input_positions(model, tokens, [])
    positions, delta = model.get_mrope_input_positions(tokens, [])
    assert torch.equal(positions, expected)
    assert (positions.dtype, delta) == (expected.dtype, expected_delta)
