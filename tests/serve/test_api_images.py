"""Which addresses are public, and what is decoded. What real servers answer to bad images is tested in end_to_end."""

import asyncio
import base64
import io
import random
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import pytest
from conftest import Golden
from image_files import plain, written
from jina_v4_serve.api.encoded import read_base64
from jina_v4_serve.api.errors import ApiError
from jina_v4_serve.api.images import ImageLoader, decode
from jina_v4_serve.api.record import Record, recording
from jina_v4_serve.api.sources import is_public
from jina_v4_serve.settings import Settings
from PIL import Image
from wire import opened_site

LIMITS = Settings()


def png(width: int = 8, height: int = 8, mode: str = "RGB") -> bytes:
    return plain((width, height), mode=mode)


async def loaded(loader: ImageLoader, source: str, where: str) -> Image.Image:
    async with loader.opened(source, where) as picture:
        return picture


def icon(content: bytes) -> bytes:
    """An ICO file of a PNG file that it says has 16 x 16 pixels."""
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(content), 22) + content


@pytest.mark.parametrize("address", ["1.1.1.1", "8.8.8.8", "2606:4700:4700::1111"])
def test_a_public_address_is_known_as_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.255.0.3", "0.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
        "224.0.0.1", "255.255.255.255", "192.0.2.1", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "ff02::1",
        "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "2001:db8::1", "not an address",
        "fec0::1", "64:ff9b:1::7f00:1", "::7f00:1", "::ffff:0:127.0.0.1", "192.0.0.8", "192.0.0.192", "192.88.99.1",
        "168.63.129.16", "::ffff:168.63.129.16",
    ],
)  # fmt: skip
def test_an_address_that_is_not_public_is_known(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/x.png", "http://localhost/x.png", "http://[::1]/x.png", "http://[::ffff:127.0.0.1]/x.png",
        "http://2130706433/x.png", "http://0x7f.1/x.png", "http://0/x.png", "HTTP://LOCALHOST:80/x.png",
        "http://user@127.0.0.1/x.png", "http://\uff11\uff12\uff17.\uff10.\uff10.\uff11/x.png", "http://[fec0::1]/x.png",
        "http://①②⑦.⓪.⓪.①/x.png", "http://127。0。0。1/x.png", "http://\uff11\uff12\uff17.1/x.png",
    ],
)  # fmt: skip
def test_a_url_to_this_machine_is_not_fetched(url: str) -> None:
    with pytest.raises(ApiError, match=r"not public|cannot be fetched") as caught:
        asyncio.run(loaded(ImageLoader(LIMITS), url, "input[1].image"))
    assert (caught.value.status, caught.value.param) == (422, "input[1].image")


@pytest.mark.parametrize("first", ["public", "private"])
def test_a_name_with_a_private_address_beside_a_public_one_is_not_fetched(
    first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stranger's name server may say both, and the connection would go to whichever answers."""
    addresses = {"public": "93.184.215.14", "private": "127.0.0.1"}
    in_order = [addresses[first], *(address for name, address in addresses.items() if name != first)]

    def resolve(host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in in_order]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with opened_site({"x.png": png()}) as site:
        url = site.url.replace("127.0.0.1", "two.example") + "/x.png"
        with pytest.raises(ApiError, match="leads to an address that is not public"):
            asyncio.run(loaded(ImageLoader(Settings(fetch_timeout_s=3)), url, "input"))
        assert site.seen == []
        allowed = ImageLoader(Settings(fetch_timeout_s=3, image_hosts=frozenset({"two.example"})))
        in_order[:] = ["127.0.0.1"]
        assert asyncio.run(loaded(allowed, url, "input")).size == (8, 8), "the name does lead there"


# As yarl reads them, and no other parser.
LOOPBACK = [
    "\uff11\uff12\uff17.\uff10.\uff10.\uff11",
    "①②⑦.⓪.⓪.①",
    "127。0。0。1",
    "127\uff0e0\uff0e0\uff0e1",
    "127.0.0.1",
]


@pytest.mark.parametrize("host", LOOPBACK, ids=ascii)
def test_the_host_that_is_checked_is_the_host_that_is_fetched_from(host: str) -> None:
    by_name = ImageLoader(Settings(fetch_timeout_s=3, image_hosts=frozenset({"localhost"})))
    by_address = ImageLoader(Settings(fetch_timeout_s=3, image_hosts=frozenset({"127.0.0.1"})))
    with opened_site({"x.png": png()}) as site:
        url = site.url.replace("127.0.0.1", host) + "/x.png"
        assert asyncio.run(loaded(by_address, url, "input")).size == (8, 8)
        n_seen = len(site.seen)
        for refused in (url, site.url.replace("127.0.0.1", "localhost") + f"/to/{url}"):
            with pytest.raises(ApiError, match="leads to an address that is not public"):
                asyncio.run(loaded(by_name, refused, "input"))
        assert [path for path in site.seen[n_seen:] if path == "/x.png"] == []


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (f"http://{'ü' * 1_000_000}/", "the URL has 1000008 characters; at most 16384 are fetched"),
        (f"http://{'ü.' * 8_000}/", "the URL cannot be fetched"),
    ],
    ids=["long", "of a long host"],
)
def test_a_long_url_does_not_hold_the_server(url: str, message: str) -> None:
    began = time.process_time()
    with pytest.raises(ApiError, match=message):
        asyncio.run(loaded(ImageLoader(LIMITS), url, "input"))
    assert time.process_time() - began < 0.5


