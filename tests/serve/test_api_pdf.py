"""PDF items without an engine: the same pixels as the client's, hostile files, page ranges, and what a child may do."""

import asyncio
import base64
import json
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pdf_files
import psutil
import pytest
from image_files import plain
from jina_v4_client.embed.pages import open_pdf, render_page
from jina_v4_serve.api import pdf, pdf_render
from jina_v4_serve.api.door import Door
from jina_v4_serve.api.errors import ApiError
from jina_v4_serve.api.images import DECODED_IMAGES, ImageLoader
from jina_v4_serve.api.pdf import PdfReader
from jina_v4_serve.api.prompts import OpenImage, Prompt
from jina_v4_serve.api.record import Record, recording
from jina_v4_serve.api.request import EmbedRequest, Item, Limits
from jina_v4_serve.api.service import Service
from jina_v4_serve.api.vectors import Vectors
from jina_v4_serve.checkpoint import Prompts
from jina_v4_serve.settings import Settings
from pdf_files import SHOWN, blank, book, encrypted
from PIL import Image

USUAL = Settings()
GENEROUS_S = 120  # for what ends as soon as it can, on a busy machine


def item(content: bytes, path: str = "input.pdf", **fields: object) -> Item:
    return Item(pdf=base64.b64encode(content).decode(), path=path, **fields)  # type: ignore[arg-type]


async def rendered(items: Sequence[Item], settings: Settings = USUAL) -> list[Image.Image]:
    async with PdfReader(settings).opened(items) as pages:
        return await pages.pictures()


def pictures(*contents: bytes, settings: Settings = USUAL) -> list[Image.Image]:
    items = [item(content, f"input[{i}].pdf") for i, content in enumerate(contents)]
    return asyncio.run(rendered(items, settings))


def clients(content: bytes, index: int = 0) -> Image.Image:
    with open_pdf(content) as document:
        return render_page(document, index, 2.0)


FILES = {
    **{f"{name}, {state}": both[i] for name, both in SHOWN.items() for i, state in enumerate(("empty", "filled"))},
    "A4": blank(595.276, 841.89),
    "a page at the limit of a server": blank(3990, 3990),
    "a page over it": blank(14400, 14400),
    "an empty password": encrypted(b""),
    "broken references": pdf_files.with_broken_references(SHOWN["a box"][1]),
}


@pytest.mark.proof
def test_the_pixels_are_those_of_the_client() -> None:
    found = pictures(*FILES.values())
    for name, picture in zip(FILES, found, strict=True):
        expected = clients(FILES[name])
        assert picture.mode == "RGB"
        assert picture.size == expected.size, name
        assert picture.tobytes() == expected.tobytes(), name


@pytest.mark.proof
def test_a_page_whose_file_would_be_too_large_is_rendered_as_by_the_client() -> None:
    """Noise does not compress: 60 million bytes of it are more than a server takes as a PNG file."""
    noise = np.random.default_rng(1).integers(0, 256, (2000, 3500, 3), dtype=np.uint8).tobytes()
    facts = b"/Type/XObject/Subtype/Image/Width 3500/Height 2000/BitsPerComponent 8/ColorSpace/DeviceRGB"
    content = pdf_files.drawing(
        pdf_files.stream(b"1750 0 0 1000 0 0 cm /I Do"), b"/XObject<</I 5 0 R>>", [pdf_files.stream(noise, facts)]
    ).replace(b"[0 0 200 100]", b"[0 0 1750 1000]")
    (picture,), expected = pictures(content), clients(content)
    assert picture.width * picture.height < 3500 * 2000
    assert (picture.size, picture.tobytes()) == (expected.size, expected.tobytes())


