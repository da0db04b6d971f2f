"""The search example against a real server: what it finds is what plain numpy finds, and no file is in by half."""

import io
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx2
import numpy as np
import pypdfium2
import pytest
from click.testing import Result
from conftest import Golden
from jina_v4_client import EmbeddingsClient
from jina_v4_client.embed.cli import app as embed_app
from jina_v4_client.scoring import cosine, maxsim
from numpy.typing import NDArray
from pdf_files import EMPTY, FILLED, ONE_BAD, page_with, text_field
from PIL import Image
from servers import Server, free_port, started
from tokenizers import Tokenizer
from typer.testing import CliRunner
from wire import IMAGES, MAX_IMAGE_BYTES, TASK, TEXTS, assert_near

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[3]
sys.path.append(str(ROOT / "examples"))

from document_search import cli  # noqa: E402
from document_search.store import PROBE_TEXT, Page, Source, Store  # noqa: E402
from document_search.words import beginnings, find_words  # noqa: E402

Run = Callable[..., Result]

# The golden images in two files, as (file, page).
FILES = {"a.pdf": IMAGES[:2], "it's b.pdf": IMAGES[2:]}
PLACES = [(name, number) for name, images in FILES.items() for number in range(1, len(images) + 1)]
QUERY = "green circle on a red square"
INDEX = ("index", "--scale", 1, "--index", "ix")


def write_pdf(path: str | Path, images: Sequence[Path]) -> None:
    """Write a file with an image a page, a point a pixel."""
    first, *others = [Image.open(image).convert("RGB") for image in images]
    first.save(path, "PDF", save_all=True, append_images=others, resolution=72)


