"""The golden checkpoint and what is folded from it, for every test."""

import json
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from servers import BIN

Figure = Callable[[str], None]

# A job in the background of a shell ignores SIGINT and hands that down; tests send it to what they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

TASKS = ("retrieval", "text-matching", "code")
GOLDEN = Path(__file__).parent / "golden"


@dataclass(frozen=True)
class Golden:
    """What the published code computes for a small random checkpoint; `golden/README.md` describes the rows."""

    checkpoint: Path
    texts: list[str]
    images: list[Path]
    rows: dict[str, NDArray[np.float32]]


@pytest.fixture(scope="session")
def golden() -> Golden:
    with np.load(GOLDEN / "reference.npz") as reference:
        rows = {name: reference[name] for name in reference.files}
    texts = json.loads((GOLDEN / "texts.json").read_text())
    return Golden(GOLDEN / "checkpoint", texts, sorted((GOLDEN / "img").glob("*.png")), rows)


@pytest.fixture(scope="session")
def folded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of the three golden checkpoints, folded by the real command, by dtype."""
    done: dict[str, Path] = {}

    def fold(dtype: str) -> Path:
        if dtype not in done:
            out = tmp_path_factory.mktemp(f"folded-{dtype}")
            command = [BIN / "jina-v4-merge", "fold", "--base", GOLDEN / "checkpoint", "--out", out, "--dtype", dtype]
            subprocess.run(command, check=True, capture_output=True)
            done[dtype] = out
        return done[dtype]

    return fold


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Figure:
    """Report a measured figure: a line that stands at the end of what `make test` prints."""

    def report(line: str) -> None:
        request.node.user_properties.append(("figure", line))

    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.getreports(outcome)]
    lines = [
        f"{report.nodeid.rpartition('/')[2].replace('test_end_to_end_', '').replace('.py::', ': ')}: {value}"
        for report in reports
        if report.when == "call"
        for name, value in report.user_properties
        if name == "figure"
    ]
    if lines:
        terminalreporter.section("measured")
        terminalreporter.write_line("\n".join(sorted(lines)))
