"""Cosine, MaxSim and the order they give, against plain loops; blocks of any size; the map of an image's patches."""

import itertools
import math
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from conftest import Golden
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jina_v4_client import ArgumentError, scoring
from jina_v4_client._model import MAX_PIXELS, count_image_tokens
from jina_v4_client.scoring import Hit, cosine, image_grid, maxsim, rank, similarity, similarity_map
from PIL import Image
from unit_rows import ragged, unit

RANDOM = np.random.default_rng(11)
IN_ANY_ORDER = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def loop_maxsim(query: np.ndarray, document: np.ndarray) -> float:
    return sum(max(float(np.dot(q.astype(float), d.astype(float))) for d in document) for q in query)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, int], None]]:
    def make(n_bytes: int, n_query_rows: int) -> None:
        monkeypatch.setattr(similarity, "_BLOCK_BYTES", n_bytes)
        monkeypatch.setattr(similarity, "_MAX_QUERY_ROWS", n_query_rows)

    return make


# --- cosine ---


def test_cosine_is_the_cosine_of_vectors_of_any_length_and_dtype() -> None:
    queries, documents = RANDOM.standard_normal((3, 64)), RANDOM.standard_normal((50, 64)) * 7
    expected = (queries @ documents.T) / np.outer(np.linalg.norm(queries, axis=1), np.linalg.norm(documents, axis=1))
    for given_documents in (documents, documents.astype(np.float32), list(documents), np.asfortranarray(documents)):
        scores = cosine(queries, given_documents)
        assert (scores.shape, scores.dtype) == ((3, 50), np.float32)
        np.testing.assert_allclose(scores, expected, atol=1e-6)
    np.testing.assert_allclose(cosine(queries, documents.astype(np.float16)), expected, atol=1e-3)
    np.testing.assert_allclose(cosine(queries[0], documents[1]), expected[:1, 1:2], atol=1e-6)


def test_cosine_is_never_outside_of_its_range() -> None:
    vectors = unit(500, 256)
    assert np.diag(cosine(vectors, vectors)).max() == 1
    assert np.diag(cosine(vectors, -vectors)).min() == -1


@pytest.mark.parametrize("n_bytes", [1, 1000, 4096])
def test_cosine_is_the_same_in_blocks_of_any_size(small_blocks: Callable[[int, int], None], n_bytes: int) -> None:
    queries, documents = unit(3, 64), unit(50, 64, seed=1)
    whole = cosine(queries, documents)
    small_blocks(n_bytes, 1)
    np.testing.assert_allclose(cosine(queries, documents), whole, atol=1e-6)
    np.testing.assert_allclose(cosine(queries, list(documents)), whole, atol=1e-6)


# --- MaxSim ---


