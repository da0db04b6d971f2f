"""The search example's page in a real Chromium, before a server that is played: its model knows red, green and blue.

So it is known which page must be first, and where on it a word's map must be highest. That the page finds what the
command finds on a real server is in end_to_end/one_server/test_document_search.py.
"""

import contextlib
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from colour_server import N_BEFORE, N_BEHIND, ColourServer, dense, image_rows, text_rows
from jina_v4_client.embed.errors import RowError
from jina_v4_client.embed.pages import render_page
from jina_v4_client.scoring import cosine, image_grid, maxsim
from pdf_files import ONE_BAD, book, pdf
from PIL import Image, ImageDraw
from playwright.sync_api import Browser, BrowserContext, Locator, Page, Route, expect, sync_playwright
from servers import PATIENCE_S, Server, free_port, started, wait_until
from typer.testing import CliRunner

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "examples"))

from document_search import documents  # noqa: E402 - found by the path above
from document_search.cli import app as command  # noqa: E402 - found by the path above
from document_search.page.errors import PageError  # noqa: E402 - found by the path above
from document_search.page.uploads import Uploads  # noqa: E402 - found by the path above
from document_search.store import Store  # noqa: E402 - found by the path above

FETCHED = ROOT / ".chromium"
PROGRAM = "chromium-headless-shell"
WIDTHS = (360, 768, 1280)
SIZE = (560, 784)  # 20 columns and 28 rows of patches
WAIT_MS = 1000 * PATIENCE_S

Square = tuple[int, int, int, int]
# Where on a page its colour is, in pixels; pages are grey elsewhere.
PAGES: dict[str, list[tuple[str, Square]]] = {
    "squares.pdf": [
        ("red", (28, 28, 168, 168)),
        ("green", (392, 28, 532, 168)),
        ("blue", (28, 588, 168, 728)),
    ],
    "wide.pdf": [("blue", (0, 0, 560, 560))],
}


def claiming(n_pages: int, others: bytes = b"") -> bytes:
    """A PDF file of one page that says it has more; the others are as in ONE_BAD, or not there."""
    return pdf(
        [
            b"<</Type/Catalog/Pages 2 0 R>>",
            b"<</Type/Pages/Kids[3 0 R %s]/Count %d>>" % (others, n_pages),
            b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 100 100]>>",
            b"(not a page)",
        ]
    )


TWELVE_BAD = claiming(13, b"4 0 R " * 12)


def draw(colour: str, square: Square) -> Image.Image:
    page = Image.new("RGB", SIZE, "#dddddd")
    ImageDraw.Draw(page).rectangle(square, fill={"green": "#00ff00"}.get(colour, colour))
    return page


def as_file(kind: str, first: Image.Image, *others: Image.Image) -> bytes:
    file = io.BytesIO()
    options: dict[str, Any] = {"save_all": True, "append_images": others, "resolution": 144} if kind == "PDF" else {}
    first.save(file, kind, **options)
    return file.getvalue()


def files() -> dict[str, bytes]:
    return {name: as_file("PDF", *(draw(*page) for page in pages)) for name, pages in PAGES.items()}


@contextlib.contextmanager
def page_server(base_url: str, folder: Path) -> Iterator[Server]:
    port = free_port()
    options = {"port": port, "base-url": base_url, "index": folder / "index", "uploads": folder / "uploads"}
    command = [sys.executable, str(ROOT / "examples/document_search"), "page"]
    command += [f"--{name}={value}" for name, value in options.items()]
    with started(command, port, folder / "log") as server:
        server.wait_until_said("open http")
        yield server


@pytest.fixture(scope="module")
def colours() -> Iterator[ColourServer]:
    server = ColourServer()
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def app(colours: ColourServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with page_server(colours.url, tmp_path_factory.mktemp("page")) as server:
        yield server


@pytest.fixture(scope="module")
def http(app: Server) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=app.base_url, timeout=PATIENCE_S, trust_env=False) as client:
        yield client