async def test_a_name_server_that_does_not_answer_holds_no_other_work(monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()

    def resolve(*_: Any, **__: Any) -> list[Any]:
        answered.wait(30)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)

    loader = ImageLoader(Settings(fetch_timeout_s=30))
    fetches = [loaded(loader, f"http://h{i}.example/x.png", "input") for i in range(40)]
    fetching = asyncio.gather(*fetches, return_exceptions=True)
    await asyncio.sleep(0.1)
    async with asyncio.timeout(10):  # the loop has 32 threads at most for all that is to leave it
        await asyncio.to_thread(lambda: None)
    answered.set()
    assert all(isinstance(failure, ApiError) for failure in await fetching)


SPELLINGS: dict[str, Callable[[bytes], str]] = {
    "one line": lambda content: base64.b64encode(content).decode(),
    "several lines": lambda content: base64.encodebytes(content).decode(),
    "lines of Windows": lambda content: base64.encodebytes(content).decode().replace("\n", "\r\n"),
    "blanks everywhere": lambda content: "\t " + "  ".join(base64.b64encode(content).decode()) + "\u00a0\n",
    "without padding": lambda content: base64.b64encode(content).decode().rstrip("="),
    "too much padding": lambda content: base64.b64encode(content).decode() + "==",
    "URL-safe": lambda content: base64.urlsafe_b64encode(content).decode(),
    "URL-safe without padding": lambda content: base64.urlsafe_b64encode(content).decode().rstrip("="),
    "percent-escaped": lambda content: quote(base64.b64encode(content).decode(), safe=""),
    "escaped in lower case": lambda content: base64.encodebytes(content).decode().replace("\n", "%0d%0a"),
}


