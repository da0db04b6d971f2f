"""`pool_factor` and codes in tensors: to the bit what the client's functions make of the same rows."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jina_v4_client.scoring import token_pooling as clients
from jina_v4_client.scoring.quantization import quantize_binary, quantize_int8
from jina_v4_serve import token_pooling
from jina_v4_serve.api.forms import reply
from jina_v4_serve.api.request import EmbedRequest, Item
from jina_v4_serve.api.service import pool
from jina_v4_serve.api.vectors import Vectors
from jina_v4_serve.token_pooling import pool_tokens
from numpy.typing import NDArray
from safetensors.numpy import load
from unit_rows import to_unit, unit

Floats = NDArray[np.float32]


def random_rows(n: int, seed: int = 0) -> Floats:
    return unit(n, 128, seed=seed)


KINDS: dict[str, Callable[[], Floats]] = {
    **{f"{n} rows": (lambda n=n: random_rows(n)) for n in (1, 2, 3, 7, 779)},  # type: ignore[misc]
    "rows in groups, as tokens are": lambda: to_unit(
        np.repeat(np.random.default_rng(1).standard_normal((40, 128)), 12, axis=0)
        + 0.05 * np.random.default_rng(2).standard_normal((480, 128))
    ),
    "equal rows": lambda: np.repeat(random_rows(1), 30, axis=0),
    "opposite rows": lambda: np.concatenate([random_rows(5), -random_rows(5)]),
}


@pytest.mark.parametrize("factor", [2, 3, 16, 5000])
@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_pooled_rows_are_the_clients_to_the_bit(make: Callable[[], Floats], factor: int) -> None:
    rows = make()
    np.testing.assert_array_equal(pool_tokens(rows, factor), clients.pool_tokens(rows, factor))


def test_more_rows_than_are_clustered_at_once_are_pooled_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    assert token_pooling._MAX_CLUSTERED_ROWS == clients._MAX_CLUSTERED_ROWS
    for module in (token_pooling, clients):
        monkeypatch.setattr(module, "_MAX_CLUSTERED_ROWS", 64)
    for n in (64, 65, 200):
        np.testing.assert_array_equal(pool_tokens(random_rows(n), 3), clients.pool_tokens(random_rows(n), 3))


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 60), st.integers(2, 9), st.integers(0, 2**32 - 1))
def test_any_rows_are_pooled_as_by_the_client(n: int, factor: int, seed: int) -> None:
    rows = random_rows(n, seed)
    np.testing.assert_array_equal(pool_tokens(rows, factor), clients.pool_tokens(rows, factor))


def test_other_items_of_a_call_change_nothing() -> None:
    """The client normalises the rows of all items at once, the server those of one."""
    items = [random_rows(n, n) for n in (1, 33, 200, 5)]
    for rows, expected in zip(items, clients.pool_tokens(items, 3), strict=True):
        np.testing.assert_array_equal(pool_tokens(rows, 3), expected)


def asked(**fields: object) -> EmbedRequest:
    usual: dict[str, object] = {"task": "retrieval", "model": "m", "items": [Item(text="a")], "prompt_name": "query"}
    usual |= {"prefix": "Query: ", "outputs": frozenset({"dense", "multivector"}), "encodings": ["float"]}
    return EmbedRequest(**(usual | fields))  # type: ignore[arg-type]


ITEMS = [Vectors(random_rows(2, n)[:, :64].reshape(1, 128), random_rows(n, n), n) for n in (1, 9, 100)]


def pooled(factor: Any) -> Sequence[Vectors]:
    return ITEMS if factor is None else pool(ITEMS, factor)


def tensors(**fields: object) -> dict[str, NDArray[np.generic]]:
    return load(reply.as_safetensors(asked(**fields), pooled(fields.get("pool_factor")), "float32"))


@pytest.mark.parametrize("factor", [None, 4])
def test_codes_in_tensors_are_the_clients_to_the_bit(factor: int | None) -> None:
    rows = [each.multivector for each in ITEMS]
    rows = rows if factor is None else clients.pool_tokens(rows, factor)
    dense = np.concatenate([each.dense for each in ITEMS])
    found = tensors(encodings=["int8"], pool_factor=factor)
    for name, expected in (("multivector", quantize_int8(rows)), ("dense", quantize_int8(dense))):
        np.testing.assert_array_equal(found[name], expected.codes, strict=True)
        np.testing.assert_array_equal(found[f"{name}_scales"], expected.scales, strict=True)
    np.testing.assert_array_equal(found["offsets"], quantize_int8(rows).offsets)
    shifted = tensors(encodings=["uint8"], pool_factor=factor)
    assert shifted["multivector"].dtype == np.uint8
    np.testing.assert_array_equal(shifted["multivector"].astype(int) - 128, found["multivector"])
    bits = tensors(encodings=["ubinary"], pool_factor=factor)
    assert bits.keys() == {"dense", "multivector", "offsets"}
    for name, packed in (("multivector", quantize_binary(rows)), ("dense", quantize_binary(dense))):
        np.testing.assert_array_equal(bits[name], packed.codes, strict=True)
    signed = tensors(encodings=["binary"], pool_factor=factor)["multivector"]
    assert signed.dtype == np.int8
    np.testing.assert_array_equal(signed.astype(np.int16) + 128, bits["multivector"])


def test_pooled_rows_in_json_are_those_in_tensors() -> None:
    content = reply.write(asked(pool_factor=3), pooled(3), "id")
    rows = tensors(pool_factor=3)["multivector"]
    found = np.array([row for entry in content["data"] for row in entry["embeddings"]], np.float32)
    np.testing.assert_array_equal(found, rows)
    assert content["usage"]["total_tokens"] == 110, "of what was read, not of what is left"
