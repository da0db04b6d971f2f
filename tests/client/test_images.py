"""Images of every form: the server must see the pixels that the published model sees, or nothing is sent."""

import base64
import contextlib
import io
import struct
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pillow_heif
import pytest
from image_files import written
from jina_v4_client import EmbeddingsClient, ImageError, _images
from jina_v4_client._images import CLIPPED_MODES, ImageWarning, prepare
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

pillow_heif.register_heif_opener()  # the tests write such a file
RANDOM = np.random.default_rng(7)
PHOTO = Image.fromarray(RANDOM.integers(0, 256, (30, 44, 3), dtype=np.uint8))
ALPHA = Image.fromarray(RANDOM.integers(0, 256, (30, 44), dtype=np.uint8))
TRANSPARENT = PHOTO.copy()
TRANSPARENT.putalpha(ALPHA)
DEPTH_16 = Image.fromarray(RANDOM.integers(0, 65536, (30, 44)).astype(np.uint16))


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


def as_published(content: bytes) -> NDArray[np.uint8]:
    """What the published model sees: transparency dropped, orientation ignored."""
    image = Image.open(io.BytesIO(content))
    image.info.pop("transparency", None)  # changes no pixel here, and Pillow warns about some of them
    return np.asarray(image.convert("RGB"))


