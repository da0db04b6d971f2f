"""The maths of folding, against exact and against float64 sums."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from jina_v4_merge.lora import fold

DTYPES = [torch.bfloat16, torch.float16, torch.float32]

sizes = st.integers(1, 48)
seeds = st.integers(0, 2**31)


@given(n_out=sizes, n_in=sizes, rank=sizes, seed=seeds, power=st.integers(-3, 3), dtype=st.sampled_from(DTYPES))
def test_a_sum_that_float32_holds_exactly_is_rounded_just_once(
    n_out: int, n_in: int, rank: int, seed: int, power: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Eighths up to 4: every product and every partial sum has few enough bits for float32.
    weight, a, b = (
        torch.randint(-32, 33, shape, generator=generator).double() / 8
        for shape in ((n_out, n_in), (rank, n_in), (n_out, rank))
    )
    scaling = 2.0**power
    folded = fold(weight.bfloat16(), a.bfloat16(), b.bfloat16(), scaling, dtype)
    assert folded.dtype == dtype
    assert torch.equal(folded, (weight + scaling * (b @ a)).to(dtype))


@given(
    n_out=sizes,
    n_in=sizes,
    rank=sizes,
    seed=seeds,
    scaling=st.floats(-4, 4),
    dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 4),
)
def test_any_sum_is_within_one_ulp_of_the_float64_sum(
    n_out: int, n_in: int, rank: int, seed: int, scaling: float, dtypes: tuple[torch.dtype, ...]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight, a, b = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape, dtype in zip(((n_out, n_in), (rank, n_in), (n_out, rank)), dtypes, strict=False)
    )
    exact = weight.double() + scaling * (b.double() @ a.double())
    folded = fold(weight, a, b, scaling, dtypes[3])
    ulp = torch.finfo(dtypes[3]).eps * exact.abs().clamp(min=torch.finfo(dtypes[3]).tiny)
    # The sum itself may be off by its own rounding, at the size of its terms: they can cancel out.
    terms = weight.double().abs() + abs(scaling) * (b.double().abs() @ a.double().abs())
    sum_error = (rank + 2) * torch.finfo(torch.float64).eps * terms
    assert ((folded.double() - exact).abs() <= ulp + sum_error).all()


def test_no_input_is_changed() -> None:
    inputs = torch.randn(4, 3), torch.randn(2, 3), torch.randn(4, 2)
    before = [tensor.clone() for tensor in inputs]
    fold(*inputs, 2.0, torch.float32)
    assert all(torch.equal(was, tensor) for was, tensor in zip(before, inputs, strict=True))
