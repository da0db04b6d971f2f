"""The sides that are compared: each is started once, embeds what it is given, and tells what that cost.

`served` is our server with our client. `stock` is vLLM's own server with all-token pooling, the client pooling, which
is today's official way. `in_process` is vLLM's `LLM` with our model class and our launcher's engine arguments.
`transformers-1` and `-8` are plain transformers, batches of so many; `sentence-transformers` takes texts only, and so
does `llama.cpp`, which is there if its Python package is. What is no server runs in a process of its own (`_child.py`).
A side that has just worked may spin for a second.
"""

import base64
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from _child import Vectors, unpack
from _cost import Cost, cost_of
from _data import Inputs
from _servers import (
    QUIET,
    TASK,
    free_port,
    running,
    serve_command,
    stock_command,
    stock_environment,
    tail,
    until_ready,
)
from jina_v4_client import EmbeddingsClient
from jina_v4_serve.checkpoint import read_checkpoint
from jina_v4_serve.launch.checks import prepare
from jina_v4_serve.launch.gpu import known_gpu
from jina_v4_serve.launch.server import ServerSettings
from jina_v4_serve.launch.sizing import needed_bytes, offered_bytes, step_of
from jina_v4_serve.vllm_side.versions import find_vllm
from numpy.typing import NDArray

SERVERS = ("served", "stock")
TEXT_ONLY = ("sentence-transformers", "llama.cpp")
SIDES = (*SERVERS, "in_process", "transformers-1", "transformers-8", *TEXT_ONLY)
TEXT_ONLY_REASON = {
    "sentence-transformers": "images: its mean pooling averages every token of the prompt, the published model's the "
    "vision span alone: other vectors; multi-vectors: its modules have no projector",
    "llama.cpp": "images: the vision tower would be a second file with a program of its own; multi-vectors: the "
    "projector is no part of a GGUF file",
}
OPTIONAL = {
    "llama.cpp": ("llama_cpp", "pip install llama-cpp-python, which is built from source: ten minutes on two cores"),
}


def missing_sides() -> dict[str, str]:
    """Tell which sides need a package that is not installed, and how to install it."""
    return {
        name: f"everything: {module} is not installed: {how}"
        for name, (module, how) in OPTIONAL.items()
        if find_spec(module) is None
    }


@dataclass(frozen=True)
class Work:
    """What it took a side to embed some items once.

    Attributes:
        wall_s: from the first item to the last vector.
        side_cpu_s: of the side's processes: the server's, or all of it where there is none.
        client_cpu_s: of this process while it waited and decoded; None where no client is.
        latencies_ms: of each request, from sending to the last byte; empty where there are none.
        received_bytes: bodies and headers of all answers.
        n_refused: answers with another status than 200.
    """

    wall_s: float
    side_cpu_s: float
    client_cpu_s: float | None = None
    latencies_ms: Sequence[float] = ()
    received_bytes: int = 0
    n_refused: int = 0


@dataclass
class Meter:
    """Watches the requests of one client."""

    latencies_ms: list[float] = field(default_factory=list)
    received_bytes: int = 0
    n_refused: int = 0

    def clear(self) -> None:
        """Start anew."""
        self.latencies_ms, self.received_bytes, self.n_refused = [], 0, 0

    async def on_request(self, request: httpx2.Request) -> None:
        """Note when a request is sent."""
        request.extensions["sent_s"] = time.perf_counter()

    async def on_response(self, response: httpx2.Response) -> None:
        """Note when the answer is there, and its bytes."""
        await response.aread()
        self.latencies_ms.append(1000 * (time.perf_counter() - response.request.extensions["sent_s"]))
        self.received_bytes += response.num_bytes_downloaded
        self.received_bytes += sum(len(name) + len(value) + 4 for name, value in response.headers.raw)
        self.n_refused += response.status_code != httpx2.codes.OK


