"""Smaller vectors from `jina-v4-embed`: int8, bits and pooled rows; and the warning of multi-vectors that are long."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from embed_command import Embed, embed_with, write_jsonl
from jina_v4_client.quantization import quantize_binary, quantize_int8
from jina_v4_client.token_pooling import pool_tokens
from pyarrow import parquet

TEXTS = ["word " * n for n in (8, 5, 12, 5)]
MULTI = ["--multivector"]


@pytest.fixture
def embed(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Embed]:
    monkeypatch.chdir(tmp_path)
    server.play_ours()
    write_jsonl(Path("rows.jsonl"), [{"text": text} for text in TEXTS])
    before = signal.getsignal(signal.SIGTERM)
    yield embed_with("--base-url", server.url, "--task", "retrieval", "--max-retries", 0)
    assert signal.getsignal(signal.SIGTERM) == before


def facts(path: str) -> dict[str, Any]:
    return json.loads(parquet.read_schema(path).metadata[b"jina_v4"])


@pytest.mark.parametrize("multivector", [False, True], ids=["dense", "multi-vectors"])
@pytest.mark.parametrize("dtype", ["int8", "binary"])
def test_quantized_columns_equal_the_client_s_quantization(
    dtype: str, multivector: bool, embed: Embed, server: Any
) -> None:
    assert embed(*MULTI * multivector, "--dtype", dtype, "rows.jsonl", "out.parquet").code == 0
    rows = [(server.token_rows if multivector else server.vector)(f"Passage: {text}") for text in TEXTS]
    stored = quantize_int8(rows) if dtype == "int8" else quantize_binary(rows)
    table = parquet.read_table("out.parquet")
    vectors = table["vector"].combine_chunks()
    codes = (vectors.flatten() if multivector else vectors).flatten().to_numpy()
    assert codes.dtype == stored.codes.dtype
    assert (codes == stored.codes.reshape(-1)).all()
    if multivector:
        assert vectors.offsets.to_pylist() == stored.offsets.tolist()
    assert ("scale" in table.column_names) == (dtype == "int8")
    if dtype == "int8":
        scale = table["scale"].combine_chunks()
        assert ((scale.flatten() if multivector else scale).to_numpy() == stored.scales).all()
        for page, steps, exact in zip(table["vector"].to_numpy(), table["scale"].to_numpy(), rows, strict=True):
            found = np.stack(page) * steps[:, None] if multivector else page * steps  # as the metadata say
            np.testing.assert_allclose(found, exact, atol=np.abs(exact).max() / 254 * 1.01)
    told = {"int8": "vector * scale", "binary": "bits of v > 0, most significant first"}
    assert (facts("out.parquet")["dtype"], facts("out.parquet")["quantization"]) == (dtype, told[dtype])


@pytest.mark.parametrize("multivector", [False, True], ids=["dense", "multi-vectors"])
@pytest.mark.parametrize("dtype", ["int8", "binary"])
def test_a_quantized_code_takes_a_byte_of_the_file(dtype: str, multivector: bool, embed: Embed) -> None:
    write_jsonl(Path("rows.jsonl"), [{"text": "word " * n} for n in range(1, 101)])
    assert embed(*MULTI * multivector, "--dtype", dtype, "rows.jsonl", "out.parquet").code == 0
    (group,) = [parquet.ParquetFile("out.parquet").metadata.row_group(0)]
    codes = next(group.column(i) for i in range(group.num_columns) if "vector." in group.column(i).path_in_schema)
    assert codes.total_compressed_size < 1.5 * codes.num_values + 3000  # and lengths of lists, and a dictionary


def test_pooled_multi_vectors_have_fewer_rows(embed: Embed, server: Any) -> None:
    assert embed(*MULTI, "--pool-factor", 2, "rows.jsonl", "out.parquet").code == 0
    found = [np.stack(page) for page in parquet.read_table("out.parquet")["vector"].to_numpy()]
    assert [len(page) for page in found] == [4, 3, 6, 3]  # the prompt is a word more
    for page, text in zip(found, TEXTS, strict=True):
        np.testing.assert_array_equal(page, pool_tokens(server.token_rows(f"Passage: {text}"), 2))
    assert facts("out.parquet")["pool-factor"] == 2


def test_a_run_is_not_resumed_with_other_options_of_smaller_vectors(embed: Embed, server: Any) -> None:
    play, answers = server.routes["/v1/embeddings"], iter([True])
    server.routes["/v1/embeddings"] = lambda seen: play(seen) if next(answers, False) else server.json_answer({}, 503)
    arguments = [*MULTI, "--batch-size", 1, "--workers", 1, "rows.jsonl", "out.parquet"]
    assert embed("--pool-factor", 2, "--dtype", "int8", *arguments).code == 1
    server.routes["/v1/embeddings"] = play
    ran = embed("--pool-factor", 3, *arguments)
    assert ran.code == 2
    assert "--pool-factor was 2 and is 3; --dtype was int8 and is float32" in ran.stderr
    assert embed("--pool-factor", 2, "--dtype", "int8", *arguments).code == 0
    assert len(parquet.read_table("out.parquet")) == len(TEXTS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--dtype", "int8", "rows.jsonl", "out.npy"],
            "--dtype int8 is for .parquet; use float32 or float16 with .npy",
        ),
        (["--dtype", "binary", "rows.jsonl", "-"], "--dtype binary is for an OUTPUT.parquet without --ray"),
        (
            ["--dtype", "int8", "--ray", "local", "rows.jsonl", "out"],
            "--dtype int8 is for an OUTPUT.parquet without --ray",
        ),
        (["--pool-factor", "2", "rows.jsonl", "out.parquet"], "--pool-factor is for multi-vectors; add --multivector"),
    ],
    ids=["int8 as npy", "bits in lines", "int8 on Ray", "dense vectors pooled"],
)
def test_what_cannot_be_made_smaller_is_refused(arguments: list[str], message: str, embed: Embed, server: Any) -> None:
    ran = embed(*arguments)
    assert (ran.code, ran.line.startswith(f"error: {message}")) == (2, True), ran.line
    assert server.bodies("/v1/embeddings") == []


def test_multi_vectors_that_qdrant_refuses_are_named(embed: Embed, server: Any) -> None:
    texts = ["word " * (n - 1) for n in (8191, 8192)]
    write_jsonl(Path("rows.jsonl"), [{"text": text} for text in texts])
    ran = embed(*MULTI, "--dtype", "float16", "rows.jsonl", "out.parquet")
    assert ran.code == 0
    (warning,) = [line for line in ran.stderr.splitlines() if line.startswith("warning")]
    assert warning.startswith("warning: 1 multi-vector has over 8,191 rows, which Qdrant refuses; use --pool-factor")
    assert warning.endswith(": rows.jsonl#2")
    assert "warning" not in embed("--dtype", "float16", "rows.jsonl", "dense.parquet").stderr
