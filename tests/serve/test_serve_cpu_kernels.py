"""vLLM's fused CPU kernels against its unfused layers."""

from collections.abc import Iterator

import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's imports are not ours to mend

HIDDEN, HEAD_SIZE, SECTIONS = 256, 64, [8, 12, 12]


@pytest.fixture(scope="module")
def kernels() -> Iterator[object]:
    """The module, in the configuration of an eager engine."""
    from vllm.config import CompilationConfig, VllmConfig, set_current_vllm_config

    config = VllmConfig(compilation_config=CompilationConfig(custom_ops=["all"], mode=0))
    with set_current_vllm_config(config):
        from jina_v4_serve import cpu_kernels

        yield cpu_kernels


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    # Of bfloat16 the last of eight bits: the kernel rounds once, the unfused layer twice.
    rtol, atol = (1e-5, 2e-6) if expected.dtype == torch.float32 else (2**-7, 2**-7)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("shape", [(1, HIDDEN), (37, HIDDEN), (5, 1, HIDDEN)], ids=str)
def test_the_norm_is_the_unfused_one(shape: tuple[int, ...], kernels, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = kernels.FusedRMSNorm(HIDDEN)
    norm.weight.data.normal_()
    x, residual = torch.randn(shape), torch.randn(shape)
    close(norm.forward_cpu(x), norm.forward_native(x))
    expected, total = norm.forward_native(x.clone(), residual.clone())
    found, summed = norm.forward_cpu(x.clone(), residual.clone())
    close(found, expected)
    close(summed, total)


def test_the_norm_of_a_part_of_each_row_is_the_unfused_one(kernels, dtype: torch.dtype) -> None:
    norm = kernels.FusedRMSNorm(HIDDEN)
    x = torch.randn(9, 2 * HIDDEN)[:, :HIDDEN]
    assert not x.is_contiguous()
    close(norm.forward_cpu(x), norm.forward_native(x))


@pytest.mark.parametrize("n_tokens", [1, 37])
@pytest.mark.parametrize("kind", ["text", "image"])
def test_the_rotary_embedding_is_the_unfused_one(kind: str, n_tokens: int, kernels, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rotary = kernels.FusedMRotaryEmbedding(
        HEAD_SIZE, HEAD_SIZE, 32768, base=1e6, is_neox_style=True, dtype=dtype, mrope_section=SECTIONS
    )
    positions = torch.randint(0, 32768, (3, n_tokens))
    if kind == "text":
        positions[:] = positions[0].clone()
    # As in the model: queries and keys are parts of one product's rows.
    together = torch.randn(n_tokens, 4 * HEAD_SIZE + 2 * HEAD_SIZE)
    query, key = together.clone()[:, : 4 * HEAD_SIZE], together.clone()[:, 4 * HEAD_SIZE : 5 * HEAD_SIZE]
    expected = rotary.forward_native(positions, query.clone(), key.clone())
    for found, unfused in zip(rotary.forward_cpu(positions, query, key), expected, strict=True):
        close(found, unfused)


def test_the_rotary_embedding_follows_the_positions_of_each_step(kernels, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rotary = kernels.FusedMRotaryEmbedding(
        HEAD_SIZE, HEAD_SIZE, 32768, base=1e6, is_neox_style=True, dtype=dtype, mrope_section=SECTIONS
    )
    buffer = torch.empty(3, 8, dtype=torch.int64)
    for step in range(4):  # vLLM writes each step's positions where the last one's were
        buffer.copy_(torch.randint(0, 32768, (3, 8)))
        if step == 2:
            buffer[:] = buffer[0].clone()
        for _ in range(2):  # layers
            query, key = torch.randn(8, 2 * HEAD_SIZE), torch.randn(8, HEAD_SIZE)
            expected = rotary.forward_native(buffer, query.clone(), key.clone())
            for found, unfused in zip(rotary.forward_cpu(buffer, query, key), expected, strict=True):
                close(found, unfused)


@pytest.mark.parametrize("n_patches", [1, 37])
def test_the_image_encoders_rotary_embedding_is_the_unfused_one(n_patches: int, kernels, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rotary = kernels.FusedApplyRotaryEmb(enforce_enable=True)
    x = torch.randn(2, n_patches, 3, HEAD_SIZE)
    angles = torch.randn(n_patches, HEAD_SIZE // 2)
    expected = rotary.forward_native(x.clone(), angles.cos(), angles.sin())
    close(rotary.forward_cpu(x, angles.cos(), angles.sin()), expected)


@pytest.mark.parametrize("lengths", [[8], [8, 8, 8], [8, 8, 4, 8, 8, 4, 6, 6, 3], [5, 0, 5, 0, 0]], ids=str)
def test_attention_in_windows_is_that_of_each_window(lengths: list[int], kernels, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    attention = kernels.BatchedEncoderAttention(3, HEAD_SIZE)
    query, key, value = torch.randn(3, 1, sum(lengths), 3, HEAD_SIZE)
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0)
    expected = super(kernels.BatchedEncoderAttention, attention).forward_cpu(query, key, value, cu_seqlens)
    close(attention.forward_cpu(query, key, value, cu_seqlens), expected)


def test_vllm_builds_its_layers_as_ours_where_they_are_used(kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.custom_op import op_registry_oot
    from vllm.model_executor.layers.layernorm import RMSNorm

    names = ("RMSNorm", "MRotaryEmbedding", "ApplyRotaryEmb", "MMEncoderAttention")
    for name in names:
        monkeypatch.delitem(op_registry_oot, name, raising=False)
    assert type(RMSNorm(HIDDEN)) is RMSNorm
    kernels.use()
    kernels.use()  # a second model in the process
    assert type(RMSNorm(HIDDEN)) is kernels.FusedRMSNorm
    assert [op_registry_oot[name].__base__.__name__ for name in names] == list(names)
    assert all(op_registry_oot[name].__module__ == kernels.__name__ for name in names)
    for name in names:
        monkeypatch.delitem(op_registry_oot, name)
