"""The pooling maths, against plain loops."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jina_v4_serve.pooling import Accumulator, Projector, Span, SpecialTokens, Wanted, pooled_span

SPECIAL = SpecialTokens(image=398, vision_start=395, vision_end=396)
HEAD, TAIL = [387, 20, 21], [30, 31, 32, 33, 388, 21]


def image_prompt(n_image_tokens: int) -> torch.Tensor:
    return torch.tensor([*HEAD, 395, *[398] * n_image_tokens, 396, *TAIL])


@pytest.mark.parametrize("n_image_tokens", [1, 4, 768])
def test_an_image_prompt_is_pooled_over_its_vision_span_inclusive(n_image_tokens: int) -> None:
    assert pooled_span(image_prompt(n_image_tokens), SPECIAL) == Span(3, 3 + n_image_tokens + 2)


@pytest.mark.parametrize(
    "token_ids",
    [
        pytest.param([1, 2, 3], id="text"),
        pytest.param([1], id="one token"),
        pytest.param([395, 1, 2], id="a start alone"),
        pytest.param([395], id="nothing but a start"),
        pytest.param([1, 398, 398, 396], id="image tokens without a start"),
        pytest.param([395, 398, 398], id="no end"),
        pytest.param([395, 396, 1], id="an empty span"),
        pytest.param([395, 398, 1, 398, 396], id="a text token inside"),
        pytest.param([395, 398, 396, 395, 398, 396], id="two images"),
    ],
)
def test_anything_else_is_pooled_over_every_token(token_ids: list[int]) -> None:
    assert pooled_span(torch.tensor(token_ids), SPECIAL) == Span(0, len(token_ids))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    bounds=st.lists(st.tuples(st.integers(0, 50), st.integers(1, 50)), min_size=0, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    dimensions=st.sampled_from([None, 4, 16]),
    multivector=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_steps_of_any_length_give_what_one_step_gives(
    lengths: list[int],
    bounds: list[tuple[int, int]],
    dtype: torch.dtype,
    dimensions: int | None,
    multivector: bool,
    seed: int,
) -> None:
    assume(bounds or multivector)
    n_tokens = sum(lengths)
    spans = []
    for start, length in bounds:
        start %= n_tokens
        spans.append(Span(start, start + 1 + length % (n_tokens - start)))
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n_tokens, 16, generator=random).to(dtype)
    weight, bias = torch.randn(8, 16, generator=random), torch.randn(8, generator=random)
    kept = Accumulator(Wanted(tuple(spans), multivector, dimensions), Span(0, n_tokens))
    for step in hidden.split(lengths):
        kept.add(step, Projector(weight, bias))
    found = kept.result()

    exact = hidden.double()
    expected = []
    for span in spans:
        mean = exact[span.start : span.stop].mean(dim=0)
        cut = (mean / mean.norm())[:dimensions]  # the published order: unit length, cut, unit length
        expected.append(cut / cut.norm())
    if multivector:
        rows = exact @ weight.double().T + bias.double()
        expected.extend(row / row.norm() for row in rows)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, torch.cat(expected), atol=2e-6)


def test_the_published_span_is_what_is_pooled_where_none_is_asked() -> None:
    hidden = torch.arange(8.0).reshape(4, 2) + 1
    kept = Accumulator(Wanted(), Span(1, 3))
    kept.add(hidden, None)
    mean = hidden[1:3].mean(dim=0)
    np.testing.assert_allclose(kept.result(), mean / mean.norm(), atol=1e-6)


def test_a_mean_over_tokens_not_seen_is_an_error() -> None:
    kept = Accumulator(Wanted(), Span(0, 4))
    kept.add(torch.ones(3, 8), None)
    with pytest.raises(RuntimeError, match="3 of 4 tokens"):
        kept.result()


def test_a_multivector_without_a_projector_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="without a projector"):
        Accumulator(Wanted(multivector=True), Span(0, 4)).add(torch.ones(3, 8), None)
