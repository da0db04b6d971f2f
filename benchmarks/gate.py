"""Whether we are still as fast as we were: ratios between sides in one run, beside those of a committed baseline.

Items a second depend on the machine and on who else uses it; ratios of sides that take turns hardly do. So the gate
measures the sides of `throughput.py` in a few of its cases, divides, and compares with `baseline.json`, which has one
set of ratios for each kind of machine and model. A ratio that has fallen by more than `MAX_LOSS` is measured once more,
and the better reading counts; if it is still down, the exit code is 1. It is made for every change of vLLM's version.

A machine or model without a baseline passes, and is told so; `--update` writes what was measured as its baseline.

    .venv/bin/python benchmarks/gate.py --checkpoint DIR/jina-embeddings-v4-retrieval
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _about import surroundings
from _flops import read_config
from _results import store
from _servers import end_on_sigterm
from _sides import SIDES, Side, started
from jina_v4_serve.launch.cpu import fast_in_bfloat16, n_cores
from jina_v4_serve.vllm_side.versions import find_vllm
from throughput import PACKAGES, Benchmark, Case

BASELINE = Path(__file__).parent / "baseline.json"
MAX_LOSS = 0.15
MINUTES = 1.7  # of measuring; the starts and stops of five sides take about two minutes of two cores
ROUNDS = 3


@dataclass(frozen=True)
class Ratio:
    """What is watched: how many times as many items a second one side embeds as another."""

    side: str
    other: str
    case: Case

    @property
    def name(self) -> str:
        """As in the baseline."""
        return f"{self.side}/{self.other}, {self.case.inputs} {self.case.output}"


SHORT, MIDDLE, PAGE = Case("16", "dense", 64, 2), Case("512", "dense", 4, 4), Case("page", "dense", 1, 4)
RATIOS = (
    Ratio("served", "in_process", SHORT),
    Ratio("served", "in_process", MIDDLE),
    Ratio("in_process", "transformers-8", MIDDLE),
    Ratio("served", "stock", MIDDLE),
    Ratio("served", "transformers-1", PAGE),
)


@dataclass(frozen=True)
class Reading:
    """A ratio then and now; None where it was not measured."""

    name: str
    baseline: float | None
    now: float | None

    @property
    def change(self) -> float | None:
        """The gain, as a share of the baseline; below zero for a loss."""
        return None if self.baseline is None or self.now is None else self.now / self.baseline - 1

    @property
    def fell(self) -> bool:
        """Whether the loss is more than is let pass."""
        return self.change is not None and self.change < -MAX_LOSS

    @property
    def verdict(self) -> str:
        """In words."""
        if self.change is None:
            return "not measured" if self.now is None else "no baseline"
        return "fell" if self.fell else "passes"


def compare(baseline: Mapping[str, float], now: Mapping[str, float]) -> list[Reading]:
    """Put the ratios beside those of the baseline, also those that only one of the two has."""
    return [Reading(name, baseline.get(name), now.get(name)) for name in dict.fromkeys([*now, *baseline])]


def machine_kind(cpu_info: str, n_cores: int, gpu: str = "") -> str:
    """Name the machines whose ratios are alike: by the GPU, else by the vector unit and the number of cores.

    Args:
        cpu_info: what /proc/cpuinfo says.
        n_cores: that the sides may use.
        gpu: name of the GPU that they compute on.
    """
    if gpu:
        return gpu.lower().replace(" ", "-")
    flags = set(cpu_info.split())
    units = {"amx": "amx_bf16", "avx512": "avx512f", "avx2": "avx2"}  # the best first
    unit = next((name for name, flag in units.items() if flag in flags), "other")
    if unit == "avx512" and fast_in_bfloat16(cpu_info):  # another dtype is computed in then
        unit = "avx512-bf16"
    return f"{unit}-{n_cores}-cores"


def this_machine() -> str:
    """Name the kind of this machine; a GPU counts where the installed vLLM computes on it."""
    gpu = ""
    if not find_vllm():
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        gpu = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    return machine_kind(Path("/proc/cpuinfo").read_text(), n_cores(), gpu)


def model_size(checkpoint: Path) -> str:
    """Name the size of a model, on which the ratios depend as much as on the machine."""
    config = read_config(checkpoint)
    text = config.get("text_config", config)
    return f"{text['num_hidden_layers']} layers of {text['hidden_size']}"


def measure(
    sides: Mapping[str, Side], ratios: Sequence[Ratio], options: argparse.Namespace
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Measure in each case only the sides that its ratios need.

    Returns:
        The ratios by name, and throughput's rows of each case and side.
    """
    needed: dict[Case, list[str]] = {}
    for ratio in ratios:
        needed.setdefault(ratio.case, []).extend((ratio.side, ratio.other))
    taking_part = {case: {name: sides[name] for name in names} for case, names in needed.items()}
    n_turns = sum(len(each) for each in taking_part.values())
    found: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    for case, each in taking_part.items():
        benchmark = Benchmark(each, options.checkpoint, options.rounds, options.minutes * len(each) / n_turns)
        benchmark.check([case], options.bound)
        results = [row for rows in benchmark.run([case]) for row in rows]
        rates = {row["side"]: row["items_per_s"] for row in results}
        found |= {ratio.name: rates[ratio.side] / rates[ratio.other] for ratio in ratios if ratio.case == case}
        rows += results
    return found, rows


