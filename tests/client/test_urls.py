"""Images behind URLs: fetched by the client, as the published model does, within limits."""

from pathlib import Path
from typing import Any

import pytest
from jina_v4_client import EmbeddingsClient, ImageError
from PIL import Image


@pytest.fixture
def picture(tmp_path: Path) -> bytes:
    path = tmp_path / "picture.png"
    Image.new("RGB", (60, 40), (1, 2, 3)).save(path)
    return path.read_bytes()


@pytest.fixture
def site(server: Any, picture: bytes) -> Any:
    """A web site with images, which embeds as well."""
    server.play_ours()
    server.routes["/a.png"] = lambda _: server.answer(picture, content_type="image/png")
    server.routes["/moved"] = lambda _: server.answer(b"", 302, location="/a.png")
    server.routes["/loop"] = lambda _: server.answer(b"", 302, location="/loop")
    server.routes["/to-a-file"] = lambda _: server.answer(b"", 302, location="file:///etc/hostname")
    server.routes["/page"] = lambda _: server.html_answer()
    server.routes["/broken"] = lambda _: server.answer(picture[:50], announced=len(picture))
    server.routes["/truncated"] = lambda _: server.answer(picture[:60])
    server.routes["/large"] = lambda _: server.answer(bytes(3000))
    return server


@pytest.mark.parametrize("path", ["/a.png", "/moved"])
def test_an_image_behind_a_url_is_fetched_here_and_sent_untouched(
    site: Any, client: EmbeddingsClient, picture: bytes, path: str
) -> None:
    from_url = client.encode_image(site.url.replace("http", "HTTP") + path)
    from_bytes = client.encode_image(picture)
    assert (from_url == from_bytes).all()


def test_the_servers_key_does_not_go_to_the_site(site: Any) -> None:
    with EmbeddingsClient(site.url, "hush", task="retrieval") as client:
        client.encode_image(f"{site.url}/a.png")
    (fetched,) = [seen for seen in site.seen if seen.path == "/a.png"]
    assert "hush" not in str(fetched.headers)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_an_image_of_this_machine_is_fetched_without_a_proxy(
    site: Any, client: EmbeddingsClient, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nobody is there
    monkeypatch.delenv("no_proxy", raising=False)
    assert client.encode_image(site.url.replace("127.0.0.1", host) + "/a.png").shape == (256,)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/missing", "the URL answered with status 404"),
        ("/loop", "cannot be fetched .TooManyRedirects"),
        ("/to-a-file", "cannot be fetched .UnsupportedProtocol"),
        ("/page", "not an image"),
        ("/broken", "cannot be fetched .RemoteProtocolError"),
        ("/truncated", "a broken image|not an image"),
        ("/large", "more than 2000 bytes; fetch it yourself"),
    ],
)
def test_an_image_that_cannot_be_fetched_is_named(
    site: Any, client: EmbeddingsClient, monkeypatch: pytest.MonkeyPatch, path: str, message: str
) -> None:
    monkeypatch.setattr("jina_v4_client._fetch.MAX_FETCHED_BYTES", 2000)
    with pytest.raises(ImageError, match=rf"^images\[1\] \('{site.url}{path}'\): ({message})"):
        client.encode_image([f"{site.url}/a.png", f"{site.url}{path}"])
    assert "/v1/embeddings" not in site.paths()


@pytest.mark.parametrize(
    "url", ["http://", "http://[::1", "https://no-such-host.invalid/a.png", "http://127.0.0.1:99999/"]
)
def test_a_url_that_leads_nowhere_is_named(server: Any, client: EmbeddingsClient, url: str) -> None:
    with pytest.raises(ImageError, match=r"^images\[0\] .*cannot be fetched"):
        client.encode_image(url)


def test_a_site_that_trickles_runs_into_the_time_limit(
    site: Any, client: EmbeddingsClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jina_v4_client._fetch._FETCH_TIMEOUT_S", 1e-9)
    with pytest.raises(ImageError, match=r"not fetched within|cannot be fetched .*Timeout"):
        client.encode_image(f"{site.url}/a.png")
