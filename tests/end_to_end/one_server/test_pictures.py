"""A picture has one vector, whichever way it comes in: that of `Image.open(x).convert("RGB")`, sent as bare pixels.

The ways are the server, the gateway, the client of both kinds, `jina-v4-embed` and the search example; the pictures are
files of cameras, and whatever Pillow writes.
"""

import asyncio
import base64
import contextlib
import io
import json
import sys
import warnings
from collections.abc import Iterable, Iterator
from itertools import islice, product
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pypdfium2
import pytest
from conftest import Figure
from image_files import written
from jina_v4_client import AsyncEmbeddingsClient, EmbeddingsClient, ImageError
from jina_v4_client.embed import main
from near import largest_difference
from PIL import Image, ImageCms, ImageOps, PngImagePlugin
from servers import Server, gateway_server
from typer.testing import CliRunner
from wire import BOUND, MAX_IMAGE_BYTES, TASK, Array, Wire, array, assert_refused, opened_site

ROOT = Path(__file__).parents[3]
sys.path.append(str(ROOT / "examples"))

from document_search import cli  # noqa: E402
from document_search.store import Store  # noqa: E402

# Of pictures with more than 8 bits a pixel the client warns; tests/client has that.
pytestmark = pytest.mark.filterwarnings("ignore:an image of mode:jina_v4_client.ImageWarning")
CLIENT_ONLY = ("HEIF", "TGA")  # read by the client, which sends their pixels as PNG
ORIENTATION = 0x0112  # in EXIF
SIDEWAYS = 6
XMP = "<x:xmpmeta><rdf:Description tiff:Orientation='6' tiff:Orientation=\"6\"/></x:xmpmeta>"