def wait_until_indexed(http: httpx2.Client) -> list[dict[str, Any]]:
    def jobs() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = http.get("/api/files").json()
        return found

    wait_until(lambda: all(job["state"] not in ("waiting", "indexing") for job in jobs()), jobs)
    return jobs()


@pytest.fixture(scope="module")
def indexed(http: httpx2.Client) -> None:
    """The pages of PAGES are in the index."""
    for name, content in files().items():
        assert http.post("/api/files", params={"name": name}, content=content).status_code == 202
    wait_until_indexed(http)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = next(iter(FETCHED.glob(f"usr/lib/*/{PROGRAM}")), None)
    libraries = {str(library.parent) for library in FETCHED.rglob("*.so*")}
    if program is None:
        installed = shutil.which(PROGRAM)
        if installed is None:
            pytest.skip("there is no Chromium here; `make .chromium` fetches Debian's")
        program = Path(installed)
    path = os.pathsep.join([*sorted(libraries), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])])
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=program, env={**os.environ, "LD_LIBRARY_PATH": path})
        yield found
        found.close()


Open = Callable[..., Page]


@pytest.fixture
def open_page(browser: Browser, app: Server) -> Iterator[Open]:
    """Open the page; afterwards nothing may have gone wrong in its script, or been asked of another host."""
    contexts: list[BrowserContext] = []
    errors: list[str] = []
    hosts: set[str] = set()

    def opened(url: str = app.base_url, **options: Any) -> Page:
        contexts.append(browser.new_context(**options))
        contexts[-1].set_default_timeout(WAIT_MS)
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        # A refusal is shown on the page, and the browser notes its status beside.
        page.on("console", lambda line: None if "Failed to load" in line.text else errors.append(line.text))
        page.on("request", lambda request: hosts.add(urllib.parse.urlsplit(request.url).netloc))
        page.goto(url)
        return page

    expect.set_options(timeout=WAIT_MS)
    yield opened
    for context in contexts:
        context.close()
    assert not errors
    assert hosts - {"", urllib.parse.urlsplit(app.base_url).netloc} == set()


def search(page: Page, text: str) -> Locator:
    """Search, and return the cards of the pages that were found."""
    page.get_by_label("What to look for").fill(text)
    page.get_by_role("button", name="Search", exact=True).click()
    expect(page.locator("#summary")).to_have_text(re.compile(rf"^\d+ pages for “{text}”$"))
    return page.locator("#results button")


def drop(page: Page, selector: str, name: str, content: bytes, kind: str) -> None:
    """Drop a file onto an element, as a hand would."""
    transfer = page.evaluate_handle(
        """([name, bytes, type]) => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(bytes)], name, { type }));
            return transfer;
        }""",
        [name, list(content), kind],
    )
    for event in ("dragenter", "dragover", "drop"):
        page.dispatch_event(selector, event, {"dataTransfer": transfer})


def best_patch(page: Page) -> tuple[int, int]:
    """The row and column of the patch that the overlay colours most."""
    row, column = page.locator("#overlay").evaluate(
        """(canvas) => {
            const { data, width } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
            let best = 0;
            for (let i = 0; i < data.length / 4; i++) if (data[4 * i + 3] > data[4 * best + 3]) best = i;
            return [Math.floor(best / width), best % width];
        }"""
    )
    return int(row), int(column)


def is_within(patch: tuple[int, int], square: Square) -> bool:
    left, top, right, bottom = (side / 28 for side in square)
    return top <= patch[0] < bottom and left <= patch[1] < right


def shown(cards: Locator) -> list[tuple[str, int]]:
    """The file and page of each card."""
    places = []
    for card in cards.all():
        number = re.search(r"\d+", card.locator(".number").inner_text())
        assert number is not None
        places.append((card.locator(".name").inner_text(), int(number[0])))
    return places


