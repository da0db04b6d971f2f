"""The wire as a test sees it: requests to a server, what every refusal must hold, and a site that URLs can lead to."""

import base64
import contextlib
import json
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

import doors
import httpx2
import numpy as np
from conftest import GOLDEN, Golden
from jina_v4_client import AsyncEmbeddingsClient
from near import largest_difference
from numpy.typing import NDArray
from safetensors.numpy import load

TASK = "retrieval"
BOUND = 1e-5
SAFETENSORS = "application/x-safetensors"
TEXTS: list[str] = json.loads((GOLDEN / "texts.json").read_text())
IMAGES = sorted((GOLDEN / "img").glob("*.png"))
IMAGES_BASE64 = [base64.b64encode(path.read_bytes()).decode() for path in IMAGES]

# Limits that a test can reach; the golden rows stay far below them.
MAX_BODY_BYTES = 8 * 2**20
MAX_IMAGE_BYTES = 2 * 2**20
MAX_ITEMS = 64
MAX_LENGTH = 8192  # tokens; the server's own 32,768 take half a minute on a CPU
BODY_TIMEOUT_S = 4
FETCH_TIMEOUT_S = 4
PDF_TIMEOUT_S = 6  # of processor time
MAX_PDF_PAGES = 40
PDF_MEMORY_BYTES = 2**29
ENVIRONMENT = {
    "JINA_V4_IMAGE_HOSTS": "127.0.0.1",
    "JINA_V4_MAX_BODY_BYTES": str(MAX_BODY_BYTES),
    "JINA_V4_MAX_IMAGE_BYTES": str(MAX_IMAGE_BYTES),
    "JINA_V4_MAX_ITEMS": str(MAX_ITEMS),
    "JINA_V4_BODY_TIMEOUT_S": str(BODY_TIMEOUT_S),
    "JINA_V4_FETCH_TIMEOUT_S": str(FETCH_TIMEOUT_S),
    "JINA_V4_PDF_TIMEOUT_S": str(PDF_TIMEOUT_S),
    "JINA_V4_MAX_PDF_PAGES": str(MAX_PDF_PAGES),
    "JINA_V4_MAX_PDF_BYTES": str(MAX_IMAGE_BYTES),
    "JINA_V4_PDF_MEMORY_BYTES": str(PDF_MEMORY_BYTES),
    "JINA_V4_ALLOWED_ORIGINS": doors.ORIGIN,
}