def bare_png(content: bytes) -> bytes:
    """The pixels that the published code sees, as a file with nothing else in it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of transparency that is lost
        rgb = Image.open(io.BytesIO(content)).convert("RGB")
    return written(Image.frombytes("RGB", rgb.size, rgb.tobytes()), "PNG")


def exif(orientation: int = SIDEWAYS) -> Image.Exif:
    found = Image.Exif()
    found[ORIENTATION] = orientation
    return found


def made() -> dict[str, bytes]:
    """Pictures that carry what vLLM, or Pillow, might look at."""
    scene = Image.effect_mandelbrot((120, 80), (-2, -1, 1, 1), 40).convert("RGB")
    text = PngImagePlugin.PngInfo()
    text.add_itxt("XML:com.adobe.xmp", XMP)
    see_through = scene.convert("RGBA")
    see_through.putalpha(90)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    frames = [scene, ImageOps.invert(scene)]
    return {
        "xmp.png": written(scene, "PNG", pnginfo=text),
        "xmp.jpg": written(scene, "JPEG", xmp=XMP.encode()),
        "xmp.webp": written(scene, "WEBP", lossless=True, xmp=XMP.encode()),
        "exif6.tif": written(scene, "TIFF", exif=exif()),
        "exif6.avif": written(scene, "AVIF", exif=exif()),
        "exif8_alpha.webp": written(see_through, "WEBP", lossless=True, exif=exif(8)),
        "exif3_alpha.png": written(see_through, "PNG", exif=exif(3)),
        "exif5_palette.png": written(scene.quantize(16), "PNG", exif=exif(5), transparency=bytes(range(0, 256, 16))),
        "exif6_mpo.jpg": written(scene, "MPO", save_all=True, append_images=frames[1:], exif=exif()),
        "frames.gif": written(scene, "GIF", save_all=True, append_images=frames[1:]),
        "cmyk6.jpg": written(scene.convert("CMYK"), "JPEG", exif=exif()),
        "profile.png": written(scene, "PNG", icc_profile=profile),
    }


CASES = {path.name: path.read_bytes() for path in sorted((ROOT / "tests" / "pictures").iterdir())} | made()


@pytest.fixture(scope="module")
def gateway(wire_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Wire]:
    with (
        gateway_server({TASK: wire_server.base_url}, tmp_path_factory.mktemp("gateway") / "log") as server,
        httpx2.Client(base_url=server.base_url, timeout=60, trust_env=False) as http,
    ):
        yield Wire(server.base_url, http)


@pytest.fixture(scope="module")
def expected(wire: Wire) -> dict[str, Array]:
    """The vector of the bare pixels of each case."""
    return dict(zip(CASES, vectors(wire, [bare_png(content) for content in CASES.values()]), strict=True))


def item(content: bytes) -> dict[str, str]:
    return {"image": base64.b64encode(content).decode()}


def vectors(wire: Wire, contents: list[bytes]) -> list[Array]:
    answer = wire.ask({"input": [item(content) for content in contents], "task": TASK})
    return [array(entry["embedding"]) for entry in answer["data"]]


def batched(names: Iterable[str], n: int) -> Iterator[list[str]]:
    rest = iter(names)
    while batch := list(islice(rest, n)):
        yield batch


def assert_same(found: dict[str, Array], expected: dict[str, Array]) -> None:
    differences = {name: largest_difference([found[name]], [expected[name]]) for name in expected}
    worst = max(differences, key=lambda name: differences[name])
    print(f"largest difference: {differences[worst]:.1e} ({worst})")
    assert differences[worst] <= BOUND, differences


def test_a_picture_that_is_turned_has_another_vector(wire: Wire, expected: dict[str, Array]) -> None:
    """So the tests below can fail."""
    turned = ImageOps.exif_transpose(Image.open(io.BytesIO(CASES["exif6.png"])))
    (vector,) = vectors(wire, [written(turned.convert("RGB"), "PNG")])
    assert float(vector @ expected["exif6.png"]) < 0.99


@pytest.mark.parametrize("way", ["base64", "data URI", "bare data URI", "URL"])
@pytest.mark.parametrize("door", ["server", "gateway"])
def test_every_picture_has_the_vector_of_its_pixels_by_http(
    door: str, way: str, wire: Wire, gateway: Wire, expected: dict[str, Array]
) -> None:
    with opened_site(CASES) as site:
        items: dict[str, list[Any]] = {
            "base64": [item(content) for content in CASES.values()],
            "data URI": [{"image": f"data:;base64,{item(content)['image']}"} for content in CASES.values()],
            "bare data URI": [f" data:image/*;base64,{item(content)['image']}" for content in CASES.values()],
            "URL": [{"image": f" {site.url}/{name}\n"} for name in CASES],
        }
        answer = (wire if door == "server" else gateway).ask({"input": items[way], "task": TASK})
    assert_same(dict(zip(CASES, [array(entry["embedding"]) for entry in answer["data"]], strict=True)), expected)


@pytest.mark.parametrize("door", ["server", "gateway"])
@pytest.mark.parametrize("source", ["bytes", "path", "PIL image", "data URI"])
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_every_picture_has_the_vector_of_its_pixels_by_the_client(
    kind: str, source: str, door: str, wire: Wire, gateway: Wire, expected: dict[str, Array], tmp_path: Path
) -> None:
    base_url = (wire if door == "server" else gateway).base_url
    for name, content in CASES.items():
        (tmp_path / name).write_bytes(content)
    sources: dict[str, list[Any]] = {
        "bytes": list(CASES.values()),
        "path": [tmp_path / name for name in CASES],
        "PIL image": [Image.open(io.BytesIO(content)) for content in CASES.values()],
        "data URI": [f"data:;base64,{item(content)['image']}" for content in CASES.values()],
    }

    async def embedded() -> list[Any]:
        async with AsyncEmbeddingsClient(base_url, task=TASK) as client:
            return await client.encode_image(sources[source])

    if kind == "async":
        found = asyncio.run(embedded())
    else:
        with EmbeddingsClient(base_url, task=TASK) as client:
            found = client.encode_image(sources[source])
    assert_same(dict(zip(CASES, found, strict=True)), expected)


def test_every_picture_has_the_vector_of_its_pixels_by_the_command(
    wire: Wire, expected: dict[str, Array], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("JINA_V4_API_KEY", raising=False)
    Path("pictures").mkdir()
    for name, content in CASES.items():
        Path("pictures", name).write_bytes(content)
    options = ["--base-url", wire.base_url, "--task", TASK]
    monkeypatch.setattr(sys, "argv", ["jina-v4-embed", *options, "pictures", "out.npy"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    rows = dict(zip(json.loads(Path("out.npy.ids.json").read_text()), np.load("out.npy"), strict=True))
    assert_same({name: rows[f"pictures/{name}"] for name in CASES}, expected)


def test_every_picture_has_the_vector_of_its_pixels_by_the_search_example(wire: Wire, tmp_path: Path) -> None:
    """Its pages are pictures that pdfium makes; a camera's JPEG file, orientation and all, stands in the PDF file."""
    with pypdfium2.PdfDocument.new() as document:
        picture = pypdfium2.PdfImage.new(document)
        picture.load_jpeg(io.BytesIO(CASES["exif6.jpg"]))
        width, height = picture.get_px_size()
        picture.set_matrix(pypdfium2.PdfMatrix().scale(width, height))
        page = document.new_page(width, height)
        page.insert_obj(picture)
        page.gen_content()
        document.save(tmp_path / "photo.pdf")
    with pypdfium2.PdfDocument(tmp_path / "photo.pdf") as document:
        rendered = document[0].render(scale=1).to_pil().convert("RGB")
    index = tmp_path / "ix"
    options = ["--scale", "1", "--index", str(index), "--base-url", wire.base_url]
    done = CliRunner().invoke(cli.app, ["index", *options, str(tmp_path / "photo.pdf")])
    assert done.exit_code == 0, done.output
    (row,) = Store.open(index)._table.to_arrow().select(["dense"]).to_pylist()
    (vector,) = vectors(wire, [bare_png(written(rendered, "PNG"))])
    assert_same({"photo.pdf": array(row["dense"])}, {"photo.pdf": vector})


