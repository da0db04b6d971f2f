"""Token pooling: what is averaged, what is kept, and what a search in pooled multi-vectors loses."""

import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from conftest import Figure, Golden
from hypothesis import given, settings
from hypothesis import strategies as st
from jina_v4_client import ArgumentError
from jina_v4_client.quantization import quantize_binary, quantize_int8, search
from jina_v4_client.scoring import Vectors, best, maxsim, token_pooling
from jina_v4_client.token_pooling import pool_tokens
from unit_rows import to_unit, unit

TOP = 10


@settings(max_examples=60, deadline=None)
@given(
    n_tokens=st.integers(1, 40),
    pool_factor=st.integers(1, 7),
    n_protected=st.integers(0, 45),
    opposite=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_rows_become_fewer_stay_of_unit_length_and_protected_ones_stay(
    n_tokens: int, pool_factor: int, n_protected: int, opposite: bool, seed: int
) -> None:
    rows = unit(n_tokens, 8, seed=seed)
    if opposite:  # their mean has no direction
        rows[1::2] = -rows[: 2 * (n_tokens // 2) : 2]
    pooled = pool_tokens(rows, pool_factor, n_protected=n_protected)
    n_kept = min(n_protected, n_tokens)
    n_rest = n_tokens - n_kept
    assert len(pooled) == n_kept + (max(1, n_rest // pool_factor) if n_rest else 0)
    assert pooled.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(pooled, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(pooled[:n_kept], rows[:n_kept], atol=1e-6)


def test_near_rows_become_their_mean_in_the_order_of_the_first() -> None:
    a, b = unit(2, 64)
    c = unit(64, seed=1)
    rows = to_unit(np.stack([b, a, b + 0.1 * c, a - 0.1 * c]))
    pooled = pool_tokens(rows, 2)
    np.testing.assert_allclose(pooled, to_unit(np.stack([rows[0] + rows[2], rows[1] + rows[3]])), atol=1e-6)


def test_equal_rows_go_together() -> None:
    rows = np.repeat(unit(3, 16), 4, axis=0)
    np.testing.assert_allclose(pool_tokens(rows, 4), rows[[0, 4, 8]], atol=1e-6)


def test_several_multi_vectors_are_pooled_each_by_itself() -> None:
    several = [unit(n, 16, seed=n) for n in (1, 5, 12)]
    pooled = pool_tokens(several, 3)
    assert [len(rows) for rows in pooled] == [1, 1, 4]
    for rows, one in zip(pooled, several, strict=True):
        np.testing.assert_array_equal(rows, pool_tokens(one, 3))
    (alone,) = pool_tokens(several[2:], 3)
    np.testing.assert_array_equal(alone, pooled[2])


def test_many_are_never_copied_as_a_whole() -> None:
    rows = unit(64, 128).astype(np.float16)
    pool_tokens(rows, 8)  # which loads scipy
    tracemalloc.start()
    pooled = pool_tokens([rows] * 500, 8)  # 16 MB in float32, and 2 MB pooled
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(pooled) == 500
    assert peak_bytes < 8 * 2**20


def test_a_long_multi_vector_is_clustered_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = unit(50, 16)
    monkeypatch.setattr(token_pooling, "_MAX_CLUSTERED_ROWS", 20)
    pooled = pool_tokens(rows, 3)
    parts = [pool_tokens(rows[start : start + 18], 3) for start in (0, 18, 36)]
    np.testing.assert_array_equal(pooled, np.concatenate(parts))
    assert len(pooled) == 50 // 3
    assert len(pool_tokens(unit(41, 16), 2)) == 10 + 10 + 1  # each part keeps a row


@pytest.mark.parametrize(
    ("factor", "n_protected", "fragment"),
    [(0, 0, "pool_factor=0"), (True, 0, "pool_factor=True"), (1.5, 0, "pool_factor=1.5"), (2, -1, "n_protected=-1")],
)
def test_bad_arguments_are_refused(factor: int, n_protected: int, fragment: str) -> None:
    with pytest.raises(ArgumentError, match=fragment):
        pool_tokens(unit(4, 8), factor, n_protected=n_protected)


def test_without_scipy_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.cluster.hierarchy", None)
    with pytest.raises(ArgumentError, match=r"pip install 'jina-v4-client\[pooling\]'"):
        pool_tokens(unit(4, 8), 2)


def test_importing_token_pooling_loads_no_scipy() -> None:
    code = "import sys, jina_v4_client.token_pooling; print('scipy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


# --- what is lost ---


def passages(seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """50 subjects of 10 documents each, 40 to 120 tokens a document, and 60 queries of 12 tokens.

    A subject has 40 of 2,000 words, a document 12 to 30 of these, so that several tokens say nearly the same. A token
    is a word, a context of its document's own and noise. Query i is made from tokens of document 8 * i, with noise.
    """
    random = np.random.default_rng(seed)
    words = unit(2000, 128, seed=seed)
    documents = []
    for i in range(500):
        if i % 10 == 0:
            subject = random.choice(2000, 40, replace=False)
        used = random.choice(subject, random.integers(12, 31), replace=False)
        n_tokens = int(random.integers(40, 121))
        context = 0.4 * to_unit(random.standard_normal(128))
        noise = 0.6 * to_unit(random.standard_normal((n_tokens, 128)))
        documents.append(to_unit(words[random.choice(used, n_tokens)] + context + noise))
    asked = [rows[random.choice(len(rows), 12)] for rows in documents[: 8 * 60 : 8]]
    return documents, [to_unit(rows + 1.5 * to_unit(random.standard_normal(rows.shape))) for rows in asked]


@pytest.mark.long
def test_what_a_search_in_multivectors_loses(figure: Figure) -> None:
    documents, queries = passages(seed=8)

    def ranked(stored: Vectors) -> list[list[int]]:
        return [best(scores, TOP).tolist() for scores in maxsim(queries, stored)]

    exact, binary = ranked(documents), quantize_binary(documents)
    recalls = {}

    def compare(name: str, found: list[list[int]]) -> None:
        recalls[name] = float(np.mean([len(set(a) & set(b)) / TOP for a, b in zip(found, exact, strict=True)]))
        subjects = float(np.mean([[index // TOP == 8 * i // TOP for index in row] for i, row in enumerate(found)]))
        figure(f"multi-vector {name:<18} recall@10 {recalls[name]:.3f}, of the query's subject {subjects:.3f}")

    compare("exact", exact)
    compare("int8", ranked(quantize_int8(documents)))
    compare("binary, bits only", [[h.index for h in search(query, binary, TOP, bits_only=True)] for query in queries])
    compare("binary", ranked(binary))
    compare(
        "binary, rescored", [[h.index for h in search(query, binary, TOP, rescore_with=documents)] for query in queries]
    )
    for factor in (2, 4):
        pooled = pool_tokens(documents, factor)
        every = [rows[::factor] for rows in documents]
        compare(f"pooled {factor}", ranked(pooled))
        compare(f"every {factor}th row", ranked(every))
        compare(f"pooled {factor}, int8", ranked(quantize_int8(pooled)))
        assert recalls[f"pooled {factor}"] > recalls[f"every {factor}th row"]
    assert recalls["int8"] > 0.97
    assert recalls["binary, bits only"] < recalls["binary"] < recalls["binary, rescored"]
    assert recalls["pooled 4"] < recalls["pooled 2"]


def test_what_the_golden_rows_lose(golden: Golden, figure: Figure) -> None:
    """Random weights: this says that it runs on real rows of a server, and little of what real rows would lose."""
    queries = [golden.rows[f"retrieval/query/{i}/multi"] for i in range(6)]
    documents = [golden.rows[f"retrieval/passage/{i}/multi"] for i in range(6)]
    documents += [golden.rows[f"retrieval/image/{i}/multi"] for i in range(4)]
    exact = maxsim(queries, documents)
    n_tokens = np.array([[len(query)] for query in queries])
    for name, stored in {
        "int8": quantize_int8(documents),
        "binary": quantize_binary(documents),
        "pooled 2": pool_tokens(documents, 2),
        "pooled 4": pool_tokens(documents, 4),
    }.items():
        change = float((np.abs(maxsim(queries, stored) - exact) / n_tokens).max())
        figure(f"golden rows, {name:<8} MaxSim of a query token moves by up to {change:.4f}")
        assert change < (0.01 if name == "int8" else 1)
