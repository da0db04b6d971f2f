"""The golden checkpoint and what is folded from it, for every test."""

import asyncio
import inspect
import json
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from servers import BIN, PATIENCE_S
from xdist.scheduler import LoadScopeScheduling

Figure = Callable[[str], None]

# A job in the background of a shell ignores SIGINT, one under nohup SIGHUP, and both hand that down. Tests send these
# signals to what they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

TASKS = ("retrieval", "text-matching", "code")
GOLDEN = Path(__file__).parent / "golden"
# Folders whose tests share a server.
ONE_PROCESS = ("one_server", "fleet")


@dataclass(frozen=True)
class Golden:
    """What the published code computes for a small random checkpoint; `golden/README.md` describes the rows."""

    checkpoint: Path
    texts: list[str]
    images: list[Path]
    rows: dict[str, NDArray[np.float32]]


@pytest.fixture(scope="session", autouse=True)
def _logs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep servers that are started without a folder for their log from writing one into the home folder."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


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


@pytest.fixture(scope="session")
def one_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden base and its adapters as the real command exports them; a test changes only a copy."""
    out = tmp_path_factory.mktemp("one-export") / "exported"
    options = ("--base", GOLDEN / "checkpoint", "--out", out, "--with-base")
    subprocess.run([BIN / "jina-v4-merge", "export-adapters", *options], check=True, capture_output=True)
    return out


@pytest.fixture
def exported(one_export: Path, tmp_path: Path) -> Path:
    """A copy of `one_export` that a test may damage."""
    return Path(shutil.copytree(one_export, tmp_path / "exported"))


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Figure:
    """Report a measured figure: a line that stands at the end of what `make test` prints."""

    def report(line: str) -> None:
        request.node.user_properties.append(("figure", line))

    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs servers, and run what takes long first: short tests then fill what a process has left."""
    for item in items:
        if "end_to_end" in item.path.parts:
            item.add_marker("proof")
    items.sort(key=lambda item: (item.get_closest_marker("proof") is None, item.path.parent.name not in ONE_PROCESS))


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test that is a coroutine in an event loop of its own."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}

    async def bounded() -> None:
        async with asyncio.timeout(PATIENCE_S):
            await pyfuncitem.obj(**arguments)

    asyncio.run(bounded())
    return True


class ByServer(LoadScopeScheduling):
    """Give each file to one of pytest-xdist's processes, and a folder whose files share a server to one as well."""

    def _split_scope(self, nodeid: str) -> str:
        file = PurePosixPath(nodeid.partition("::")[0])
        return str(file.parent if file.parent.name in ONE_PROCESS else file)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByServer:
    return ByServer(config, log)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.getreports(outcome)]
    lines = [
        f"{report.nodeid.rpartition('/')[2].removeprefix('test_').replace('.py::', ': ')}: {value}"
        for report in reports
        if report.when == "call"
        for name, value in report.user_properties
        if name == "figure"
    ]
    if lines:
        terminalreporter.section("measured")
        terminalreporter.write_line("\n".join(sorted(lines)))
