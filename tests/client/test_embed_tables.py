"""Tables of `jina-v4-embed` that are broken: the line, the mend, and one rule for `--on-error skip` in every format."""

import base64
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow
import pyarrow.csv
import pytest
from embed_command import Embed, embed_with, read, read_errors, write_jsonl
from image_files import written
from jina_v4_client.embed.tables import Columns, Parquet
from PIL import Image
from pyarrow import parquet


@pytest.fixture
def embed(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Embed:
    monkeypatch.chdir(tmp_path)
    server.play_ours()
    return embed_with("--base-url", server.url, "--task", "retrieval", "--max-retries", 0, "--quiet")


def texts_as_parquet(*texts: bytes) -> bytes:
    """A column of strings that may be no UTF-8."""
    column = pyarrow.array(texts, pyarrow.binary()).view(pyarrow.string())
    file = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table({"text": column}), file)
    return bytes(file.getvalue())


def broken_group() -> bytes:
    """Three row groups of two rows, the second of which cannot be decompressed."""
    file = pyarrow.BufferOutputStream()
    table = pyarrow.table({"text": ["a", "b", "c", "d", "e", "f"]})
    parquet.write_table(table, file, row_group_size=2, compression="gzip", use_dictionary=False)
    content = bytearray(file.getvalue())
    column = parquet.ParquetFile(pyarrow.BufferReader(bytes(content))).metadata.row_group(1).column(0)
    start = column.data_page_offset
    content[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    return bytes(content)


LATIN_1 = "not UTF-8; convert the file, as with: iconv -f WINDOWS-1252 -t UTF-8"
QUOTE = "is a quote missing, or not doubled within quotes?"
# The file, its content, the texts that are embedded, and for each row that is skipped its place and what is said.
BROKEN: dict[str, tuple[str, bytes, list[str], dict[int, str]]] = {
    "latin-1 in CSV": ("a.csv", b"text\nx\ncaf\xe9\nz\n", ["x", "z"], {2: f"line 3: {LATIN_1}"}),
    "latin-1 in TSV behind a text of two lines": (
        "a.tsv",
        b'n\ttext\n1\t"x\ny"\n2\t\xe9\n3\tz\n',
        ["x\ny", "z"],
        {2: f"line 4: {LATIN_1}"},
    ),
    "latin-1 in JSONL": ("a.jsonl", b'{"text": "x"}\n{"text": "\xe9"}\n', ["x"], {2: f"0xe9, is {LATIN_1}"}),
    "latin-1 in text": (
        "a.txt",
        b"x\ncaf\xe9\nz\n",
        ["x", "z"],
        {2: f"line 2: byte 4 of the line, 0xe9, is {LATIN_1}"},
    ),
    "lines of a text that end with carriage returns": (
        "a.txt",
        b"x\r\none\rtwo\nz\r",
        ["x", "z"],
        {2: "a carriage return inside a line; if lines end with it, convert the file: tr '\\r' '\\n'"},
    ),
    "no UTF-8 in parquet": (
        "a.parquet",
        texts_as_parquet(b"x", b"caf\xe9", b"z"),
        ["x", "z"],
        {2: "a text that is not UTF-8 (unexpected end of data at byte 4)"},
    ),
    "a quote that is not closed": (
        "a.csv",
        b'id,text\n1,"abc\n2,def\n3,ghi\n',
        ["def", "ghi"],
        {1: f"line 2: no CSV (unexpected end of data); {QUOTE}"},
    ),
    "a quote that the next one closes": (
        "a.csv",
        b'text,n\na,1\n"b,2\nc,3\n"d",4\n"e\nf",5\n',
        ["a", "c", "d", "e\nf"],
        {2: f"line 3: no CSV (',' expected after '\"'); {QUOTE}"},
    ),
    "two quotes that are not closed": (
        "a.csv",
        b'text,n\n"a,1\nb,2\n"c,3\nd,4\n',
        ["b", "d"],
        {1: "line 2: no CSV", 3: "line 4: no CSV"},
    ),
    "a quote within quotes": ("a.csv", b'text\n"a "b" c"\nd\n', ["d"], {1: "line 2: no CSV (',' expected after"}),
    "a cell too many": ("a.csv", b"text\n\nx\ny,z\n", ["x"], {2: "line 4: more than 1 cells; is a quote missing?"}),
    "a surrogate in JSONL": (
        "a.jsonl",
        b'{"text": "x"}\n{"text": "y\\ud83d"}\n{"text": "z"}\n',
        ["x", "z"],
        {2: "a lone surrogate, '\\ud83d', at character 2"},
    ),
    "no JSON": ("a.jsonl", b'{"text": "x"}\n{"text": \n', ["x"], {2: "no JSON"}),
    "a parquet group that cannot be decoded": (
        "a.parquet",
        broken_group(),
        ["a", "b", "e", "f"],
        {3: "broken parquet, in row group 2", 4: "broken parquet, in row group 2"},
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_row_is_named_or_skipped_and_no_other(case: str, embed: Embed, server: Any) -> None:
    name, content, texts, errors = BROKEN[case]
    Path(name).write_bytes(content)
    stopped = embed(name, "out.parquet")
    assert stopped.code == 1
    number, message = next(iter(errors.items()))
    assert stopped.line.startswith(f"error: row {name}#{number}: ")
    assert message in stopped.line
    skipped = embed("--on-error", "skip", name, "out.parquet")
    n_rows = len(texts) + len(errors)
    assert skipped.code == 3
    assert skipped.line == f"{len(errors)} of {n_rows} rows were skipped; out.parquet.errors.jsonl says why"
    _, vectors = read(Path("out.parquet"))
    assert (vectors == np.stack([server.vector("Passage: " + text) for text in texts])).all()
    found = {error["row"]: error["error"] for error in read_errors("out.parquet")}
    assert found.keys() == errors.keys()
    for place, part in errors.items():
        assert part in found[place]


TWICE = pyarrow.Table.from_arrays([pyarrow.array([name]) for name in ("1", "a", "b")], ["id", "text", "text"])
WRITE_TWICE = {
    "csv": lambda path: pyarrow.csv.write_csv(TWICE, path),
    "parquet": lambda p: parquet.write_table(TWICE, p),
}


@pytest.mark.parametrize("ending", WRITE_TWICE)
def test_a_column_that_is_there_twice_is_refused_where_it_is_read(ending: str, embed: Embed, server: Any) -> None:
    WRITE_TWICE[ending](f"a.{ending}")
    ran = embed("--id-column", "id", f"a.{ending}", "out.parquet")
    said = f"error: a.{ending} has 2 columns 'text'; rename all but one"
    assert (ran.code, ran.line, server.bodies("/v1/embeddings")) == (2, said, [])
    assert embed("--text-column", "id", f"a.{ending}", "out.parquet").code == 0


def test_ids_that_are_binary_are_texts_or_broken_rows(embed: Embed) -> None:
    ids = [b"k1", "ü".encode(), b"\xe9", b"", None]
    parquet.write_table(pyarrow.table({"id": pyarrow.array(ids, pyarrow.binary()), "text": list("abcde")}), "a.parquet")
    arguments = ("--id-column", "id", "a.parquet", "out.parquet")
    assert embed(*arguments).line.startswith("error: row a.parquet#3: the id in 'id' is binary and not UTF-8 (")
    assert embed("--on-error", "skip", *arguments).code == 3
    assert read(Path("out.parquet"))[0] == ["k1", "ü"]
    nothing = "nothing in the column 'id', which holds the ids"
    assert [error["error"] for error in read_errors("out.parquet")][1:] == [nothing, nothing]


@pytest.mark.parametrize(("value", "kind"), [("[1]", "list"), ('{"a": 1}', "dict")])
def test_an_id_that_is_no_single_value_is_a_broken_row(value: str, kind: str, embed: Embed) -> None:
    Path("a.jsonl").write_text(f'{{"text": "x", "id": {value}}}\n')
    ran = embed("--id-column", "id", "a.jsonl", "out.parquet")
    assert (ran.code, ran.line) == (1, f"error: row a.jsonl#1: 'id' holds no id but a value of type {kind}")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", b"text,id\nx,1\ny,\nz\n"),
        ("a.jsonl", b'{"text":"x","id":1}\n{"text":"y","id":""}\n{"text":"z"}\n'),
        ("a.jsonl", b'{"text":"x","id":1}\n{"text":"y","id":NaN}\n{"text":"z","id":NaN}\n'),
    ],
    ids=["csv", "jsonl", "NaN"],
)
def test_an_empty_id_is_no_id(name: str, content: bytes, embed: Embed) -> None:
    Path(name).write_bytes(content)
    assert embed("--on-error", "skip", "--id-column", "id", name, "out.parquet").code == 3
    assert read(Path("out.parquet"))[0] == ["1"]
    assert [error["id"] for error in read_errors("out.parquet")] == [f"{name}#2", f"{name}#3"]


def test_repeated_ids_are_counted_at_the_end(server: Any, embed: Embed) -> None:
    write_jsonl(Path("a.jsonl"), [{"text": "x", "id": name} for name in ("a", "b", "a", "a", "b")])
    ran = embed_with("--base-url", server.url, "--task", "retrieval")("--id-column", "id", "a.jsonl", "out.parquet")
    assert ran.code == 0
    assert "warning: the ids of 3 rows are those of earlier rows" in ran.stderr.splitlines()


def test_an_input_that_is_named_twice_is_warned_of(server: Any, embed: Embed) -> None:
    Path("a.txt").write_text("x\ny\n")
    ran = embed_with("--base-url", server.url, "--task", "retrieval")("a.txt", "a.txt", "out.parquet")
    assert "warning: the ids of 2 rows are those of earlier rows" in ran.stderr.splitlines()


def test_a_time_that_python_cannot_hold_costs_its_row(embed: Embed) -> None:
    times = pyarrow.array([0, 2**62, 10**6], pyarrow.timestamp("us"))
    parquet.write_table(pyarrow.table({"text": ["x", "y", "z"], "id": times}), "a.parquet")
    assert embed("--on-error", "skip", "--id-column", "id", "a.parquet", "out.parquet").code == 3
    assert read(Path("out.parquet"))[0] == ["1970-01-01 00:00:00", "1970-01-01 00:00:01"]
    (error,) = read_errors("out.parquet")
    assert error["id"] == "a.parquet#2"
    assert error["error"] == (
        "a value that Python cannot hold (date value out of range) in text: string, id: timestamp[us]"
    )


def test_an_unknown_time_zone_is_named(embed: Embed) -> None:
    times = pyarrow.array([0], pyarrow.timestamp("us", tz="Mars/Base"))
    parquet.write_table(pyarrow.table({"text": ["x"], "id": times}), "a.parquet")
    ran = embed("--id-column", "id", "a.parquet", "out.parquet")
    assert ran.code == 1
    assert ran.line.startswith("error: row a.parquet#1: a value that Python cannot hold")
    assert "id: timestamp[us, tz=Mars/Base]" in ran.line


def test_a_row_group_of_parquet_is_not_read_as_a_whole(tmp_path: Path) -> None:
    path = str(tmp_path / "a.parquet")
    noise = np.random.default_rng(0).integers(32, 127, (32768, 1024), np.uint8)
    parquet.write_table(pyarrow.table({"text": [row.tobytes().decode() for row in noise]}), path)  # 32 MiB, a group
    before = pyarrow.total_allocated_bytes()
    rows = Parquet(path, Columns("text", None, None)).rows()
    assert [next(rows).read().value for _ in range(2)] == [row.tobytes().decode() for row in noise[:2]]
    assert pyarrow.total_allocated_bytes() - before < 8 * 2**20


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.txt", "-"])
def test_a_table_in_utf_16_is_refused_with_the_way_to_convert_it(
    name: str, encoding: str, embed: Embed, server: Any
) -> None:
    content = ('{"text": "x"}\n' if name in ("a.jsonl", "-") else "text\nx\n").encode(encoding)
    if name != "-":
        Path(name).write_bytes(content)
    ran = embed("--on-error", "skip", name, "out.npy", stdin=content)
    assert ran.code == 2
    place = "the standard input" if name == "-" else name
    assert ran.line.startswith(f"error: {place}, line 1: it begins like UTF-16 or UTF-32, not like UTF-8; convert")
    assert "iconv -f UTF-16 -t UTF-8" in ran.line


@pytest.mark.parametrize("ending", ["jsonl", "txt", "csv"])
def test_a_wrong_encoding_is_found_before_the_inputs_ahead_of_it_are_embedded(
    ending: str, embed: Embed, server: Any, tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "good.jsonl", [{"text": f"text {i}"} for i in range(100)])
    (tmp_path / f"bad.{ending}").write_text('{"text": "a"}\n', encoding="utf-16")
    ran = embed("good.jsonl", f"bad.{ending}", "out.parquet")
    assert (ran.code, server.paths(), (tmp_path / "out.parquet.partial").exists()) == (2, [], False)


def test_a_csv_from_a_pipe_skips_by_the_same_rule(embed: Embed) -> None:
    ran = embed("--input-format", "csv", "--on-error", "skip", "-", "out.parquet", stdin=b'text\nx\n"caf\xe9"\n"y\nz\n')
    assert ran.code == 3
    ids, _ = read(Path("out.parquet"))
    assert ids == ["1", "4"]


def test_lines_of_a_csv_may_end_as_on_old_machines(embed: Embed, server: Any) -> None:
    Path("a.csv").write_bytes(b'\xef\xbb\xbftext,n\rx,1\r"y\rz",2\r\nw,3')
    assert embed("a.csv", "out.parquet").code == 0
    _, vectors = read(Path("out.parquet"))
    assert (vectors == np.stack([server.vector("Passage: " + text) for text in ("x", "y\rz", "w")])).all()


def noise_png() -> bytes:
    noise = np.random.default_rng(1).integers(0, 256, (30, 44, 3), dtype=np.uint8)
    return written(Image.fromarray(noise))


NOISE_PNG = noise_png()
# Ways to write an image into a table, all of which are the same image.
FORMS: dict[str, Any] = {
    "path": lambda path, _: path.name,
    "data URI": lambda _, text: f"data:image/png;base64,{text}",
    "data URI among blanks": lambda _, text: f" \n\ufeffDATA:;base64,{text}\t",
    "data URI with more words": lambda _, text: f"data:image/png;name=a.png; BASE64,{text}",
    "data URI in lines": lambda _, text: f"data:image/png;base64,{text[:9]}\r\n {text[9:]}",
    "data URI without padding": lambda _, text: f"data:image/png;base64,{text.rstrip('=')}",
    "data URI with escapes": lambda _, text: f"data:image/png;base64,{quote(text, safe='')}",
    "data URI of the URL-safe alphabet": lambda _, text: (
        f"data:image/png;base64,{text.replace('+', '-').replace('/', '_')}"
    ),
    "base64": lambda _, text: text,
    "base64 in lines": lambda _, text: "\n".join(text[i : i + 76] for i in range(0, len(text), 76)),
}


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_every_form_of_an_image_in_a_table_is_that_image(ending: str, embed: Embed, server: Any) -> None:
    picture = Path("picture.png")
    picture.write_bytes(NOISE_PNG)
    text = base64.b64encode(picture.read_bytes()).decode()
    assert text.endswith("=")
    assert {"+", "/"} <= set(text)
    rows = [{"image": form(picture, text)} for form in FORMS.values()]
    if ending == "jsonl":
        write_jsonl(Path("rows.jsonl"), rows)
    elif ending == "csv":
        quoted = [row["image"].replace('"', '""') for row in rows]
        Path("rows.csv").write_bytes(("image\n" + "".join(f'"{cell}"\n' for cell in quoted)).encode())
    else:
        parquet.write_table(pyarrow.Table.from_pylist(rows), "rows.parquet")
    assert embed("--image-column", "image", f"rows.{ending}", "out.parquet").code == 0
    ids, vectors = read(Path("out.parquet"))
    assert len(ids) == len(FORMS)
    assert (vectors == server.vector(f"data:image/png;base64,{text}")).all()
    assert len([item for body in server.bodies("/v1/embeddings") for item in body["input"]]) == 1


@pytest.mark.parametrize(
    ("image", "message"),
    [
        pytest.param("data:image/png;base64,a!b", "broken base64: character 2", id="not base64"),
        pytest.param("data:image/png;base64,abcde", "broken base64: its end is missing", id="cut off"),
        pytest.param(" data:image/png,abc", "a data URI must be base64", id="data URI of another kind"),
        pytest.param("data:image/png;base64,aGFsbG8=", "not an image", id="of a text"),
        pytest.param("data:image/svg+xml;base64," + base64.b64encode(b"<svg/>").decode(), "SVG", id="SVG"),
        pytest.param("A" * 100_000, "nor the base64 of an image file", id="base64 of no image"),
        pytest.param("images/cat", "no such file", id="a path that could be base64"),
        pytest.param(base64.b64encode(NOISE_PNG[:-400]).decode(), "a broken image", id="base64 of a broken image"),
    ],
)
def test_an_image_that_cannot_be_read_is_one_clear_error(image: str, message: str, embed: Embed) -> None:
    Image.new("RGB", (40, 30)).save("good.png")
    write_jsonl(Path("rows.jsonl"), [{"image": "good.png"}, {"image": image}])
    ran = embed("--image-column", "image", "--on-error", "skip", "rows.jsonl", "out.parquet")
    assert ran.code == 3
    (error,) = read_errors("out.parquet")
    assert error["id"] == "rows.jsonl#2"
    assert message in error["error"]
    assert len(error["error"]) < 400
