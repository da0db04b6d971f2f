"""Mixed requests as many users make them, good and bad, drawn in a fixed order, and what an answer to each must be.

Some inputs come again and again: their vectors are compared with the first answer. Others come once only, so that what
a server keeps of each would show.
"""

import asyncio
import base64
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import numpy as np
from _data import IMAGES, make_image, make_texts
from numpy.typing import NDArray
from safetensors.numpy import load

Floats = NDArray[np.float32]
SAFETENSORS = "application/x-safetensors"
ANSWER_TIMEOUT_S = 120.0
N_REPEATED = 6  # inputs of each size that come again and again
# How often each kind of request is drawn; sizes as _data.py names them, a number is tokens.
WEIGHTS = {
    "text 16": 26,
    "text 128": 16,
    "text 512": 6,
    "text 2048": 1,
    "thumbnail": 10,
    "page": 1,
    "new text": 8,
    "new thumbnail": 10,
    "new page": 1,
    "bad": 12,
    "hung up": 6,
    "half a body": 3,
}
# Each is refused with a 4xx; what a server answers in detail is tested elsewhere.
BAD = (
    b"{",
    b"[]",
    b"\xff\xfe",
    {"input": []},
    {"input": [1, 2, 3]},
    {"input": "x", "dimensions": 3000},
    {"input": "x", "dimensions": "many"},
    {"input": "x", "embedding_type": "float128"},
    {"input": "x", "return_multivector": True, "dimensions": 128},
    {"input": "x", "task": "translation"},
    {"input": "x", "model": "another-model"},
    {"input": {"image": "data:image/png;base64,AAAA"}},
    {"input": {"image": "http://127.0.0.1:1/private.png"}},
    {"input": ["a good one", {"image": "not base64"}]},
    {"input": "word " * 40000},
)
# Largest difference of an element from the first answer for the same input: rounding follows the batch.
BOUNDS = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 1e-2}


@dataclass(frozen=True)
class Case:
    """One request.

    Attributes:
        kind: of `WEIGHTS`.
        body: as sent.
        accept: the header.
        keys: of its items: equal keys, equal vectors. Empty where nothing is compared.
    """

    kind: str
    body: bytes
    accept: str = "application/json"
    keys: tuple[str, ...] = ()


