"""`jina-v4-embed` against a played server: what goes in, what comes out, and what is said when it cannot."""

import base64
import bz2
import csv
import gzip
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pypdfium2
import pytest
from embed_command import Embed, embed_with, read, write_jsonl
from jina_v4_client.embed import run as embed_run
from jina_v4_client.embed.cli import app
from numpy.typing import NDArray
from PIL import Image
from pyarrow import Table, parquet
from safetensors import safe_open
from safetensors.numpy import load_file
from typer.testing import CliRunner

HIDDEN = 256
ROWS = [{"id": f"doc-{i}", "text": f"text number {i % 30}"} for i in range(50)]  # the last 20 are copies


@pytest.fixture
def embed(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Embed]:
    """Run the command in a folder of its own, quietly, without retries."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    server.play_ours()
    before = signal.getsignal(signal.SIGTERM)
    yield embed_with("--base-url", server.url, "--task", "retrieval", "--max-retries", 0, "--quiet")
    assert signal.getsignal(signal.SIGTERM) == before


def write_csv(path: Path, rows: list[dict[str, Any]], delimiter: str = ",") -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def write_pdf(path: Path, sizes: list[tuple[int, int]]) -> None:
    document = pypdfium2.PdfDocument.new()
    for width, height in sizes:
        document.new_page(width, height)
    document.save(str(path))
    document.close()


def vectors_of(server: Any, rows: list[Any], prefix: str = "Passage: ") -> NDArray[np.float32]:
    return np.stack([server.vector(prefix + row["text"]) for row in rows])


def sent(server: Any) -> list[Any]:
    return [item for body in server.bodies("/v1/embeddings") for item in body["input"]]


WRITERS: dict[str, Callable[[Path], object]] = {
    "rows.jsonl": lambda path: write_jsonl(path, ROWS),
    "rows.csv": lambda path: write_csv(path, ROWS),
    "rows.tsv": lambda path: write_csv(path, ROWS, "\t"),
    "rows.parquet": lambda path: parquet.write_table(Table.from_pylist(ROWS), path, row_group_size=7),
}


@pytest.mark.parametrize("name", WRITERS)
def test_tables_of_every_kind_give_their_rows_in_order(name: str, embed: Embed, server: Any) -> None:
    WRITERS[name](Path(name))
    assert embed("--id-column", "id", "--batch-size", 4, name, "out.parquet").code == 0
    ids, vectors = read(Path("out.parquet"))
    assert ids == [row["id"] for row in ROWS]
    assert (vectors == vectors_of(server, ROWS)).all()


def test_a_row_without_an_id_gets_its_file_and_line_number_as_id(embed: Embed, server: Any) -> None:
    Path("a.txt").write_bytes("\ufefferste\r\n\r\nzweite ü\nlast".encode())
    write_csv(Path("b.csv"), [{"body": "in two\nlines"}, {"body": "one"}])
    assert embed("--text-column", "body", "a.txt", "b.csv", "out.parquet").code == 0
    ids, vectors = read(Path("out.parquet"))
    assert ids == ["a.txt#1", "a.txt#3", "a.txt#4", "b.csv#1", "b.csv#2"]
    texts = ["erste", "zweite ü", "last", "in two\nlines", "one"]
    assert (vectors == vectors_of(server, [{"text": text} for text in texts])).all()


def test_equal_content_is_sent_once_and_its_vector_is_in_every_row(embed: Embed, server: Any) -> None:
    write_jsonl(Path("rows.jsonl"), ROWS)
    assert embed("--batch-size", 4, "rows.jsonl", "rows.jsonl", "out.parquet").code == 0
    assert len(sent(server)) == 30
    _, vectors = read(Path("out.parquet"))
    assert (vectors == vectors_of(server, ROWS + ROWS)).all()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("ending", ["parquet", "npy", "safetensors"])
def test_dense_vectors_in_every_format_open_with_one_line(ending: str, dtype: str, embed: Embed, server: Any) -> None:
    write_jsonl(Path("rows.jsonl"), ROWS)
    out = Path(f"out.{ending}")
    assert embed("--id-column", "id", "--dtype", dtype, "rows.jsonl", out).code == 0
    expected = vectors_of(server, ROWS).astype(dtype)
    if ending == "parquet":
        table = parquet.read_table(out)
        assert str(table.schema.field("vector").type).startswith("fixed_size_list<element: ")
        found, ids = np.stack(table["vector"].to_numpy()), table["id"].to_pylist()
        assert json.loads(table.schema.metadata[b"jina_v4"])["task"] == "retrieval"
    else:
        found = np.load(out) if ending == "npy" else load_file(out)["vectors"]
        ids = json.loads(Path(f"{out}.ids.json").read_text())
    assert ids == [row["id"] for row in ROWS]
    assert found.dtype == dtype
    assert (found == expected).all()
    assert not Path(f"{out}.partial").exists()


@pytest.mark.parametrize("ending", ["parquet", "safetensors"])
def test_multivectors_keep_their_lengths(ending: str, embed: Embed, server: Any) -> None:
    rows = [{"text": "word " * n} for n in (1, 5, 2, 5)]
    write_jsonl(Path("rows.jsonl"), rows)
    out = Path(f"out.{ending}")
    assert embed("--multivector", "rows.jsonl", out).code == 0
    if ending == "parquet":
        found = [np.array(vector, dtype=np.float32) for vector in parquet.read_table(out)["vector"].to_pylist()]
    else:
        with safe_open(out, "numpy") as file:
            offsets = file.get_tensor("offsets")
            found = np.split(file.get_tensor("vectors"), offsets[1:-1])
    assert len(found) == 4
    for vector, row in zip(found, rows, strict=True):
        assert (vector == server.token_rows("Passage: " + row["text"])).all()


def test_options_reach_the_server(embed: Embed, server: Any) -> None:
    write_jsonl(Path("rows.jsonl"), ROWS[:3])
    options = ["--prompt-name", "query", "--dimensions", 128, "--max-length", 64, "--batch-size", 2]
    assert embed(*options, "rows.jsonl", "out.npy").code == 0
    bodies = server.bodies("/v1/embeddings")
    assert sorted(len(body["input"]) for body in bodies) == [1, 2]
    assert {(body["prompt_name"], body["dimensions"], body["max_length"]) for body in bodies} == {("query", 128, 64)}
    assert {body["priority"] for body in bodies} == {999}  # live queries go before a corpus
    assert np.load("out.npy").shape == (3, 128)


def test_the_key_comes_from_the_environment_or_a_file(
    embed: Embed, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(Path("rows.jsonl"), ROWS[:1])
    Path("key").write_text("from-the-file\n")
    monkeypatch.setenv("JINA_V4_API_KEY", "from-the-environment")
    assert embed("rows.jsonl", "a.npy").code == 0
    assert embed("--api-key-file", "key", "rows.jsonl", "b.npy").code == 0
    keys = [seen.headers["authorization"] for seen in server.seen if seen.path == "/v1/embeddings"]
    assert keys == ["Bearer from-the-environment", "Bearer from-the-file"]


def test_a_folder_gives_its_images_and_pages_sorted(embed: Embed, server: Any) -> None:
    for name, colour in (("b.png", "red"), ("sub/a.jpg", "blue"), ("a.webp", "green"), (".hidden.png", "red")):
        path = Path("folder") / name
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 30), colour).save(path)
    Path("folder/notes.md").write_text("no image")
    write_pdf(Path("folder/paper.pdf"), [(100, 50), (60, 60)])
    ran = embed("--pdf-scale", 1.5, "--max-pixels", 3136, "folder", "out.parquet")
    assert (ran.code, ran.line) == (3, "1 file was left out; out.parquet.errors.jsonl says why: folder/notes.md")
    ids, vectors = read(Path("out.parquet"))
    pages = ["folder/paper.pdf#1", "folder/paper.pdf#2"]
    assert ids == ["folder/a.webp", "folder/b.png", *pages, "folder/sub/a.jpg"]
    images = {body_item["image"] for body_item in sent(server)}
    assert {body["max_pixels"] for body in server.bodies("/v1/embeddings")} == {3136}
    by_vector = {server.vector(image).tobytes(): image for image in images}
    sources = [by_vector[vector.tobytes()] for vector in vectors]
    b_png = base64.b64encode(Path("folder/b.png").read_bytes()).decode()
    assert sources[1] == f"data:image/png;base64,{b_png}"
    sizes = [Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).size for uri in sources[2:4]]
    assert sizes == [(150, 75), (90, 90)]


def test_images_of_a_table_are_paths_beside_it_or_files_in_it(embed: Embed, server: Any) -> None:
    Path("data").mkdir()
    for name in ("x.png", "y.png"):
        Image.new("RGB", (40, 30), "red" if name == "x.png" else "blue").save(Path("data") / name)
    x, y = (Path("data", name).read_bytes() for name in ("x.png", "y.png"))
    uri = "data:image/png;base64," + base64.b64encode(x).decode()
    write_jsonl(Path("data/rows.jsonl"), [{"image": "x.png", "t": None}, {"t": "a text"}, {"image": uri, "t": ""}])
    parquet.write_table(Table.from_pylist([{"image": {"bytes": y, "path": None}, "t": ""}]), "data/rows.parquet")
    columns = ["--image-column", "image", "--text-column", "t"]
    assert embed(*columns, "data/rows.jsonl", "data/rows.parquet", "out.parquet").code == 0
    _, vectors = read(Path("out.parquet"))
    y_uri = "data:image/png;base64," + base64.b64encode(y).decode()
    expected = [server.vector(item) for item in (uri, "Passage: a text", uri, y_uri)]
    assert (vectors == np.stack(expected)).all()


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_a_pipe_gives_a_line_for_each_row_in_order(encoding: str, embed: Embed, server: Any) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    ran = embed("--encoding", encoding, "--batch-size", 4, "--id-column", "id", "-", "-", stdin=lines)
    assert ran.code == 0
    found = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [row["id"] for row in found] == [row["id"] for row in ROWS]
    if encoding == "base64":
        vectors = [np.frombuffer(base64.b64decode(row["embedding"]), "<f4") for row in found]
    else:
        vectors = [np.array(row["embedding"], np.float32) for row in found]
    assert (np.stack(vectors) == vectors_of(server, ROWS)).all()
    assert len(sent(server)) == 30


def test_the_documented_call_reads_ids_of_a_pipe_as_they_are(embed: Embed) -> None:
    pandas = pytest.importorskip("pandas")
    ids = ["007", "9007199254740993"]
    write_jsonl(Path("a.jsonl"), [{"id": row_id, "text": "x"} for row_id in ids])
    Path("notes.jsonl").write_text(embed("--id-column", "id", "a.jsonl", "-").stdout)
    page = (Path(__file__).parents[2] / "docs/embed.md").read_text()
    (call,) = re.findall(r"`(pandas\.read_json\(.*?\))`", page)
    assert list(eval(call, {"pandas": pandas})["id"]) == ids  # noqa: S307 - from our own page


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_a_pipe_is_utf_8_whatever_the_environment_says(encoding: str, server: Any, tmp_path: Path) -> None:
    server.play_ours()
    write_jsonl(tmp_path / "rows.jsonl", [{"id": "café 日本", "text": "x"}])
    command = [sys.executable, "-m", "jina_v4_client.embed", "--base-url", server.url, "--task", "retrieval"]
    command += ["--quiet", "--encoding", encoding, "--id-column", "id", str(tmp_path / "rows.jsonl"), "-"]
    ran = subprocess.run(command, env={**os.environ, "PYTHONIOENCODING": "latin-1"}, capture_output=True)
    assert (ran.returncode, ran.stderr) == (0, b"")
    assert json.loads(ran.stdout.decode("utf-8"))["id"] == "café 日本"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_behind_a_pipe_is_reported_in_one_line(server: Any, tmp_path: Path) -> None:
    server.play_ours()
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    command = [sys.executable, "-m", "jina_v4_client.embed", "--base-url", server.url, "--task", "retrieval"]
    with Path("/dev/full").open("wb") as full:
        ran = subprocess.run([*command, "--quiet", str(tmp_path / "rows.jsonl"), "-"], stdout=full, stderr=-1)
    said = b"error: the standard output cannot be written: No space left on device\n"
    assert (ran.returncode, ran.stderr) == (1, said)


def test_a_pipe_of_plain_text_gives_multivectors(embed: Embed, server: Any) -> None:
    ran = embed("--multivector", "--input-format", "text", "-", "-", stdin=b"one two\nthree\n")
    first, second = (json.loads(line) for line in ran.stdout.splitlines())
    assert (first["id"], second["id"]) == ("1", "2")
    assert (np.array(first["embeddings"], np.float32) == server.token_rows("Passage: one two")).all()
    assert len(second["embeddings"]) == 2


# What is wrong, the files that make it so, the arguments, and what the one line must say.
REFUSED: dict[str, tuple[dict[str, bytes], list[str], list[str]]] = {
    "no such input": ({}, ["none.jsonl", "out.npy"], ["none.jsonl is not there"]),
    "no such column": (
        {"a.csv": b"id,body\n1,x\n"},
        ["a.csv", "out.npy"],
        ["a.csv has no column 'text'", "'id', 'body'", "--text-column"],
    ),
    "no parquet": ({"a.parquet": b"PAR1 not really"}, ["a.parquet", "out.npy"], ["a.parquet is no parquet file"]),
    "no CSV": ({"a.csv": b'"text\n1,2'}, ["a.csv", "out.npy"], ["a.csv is no CSV"]),
    "CSV that is not UTF-8": ({"a.csv": b"text\xff\n"}, ["a.csv", "out.npy"], ["a.csv is no CSV", "line 1", "iconv"]),
    "an unknown ending": ({"a.docx": b"x"}, ["a.docx", "out.npy"], ["a.docx", "--input-format", "jsonl, csv"]),
    "a compressed table": (
        {"a.jsonl": gzip.compress(b'{"text": "x"}')},
        ["a.jsonl", "out.npy"],
        ["a.jsonl is compressed, as .gz"],
    ),
    "a compressed text": (
        {"a.txt.bz2": bz2.compress(b"x")},
        ["--on-error", "skip", "--input-format", "text", "a.txt.bz2", "out.npy"],
        ["a.txt.bz2 is compressed", "decompress it"],
    ),
    "a spreadsheet as CSV": (
        {"a.csv": b"PK\x03\x04\x14\x00,"},
        ["a.csv", "out.npy"],
        ["a.csv is compressed", "save the sheet as CSV"],
    ),
    "a JSON array": (
        {"a.jsonl": b'\xef\xbb\xbf[\n{"text": "x"},\n{"text": "y"}\n]\n'},
        ["--on-error", "skip", "a.jsonl", "out.npy"],
        ["a.jsonl is a JSON array, not an object a line; convert it: jq -c '.[]'"],
    ),
    "an empty input": ({"a.jsonl": b""}, ["a.jsonl", "out.npy"], ["the input has no rows"]),
    "an empty folder": ({"folder/notes.md": b""}, ["folder", "out.npy"], ["folder holds neither images nor PDF"]),
    "an output that is the input": (
        {"a.npy": b"x"},
        ["--force", "--input-format", "text", "a.npy", "./a.npy"],
        ["OUTPUT a.npy would replace the INPUT a.npy", "choose another"],
    ),
    "an input that would be the list of errors": (
        {"out.npy.errors.jsonl": b'{"text": "x"}'},
        ["--force", "out.npy.errors.jsonl", "out.npy"],
        ["OUTPUT out.npy would replace the INPUT out.npy.errors.jsonl"],
    ),
    "an output in an input folder": (
        {"folder/a.pdf": b"%PDF-", "folder/b/c.txt": b""},
        ["folder", "folder/b/out.npy"],
        ["OUTPUT folder/b/out.npy is in the INPUT folder;"],
    ),
    "an input whose name is too long": ({}, ["n" * 300, "out.npy"], ["nnn cannot be read: File name too long"]),
    "an output whose name is too long": (
        {"a.txt": b"x"},
        ["a.txt", "n" * 245 + ".npy"],
        ["OUTPUT nnn", "cannot be written: File name too long"],
    ),
    "an output of no format": ({"a.txt": b"x"}, ["a.txt", "out.jsonl"], ["out.jsonl", ".parquet, .npy, .safetensors"]),
    "an output in no folder": ({"a.txt": b"x"}, ["a.txt", "no/out.npy"], ["no/out.npy", "no is no folder"]),
    "an output that is a folder": ({"a.txt": b"x", "o.npy/f": b""}, ["a.txt", "o.npy"], ["o.npy is a folder"]),
    "a work folder that cannot be made": (
        {"a.txt": b"x", "out.npy.partial": b""},
        ["a.txt", "out.npy"],
        ["out.npy.partial cannot be made", "exists"],
    ),
    "a work folder with strange files": (
        {"a.txt": b"x", "out.npy.partial/thesis.doc": b""},
        ["a.txt", "out.npy"],
        ["thesis.doc in it was not put there"],
    ),
    "multi-vectors as npy": ({"a.txt": b"x"}, ["--multivector", "a.txt", "out.npy"], ["differ in length", ".parquet"]),
    "dimensions of multi-vectors": (
        {"a.txt": b"x"},
        ["--multivector", "--dimensions", "128", "a.txt", "out.parquet"],
        ["--dimensions does not go with --multivector"],
    ),
    "odd dimensions": ({"a.txt": b"x"}, ["--dimensions", "300", "a.txt", "out.npy"], ["128, 256, 512, 1024, 2048"]),
    "no key file": ({"a.txt": b"x"}, ["--api-key-file", "none", "a.txt", "out.npy"], ["--api-key-file none"]),
    "no address": ({"a.txt": b"x"}, ["--base-url", "here", "a.txt", "out.npy"], ["base_url='here' is no address"]),
    "standard input twice": ({}, ["-", "-", "out.npy"], ["can be read once only"]),
    "parquet from a pipe": ({}, ["--input-format", "parquet", "-", "out.npy"], ["parquet cannot be read from the"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused_in_one_line_before_anything_is_sent(
    case: str, embed: Embed, server: Any
) -> None:
    files, arguments, parts = REFUSED[case]
    for name, content in files.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(content)
    there = sorted(Path().rglob("*"))
    ran = embed(*arguments, stdin=b"")
    assert ran.code == 2
    assert ran.line.startswith("error: ")
    assert all(part in ran.line for part in parts), ran.line
    assert server.bodies("/v1/embeddings") == []
    assert sorted(Path().rglob("*")) == there


def encrypted_pdf() -> bytes:
    """A PDF file that needs a password: pdfium reads no further than the trailer's Encrypt."""
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 10 10]>>",
        b"<</Filter/Standard/V 1/R 2/P -4/O<" + b"00" * 32 + b">/U<" + b"11" * 32 + b">>>",
    ]
    content, starts = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        starts.append(len(content))
        content += b"%d 0 obj%s endobj\n" % (number, body)
    table = b"xref\n0 5\n0000000000 65535 f \n" + b"".join(b"%010d 00000 n \n" % start for start in starts)
    trailer = b"trailer<</Size 5/Root 1 0 R/Encrypt 4 0 R/ID[<00><00>]>>\nstartxref\n%d\n%%%%EOF" % len(content)
    return content + table + trailer