@pytest.mark.parametrize("write", SPELLINGS.values(), ids=SPELLINGS)
def test_base64_is_read_in_any_spelling(write: Callable[[bytes], str]) -> None:
    for n in range(1, 100):
        content = random.Random(n).randbytes(n)  # noqa: S311 - not a secret
        assert read_base64(write(content)) == content
    assert read_base64("") == read_base64(" =\n") == b""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("iVBO!w0K", r"character 5 \(white space not counted\) is '!'"),
        ("iV BO\nRw0\0", r"character 8 \(white space not counted\) is '\\x00'"),
        ("QUJD=QUJD", "character 5 .* is '='"),
        ("QUJD%zzQUJD", "character 5 .* is '%'"),
        ("QUJé", r"character 4 .* is '\\xe9'"),
        ("QUJDQ", "its end is missing: 5 characters"),
        ("Q===", "its end is missing: 1 characters"),
    ],
)
def test_what_is_not_base64_is_named_with_its_place(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_base64(text)


@pytest.mark.parametrize("write", SPELLINGS.values(), ids=SPELLINGS)
@pytest.mark.parametrize(
    "head",
    [
        "", " \n", "data:image/png;base64,", "DATA:;BASE64,", "\ufeff data:image/*;base64,", "data:text/plain;base64,",
        "data:image/jpeg;charset=utf-8;base64,", "data: image/png ; base64 ,", "data:image/png;base64;name=x.png,",
    ],
)  # fmt: skip
def test_base64_and_data_uris_of_a_file_are_decoded(head: str, write: Callable[[bytes], str]) -> None:
    assert asyncio.run(loaded(ImageLoader(LIMITS), head + write(png(9, 7)), "input")).size == (9, 7)


@pytest.mark.parametrize("source", ["  {}/x.png", "{}/x.png\n", "\t{}/x.png ", "\ufeff{}/x.png"])
def test_a_url_between_blanks_and_in_capitals_is_fetched(source: str) -> None:
    loader = ImageLoader(Settings(image_hosts=frozenset({"127.0.0.1"})))
    with opened_site({"x.png": png(9, 7)}) as site:
        for url in (site.url, site.url.replace("http", "HTTP"), site.url.replace("http", "Http")):
            assert asyncio.run(loaded(loader, source.format(url), "input")).size == (9, 7)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGBA", "I;16", "CMYK"])
def test_pictures_become_rgb_as_in_the_published_code(mode: str) -> None:
    picture = Image.effect_mandelbrot((40, 30), (-2, -1, 1, 1), 50).convert("RGBA")
    picture.putalpha(100)
    as_tiff = mode in ("I;16", "CMYK")
    content = written(picture.convert("L").convert(mode), "TIFF") if as_tiff else written(picture.convert(mode))
    expected = Image.open(io.BytesIO(content)).convert("RGB")
    found = decode(content, "input", LIMITS)
    assert (found.mode, found.tobytes()) == ("RGB", expected.tobytes())


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_a_picture_of_more_than_8_bits_is_recorded(mode: str) -> None:
    record = Record("")
    with recording(record):
        for where, kind in (("input[2].image", mode), ("input[3].image", "L")):
            decode(plain((8, 8), kind="TIFF", mode=kind), where, LIMITS)
    assert record.clipped == ["input[2].image"]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "MPO", "AVIF"])
def test_nothing_of_a_file_but_its_pixels_goes_on(kind: str) -> None:
    """vLLM would turn it by its orientation, and look for its id."""
    exif = Image.Exif()
    exif[0x0112], exif[0x800D] = 6, "an id"
    picture = Image.effect_mandelbrot((30, 10), (-2, -1, 1, 1), 50).convert("RGB")
    content = written(picture, kind, exif=exif, dpi=(72, 72), xmp=b"<x tiff:Orientation='6'/>")
    expected = Image.open(io.BytesIO(content)).convert("RGB")
    found = decode(content, "input", LIMITS)
    assert (found.size, found.tobytes()) == (expected.size, expected.tobytes())
    assert (found.info, dict(found.getexif()), found.palette, type(found)) == ({}, {}, None, Image.Image)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", "not an image of a known format", id="nothing"),
        pytest.param(b"%!PS-Adobe-3.0 EPSF-3.0\n", "not an image of a known format", id="EPS"),
        pytest.param(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image of a known format", id="SVG"),
        pytest.param(png(40, 40)[:60], "is a broken image", id="cut short"),
        pytest.param(png(2001, 10), "aspect ratios up to 200", id="thin"),
        pytest.param(
            icon(png(300, 1)),
            "300 x 1 pixels; the model takes aspect ratios up to 200",
            id="thin icon",
            marks=pytest.mark.filterwarnings("ignore:Image was not the expected size"),
        ),
        pytest.param(png(9000, 8000, "1"), "over the limit of 64000000", id="large"),
        pytest.param(icon(png(9000, 8000, "1")), "over the limit of 64000000", id="large icon"),
    ],
)
def test_what_is_no_image_to_embed_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(ApiError, match=message) as caught:
        decode(content, "input[3].image", LIMITS)
    assert caught.value.message.startswith("input[3].image")


def test_a_file_over_the_limit_is_refused_before_it_is_decoded(golden: Golden) -> None:
    loader = ImageLoader(Settings(max_image_bytes=1000))
    with pytest.raises(ApiError, match="over the limit of 1000 bytes"):
        asyncio.run(loaded(loader, base64.b64encode(golden.images[0].read_bytes()).decode(), "input"))
