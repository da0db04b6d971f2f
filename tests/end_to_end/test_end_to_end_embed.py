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
from PIL import Image
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
