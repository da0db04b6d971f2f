"""The pooling maths, against plain loops."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jina_v4_serve.pooling import (
    Accumulator,
    Projector,
    Span,
    SpecialTokens,
    Wanted,
    advance,
    pooled_span,
    results,
)

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


def exactly(hidden: torch.Tensor, wanted: Wanted, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    exact = hidden.double()
    expected = []
    for span in wanted.spans or ():
        mean = exact[span.start : span.stop].mean(dim=0)
        cut = (mean / mean.norm())[: wanted.dimensions]  # the published order: unit length, cut, unit length
        expected.append(cut / cut.norm())
    if wanted.multivector:
        rows = exact @ weight.double().T + bias.double()
        expected.extend(row / row.norm() for row in rows)
    return torch.cat(expected)


@st.composite
def prompts(draw: st.DrawFn) -> tuple[list[int], Wanted, int]:
    """The lengths of a prompt's steps, what it asks for, and which of two tasks' projectors."""
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    n_tokens = sum(lengths)
    starts = draw(st.lists(st.integers(0, n_tokens - 1), max_size=3))
    spans = tuple(Span(start, draw(st.integers(start + 1, n_tokens))) for start in starts)
    multivector = draw(st.booleans()) if spans else True
    return lengths, Wanted(spans, multivector, draw(st.sampled_from([None, 4, 16]))), draw(st.integers(0, 1))


@settings(max_examples=60, deadline=None)
@given(
    asked=st.lists(prompts(), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_prompts_in_steps_of_any_length_get_what_each_alone_would_get_at_once(
    asked: list[tuple[list[int], Wanted, int]], dtype: torch.dtype, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    tensors = [(torch.randn(8, 16, generator=random), torch.randn(8, generator=random)) for _ in range(2)]
    projectors = [Projector(*pair) for pair in tensors]
    hidden = [torch.randn(sum(lengths), 16, generator=random).to(dtype) for lengths, _, _ in asked]
    steps = [list(rows.split(lengths)) for rows, (lengths, _, _) in zip(hidden, asked, strict=True)]
    kept = [
        Accumulator(wanted, Span(0, len(rows)), projectors[task])
        for rows, (_, wanted, task) in zip(hidden, asked, strict=True)
    ]
    while unfinished := [i for i in range(len(asked)) if steps[i]]:
        advance([kept[i] for i in unfinished], [steps[i].pop(0) for i in unfinished])
    for found, rows, (_, wanted, task) in zip(results(kept), hidden, asked, strict=True):
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found, exactly(rows, wanted, *tensors[task]), atol=2e-6)


def test_the_published_span_is_what_is_pooled_where_none_is_asked() -> None:
    hidden = torch.arange(8.0).reshape(4, 2) + 1
    kept = Accumulator(Wanted(), Span(1, 3), None)
    advance([kept], [hidden])
    mean = hidden[1:3].mean(dim=0)
    np.testing.assert_allclose(results([kept])[0], mean / mean.norm(), atol=1e-6)


@pytest.mark.parametrize("spans", [(Span(0, 4),), (Span(0, 2), Span(5, 6)), (Span(2, 4), Span(0, 1))])
def test_a_mean_over_tokens_not_seen_is_an_error(spans: tuple[Span, ...]) -> None:
    kept = Accumulator(Wanted(spans), Span(0, 9), None)
    advance([kept], [torch.ones(3, 8)])
    with pytest.raises(RuntimeError, match=r"only 3 of \d tokens"):
        results([kept])


def test_a_multivector_without_a_projector_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="without a projector"):
        Accumulator(Wanted(multivector=True), Span(0, 4), None)
