"""`jina-v4-embed` against a real server: the golden rows come out of the files."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pypdfium2
import pytest
from conftest import Golden
from jina_v4_client.embed import main
from numpy.typing import NDArray
from pdf_files import EMPTY, FILLED, page_with, text_field
from PIL import ExifTags, Image
from pyarrow import parquet
from safetensors.numpy import load_file
from servers import Server
from wire import TASK, TEXTS, assert_near

Embed = Callable[..., None]


@pytest.fixture
def embed(wire_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Embed:
    """Run the command in a folder of its own that holds the golden texts and images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("JINA_V4_API_KEY", raising=False)
    lines = [json.dumps({"name": f"text {i}", "text": text}) + "\n" for i, text in enumerate(TEXTS)]
    Path("corpus.jsonl").write_text("".join(lines))

    def run(*arguments: object) -> None:
        options = ["--base-url", wire_server.base_url, "--task", TASK]
        monkeypatch.setattr(sys, "argv", ["jina-v4-embed", *options, *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0

    return run


def dense(golden: Golden, kind: str, n: int) -> list[NDArray[np.float32]]:
    return [golden.rows[f"{TASK}/{kind}/{i}/dense"] for i in range(n)]


@pytest.mark.parametrize("prompt_name", ["query", "passage"])
def test_texts_give_the_golden_vectors(prompt_name: str, embed: Embed, golden: Golden) -> None:
    options = ["--prompt-name", prompt_name, "--id-column", "name", "--batch-size", 3]
    embed(*options, "corpus.jsonl", "out.parquet")
    table = parquet.read_table("out.parquet")
    assert table["id"].to_pylist() == [f"text {i}" for i in range(len(TEXTS))]
    assert_near(list(np.stack(table["vector"].to_numpy())), dense(golden, prompt_name, len(TEXTS)))


def test_texts_and_images_give_the_golden_multivectors(embed: Embed, golden: Golden) -> None:
    folder = golden.images[0].parent
    embed("--multivector", "corpus.jsonl", folder, "out.safetensors")
    tensors = load_file("out.safetensors")
    found = np.split(tensors["vectors"], tensors["offsets"][1:-1])
    names = [f"passage/{i}" for i in range(len(TEXTS))] + [f"image/{i}" for i in range(len(golden.images))]
    assert_near(found, [golden.rows[f"{TASK}/{name}/multi"] for name in names])


def test_a_folder_of_images_gives_the_golden_vectors(embed: Embed, golden: Golden) -> None:
    shutil.copytree(golden.images[0].parent, "pages")
    embed("pages", "out.npy")
    ids = json.loads(Path("out.npy.ids.json").read_text())
    assert ids == [f"pages/{image.name}" for image in golden.images]
    assert_near(list(np.load("out.npy")), dense(golden, "image", len(golden.images)))


def test_a_page_of_a_pdf_has_the_vector_of_its_picture(embed: Embed, golden: Golden) -> None:
    picture = Image.open(golden.images[1]).convert("RGB")
    with pypdfium2.PdfDocument.new() as document:
        page = document.new_page(picture.width, picture.height)
        image = pypdfium2.PdfImage.new(document)
        image.set_bitmap(pypdfium2.PdfBitmap.from_pil(picture))
        image.set_matrix(pypdfium2.PdfMatrix().scale(picture.width, picture.height))
        page.insert_obj(image)
        page.gen_content()
        document.save("paper.pdf")
    embed("--pdf-scale", 1, "paper.pdf", "out.npy")
    (cosine,) = np.load("out.npy") @ golden.rows[f"{TASK}/image/1/dense"]
    assert cosine > 0.999  # the file holds the pixels; rendering puts them on the page once more


def test_a_form_has_the_vector_of_what_is_filled_in(embed: Embed) -> None:
    Path("blank.pdf").write_bytes(page_with(text_field(), EMPTY))
    Path("filled.pdf").write_bytes(page_with(text_field(b"Marie"), FILLED))
    # The same page with the same letters in the page itself.
    Path("printed.pdf").write_bytes(page_with(b"/Subtype/Stamp/F 4", FILLED, form=None))
    embed("blank.pdf", "filled.pdf", "printed.pdf", "out.npy")
    blank, filled, printed = np.load("out.npy")
    assert blank @ filled < 0.9999
    assert filled @ printed > 0.9999
    assert blank @ printed < 0.9999


def test_frames_and_turned_pictures_have_the_vectors_of_the_stored_pixels(embed: Embed) -> None:
    stored = [Image.effect_mandelbrot((120, 80), (-2, -1, 1, 1), quality).convert("RGB") for quality in (20, 60)]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for name, image in (("0.png", stored[0]), ("1.png", stored[1])):
        image.save(name)
    stored[0].save("turned.png", exif=exif)
    stored[0].save("turned.webp", exif=exif, lossless=True)
    stored[0].save("turned.jpg", exif=exif, quality=95)
    Image.open("turned.jpg").convert("RGB").save("of the jpg.png")
    first, second = (Image.open(name) for name in ("0.png", "1.png"))
    first.save("both.tif", save_all=True, append_images=[second])
    embed("0.png", "1.png", "both.tif", "turned.png", "turned.webp", "of the jpg.png", "turned.jpg", "out.npy")
    first, second, of_jpg = (np.load("out.npy")[i] for i in (0, 1, 6))
    assert first @ second < 0.999
    assert_near(list(np.load("out.npy")), [first, second, first, second, first, first, of_jpg, of_jpg])