def show(readings: Sequence[Reading]) -> None:
    """Print the table."""
    print(f"{'case':42} {'baseline':>9} {'now':>9} {'change':>8}  verdict")
    for reading in readings:
        then, now = ("" if value is None else f"{value:.3f}" for value in (reading.baseline, reading.now))
        change = "" if reading.change is None else f"{reading.change:+.1%}"
        print(f"{reading.name:42} {then:>9} {now:>9} {change:>8}  {reading.verdict}")


def main() -> None:
    """Start, measure, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="merged checkpoint of the retrieval task")
    parser.add_argument("--update", action="store_true", help="write what is measured as this machine's baseline")
    parser.add_argument("--baseline", type=Path, default=BASELINE, help="file of the baselines")
    parser.add_argument("--cases", help="only those whose size is among these, separated by commas: 16,512,page")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of measuring, beside the starts")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="measurements of each side in each case")
    parser.add_argument("--bound", type=float, default=2e-2, help="largest allowed 1 - cosine between two sides")
    parser.add_argument("--vllm-options", default="", help="of vLLM's serve, for every side that is vLLM, with spaces")
    parser.add_argument("--results", type=Path, help="folder for the JSON")
    options = parser.parse_args()

    ratios = [ratio for ratio in RATIOS if not options.cases or ratio.case.inputs in options.cases.split(",")]
    if not ratios:
        parser.error(f"--cases={options.cases} has none of {', '.join(dict.fromkeys(r.case.inputs for r in RATIOS))}")
    end_on_sigterm()
    about = surroundings(PACKAGES)
    kind = f"{this_machine()}, {model_size(options.checkpoint)}"
    baselines = json.loads(options.baseline.read_text()) if options.baseline.exists() else {}
    baseline = baselines.get(kind, {"ratios": {}})

    used = {name for ratio in ratios for name in (ratio.side, ratio.other)}
    with started([name for name in SIDES if name in used], options.checkpoint, options.vllm_options.split()) as sides:
        now, rows = measure(sides, ratios, options)
        fallen = {reading.name for reading in compare(baseline["ratios"], now) if reading.fell}
        if fallen and not options.update:
            print(f"measured once more, for it fell: {'; '.join(sorted(fallen))}", file=sys.stderr)
            again, more_rows = measure(sides, [ratio for ratio in ratios if ratio.name in fallen], options)
            now |= {name: max(ratio, now[name]) for name, ratio in again.items()}
            rows += more_rows
    readings = compare(baseline["ratios"], now)
    show(readings)
    if options.update:
        entry = {"commit": about["commit"], "versions": about["versions"], "ratios": baseline["ratios"] | now}
        options.baseline.write_text(json.dumps(baselines | {kind: entry}, indent=2) + "\n")
        print(f"written as the baseline of {kind}")
    elif kind not in baselines:
        print(f"there is no baseline for {kind}: nothing was compared; --update makes these ratios the baseline")
    failed = not options.update and any(reading.fell for reading in readings)
    measured = {
        "benchmark": "gate",
        **about,
        "load_after": os.getloadavg()[0],
        "machine_kind": kind,
        "max_loss": MAX_LOSS,
        "baseline_commit": baseline.get("commit"),
        "baseline_versions": baseline.get("versions"),
        "ratios": [{**vars(reading), "change": reading.change, "verdict": reading.verdict} for reading in readings],
        "results": rows,
    }
    store(measured, options.results)
    print(json.dumps(measured))
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
