"""The client is thin: what it depends on, and what importing it costs."""

import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
from conftest import Figure
from servers import BIN

pytestmark = pytest.mark.long

HEAVY = ("torch", "vllm", "transformers", "tokenizers", "scipy")
PROJECT = Path(__file__).parents[2] / "client"


def modules_after(statements: str) -> set[str]:
    """The modules that a fresh Python has loaded after these statements."""
    command = [sys.executable, "-c", f"import sys; {statements}; print(*sys.modules)"]
    return set(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())


def test_the_project_depends_on_five_light_packages() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    names = {re.split(r"[^a-z0-9_-]", requirement)[0] for requirement in project["dependencies"]}
    assert names == {"httpx2", "numpy", "openai", "pillow", "safetensors"}
    extras = {"embed", "heif", "langchain", "llama-index", "mteb", "pooling", "progress", "ray"}
    assert project["optional-dependencies"].keys() == extras


def test_importing_the_package_loads_neither_models_nor_http() -> None:
    loaded = modules_after("import jina_v4_client")
    assert not loaded & {*HEAVY, "openai", "httpx2"}


def test_a_client_loads_no_models() -> None:
    loaded = modules_after("import jina_v4_client; jina_v4_client.EmbeddingsClient('http://127.0.0.1:9')")
    assert "openai" in loaded
    assert not loaded & {*HEAVY}


def built_wheel(folder: Path) -> Path:
    build = "import sys; from hatchling.build import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(folder)], check=True, capture_output=True, cwd=PROJECT)
    (wheel,) = folder.glob("*.whl")
    return wheel


def test_the_wheel_carries_its_types_and_nothing_else(tmp_path: Path) -> None:
    wheel = built_wheel(tmp_path)
    listing = subprocess.run(
        [sys.executable, "-m", "zipfile", "-l", str(wheel)], check=True, capture_output=True, text=True
    ).stdout
    assert "jina_v4_client/py.typed" in listing
    names = [line.split()[0] for line in listing.splitlines()[1:]]
    assert {re.sub(r"-[0-9.]+\.", ".", name.split("/")[0]) for name in names} == {
        "jina_v4_client",
        "jina_v4_client.dist-info",
    }


IMPORT = """
import sys, time
begin = time.perf_counter()
import jina_v4_client
took_s = time.perf_counter() - begin
jina_v4_client.EmbeddingsClient("http://127.0.0.1:9").close()
print(took_s, jina_v4_client.__file__, *sys.modules)
"""


def test_the_wheel_alone_is_enough_in_a_clean_environment(tmp_path: Path, figure: Figure) -> None:
    wheel, python = built_wheel(tmp_path), tmp_path / "clean" / "bin" / "python"
    subprocess.run([BIN / "uv", "venv", "--quiet", "--python", sys.executable, tmp_path / "clean"], check=True)
    pins = PROJECT.parent / "requirements" / "cpu.txt"
    begin = time.monotonic()
    command = [BIN / "uv", "pip", "install", "--quiet", "--compile-bytecode", "--python", python, "-c", pins, wheel]
    subprocess.run(command, check=True)
    installed_s = time.monotonic() - begin
    listing = subprocess.run(
        [BIN / "uv", "pip", "freeze", "--python", python], check=True, capture_output=True, text=True
    ).stdout
    packages = {line.partition("==")[0].partition(" @")[0] for line in listing.splitlines()}
    assert not packages & {*HEAVY, "torchvision", "pandas", "pyarrow", "tqdm"}
    found = subprocess.run([python, "-c", IMPORT], check=True, capture_output=True, text=True, cwd=tmp_path).stdout
    took_s, origin, *loaded = found.split()
    assert Path(origin).is_relative_to(tmp_path)
    assert not set(loaded) & {*HEAVY}
    figure(f"{len(packages)} packages installed in {installed_s:.1f} s, imported in {float(took_s):.2f} s")


WHOLE_LIFE = """
import os, sys, warnings
from PIL import Image
from jina_v4_client import EmbeddingsClient
client = EmbeddingsClient(sys.argv[1], task="retrieval")
shapes = client.encode_text("a").shape, client.encode_image(Image.new("RGB", (40, 30))).shape
warnings.simplefilter("ignore", DeprecationWarning)  # of a fork with threads
child = os.fork()
shapes = *shapes, client.encode_text("b").shape
if child: print(*shapes, os.waitpid(child, 0)[1])
"""


# The vectors go with the result, and not with the next collection of garbage, which arrays do not hurry.
LETS_GO = """
import gc, sys, weakref
from jina_v4_client import EmbeddingsClient
with EmbeddingsClient(sys.argv[1], task="retrieval") as client:
    gc.collect(); gc.disable()
    found = client.encode_text(["good", "bad", "bad", "bad"], on_error="skip", batch_size=2)
    errors, vector = found.errors, weakref.ref(found.vectors[0])
    del found
    print(len(errors), vector() is None)
"""


@pytest.fixture(scope="module", params=["3.11", "3.12", "3.13"])
def python(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel alone in an environment of each Python that it promises to work with."""
    version, folder = request.param, tmp_path_factory.mktemp("python")
    interpreter = shutil.which(f"python{version}")
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    interpreters = [*filter(None, [interpreter]), *pyenv.glob(f"{version}.*/bin/python")]
    if not interpreters:
        pytest.skip(f"there is no Python {version} here")
    wheel, python = built_wheel(folder), folder / "venv" / "bin" / "python"
    subprocess.run([BIN / "uv", "venv", "--quiet", "--python", interpreters[-1], folder / "venv"], check=True)
    pins = PROJECT.parent / "requirements" / "cpu.txt"
    subprocess.run([BIN / "uv", "pip", "install", "--quiet", "--python", python, "-c", pins, wheel], check=True)
    return python


def said_by(python: Path, script: str, url: str) -> tuple[str, str, int]:
    command = [python, "-W", "error", "-c", script, url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    return done.stdout, done.stderr, done.returncode


def test_a_client_that_is_never_closed_ends_in_silence(python: Path, server: Any) -> None:
    """Each Python ends its threads in its own way: from 3.12 on none can be started at a program's end."""
    server.play_ours()
    assert said_by(python, WHOLE_LIFE, server.url) == ("(256,) (256,) (256,) 0\n", "", 0)


def test_a_partial_result_lets_its_vectors_go(python: Path, server: Any) -> None:
    """From Python 3.12 on the frames behind an error's cause lead to the frames of the call."""
    server.play_ours()
    embed = server.routes["/v1/embeddings"]

    def play(seen: Any) -> Any:
        bad = [n for n, item in enumerate(seen.body["input"]) if item["text"] == "bad"]
        named = {"error": {"message": "no", "param": f"input[{bad[0]}]"}} if bad else None
        return embed(seen) if named is None else server.json_answer(named, 422)

    server.routes["/v1/embeddings"] = play
    assert said_by(python, LETS_GO, server.url) == ("3 True\n", "", 0)
