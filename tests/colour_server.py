"""An embedding server of ours, played, whose model knows colours: for tests of what shows where a word was found.

The words red, green and blue are unit vectors, a patch is the colours in it, and any other word is like nothing else.
So a test knows which page must be first, and where on it the map must be highest. Tokens are cut as by the real
tokenizer, as far as `document_search.words` needs it: the prefix is two tokens, and each word is one with its space.
"""

import base64
import contextlib
import hashlib
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from jina_v4_client.scoring import image_grid
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import save
from servers import free_port
from unit_rows import to_unit

COLOURS = {"red": 0, "green": 1, "blue": 2}
WIDTH, DENSE = 128, 256
N_BEFORE, N_BEHIND = 4, 7  # rows of the image prompt around the patches
TASK = "retrieval"

Array = NDArray[np.float32]


def word_row(word: str) -> Array:
    row = np.zeros(WIDTH, dtype=np.float32)
    if word.lower() in COLOURS:
        row[COLOURS[word.lower()]] = 1
    else:
        seed = list(hashlib.sha256(word.encode()).digest())
        row[8:] = np.random.default_rng(seed).standard_normal(WIDTH - 8)
    return to_unit(row)


def text_rows(text: str) -> Array:
    """(n_tokens, 128)"""
    return np.stack([word_row(word) for word in ("Query", ":", *text.split(" "))])


def image_rows(image: Image.Image, max_pixels: int) -> Array:
    """(n_tokens, 128)"""
    rows, columns = image_grid(*image.size, max_pixels)
    shares = np.asarray(image.convert("RGB").resize((columns, rows), Image.Resampling.BOX), dtype=np.float32) / 255
    patches = np.zeros((rows * columns, WIDTH), dtype=np.float32)
    colour = shares.reshape(-1, 3)
    patches[:, :3] = colour - colour.min(axis=1, keepdims=True)  # grey is no colour
    patches[:, 3] = 0.3
    frame = np.stack([word_row(f"prompt {i}") for i in range(N_BEFORE + N_BEHIND)])
    return np.concatenate([frame[:N_BEFORE], to_unit(patches), frame[N_BEFORE:]])


def dense(rows: Array) -> Array:
    padded = np.zeros(DENSE, dtype=np.float32)
    padded[:WIDTH] = rows.mean(axis=0)
    return to_unit(padded)


class ColourServer:
    """The server; it can be away or fail for a while, and hold images back until a test lets them through."""

    def __init__(self) -> None:
        self.port = free_port()
        self.passing = threading.Semaphore(0)
        self.holding = threading.Event()
        self.failing: int | None = None  # the status of every reply
        self._httpd: ThreadingHTTPServer | None = None
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                content = self.rfile.read(int(self.headers.get("content-length", 0)))
                if outer.failing is not None:
                    self.send_error(outer.failing)
                    return
                if self.path == "/v1/models":
                    card = {"id": f"jina-embeddings-v4-{TASK}", "max_model_len": 32768}
                    reply, kind = json.dumps({"object": "list", "data": [card]}).encode(), "application/json"
                else:
                    reply, kind = outer._embed(json.loads(content)), "application/x-safetensors"
                self.send_response(200)
                headers = {"x-jina-v4-task": TASK, "x-jina-v4-pooling": "engine", "content-type": kind}
                headers |= {"x-request-id": self.headers.get("x-request-id", "none")}
                for name, value in (headers | {"content-length": str(len(reply))}).items():
                    self.send_header(name, value)
                self.end_headers()
                with contextlib.suppress(ConnectionError):
                    self.wfile.write(reply)

            do_GET = do_POST = answer  # noqa: N815

            def log_message(self, *args: object) -> None:
                pass

        self._httpd = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._thread = threading.Thread(target=self._httpd.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        assert self._httpd is not None
        assert self._thread is not None
        self.release()
        self._httpd.shutdown()
        self._thread.join()
        self._httpd.server_close()

    def hold_images(self) -> None:
        """Hold requests with images until `passing` is released once for each, or `release` is called."""
        self.passing = threading.Semaphore(0)
        self.holding.set()

    def release(self) -> None:
        self.holding.clear()
        self.passing.release(1000)

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        self.stop()
        try:
            yield
        finally:
            self.start()

    def _embed(self, body: dict[str, object]) -> bytes:
        items = body["input"]
        assert isinstance(items, list)
        if self.holding.is_set() and any("image" in item for item in items):
            self.passing.acquire()
        max_pixels = int(str(body.get("max_pixels", 602112)))
        rows = [self._rows(item, max_pixels) for item in items]
        tensors: dict[str, NDArray[np.float32 | np.int64]] = {}
        outputs = body["outputs"]
        assert isinstance(outputs, list)
        if "dense" in outputs:
            tensors["dense"] = np.stack([dense(part) for part in rows])
        if "multivector" in outputs:
            tensors["multivector"] = np.concatenate(rows)
            tensors["offsets"] = np.cumsum([0, *map(len, rows)], dtype=np.int64)
        return save(tensors, {"model": "x"})

    @staticmethod
    def _rows(item: dict[str, str], max_pixels: int) -> Array:
        if "text" in item:
            return text_rows(item["text"])
        with Image.open(io.BytesIO(base64.b64decode(item["image"].partition(",")[2] or item["image"]))) as image:
            return image_rows(image, max_pixels)
