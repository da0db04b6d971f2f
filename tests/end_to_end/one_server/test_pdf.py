"""PDF items: the vectors of their pages are those of the pages as images, in every form of a reply."""

import asyncio
import base64
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from image_files import written
from jina_v4_client import ArgumentError, AsyncEmbeddingsClient, EmbeddingsClient, ServerRefusedError
from jina_v4_client.embed.pages import open_pdf, render_page
from pdf_files import FILLED, SHOWN, blank, book, encrypted, page_with, text_field, with_broken_references
from safetensors.numpy import load
from servers import Server, gateway_server
from wire import MAX_PDF_PAGES, SAFETENSORS, TASK, TEXTS, Wire, array, assert_near, opened_site

URI = "data:application/pdf;base64,"
BOOK = book(3)
FORM = page_with(text_field(b"Marie"), FILLED)
FILES = {"three pages": BOOK, "a form": FORM, "A4": blank(595, 842), "a stamp": SHOWN["a stamp"][1]}


def as_base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def as_images(content: bytes) -> list[dict[str, str]]:
    """Render the pages as the client does, to images that hold the very pixels."""
    with open_pdf(content) as document:
        pages = [render_page(document, index, 2.0) for index in range(len(document))]
    return [{"image": as_base64(written(page))} for page in pages]


@pytest.mark.parametrize("content", FILES.values(), ids=FILES.keys())
def test_the_vectors_are_those_of_the_pages_as_images(content: bytes, wire: Wire) -> None:
    for fields in ({}, {"dimensions": 128}, {"return_multivector": True}, {"max_pixels": 50_000}):
        found = wire.ask({"input": [{"pdf": as_base64(content)}], **fields})
        expected = wire.ask({"input": as_images(content), **fields})
        assert found["usage"] == expected["usage"]
        name = "embeddings" if "return_multivector" in fields else "embedding"
        assert_near(*([array(entry[name]) for entry in reply["data"]] for reply in (found, expected)))


def test_an_entry_says_its_item_and_its_page(wire: Wire) -> None:
    body: dict[str, Any] = {
        "input": [TEXTS[0], {"pdf": URI + as_base64(BOOK), "pages": "2-"}, *as_images(FORM), {"pdf": as_base64(FORM)}],
        "dimensions": 128,
    }
    answer = wire.post(body)
    assert answer.headers["x-jina-v4-prompt"] == "query, image"
    entries = answer.json()["data"]
    places = [{name: entry[name] for name in entry.keys() - {"embedding", "object"}} for entry in entries]
    assert places == [
        {"index": 0, "item": 0},
        {"index": 1, "item": 1, "page": 2, "n_pages": 3},
        {"index": 2, "item": 1, "page": 3, "n_pages": 3},
        {"index": 3, "item": 2},
        {"index": 4, "item": 3, "page": 1, "n_pages": 1},
    ]
    assert_near([array(entries[4]["embedding"])], [array(entries[3]["embedding"])])
    pages = wire.ask({"input": as_images(BOOK), "dimensions": 128})["data"]
    assert_near([array(entry["embedding"]) for entry in entries[1:3]], [array(pages[i]["embedding"]) for i in (1, 2)])
    tensors = load(wire.post({**body, "outputs": ["dense", "multivector"]}, accept=SAFETENSORS).content)
    assert tensors["items"].tolist() == [0, 1, 1, 2, 3]
    assert tensors["pages"].tolist() == [0, 2, 3, 0, 1]
    assert tensors["n_pages"].tolist() == [0, 3, 3, 0, 1]
    assert len(tensors["offsets"]) == 6
    assert_near(list(tensors["dense"]), [array(entry["embedding"]) for entry in entries])


RANGES = {"1": [1], "1-2": [1, 2], "2-": [2, 3], "1,3": [1, 3], "1-1, 3-": [1, 3], "2-9": [2, 3], None: [1, 2, 3]}


