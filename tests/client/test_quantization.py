"""int8 and binary vectors: exact to what they promise, and what a search in them loses on data described here."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Figure
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jina_v4_client import ArgumentError
from jina_v4_client.quantization import (
    BinaryVectors,
    Int8Vectors,
    hamming,
    quantize_binary,
    quantize_int8,
    search,
)
from jina_v4_client.scoring import Vectors, cosine, maxsim, quantization, rank, similarity
from unit_rows import ragged, to_unit, unit

TOP = 10
PATIENT = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
FLOATS = st.floats(-4, 4, width=32).map(lambda x: x if abs(x) > 1e-3 else 0.5)


@pytest.fixture(params=["numpy 2", "numpy 1"])
def bit_counter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Count bits as numpy 2 does, and without what numpy 1.26 has not."""
    if request.param == "numpy 1":
        monkeypatch.delattr(np, "bitwise_count", raising=False)
    return


# --- what is stored ---


@PATIENT
@given(rows=arrays(np.float32, st.tuples(st.integers(1, 12), st.integers(1, 40)), elements=FLOATS))
def test_no_number_moves_by_more_than_half_a_step(rows: np.ndarray) -> None:
    stored = quantize_int8(rows)
    assert (stored.codes.dtype, stored.scales.dtype, len(stored)) == (np.int8, np.float32, len(rows))
    assert np.abs(stored.codes.astype(int)).max(axis=1).tolist() == [127] * len(rows)
    half_a_step = np.abs(rows).max(axis=1, keepdims=True) / 254
    assert (np.abs(stored.read(0, len(rows)) - rows) <= half_a_step * (1 + 1e-5)).all()


@PATIENT
@given(
    rows=arrays(
        np.float32, st.tuples(st.integers(1, 9), st.sampled_from([8, 24, 128])), elements=st.floats(-1, 1, width=32)
    )
)
def test_bits_are_those_of_numpy_packbits(rows: np.ndarray) -> None:
    rows[:, -1] = -0.5  # no row of zeros
    stored = quantize_binary(rows)
    np.testing.assert_array_equal(stored.codes, np.packbits(rows > 0, axis=-1, bitorder="big"))
    signs = stored.read(0, len(rows))
    np.testing.assert_array_equal(signs > 0, rows > 0)
    np.testing.assert_allclose(np.linalg.norm(signs, axis=1), 1, atol=1e-6)
    assert signs.dtype == np.float32


