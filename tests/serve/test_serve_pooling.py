"""The pooling maths, against plain loops."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jina_v4_serve.pooling import RunningSum, Span, SpecialTokens, dense_vectors, pooled_span

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
    bounds=st.tuples(st.integers(0, 50), st.integers(1, 50)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_steps_of_any_length_give_the_mean_of_the_span(
    lengths: list[int], bounds: tuple[int, int], dtype: torch.dtype, seed: int
) -> None:
    n_tokens = sum(lengths)
    start = bounds[0] % n_tokens
    stop = start + 1 + bounds[1] % (n_tokens - start)
    hidden = torch.randn(n_tokens, 16, generator=torch.Generator().manual_seed(seed)).to(dtype)
    running = RunningSum(Span(start, stop))
    for step in hidden.split(lengths):
        running.add(step)
    expected = hidden.to(torch.float64)[start:stop].mean(dim=0)
    assert running.mean().dtype == torch.float32
    np.testing.assert_allclose(running.mean(), expected, atol=1e-6)


def test_a_mean_over_tokens_not_seen_is_an_error() -> None:
    running = RunningSum(Span(0, 4))
    running.add(torch.ones(3, 8))
    with pytest.raises(RuntimeError, match="3 of 4 tokens"):
        running.mean()


def test_each_vector_is_cut_to_its_own_dimensions_and_has_unit_length() -> None:
    means = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    vectors = dense_vectors(list(means), [None, 8, 16, 8])
    assert [len(vector) for vector in vectors] == [32, 8, 16, 8]
    for mean, vector in zip(means.double(), vectors, strict=True):
        whole = mean / mean.norm()  # the published order: unit length, cut, unit length
        cut = whole[: len(vector)]
        np.testing.assert_allclose(vector, cut / cut.norm(), atol=1e-6)