# What no message may show: where our files lie, what they are called, what we are made of.
LEAKS = re.compile(
    r"Traceback|site-packages|\.py\b|/(usr|home|root|tmp|opt|work)/|jina_v4_|pydantic|aiohttp|vllm|<class|0x"
)

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Wire:
    """One server, spoken to in plain HTTP."""

    base_url: str
    http: httpx2.Client

    def post(self, body: object = None, content: bytes | None = None, **headers: str) -> httpx2.Response:
        content = json.dumps(body).encode() if content is None else content
        sent = {"content-type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
        return self.http.post("/v1/embeddings", content=content, headers=sent)

    def ask(self, body: object, **headers: str) -> Any:
        """Return the JSON of an answer that must be 200."""
        answer = self.post(body, **headers)
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == "application/json"
        return answer.json()

    def golden_difference(self, golden: Golden) -> float:
        """Return the largest difference of any element of any golden row of the task, both prompts, both outputs."""
        found: list[Array] = []
        expected: list[Array] = []
        for prompt_name in ("query", "passage"):
            items = [{"text": text} for text in TEXTS] + [{"image": image} for image in IMAGES_BASE64]
            body = {"input": items, "prompt_name": prompt_name, "outputs": ["dense", "multivector"]}
            answer = self.post(body, accept=SAFETENSORS)
            assert answer.status_code == 200, answer.text
            tensors = load(answer.content)
            names = [f"{prompt_name}/{i}" for i in range(len(TEXTS))] + [f"image/{i}" for i in range(len(IMAGES))]
            for i, name in enumerate(names):
                rows = tensors["multivector"][tensors["offsets"][i] : tensors["offsets"][i + 1]]
                found += [tensors["dense"][i], rows]
                expected += [golden.rows[f"{TASK}/{name}/{output}"] for output in ("dense", "multi")]
        return largest_difference(found, expected)


async def golden_difference_of(client: AsyncEmbeddingsClient, golden: Golden, name: str, task: str = TASK) -> float:
    """Embed the input of a golden row, such as query/0 or image/0; return the largest difference of both outputs."""
    source, number = name.split("/")
    prefix = "Passage" if source == "passage" and task != "text-matching" else "Query"  # it knows one prompt
    item = golden.images[int(number)] if source == "image" else f"{prefix}: {golden.texts[int(number)]}"
    (found,) = await client.encode_both([item], task=task)
    expected = [golden.rows[f"{task}/{name}/{output}"] for output in ("dense", "multi")]
    return largest_difference([found.dense, found.multivector], expected)


def array(values: object) -> Array:
    return np.array(values, dtype=np.float32)


def assert_near(found: Sequence[Array], expected: Sequence[Array], bound: float = BOUND) -> None:
    difference = largest_difference(found, expected)
    print(f"largest difference: {difference:.1e}")
    assert difference <= bound


def assert_refused(answer: httpx2.Response, status: int, fragment: str, param: str | None = None) -> None:
    """Check a refusal: status, message and field, and that both kinds of client can read it and nothing leaks."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-jina-v4-task"] == TASK
    content = answer.json()
    assert content.keys() <= {"error", "detail", "errors"}
    assert content["error"].keys() == {"message", "type", "param", "code"}
    message = content["error"]["message"]
    assert fragment in message, message
    assert content["error"]["type"] == ("not_found_error" if status == 404 else "invalid_request_error")
    if param is not None:
        assert content["error"]["param"] == param
    code, request_id = content["error"]["code"], answer.headers["x-request-id"]
    assert re.fullmatch(r"[A-Z_]+", code)
    assert content["detail"] == {"message": message, "request_id": request_id, "code": code}
    if status == 422:
        (error,) = content["errors"]
        assert error.keys() == {"field", "message", "type", "input"}
        assert error["field"] == f"body -> {content['error']['param']}"
        assert len(error["input"] or "") <= 80
    assert not LEAKS.search(message), message
    assert len(message) < 500


class Site:
    """A web site on 127.0.0.1 with pictures, and with everything that a stranger's site may do instead."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.seen: list[str] = []
        self._closing = threading.Event()
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.seen.append(self.path)
                with contextlib.suppress(ConnectionError):
                    site.answer(self, self.path, files)

            def log_message(self, *args: object) -> None:
                pass

        self._httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._httpd.daemon_threads = False  # each is waited for, so that no socket is left open
        self._thread = threading.Thread(target=self._httpd.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._httpd.server_port}"

    def answer(self, handler: BaseHTTPRequestHandler, path: str, files: Mapping[str, bytes]) -> None:
        kind, _, rest = path.lstrip("/").partition("/")
        if path.lstrip("/") in files:
            self._send(handler, 200, files[path.lstrip("/")])
        elif kind == "status":
            self._send(handler, int(rest), b"")
        elif kind == "to":  # /to/http://... redirects there
            self._send(handler, 302, b"", location=unquote(rest))
        elif kind == "loop":
            self._send(handler, 307, b"", location=path)
        elif kind == "hops":  # so many redirects, then the picture that is named after them
            n_hops, _, name = rest.partition("/")
            self._send(handler, 302, b"", location=f"/hops/{int(n_hops) - 1}/{name}" if int(n_hops) > 1 else f"/{name}")
        elif kind == "endless":
            handler.send_response(200)
            handler.end_headers()
            while not self._closing.is_set():
                handler.wfile.write(b"\0" * 65536)
        elif kind == "slow":
            self._closing.wait(30)
        elif kind == "drip":
            handler.send_response(200)
            handler.end_headers()
            while not self._closing.wait(0.2):
                handler.wfile.write(b"\x89")
        elif kind == "broken":
            handler.send_response(200)
            handler.send_header("content-length", "100000")
            handler.end_headers()
            handler.wfile.write(b"\x89PNG\r\n\x1a\n")
        else:
            self._send(handler, 404, b"nothing here")

    def close(self) -> None:
        self._closing.set()
        self._httpd.shutdown()
        self._thread.join()
        self._httpd.server_close()

    @staticmethod
    def _send(handler: BaseHTTPRequestHandler, status: int, content: bytes, **headers: str) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value.encode().decode("latin-1"))
        handler.send_header("content-length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)


@contextlib.contextmanager
def opened_site(files: Mapping[str, bytes]) -> Iterator[Site]:
    site = Site(files)
    try:
        yield site
    finally:
        site.close()