@pytest.mark.parametrize("quantize", [quantize_int8, quantize_binary])
def test_blocks_of_any_size_store_the_same(quantize: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    documents = ragged([3, 1, 7], 16)
    whole = quantize(documents)
    monkeypatch.setattr(quantization, "_BLOCK_BYTES", 130)
    parted = quantize(documents)
    for name in vars(whole):
        np.testing.assert_array_equal(getattr(parted, name), getattr(whole, name))
    assert parted.offsets.tolist() == [0, 3, 4, 11]


def test_vectors_are_saved_and_opened_as_plain_arrays(tmp_path: Path) -> None:
    stored = quantize_int8(ragged([3, 4], 16))
    np.savez(tmp_path / "corpus.npz", codes=stored.codes, scales=stored.scales, offsets=stored.offsets)
    with np.load(tmp_path / "corpus.npz") as opened:
        again = Int8Vectors(**opened)
    query = unit(2, 16, seed=1)
    np.testing.assert_array_equal(maxsim(query, again), maxsim(query, stored))
    dense = quantize_int8(unit(5, 16))
    np.savez(tmp_path / "dense.npz", codes=dense.codes, scales=dense.scales)
    with np.load(tmp_path / "dense.npz") as opened:
        np.testing.assert_array_equal(cosine(query, Int8Vectors(**opened)), cosine(query, dense))


# --- scores ---


@PATIENT
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=7), n_bytes=st.integers(1, 4000), seed=st.integers(0, 99)
)
def test_scores_are_those_of_the_decoded_vectors(
    lengths: list[int], n_bytes: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents, queries = ragged(lengths, 32, seed), ragged([2, 5], 32, seed + 1)
    with monkeypatch.context() as patched:
        patched.setattr(similarity, "_BLOCK_BYTES", n_bytes)
        for quantize in (quantize_int8, quantize_binary):
            multi = quantize(documents)
            decoded = np.split(multi.read(0, sum(lengths)), np.cumsum(lengths)[:-1])
            np.testing.assert_allclose(maxsim(queries, multi), maxsim(queries, decoded), atol=1e-5)
            rows = np.concatenate(documents)
            dense = quantize(rows)
            asked = list(queries[1])
            np.testing.assert_allclose(cosine(asked, dense), cosine(asked, dense.read(0, len(rows))), atol=1e-5)


@PATIENT
@given(
    n_bytes=st.sampled_from([1, 3, 8, 16, 256]),
    n=st.integers(1, 20),
    block_bytes=st.integers(1, 600),
    seed=st.integers(0, 2**31),
)
def test_hamming_counts_the_bits_that_differ(
    bit_counter: None, monkeypatch: pytest.MonkeyPatch, n_bytes: int, n: int, block_bytes: int, seed: int
) -> None:
    codes = np.random.default_rng(seed).integers(0, 256, (n + 3, n_bytes), dtype=np.uint8)
    queries, documents = codes[:3], codes[3:]
    bits = np.unpackbits(codes, axis=1).astype(int)
    expected = (bits[:3, None] != bits[None, 3:]).sum(axis=2)
    with monkeypatch.context() as patched:
        patched.setattr(quantization, "_BLOCK_BYTES", block_bytes)
        found = hamming(queries, documents)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, expected)


def test_hamming_of_2048_bits_does_not_overflow(bit_counter: None) -> None:
    zeros, ones = np.zeros((1, 256), np.uint8), np.full((1, 256), 255, np.uint8)
    assert hamming(zeros, ones).tolist() == [[2048]]


def test_codes_in_fortran_order_are_counted_as_others(bit_counter: None) -> None:
    codes = np.random.default_rng(0).integers(0, 256, (5, 16), dtype=np.uint8)
    expected = hamming(codes[:2], codes).tolist()
    assert hamming(codes[:2], np.asfortranarray(codes)).tolist() == expected
    assert hamming(np.asfortranarray(codes[:2]), codes).tolist() == expected
    query, documents = unit(128), BinaryVectors(np.asfortranarray(codes))
    assert search(query, documents, bits_only=True) == search(query, BinaryVectors(codes), bits_only=True)


# --- search ---


def test_a_search_in_bits_alone_scores_by_the_cosine_of_the_signs(bit_counter: None) -> None:
    documents, query = unit(60, 64), unit(64, seed=1)
    hits = search(query, quantize_binary(documents), 60, bits_only=True)
    expected = cosine(np.sign(query), np.sign(documents))[0]
    np.testing.assert_allclose([hit.score for hit in hits], [expected[hit.index] for hit in hits], atol=1e-6)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    rows = ragged([3, 4, 5], 64)
    hits = search(rows[1], quantize_binary(rows), 3, bits_only=True)
    expected = maxsim(np.sign(rows[1]) / 8, [np.sign(row) / 8 for row in rows])[0]
    np.testing.assert_allclose([hit.score for hit in hits], [expected[hit.index] for hit in hits], atol=1e-5)


