"""Our layers for a CPU, judged by their distance to float64, on this processor and on older ones in disguise."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from processors import LIBRARIES, disguise

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore")]  # vLLM's imports are not ours to mend

HIDDEN, HEAD_SIZE, SECTIONS = 256, 64, [8, 12, 12]
NAMES = ("RMSNorm", "MRotaryEmbedding", "ApplyRotaryEmb", "MMEncoderAttention")
FLOAT32 = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def kernels() -> Iterator[Any]:
    """The module, in the configuration of an eager engine."""
    from vllm.config import CompilationConfig, VllmConfig, set_current_vllm_config

    config = VllmConfig(compilation_config=CompilationConfig(custom_ops=["all"], mode=0))
    with set_current_vllm_config(config):
        from jina_v4_serve.vllm_side import cpu_kernels

        if instructions := os.environ.get("ATEN_CPU_CAPABILITY"):
            assert f"/{LIBRARIES[instructions]}." in Path("/proc/self/maps").read_text()
        yield cpu_kernels


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"])
def any_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


@pytest.fixture
def dtype(kernels, any_dtype: torch.dtype) -> torch.dtype:
    """One in which the fused kernels are used here."""
    if not kernels.fused_kernels_round(any_dtype):
        pytest.skip(f"vLLM's kernels for this processor cut off to {any_dtype}, so they are not used")
    return any_dtype


def near(found: torch.Tensor, exact: torch.Tensor, before_rounding: torch.Tensor) -> None:
    """Check that a result is the number of its dtype that is nearest to float64's, or one as good as that.

    The value was off by something before it was rounded, once. So it may have been rounded to another number, one that
    is farther from the exact value than the nearest one is, by up to twice as much.

    Args:
        found: What was computed.
        exact: The same in float64.
        before_rounding: How far off the value may have been before it was rounded.
    """
    nearest = exact.to(found.dtype).double()
    excess = (found.double() - exact).abs() - (nearest - exact).abs() - 2 * before_rounding
    i = excess.argmax()
    assert excess.max() <= 0, f"{found.flatten()[i]} instead of {nearest.flatten()[i]}, exactly {exact.flatten()[i]}"


def normed(x: torch.Tensor, norm: Any) -> torch.Tensor:
    x = x.double()
    return x * (x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt() * norm.weight.data.double()


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rotary embedding, and the sizes of its products; of shapes (..., n_heads, head_size), (n, head_size / 2)."""
    a, b = x.double().chunk(2, -1)
    cos, sin = cos[:, None].double(), sin[:, None].double()
    sizes = ((a * cos).abs() + (b * sin).abs(), (b * cos).abs() + (a * sin).abs())
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1), torch.cat(sizes, -1)