def test_every_page_says_where_it_comes_from() -> None:
    items = [
        Item(text="a"),
        item(book(3), "input[1].pdf"),
        item(book(5), "input[2].pdf", pages=((2, 3), (5, None))),
        item(book(2), "input[3].pdf", pages=((2, 9),)),
    ]

    async def open_them() -> tuple[list[tuple[int, int | None, int | None]], list[int]]:
        async with PdfReader(USUAL).opened(items) as pages:
            origins = [(origin.item, origin.page, origin.n_pages) for origin in pages.origins]
            return origins, [picture.width for picture in await pages.pictures()]

    origins, widths = asyncio.run(open_them())
    assert origins == [(1, 1, 3), (1, 2, 3), (1, 3, 3), (2, 2, 5), (2, 3, 5), (2, 5, 5), (3, 2, 2)]
    assert widths == [2 * (100 + page) for _, page, _ in origins if page is not None]


def test_without_pdf_no_process_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)
    assert asyncio.run(rendered([Item(text="a"), Item(image="b")])) == []


SMALL = Settings(pdf_timeout_s=3, pdf_memory_bytes=2**30, max_pdf_bytes=2**21)


@dataclass(frozen=True)
class Bad:
    """A bad file, and what is said of it."""

    content: bytes
    message: str
    code: str = "VALIDATION_ERROR"
    pages: tuple[tuple[int, int | None], ...] = ((1, None),)
    param: str = "input[1].pdf"


WHOLE = book(3)
BAD = {
    "no PDF": Bad(b"\x89PNG\r\n\x1a\n", "input[1].pdf is not a PDF file"),
    "nothing": Bad(b"", "is not a PDF file"),
    "a head alone": Bad(b"%PDF-1.7\n", "is a broken PDF file, or has no pages"),
    "no pages": Bad(pdf_files.NO_PAGES, "is a broken PDF file, or has no pages"),
    "no catalogue": Bad(pdf_files.NO_CATALOGUE, "is a broken PDF file, or has no pages"),
    "cut off": Bad(WHOLE[:60], "is a broken PDF file, or has no pages"),
    "a password": Bad(encrypted(b"secret"), "is encrypted and needs a password"),
    "a page that is none": Bad(pdf_files.ONE_BAD, "has a page 2 that cannot be rendered"),
    "a page less than a pixel": Bad(blank(0.2, 0.2), "less than a pixel"),
    "a page that is too thin": Bad(blank(90_000, 10), "the model takes aspect ratios up to 200"),
    "10,000 pages": Bad(book(10_000), "10000 pages are requested, and 1 of earlier files; at most 100 go into"),
    "a million pages that are not there": Bad(
        WHOLE.replace(b"/Count 3", b"/Count 1000000"), "1000000 pages are requested, and 1 of earlier files"
    ),
    "a page that is not there": Bad(
        WHOLE.replace(b"/Count 3", b"/Count 9"), "has a page 5 that cannot be rendered", pages=((5, 5),)
    ),
    "pages behind the last": Bad(
        WHOLE, "begins a range at page 4; the last page is 3", pages=((4, 5),), param="input[1].pages"
    ),
    "a spin": Bad(pdf_files.spinning(), "takes over 3 s of processor time", "PDF_TOO_COSTLY"),
    "a crash": Bad(pdf_files.crashing(), "the PDF renderer crashed on this file", "PDF_CRASHED"),
    "a page that needs more memory": Bad(blank(3999, 3999), "over 268435456 bytes of memory", "PDF_TOO_COSTLY"),
    "a large file": Bad(bytes(2**21 + 1), "the file is over the limit of 2097152 bytes"),
}