@pytest.fixture(scope="module")
def indexed(wire_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the two files and their index, which no test may change."""
    folder = tmp_path_factory.mktemp("indexed")
    for name, images in FILES.items():
        write_pdf(folder / name, images)
    done = CliRunner().invoke(
        cli.app,
        ["index", "--scale", "1", "--index", f"{folder}/ix", "--base-url", wire_server.base_url, str(folder)],
    )
    assert done.exit_code == 0, done.output
    return folder


@pytest.fixture
def run(wire_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("JINA_V4_API_KEY", raising=False)

    def invoke(command: str, *arguments: object, base_url: str = wire_server.base_url) -> Result:
        options = [] if command == "sample" else ["--base-url", base_url]
        return CliRunner().invoke(cli.app, [command, *map(str, arguments), *options])

    return invoke


def ranking(done: Result) -> list[tuple[float, str, int]]:
    """Give the score, file and page of each line of a table."""
    assert done.exit_code == 0, done.output
    lines = re.findall(r"^ *(-?\d+\.\d+) +(\d+)  (.+)$", done.stdout, re.MULTILINE)
    return [(float(score), Path(file).name, int(page)) for score, page, file in lines]


def pages_of(folder: Path) -> dict[str, list[int]]:
    """Give the pages that an index has of each file."""
    rows = Store.open(folder)._table.to_arrow().select(["file", "page"]).to_pylist()
    files = sorted({row["file"] for row in rows})
    return {Path(file).name: sorted(row["page"] for row in rows if row["file"] == file) for file in files}


@pytest.mark.parametrize("by", ["dense", "multivector", "both"])
def test_a_search_finds_what_plain_scoring_finds(by: str, run: Run, indexed: Path, wire_server: Server) -> None:
    pictures = []
    for name in FILES:
        with pypdfium2.PdfDocument(indexed / name) as document:
            pictures += [page.render(scale=1).to_pil().convert("RGB") for page in document]
    with EmbeddingsClient(wire_server.base_url, task=TASK) as client:
        many = by != "dense"
        pages = client.encode_image(pictures, return_multivector=many)
        query = client.encode_text(QUERY, return_multivector=many)
    scores = (maxsim if many else cosine)(query, pages)[0]
    found = ranking(run("search", QUERY, "--by", by, "--index", indexed / "ix", "--top-k", 10))
    assert [(file, page) for _, file, page in found] == [PLACES[i] for i in np.argsort(-scores)]
    assert [score for score, _, _ in found] == pytest.approx(sorted(scores, reverse=True), abs=6e-4)


def test_the_second_stage_orders_only_the_candidates_of_the_first(tmp_path: Path) -> None:
    first, second = np.eye(128, dtype=np.float32)[:2]
    pages = [
        Page(1, first, np.stack([first, first]), (1, 1)),  # the best by cosine
        Page(2, (first + second) / 2**0.5, np.stack([second, second]), (1, 1)),  # the best by MaxSim
        Page(3, second, np.stack([first + second, first]), (1, 1)),
    ]
    store = Store.open_or_make(tmp_path / "ix", probe=first)
    store.put(Source(Path("/x.pdf"), "digest", 1.0, 3136), pages)
    tokens = np.stack([second, second, second])
    assert [page.number for page in store.by_dense(first, 3)] == [1, 2, 3]
    assert [page.number for page in store.by_both(first, tokens, 1, n_candidates=1)] == [1]
    assert [page.number for page in store.by_both(first, tokens, 1, n_candidates=2)] == [2]
    assert [page.number for page in store.by_multivector(tokens, 3)] == [2, 3, 1]


def test_a_page_is_found_by_its_own_vectors(golden: Golden, tmp_path: Path) -> None:
    rows = [[golden.rows[f"{TASK}/image/{i}/{kind}"] for kind in ("dense", "multi")] for i in range(len(IMAGES))]
    store = Store.open_or_make(tmp_path / "ix", probe=rows[0][0])
    pages = [Page(number, dense, multi, (1, 1)) for number, (dense, multi) in enumerate(rows, 1)]
    store.put(Source(Path("/x.pdf"), "digest", 1.0, 602112), pages)
    for number, (dense, multi) in enumerate(rows, 1):
        for best in (
            store.by_dense(dense, 1),
            store.by_multivector(multi, 1),
            store.by_both(dense, multi, 1, len(rows)),
        ):
            assert best[0].number == number
        np.testing.assert_array_equal(store.multivector(best[0]), multi)  # as it was stored, bit for bit


def test_the_picture_is_a_png_with_the_page_and_a_map_a_word(run: Run, indexed: Path) -> None:
    # The words, and how the maps of the query and of each word are arranged.
    for query, n_rows, n_columns in (("circle", 2, 1), ("a circle $5 or $6 浜辺", 3, 3), ("x " * 30, 3, 4)):
        done = run("search", query, "--index", indexed / "ix", "--picture", "new/folder/best.png")
        _, file, number = ranking(done)[0]
        with pypdfium2.PdfDocument(indexed / file) as document:
            width, height = document[number - 1].get_size()
        page_width = 100 * (40 * width / height) ** 0.5  # 40 square inches at 100 dots an inch
        expected = page_width * (1 + n_columns / n_rows) + 100, page_width * height / width + 80
        with Image.open("new/folder/best.png") as picture:
            assert picture.format == "PNG"
            assert picture.size == pytest.approx(expected, abs=1)
            assert np.asarray(picture.convert("L")).std() > 5  # it is not one colour


@pytest.mark.parametrize("text", [" ".join(text.split()) for text in (*TEXTS, "o'clock 2020, 浜辺")])
def test_the_rows_of_a_word_are_its_tokens(text: str, wire_server: Server, golden: Golden) -> None:
    texts = beginnings(text, 6)
    with EmbeddingsClient(wire_server.base_url, task=TASK) as client:
        whole, *parts = client.encode_text([text, *texts], return_multivector=True)
    tokenizer = Tokenizer.from_file(str(golden.checkpoint / "tokenizer.json"))
    tokens = tokenizer.encode(f"Query: {text}", add_special_tokens=False)
    assert len(whole) == len(tokens)
    end = len("Query:")
    for word in find_words(texts, parts):
        begin, end = end, end + 1 + len(word.text)  # in letters; the space before a word is the word's
        rows = [row for row, (start, stop) in enumerate(tokens.offsets) if start >= begin and stop <= end]
        assert list(range(word.start, word.stop)) == rows
        # What comes later changes no row: the rows of a beginning are those of the whole.
        np.testing.assert_allclose(parts[texts.index(text[: end - 7])][: word.stop], whole[: word.stop], atol=1e-4)


def test_a_file_that_is_indexed_again_has_its_pages_once(run: Run) -> None:
    write_pdf("a.pdf", IMAGES[:3])
    write_pdf("it's b.pdf", IMAGES[:1])
    assert "holds 4 pages" in run(*INDEX, ".").stdout
    again = run(*INDEX, ".", "a.pdf")
    assert again.stdout.splitlines() == ["a.pdf: unchanged", "it's b.pdf: unchanged", "ix holds 4 pages"]
    write_pdf("a.pdf", IMAGES[1:3])  # it is shorter now
    assert run(*INDEX, ".").stdout.splitlines()[:2] == ["a.pdf: 2 pages", "it's b.pdf: unchanged"]
    assert pages_of(Path("ix")) == {"a.pdf": [1, 2], "it's b.pdf": [1]}
    assert run("index", "--scale", 0.5, "--index", "ix", ".").stdout.splitlines()[0] == "a.pdf: 2 pages"
    assert pages_of(Path("ix")) == {"a.pdf": [1, 2], "it's b.pdf": [1]}


# Indexes as the command does, and is killed as the second page of the second file would be sent.
KILLED = """
import os, signal, sys
from jina_v4_client import EmbeddingsClient
from document_search import cli, indexing

encode, calls = EmbeddingsClient.encode_both, []

def killing(*args, **kwargs):
    calls.append(args)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(*args, **kwargs)

EmbeddingsClient.encode_both = killing
indexing.PAGES_AT_A_TIME = 1
cli.main()
"""


def test_a_killed_run_leaves_files_whole_or_out(run: Run, wire_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pdf("a.pdf", IMAGES[:2])
    write_pdf("b.pdf", IMAGES[:3])
    command = [sys.executable, "-c", KILLED, *map(str, INDEX), "--base-url", wire_server.base_url, "."]
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "examples"))
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert pages_of(Path("ix")) == {"a.pdf": [1, 2]}
    assert run(*INDEX, ".").stdout.splitlines() == ["a.pdf: unchanged", "b.pdf: 3 pages", "ix holds 5 pages"]


def encrypted_pdf() -> bytes:
    """A file of one page that names a password that nobody has."""
    security = b"<</Filter/Standard/V 1/R 2/P -4/O<" + b"00" * 32 + b">/U<" + b"11" * 32 + b">>>"
    page = io.BytesIO()
    Image.new("RGB", (9, 9)).save(page, "PDF")
    trailer = re.search(rb"trailer\s*<<", page.getvalue())
    assert trailer is not None
    plain = page.getvalue()
    return plain[: trailer.end()] + b"/Encrypt " + security + b"/ID[<00><00>]" + plain[trailer.end() :]


def test_a_file_that_cannot_be_read_is_named_and_the_others_are_indexed(run: Run) -> None:
    write_pdf("good.pdf", IMAGES[:1])
    Path("broken.pdf").write_bytes(Path("good.pdf").read_bytes()[:100])
    Path("empty.pdf").touch()
    Path("locked.pdf").write_bytes(encrypted_pdf())
    done = run(*INDEX, ".")
    assert done.exit_code == 1
    lines = done.stderr.splitlines()
    assert len(lines) == 3
    for line, name, why in zip(
        lines,
        ("broken", "empty", "locked"),
        ("a broken PDF file, or one without pages",) * 2 + ("needs a password",),
        strict=True,
    ):
        assert line.startswith("error: ")
        assert f"/{name}.pdf: " in line
        assert why in line
    assert pages_of(Path("ix")) == {"good.pdf": [1]}


def test_a_file_that_the_server_refuses_is_named_and_the_others_are_indexed(run: Run) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (1000, 800, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("a scan.png")
    assert Path("a scan.png").stat().st_size > MAX_IMAGE_BYTES
    write_pdf("b.pdf", IMAGES[:1])
    done = run(*INDEX, ".")
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "/a scan.png: " in line
    assert f"the file is over the limit of {MAX_IMAGE_BYTES} bytes" in line
    assert pages_of(Path("ix")) == {"b.pdf": [1]}
    done = run(*INDEX, "--max-pixels", 10**9, ".")
    assert (done.exit_code, pages_of(Path("ix"))) == (1, {"b.pdf": [1]})
    assert "max_pixels=1000000000 is not offered" in done.stderr
    assert "holds" not in done.stdout, "of what holds for every file, the first ends the run"


def test_pages_are_rendered_as_jina_v4_embed_renders_them(run: Run, wire_server: Server) -> None:
    blank, filled = page_with(text_field(), EMPTY), page_with(text_field(b"Marie"), FILLED)
    for name, content in (("blank.pdf", blank), ("filled.pdf", filled), ("one bad.pdf", ONE_BAD)):
        Path(name).write_bytes(content)
    done = run(*INDEX, ".")
    assert done.exit_code == 1
    assert "one bad.pdf: 2 pages\n" in done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "/one bad.pdf, page 2: the page cannot be rendered" in line
    again = run(*INDEX, ".")
    assert (again.exit_code, again.stderr) == (1, done.stderr)
    assert "one bad.pdf: unchanged\n" in again.stdout
    assert pages_of(Path("ix")) == {"blank.pdf": [1], "filled.pdf": [1], "one bad.pdf": [1, 3]}
    options = ["--base-url", wire_server.base_url, "--task", TASK, "--pdf-scale", "1", "--on-error", "skip"]
    embedded = CliRunner().invoke(embed_app, [*options, "blank.pdf", "filled.pdf", "one bad.pdf", "out.npy"])
    assert embedded.exit_code == 3
    rows = Store.open(Path("ix"))._table.to_arrow().sort_by([("id", "ascending")])
    assert_near(list(np.stack(rows["dense"].to_numpy())), list(np.load("out.npy")))


def test_a_picture_is_a_page_and_embedded_as_the_client_embeds_it(run: Run, wire_server: Server) -> None:
    for image in IMAGES[:2]:
        shutil.copyfile(image, image.name)
    Path("half.png").write_bytes(IMAGES[0].read_bytes()[:100])
    done = run(*INDEX, ".")
    assert done.exit_code == 1
    assert "half.png: a broken picture" in done.stderr
    assert pages_of(Path("ix")) == {image.name: [1] for image in IMAGES[:2]}
    with EmbeddingsClient(wire_server.base_url, task=TASK) as client:
        expected = client.encode_image([str(image) for image in IMAGES[:2]])
    rows = Store.open(Path("ix"))._table.to_arrow().sort_by([("id", "ascending")])
    assert_near(list(np.stack(rows["dense"].to_numpy())), expected)
    assert ranking(run("search", "x", "--index", "ix"))[0][1] in {image.name for image in IMAGES[:2]}
    assert Path("document-search/best-page.png").exists()


def test_a_folder_has_the_pages_that_jina_v4_embed_finds_and_the_rest_is_named(run: Run, wire_server: Server) -> None:
    first, *others = [Image.open(image).convert("RGB") for image in IMAGES[:3]]
    Path("in/.hidden").mkdir(parents=True)
    first.save("in/scan.tif", save_all=True, append_images=others)
    first.save("in/.hidden/hidden.png")
    others[0].save("in/page.jpe", "JPEG")
    others[0].save("in/page.tga")
    others[1].save("in/unnamed", "PNG")
    Path("elsewhere").mkdir()
    others[1].save("elsewhere/linked.png")
    Path("in/link").symlink_to(Path("elsewhere").absolute())
    Path("in/notes.txt").write_text("notes")
    Path("in/drawing.svg").write_text("<svg/>")
    done = run("index", "--index", "in/ix", "in")
    assert done.exit_code == 0, done.output
    assert done.stderr.splitlines() == [
        "left out: in/drawing.svg: SVG, a drawing without pixels; convert it to PNG",
        "left out: in/notes.txt: a text or a table",
    ]
    assert pages_of(Path("in/ix")) == {
        "linked.png": [1],
        "page.jpe": [1],
        "page.tga": [1],
        "scan.tif": [1, 2, 3],
        "unnamed": [1],
    }
    assert run("index", "--index", "in/ix", "in").stdout.count("unchanged") == 5
    rows = Store.open(Path("in/ix"))._table.to_arrow().to_pylist()
    dense = [row["dense"] for row in sorted(rows, key=lambda row: row["page"]) if row["file"].endswith("scan.tif")]
    with EmbeddingsClient(wire_server.base_url, task=TASK) as client:
        assert_near(list(map(np.asarray, dense)), client.encode_image([first, *others]))
    found = run("search", "x", "--index", "in/ix", "--top-k", 10)
    assert len(ranking(found)) == 7
    assert Path("document-search/best-page.png").exists()


def test_the_page_finds_what_the_command_finds(run: Run, indexed: Path, wire_server: Server, tmp_path: Path) -> None:
    port = free_port()
    options = {"port": port, "base-url": wire_server.base_url, "index": indexed / "ix", "uploads": tmp_path / "uploads"}
    command = [sys.executable, ROOT / "examples/document_search", "page", *(f"--{k}={v}" for k, v in options.items())]
    with started(command, port, tmp_path / "log") as server, httpx2.Client(trust_env=False, timeout=60) as http:
        server.wait_until_said("open http")
        found = http.post(f"{server.base_url}/api/search", json={"text": QUERY}).json()
        best = found["pages"][0]
        path = f"queries/{found['query']}/pages/{best['digest']}/{best['number']}/map"
        maps = http.get(f"{server.base_url}/api/{path}").json()["words"]
    for by, score in (("both", "maxsim"), ("dense", "dense")):
        listed = ranking(run("search", QUERY, "--by", by, "--index", indexed / "ix", "--top-k", 10))
        pages = sorted(found["pages"], key=lambda page: -page[score])
        assert [(page["name"], page["number"]) for page in pages] == [(file, page) for _, file, page in listed]
        assert [page[score] for page in pages] == pytest.approx([value for value, _, _ in listed], abs=6e-4)
    assert [word["name"] for word in maps] == ["the whole query", *QUERY.split()]
    # A word's map is the mean of its tokens', and its best patch is no better than what MaxSim found on the page.
    tokens = sum(word["score"] for word in maps[1:])
    assert 0 < tokens < maps[0]["score"] == pytest.approx(best["maxsim"], abs=1e-4)


REFUSALS: dict[str, tuple[tuple[object, ...], int, str]] = {
    "an empty query": (("search", " \n ", "--index", "INDEXED"), 2, "the query is empty"),
    "no index": (("search", "x", "--index", "nowhere"), 2, "nowhere holds no index; make one with: index"),
    "an index of nothing": (("search", "x", "--index", "half"), 2, "half holds no index"),
    "no such file": ((*INDEX, "nowhere.pdf"), 2, "nowhere.pdf does not exist"),
    "a file of another kind": ((*INDEX, "note.txt"), 2, "note.txt is neither a PDF file nor a picture"),
    "a folder without": ((*INDEX, "half"), 2, "no PDF files or pictures in half"),
    "an index that is a file": (("index", "a.pdf", "--index", "note.txt"), 2, "no index can be made in note.txt"),
}


@pytest.mark.parametrize(("arguments", "code", "message"), REFUSALS.values(), ids=REFUSALS)
def test_a_command_that_cannot_be_run_says_why_in_a_line(
    arguments: tuple[object, ...], code: int, message: str, run: Run, indexed: Path
) -> None:
    write_pdf("a.pdf", IMAGES[:1])
    Path("note.txt").touch()
    Path("half/pages.lance").mkdir(parents=True)  # of a run that was killed as it made the table
    done = run(*(indexed / "ix" if argument == "INDEXED" else argument for argument in arguments))
    assert (done.exit_code, done.stdout) == (code, "")
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1
    assert not Path("nowhere").exists()


def test_a_server_that_is_not_there_is_named_with_the_way_to_start_it(run: Run, indexed: Path) -> None:
    nobody = "http://127.0.0.1:1"
    for done in (
        run("search", "x", "--index", indexed / "ix", base_url=nobody),
        run(*INDEX, indexed, base_url=nobody),
    ):
        assert (done.exit_code, done.stdout) == (1, "")
        assert done.stderr.startswith(f"error: no server answers at {nobody}")
        assert "make serve-retrieval" in done.stderr
        assert done.stderr.count("\n") == 1
    assert not Path("ix").exists()


@pytest.mark.parametrize("kind", ["another dimension", "other weights"])
def test_an_index_of_another_model_is_refused(kind: str, run: Run, wire_server: Server) -> None:
    with EmbeddingsClient(wire_server.base_url, task=TASK) as client:
        probe: NDArray[np.float32] = client.encode_text(PROBE_TEXT)
    Store.open_or_make(Path("ix"), probe[:128] if kind == "another dimension" else np.roll(probe, 1))
    write_pdf("a.pdf", IMAGES[:1])
    for done in (run("search", "x", "--index", "ix"), run(*INDEX, "a.pdf")):
        assert done.exit_code == 2
        assert kind.removeprefix("another ") in done.stderr
        assert done.stderr.startswith("error: the index in ix ")
        assert done.stderr.count("\n") == 1


def test_no_picture_is_drawn_of_a_file_that_has_changed(run: Run) -> None:
    write_pdf("a.pdf", IMAGES[:2])
    assert run(*INDEX, "a.pdf").exit_code == 0
    write_pdf("a.pdf", IMAGES[1:2])
    done = run("search", "x", "--index", "ix", "--picture", "x.png")
    assert done.exit_code == 1
    assert "  a.pdf\n" in done.stdout  # the ranks are right all the same
    assert "a.pdf has changed since it was indexed" in done.stderr
    assert not Path("x.png").exists()


def test_the_commands_of_the_document_run_on_the_samples(run: Run) -> None:
    commands = re.findall(
        r"^\$ \.venv/bin/python examples/document_search (.+)$", (ROOT / "docs/search.md").read_text(), re.MULTILINE
    )
    assert [shlex.split(command)[0] for command in commands] == ["sample", "index", "search"]
    for command in commands:
        done = run(*shlex.split(command))
        assert done.exit_code == 0, done.output
    assert pages_of(Path("document-search/index")) == {"ferries.pdf": [1, 2], "sea-level.pdf": [1, 2]}
    assert Path("document-search/best-page.png").stat().st_size > 10_000
    before = Path("document-search/sample/ferries.pdf").read_bytes()
    assert run("sample").exit_code == 0
    assert Path("document-search/sample/ferries.pdf").read_bytes() == before  # so that it is indexed once
