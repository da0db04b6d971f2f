"""Short live queries on a server that embeds a corpus: their p99, and what the corpus loses.

Queries of 16 tokens, one a request, arrive in an open loop: at a stated rate, however slow the answers are. The corpus
comes from a closed loop of clients that always have the next request in flight, as `jina-v4-embed` does: texts of
`--corpus` tokens, and after `--mixed` of them one of `--long`. In turn, for `--rounds` rounds:

- alone: queries, no corpus;
- same: both, all of priority 0, which is how a server without priorities works;
- last: both, the corpus of priority 999.

Goals: with `last`, p99 at most one scheduling step above `alone`, and the corpus within 10 % of `same`. A step is its
most tokens at the corpus's rate of `same`. A query that comes while a step runs waits for it, and is computed in the
next one, without the corpus.

    .venv/bin/python benchmarks/live.py --checkpoint DIR/jina-embeddings-v4-retrieval
"""

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
from _about import surroundings
from _data import make_texts
from _results import percentile, store
from _servers import end_on_sigterm, serving
from goodput import PACKAGES, WARM_UP_S, Load, arrival_times
from jina_v4_serve.launch.cpu import MAX_TOKENS_A_STEP

QUERY_TOKENS, N_QUERIES = 16, 64
LAST = 999
REFUSED_S = 0.5  # until a corpus client tries again
PRIORITIES: Mapping[str, int | None] = {"alone": None, "same": 0, "last": LAST}


class Corpus:
    """Clients that always have the next request in flight."""

    def __init__(self, load: Load, n_clients: int) -> None:
        self._load = load
        self._n_clients = n_clients
        self.n_refused = 0

    @asynccontextmanager
    async def running(self) -> Any:
        """Send for the length of a block."""
        clients = [asyncio.create_task(self._client()) for _ in range(self._n_clients)]
        try:
            await asyncio.sleep(WARM_UP_S)
            self.n_refused = 0
            yield
        finally:
            for client in clients:
                client.cancel()
            await asyncio.wait(clients)

    async def _client(self) -> None:
        while True:
            status = await self._load.send()
            if status == "429":
                self.n_refused += 1
                await asyncio.sleep(REFUSED_S)
            elif status != "200":
                raise RuntimeError(f"a request of the corpus got {status}")


def corpus_lengths(tokens: int, n_texts: int, longest: int, mixed: int) -> Iterator[int]:
    """Yield the lengths of the corpus's texts: each after `mixed` others is a long one."""
    for i in range(n_texts):
        yield longest if longest and i % (mixed + 1) == mixed else tokens


async def count_tokens(client: httpx2.AsyncClient, url: str) -> float:
    """Return how many tokens the engine has computed: by text, so more finely than by request."""
    lines = (await client.get(f"{url}/metrics")).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:prompt_tokens_total"))


async def measure(url: str, checkpoint: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure all kinds in turn."""
    queries = make_texts(checkpoint, [QUERY_TOKENS] * N_QUERIES)
    lengths = list(corpus_lengths(options.corpus, 16 * options.batch, options.long, options.mixed))
    texts = make_texts(checkpoint, lengths, seed=1)
    latencies: dict[str, list[float]] = {kind: [] for kind in PRIORITIES}
    rates: dict[str, list[float]] = {kind: [] for kind in PRIORITIES if kind != "alone"}
    n_failed, n_refused = dict.fromkeys(PRIORITIES, 0), dict.fromkeys(PRIORITIES, 0)
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx2.AsyncClient(limits=limits, timeout=None, trust_env=False) as client:
        live = Load(client, url, queries)
        await live.closed(4, WARM_UP_S)
        for seed in range(options.rounds):
            for kind, priority in PRIORITIES.items():
                arrivals = arrival_times(options.rate, options.seconds, seed)
                await live.closed(1, WARM_UP_S)  # until nothing of the last corpus is under way
                if priority is None:
                    step = await live.opened(arrivals, float("inf"))
                else:
                    load = Load(client, url, texts, options.batch, priority=priority)
                    corpus = Corpus(load, options.clients)
                    async with corpus.running():
                        begin, n_tokens = time.perf_counter(), await count_tokens(client, url)
                        step = await live.opened(arrivals, float("inf"))
                        n_tokens = await count_tokens(client, url) - n_tokens
                        rates[kind].append(n_tokens / (time.perf_counter() - begin))
                        n_refused[kind] += corpus.n_refused
                latencies[kind] += step["latencies_ms"]
                n_failed[kind] += step["n_failed"]
    return {
        kind: {
            "n_queries": len(latencies[kind]),
            "n_failed": n_failed[kind],
            **{f"p{p}_ms": percentile(sorted(latencies[kind]), p) for p in (50, 99)},
            "corpus_tokens_per_s": statistics.median(rates[kind]) if kind in rates else None,
            "n_corpus_refused": n_refused[kind],
        }
        for kind in PRIORITIES
    }


def show(results: Mapping[str, Mapping[str, Any]], step_ms: float) -> None:
    """Print the table, and whether the goals are reached."""
    for kind, result in results.items():
        shown = {name: value for name, value in result.items() if value is not None}
        print(f"{kind:>7} " + ", ".join(f"{name} {value:.0f}" for name, value in shown.items()))
    more_ms = results["last"]["p99_ms"] - results["alone"]["p99_ms"]
    share = results["last"]["corpus_tokens_per_s"] / results["same"]["corpus_tokens_per_s"]
    for found, is_reached in (
        (f"p99 {more_ms:.0f} ms above alone, {more_ms / step_ms:.1f} steps of {step_ms:.0f} ms", more_ms <= step_ms),
        (f"corpus at {share:.2f} of the rate without priorities", share >= 0.9),
    ):
        print(f"{found}: {'reached' if is_reached else 'NOT reached'}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Start, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="merged checkpoint of the retrieval task")
    parser.add_argument("--rate", type=float, default=5.0, help="queries a second")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, default=8, help="of the corpus")
    parser.add_argument("--batch", type=int, default=8, help="texts a request of the corpus")
    parser.add_argument("--corpus", type=int, default=512, help="tokens of its texts")
    parser.add_argument("--long", type=int, default=4096, help="tokens of its long texts; 0 for none")
    parser.add_argument("--mixed", type=int, default=31, help="other texts for each long one")
    parser.add_argument("--step", type=int, default=MAX_TOKENS_A_STEP, help="tokens of a step; a CPU's by default")
    parser.add_argument("--results", type=Path, help="folder for the figures")
    options = parser.parse_args(arguments)
    end_on_sigterm()
    about = surroundings(PACKAGES)
    with tempfile.TemporaryDirectory() as folder, serving(options.checkpoint, Path(folder) / "log") as (url, _):
        results = asyncio.run(measure(url, options.checkpoint, options))
    step_ms = 1000 * options.step / results["same"]["corpus_tokens_per_s"]
    show(results, step_ms)
    measured = {
        "benchmark": "live",
        **about,
        "load_after": os.getloadavg()[0],
        **{name: getattr(options, name) for name in ("rate", "clients", "batch", "corpus", "long", "mixed")},
        "step_ms": step_ms,
        "results": results,
    }
    store(measured, options.results)
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