def test_dropped_files_are_indexed_with_a_bar_and_bad_ones_say_why(
    open_page: Open, colours: ColourServer, http: httpx2.Client
) -> None:
    page = open_page()
    jobs = page.get_by_role("list", name="Files that were added").get_by_role("listitem")
    grey = Image.new("RGB", SIZE, "#bbbbbb")
    colours.hold_images()
    try:
        drop(page, "#drop", "../../eight pages.pdf", as_file("PDF", *[grey] * 8), "application/pdf")
        bar = jobs.filter(has_text="eight pages.pdf").get_by_role("progressbar")
        expect(bar).to_have_js_property("max", 8)
        expect(bar).to_have_js_property("value", 0)
        colours.passing.release()  # one of two requests, of four pages each
        expect(bar).to_have_js_property("value", 4)
    finally:
        colours.release()
    expect(jobs.filter(has_text="eight pages.pdf")).to_contain_text("8 pages indexed")
    page.get_by_label("Choose files").set_input_files(
        [
            {"name": "one bad.pdf", "mimeType": "application/pdf", "buffer": ONE_BAD},
            {"name": "twelve bad.pdf", "mimeType": "application/pdf", "buffer": TWELVE_BAD},
            {"name": "half.pdf", "mimeType": "application/pdf", "buffer": ONE_BAD[:100]},
            {"name": "half.png", "mimeType": "image/png", "buffer": as_file("PNG", grey)[:200]},
            {"name": "note.txt", "mimeType": "text/plain", "buffer": b"a note"},
            {"name": "empty.pdf", "mimeType": "application/pdf", "buffer": b""},
            {"name": "<b>photo</b>.png", "mimeType": "image/png", "buffer": as_file("PNG", grey)},
        ]
    )
    expect(jobs).to_have_count(8)
    for name, line in {
        "one bad.pdf": "2 pages indexed",
        "twelve bad.pdf": "1 page indexed",
        "half.pdf": "a broken PDF file",
        "half.png": "a broken picture",
        "note.txt": "neither a PDF file nor a picture",
        "empty.pdf": "the file is empty",
        "<b>photo</b>.png": "1 page indexed",
    }.items():
        expect(jobs.filter(has_text=name)).to_contain_text(line)
    expect(jobs.filter(has_text="one bad.pdf")).to_contain_text("page 2: the page cannot be rendered")
    # Of many problems the first ten are shown, and the others counted.
    bad = jobs.filter(has_text="twelve bad.pdf").locator(".bad")
    expect(bad).to_have_text(
        [re.compile(f"^page {number}: ") for number in range(2, 12)] + [re.compile("^and 2 more pages$")]
    )
    expect(page.locator("#facts")).to_have_text(re.compile(r"^\d+ pages of \d+ files in the index$"))
    # The same content under another name is the same file.
    drop(page, "#drop", "again.png", as_file("PNG", grey), "image/png")
    expect(jobs.filter(has_text="again.png")).to_contain_text("in the index already")


def test_the_command_names_a_page_that_cannot_be_rendered_in_every_run(colours: ColourServer, tmp_path: Path) -> None:
    (tmp_path / "one bad.pdf").write_bytes(ONE_BAD)
    index = ["index", str(tmp_path), "--index", str(tmp_path / "index"), "--base-url", colours.url]
    for shown in ("2 pages", "unchanged"):
        done = CliRunner().invoke(command, index)
        assert done.exit_code == 1
        assert f"one bad.pdf: {shown}\n" in done.stdout
        assert "one bad.pdf, page 2: the page cannot be rendered" in done.stderr


def test_a_page_that_can_be_rendered_now_is_indexed_by_the_next_run(
    colours: ColourServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "two.pdf").write_bytes(as_file("PDF", *[Image.new("RGB", SIZE, "#bbbbbb")] * 2))
    index = ["index", str(tmp_path), "--index", str(tmp_path / "index"), "--base-url", colours.url]

    def fail_on_page_2(document: Any, place: int, scale: float) -> Image.Image:
        if place == 1:
            raise RowError("the page cannot be rendered")
        return render_page(document, place, scale)

    with monkeypatch.context() as patch:
        patch.setattr(documents, "render_page", fail_on_page_2)
        assert CliRunner().invoke(command, index).exit_code == 1
    done = CliRunner().invoke(command, index)
    assert done.exit_code == 0, done.stderr
    assert "two.pdf: 2 pages\n" in done.stdout


