"""What lies in deploy/, read as its tools read it."""

import functools
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from jina_v4_merge.cli import app as merge_app
from jina_v4_serve.cli import app as serve_app
from typer.main import get_command

ROOT = Path(__file__).parents[2]
CONTAINERS = ROOT / "deploy/containers"
KUBERNETES = ROOT / "deploy/kubernetes"
PROGRAMS = {"jina-v4-serve": get_command(serve_app), "jina-v4-merge": get_command(merge_app)}

Manifest = dict[str, Any]


@dataclass(frozen=True)
class Invocation:
    """A command line, as our own program reads it: the command, its options by name, and what goes on to vLLM."""

    command: str
    options: dict[str, Any]
    for_vllm: tuple[str, ...]


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def read_command() -> Callable[[list[str]], Invocation]:
    """Read the arguments of `jina-v4-serve` with its own parser, which refuses what it does not know."""

    def read(arguments: list[str]) -> Invocation:
        command = PROGRAMS["jina-v4-serve"].commands[arguments[0]]
        options = command.make_context(arguments[0], arguments[1:]).params
        return Invocation(arguments[0], options, tuple(options.pop("vllm_options", None) or ()))

    return read


@dataclass(frozen=True)
class Stage:
    """A stage of the Containerfile: its base, and its instructions with their arguments."""

    name: str
    base: str
    instructions: list[tuple[str, str]]

    def get(self, name: str) -> list[str]:
        return [argument for instruction, argument in self.instructions if instruction == name]

    def environment(self) -> dict[str, str]:
        return {name: value for line in self.get("ENV") for name, value in re.findall(r"(\w+)=(\S+)", line)}


@pytest.fixture(scope="session")
def stages() -> dict[str, Stage]:
    found: dict[str, Stage] = {}
    text = re.sub(r"^\s*#.*\n", "", (CONTAINERS / "Containerfile").read_text(), flags=re.MULTILINE)
    for line in text.replace("\\\n", " ").splitlines():
        name, _, argument = line.partition(" ")
        if name == "FROM":
            base, _, stage = argument.partition(" AS ")
            found[stage] = Stage(stage, base, [])
        elif name:
            found[stage].instructions.append((name, " ".join(argument.split())))
    return found


@pytest.fixture(scope="session")
def exit_code_of_health_check() -> Iterator[Callable[[str, int], int]]:
    """Run the program of a health check before a server that answers with a status.

    Docker gives every container the proxies of its user's settings; here they lead nowhere.
    """

    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    def run(program: str, answer: int) -> int:
        nonlocal status
        status = answer
        proxies = {"http_proxy": "http://127.0.0.1:1", "HTTP_PROXY": "http://127.0.0.1:1"}
        here = program.replace(":8000/", f":{server.server_port}/")
        return subprocess.run([sys.executable, "-c", here], env=proxies, stderr=subprocess.DEVNULL).returncode

    status = 200
    with HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        yield run
        server.shutdown()


class Reset:
    """What `!reset` in an override stands for: the value is taken away."""


class Loader(yaml.SafeLoader):
    """YAML as Compose reads it."""


Loader.add_constructor("!reset", lambda *_: Reset)


@pytest.fixture(scope="session")
def compose() -> Callable[..., Manifest]:
    """Merge Compose files and fill their variables in, by the rules of Compose (of those, the ones that we use)."""

    def fill(text: str, environment: Mapping[str, str]) -> str:
        def value(match: re.Match[str]) -> str:
            name, form, default = match.groups()
            assert form == ":-" or name in environment, f"{name}: {default}"
            return environment.get(name) or default

        return re.sub(r"\$\{(\w+)(:-|:\?)([^}]*)\}", value, text)

    def merged(below: Any, above: Any, key: str = "") -> Any:
        if isinstance(below, dict) and isinstance(above, dict):
            both = {name: merged(below[name], above[name], name) for name in below if name in above}
            return {name: value for name, value in (below | above | both).items() if value is not Reset}
        if isinstance(below, list) and isinstance(above, list) and key not in ("command", "entrypoint", "test"):
            return below + above
        return above

    def load(*names: str, **environment: str) -> Manifest:
        found: Manifest = {}
        for name in names:
            text = fill((CONTAINERS / name).read_text(), environment)
            found = merged(found, yaml.load(text, Loader))  # noqa: S506 - a safe loader of our own
        return {name: value for name, value in found.items() if not name.startswith("x-")}

    return load


@pytest.fixture(scope="session")
def rendered() -> Callable[[str], list[Manifest]]:
    """What `kubectl apply -k` would send; needs kubectl, but no cluster."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl, which renders the manifests, is not on this machine")

    @functools.cache
    def text(name: str) -> str:
        done = subprocess.run([kubectl, "kustomize", KUBERNETES / name], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return lambda name: list(yaml.safe_load_all(text(name)))
