"""`jina-v4-serve all` with the golden checkpoints: one fleet for all tests of this folder; the last one stops it."""

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from servers import BIN, Server, free_port, started

HUNG_AFTER_S = 20


@pytest.fixture(scope="session")
def fleet(folded: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    port = free_port()
    folder = tmp_path_factory.mktemp("fleet")
    # Of its own, so that its processes are told from those of other tests' servers.
    checkpoints = shutil.copytree(folded("float32"), folder / "checkpoints")
    command = [BIN / "jina-v4-serve", "all", "--checkpoints", checkpoints, "--port", str(port)]
    environment = {"JINA_V4_HUNG_AFTER_S": str(HUNG_AFTER_S), "JINA_V4_LOG": "plain"}
    with started(command, port, folder / "log", **environment) as server:
        server.wait_ready()
        yield server


@pytest.fixture(scope="session")
def addresses(fleet: Server) -> dict[str, str]:
    """The address of each task's own server behind the gateway."""
    return dict(re.findall(r"task (\S+), .*\n.* answer on (http://\S+)/v1", fleet.log.read_text(errors="replace")))