FORMATS = {"AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "QOI", "TIFF", "WEBP"}
MODES = ("1", "L", "P", "LA", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16", "F")


def pictures_of_pillow() -> Iterator[tuple[str, bytes]]:
    """A file of every format and mode that Pillow writes, of random pixels and sizes, with each orientation in turn."""
    Image.init()
    random = np.random.default_rng(20261129)
    for i, (kind, mode) in enumerate(product(sorted(Image.SAVE), MODES)):
        width, height = (int(side) for side in random.integers(1, 60, 2))
        if mode == "F":
            image = Image.fromarray(random.uniform(-99, 999, (height, width)).astype(np.float32))
        else:
            image = Image.new(mode, (width, height))
            image.frombytes(random.bytes(len(image.tobytes())))
        if mode in ("P", "PA"):
            image.putpalette(random.bytes(768))
        options: dict[str, Any] = {"exif": exif(1 + i % 8)}
        if i % 3 == 0:
            options["xmp"] = XMP.encode()
        if kind == "PNG" and mode in ("P", "L", "RGB"):
            options["transparency"] = {"P": b"\0\x80", "L": 7, "RGB": (1, 2, 3)}[mode]
        with warnings.catch_warnings(), contextlib.suppress(OSError, ValueError, KeyError, TypeError, RuntimeError):
            warnings.simplefilter("ignore", DeprecationWarning)  # formats that a later Pillow will not write
            yield f"{kind} {mode}", written(image, kind, **options)


def test_any_picture_that_pillow_writes_has_the_vector_of_its_pixels(wire: Wire, gateway: Wire, figure: Figure) -> None:
    pictures = {name: content for name, content in pictures_of_pillow() if name.split()[0] in FORMATS}
    assert {name.split()[0] for name in pictures} == FORMATS
    assert len(pictures) >= 60
    worst = 0.0
    with EmbeddingsClient(wire.base_url, task=TASK) as client:
        for names in batched(pictures, 16):
            contents = [pictures[name] for name in names]
            references = np.stack(vectors(wire, [bare_png(content) for content in contents]))
            for found in (vectors(wire, contents), vectors(gateway, contents), client.encode_image(contents)):
                differences = np.abs(np.stack(found) - references).max(axis=1)  # (n,)
                assert differences.max() <= BOUND, dict(zip(names, differences, strict=True))
                worst = max(worst, float(differences.max()))
    figure(f"{len(pictures)} pictures by three ways: largest difference {worst:.1e}")


def test_a_format_that_is_not_offered_is_refused_by_every_way(wire: Wire, gateway: Wire) -> None:
    others = {name.split()[0]: content for name, content in pictures_of_pillow() if len(content) < MAX_IMAGE_BYTES}
    others = {kind: content for kind, content in others.items() if kind not in FORMATS}
    assert len(others) >= 10
    with EmbeddingsClient(wire.base_url, task=TASK) as client:
        for kind, content in others.items():
            print(kind)
            for door in (wire, gateway):
                answer = door.post({"input": [item(content)], "task": TASK})
                assert_refused(answer, 422, "is not an image of a known format", "input[0].image")
            if kind in CLIENT_ONLY:
                assert np.abs(client.encode_image(content) - client.encode_image(bare_png(content))).max() <= BOUND
            else:
                with pytest.raises(ImageError):
                    client.encode_image(content)


def test_a_picture_that_loses_values_is_named_in_a_header(wire: Wire, gateway: Wire) -> None:
    grey, plain = CASES["gray16.png"], CASES["exif6.png"]
    for door in (wire, gateway):
        answer = door.post({"input": ["x", item(grey), item(plain), item(grey)], "task": TASK})
        assert answer.status_code == 200
        named = "more than 8 bits per pixel, values over 255 read as 255: input[1].image, input[3].image"
        assert answer.headers["x-jina-v4-warning"] == named
        one, other = (array(answer.json()["data"][i]["embedding"]) for i in (1, 2))
        assert float(one @ other) < 0.999
        assert "x-jina-v4-warning" not in door.post({"input": ["x", item(plain)], "task": TASK}).headers
        answer = door.post({"input": item(grey), "task": TASK, "odd": 1}, accept="application/x-safetensors")
        assert answer.headers["x-jina-v4-warning"].endswith(": input.image; unknown fields ignored: odd")


def test_half_a_character_names_its_item_at_every_door(wire: Wire, gateway: Wire) -> None:
    texts = '"x", {"text": "whole \\ud83d\\ude00"}, "half \\ud83d", "y"'
    for door in (wire, gateway):
        answer = door.post(content=f'{{"task": "{TASK}", "input": [{texts}]}}'.encode())
        assert_refused(answer, 400, "input[2] is not Unicode", "input[2]")
