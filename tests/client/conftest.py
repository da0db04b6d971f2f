"""A real HTTP server on a free port of this machine, which plays whatever server a test needs."""

import asyncio
import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
from jina_v4_client import AsyncEmbeddingsClient, EmbeddingsClient
from numpy.typing import NDArray
from safetensors.numpy import save

TASKS = ("retrieval", "text-matching", "code")
HIDDEN = 256
HEAD, TAIL = 3, 6  # tokens of the image prompt before vision_start and after vision_end
MAX_MODEL_LEN = 4096


@dataclass(frozen=True)
class Seen:
    """A request as it arrived."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any


@dataclass(frozen=True)
class Answer:
    """What the server sends back.

    With `announced` more than the body, the connection breaks in the middle of it; with `dropped` it breaks at once;
    with `pause_s` the body comes in small pieces with pauses between them.
    """

    content: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    announced: int | None = None
    dropped: bool = False
    pause_s: float = 0.0


Play = Callable[[Seen], Answer]


class Listener(ThreadingHTTPServer):
    """With room for many connections at once; past the usual five the kernel resets them."""

    request_queue_size = 128


class FakeServer:
    """Answers each path as told; keeps every request.

    Its static methods are for tests, which cannot import from a conftest.
    """

    def __init__(self) -> None:
        self.routes: dict[str, Play] = {}
        self.seen: list[Seen] = []
        self.revisions: dict[str, str] = {}  # by task; the server tells them once there are any
        self.closing = threading.Event()  # whoever plays a slow server waits for this
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                length = int(self.headers.get("content-length", 0))
                content = self.rfile.read(length)
                headers = {name.lower(): value for name, value in self.headers.items()}
                seen = Seen(self.command, self.path, headers, json.loads(content) if content else None)
                outer.seen.append(seen)
                play = outer.routes.get(self.path, lambda _: outer.json_answer({"detail": "Not Found"}, 404))
                answer = play(seen)
                if answer.dropped:
                    return
                self.send_response(answer.status)
                echoed = {"x-request-id": headers.get("x-request-id", "none")}  # as our servers and the gateway do
                for name, value in (echoed | answer.headers).items():
                    if value is not None:  # None: not even what is always there
                        self.send_header(name, value)
                self.send_header("content-length", str(answer.announced or len(answer.content)))
                self.end_headers()
                step = 20 if answer.pause_s else max(1, len(answer.content))
                with contextlib.suppress(ConnectionError):
                    for start in range(0, len(answer.content), step):
                        self.wfile.write(answer.content[start : start + step])
                        outer.closing.wait(answer.pause_s)

            do_GET = do_POST = answer  # noqa: N815

            def log_message(self, *args: object) -> None:
                pass

        self._httpd = Listener(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._httpd.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._httpd.server_port}"

    def paths(self) -> list[str]:
        return [seen.path for seen in self.seen]

    def bodies(self, path: str) -> list[Any]:
        return [seen.body for seen in self.seen if seen.path == path]

    def close(self) -> None:
        self.closing.set()
        self._httpd.shutdown()
        self._thread.join()
        self._httpd.server_close()

    def play_ours(
        self, task: str = "retrieval", change: Callable[[dict[str, NDArray[Any]]], object] = lambda _: None
    ) -> None:
        """Serve one task as our server does; `change` may spoil the tensors of embeddings."""
        self.play_gateway((task,), lambda _: task, change)

    def play_gateway(
        self,
        tasks: Sequence[str] = TASKS,
        answered_by: Callable[[str], str] = lambda task: task,
        change: Callable[[dict[str, NDArray[Any]]], object] = lambda _: None,
        json_only: bool = False,
    ) -> None:
        """Serve several tasks as a gateway before our servers does; `answered_by` tells whose server gets a task."""
        cards = [{"id": f"jina-embeddings-v4-{task}", "max_model_len": MAX_MODEL_LEN} for task in tasks]

        def embed(seen: Seen) -> Answer:
            answer = vectors(seen)
            return self.with_revisions(answer, [answered_by(seen.body["task"])])

        def vectors(seen: Seen) -> Answer:
            body = seen.body
            as_tensors, _, dtype = seen.headers["accept"].partition("; dtype=")
            prefix = {"passage": "Passage: ", "none": ""}.get(body.get("prompt_name"), "Query: ")
            items = [item.get("image") or prefix + item["text"] for item in body["input"]]
            tensors: dict[str, NDArray[Any]] = {}
            if "dense" in body["outputs"]:
                tensors["dense"] = np.stack([self.vector(item, body.get("dimensions", HIDDEN)) for item in items])
            if "multivector" in body["outputs"]:
                parts = [self.token_rows(item) for item in items]
                tensors["multivector"] = np.concatenate(parts)
            tensors = {name: rows.astype(dtype or "float32") for name, rows in tensors.items()}
            if "multivector" in tensors:
                tensors["offsets"] = np.cumsum([0, *map(len, parts)], dtype=np.int64)
            change(tensors)
            if json_only or as_tensors != "application/x-safetensors":
                return self.vectors_answer(tensors, body.get("encoding_format", "float"), answered_by(body["task"]))
            return self.tensors_answer(tensors, answered_by(body["task"]))

        told = {"x_jina_v4_task": ",".join(tasks), "x_jina_v4_pooling": "engine"}
        listed = {"object": "list", "data": cards}
        self.routes["/v1/models"] = lambda _: self.with_revisions(self.json_answer(listed, **told), tasks)
        self.routes["/v1/embeddings"] = embed

    def with_revisions(self, answer: Answer, tasks: Sequence[str]) -> Answer:
        if self.revisions:
            answer.headers["x-jina-v4-revision"] = ", ".join(self.revisions.get(task, "") for task in tasks)
        return answer

    def play_stock(
        self,
        model: str = "jina-embeddings-v4-retrieval",
        root: str = "/models/checkpoint",
        rows_of: Callable[[object], NDArray[np.float32]] | None = None,
        change: Callable[[dict[str, Any]], object] = lambda _: None,
    ) -> None:
        """Serve hidden states as a stock vLLM does; `change` may spoil the header that describes them."""
        card = {"id": model, "max_model_len": MAX_MODEL_LEN, "root": root}

        def pool(seen: Seen) -> Answer:
            items = seen.body.get("input") or [seen.body["messages"]]
            arrays = [(rows_of or self.text_rows)(item) for item in items]
            data, start = [], 0
            for index, array in enumerate(arrays):
                end = start + array.nbytes
                layout = {"embed_dtype": "float32", "endianness": "little", "shape": list(array.shape)}
                data.append({"index": index, "start": start, "end": end, **layout})
                start = end
            metadata = {"data": data, "usage": {"prompt_tokens": sum(map(len, arrays))}}
            change(metadata)
            content = b"".join(array.tobytes() for array in arrays)
            return Answer(content, headers={"metadata": json.dumps(metadata)})

        self.routes["/v1/models"] = lambda _: self.json_answer({"object": "list", "data": [card]})
        self.routes["/pooling"] = pool

    @staticmethod
    def answer(content: bytes, status: int = 200, announced: int | None = None, **headers: str) -> Answer:
        return Answer(content, status, {name.replace("_", "-"): value for name, value in headers.items()}, announced)

    @staticmethod
    def dropped() -> Answer:
        return Answer(b"", dropped=True)

    @staticmethod
    def slowed(answer: Answer, pause_s: float) -> Answer:
        return replace(answer, pause_s=pause_s)

    @staticmethod
    def json_answer(document: object, status: int = 200, **headers: str) -> Answer:
        content = json.dumps(document).encode()
        return FakeServer.answer(content, status, content_type="application/json", **headers)

    @staticmethod
    def tensors_answer(tensors: dict[str, NDArray[Any]], task: str = "retrieval") -> Answer:
        content = save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, {"model": "x"})
        headers = {"x_jina_v4_task": task, "x_jina_v4_pooling": "engine"}
        return FakeServer.answer(content, content_type="application/x-safetensors", **headers)

    @staticmethod
    def vectors_answer(tensors: dict[str, NDArray[Any]], encoding: str, task: str = "retrieval") -> Answer:
        """As JSON, in OpenAI's form, or Jina's for multi-vectors."""

        def written(row: NDArray[Any]) -> object:
            row = row.astype("<f4")
            return base64.b64encode(row.tobytes()).decode() if encoding == "base64" else row.astype(float).tolist()

        n_items = len(tensors["dense"]) if "dense" in tensors else len(tensors["offsets"]) - 1
        data: list[dict[str, Any]] = [{"index": i} for i in range(n_items)]
        for entry, row in zip(data, tensors.get("dense", ()), strict=False):
            entry["embedding"] = written(row)
        if "multivector" in tensors:
            parts = np.split(tensors["multivector"], tensors["offsets"][1:-1])
            for entry, rows in zip(data, parts, strict=True):
                entry["embeddings"] = [written(row) for row in rows]
        headers = {"x_jina_v4_task": task, "x_jina_v4_pooling": "engine"}
        return FakeServer.json_answer({"object": "list", "data": data}, **headers)

    @staticmethod
    def html_answer(status: int = 200) -> Answer:
        content = b"<!DOCTYPE html><html><body>Welcome</body></html>"
        return FakeServer.answer(content, status, content_type="text/html")

    @staticmethod
    def vector(item: object, dim: int = HIDDEN) -> NDArray[np.float32]:
        """The vector that the played server of ours gives for an item: always the same."""
        vector = random_of(item).standard_normal(dim)
        return (vector / np.linalg.norm(vector)).astype("<f4")

    @staticmethod
    def token_rows(item: object) -> NDArray[np.float32]:
        """The multi-vector that the played server of ours gives for an item: one unit row a word."""
        rows = random_of(item).standard_normal((len(str(item).split()), 128))
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype("<f4")

    @staticmethod
    def text_rows(item: object) -> NDArray[np.float32]:
        """The hidden states that the played stock server gives for a text: one row a word."""
        return (10 * random_of(item).standard_normal((len(str(item).split()), HIDDEN))).astype("<f4")

    @staticmethod
    def image_rows(n_image_tokens: int) -> NDArray[np.float32]:
        """Hidden states of an image prompt with so many pads."""
        n_tokens = HEAD + 1 + n_image_tokens + 1 + TAIL
        return (10 * random_of(n_image_tokens).standard_normal((n_tokens, HIDDEN))).astype("<f4")


def random_of(item: object) -> np.random.Generator:
    return np.random.default_rng(list(hashlib.sha256(json.dumps(item).encode()).digest()))


class Awaited:
    """An AsyncEmbeddingsClient that is called like an EmbeddingsClient."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._runner = asyncio.Runner()
        self.client = AsyncEmbeddingsClient(*args, **kwargs)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        async def call(*args: Any, **kwargs: Any) -> Any:
            return await getattr(self.client, name)(*args, **kwargs)

        return lambda *args, **kwargs: self._runner.run(call(*args, **kwargs))

    def __enter__(self) -> "Awaited":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self._runner.close()


@pytest.fixture(params=[EmbeddingsClient, Awaited], ids=["sync", "async"])
def make_client(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Makes clients of either kind, for the task retrieval; their pauses are short."""
    monkeypatch.setattr("jina_v4_client._send._FIRST_PAUSE_S", 0.01)
    with contextlib.ExitStack() as stack:
        yield lambda *args, **kwargs: stack.enter_context(request.param(*args, **{"task": "retrieval", **kwargs}))


@pytest.fixture(autouse=True)
def no_settings_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("JINA_V4_API_KEY", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer()
    yield fake
    fake.close()


@pytest.fixture
def client(server: FakeServer) -> Iterator[EmbeddingsClient]:
    with EmbeddingsClient(server.url, task="retrieval", max_retries=0) as made:
        yield made