@pytest.mark.parametrize("bits_only", [False, True])
def test_rescoring_every_candidate_is_the_exact_search(bits_only: bool) -> None:
    documents, query = unit(40, 64), unit(64, seed=1)
    rows, tokens = ragged([3, 4, 5, 2, 7, 3, 3, 3], 64), unit(4, 64, seed=2)
    for given_query, given_documents in ((query, documents), (query, list(documents)), (tokens, rows)):
        exact = rank(given_query, given_documents, 5)
        stored = quantize_binary(given_documents)
        found = search(given_query, stored, 5, rescore_with=given_documents, oversample=8, bits_only=bits_only)
        assert [hit.index for hit in found] == [hit.index for hit in exact]
        np.testing.assert_allclose([hit.score for hit in found], [hit.score for hit in exact], atol=1e-5)
        finer = quantize_int8(given_documents)
        found = search(given_query, stored, 5, rescore_with=finer, oversample=8, bits_only=bits_only)
        expected = rank(given_query, finer, 5)
        assert [hit.index for hit in found] == [hit.index for hit in expected]


@pytest.mark.parametrize("bits_only", [False, True])
def test_top_k_of_none_returns_all_documents_with_and_without_rescoring(bits_only: bool) -> None:
    documents, query = unit(40, 64), unit(64, seed=1)
    stored = quantize_binary(documents)
    found = search(query, stored, None, bits_only=bits_only)
    assert found == search(query, stored, 40, bits_only=bits_only)
    assert len(found) == 40
    rescored = search(query, stored, None, rescore_with=documents, bits_only=bits_only)
    assert [hit.index for hit in rescored] == [hit.index for hit in rank(query, documents)]


def test_only_the_candidates_of_a_mapped_file_are_read(tmp_path: Path) -> None:
    documents = unit(50, 64)
    np.save(tmp_path / "corpus.npy", documents)
    mapped = np.load(tmp_path / "corpus.npy", mmap_mode="r")
    (hit,) = search(documents[33], quantize_binary(documents), 1, rescore_with=mapped, oversample=1)
    assert (hit.index, round(hit.score, 5)) == (33, 1.0)


def test_equal_documents_keep_their_order_through_rescoring() -> None:
    documents = np.repeat(unit(3, 64), 5, axis=0)
    for bits_only in (False, True):
        hits = search(documents[5], quantize_binary(documents), 5, rescore_with=documents, bits_only=bits_only)
        assert [hit.index for hit in hits] == [5, 6, 7, 8, 9]


# --- refusals ---

DENSE, MULTI = unit(3, 16), ragged([2, 3], 16)
INT8, BITS = quantize_int8(DENSE), quantize_binary(DENSE)
CODES = BITS.codes
OFFSETS = np.array([0, 1, 3])


@pytest.mark.parametrize(
    ("call", "fragment"),
    [
        pytest.param(lambda: quantize_int8([]), "vectors is empty", id="nothing"),
        pytest.param(lambda: quantize_int8(INT8), "quantised already", id="twice"),
        pytest.param(lambda: quantize_int8(DENSE * np.nan), "vectors[0] holds NaN", id="nan"),
        pytest.param(lambda: quantize_binary(DENSE * 0), "vectors[0] is all zeros", id="zeros"),
        pytest.param(lambda: quantize_binary(unit(2, 12)), "multiple of 8", id="no whole bytes"),
        pytest.param(lambda: quantize_int8([*MULTI, DENSE[0]]), "vectors[2] has shape", id="mixed"),
        pytest.param(lambda: BinaryVectors(INT8.codes), "codes must be uint8", id="signed bytes"),  # type: ignore[arg-type]
        pytest.param(lambda: Int8Vectors(INT8.codes, INT8.scales[:2]), "float32 of shape (3,)", id="too few scales"),
        pytest.param(lambda: BinaryVectors(CODES, OFFSETS - 1), "offsets must", id="offsets before"),
        pytest.param(lambda: BinaryVectors(CODES, np.array([0, 3, 3])), "offsets must", id="no rows"),
        pytest.param(lambda: BinaryVectors(CODES, np.array([0, 2])), "offsets must", id="rows left over"),
        pytest.param(lambda: hamming(CODES, CODES[:, :1]), "the queries have width 2", id="widths"),
        pytest.param(lambda: hamming(DENSE, CODES), "queries must be uint8", id="floats"),  # type: ignore[arg-type]
        pytest.param(lambda: cosine(DENSE, BinaryVectors(CODES, OFFSETS)), "each is a multi-vector", id="multi"),
        pytest.param(lambda: maxsim(MULTI, BITS), "each is a dense vector", id="dense"),
        pytest.param(lambda: search(MULTI[0], BITS), "each is a dense vector", id="a multi query"),
        pytest.param(lambda: search(MULTI[0], BITS, bits_only=True), "each is a dense vector", id="its bits"),
        pytest.param(lambda: search(unit(24), BITS, bits_only=True), "width 24, the documents 16", id="a wide query"),
        pytest.param(lambda: search(DENSE[0], INT8, bits_only=True), "BinaryVectors only", id="bits of int8"),
        pytest.param(lambda: search(DENSE[0], BITS, 0), "top_k=0", id="top_k"),
        pytest.param(lambda: search(DENSE[0], BITS, oversample=0), "oversample=0", id="oversample"),
        pytest.param(lambda: search(DENSE[0], BITS, rescore_with=DENSE[:2]), "has 2 vectors", id="others"),
        pytest.param(
            lambda: search(MULTI[0], quantize_binary([*MULTI, MULTI[0]]), rescore_with=DENSE),
            "rescore_with is one array (n, dim)",
            id="rescored as one multi-vector",
        ),
        pytest.param(
            lambda: search(DENSE[0], quantize_binary(unit(16, 16)), rescore_with=DENSE[0]),
            "rescore_with is one vector",
            id="rescored as one vector",
        ),
    ],
)
def test_what_cannot_be_quantised_or_searched_is_refused(call: Callable[[], Any], fragment: str) -> None:
    with pytest.raises(ArgumentError) as refused:
        call()
    assert fragment in str(refused.value)