@pytest.mark.parametrize("pages", RANGES)
def test_pages_are_chosen_by_ranges(pages: str | None, wire: Wire) -> None:
    reply = wire.ask({"input": {"pdf": as_base64(BOOK), "pages": pages}, "embedding_type": "base64"})
    assert [entry["page"] for entry in reply["data"]] == RANGES[pages]


def test_a_request_without_pdf_has_no_items(wire: Wire) -> None:
    assert wire.ask({"input": ["x"]})["data"][0].keys() == {"object", "index", "embedding"}
    assert load(wire.post({"input": ["x"]}, accept=SAFETENSORS).content).keys() == {"dense"}


def test_a_url_and_a_file_with_a_broken_table_are_read(wire: Wire) -> None:
    (expected,) = wire.ask({"input": {"pdf": as_base64(FORM)}})["data"]
    broken = with_broken_references(FORM)
    with opened_site({"report.pdf": FORM}) as site:
        items = [
            {"pdf": f"{site.url}/report.pdf"},
            {"pdf": as_base64(broken)},
            {"pdf": base64.encodebytes(FORM).decode()},
        ]
        found = wire.ask({"input": items})["data"]
    assert [entry["item"] for entry in found] == [0, 1, 2]
    assert_near([array(entry["embedding"]) for entry in found], [array(expected["embedding"])] * 3)


