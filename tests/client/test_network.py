"""The client's own way to the network: TLS, other event loops, large replies, connections that ended."""

import asyncio
import contextlib
import datetime
import importlib.util
import ipaddress
import socket
import ssl
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from jina_v4_client import ArgumentError, AsyncEmbeddingsClient, EmbeddingsClient, ServerConnectionError
from jina_v4_client._fetch import trusted
from jina_v4_client._transport import Http


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A file with a key and its certificate, which nobody signed, of 127.0.0.1."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file = tmp_path / "certificate.pem"
    file.write_bytes(secret + made.public_bytes(serialization.Encoding.PEM))
    return file


@pytest.fixture
def tls_url(server: Any, certificate: Path) -> Iterator[str]:
    """The server, behind TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server._httpd.socket = context.wrap_socket(server._httpd.socket, server_side=True)
    trusted.cache_clear()
    yield server.url.replace("http:", "https:")
    trusted.cache_clear()


def test_a_server_with_a_trusted_certificate_is_asked_through_tls(
    server: Any, tls_url: str, certificate: Path, make_client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    server.play_ours()
    texts = [f"text {n}" for n in range(400)]
    found = make_client(tls_url).encode_text(texts, batch_size=200)
    np.testing.assert_array_equal(found, [server.vector(f"Query: {text}") for text in texts])


def test_a_server_with_another_certificate_is_refused(server: Any, tls_url: str, make_client: Any) -> None:
    server.play_ours()
    with pytest.raises(ServerConnectionError, match="CERTIFICATE_VERIFY_FAILED"):
        make_client(tls_url, max_retries=0).encode_text("a")
    assert server.seen == []


def test_a_reply_larger_than_the_buffer_arrives_whole(server: Any, make_client: Any) -> None:
    server.play_ours()
    texts = [f"text {n}" for n in range(1500)]  # 1024 dimensions are 6 MB, sent in pieces
    found = make_client(server.url).encode_text(texts, batch_size=1500, truncate_dim=1024)
    np.testing.assert_array_equal(found, [server.vector(f"Query: {text}", 1024) for text in texts])
    assert server.paths().count("/v1/embeddings") == 1


def answer_with_models(connection: socket.socket) -> None:
    cards = b'{"data": [{"id": "jina-embeddings-v4-retrieval", "max_model_len": 9}]}'
    connection.recv(10_000)
    connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(cards), cards))


def test_a_connection_that_the_server_closed_meanwhile_is_not_used(make_client: Any) -> None:
    """Also where no loop runs between two calls, to be told of it."""
    returned, closed = threading.Event(), threading.Event()

    def answer_twice() -> None:
        for _ in range(2):
            connection, _ = listener.accept()
            with connection:
                answer_with_models(connection)
                returned.wait(100)
            closed.set()

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        listener.settimeout(100)
        answered = pool.submit(answer_twice)
        client = make_client(f"http://127.0.0.1:{listener.getsockname()[1]}", max_retries=0)
        assert client.revision() is None
        returned.set()
        assert closed.wait(100)
        assert client.revision() is None
        answered.result(10)


def test_what_nobody_asked_for_is_not_taken_from_an_idle_connection(make_client: Any) -> None:
    returned = threading.Event()

    def answer_and_go_on() -> int:
        connection, _ = listener.accept()
        with connection:
            answer_with_models(connection)
            returned.wait(100)
            connection.settimeout(1)
            n_sent = 0
            with contextlib.suppress(TimeoutError):
                while n_sent < 2**27:
                    n_sent += connection.send(bytes(2**20))
            return n_sent

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        listener.settimeout(100)
        answered = pool.submit(answer_and_go_on)
        client = make_client(f"http://127.0.0.1:{listener.getsockname()[1]}", max_retries=0)
        assert client.revision() is None
        returned.set()
        assert answered.result(100) < 2**26  # what the system keeps, and a little more


def test_a_connection_whose_request_was_not_read_to_its_end_is_not_used() -> None:
    """A server may refuse a request before it has read it. What is sent behind it would wait for nobody."""
    refusal = b"HTTP/1.1 413 Too Large\r\ncontent-length: 0\r\n\r\n"
    connections: list[socket.socket] = []

    def refuse_unread() -> None:
        for _ in range(2):
            connection, _ = listener.accept()
            connection.recv(1000)
            connection.sendall(refusal)
            connections.append(connection)

    async def send() -> list[int]:
        async with Http(ssl.create_default_context(), trust_env=False) as http:
            url, timeout = f"http://127.0.0.1:{listener.getsockname()[1]}/", httpx2.Timeout(5)
            requests = [
                http.build_request(
                    "POST", url, headers={"host": "h", "content-length": str(n)}, content=bytes(n), timeout=timeout
                )
                for n in (2**25, 10)
            ]
            return [(await http.send(request)).status_code for request in requests]

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        listener.settimeout(100)
        served = pool.submit(refuse_unread)
        assert asyncio.run(send()) == [413, 413]
        served.result(10)
        for connection in connections:
            connection.close()


def test_other_event_loops_than_asyncios_own_can_be_used(server: Any) -> None:
    uvloop = pytest.importorskip("uvloop")
    server.play_ours()

    async def call(url: str) -> Any:
        async with AsyncEmbeddingsClient(url, task="retrieval") as client:
            return await client.encode_text(["a", "b"], batch_size=1)

    for url in (server.url, server.url.replace("127.0.0.1", "localhost")):
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            np.testing.assert_array_equal(runner.run(call(url)), [server.vector("Query: a"), server.vector("Query: b")])


def test_a_header_of_a_stock_server_may_have_100_kb(server: Any, client: EmbeddingsClient) -> None:
    """Which other HTTP libraries refuse."""
    server.play_stock()
    texts = [f"text {n}" for n in range(256)]
    assert len(client.encode_text(texts, batch_size=256)) == 256
    assert server.paths().count("/pooling") == 1


def test_the_environments_proxies_are_used(server: Any, make_client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """They get the whole address of another machine's server."""
    monkeypatch.setenv("http_proxy", server.url)
    cards = {"data": [{"id": "jina-embeddings-v4-retrieval", "max_model_len": 9}]}
    server.routes["http://example.invalid/v1/models"] = lambda _: server.json_answer(cards)
    assert make_client("http://example.invalid", max_retries=0).revision() is None


@pytest.mark.parametrize("proxy", ["ftp://127.0.0.1:9", "http://127.0.0.1:port", "socks5://127.0.0.1:9"])
def test_a_proxy_of_the_environment_that_cannot_be_used_is_named(
    server: Any, make_client: Any, proxy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if proxy.startswith("socks") and importlib.util.find_spec("socksio"):
        pytest.skip("SOCKS can be used here")
    monkeypatch.setenv("all_proxy", proxy)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ArgumentError, match="a proxy in HTTP_PROXY, HTTPS_PROXY or ALL_PROXY cannot be used: "):
        make_client("http://example.invalid").revision()
    with pytest.raises(ArgumentError, match="a proxy in HTTP_PROXY, HTTPS_PROXY or ALL_PROXY cannot be used: "):
        make_client(server.url).encode_image("http://example.invalid/a.png")