def test_a_file_that_is_dropped_again_names_its_missing_pages_again(http: httpx2.Client) -> None:
    for name in ("bad.pdf", "bad once more.pdf"):
        assert http.post("/api/files", params={"name": name}, content=ONE_BAD).status_code == 202
        job = wait_until_indexed(http)[-1]
        (problem,) = job["problems"]
        assert problem.startswith("page 2: the page cannot be rendered")
    assert job["state"] == "unchanged"


@pytest.mark.usefixtures("indexed")
def test_a_search_ranks_pages_by_either_score(open_page: Open) -> None:
    page = open_page()
    cards = search(page, "red of green")
    query = text_rows("red of green")
    rendered = [(name, i, draw(*drawn)) for name, pages in PAGES.items() for i, drawn in enumerate(pages, 1)]
    rows = [image_rows(picture, 602112) for _, _, picture in rendered]
    scores = {
        "MaxSim": maxsim(query, rows)[0],
        "dense": cosine(dense(query), [dense(part) for part in rows])[0],
    }
    # PDF holds pages as JPEG, so the scores are a little off.
    for order, expected in scores.items():
        page.get_by_label(order).check()
        listed = [place for place in shown(cards) if place[0] in PAGES]
        values = [float(card.locator("dd.chosen").first.inner_text()) for card in cards.all()]
        assert values == sorted(values, reverse=True)
        found = {place: values[i] for i, place in enumerate(shown(cards))}
        for (name, number, _), score in zip(rendered, expected, strict=True):
            assert found[name, number] == pytest.approx(float(score), abs=0.05), order
        assert set(listed[:2]) == {("squares.pdf", 1), ("squares.pdf", 2)}
    for card in cards.all():
        card.scroll_into_view_if_needed()
        expect(card.locator("img")).to_have_js_property("complete", True)
        assert card.locator("img").evaluate("(image) => image.naturalWidth") > 100


@pytest.mark.usefixtures("indexed")
def test_what_an_earlier_search_finds_late_is_not_shown(open_page: Open) -> None:
    page = open_page()
    held: list[Route] = []
    page.route("**/api/search", lambda route: held.append(route), times=1)
    page.get_by_label("What to look for").fill("red")
    page.get_by_role("button", name="Search", exact=True).click()
    expect(page.locator("#summary")).to_have_text(re.compile("Searching for “red”"))
    cards = search(page, "blue")
    first = shown(cards)[0]
    with page.expect_response("**/api/search"):
        held[0].continue_()
    page.wait_for_timeout(100)
    expect(page.locator("#summary")).to_have_text(re.compile("for “blue”"))
    assert shown(cards)[0] == first
    assert page.locator("#search").get_attribute("aria-busy") == "false"


@pytest.mark.usefixtures("indexed")
def test_a_word_that_is_pointed_at_shows_where_it_was_found(open_page: Open) -> None:
    page = open_page()
    search(page, "a blue and red page").first.click()
    viewer = page.get_by_role("dialog")
    words = viewer.get_by_role("toolbar").get_by_role("button")
    expect(words).to_have_text([re.compile(f"^{w}") for w in ("the whole query", "a", "blue", "and", "red", "page")])
    expect(viewer.get_by_role("heading").first).to_have_text(re.compile(r"^(squares|wide)\.pdf, page \d$"))
    place = re.fullmatch(r"(.+), page (\d)", viewer.get_by_role("heading").first.inner_text())
    assert place is not None
    colour, square = PAGES[place[1]][int(place[2]) - 1]
    overlay, other = page.locator("#overlay"), "red" if colour == "blue" else "blue"
    expect(overlay).to_have_attribute("data-word", "the whole query")
    words.filter(has_text=colour).hover()
    expect(overlay).to_have_attribute("data-word", colour)
    assert is_within(best_patch(page), square)
    assert page.locator("#overlay").evaluate("(canvas) => [canvas.height, canvas.width]") == list(
        image_grid(*SIZE, 602112)
    )
    assert float(page.locator("#highest").inner_text()) > 0.8
    words.filter(has_text=other).hover()
    expect(overlay).to_have_attribute("data-word", other)
    assert float(page.locator("#highest").inner_text()) < 0.3
    viewer.get_by_role("heading").first.hover()  # away from the words
    expect(overlay).to_have_attribute("data-word", "the whole query")
    words.filter(has_text=colour).click()
    viewer.get_by_role("heading").first.hover()
    expect(overlay).to_have_attribute("data-word", colour)
    # The overlay is exactly over the page.
    picture, drawn = page.locator("#sheet-picture").bounding_box(), overlay.bounding_box()
    assert picture is not None
    assert drawn is not None
    assert [drawn[side] for side in picture] == pytest.approx([picture[side] for side in picture], abs=2.5)
    viewer.get_by_label("Show the map").uncheck()
    expect(overlay).to_be_hidden()
    # MaxSim is the sum of what its words found, the prefix's part beside it.
    parts = [float(word.locator("small").inner_text()) for word in words.all()]
    assert parts[0] == pytest.approx(float(page.locator("#maxsim").inner_text()), abs=0.01)
    assert 0 < sum(parts[1:]) < parts[0] + 0.05