# --- what is lost ---


def topics(n: int, n_topics: int, dim: int, n_latent: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Documents around topics in a space of fewer dimensions, of unit length, and queries that are noisy documents."""
    random = np.random.default_rng(seed)
    spread = random.standard_normal((n_latent, dim)) * np.arange(1, n_latent + 1)[:, None] ** -0.5
    centres = random.standard_normal((n_topics, n_latent))
    latent = centres[random.integers(0, n_topics, n)] + 0.5 * random.standard_normal((n, n_latent))
    asked = latent[:60] + 0.3 * random.standard_normal((60, n_latent))
    return to_unit(latent @ spread), to_unit(asked @ spread)


def recall(found: list[list[int]], exact: list[list[int]]) -> float:
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found, exact, strict=True)]))


@pytest.mark.proof
def test_what_a_search_in_dense_vectors_loses(figure: Figure) -> None:
    documents, queries = topics(5000, 100, 512, 64, seed=4)
    int8, binary = quantize_int8(documents), quantize_binary(documents)
    steps = np.abs(documents).max(axis=0) / 127  # one for each dimension, from all the data there is
    by_dimension = np.rint(documents / steps) * steps

    def found(**options: Any) -> list[list[int]]:
        return [[hit.index for hit in search(query, binary, TOP, **options)] for query in queries]

    def ranked(stored: Vectors) -> list[list[int]]:
        return [similarity.best(scores, TOP).tolist() for scores in cosine(queries, stored)]

    exact = ranked(documents)
    results = {
        "int8, a step a vector": ranked(int8),
        "int8, a step a dimension": ranked(by_dimension),
        "binary, bits only": found(bits_only=True),
        "binary": found(),
        "binary, bits only, rescored": found(bits_only=True, rescore_with=documents),
        "binary, rescored": found(rescore_with=documents),
        "binary, rescored with int8": found(rescore_with=int8),
    }
    recalls = {name: recall(indices, exact) for name, indices in results.items()}
    for name, value in recalls.items():
        figure(f"dense recall@10 {name:<28} {value:.3f}")
    assert recalls["int8, a step a vector"] > 0.97
    assert recalls["binary, bits only"] < recalls["binary"] < recalls["binary, rescored"]
    assert recalls["binary, rescored"] > 0.9
