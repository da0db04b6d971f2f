"""Pooling of hidden states, against the same sums written as loops."""

import math
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jina_v4_client import BadReplyError, WrongServerError
from jina_v4_client._stock import check_rows, normalise_rows, pool, vision_span


def rows_of(n_tokens: int, hidden: int = 256, seed: int = 0) -> np.ndarray:
    return (10 * np.random.default_rng(seed).standard_normal((n_tokens, hidden))).astype(np.float32)


def normalised(values: Iterable[float]) -> list[float]:
    values = list(values)
    length = math.sqrt(math.fsum(value * value for value in values))
    return [value / length for value in values]


def looped(rows: np.ndarray, first: int, last: int, dim: int) -> list[float]:
    """Mean of the rows first..last, normalised, cut, normalised again: step by step as the published code."""
    tokens = [[float(value) for value in row] for row in rows]
    mean = [math.fsum(tokens[n][d] for n in range(first, last + 1)) / (last + 1 - first) for d in range(rows.shape[1])]
    return normalised(normalised(mean)[:dim])


@settings(deadline=None, max_examples=30)
@given(n_tokens=st.integers(1, 40), dim=st.sampled_from([None, 128, 256]), seed=st.integers(0, 99))
def test_a_text_is_the_mean_of_all_its_tokens(n_tokens: int, dim: int | None, seed: int) -> None:
    rows = rows_of(n_tokens, seed=seed)
    vector = pool(rows, dim)
    assert (vector.dtype, vector.shape) == (np.float32, (dim or 256,))
    np.testing.assert_allclose(vector, looped(rows, 0, n_tokens - 1, dim or 256), atol=1e-7, rtol=0)


@settings(deadline=None, max_examples=30)
@given(n_image_tokens=st.integers(1, 40), dim=st.sampled_from([None, 128, 256]), seed=st.integers(0, 99))
def test_an_image_is_the_mean_of_its_vision_span_with_both_ends(
    n_image_tokens: int, dim: int | None, seed: int
) -> None:
    rows = rows_of(3 + 1 + n_image_tokens + 1 + 6, seed=seed)
    vector = pool(vision_span(rows, n_image_tokens), dim)
    assert (vector.dtype, vector.shape) == (np.float32, (dim or 256,))
    np.testing.assert_allclose(vector, looped(rows, 3, 3 + n_image_tokens + 1, dim or 256), atol=1e-7, rtol=0)


def test_long_sums_keep_their_digits() -> None:
    rows = rows_of(32768, hidden=4) + np.float32(1000)
    np.testing.assert_allclose(pool(rows, None), looped(rows, 0, 32767, 4), atol=1e-7, rtol=0)


@pytest.mark.parametrize("surplus", [-1, 1, 20])
def test_an_image_prompt_of_another_length_is_refused(surplus: int) -> None:
    with pytest.raises(WrongServerError, match=f"made {21 + surplus} tokens of an image where .* makes 21"):
        vision_span(rows_of(21 + surplus), 10)


def test_more_dimensions_than_the_model_has_are_refused() -> None:
    with pytest.raises(WrongServerError, match="truncate_dim=512 is more than the 256 dimensions"):
        pool(rows_of(3), 512)


def test_rows_that_add_up_to_nothing_are_refused() -> None:
    with pytest.raises(BadReplyError, match="all zero"):
        pool(np.zeros((3, 256), np.float32), None)


def test_every_row_is_brought_to_unit_length() -> None:
    rows = rows_of(5)
    found = normalise_rows(rows)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [normalised(map(float, row)) for row in rows], atol=1e-7, rtol=0)
    rows[3] = 0
    with pytest.raises(BadReplyError, match="a row of zeros"):
        normalise_rows(rows)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
def test_a_single_bad_number_is_refused(value: float) -> None:
    rows = rows_of(5)
    rows[3, 17] = value
    with pytest.raises(BadReplyError, match="NaN or infinity"):
        check_rows(rows)


def test_normalised_rows_are_refused_with_the_flags_to_set() -> None:
    rows = rows_of(5)
    check_rows(rows)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    with pytest.raises(WrongServerError, match=r'normalises every token .*"use_activation":false'):
        check_rows(rows)