@pytest.mark.usefixtures("indexed")
def test_a_picture_finds_the_page_that_looks_like_it(open_page: Open) -> None:
    page = open_page()
    picture = as_file("PNG", draw("green", (0, 0, *SIZE)))
    cards = page.locator("#results button")
    drop(page, "#query", "a meadow.png", picture, "image/png")
    expect(page.locator("#summary")).to_have_text(re.compile(r"^\d+ pages for the picture a meadow\.png$"))
    assert shown(cards)[0] == ("squares.pdf", 2)
    cards.first.click()
    expect(page.locator("#overlay")).to_have_attribute("data-word", "the whole query")
    assert is_within(best_patch(page), PAGES["squares.pdf"][1][1])
    page.keyboard.press("Escape")
    page.get_by_label("By picture").set_input_files(
        {"name": "note.txt", "mimeType": "text/plain", "buffer": b"not a picture"}
    )
    expect(page.locator("#problem")).to_contain_text("not an image")
    expect(cards.first).to_be_hidden()


@pytest.mark.usefixtures("indexed")
def test_everything_can_be_done_by_keyboard(open_page: Open) -> None:
    page = open_page(viewport={"width": 1280, "height": 800})
    focused = page.locator(":focus")
    names = []
    for _ in range(2):
        page.keyboard.press("Tab")
        names.append(focused.evaluate("(e) => e.labels?.[0]?.textContent.trim() || e.textContent.trim() || e.id"))
    assert names == ["Choose files", "Add samples"]
    field = page.get_by_label("What to look for")
    field.focus()
    page.keyboard.type("green")
    page.keyboard.press("Enter")
    cards = page.locator("#results button")
    expect(cards.first).to_be_visible()
    while not focused.evaluate("(e) => !!e.closest('#results')"):
        page.keyboard.press("Tab")
    expect(cards.first).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(cards.nth(1)).to_be_focused()
    page.keyboard.press("Home")
    page.keyboard.press("End")
    expect(cards.last).to_be_focused()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowDown")
    below = cards.first.evaluate(
        "(first) => document.activeElement.getBoundingClientRect().top > first.getBoundingClientRect().top"
    )
    assert below
    page.keyboard.press("ArrowUp")
    expect(cards.first).to_be_focused()
    page.keyboard.press("Enter")
    viewer = page.get_by_role("dialog")
    words = viewer.get_by_role("toolbar").get_by_role("button")
    expect(words).to_have_count(2)
    while not focused.evaluate("(e) => !!e.closest('#words')"):
        page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    expect(words.last).to_be_focused()
    expect(page.locator("#overlay")).to_have_attribute("data-word", "green")
    title = viewer.get_by_role("heading").first
    before = title.inner_text()
    viewer.get_by_role("button", name="Next page").focus()
    page.keyboard.press("Enter")
    expect(title).not_to_have_text(before)
    page.keyboard.press("Escape")
    expect(viewer).to_be_hidden()
    expect(cards.nth(1)).to_be_focused()  # of the page that was open


