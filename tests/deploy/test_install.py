"""What `make install` says where it cannot install: a clear last line, and never success."""

import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from servers import BIN, PATIENCE_S

pytestmark = pytest.mark.long

INSTALL = Path(__file__).parents[2] / "requirements" / "install"
PINS = "requests==2.32.5\n"
PACKAGES = "error: the packages could not be installed, as said above; is a package index reachable, and its proxy set?"


def install(folder: Path, python: str | Path = sys.executable, **environment: str) -> tuple[int, str]:
    """Run the script for a virtual environment in a folder; return its exit code and the last line of its errors."""
    (folder / "pins.txt").write_text(PINS)
    chosen = re.compile(r"UV_.*INDEX.*|PIP_INDEX_URL|(http|https|all)_proxy", re.IGNORECASE)
    own = {name: value for name, value in os.environ.items() if not chosen.fullmatch(name)}
    done = subprocess.run(
        [INSTALL, python, "venv", "pins.txt", "8", "0.13.9"],
        cwd=folder,
        env={**own, **environment},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    return done.returncode, done.stderr.splitlines()[-1]


def program(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("version", ["3.10", "3.14"])
def test_a_python_that_is_too_old_or_too_new_is_named(tmp_path: Path, version: str) -> None:
    python = program(tmp_path / "python", f"echo {version}")
    line = f"error: Python 3.11 to 3.13 is needed, {python} is {version}: name another, as in make PYTHON=python3.12"
    assert install(tmp_path, python) == (1, line)
    assert not (tmp_path / "venv").exists()


def test_a_python_that_is_not_there_is_named(tmp_path: Path) -> None:
    line = "error: there is no python3.99: name one, as in make PYTHON=python3.12"
    assert install(tmp_path, "python3.99") == (1, line)


def test_without_a_package_index_the_install_says_so(tmp_path: Path) -> None:
    program(tmp_path / "venv/bin/python", f'exec {sys.executable} "$@"')
    address = {"PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_RETRIES": "0", "PIP_CONFIG_FILE": os.devnull}
    code, line = install(tmp_path, PIP_TARGET=str(tmp_path / "target"), PIP_UPGRADE="1", **address)
    assert (code, line) == (1, PACKAGES)


@pytest.mark.parametrize("place", ["variable", "file"])
def test_uv_asks_the_index_of_pip(tmp_path: Path, place: str) -> None:
    """A mirror is often in pip's settings alone, which uv does not read."""
    asked = []

    class Index(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True, timeout=PATIENCE_S)
    python = tmp_path / "venv/bin/python"
    subprocess.run([BIN / "uv", "pip", "install", "--quiet", "--python", python, "uv==0.13.9"], check=True)
    with ThreadingHTTPServer(("127.0.0.1", 0), Index) as index:
        threading.Thread(target=index.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{index.server_port}"
        (tmp_path / "pip.conf").write_text(f"[global]\nindex_url = {url}\n" if place == "file" else "")
        settings = {"PIP_CONFIG_FILE": str(tmp_path / "pip.conf")} | ({"PIP_INDEX_URL": url} if place != "file" else {})
        code, line = install(tmp_path, UV_NO_CACHE="1", **settings)
        index.shutdown()
    assert (code, line) == (1, PACKAGES)
    assert asked == ["/requests/"]


def test_an_environment_without_pip_is_made_anew(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True, timeout=PATIENCE_S)
    python = tmp_path / "venv/bin/python"
    assert subprocess.run([python, "-m", "pip"], capture_output=True, timeout=PATIENCE_S).returncode == 1
    address = {"PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_RETRIES": "0", "PIP_CONFIG_FILE": os.devnull}
    code, line = install(tmp_path, **address)
    assert (code, line) == (1, PACKAGES)
    subprocess.run([python, "-m", "pip", "--version"], check=True, capture_output=True, timeout=PATIENCE_S)


def test_a_python_without_venv_is_named(tmp_path: Path) -> None:
    script = 'case $* in *venv*) echo "ensurepip is not available"; exit 1;; esac; echo 3.12'
    code, line = install(tmp_path, program(tmp_path / "python", script))
    said = "error: no virtual environment could be made, as said above; "
    assert (code, line) == (1, f"{said}Debian and Ubuntu have what it needs in python3-venv")


def test_a_full_disk_ends_the_install_with_a_message(tmp_path: Path) -> None:
    full = 'echo "failed to write: No space left on device (os error 28)"; exit 2'
    program(tmp_path / "venv/bin/python", f"case $* in *--version) exit;; esac; {full}")
    assert install(tmp_path) == (1, f"error: the disk of {tmp_path} is full: about 8 GB are needed")
