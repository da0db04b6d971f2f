"""The pooling maths, against plain loops."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jina_v4_serve.pooling import (
    Accumulator,
    PoolingRequest,
    Projector,
    Span,
    SpecialTokens,
    advance,
    pooled_span,
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


def exactly(hidden: torch.Tensor, wanted: PoolingRequest, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
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
def prompts(draw: st.DrawFn) -> tuple[list[int], PoolingRequest, int]:
    """The lengths of a prompt's steps, what it asks for, and which of two tasks' projectors."""
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    n_tokens = sum(lengths)
    starts = draw(st.lists(st.integers(0, n_tokens - 1), max_size=3))
    spans = tuple(Span(start, draw(st.integers(start + 1, n_tokens))) for start in starts)
    multivector = draw(st.booleans()) if spans else True
    return lengths, PoolingRequest(spans, multivector, draw(st.sampled_from([None, 4, 16]))), draw(st.integers(0, 1))


@settings(max_examples=60, deadline=None)
@given(
    asked=st.lists(prompts(), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_prompts_in_steps_of_any_length_get_what_each_alone_would_get_at_once(
    asked: list[tuple[list[int], PoolingRequest, int]], dtype: torch.dtype, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    tensors = [(torch.randn(8, 16, generator=random), torch.randn(8, generator=random)) for _ in range(2)]
    projectors = [Projector(*pair) for pair in tensors]
    hidden = [torch.randn(sum(lengths), 16, generator=random).to(dtype) for lengths, _, _ in asked]
    steps = [list(rows.split(lengths)) for rows, (lengths, _, _) in zip(hidden, asked, strict=True)]
    kept = [
        Accumulator(wanted, len(rows), projectors[task]) for rows, (_, wanted, task) in zip(hidden, asked, strict=True)
    ]
    found: list[torch.Tensor | None] = [None] * len(asked)
    while unfinished := [i for i in range(len(asked)) if steps[i]]:
        parts = [steps[i].pop(0) for i in unfinished]
        outputs = advance([kept[i] for i in unfinished], torch.cat(parts), [len(part) for part in parts])
        for i, output in zip(unfinished, outputs, strict=True):
            assert (output is None) == bool(steps[i])
            found[i] = output
    for output, rows, (_, wanted, task) in zip(found, hidden, asked, strict=True):
        assert output is not None
        assert output.dtype == torch.float32
        np.testing.assert_allclose(output, exactly(rows, wanted, *tensors[task]), atol=2e-6)


@pytest.mark.parametrize("n_steps", [1, 7])
def test_the_mean_of_a_long_text_is_as_exact_as_that_of_a_short_one(n_steps: int) -> None:
    """Float32 sums, one row after another, would be off by 1e-5."""
    n_tokens = 32_768
    hidden = torch.rand(n_tokens, 16, generator=torch.Generator().manual_seed(1))
    wanted = PoolingRequest((Span(0, n_tokens),))
    kept = Accumulator(wanted, n_tokens, None)
    for part in hidden.chunk(n_steps):
        (found,) = advance([kept], part, [len(part)])
    assert found is not None
    np.testing.assert_allclose(found, exactly(hidden, wanted, torch.empty(0, 16), torch.empty(0)), atol=2e-7)


def test_requests_that_end_alike_share_one_tensor() -> None:
    kept = [Accumulator(PoolingRequest((Span(0, n),)), n, None) for n in (3, 5, 9, 2)]
    found = advance(kept, torch.randn(17, 8), [3, 5, 7, 2])
    assert [output is None for output in found] == [False, False, True, False]
    assert len({output.untyped_storage().data_ptr() for output in found if output is not None}) == 1


@pytest.mark.parametrize("span", [Span(0, 4), Span(2, 2), Span(-1, 2), Span(3, 5)])
def test_a_span_that_is_not_within_the_prompt_is_an_error(span: Span) -> None:
    with pytest.raises(RuntimeError, match="is not within the 3 tokens"):
        Accumulator(PoolingRequest((Span(0, 3), span)), 3, None)


def test_spans_that_nobody_found_are_an_error() -> None:
    with pytest.raises(RuntimeError, match="the request has no spans"):
        Accumulator(PoolingRequest(), 4, None)


def test_a_multivector_without_a_projector_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="there is no projector"):
        Accumulator(PoolingRequest((), multivector=True), 4, None)