@pytest.mark.usefixtures("indexed")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_fits_every_width_and_follows_the_system_s_colours(
    width: int, scheme: str, open_page: Open, tmp_path: Path
) -> None:
    page = open_page(viewport={"width": width, "height": 800}, color_scheme=scheme, reduced_motion="reduce")
    cards = search(page, "red squares of a page with a rather long query")

    def fits() -> None:
        # Nothing is wider than the window, and no button is cut off.
        assert page.evaluate("() => document.documentElement.scrollWidth") == width
        for button in page.get_by_role("button").all():
            box = button.bounding_box()
            assert box is None or (box["x"] >= 0 and box["x"] + box["width"] <= width), button

    fits()
    cards.first.click()
    expect(page.locator("#words button")).to_have_count(11)
    fits()
    dialog = page.get_by_role("dialog")
    assert dialog.evaluate("(e) => e.scrollWidth <= e.clientWidth")
    # Text is readable: WCAG's contrast of 4.5 to 1, of the ordinary, the soft and the main button's.
    for element in (page.locator("#words button").first, dialog.locator(".hint").first, page.locator(".main")):
        assert element.evaluate(CONTRAST) >= 4.5
    brightness = page.evaluate("() => getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]")
    assert (brightness < 128) == (scheme == "dark")
    page.screenshot(path=tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as picture:
        assert picture.size == (width, 800)


CONTRAST = """(element) => {
    const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
    const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    const light = (colour) => {
        const [r, g, b] = channels(colour).map((c) => linear(c / 255));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    let ground = element;
    while (channels(getComputedStyle(ground).backgroundColor)[3] === 0) ground = ground.parentElement;
    const lights = [getComputedStyle(element).color, getComputedStyle(ground).backgroundColor].map(light);
    return (Math.max(...lights) + 0.05) / (Math.min(...lights) + 0.05);
}"""


@pytest.mark.usefixtures("indexed")
def test_a_server_that_is_away_is_reported_with_what_to_do_until_it_is_back(
    open_page: Open, colours: ColourServer
) -> None:
    page = open_page()
    notice = page.locator("#server")
    expect(page.locator("#facts")).to_contain_text("in the index")
    expect(notice).to_be_hidden()
    with colours.away():
        page.get_by_label("What to look for").fill("red")
        page.keyboard.press("Enter")
        expect(notice).to_contain_text("The embedding server does not answer.")
        expect(notice).to_contain_text("make serve-retrieval")
        expect(notice).to_contain_text(colours.url)
        expect(page.locator("#problem")).to_contain_text("Nothing was searched")
        drop(page, "#drop", "late.png", as_file("PNG", draw("red", (0, 0, 99, 99))), "image/png")
        late = page.locator("#jobs li", has_text="late.png")
        expect(late).to_contain_text("the embedding server does not answer")
        expect(late.get_by_role("button")).to_have_text("Try again")
    # It is back: the page notices, and indexes what it could not.
    expect(notice).to_be_hidden()
    expect(page.locator("#problem")).to_be_hidden()
    expect(late).to_contain_text("1 page indexed")
    assert search(page, "red").count() > 0


@pytest.mark.usefixtures("indexed")
@pytest.mark.parametrize("status", [502, 503, 504])
def test_a_gateway_whose_server_is_away_is_a_server_that_is_away(
    status: int, http: httpx2.Client, colours: ColourServer
) -> None:
    def answer() -> tuple[int, str]:
        reply = http.get("/api/server")
        return reply.status_code, reply.json()["error"]["code"]

    try:
        colours.failing = status
        assert answer() == (503, "SERVER_AWAY")
        colours.failing = 500
        assert answer() == (502, "SERVER")
    finally:
        colours.failing = None
    assert http.get("/api/server").status_code == 200


def test_a_page_of_another_origin_cannot_use_it(http: httpx2.Client, app: Server) -> None:
    def code(**options: Any) -> tuple[int, str]:
        reply = http.post("/api/search", json={"text": "red"}, **options)
        return reply.status_code, reply.json()["error"]["code"] if reply.is_error else ""

    for headers in (
        {"origin": "https://example.com"},
        {"origin": "null"},
        {"origin": app.base_url.replace("http:", "https:")},
        {"origin": "http://127.0.0.1:1"},
        {"sec-fetch-site": "cross-site"},
    ):
        assert code(headers=headers) == (403, "OTHER_ORIGIN"), headers
    assert code(headers={"origin": app.base_url})[0] == 200
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert http.get("/", headers=link).status_code == 200
    assert http.get("/api/index", headers={"host": "example.com"}).status_code == 400
    assert http.get("/", headers={"host": "localhost:80"}).status_code == 200
    page = http.get("/")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert page.headers["cross-origin-resource-policy"] == "same-origin"
    assert not re.search(r"https?://", "".join(http.get(path).text for path in ("/", "/page.js", "/page.css")))


def test_the_page_is_served_to_this_machine_only(app: Server) -> None:
    port = int(app.base_url.rpartition(":")[2])
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    listening = [line[1] for line in lines if line[3] == "0A" and line[1].endswith(f":{port:04X}")]
    assert listening == [f"0100007F:{port:04X}"]


def test_the_name_of_a_file_is_never_a_path(http: httpx2.Client, app: Server) -> None:
    folder = app.log.parent
    name = "../../../evil\n\x1b[31m.png"
    content = as_file("PNG", draw("red", (0, 0, 50, 50)))
    reply = http.post("/api/files", params={"name": name}, content=content)
    assert reply.status_code == 202
    assert reply.json()["name"] == "../../../evil��[31m.png"
    wait_until_indexed(http)
    digest = hashlib.sha256(content).hexdigest()
    assert {path.name for path in (folder / "uploads").glob(f"{digest}*")} == {f"{digest}.png", f"{digest}.name"}
    assert not list(folder.parent.rglob("*evil*"))
    assert http.get(f"/api/pages/{digest}/1/picture?width=200").headers["content-type"] == "image/jpeg"
    for path in (f"/api/pages/{digest}/2/picture?width=200", f"/api/pages/{'0' * 64}/1/picture?width=200", "/page.py"):
        assert http.get(path).status_code == 404
    assert http.get("/api/pages/..%2f..%2fetc/1/picture?width=200").status_code in (404, 422)


def test_a_file_of_too_many_pages_is_refused_when_it_is_dropped(http: httpx2.Client, tmp_path: Path) -> None:
    n_jobs = len(http.get("/api/files").json())
    reply = http.post("/api/files", params={"name": "x.pdf"}, content=claiming(10**6))
    line = (
        "1,000,000 pages; this page takes files of 2,000 pages at most. For longer files, use: make search PDF=FILE.pdf"
    )
    assert (reply.status_code, reply.json()) == (413, {"error": {"code": "TOO_LARGE", "message": line}})
    assert len(http.get("/api/files").json()) == n_jobs
    uploads = Uploads(tmp_path)
    with pytest.raises(PageError, match=r"^2,001 pages"):
        uploads.keep("x.pdf", book(2001))
    assert not list(tmp_path.iterdir())
    assert uploads.keep("x.pdf", book(2000)).n_pages == 2000


def test_of_the_problems_of_a_file_ten_are_kept_and_the_others_counted(http: httpx2.Client) -> None:
    http.post("/api/files", params={"name": "bad.pdf"}, content=TWELVE_BAD + b"\n")
    job = wait_until_indexed(http)[-1]
    assert (job["state"], len(job["problems"]), job["n_more_problems"]) == ("done", 10, 2)


def test_a_picture_whose_first_file_was_deleted_is_shown_when_it_is_dropped_again(
    http: httpx2.Client, app: Server, colours: ColourServer, tmp_path: Path
) -> None:
    first = tmp_path / "first.png"
    content = as_file("PNG", draw("red", (0, 0, 70, 70)))
    first.write_bytes(content)
    command = [sys.executable, str(ROOT / "examples/document_search"), "index", str(first)]
    command += [f"--index={app.log.parent / 'index'}", f"--base-url={colours.url}"]
    subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE_S)
    address = f"/api/pages/{hashlib.sha256(content).hexdigest()}/1/picture?width=200"
    assert http.get(address).status_code == 200
    first.unlink()
    reply = http.get(address)
    assert (reply.status_code, reply.json()["error"]["code"]) == (422, "BAD_FILE")
    http.post("/api/files", params={"name": "again.png"}, content=content)
    assert wait_until_indexed(http)[-1]["state"] == "done"
    assert http.get(address).status_code == 200