class Server:
    """A server, and our client to it."""

    def __init__(self, name: str, url: str, pid: int, start_s: float, projector: Path) -> None:
        self.name = name
        self.start_s = start_s
        self.about: dict[str, Any] = {}
        self._url = url
        self._pid = pid
        self._projector = projector
        self._clients: dict[int, tuple[EmbeddingsClient, Meter]] = {}
        self._inputs: Inputs | None = None
        self._vectors: Vectors = {}

    def load(self, inputs: Inputs) -> None:
        """Take the items of the next work."""
        self._inputs = inputs

    def work(self, output: str, items_a_request: int, concurrency: int) -> Work:
        """Embed them: requests of so many items, so many requests at a time, the next as soon as one is answered."""
        if self._inputs is None:
            raise ValueError("nothing was loaded")
        client, meter = self._client(concurrency)
        meter.clear()
        before = cost_of(self._pid)
        begin, begin_cpu = time.perf_counter(), time.process_time()
        if output == "both":
            found = client.encode_both(self._inputs.items, "query", items_a_request)
            self._vectors = {name: [getattr(both, name) for both in found] for name in ("dense", "multivector")}
        else:
            encode: Callable[..., Any] = client.encode_text if self._inputs.kind == "text" else client.encode_image
            vectors = encode(self._inputs.items, batch_size=items_a_request, return_multivector=output == "multivector")
            self._vectors = {output: vectors}
        wall_s, client_cpu_s = time.perf_counter() - begin, time.process_time() - begin_cpu
        return Work(
            wall_s,
            cost_of(self._pid).cpu_s - before.cpu_s,
            client_cpu_s,
            meter.latencies_ms,
            meter.received_bytes,
            meter.n_refused,
        )

    def vectors(self) -> Vectors:
        """Give what the last work made."""
        return self._vectors

    def cost(self) -> Cost:
        """Give the cost so far."""
        return cost_of(self._pid)

    def _client(self, concurrency: int) -> tuple[EmbeddingsClient, Meter]:
        if concurrency not in self._clients:
            meter = Meter()
            http_client = httpx2.AsyncClient(
                event_hooks={"request": [meter.on_request], "response": [meter.on_response]},
                limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None),
                timeout=600,
            )
            client = EmbeddingsClient(
                self._url,
                task=TASK,
                max_concurrency=concurrency,
                http_client=http_client,
                projector=self._projector if self.name == "stock" else None,
            )
            client.encode_text("a call that asks what the server is")
            self._clients[concurrency] = client, meter
        return self._clients[concurrency]


class Child:
    """A side in a process of its own, spoken to over pipes."""

    def __init__(self, name: str, process: Any, log: Path) -> None:
        begin = time.perf_counter()
        self.name = name
        self._process = process
        self._log = log
        self.about: dict[str, Any] = self._answer()[0]["about"]
        self.start_s = time.perf_counter() - begin

    def load(self, inputs: Inputs) -> None:
        """Bring the items of the next work."""
        items = [item if isinstance(item, str) else base64.b64encode(item).decode() for item in inputs.items]
        self._ask(call="load", kind=inputs.kind, items=items)

    def work(self, output: str, items_a_request: int, concurrency: int) -> Work:  # noqa: ARG002 - only servers have requests
        """Embed them, all with one call: it makes its batches by itself."""
        before = cost_of(self._process.pid)
        answer, _ = self._ask(call="work", output=output)
        return Work(answer["wall_s"], cost_of(self._process.pid).cpu_s - before.cpu_s)

    def vectors(self) -> Vectors:
        """Give what the last work made."""
        return unpack(self._ask(call="vectors")[1])

    def cost(self) -> Cost:
        """Give the cost so far."""
        return cost_of(self._process.pid)

    def _ask(self, **request: object) -> tuple[dict[str, Any], bytes]:
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            sys.exit(f"{self.name} has ended; the end of its log:\n{tail(self._log)}")
        return self._answer()

    def _answer(self) -> tuple[dict[str, Any], bytes]:
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"{self.name} has ended; the end of its log:\n{tail(self._log)}")
        answer = json.loads(line)
        return answer, self._process.stdout.read(answer["n_bytes"])


Side = Server | Child