def as_served(content: bytes) -> NDArray[np.uint8]:
    """What vLLM 0.32 sees: turned upright, transparency pasted on white."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    if image.mode != "RGB" and (image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info):
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        image = white
    return np.asarray(image.convert("RGB"))


def warned_of(mode: str) -> contextlib.AbstractContextManager[object]:
    """There is a warning if an image is of more than 8 bits a pixel, and none if it is not."""
    if mode not in CLIPPED_MODES:
        return contextlib.nullcontext()
    return pytest.warns(ImageWarning, match=f"mode {mode} has more than 8 bits a pixel; values above 255 become white")


XMP = b"""<x:xmpmeta xmlns:x='adobe:ns:meta/'><rdf:RDF xmlns:rdf='http://www.w3.org/1999/02/22-rdf-syntax-ns#'>
<rdf:Description xmlns:tiff='http://ns.adobe.com/tiff/1.0/' tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>"""

SENT_AS_THEY_ARE = {
    "RGB PNG": written(PHOTO, "PNG"),
    "JPEG": written(PHOTO, "JPEG"),
    "upright JPEG": written(PHOTO, "JPEG", exif=turned(1)),
    "grey JPEG": written(PHOTO.convert("L"), "JPEG"),
    "JPEG with another behind": written(PHOTO, "MPO", save_all=True, append_images=[PHOTO.rotate(90)]),
    "WebP": written(PHOTO, "WEBP"),
    "palette PNG": written(PHOTO.quantize(16), "PNG"),
    "black and white PNG": written(PHOTO.convert("1"), "PNG"),
}

SENT_AS_RGB_PNG = {
    **{f"JPEG with orientation {n}": written(PHOTO, "JPEG", exif=turned(n)) for n in range(2, 9)},
    "PNG with orientation": written(PHOTO, "PNG", exif=turned(6)),
    "WebP with orientation": written(PHOTO, "WEBP", exif=turned(3)),
    "JPEG with orientation in XMP": written(PHOTO, "JPEG", xmp=XMP),
    "RGBA PNG": written(TRANSPARENT, "PNG"),
    "RGBA WebP": written(TRANSPARENT, "WEBP", lossless=True),
    "grey PNG with alpha": written(TRANSPARENT.convert("LA"), "PNG"),
    "palette PNG with a transparent colour": written(PHOTO.quantize(16), "PNG", transparency=3),
    "palette PNG with alpha": written(PHOTO.quantize(16), "PNG", transparency=bytes(range(0, 256, 16))),
    "grey PNG with a transparent value": written(PHOTO.convert("L"), "PNG", transparency=30),
    "16-bit PNG": written(DEPTH_16, "PNG"),
    "CMYK JPEG": written(PHOTO.convert("CMYK"), "JPEG"),
    "GIF": written(PHOTO.quantize(32), "GIF"),
    "BMP": written(PHOTO, "BMP"),
    "TIFF": written(PHOTO, "TIFF"),
    "TGA": written(PHOTO, "TGA"),
    "TGA in lengths": written(PHOTO, "TGA", compression="tga_rle"),
    "JPEG 2000 without a box": written(PHOTO, "JPEG2000", no_jp2=True),
    "HEIC": written(PHOTO, "HEIF"),
}


@pytest.mark.parametrize("name", SENT_AS_THEY_ARE)
def test_a_file_that_the_server_reads_alike_is_sent_byte_for_byte(name: str) -> None:
    content = SENT_AS_THEY_ARE[name]
    prepared = prepare(content)
    assert prepared.content == content
    assert prepared.data_uri().startswith(f"data:{prepared.media_type};base64,")
    np.testing.assert_array_equal(as_served(content), as_published(content))


@pytest.mark.parametrize("name", SENT_AS_RGB_PNG)
def test_a_file_that_the_server_would_read_otherwise_is_sent_as_rgb_png(name: str) -> None:
    content = SENT_AS_RGB_PNG[name]
    with warned_of(Image.open(io.BytesIO(content)).mode):
        prepared = prepare(content)
    sent = Image.open(io.BytesIO(prepared.content))
    assert (sent.format, sent.mode, sent.info, len(sent.getexif())) == ("PNG", "RGB", {}, 0)
    assert (prepared.media_type, prepared.width, prepared.height) == ("image/png", 44, 30)
    np.testing.assert_array_equal(as_served(prepared.content), as_published(content))


def test_the_server_would_see_other_pixels_in_those_files_untouched() -> None:
    """Sent untouched, the server would see other pixels in files with an orientation or transparency."""
    differing = {
        name
        for name, content in SENT_AS_RGB_PNG.items()
        if not np.array_equal(as_served(content), as_published(content))
    }
    assert {
        "JPEG with orientation 6",
        "JPEG with orientation in XMP",
        "RGBA PNG",
        "palette PNG with alpha",
    } <= differing


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr", "I;16", "I", "F"])
def test_a_pil_image_is_sent_without_loss_as_its_rgb_pixels(mode: str) -> None:
    image = DEPTH_16 if mode == "I;16" else TRANSPARENT.convert("L").convert(mode) if mode in "IF" else TRANSPARENT
    image = image.convert(mode)
    before = image.tobytes()
    with warned_of(mode):
        sent = Image.open(io.BytesIO(prepare(image).content))
    assert (sent.format, sent.mode) == ("PNG", "RGB")
    np.testing.assert_array_equal(np.asarray(sent), np.asarray(image.convert("RGB")))
    assert image.tobytes() == before


def test_a_pil_image_leaves_its_metadata_behind() -> None:
    opened = Image.open(io.BytesIO(written(PHOTO, "JPEG", exif=turned(6), icc_profile=b"profile", dpi=(72, 72))))
    sent = Image.open(io.BytesIO(prepare(opened).content))
    assert sent.info == {}
    assert opened.info["icc_profile"] == b"profile", "the caller's image stays as it was"


URL_SAFE = str.maketrans("+/", "-_")


def as_base64_of(content: bytes) -> str:
    return base64.b64encode(content).decode()


def as_base64(path: Path) -> str:
    return as_base64_of(path.read_bytes())


@pytest.fixture
def png(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    path.write_bytes(written(PHOTO, "PNG"))
    return path


@pytest.mark.parametrize(
    "form",
    [
        pytest.param(lambda path: path, id="path"),
        pytest.param(lambda path: str(path), id="path as str"),
        pytest.param(lambda path: path.read_bytes(), id="bytes"),
        pytest.param(lambda path: bytearray(path.read_bytes()), id="bytearray"),
        pytest.param(lambda path: f" {as_base64(path)}\n", id="bare base64"),
        pytest.param(lambda path: as_base64(path).rstrip("=").translate(URL_SAFE), id="base64 for URLs"),
        pytest.param(lambda path: f"\t\ufeffdata:image/png;base64, {quote(as_base64(path), safe='')}", id="escaped"),
        pytest.param(
            lambda path: f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}", id="data URI"
        ),
        pytest.param(lambda path: f"DATA:;base64,{base64.b64encode(path.read_bytes()).decode()}", id="bare data URI"),
    ],
)
def test_every_form_of_a_file_is_sent_byte_for_byte(
    server: Any, client: EmbeddingsClient, png: Path, form: Callable[[Path], Any]
) -> None:
    server.play_ours()
    assert client.encode_image(form(png)).shape == (256,)
    (body,) = server.bodies("/v1/embeddings")
    (item,) = body["input"]
    head, _, content = item["image"].partition(",")
    assert head == "data:image/png;base64"
    assert base64.b64decode(content) == png.read_bytes()


def bomb() -> bytes:
    """A PNG that says it has a billion pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 32000, 32000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        pytest.param(b"", "not an image", id="no bytes"),
        pytest.param(b"<html>", "not an image", id="HTML"),
        pytest.param(b"%!PS-Adobe-3.0 EPSF-3.0\n", "not an image, or in a format that is not read", id="EPS"),
        pytest.param(SENT_AS_THEY_ARE["JPEG"][:-200], "a broken image .*truncated", id="truncated JPEG"),
        pytest.param(SENT_AS_THEY_ARE["RGB PNG"][:-400], "a broken image", id="truncated PNG"),
        pytest.param(SENT_AS_THEY_ARE["WebP"][:-300], "a broken image|not an image", id="truncated WebP"),
        pytest.param(SENT_AS_THEY_ARE["JPEG"][:20], "a broken image|not an image", id="head of a JPEG"),
        pytest.param(bomb(), "more pixels than Pillow allows", id="bomb"),
        pytest.param(written(Image.new("RGB", (2, 401)), "PNG"), "aspect ratios above 200", id="thin"),
        pytest.param(Image.new("RGB", (402, 2)), "aspect ratios above 200", id="thin PIL image"),
        pytest.param(Image.new("RGB", (0, 5)), "no pixels", id="PIL image without pixels"),
        pytest.param("no/such/file.png", "no such file", id="missing file"),
        pytest.param("A" * 100_000, "neither an .* nor the base64 of an image file", id="base64 of no image"),
        pytest.param("images/cat", "no such file", id="missing file that could be base64"),
        pytest.param(as_base64_of(SENT_AS_THEY_ARE["JPEG"][:-200]), "a broken image", id="base64 of a truncated JPEG"),
        pytest.param(" data: the new oil", "a data URI must be base64", id="text that begins like a data URI"),
        pytest.param("data:image/png;base64,QUJDR", "its end is missing", id="data URI cut off"),
        pytest.param(b"<?xml version='1.0'?>\n<svg/>", "SVG, a drawing without pixels", id="SVG"),
        pytest.param(b"<!-- so -->\n" * 50 + b"<svg/>", "SVG, a drawing without pixels", id="comments and SVG"),
        pytest.param(b"<!-- so -->\n" * 50 + b"<html>", "not an image", id="comments of another file"),
        pytest.param(b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + b"\0" * 99, "not an image|broken", id="broken HEIC"),
        pytest.param("nul\0.png", "cannot be read|no such file", id="NUL in a path"),
        pytest.param("ftp://host/a.png", "no such file", id="unknown scheme"),
        pytest.param("/", "not a regular file", id="folder"),
        pytest.param("/dev/zero", "not a regular file", id="device"),
        pytest.param("data:image/png,abc", "a data URI must be base64", id="data URI without base64"),
        pytest.param("data:image/png;base64,a!b", "broken base64: character 2", id="data URI with broken base64"),
        pytest.param("data:image/png;base64,aGFsbG8=", "not an image", id="data URI of a text"),
    ],
)
def test_an_image_that_cannot_be_used_is_named(
    server: Any, client: EmbeddingsClient, source: Any, message: str
) -> None:
    with pytest.raises(ImageError, match=rf"^images\[1\] \((?s:.)*\): .*({message})") as caught:
        client.encode_image([PHOTO, source])
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)
    assert server.seen == []