BAD = {
    "a picture that is too large": ("/api/search/picture", {"content": bytes(20 * 2**20 + 1)}, 413, "TOO_LARGE"),
    "a file that is too large": ("/api/files?name=x", {"content": bytes(100 * 2**20 + 1)}, 413, "TOO_LARGE"),
    "no content": ("/api/files?name=x", {"content": b""}, 422, "BAD_FILE"),
    "no name": ("/api/files", {"content": b"x"}, 422, "BAD_REQUEST"),
    "an empty query": ("/api/search", {"json": {"text": " "}}, 422, "BAD_QUERY"),
    "a query that is too long": ("/api/search", {"json": {"text": "x" * 2001}}, 422, "BAD_REQUEST"),
    "no JSON": ("/api/search", {"content": b"red"}, 422, "BAD_REQUEST"),
    "a file that did not fail": ("/api/files/12345/retry", {}, 404, "NO_JOB"),
    "no such route": ("/api/nothing", {}, 404, "HTTP"),
}


@pytest.mark.usefixtures("indexed")
@pytest.mark.parametrize(("path", "request_", "status", "code"), BAD.values(), ids=BAD)
def test_a_bad_request_has_one_clear_error(
    path: str, request_: dict[str, Any], status: int, code: str, http: httpx2.Client
) -> None:
    reply = http.post(path, **request_)
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert error["code"] == code
    assert 10 < len(error["message"]) < 200 or code == "HTTP"
    assert "/" not in error["message"]


