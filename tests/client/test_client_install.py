"""The client is thin: what it depends on, and what importing it costs."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

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
    assert "optional-dependencies" not in project


def test_importing_the_package_loads_neither_models_nor_http() -> None:
    loaded = modules_after("import jina_v4_client")
    assert not loaded & {*HEAVY, "openai", "httpx2"}


def test_a_client_loads_no_models() -> None:
    loaded = modules_after("import jina_v4_client; jina_v4_client.EmbeddingsClient('http://127.0.0.1:9')")
    assert "openai" in loaded
    assert not loaded & {*HEAVY}


def test_the_wheel_carries_its_types_and_nothing_else(tmp_path: Path) -> None:
    build = "import sys; from hatchling.build import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], check=True, capture_output=True, cwd=PROJECT)
    (wheel,) = tmp_path.glob("*.whl")
    listing = subprocess.run(
        [sys.executable, "-m", "zipfile", "-l", str(wheel)], check=True, capture_output=True, text=True
    ).stdout
    assert "jina_v4_client/py.typed" in listing
    names = [line.split()[0] for line in listing.splitlines()[1:]]
    assert {re.sub(r"-[0-9.]+\.", ".", name.split("/")[0]) for name in names} == {
        "jina_v4_client",
        "jina_v4_client.dist-info",
    }