@IN_ANY_ORDER
@given(
    query_lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    document_lengths=st.lists(st.integers(1, 12), min_size=1, max_size=9),
    dim=st.sampled_from([8, 16, 128]),
    n_bytes=st.integers(1, 5000),
    n_query_rows=st.integers(1, 20),
    negative=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_maxsim_is_the_plain_double_loop_in_blocks_of_any_size(
    small_blocks: Callable[[int, int], None],
    query_lengths: list[int],
    document_lengths: list[int],
    dim: int,
    n_bytes: int,
    n_query_rows: int,
    negative: bool,
    seed: int,
) -> None:
    queries, documents = ragged(query_lengths, dim, seed), ragged(document_lengths, dim, seed + 1)
    if negative:  # then a row of padding would win everywhere
        queries, documents = [np.abs(rows) for rows in queries], [-np.abs(rows) for rows in documents]
    small_blocks(n_bytes, n_query_rows)
    scores = maxsim(queries, documents)
    assert scores.dtype == np.float32
    expected = [[loop_maxsim(query, document) for document in documents] for query in queries]
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert (scores < 0).all() or not negative


def test_maxsim_takes_arrays_of_one_length_and_one_alone() -> None:
    queries, documents = unit(2, 5, 16), unit(7, 3, 16, seed=1)
    scores = maxsim(queries, documents)
    assert scores.shape == (2, 7)
    np.testing.assert_array_equal(scores, maxsim(list(queries), list(documents)))
    np.testing.assert_allclose(maxsim(queries[0], documents[3]), scores[:1, 3:4], atol=1e-6)


def test_maxsim_of_golden_rows_is_the_plain_double_loop(golden: Golden) -> None:
    rows = [golden.rows[f"retrieval/query/{i}/multi"] for i in (0, 2, 5)]
    pages = [golden.rows[f"retrieval/image/{i}/multi"] for i in (0, 3)]
    expected = [[loop_maxsim(query, page) for page in pages] for query in rows]
    np.testing.assert_allclose(maxsim(rows, pages), expected, atol=1e-4)


def test_a_million_rows_are_never_one_matrix() -> None:
    query, rows = unit(32, 128), unit(50_000, 128, seed=1)
    documents = [rows[i : i + 500] for i in range(0, 50_000, 500)] * 20  # 1,000,000 rows: similarities alone 128 MB
    tracemalloc.start()
    scores = maxsim(query, documents)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    print(f"peak {peak_bytes / 2**20:.1f} MiB")
    assert peak_bytes < 32 * 2**20
    np.testing.assert_allclose(scores[0, :100], scores[0, -100:], atol=1e-5)


# --- rank ---


@settings(max_examples=100, deadline=None)
@given(values=st.lists(st.integers(-3, 3), min_size=1, max_size=40), top_k=st.one_of(st.none(), st.integers(1, 50)))
def test_equal_scores_keep_the_order_of_the_documents(values: list[int], top_k: int | None) -> None:
    scores = np.array(values, dtype=np.float32)
    expected = sorted(range(len(values)), key=lambda i: (-values[i], i))[:top_k]
    assert scoring.best(scores, top_k).tolist() == expected


def test_rank_dispatches_by_the_query() -> None:
    vectors, rows = unit(30, 32), ragged([3, 4, 5, 6], 32, seed=2)
    hits = rank(vectors[7], vectors, top_k=3)
    assert [type(hit) for hit in hits] == [Hit] * 3
    assert (hits[0].index, round(hits[0].score, 5)) == (7, 1.0)
    assert (type(hits[0].index), type(hits[0].score)) == (int, float)
    hits = rank(rows[2], rows)
    assert (hits[0].index, round(hits[0].score, 4), len(hits)) == (2, 5.0, 4)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    assert [hit.index for hit in rank(rows[2], [rows[2]])] == [0]
    assert rank(rows[2], np.stack([rows[2], -rows[2]]))[0].index == 0


# --- refusals ---

DENSE, MULTI = unit(3, 8), [unit(2, 8), unit(4, 8)]
NAN, INFINITE, HUGE, ZERO = (DENSE.copy() for _ in range(4))
NAN[1, 2], INFINITE[1, 2], HUGE[1, 2], ZERO[1] = np.nan, -np.inf, 1e30, 0


@pytest.mark.parametrize(
    ("call", "fragment"),
    [
        pytest.param(lambda: cosine([], DENSE), "queries is empty", id="no queries"),
        pytest.param(lambda: cosine(DENSE, []), "documents is empty", id="no documents"),
        pytest.param(lambda: cosine(DENSE, np.empty((0, 8))), "documents is empty", id="an array without documents"),
        pytest.param(lambda: maxsim(MULTI, []), "documents is empty", id="no multi-vectors"),
        pytest.param(lambda: maxsim(MULTI, [DENSE, np.empty((0, 8))]), "documents[1] has shape (0, 8)", id="no rows"),
        pytest.param(lambda: cosine(DENSE, np.empty((3, 0))), "nothing in it", id="no width"),
        pytest.param(lambda: cosine(DENSE, unit(3, 9)), "width 8, the documents 9", id="widths"),
        pytest.param(lambda: maxsim(MULTI, unit(3, 9)), "width 8, the documents 9", id="widths of rows"),
        pytest.param(lambda: maxsim(MULTI, [DENSE, unit(3, 9)]), "documents[1] has width 9", id="widths in a list"),
        pytest.param(lambda: cosine(DENSE, MULTI), "a dense vector has (dim,)", id="multi-vectors as dense"),
        pytest.param(lambda: rank(DENSE[0], MULTI), "a dense vector has (dim,)", id="a dense query"),
        pytest.param(lambda: rank(MULTI[0], list(DENSE)), "a multi-vector has (n_tokens, dim)", id="a multi query"),
        pytest.param(lambda: rank(DENSE[:1], DENSE), "pass query[0]", id="a dense query in an array"),
        pytest.param(lambda: rank(MULTI[0], DENSE), "pass [documents]", id="one multi-vector alone"),
        pytest.param(lambda: rank(unit(2, 2, 8), MULTI), "it must be one", id="two queries"),
        pytest.param(lambda: cosine(DENSE, NAN), "documents[1] holds NaN", id="nan"),
        pytest.param(lambda: cosine(INFINITE, DENSE), "queries[1] holds NaN", id="infinity"),
        pytest.param(lambda: cosine(DENSE, list(HUGE)), "documents[1] holds NaN", id="too large"),
        pytest.param(lambda: cosine(DENSE, HUGE.astype(float) ** 3), "holds NaN", id="too large a float64"),
        pytest.param(lambda: cosine(DENSE, ZERO), "documents[1] is all zeros", id="zeros"),
        pytest.param(lambda: maxsim(MULTI, [DENSE, ZERO]), "documents[1], row 1, is all zeros", id="padding"),
        pytest.param(lambda: maxsim([MULTI[0], NAN], MULTI), "queries[1], row 1, holds NaN", id="nan in a row"),
        pytest.param(lambda: cosine(DENSE, np.ones((2, 8), np.int8)), "documents[0] is int8, not float", id="int8"),
        pytest.param(lambda: cosine(DENSE, "text"), "documents is a str", id="a text"),
        pytest.param(lambda: cosine(DENSE, 3), "documents is a int", id="a number"),
        pytest.param(lambda: rank(DENSE[0], DENSE, top_k=0), "top_k=0", id="top_k 0"),
        pytest.param(lambda: rank(DENSE[0], DENSE, top_k=True), "top_k=True", id="top_k a bool"),
        pytest.param(lambda: rank(DENSE[0], DENSE, top_k=1.5), "top_k=1.5", id="top_k a fraction"),
    ],
)
def test_what_cannot_be_scored_is_refused(call: Callable[[], Any], fragment: str) -> None:
    with pytest.raises(ArgumentError) as refused:
        call()
    assert fragment in str(refused.value)


@pytest.mark.parametrize("n_bytes", [1, 300, 10**6])
def test_a_bad_row_is_named_in_blocks_of_any_size(small_blocks: Callable[[int, int], None], n_bytes: int) -> None:
    documents = ragged([3, 5, 4], 16, seed=1)
    documents[1] = documents[1].copy()
    documents[1][4] = 0
    small_blocks(n_bytes, 1)
    with pytest.raises(ArgumentError, match=r"documents\[1\], row 4, is all zeros"):
        maxsim(unit(2, 16), documents)


# --- the map of an image ---


@pytest.mark.parametrize("max_pixels", [MAX_PIXELS, 50176, 12_845_056])
def test_the_grid_is_that_of_the_image_processor(max_pixels: int) -> None:
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize  # here: it takes seconds

    sides = [1, 13, 14, 28, 42, 70, 71, 99, 500, 777, 1000, 1654, 2339, 4000]
    for width, height in itertools.product(sides, sides):
        if max(width, height) > 200 * min(width, height):
            continue
        pixels = smart_resize(height, width, factor=28, min_pixels=3136, max_pixels=max_pixels)
        rows, columns = image_grid(width, height, max_pixels)
        assert (28 * rows, 28 * columns) == pixels
        assert rows * columns == count_image_tokens(width, height, max_pixels)


def test_golden_images_have_a_row_a_patch_and_eleven_around(golden: Golden) -> None:
    for i, path in enumerate(golden.images):
        with Image.open(path) as image:
            grid = image_grid(*image.size)
        rows = golden.rows[f"retrieval/image/{i}/multi"]
        assert len(rows) == math.prod(grid) + 11
        assert similarity_map(rows[:2], rows, grid).shape == (2, *grid)


def test_what_comes_before_the_first_patch_is_the_same_for_every_image(golden: Golden) -> None:
    """Attention is causal: no row before the first patch has seen the image, every row from there on has."""
    first, *others = [golden.rows[f"code/image/{i}/multi"] for i in range(4)]
    for rows in others:
        n_rows = min(len(first), len(rows))
        differs = np.abs(first[:n_rows] - rows[:n_rows]).max(axis=1) > 1e-5
        assert differs.argmax() == 4
        assert differs[4:].all()


def test_a_map_has_each_patch_in_its_place() -> None:
    image = unit(3 * 5 + 11, 16)
    query = image[[4, 4 + 5, 4 + 14]]  # the patches (0, 0), (1, 0) and (2, 4)
    found = similarity_map(query, image, (3, 5))
    assert (found.shape, found.dtype) == ((3, 3, 5), np.float32)
    places = [np.unravel_index(part.argmax(), part.shape) for part in found]
    assert places == [(0, 0), (1, 0), (2, 4)]
    shifted = similarity_map(query, image[1:], (3, 5), n_rows_before=3, n_rows_around=10)
    np.testing.assert_array_equal(shifted, found)


@pytest.mark.parametrize(
    ("grid", "fragment"),
    [
        pytest.param((3, 4), "an image of 3 x 4 patches has 23 rows, this one has 26", id="another grid"),
        pytest.param((0, 5), "no patches", id="no rows"),
        pytest.param((-3, -5), "no patches", id="negative"),
    ],
)
def test_a_grid_that_does_not_fit_is_refused(grid: tuple[int, int], fragment: str) -> None:
    with pytest.raises(ArgumentError, match=fragment):
        similarity_map(unit(2, 16), unit(26, 16), grid)
