"""One float32 retrieval server for all tests of the wire, with limits that a test can reach, and a site beside it."""

import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx2
import pytest
from servers import BIN, Server, engine_server
from wire import ENVIRONMENT, IMAGES, MAX_LENGTH, TASK, Site, Wire, opened_site


@pytest.fixture(scope="session")
def wire_checkpoint(folded: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 retrieval checkpoint with its canary."""
    checkpoint = tmp_path_factory.mktemp("with-canary") / TASK
    shutil.copytree(folded("float32") / f"jina-embeddings-v4-{TASK}", checkpoint)
    subprocess.run([BIN / "jina-v4-merge", "verify", checkpoint, "--canary"], check=True, capture_output=True)
    return checkpoint


@pytest.fixture(scope="session")
def wire_server(wire_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as environment:
            for name in ("JINA_V4_API_KEY", "JINA_V4_API_KEY_FILE", "JINA_V4_MAX_TOKENS_IN_FLIGHT"):
                environment.delenv(name, raising=False)
            for name, value in ENVIRONMENT.items():
                environment.setenv(name, value)
            log = tmp_path_factory.mktemp("wire") / "log"
            server = stack.enter_context(engine_server(TASK, wire_checkpoint, log, f"--max-model-len={MAX_LENGTH}"))
        server.wait_ready()
        yield server


@pytest.fixture(scope="session")
def wire(wire_server: Server) -> Iterator[Wire]:
    with httpx2.Client(base_url=wire_server.base_url, timeout=60, trust_env=False) as http:
        yield Wire(wire_server.base_url, http)


@pytest.fixture(scope="session")
def pictures() -> Iterator[Site]:
    """A site with the golden images."""
    with opened_site({path.name: path.read_bytes() for path in IMAGES}) as site:
        yield site