def angles(rotary: Any, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's cosines and sines, of shape (n_tokens, head_size / 2): time, height and width in turn."""
    cos, sin = rotary.cos_sin_cache.to(dtype).chunk(2, -1)
    of_each = positions[torch.arange(3).repeat_interleave(torch.tensor(SECTIONS))].T  # (n_tokens, head_size / 2)
    return cos.gather(0, of_each), sin.gather(0, of_each)


def mrotary(kernels: Any, dtype: torch.dtype) -> Any:
    return kernels.FusedMRotaryEmbedding(
        HEAD_SIZE, HEAD_SIZE, 32768, base=1e6, is_neox_style=True, dtype=dtype, mrope_section=SECTIONS
    )


def near_turned(found: torch.Tensor, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    exact, products = turned(x, cos, sin)
    near(found, exact, FLOAT32 / 2 * products)  # float32 rounds each product


def test_a_result_that_was_cut_off_is_not_near(any_dtype: torch.dtype) -> None:
    exact = torch.tensor([1 + 0.75 * torch.finfo(any_dtype).eps], dtype=torch.float64)
    near(exact.to(any_dtype), exact, 0 * exact)
    with pytest.raises(AssertionError, match="instead of"):
        near(torch.ones(1), exact, 0 * exact)


@pytest.mark.parametrize("shape", [(1, HIDDEN), (37, HIDDEN), (5, 1, HIDDEN), (9, 1280), (9, 2048)], ids=str)
def test_the_norm_is_rounded_once(shape: tuple[int, ...], kernels, dtype: torch.dtype) -> None:
    norm = kernels.FusedRMSNorm(shape[-1])
    norm.weight.data.normal_()
    x, residual = torch.randn(2, *shape)
    exact = normed(x, norm)
    in_float32 = 4 * FLOAT32  # squares and their sum, a root, two products
    near(norm.forward_cpu(x), exact, in_float32 * exact.abs())
    exact_sum = x.double() + residual.double()
    exact = normed(exact_sum, norm)
    found, found_sum = norm.forward_cpu(x.clone(), residual.clone())
    near(found_sum, exact_sum, 0 * exact)
    near(found, exact, (torch.finfo(dtype).eps / 2 + in_float32) * exact.abs())  # the sum was rounded too


def test_the_norm_of_a_part_of_each_row_is_the_unfused_one(kernels, dtype: torch.dtype) -> None:
    norm = kernels.FusedRMSNorm(HIDDEN)
    x = torch.randn(9, 2 * HIDDEN)[:, :HIDDEN]
    assert not x.is_contiguous()
    assert torch.equal(norm.forward_cpu(x), norm.forward_native(x))


@pytest.mark.parametrize("n_tokens", [1, 37])
@pytest.mark.parametrize("kind", ["text", "image"])
def test_the_rotary_embedding_is_rounded_once(kind: str, n_tokens: int, kernels, dtype: torch.dtype) -> None:
    rotary = mrotary(kernels, dtype)
    positions = torch.randint(0, 32768, (3, n_tokens))
    if kind == "text":
        positions[:] = positions[0].clone()
    # As in the model: queries and keys are parts of one product's rows.
    together = torch.randn(n_tokens, 6, HEAD_SIZE)
    query, key = together.clone().flatten(1).split((4 * HEAD_SIZE, 2 * HEAD_SIZE), dim=-1)
    found = torch.cat(rotary.forward_cpu(positions, query, key), dim=-1)
    near_turned(found.view(n_tokens, 6, HEAD_SIZE), together, *angles(rotary, positions, dtype))


def test_the_rotary_embedding_follows_the_positions_of_each_step(kernels, dtype: torch.dtype) -> None:
    rotary = mrotary(kernels, dtype)
    buffer = torch.empty(3, 8, dtype=torch.int64)
    for step in range(4):  # vLLM writes each step's positions where the last one's were
        buffer.copy_(torch.randint(0, 32768, (3, 8)))
        if step == 2:
            buffer[:] = buffer[0].clone()
        for _ in range(2):  # layers
            query, key = torch.randn(8, 2, HEAD_SIZE), torch.randn(8, 1, HEAD_SIZE)
            found = rotary.forward_cpu(buffer, query.flatten(1).clone(), key.flatten(1).clone())
            for x, turned_x in zip((query, key), found, strict=True):
                near_turned(turned_x.view_as(x), x, *angles(rotary, buffer, dtype))


@pytest.mark.parametrize("n_patches", [1, 37])
def test_the_image_encoders_rotary_embedding_is_rounded_once(n_patches: int, kernels, dtype: torch.dtype) -> None:
    rotary = kernels.FusedApplyRotaryEmb(enforce_enable=True)
    x = torch.randn(2, n_patches, 3, HEAD_SIZE)
    cos, sin = torch.randn(2, n_patches, HEAD_SIZE // 2)
    near_turned(rotary.forward_cpu(x.clone(), cos, sin), x, cos, sin)


@pytest.mark.parametrize("lengths", [[8], [8, 8, 8], [8, 8, 4, 8, 8, 4, 6, 6, 3], [5, 0, 5, 0, 0]], ids=str)
def test_attention_stays_in_its_window(lengths: list[int], kernels, any_dtype: torch.dtype) -> None:
    attention = kernels.BatchedEncoderAttention(3, HEAD_SIZE)
    together = torch.randn(3, 1, sum(lengths), 3, HEAD_SIZE)
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0)
    found = attention.forward_cpu(*together, cu_seqlens)
    outputs, sizes = [], []
    for window in together.double()[:, 0].split(lengths, dim=1):  # (3, length, n_heads, head_size)
        query, key, value = window.transpose(1, 2)
        weights = (query @ key.mT * attention.scale).softmax(-1)
        outputs.append((weights @ value).transpose(0, 1))
        sizes.append((weights @ value.abs()).transpose(0, 1))
    # PyTorch rounds the weights to the dtype; scores and sums are float32.
    before_rounding = (torch.finfo(any_dtype).eps / 2 + 8 * FLOAT32) * torch.cat(sizes)
    near(found[0], torch.cat(outputs), before_rounding)


def norms(kernels: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """A layer's fused result, its unfused one, and float64's."""
    for hidden in (HIDDEN, 1280, 2048):
        norm = kernels.FusedRMSNorm(hidden)
        norm.weight.data.normal_()
        x, residual = torch.randn(2, 500, hidden)
        yield norm.forward_cpu(x), norm.forward_native(x), normed(x, norm)
        total = x.double() + residual.double()
        fused, unfused = (f(x.clone(), residual.clone()) for f in (norm.forward_cpu, norm.forward_native))
        yield from zip(fused, unfused, (normed(total, norm), total), strict=True)


def rotaries(kernels: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    dtype = torch.get_default_dtype()
    rotary, positions = mrotary(kernels, dtype), torch.randint(0, 32768, (3, 500))
    x = torch.randn(2, 500, 4, HEAD_SIZE)
    fused, unfused = (f(positions, *x.flatten(2).clone()) for f in (rotary.forward_cpu, rotary.forward_native))
    yield from zip(fused, unfused, turned(x, *angles(rotary, positions, dtype))[0].flatten(2), strict=True)


def image_rotaries(kernels: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    rotary, x = kernels.FusedApplyRotaryEmb(enforce_enable=True), torch.randn(2, 500, 4, HEAD_SIZE)
    cos, sin = torch.randn(2, 500, HEAD_SIZE // 2)
    exact, _ = turned(x, cos, sin)
    yield rotary.forward_cpu(x.clone(), cos, sin), rotary.forward_native(x, cos, sin), exact


@pytest.mark.parametrize("any_dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"], indirect=True)
@pytest.mark.parametrize(
    ("name", "results"),
    [("RMSNorm", norms), ("MRotaryEmbedding", rotaries), ("ApplyRotaryEmb", image_rotaries)],
    ids=["norm", "rotary", "image rotary"],
)
def test_a_fused_kernel_is_used_where_it_is_no_farther_from_float64(
    name: str, results: Callable[[Any], Iterator[Any]], kernels, any_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = {}
    monkeypatch.setattr(kernels, "op_registry_oot", registry)
    monkeypatch.setattr(kernels.CustomOp, "register_oot", lambda layer, name: registry.update({name: layer}))
    kernels.use(any_dtype)
    for fused, unfused, exact in results(kernels):
        distance, unfused_distance = (float((x.double() - exact).abs().mean()) for x in (fused, unfused))
        # 0.7 to 1.03 times as far where it rounds (the norm of a sum is of the rounded one), 1.39 to 2.46 where not.
        assert (name in registry) == (distance <= 1.1 * unfused_distance), (distance, unfused_distance)
    assert "MMEncoderAttention" in registry  # PyTorch's own, only called less often


def test_vllm_builds_its_layers_as_ours_where_they_are_used(kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.custom_op import op_registry_oot
    from vllm.model_executor.layers.layernorm import RMSNorm

    for name in NAMES:
        monkeypatch.delitem(op_registry_oot, name, raising=False)
    assert type(RMSNorm(HIDDEN)) is RMSNorm
    kernels.use(torch.float32)
    kernels.use(torch.float32)  # a second model in the process
    assert type(RMSNorm(HIDDEN)) is kernels.FusedRMSNorm
    assert [op_registry_oot[name].__base__.__name__ for name in NAMES] == list(NAMES)
    assert all(op_registry_oot[name].__module__ == kernels.__name__ for name in NAMES)
    for name in NAMES:
        monkeypatch.delitem(op_registry_oot, name)


@pytest.fixture
def products(kernels, monkeypatch: pytest.MonkeyPatch) -> Any:
    from jina_v4_serve.vllm_side import cpu_products

    for name in ("onednn_mm", "onednn_scaled_mm"):  # to be put back
        monkeypatch.setattr(cpu_products.kernels, name, getattr(cpu_products.kernels, name))
    return cpu_products


def test_few_numbers_of_rows_are_computed_and_few_rows_too_many(products) -> None:
    computed = {n: products.n_computed(n) for n in range(1, 2049)}
    assert all(n <= computed[n] <= max(n + 15, n * 17 / 16) for n in computed)
    assert len(set(computed.values())) == 64


@pytest.mark.parametrize("any_dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"], indirect=True)
@pytest.mark.parametrize("shape", [(1,), (16,), (17,), (300,), (2, 33)], ids=str)
def test_rows_that_are_added_change_no_product(shape: tuple[int, ...], any_dtype: torch.dtype, products) -> None:
    x, weight, bias = torch.randn(*shape, HIDDEN), torch.randn(96, HIDDEN), torch.randn(96)
    try:
        handler = products.kernels.create_onednn_mm(weight.t(), 32)
    except RuntimeError:
        pytest.skip(f"oneDNN has no products of {any_dtype} for this processor; vLLM leaves them to torch")
    for b in (None, bias):
        exact = torch.nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
        sizes = torch.nn.functional.linear(x.double().abs(), weight.double().abs(), bias.double().abs())
        near(products.plain(handler, x, b), exact, HIDDEN * FLOAT32 * sizes)


@pytest.mark.parametrize("n_rows", [1, 16, 17, 300])
def test_rows_that_are_added_change_no_product_of_int8(n_rows: int, products) -> None:
    x = torch.randint(-40, 41, (n_rows, HIDDEN), dtype=torch.int8)  # so small that no processor cuts anything off
    weight = torch.randint(-40, 41, (96, HIDDEN), dtype=torch.int8)
    scale, of_weights = torch.rand(n_rows, 1), torch.rand(96, 1)
    handler = products.kernels.create_onednn_scaled_mm(weight.t(), of_weights, torch.float32, True, False, 32)
    output = torch.empty(n_rows, 96)
    assert products.scaled(handler, x, output, scale, None, None, None) is output
    exact = (x.double() @ weight.double().T) * scale.double() * of_weights.double().T
    near(output, exact, 4 * FLOAT32 * exact.abs())


def test_products_of_int8_are_exact_where_the_launcher_serves_them(products) -> None:
    from jina_v4_serve.launch.cpu import int8_is_exact

    x, ones, output = torch.full((16, 64), 127, dtype=torch.int8), torch.ones(16, 1), torch.empty(16, 16)
    handler = products.kernels.create_onednn_scaled_mm(x.t(), ones, torch.float32, True, False, 1)
    products.scaled(handler, x, output, ones, None, None, None)
    is_exact = bool((output == 64 * 127 * 127).all())
    assert is_exact == (int8_is_exact() and os.environ.get("ATEN_CPU_CAPABILITY") != "avx2")


def test_vllm_s_linear_layers_use_our_products(products, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    seen: list[int] = []

    def plain(handler: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        seen.append(len(x))
        return original(handler, x, bias)

    original = products._plain
    monkeypatch.setattr(products, "_plain", plain)
    products.use()
    layer = torch.nn.Linear(HIDDEN, 96, bias=False)
    dispatch_cpu_unquantized_gemm(layer, remove_weight=False)
    for n_rows in (17, 20, 32):
        assert layer.cpu_linear(torch.randn(n_rows, HIDDEN), layer.weight, None).shape == (n_rows, 96)
    assert seen == [32, 32, 32]


@pytest.mark.skipif("ATEN_CPU_CAPABILITY" in os.environ, reason="this is a processor in disguise")
@pytest.mark.parametrize("instructions", LIBRARIES)
def test_all_tests_of_this_file_pass_on_an_older_processor(instructions: str) -> None:
    if not (environment := disguise(instructions)):
        pytest.skip(f"this processor has no {instructions}")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