# A bad row after a good one: the file, its content, the id of the bad row and what is said of it.
BAD_ROWS: dict[str, tuple[str, bytes, str, str]] = {
    "broken JSON": ("a.jsonl", b'{"text": "x"}\n{"text": "y"\n', "a.jsonl#2", "no JSON"),
    "JSON that is no object": (
        "a.jsonl",
        b'{"text": "x"}\n["y"]\n',
        "a.jsonl#2",
        "no JSON object but a value of type l",
    ),
    "no text": ("a.jsonl", b'{"text": "x"}\n{"body": "y"}\n', "a.jsonl#2", "nothing in 'text'"),
    "a number for a text": ("a.jsonl", b'{"text": "x"}\n{"text": 5}\n', "a.jsonl#2", "no text but a value of type int"),
    "a lone surrogate": ("a.jsonl", b'{"text": "x"}\n{"text": "\\ud800"}\n', "a.jsonl#2", "lone surrogate"),
    "text that is not UTF-8": ("a.txt", b"x\n\xff\xfe\n", "a.txt#2", "not UTF-8"),
    "a cell too many": ("a.csv", b"text\nx\ny,z\n", "a.csv#2", "more than 1 cells"),
    "no image": ("folder/z.png", b"not an image", "folder/z.png", "not an image"),
    "an image cut short": ("folder/z.png", b"\x89PNG\r\n\x1a\n\x00\x00", "folder/z.png", "not an image"),
    "a broken PDF": ("folder/z.pdf", b"%PDF-1.4 nothing", "folder/z.pdf", "a broken PDF file"),
    "an encrypted PDF": ("folder/z.pdf", encrypted_pdf(), "folder/z.pdf", "encrypted: it needs a password"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_stops_the_run_or_is_skipped_and_listed(case: str, embed: Embed) -> None:
    name, content, bad_id, message = BAD_ROWS[case]
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_bytes(content)
    source = name
    if name.startswith("folder/"):
        Image.new("RGB", (40, 30)).save("folder/a.png")
        source = "folder"
    stopped = embed("--batch-size", 2, source, "out.parquet")
    assert stopped.code == 1
    assert stopped.line.startswith(f"error: row {bad_id}: ")
    assert message in stopped.line
    assert not Path("out.parquet").exists()
    skipped = embed("--on-error", "skip", source, "out.parquet")
    assert skipped.code == 3
    assert skipped.line == "1 of 2 rows were skipped; out.parquet.errors.jsonl says why"
    ids, _ = read(Path("out.parquet"))
    assert len(ids) == 1
    assert bad_id not in ids
    (error,) = map(json.loads, Path("out.parquet.errors.jsonl").read_text().splitlines())
    assert (error["row"], error["id"]) == (2, bad_id)
    assert message in error["error"]


def test_where_no_row_has_a_vector_the_same_command_tries_all_again(embed: Embed) -> None:
    write_jsonl(Path("a.jsonl"), [{"image": "late.png"}, {"image": "later.png"}])
    arguments = ("--on-error", "skip", "--image-column", "image", "a.jsonl", "out.npy")
    ran = embed(*arguments)
    assert ran.code == 1
    assert ran.line.startswith("error: no row could be embedded; the first: a.jsonl#1: 'late.png': ")
    assert "give the same command again" not in ran.line
    for name in ("late.png", "later.png"):
        Image.new("RGB", (40, 30), "red").save(name)
    assert embed(*arguments).code == 0
    assert np.load("out.npy").shape == (2, HIDDEN)


def test_an_image_of_a_table_that_does_not_exist_is_a_bad_row(embed: Embed) -> None:
    write_jsonl(Path("a.jsonl"), [{"image": "gone.png"}])
    ran = embed("--image-column", "image", "a.jsonl", "out.npy")
    why = "no such file, and neither an http(s) URL, a data URI nor the base64 of an image file"
    assert (ran.code, ran.line) == (1, f"error: row a.jsonl#1: 'gone.png': {why}")
    assert not Path("out.npy.partial").exists()  # nothing was done that a later run could use


@pytest.mark.parametrize("status", [400, 500])
def test_a_text_that_the_server_refuses_or_fails_at_costs_only_its_row(status: int, embed: Embed, server: Any) -> None:
    play = server.routes["/v1/embeddings"]

    def refuse_the_long(seen: Any) -> Any:
        if any("number 7" in item["text"] for item in seen.body["input"]):
            return server.json_answer({"error": {"message": "input[0] is too long"}}, status)
        return play(seen)

    server.routes["/v1/embeddings"] = refuse_the_long
    write_jsonl(Path("rows.jsonl"), ROWS)
    ran = embed("--on-error", "skip", "--id-column", "id", "--batch-size", 10, "rows.jsonl", "out.parquet")
    assert (ran.code, ran.line) == (3, "2 of 50 rows were skipped; out.parquet.errors.jsonl says why")
    kept = [row for row in ROWS if row["text"] != "text number 7"]
    ids, vectors = read(Path("out.parquet"))
    assert ids == [row["id"] for row in kept]
    assert (vectors == vectors_of(server, kept)).all()
    errors = [json.loads(line) for line in Path("out.parquet.errors.jsonl").read_text().splitlines()]
    assert [error["id"] for error in errors] == ["doc-7", "doc-37"]
    assert ("is too long" if status == 400 else "500") in errors[0]["error"]


@pytest.mark.parametrize(
    ("said", "kept"), [(": over 32768 tokens", "over 32768 tokens"), (".text is X", "input.text is X")]
)
def test_the_reason_of_a_skipped_row_names_no_item_of_a_request(
    said: str, kept: str, embed: Embed, server: Any
) -> None:
    play = server.routes["/v1/embeddings"]

    def refuse(seen: Any) -> Any:
        found = [f"input[{i}]" for i, item in enumerate(seen.body["input"]) if "bad" in item["text"]]
        message = {"error": {"message": f"{found[0]}{said}", "param": found[0]}} if found else None
        return server.json_answer(message, 422) if found else play(seen)

    server.routes["/v1/embeddings"] = refuse
    write_jsonl(Path("rows.jsonl"), [{"text": text} for text in ("a", "b", "bad", "c", "bad too", "d")])
    assert embed("--on-error", "skip", "rows.jsonl", "out.parquet").code == 3
    errors = map(json.loads, Path("out.parquet.errors.jsonl").read_text().splitlines())
    reason = f"{server.url}/v1/embeddings refused with status 422: {kept}"
    assert [(error["row"], error["error"]) for error in errors] == [(3, reason), (5, reason)]


def fail_at(server: Any, *texts: str, breaks: bool = False) -> Callable[[], None]:
    """Have a server answer 500 to a request with one of these texts; return what mends it.

    With `breaks` it answers 500 to everything once such a text came alone.
    """
    play, is_broken = server.routes["/v1/embeddings"], threading.Event()

    def answer(seen: Any) -> Any:
        found = [item["text"] for item in seen.body["input"] if "text" in item]
        if breaks and len(found) == 1 and found[0] in texts:
            is_broken.set()
        failed = is_broken.is_set() or not set(texts).isdisjoint(found)
        return server.json_answer({"error": {"message": "not finite"}}, 500) if failed else play(seen)

    server.routes["/v1/embeddings"] = answer
    return lambda: server.routes.update({"/v1/embeddings": play})


@pytest.mark.parametrize("first", [0, 1])
def test_rows_after_ten_that_fail_are_still_embedded(first: int, embed: Embed, server: Any) -> None:
    """The client gives up the rest of a call after ten."""
    rows = [{"id": str(i), "text": f"text {i}"} for i in range(16)]
    fail_at(server, *(row["text"] for row in rows[first : first + 10]))
    write_jsonl(Path("rows.jsonl"), rows)
    assert embed("--on-error", "skip", "--id-column", "id", "rows.jsonl", "out.parquet").code == 3
    kept = rows[:first] + rows[first + 10 :]
    ids, vectors = read(Path("out.parquet"))
    assert ids == [row["id"] for row in kept]
    assert (vectors == vectors_of(server, kept)).all()


def test_a_row_that_breaks_the_server_stops_the_run_and_costs_no_other(embed: Embed, server: Any) -> None:
    rows = [{"text": f"text {i}"} for i in range(40)]
    mend = fail_at(server, "text 4", breaks=True)
    write_jsonl(Path("rows.jsonl"), rows)
    arguments = ("--on-error", "skip", "--workers", 1, "rows.jsonl", "out.parquet")
    ran = embed(*arguments)
    assert ran.code == 1
    assert ran.line.startswith("error: rows rows.jsonl#5 to rows.jsonl#16: ")
    assert "status 500: not finite; then the server did not embed a plain text either; what is done is kept" in ran.line
    mend()
    assert embed(*arguments).code == 0
    assert (read(Path("out.parquet"))[1] == vectors_of(server, rows)).all()


@pytest.mark.parametrize(("n_before", "batch_size"), [(16, 16), (3, 1), (0, 1)])
def test_a_row_alone_in_its_request_is_skipped_where_the_server_is_well(
    n_before: int, batch_size: int, embed: Embed, server: Any
) -> None:
    fail_at(server, "poison")
    write_jsonl(Path("rows.jsonl"), [*({"text": f"text {i}"} for i in range(n_before)), {"text": "poison"}])
    write_jsonl(Path("more.jsonl"), [{"text": "another"}])
    options = ("--on-error", "skip", "--batch-size", batch_size, "--workers", 1)
    assert embed(*options, "rows.jsonl", *["more.jsonl"] * (n_before < 16), "out.parquet").code == 3
    (error,) = map(json.loads, Path("out.parquet.errors.jsonl").read_text().splitlines())
    assert (error["id"], error["error"].endswith("failed with status 500: not finite")) == (
        f"rows.jsonl#{n_before + 1}",
        True,
    )


def test_a_skipped_row_of_a_pipe_is_a_line_that_says_why(embed: Embed) -> None:
    ran = embed("--on-error", "skip", "-", "-", stdin=b'{"text": "x"}\n{}\n{"text": "y"}\n')
    assert ran.code == 3
    lines = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [line["id"] for line in lines] == ["1", "2", "3"]
    assert ["error" in line for line in lines] == [False, True, False]


def test_vectors_of_a_batch_that_came_before_the_server_died_are_kept(embed: Embed, server: Any) -> None:
    """The client sends a batch of long texts as several requests."""
    write_jsonl(Path("rows.jsonl"), [{"text": f"{n} " + "word " * 6000} for n in range(4)])
    play, asked = server.routes["/v1/embeddings"], itertools.count()
    server.routes["/v1/embeddings"] = lambda seen: play(seen) if next(asked) < 1 else server.json_answer({}, 503)
    arguments = ("--batch-size", 4, "--workers", 1, "--max-retries", 0, "rows.jsonl", "out.parquet")
    ran = embed(*arguments)
    assert ran.code == 1
    assert ran.line.startswith(tuple(f"error: rows rows.jsonl#{n} to rows.jsonl#{n + 1}: " for n in (1, 3)))
    server.routes["/v1/embeddings"] = play
    n_before = len(server.bodies("/v1/embeddings"))
    assert embed(*arguments).code == 0
    again = [item["text"][0] for body in server.bodies("/v1/embeddings")[n_before:] for item in body["input"]]
    assert len(again) == 2


@pytest.mark.parametrize("status", [400, 401, 404, 500, 503])
def test_a_server_that_answers_nothing_stops_the_run_even_where_rows_are_skipped(
    status: int, embed: Embed, server: Any
) -> None:
    server.routes["/v1/embeddings"] = lambda _: server.json_answer({"error": {"message": "No."}}, status)
    write_jsonl(Path("rows.jsonl"), ROWS)
    ran = embed("--on-error", "skip", "--batch-size", 5, "--workers", 1, "rows.jsonl", "out.parquet")
    assert ran.code == 1
    assert ran.line.startswith("error: rows rows.jsonl#1 to rows.jsonl#5")
    assert not Path("out.parquet").exists()
    assert not Path("out.parquet.partial").exists()
    assert len(server.bodies("/v1/embeddings")) <= 2 * 5 + 2  # two an item, as the client promises, and the probe's


def test_a_run_whose_server_went_away_is_resumed_with_what_is_done(embed: Embed, server: Any) -> None:
    play = server.routes["/v1/embeddings"]
    answers = iter([True] * 3)
    server.routes["/v1/embeddings"] = lambda seen: play(seen) if next(answers, False) else server.json_answer({}, 503)
    write_jsonl(Path("rows.jsonl"), ROWS)
    ran = embed("--batch-size", 5, "--workers", 2, "rows.jsonl", "out.parquet")
    assert ran.code == 1
    assert "503" in ran.line
    assert ran.line.endswith("is kept in out.parquet.partial: run the same command again to resume")
    n_sent = len(sent(server))
    server.routes["/v1/embeddings"] = play
    assert embed("--batch-size", 5, "--workers", 2, "rows.jsonl", "out.parquet").code == 0
    assert len(sent(server)) - n_sent == 30 - 15
    _, vectors = read(Path("out.parquet"))
    assert (vectors == vectors_of(server, ROWS)).all()


def die_after(server: Any, n_requests: int, before: Callable[[int], object] = lambda _: None) -> Callable[[], None]:
    """Have a server answer so many requests for vectors and no more; return what has it answer again."""
    play, numbers = server.routes["/v1/embeddings"], itertools.count(1)

    def answer(seen: Any) -> Any:
        number = next(numbers)
        before(number)
        return play(seen) if number <= n_requests else server.json_answer({}, 503)

    server.routes["/v1/embeddings"] = answer
    return lambda: server.routes.update({"/v1/embeddings": play})


def lines_of(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def test_a_run_is_not_resumed_with_the_standard_input_in_another_order(embed: Embed, server: Any) -> None:
    """Two rows of one text change places, so the digests are as they were."""
    rows = [{"id": "A", "text": "same"}, *ROWS[:20], {"id": "B", "text": "same"}]
    arguments = ("--id-column", "id", "--batch-size", 4, "--workers", 1, "-", "out.parquet")
    live_again = die_after(server, 2)
    assert embed(*arguments, stdin=lines_of(rows)).code == 1
    live_again()
    ran = embed(*arguments, stdin=lines_of([rows[-1], *rows[1:-1], rows[0]]))
    what_helps = "feed the same rows again, or start anew with --restart"
    said = f"error: row 1 is not what it was in an earlier run: its id was A and is B; {what_helps}"
    assert (ran.code, ran.line) == (1, said)
    assert embed(*arguments, stdin=lines_of(rows)).code == 0
    assert read(Path("out.parquet"))[0] == [row["id"] for row in rows]


def test_a_run_is_not_resumed_where_a_failed_row_of_the_standard_input_changed(embed: Embed, server: Any) -> None:
    rows = [{"id": "A"}, *ROWS[:20]]
    arguments = ("--on-error", "skip", "--id-column", "id", "--batch-size", 4, "--workers", 1, "-", "out.parquet")
    live_again = die_after(server, 2)
    assert embed(*arguments, stdin=lines_of(rows)).code == 1
    live_again()
    ran = embed(*arguments, stdin=lines_of([{"id": "A", "text": "there is one now"}, *rows[1:]]))
    assert (ran.code, "row A is not what it was in an earlier run" in ran.line) == (1, True)
    assert embed(*arguments, stdin=lines_of(rows)).code == 3


def test_a_run_is_not_resumed_where_a_file_was_in_a_folder_for_a_moment(embed: Embed, server: Any) -> None:
    Path("folder").mkdir()
    for i in range(40):
        Image.new("RGB", (40, 30), (i, 0, 0)).save(f"folder/page-{i:02}.png")
    passing = Path("folder/zz/a.png")  # in a folder that is not listed yet at the first request
    passing.parent.mkdir()
    Image.new("RGB", (40, 30), (0, 0, 9)).save("folder/zz/page.png")

    def put(_: int) -> None:
        if not passing.exists():
            Image.new("RGB", (40, 30), (0, 9, 0)).save(passing)

    arguments = ("--image-batch-size", 1, "--workers", 1, "folder", "out.parquet")
    live_again = die_after(server, 41, put)
    assert embed(*arguments).code == 1
    passing.unlink()
    live_again()
    ran = embed(*arguments)
    changed = f"row 41 is not what it was in an earlier run: its id was {passing} and is folder/zz/page.png"
    assert (ran.code, ran.line) == (1, f"error: {changed}; start anew with --restart")
    assert not Path("out.parquet").exists()
    assert embed("--restart", *arguments).code == 0
    assert len(read(Path("out.parquet"))[0]) == 41


@pytest.mark.parametrize("change", ["grows", "goes away"])
def test_an_input_that_changes_during_the_run_ends_it_without_an_output(change: str, embed: Embed, server: Any) -> None:
    write_jsonl(Path("a.jsonl"), ROWS[:5])
    before = Path("a.jsonl").stat()
    live_again = die_after(
        server, 9, lambda _: Path("a.jsonl").unlink() if change == "goes away" else write_jsonl(Path("a.jsonl"), ROWS)
    )
    ran = embed("a.jsonl", "out.parquet")
    what = (
        f"a.jsonl had {before.st_size} bytes and has " if change == "grows" else "a.jsonl cannot be read: No such file"
    )
    assert ran.code == 1
    assert ran.line.startswith(f"error: an input changed during the run: {what}")
    assert ran.line.endswith(". Put it back as it was and give the same command again, or start anew with --restart")
    assert not Path("out.parquet").exists()
    live_again()
    write_jsonl(Path("a.jsonl"), ROWS[:5])
    os.utime("a.jsonl", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert embed("a.jsonl", "out.parquet").code == 0
    assert len(read(Path("out.parquet"))[0]) == 5


def test_a_pipe_ends_with_an_error_where_a_file_changed_during_the_run(embed: Embed, server: Any) -> None:
    write_jsonl(Path("a.jsonl"), ROWS[:5])
    before = Path("a.jsonl").stat()
    die_after(server, 9, lambda _: write_jsonl(Path("a.jsonl"), ROWS))
    ran = embed("a.jsonl", "-")
    assert (ran.code, len(ran.stdout.splitlines())) == (1, 5)
    assert ran.line.startswith(f"error: an input changed during the run: a.jsonl had {before.st_size} bytes and has ")
    assert ran.line.endswith(". The lines may be of either state of it: discard them and give the same command again")


@pytest.mark.parametrize("how_it_ends", ["the run ends", "the server dies", "the next command sees the change"])
def test_no_row_of_an_input_that_was_changed_for_a_while_is_in_the_output(
    how_it_ends: str, embed: Embed, server: Any
) -> None:
    """The input is written to in place, which no row's id shows, and put back as the command says."""
    rows, path = [{"id": row["id"], "text": row["text"] + 999 * " long"} for row in ROWS[:30]], Path("rows.jsonl")
    write_jsonl(path, rows)
    before = path.stat()

    def change(_: int) -> None:
        with path.open("r+b") as file:  # the reader has the file open
            file.write(lines_of(rows).replace(b"text number", b"TEXT NUMBER"))

    live_again = die_after(server, 99 if how_it_ends == "the run ends" else 4, change)
    arguments = ("--id-column", "id", "--batch-size", 4, "--workers", 1, path, "out.parquet")
    assert embed(*arguments).code == 1
    live_again()
    if how_it_ends == "the next command sees the change":
        assert "was changed since" in embed(*arguments).line
    path.write_bytes(lines_of(rows))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    ran = embed(*arguments)
    assert ran.code == 1
    assert re.fullmatch(r"error: row doc-\d+ is not what it was in an earlier run; start anew with --restart", ran.line)
    assert embed("--restart", *arguments).code == 0
    assert (read(Path("out.parquet"))[1] == vectors_of(server, rows)).all()


def test_a_run_is_not_resumed_with_another_revision_of_the_model(embed: Embed, server: Any) -> None:
    old, new = "94ab5b9a669fa4df-bfloat16-602112", "0123456789abcdef-bfloat16-602112"
    server.revisions = {"retrieval": old}
    play = server.routes["/v1/embeddings"]

    def embed_some(seen: Any) -> Any:
        if len(sent(server)) > 15:
            server.revisions["retrieval"] = new  # the model is replaced while the run is at work
        return play(seen)

    server.routes["/v1/embeddings"] = embed_some
    write_jsonl(Path("rows.jsonl"), ROWS)
    arguments = ("--batch-size", 5, "--workers", 1, "rows.jsonl", "out.parquet")
    ran = embed(*arguments)
    assert ran.code == 1
    assert f"served revision {old} and answered with {new}" in ran.line
    n_sent = len(sent(server))
    ran = embed(*arguments)
    assert (ran.code, len(sent(server))) == (2, n_sent)
    assert f"holds vectors of revision {old} of the model, and the server has {new}" in ran.line
    server.routes["/v1/embeddings"], server.revisions["retrieval"] = play, old
    assert embed(*arguments).code == 0
    _, vectors = read(Path("out.parquet"))
    assert (vectors == vectors_of(server, ROWS)).all()
    facts = json.loads(parquet.read_schema("out.parquet").metadata[b"jina_v4"])
    assert facts["revision"] == old


def test_a_run_uses_what_another_run_did_since_it_read_the_job(
    embed: Embed, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.revisions = {"retrieval": "94ab5b9a669fa4df-bfloat16-602112"}
    play, real = server.routes["/v1/embeddings"], embed_run.Journal
    write_jsonl(Path("rows.jsonl"), ROWS)
    arguments = ("--batch-size", 5, "--workers", 1, "rows.jsonl", "out.parquet")

    def open_after_another_run(*of_journal: Any) -> Any:
        monkeypatch.setattr(embed_run, "Journal", real)
        server.routes["/v1/embeddings"] = lambda seen: (
            play(seen) if len(sent(server)) <= 10 else server.json_answer({}, 503)
        )
        assert embed(*arguments).code == 1
        server.routes["/v1/embeddings"] = play
        return real(*of_journal)

    monkeypatch.setattr(embed_run, "Journal", open_after_another_run)
    ran = embed(*arguments)
    assert (ran.code, ran.stderr) == (0, "")


def test_an_output_that_is_there_is_replaced_only_by_force(embed: Embed, server: Any) -> None:
    write_jsonl(Path("rows.jsonl"), ROWS[:3])
    Path("out.npy").write_bytes(b"precious")
    for option in ([], ["--restart"]):
        ran = embed(*option, "rows.jsonl", "out.npy")
        assert (ran.code, ran.line) == (2, "error: out.npy is there already; use --force to replace it")
    assert Path("out.npy").read_bytes() == b"precious"
    Path("out.npy.errors.jsonl").write_text("of the output before")
    assert embed("--force", "rows.jsonl", "out.npy").code == 0
    assert (np.load("out.npy") == vectors_of(server, ROWS[:3])).all()
    assert not Path("out.npy.errors.jsonl").exists()


@pytest.mark.parametrize("n_done", range(2))
def test_a_run_that_ends_while_it_replaces_an_output_leaves_no_old_vectors_beside_new_ids(
    n_done: int, embed: Embed, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(Path("rows.jsonl"), ROWS[:3])
    arguments = ("--id-column", "id", "rows.jsonl", "out.npy")
    assert embed(*arguments).code == 0
    write_jsonl(Path("rows.jsonl"), ROWS[3:6])
    replace, calls = Path.replace, itertools.count()

    def end_instead(part: Path, place: Path) -> Path:
        if place.name.startswith("out.npy") and next(calls) == n_done:
            raise KeyboardInterrupt
        return replace(part, place)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", end_instead)
        assert embed("--force", *arguments).code == 130
    if Path("out.npy").exists():
        vectors, ids = np.load("out.npy"), json.loads(Path("out.npy.ids.json").read_text())
        assert (vectors == vectors_of(server, [row for row in ROWS[:6] if row["id"] in ids])).all()
    assert embed("--force", *arguments).code == 0
    assert (np.load("out.npy") == vectors_of(server, ROWS[3:6])).all()


@pytest.mark.parametrize("link", ["symbolic", "hard"])
def test_an_output_that_is_the_input_by_another_name_is_refused(link: str, embed: Embed, server: Any) -> None:
    parquet.write_table(Table.from_pylist(ROWS), "corpus.parquet")
    before = Path("corpus.parquet").read_bytes()
    make = Path("link.parquet").symlink_to if link == "symbolic" else Path("link.parquet").hardlink_to
    make("corpus.parquet")
    for arguments in (("corpus.parquet", "link.parquet"), ("link.parquet", "corpus.parquet")):
        ran = embed("--force", *arguments)
        assert (ran.code, server.bodies("/v1/embeddings")) == (2, [])
        assert f"OUTPUT {arguments[1]} would replace the INPUT {arguments[0]}" in ran.line
    assert Path("corpus.parquet").read_bytes() == before


def test_without_a_terminal_the_progress_is_one_line_at_the_end(embed: Embed, server: Any) -> None:
    write_jsonl(Path("rows.jsonl"), ROWS)
    options = ["--base-url", server.url, "--task", "retrieval", "rows.jsonl", "out.parquet"]
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 0
    assert result.stdout == ""
    summary, wrote = result.stderr.splitlines()
    assert summary.startswith("50 rows in ")
    assert summary.endswith(" rows/s")
    assert wrote == "wrote out.parquet"


@pytest.mark.parametrize(
    ("package", "name", "content", "output"),
    [
        ("pyarrow", "a.parquet", b"PAR1", "out.npy"),
        ("pyarrow", "a.txt", b"x", "out.parquet"),
        ("pypdfium2", "a.pdf", b"%PDF", "out.npy"),
    ],
)
def test_a_package_of_the_extra_is_asked_for_where_it_is_needed(
    package: str, name: str, content: bytes, output: str, embed: Embed, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path(name).write_bytes(content)
    monkeypatch.setitem(sys.modules, package, None)
    ran = embed(name, output)
    how = f"jina-v4-embed needs {package} here; install it with: pip install 'jina-v4-client[embed]'"
    assert (ran.code, ran.line) == (2, f"error: {how}")


@pytest.mark.parametrize("package", ["typer", "tqdm"])
def test_without_the_extra_the_command_says_how_to_install_it(package: str) -> None:
    program = f"import sys; sys.modules[{package!r}] = None; from jina_v4_client.embed import main; main()"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.returncode == 2
    assert ran.stderr.startswith(f"error: jina-v4-embed needs {package} here; install it with: pip install ")


def test_help_loads_neither_http_nor_what_only_some_files_need() -> None:
    program = (
        "import sys; from jina_v4_client.embed import main; sys.argv[1:] = ['--help']\n"
        "try: main()\n"
        "except SystemExit: print(*sys.modules, file=sys.stderr)"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "INPUT" in ran.stdout
    assert not {"openai", "httpx2", "pyarrow", "pypdfium2"} & set(ran.stderr.split())