@pytest.mark.usefixtures("indexed")
def test_a_map_needs_a_search_that_is_known(http: httpx2.Client) -> None:
    found = http.post("/api/search", json={"text": "red"}).json()
    page = found["pages"][0]
    path = f"pages/{page['digest']}/{page['number']}/map"
    found_map = http.get(f"/api/queries/{found['query']}/{path}").json()
    grid = (found_map["rows"], found_map["columns"])
    assert [word["name"] for word in found_map["words"]] == ["the whole query", "red"]
    assert all((len(word["values"]), len(word["values"][0])) == grid for word in found_map["words"])
    unknown = http.get(f"/api/queries/999999/{path}")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "NO_QUERY")
    assert len(image_rows(draw("red", (0, 0, 9, 9)), 602112)) == 20 * 28 + N_BEFORE + N_BEHIND


def test_an_index_of_another_model_and_a_missing_index_are_reported(
    browser: Browser, colours: ColourServer, tmp_path: Path
) -> None:
    with page_server(colours.url, tmp_path) as server:
        context = browser.new_context()
        context.set_default_timeout(WAIT_MS)
        page = context.new_page()
        page.goto(server.base_url)
        expect(page.locator("#facts")).to_have_text("Nothing is indexed yet")
        page.get_by_label("What to look for").fill("red")
        page.keyboard.press("Enter")
        expect(page.locator("#problem")).to_have_text("nothing is indexed yet: add files first")
        Store.open_or_make(tmp_path / "index", np.eye(256, dtype=np.float32)[9])
        page.reload()
        expect(page.locator("#server")).to_contain_text("was made by a model with other weights")
        context.close()


def test_a_port_that_is_taken_is_reported_in_one_line(app: Server, colours: ColourServer, tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "examples/document_search"),
        "page",
        "--port",
        app.base_url.rpartition(":")[2],
    ]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=PATIENCE_S)
    assert ended.returncode == 2
    assert re.fullmatch(r"error: port \d+ cannot be used \(.*\); choose another with --port\n", ended.stderr)
