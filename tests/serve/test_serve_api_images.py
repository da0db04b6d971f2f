"""Which addresses are public, and what is decoded. What real servers answer to bad images is tested in end_to_end."""

import asyncio
import base64
import io
from collections.abc import Callable

import pytest
from conftest import Golden
from jina_v4_serve.api.errors import ApiError
from jina_v4_serve.api.images import ImageLimits, ImageLoader, decode, is_public
from PIL import Image

LIMITS = ImageLimits()


def png(width: int = 8, height: int = 8, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (width, height)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("address", ["1.1.1.1", "8.8.8.8", "2606:4700:4700::1111"])
def test_public_addresses(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.255.0.3", "0.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
        "224.0.0.1", "255.255.255.255", "192.0.2.1", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "ff02::1",
        "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "2001:db8::1", "not an address",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/x.png",
        "http://localhost/x.png",
        "http://[::1]/x.png",
        "http://[::ffff:127.0.0.1]/x.png",
        "http://2130706433/x.png",
        "http://0x7f.1/x.png",
        "http://0/x.png",
        "HTTP://LOCALHOST:80/x.png",
        "http://user@127.0.0.1/x.png",
    ],
)
def test_a_url_to_this_machine_is_not_fetched(url: str) -> None:
    with pytest.raises(ApiError, match=r"not public|cannot be fetched") as caught:
        asyncio.run(ImageLoader(LIMITS).load(url, "input[1].image"))
    assert (caught.value.status, caught.value.param) == (422, "input[1].image")


@pytest.mark.parametrize("encode", [base64.b64encode, base64.encodebytes], ids=["one line", "several lines"])
@pytest.mark.parametrize("head", ["", "data:image/png;base64,", "DATA:;BASE64,"])
def test_base64_of_a_file(head: str, encode: Callable[[bytes], bytes]) -> None:
    source = head + encode(png(9, 7)).decode()
    assert asyncio.run(ImageLoader(LIMITS).load(source, "input")).size == (9, 7)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGBA", "I;16", "CMYK"])
def test_pictures_become_rgb_as_in_the_published_code(mode: str) -> None:
    file = io.BytesIO()
    picture = Image.effect_mandelbrot((40, 30), (-2, -1, 1, 1), 50).convert("RGBA")
    picture.putalpha(100)
    picture.convert("L").convert(mode).save(file, "TIFF") if mode in ("I;16", "CMYK") else picture.convert(mode).save(
        file, "PNG"
    )
    expected = Image.open(file).convert("RGB")
    found = decode(file.getvalue(), "input", LIMITS)
    assert (found.mode, found.tobytes()) == ("RGB", expected.tobytes())


def test_orientation_is_left_as_it_is_stored() -> None:
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 10)).save(file, "JPEG", exif=exif)
    assert decode(file.getvalue(), "input", LIMITS).size == (30, 10)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", "no image of a known kind", id="nothing"),
        pytest.param(b"%!PS-Adobe-3.0 EPSF-3.0\n", "no image of a known kind", id="EPS"),
        pytest.param(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no image of a known kind", id="SVG"),
        pytest.param(png(40, 40)[:60], "is a broken image", id="cut short"),
        pytest.param(png(2001, 10), "aspect ratios up to 200", id="thin"),
        pytest.param(png(9000, 8000, "1"), "over the limit of 64000000", id="large"),
    ],
)
def test_what_is_no_image_to_embed_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(ApiError, match=message) as caught:
        decode(content, "input[3].image", LIMITS)
    assert caught.value.message.startswith("input[3].image")


def test_a_file_over_the_limit_is_refused_before_it_is_decoded(golden: Golden) -> None:
    loader = ImageLoader(ImageLimits(max_bytes=1000))
    with pytest.raises(ApiError, match="over the limit of 1000 bytes"):
        asyncio.run(loader.load(base64.b64encode(golden.images[0].read_bytes()).decode(), "input"))