@dataclass
class Tally:
    """What came of the requests.

    Attributes:
        outcomes: by kind and status, or the name of an error.
        unexpected: those outcomes that should not have been.
        messages: of unexpected answers, one a kind and status.
        latencies_ms: of the good requests since the last look.
        largest_difference: of any element from the first answer for the same input.
        n_compared: vectors.
        n_wrong: of them further away than the bound.
        revisions: of the model by task, as answers named them.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    unexpected: Counter[str] = field(default_factory=Counter)
    messages: dict[str, str] = field(default_factory=dict)
    latencies_ms: list[float] = field(default_factory=list)
    largest_difference: float = 0.0
    n_compared: int = 0
    n_wrong: int = 0
    revisions: dict[str, set[str]] = field(default_factory=dict)


class Traffic:
    """Draws requests and sends them to one address."""

    def __init__(
        self, client: httpx2.AsyncClient, base_url: str, tasks: Sequence[str], checkpoint: Path, seed: int = 0
    ) -> None:
        """Make the inputs that are repeated.

        Args:
            client: sends.
            base_url: of a gateway or server.
            tasks: that it serves.
            checkpoint: any of theirs: they share the tokenizer.
            seed: another one draws other requests.
        """
        self.tally = Tally()
        self._client = client
        self._base_url = base_url
        self._tasks = tasks
        self._drawn = random.Random(seed)  # noqa: S311 - no secret
        self._first: dict[str, Floats] = {}
        self._n_new = 0
        self._texts = {
            name: make_texts(checkpoint, [int(name.split()[1])] * N_REPEATED, seed)
            for name in WEIGHTS
            if name.startswith("text ")
        }
        self._images = {name: [_image_item(name, i) for i in range(N_REPEATED)] for name in IMAGES}

    def pause_s(self, rate_per_s: float) -> float:
        """Draw the time until the next request."""
        return self._drawn.expovariate(rate_per_s)

    def draw(self) -> Case:
        """Return the next request."""
        (kind,) = self._drawn.choices(list(WEIGHTS), list(WEIGHTS.values()))
        task = self._drawn.choice(self._tasks)
        if kind == "bad":
            bad = self._drawn.choice(BAD)
            body = bad if isinstance(bad, bytes) else json.dumps({"task": task, **bad}).encode()
            return Case(kind, body)
        items, names = self._items(kind)
        asked = self._drawn.choice(({}, {}, {"dimensions": 128}, {"outputs": ["multivector"]}, {"outputs": "both"}))
        if asked == {"outputs": "both"}:
            asked = {"outputs": ["dense", "multivector"]}
        prompt_name = "query" if task == "text-matching" else self._drawn.choice(("query", "passage"))
        fields: dict[str, Any] = {"task": task, "prompt_name": prompt_name, "input": items, **asked}
        accept = self._drawn.choice(("application/json", SAFETENSORS))
        if accept != SAFETENSORS and "outputs" not in asked:
            fields["embedding_type"] = self._drawn.choice(("float", "base64"))
        keys = tuple(f"{task}/{prompt_name}/{name}/{asked.get('dimensions')}" for name in names)
        return Case(kind, json.dumps(fields).encode(), accept, keys)

    def _items(self, kind: str) -> tuple[list[Any], list[str]]:
        """Draw the items of a request, and the names of those that come again."""
        if kind.startswith("new"):
            self._n_new += 1
            if kind == "new text":
                return [f"{self._n_new} {self._drawn.random()} is a text that comes once"], []
            return [_image_item(kind.removeprefix("new "), N_REPEATED + self._n_new)], []
        pool: Sequence[Any] = self._images.get(kind) or self._texts.get(kind) or self._texts["text 512"]
        longest = 1 if kind in ("page", "text 2048") else 4
        places = [self._drawn.randrange(N_REPEATED) for _ in range(self._drawn.randint(1, longest))]
        return [pool[i] for i in places], [f"{kind}/{i}" for i in places]

    async def send(self, case: Case) -> None:
        """Send a request, and note what came of it."""
        begin = time.perf_counter()
        try:
            if case.kind == "half a body":
                outcome = await self._send_half(case)
            else:
                outcome = await self._send(case, begin)
        except (httpx2.HTTPError, TimeoutError, OSError) as error:
            outcome = type(error).__name__
        self.tally.outcomes[f"{case.kind}: {outcome}"] += 1
        if not _is_expected(case.kind, outcome):
            self.tally.unexpected[f"{case.kind}: {outcome}"] += 1

    async def _send(self, case: Case, begin: float) -> str:
        # Whoever hangs up does so at any moment: before the server has read, in its work, after.
        patience_s = self._drawn.uniform(0.001, 0.3) if case.kind == "hung up" else ANSWER_TIMEOUT_S
        headers = {"content-type": "application/json", "accept": case.accept}
        try:
            async with asyncio.timeout(patience_s):
                url = f"{self._base_url}/v1/embeddings"
                answer = await self._client.post(url, content=case.body, headers=headers)
        except TimeoutError:
            return "left" if case.kind == "hung up" else "no answer"
        if answer.status_code == 200 and case.kind != "bad":
            if case.kind != "hung up":
                self.tally.latencies_ms.append(1000 * (time.perf_counter() - begin))
            self._judge(case, answer)
        outcome = str(answer.status_code)
        if not _is_expected(case.kind, outcome):
            self.tally.messages.setdefault(f"{case.kind}: {outcome}", answer.text[:300])
        return outcome

    async def _send_half(self, case: Case) -> str:
        where = urlsplit(self._base_url)
        _, writer = await asyncio.open_connection(where.hostname, where.port)
        head = f"POST /v1/embeddings HTTP/1.1\r\nhost: soak\r\ncontent-length: {len(case.body)}\r\n\r\n"
        writer.write(head.encode() + case.body[: len(case.body) // 2])
        await writer.drain()
        await asyncio.sleep(self._drawn.uniform(0, 0.2))
        writer.close()
        return "left"

    def _judge(self, case: Case, answer: httpx2.Response) -> None:
        """Compare an answer's vectors with the first ones for the same inputs."""
        task = answer.headers.get("x-jina-v4-task", "?")
        revision = answer.headers.get("x-jina-v4-revision", "?")
        self.tally.revisions.setdefault(task, set()).add(revision)
        bound = next((bound for dtype, bound in BOUNDS.items() if f"-{dtype}-" in revision), BOUNDS["bfloat16"])
        for output, vectors in vectors_of(answer).items():
            if not all(np.isfinite(rows).all() for rows in vectors):
                self.tally.n_wrong += 1
            if case.keys and len(vectors) != len(case.keys):
                self.tally.n_wrong += 1
                continue
            for key, rows in zip(case.keys, vectors, strict=False):
                first = self._first.setdefault(f"{key}/{output}", rows)
                same_shape = first.shape == rows.shape
                difference = float(np.abs(first - rows).max()) if same_shape else float("inf")
                self.tally.n_compared += 1
                self.tally.n_wrong += not difference <= bound
                self.tally.largest_difference = max(self.tally.largest_difference, difference)

    async def poll(self, path: str) -> None:
        """Ask as an orchestrator or Prometheus does."""
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                outcome = str((await self._client.get(f"{self._base_url}{path}")).status_code)
        except (httpx2.HTTPError, TimeoutError) as error:
            outcome = type(error).__name__
        self.tally.outcomes[f"{path}: {outcome}"] += 1
        if outcome != "200":
            self.tally.unexpected[f"{path}: {outcome}"] += 1


def _image_item(name: str, number: int) -> dict[str, str]:
    return {"image": base64.b64encode(make_image(name, number)).decode()}


def _is_expected(kind: str, outcome: str) -> bool:
    """Tell whether an outcome may be: good requests succeed or are refused for their number, bad ones are told so."""
    if kind == "bad":
        return outcome.startswith("4")
    allowed = {"200", "429"}
    if kind in ("hung up", "half a body"):
        # A server that has given up reading resets the connection: whoever hangs up has no claim to an answer.
        allowed |= {"left", "ReadError", "WriteError", "RemoteProtocolError", "ConnectionResetError"}
    return outcome in allowed


def vectors_of(answer: httpx2.Response) -> dict[str, list[Floats]]:
    """Return the vectors of an answer by output, for each item (hidden,) or (n_tokens, 128)."""
    if answer.headers["content-type"].startswith(SAFETENSORS):
        arrays = load(answer.content)
        found = {name: list(arrays[name]) for name in ("dense",) if name in arrays}
        if "multivector" in arrays:
            found["multivector"] = np.split(arrays["multivector"], arrays["offsets"][1:-1])
        return found
    items = answer.json()["data"]
    found = {}
    for name, output in (("embedding", "dense"), ("embeddings", "multivector")):
        if items and name in items[0]:
            found[output] = [_floats(item[name]) for item in items]
    return found


def _floats(value: Any) -> Floats:
    if isinstance(value, str):
        return np.frombuffer(base64.b64decode(value), "<f4")
    return np.asarray(value, np.float32)