def test_heic_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    content = written(PHOTO, "HEIF")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    _images._formats.cache_clear()
    try:
        with pytest.raises(ImageError, match=r"HEIC, which needs .* pip install 'jina-v4-client\[heif\]'"):
            prepare(content)
    finally:
        monkeypatch.undo()
        _images._formats.cache_clear()


@pytest.mark.parametrize("fill", [b"\0", b"\xff", b"\0\0\x02\0"], ids=["zeros", "ones", "like TGA"])
def test_what_only_looks_like_a_file_without_a_mark_is_no_image(fill: bytes) -> None:
    with pytest.raises(ImageError):
        prepare((fill * 1000)[:1000])


def test_many_deep_images_of_a_call_are_one_warning_by_default(server: Any, client: EmbeddingsClient) -> None:
    server.play_ours()
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        warnings.simplefilter("default")
        client.encode_image([DEPTH_16] * 3)
    assert [warning.category for warning in caught] == [ImageWarning]


def test_a_pil_image_that_breaks_when_it_is_read_is_named(client: EmbeddingsClient) -> None:
    lazy = Image.open(io.BytesIO(SENT_AS_THEY_ARE["JPEG"][:-200]))
    with pytest.raises(ImageError, match=r"images\[0\] \(PIL image, RGB, 44 x 30\): cannot be read as RGB"):
        client.encode_image(lazy)


def test_a_ratio_of_exactly_200_is_allowed() -> None:
    assert prepare(Image.new("RGB", (400, 2))).width == 400