@pytest.mark.proof
@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_named_and_its_process_ends(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    started = started_children(monkeypatch)
    bad = BAD[name]
    memory = 2**28 if "memory" in name else 2**30
    settings = Settings(pdf_timeout_s=3, pdf_memory_bytes=memory, max_pdf_bytes=2**21)
    items = [item(WHOLE, "input[0].pdf", pages=((1, 1),)), item(bad.content, "input[1].pdf", pages=bad.pages)]
    with pytest.raises(ApiError) as caught:
        asyncio.run(rendered(items, settings))
    error = caught.value
    assert (error.status, error.code, error.param) == (422, bad.code, bad.param), error
    assert bad.message in error.message
    assert bool(started) is (name != "a large file")
    assert all(child.returncode is not None for child in started)


def started_children(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    started: list[subprocess.Popen[bytes]] = []
    real = subprocess.Popen

    def start(*args: object, **options: object) -> subprocess.Popen[bytes]:
        started.append(real(*args, **options))  # type: ignore[call-overload]
        return started[-1]

    monkeypatch.setattr(pdf.subprocess, "Popen", start)
    return started


def test_files_that_are_too_large_together_are_refused() -> None:
    content = WHOLE + b"\n%" + b"x" * 2**20
    with pytest.raises(
        ApiError, match=r"input\[1\].pdf: the PDF files of the request have over 2097152 bytes together"
    ):
        pictures(content, content, settings=SMALL)


def test_pages_that_are_too_large_together_are_refused() -> None:
    large = Settings(max_image_pixels=2**20, max_pdf_pages=2)
    assert [picture.size for picture in pictures(blank(1400, 1400), settings=large)] == [(2800, 2800)]
    with pytest.raises(ApiError, match="with page 1 the pages are too large together") as caught:
        pictures(blank(1400, 1400), blank(1400, 1400), settings=large)
    assert caught.value.param == "input[1].pdf"


def test_pages_of_several_files_count_together() -> None:
    assert len(pictures(book(60), book(40))) == 100
    with pytest.raises(ApiError, match="41 pages are requested, and 60 of earlier files; at most 100"):
        pictures(book(60), book(41))


def test_a_request_that_is_given_up_ends_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    started = started_children(monkeypatch)

    async def give_up() -> None:
        work = asyncio.create_task(rendered([item(pdf_files.spinning())], Settings(pdf_timeout_s=GENEROUS_S)))
        while not started:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.5)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work

    begin = time.monotonic()
    asyncio.run(give_up())
    assert time.monotonic() - begin < GENEROUS_S
    assert [child.returncode for child in started] == [-9]


def test_a_machine_that_is_too_busy_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pdf, "_BUSY_S", 1 - GENEROUS_S)
    with pytest.raises(ApiError, match="this machine is too busy") as caught:
        pictures(pdf_files.spinning(), settings=Settings(pdf_timeout_s=GENEROUS_S))
    assert (caught.value.status, caught.value.retry_after_s) == (503, 30)


def test_only_so_many_wait_and_each_gets_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pdf, "_MOST_WAITING", 3)
    reader = PdfReader(USUAL)

    async def ask(width: int) -> int:
        async with reader.opened([item(blank(width, 100))]) as pages:
            return (await pages.pictures())[0].width

    async def flood() -> list[int | BaseException]:
        return await asyncio.gather(*(ask(100 + i) for i in range(8)), return_exceptions=True)

    found = asyncio.run(flood())
    refused = [error for error in found if isinstance(error, ApiError)]
    assert [(error.status, error.code) for error in refused] == [(429, "OVERLOADED")] * 5
    assert [width for width in found if isinstance(width, int)] == [200 + 2 * i for i in range(3)]
    assert asyncio.run(ask(300)) == 600


