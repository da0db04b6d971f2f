"""PDF pages of `jina-v4-embed`: what a reader shows is what is rendered, no larger than a server takes."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pypdfium2
import pytest
from embed_command import Embed, embed_with, read, read_errors
from jina_v4_client.embed import pages
from jina_v4_client.embed.errors import RowError
from numpy.typing import NDArray
from pdf_files import EMPTY, FILLED, NO_PAGES, ONE_BAD, SHOWN, XFA, blank, encrypted, page_with, text_field
from PIL import Image


def render(content: bytes, index: int = 0, scale: float = 2.0) -> Image.Image:
    with pages.open_pdf(content) as document:
        return pages.render_page(document, index, scale)


def pixels(content: bytes, index: int = 0, scale: float = 2.0) -> NDArray[np.uint8]:
    return np.asarray(render(content, index, scale))


def as_before(content: bytes, index: int = 0, scale: float = 2.0) -> NDArray[np.uint8]:
    """Render as pdfium does by itself: without what is filled in."""
    with pypdfium2.PdfDocument(content) as document:
        return np.asarray(document[index].render(scale=scale).to_pil().convert("RGB"))


@pytest.mark.parametrize("case", SHOWN)
def test_a_page_is_rendered_as_a_pdf_reader_shows_it(case: str) -> None:
    without, with_it = map(pixels, SHOWN[case])
    assert without.shape == with_it.shape
    assert (without != with_it).any()


@pytest.mark.parametrize("flags", [2, 32], ids=["hidden", "no view"])
def test_a_field_that_a_reader_hides_is_not_rendered(flags: int) -> None:
    hidden = pixels(page_with(text_field(b"Marie", flags), FILLED))
    np.testing.assert_array_equal(hidden, pixels(page_with(text_field(flags=flags), EMPTY)))


@pytest.mark.parametrize(
    ("more", "size"),
    [(b"", (400, 200)), (b"/Rotate 270", (200, 400)), (b"/CropBox[50 0 150 100]", (200, 200))],
    ids=["plain", "turned", "cropped"],
)
@pytest.mark.parametrize("scale", [0.37, 2.0, 3.3])
def test_a_page_without_a_form_is_rendered_as_before(more: bytes, size: tuple[int, int], scale: float) -> None:
    content = page_with(b"/Subtype/Square/F 4/C[1 0 0]", form=None, more=more)
    np.testing.assert_array_equal(pixels(content, scale=scale), as_before(content, scale=scale))
    assert render(content).size == size


@pytest.mark.parametrize(("width", "height"), [(4200, 4200), (14400, 14400), (20000, 1000)])
def test_a_page_larger_than_a_server_takes_is_rendered_smaller(width: int, height: int) -> None:
    picture = render(blank(width, height))
    assert picture.width * picture.height <= 6_990_506  # of three bytes each, so that a PNG file is under 20 MiB
    assert picture.width * picture.height > 6_800_000
    assert picture.width / picture.height == pytest.approx(width / height, rel=2e-3)
    red = (np.asarray(picture) == (255, 0, 0)).all(axis=2)
    assert red.mean() == pytest.approx(0.25, abs=2e-3)


def test_the_largest_page_that_a_server_takes_is_rendered_as_ever() -> None:
    assert render(blank(4000, 4000)).size == (8000, 8000)


def test_a_page_whose_file_would_be_too_large_for_a_server_is_rendered_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    noise, file = np.random.default_rng(1).integers(0, 256, (300, 400, 3), dtype=np.uint8), io.BytesIO()
    with pypdfium2.PdfDocument.new() as document:
        page = document.new_page(400, 300)
        image = pypdfium2.PdfImage.new(document)
        image.set_bitmap(pypdfium2.PdfBitmap.from_pil(Image.fromarray(noise)))
        image.set_matrix(pypdfium2.PdfMatrix().scale(400, 300))
        page.insert_obj(image)
        page.gen_content()
        document.save(file)
    content = file.getvalue()
    assert render(content, scale=1).size == (400, 300)
    monkeypatch.setattr(pages, "_SAFE_PIXELS", 30_000)
    monkeypatch.setattr(pages, "_SERVER_BYTES", 100_000)
    assert render(content, scale=1).size == (200, 150)
    assert render(blank(400, 300), scale=1).size == (400, 300)  # few bytes


@pytest.mark.parametrize(
    ("width", "height", "message"), [(0.2, 0.2, "less than a pixel"), (90000, 10, "aspect ratios above 200")]
)
def test_a_page_that_the_model_does_not_take_is_refused(width: float, height: float, message: str) -> None:
    with pytest.raises(RowError, match=message):
        render(blank(width, height))


def test_a_file_encrypted_with_an_empty_password_is_rendered() -> None:
    red = (pixels(encrypted(b"")) == (255, 0, 0)).all(axis=2)
    assert red.mean() == pytest.approx(0.25)
    with pytest.raises(RowError, match="encrypted: it needs a password"):
        render(encrypted(b"secret"))


@pytest.fixture
def embed(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Embed:
    monkeypatch.chdir(tmp_path)
    server.play_ours()
    return embed_with("--base-url", server.url, "--task", "retrieval", "--max-retries", 0)


def test_what_cannot_be_rendered_is_named_and_the_rest_is_embedded(embed: Embed) -> None:
    # In this order: pdfium remembers the last error, that a password is wrong.
    for name, content in (("enc.pdf", encrypted(b"secret")), ("one bad.pdf", ONE_BAD), ("zero.pdf", NO_PAGES)):
        Path(name).write_bytes(content)
    Path("z.pdf").write_bytes(encrypted(b""))
    assert embed("--on-error", "skip", "enc.pdf", "zero.pdf", "one bad.pdf", "z.pdf", "out.parquet").code == 3
    ids, _ = read(Path("out.parquet"))
    assert ids == ["one bad.pdf#1", "one bad.pdf#3", "z.pdf#1"]
    errors = {error["id"]: error["error"] for error in read_errors("out.parquet")}
    assert list(errors) == ["enc.pdf", "zero.pdf", "one bad.pdf#2"]
    assert "it needs a password" in errors["enc.pdf"]
    assert "a broken PDF file, or one without pages" in errors["zero.pdf"]
    assert "the page cannot be rendered" in errors["one bad.pdf#2"]


def test_a_form_that_a_program_in_it_draws_is_said_not_to_be_shown(embed: Embed) -> None:
    form = page_with(text_field(b"Marie"), FILLED, form=XFA)
    Path("static.pdf").write_bytes(form)
    Path("dynamic.pdf").write_bytes(form.replace(b"/Type/Catalog", b"/NeedsRendering true/Type/Catalog"))
    ran = embed("static.pdf", "dynamic.pdf", "out.parquet")
    assert ran.code == 0
    (note,) = [line for line in ran.stderr.splitlines() if line.startswith("note: ")]
    assert note.startswith("note: 1 row: an XFA form: ")
    assert note.endswith(": dynamic.pdf#1")