@contextmanager
def started(
    names: Sequence[str], checkpoint: Path, vllm_options: Sequence[str] = (), dtype: str = "auto"
) -> Iterator[dict[str, Side]]:
    """Start sides one after the other, each alone on the machine; end all at the end of the block.

    Args:
        names: of SIDES.
        checkpoint: merged, of the retrieval task.
        vllm_options: of vLLM's serve, for all three that are vLLM.
        dtype: of those that our launcher does not choose for; "auto" is the checkpoint's.
    """
    on_cpu = find_vllm()
    sizes = [] if on_cpu else gpu_sizes(checkpoint, vllm_options)
    own = [] if dtype == "auto" else [f"--dtype={dtype}"]
    sides: dict[str, Side] = {}
    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for name in names:
            port, log, begin = free_port(), logs / name, time.perf_counter()
            if name in SERVERS:
                command, environment, path = serve_command(checkpoint, port, vllm_options), {}, "/ready"
                if name == "stock":
                    command = stock_command(checkpoint, port, on_cpu, [*own, *sizes, *vllm_options])
                    environment, path = stock_environment(on_cpu), "/health"
                process = stack.enter_context(running(command, log, environment))
                url = f"http://127.0.0.1:{port}"
                until_ready(url, process, log, path)
                projector = checkpoint / "multi_vector_projector.safetensors"
                sides[name] = Server(name, url, process.pid, time.perf_counter() - begin, projector)
                sides[name].about["dtype"] = _dtype(command, checkpoint)
                _say(sides[name])
                continue
            command = [sys.executable, str(Path(__file__).parent / "_child.py"), name]
            command += ["--checkpoint", str(checkpoint), "--dtype", dtype]
            environment = {}
            if name == "llama.cpp":
                environment = {"TMPDIR": str(logs)}  # its model goes there, and with it whenever it is ended
            if name == "in_process":
                launch = prepare(ServerSettings(TASK, checkpoint, port=port, vllm_options=tuple(vllm_options)))
                command += ["--arguments", json.dumps([*launch.arguments, *launch.options])]
                environment = launch.environment
            process = stack.enter_context(running(command, log, {**QUIET, **environment}, pipes=True))
            sides[name] = Child(name, process, log)
            _say(sides[name])
        yield sides


def gpu_sizes(checkpoint: Path, vllm_options: Sequence[str]) -> list[str]:
    """Return the options by which our launcher sizes a server for this GPU; a stock one would take nine tenths."""
    launch = prepare(ServerSettings(TASK, checkpoint, port=free_port(), vllm_options=tuple(vllm_options)))
    names = ("--max-num-batched-tokens=", "--kv-cache-memory-bytes=", "--gpu-memory-utilization=")
    return [argument for argument in launch.arguments if argument.startswith(names)]


def gpu_memory(checkpoint: Path, dtype: str) -> tuple[int, int | None]:
    """Return what a side takes of a GPU's memory, and what the GPU offers, in bytes; None where nothing tells."""
    gpu = None if find_vllm() else known_gpu()
    return needed_bytes(read_checkpoint(checkpoint, TASK), (), dtype, step_of(gpu)), offered_bytes(gpu)


def fitting(names: Sequence[str], side_bytes: int, free_bytes: int | None) -> list[str]:
    """Return the first sides that are held by a GPU's memory together; all where nothing tells.

    Args:
        names: of sides, the most wanted first.
        side_bytes: what one of them takes.
        free_bytes: of the GPU.
    """
    return list(names if free_bytes is None else names[: max(1, free_bytes // side_bytes)])


def _dtype(command: Sequence[str], checkpoint: Path) -> str:
    """Return the dtype that a vLLM computes in: our launcher decides ours; a stock one takes the checkpoint's."""
    launched = command
    if "vllm.entrypoints.openai.api_server" not in command:
        options = tuple(command[command.index("--") + 1 :]) if "--" in command else ()
        launched = prepare(ServerSettings(TASK, checkpoint, port=free_port(), vllm_options=options)).arguments
    given = [part.partition("=")[2] for part in launched if part.startswith("--dtype=")]
    return given[-1] if given else str(json.loads((checkpoint / "manifest.json").read_text())["dtype"])


def _say(side: Side) -> None:
    print(f"{side.name} has started within {side.start_s:.0f} s", file=sys.stderr)


def largest_difference(found: dict[str, Vectors]) -> tuple[float, str]:
    """Compare every side's vectors with every other's.

    Returns:
        The largest 1 - cosine of two dense vectors, or of two rows of a multi-vector; and between which sides.
    """
    worst, between = 0.0, ""
    names = list(found)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            for output in found[one].keys() & found[other].keys():
                for a, b in zip(found[one][output], found[other][output], strict=True):
                    distance = _distance(a, b)
                    if not distance <= worst:
                        worst, between = distance, f"{one} and {other}, {output}"
    return worst, between


def _distance(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    if a.shape != b.shape:
        return float("inf")
    a, b = np.atleast_2d(a).astype(np.float64), np.atleast_2d(b).astype(np.float64)  # (n_rows, dim)
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return float(1 - cosines.min())