def test_a_child_knows_no_key_and_writes_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JINA_V4_API_KEY", "secret")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    seen = tmp_path / "seen"
    seen.touch()
    (tmp_path / "sitecustomize.py").write_text(  # runs before the program
        f"import json, os\nwith open({str(seen)!r}, 'w') as file:\n    json.dump(dict(os.environ), file)\n"
    )
    assert len(pictures(WHOLE)) == 3
    environment = json.loads(seen.read_text())
    assert "JINA_V4_API_KEY" not in environment
    assert set(environment) <= {*pdf._ENVIRONMENT, "LC_CTYPE"}
    program = (
        f"from {pdf_render.__name__} import limit\nlimit(2**30, 60)\n"
        f"with open({str(seen)!r}, 'w') as file:\n    file.write('x')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "File too large" in done.stderr
    assert seen.read_text() == ""


def test_the_program_imports_nothing_of_the_server() -> None:
    program = f"import sys, {pdf_render.__name__}; print([name for name in sys.modules if name.startswith('jina')])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['jina_v4_serve', 'jina_v4_serve.api', 'jina_v4_serve.api.pdf_render']"


class FakeEngine:
    """Returns a vector for each prompt, and notes what the budget held meanwhile."""

    dead = False
    n_waiting = 0

    def __init__(self) -> None:
        self.service: Any = None
        self.in_flight: list[int] = []
        self.pictures: list[weakref.ref[Image.Image]] = []
        self.most_pictures = 0

    async def embed(self, prompts: Sequence[Prompt], request_id: str, *_: object, **__: object) -> list[Vectors]:
        assert request_id == "id"
        self.in_flight.append(self.service.budget.in_flight)

        async def width(prompt: Prompt) -> int:
            if prompt.image is None:
                return 0
            async with prompt.image() as picture:
                self.pictures.append(weakref.ref(picture))
                alive = [each for each in self.pictures if each() is not None]
                self.most_pictures = max(self.most_pictures, len(alive))
                await asyncio.sleep(0.02)
                return picture.width

        sizes = await asyncio.gather(*map(width, prompts))
        return [Vectors(np.full((1, 8), size, np.float32), np.empty((0, 128), np.float32), 5) for size in sizes]


def make_service(budget: int) -> tuple[Service, FakeEngine]:
    prompts = {"retrieval": Prompts({"query": "Query: ", "passage": "Passage: "}, "")}
    limits = Limits(("retrieval",), prompts, frozenset(), 1000, 3136, 602_112, 256, 64)
    engine = FakeEngine()
    maker: Any = PagesAlone()
    engine.service = Service(engine, limits, Door(USUAL), ImageLoader(USUAL), PdfReader(USUAL), maker, budget)
    return engine.service, engine


class PagesAlone:
    """Makes prompts without a tokenizer."""

    def image(self, image: OpenImage) -> Prompt:
        return Prompt([], image)

    def texts(self, texts: Sequence[str], *_: object) -> list[Prompt]:
        return [Prompt([]) for _ in texts]


def asked(*items: Item) -> EmbedRequest:
    return EmbedRequest("retrieval", "m", items, "query", "")


def test_pages_are_charged_before_they_are_rendered_and_given_back() -> None:
    a_page = 602_112 // 784 + 11
    service, engine = make_service(budget=2 * a_page)
    record = Record("id")
    with recording(record):
        found = asyncio.run(service.embed(asked(Item(text="12345678"), item(book(3))), "id"))
    assert engine.in_flight == [3 * a_page + 4]  # a request may have more than the limit
    assert service.budget.in_flight == 0
    assert [(each.origin.item, each.origin.page, each.dense[0, 0]) for each in found if each.origin] == [
        (0, None, 0),
        (1, 1, 202),
        (1, 2, 204),
        (1, 3, 206),
    ]
    assert (record.n_items["image"], record.n_tokens) == (2, {"text": 5, "image": 15})  # the route counted one already
    with service.budget.spend(a_page + 1), pytest.raises(ApiError) as caught:
        asyncio.run(service.embed(asked(item(book(3))), "id"))
    assert (caught.value.status, caught.value.code) == (429, "OVERLOADED")
    with service.budget.spend(1):
        assert len(asyncio.run(service.embed(asked(item(book(3), pages=((2, 2),))), "id"))) == 1


def test_few_pictures_are_decoded_at_a_time() -> None:
    service, engine = make_service(budget=10**6)
    items = []
    for i in range(40):
        content = plain((100 + i, 100))
        items.append(Item(image=base64.b64encode(content).decode(), path=f"input[{i}].image"))

    async def embed_in_several_requests() -> list[list[Vectors]]:
        return await asyncio.gather(*(service.embed(asked(*items[i : i + 10]), "id") for i in range(0, 40, 10)))

    found = [each.dense[0, 0] for part in asyncio.run(embed_in_several_requests()) for each in part]
    assert found == [100 + i for i in range(40)]
    assert 1 < engine.most_pictures < 2 * DECODED_IMAGES  # a thread may keep one that it has decoded for a moment


def test_no_child_is_left() -> None:
    before = psutil.Process().children()
    pictures(WHOLE)
    assert psutil.Process().children() == before  # one that has ended is listed until it is waited for