def test_the_curl_command_of_the_page_gives_vectors(
    wire: Wire, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("report.pdf").write_bytes(BOOK)
    page = (Path(__file__).parents[3] / "docs" / "serve.md").read_text()
    (command,) = re.findall(r"^\$ (printf .*pdf.*\n.*)\n```", page, re.MULTILINE)
    local = command.replace("http://127.0.0.1:8001", wire.base_url)
    done = subprocess.run(["bash", "-c", local], capture_output=True, text=True, check=True)
    assert [entry["page"] for entry in json.loads(done.stdout)["data"]] == [1, 2]


def test_a_library_of_openai_reads_the_reply(wire: Wire) -> None:
    with openai.OpenAI(base_url=f"{wire.base_url}/v1", api_key="none") as client:
        items: Any = [{"pdf": as_base64(BOOK)}]
        reply = client.embeddings.create(model="jina-embeddings-v4", input=items)
    assert [entry.index for entry in reply.data] == [0, 1, 2]
    assert [entry.model_extra for entry in reply.data] == [{"item": 0, "page": i, "n_pages": 3} for i in (1, 2, 3)]
    assert len(reply.data[0].embedding) == 256


def clients_of(wire: Wire, **options: Any) -> EmbeddingsClient:
    return EmbeddingsClient(base_url=wire.base_url, task=TASK, **options)


@pytest.mark.parametrize("wire_format", ["safetensors", "base64", "float"])
def test_the_client_gives_vectors_by_file_and_page(wire_format: Any, wire: Wire, tmp_path: Path) -> None:
    (tmp_path / "book.pdf").write_bytes(BOOK)
    pages = [base64.b64decode(item["image"]) for item in [*as_images(BOOK), *as_images(FORM)]]
    done: list[tuple[int, int]] = []
    with clients_of(wire, wire_format=wire_format) as client:
        for multi in (False, True):
            options: dict[str, Any] = {"return_multivector": multi, "max_pixels": 100_000}
            expected = client.encode_image(pages, **options)
            found = client.encode_pdf(
                [tmp_path / "book.pdf", FORM], batch_size=2, progress=lambda *at: done.append(at), **options
            )
            assert [list(file) for file in found] == [[1, 2, 3], [1]]
            assert_near([row for file in found for row in file.values()], expected)
        (chosen,) = client.encode_pdf(str(tmp_path / "book.pdf"), pages=[3, 1], truncate_dim=128)
        whole = client.encode_image(pages, truncate_dim=128)
    assert done[-1] == (2, 2)  # the pages behind the first
    assert list(chosen) == [1, 3]
    assert_near([chosen[1], chosen[3]], [whole[0], whole[2]])


def test_the_client_for_coroutines_gives_the_same(wire: Wire) -> None:
    async def embed() -> Any:
        async with AsyncEmbeddingsClient(base_url=wire.base_url, task=TASK) as client:
            return await asyncio.gather(client.encode_pdf(BOOK), client.encode_pdf([BOOK, FORM], pages=[1]))

    whole, firsts = asyncio.run(embed())
    with clients_of(wire) as client:
        assert_near(list(whole[0].values()), list(client.encode_pdf(BOOK)[0].values()))
    assert [list(file) for file in firsts] == [[1], [1]]
    assert_near([firsts[0][1]], [whole[0][1]])


def test_more_pages_than_a_request_may_have_go_into_several(wire: Wire) -> None:
    with clients_of(wire) as client:
        (found,) = client.encode_pdf(book(MAX_PDF_PAGES + 5), batch_size=30, max_pixels=3136)
    assert list(found) == list(range(1, MAX_PDF_PAGES + 6))


REFUSED: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "no file": ([], {}, ArgumentError, "files is empty"),
    "a file that is not there": ("nothing.pdf", {}, ArgumentError, "'nothing.pdf' cannot be read"),
    "a number": (5, {}, ArgumentError, "files must be one item or a list of items, not int"),
    "a number among files": ([BOOK, 5], {}, ArgumentError, "cannot be read"),
    "page 0": (BOOK, {"pages": [0]}, ArgumentError, "pages=0 is not allowed"),
    "no pages": (BOOK, {"pages": []}, ArgumentError, "pages is empty"),
    "a page behind the last": (BOOK, {"pages": [2, 9]}, ServerRefusedError, "page 9; the last page is 3 (633 bytes)"),
    "no PDF file": ([BOOK, b"text"], {}, ServerRefusedError, "is not a PDF file (4 bytes)"),
    "a password": (encrypted(b"secret"), {}, ServerRefusedError, "needs a password"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_client_names_what_is_wrong(name: str, wire: Wire) -> None:
    files, options, kind, message = REFUSED[name]
    with clients_of(wire) as client, pytest.raises(kind) as caught:
        client.encode_pdf(files, **options)
    assert message.replace("633", str(len(BOOK))) in str(caught.value).replace("(input[0].pages)", "")


def n_images(wire: Wire, name: str) -> float:
    page = wire.http.get("/metrics").text
    found = re.findall(rf'^{name}{{(?=[^}}]*kind="image")(?![^}}]*outcome="(?!ok))[^}}]*}} (\S+)', page, re.MULTILINE)
    return sum(map(float, found))


def test_pages_are_counted_as_images(wire: Wire) -> None:
    names = ("jina_v4_items_total", "jina_v4_tokens_total")
    before = [n_images(wire, name) for name in names]
    n_tokens = wire.ask({"input": [{"pdf": as_base64(BOOK)}]})["usage"]["total_tokens"]
    assert [n_images(wire, name) for name in names] == [before[0] + 3, before[1] + n_tokens]


def test_the_gateway_passes_it_through(wire_server: Server, wire: Wire, tmp_path: Path) -> None:
    body = {"input": [{"pdf": as_base64(BOOK), "pages": "2-3"}], "task": TASK}
    with gateway_server({TASK: wire_server.base_url}, tmp_path / "log") as gateway:
        with EmbeddingsClient(base_url=gateway.base_url, task=TASK) as client:
            assert [list(file) for file in client.encode_pdf([FORM, BOOK])] == [[1], [1, 2, 3]]
        answer = httpx2.post(f"{gateway.base_url}/v1/embeddings", json=body, timeout=60, trust_env=False)
    assert answer.status_code == 200, answer.text
    assert [(entry["item"], entry["page"]) for entry in answer.json()["data"]] == [(0, 2), (0, 3)]
    assert_near(*([array(entry["embedding"]) for entry in reply["data"]] for reply in (answer.json(), wire.ask(body))))
