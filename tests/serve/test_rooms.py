"""The rooms of serve: vLLM stays behind its fence, nothing imports in a circle, and `--help` loads no library."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jina_v4_serve
import pytest
from servers import BIN

PACKAGE = Path(jina_v4_serve.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
FENCE = PACKAGE / "vllm_side"
# Names of vLLM's objects and attributes: code outside vllm_side/ that uses one depends on vLLM.
VLLMS = {
    "engine_client", "hf_config", "lora_config", "lora_requests", "mm_processor_kwargs", "model_config",
    "multimodal_config", "openai_serving_models", "parallel_config", "pooling_metadata", "renderer", "scheduler_config",
    "vllm_config",
}  # fmt: skip
LONGEST = 350  # lines of a module


def imported(tree: ast.AST) -> Iterator[str]:
    """Yield the modules that a module imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", [path for path in MODULES if FENCE not in path.parents], ids=name_of)
def test_vllm_is_touched_behind_the_fence_alone(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert not [module for module in imported(tree) if module.split(".")[0] == "vllm"]
    touched = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)} & VLLMS
    assert not touched


def test_the_fence_holds_what_touches_vllm() -> None:
    """The list above is of names that are used: one that vLLM no longer has would guard nothing."""
    used = {
        node.attr
        for path in FENCE.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
    } | {
        argument.arg
        for path in FENCE.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.arguments)
        for argument in [*node.args, *node.kwonlyargs]
    }
    assert used >= VLLMS


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_is_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LONGEST


def test_no_module_imports_itself_by_way_of_others() -> None:
    names = {".".join(("jina_v4_serve", *path.relative_to(PACKAGE).with_suffix("").parts)): path for path in MODULES}
    edges: dict[str, set[str]] = {}
    for name, path in names.items():
        tree = ast.parse(path.read_text())
        at_top = ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])
        edges[name] = {module for module in imported(at_top) if module in names}
    while free := {name for name, needs in edges.items() if not needs & edges.keys()}:
        edges = {name: needs for name, needs in edges.items() if name not in free}
    assert not edges, f"in a circle: {sorted(edges)}"


HEAVY = ("vllm", "torch", "PIL", "aiohttp", "prometheus_client", "pydantic", "fastapi", "orjson", "numpy", "ray")


def test_help_loads_no_library() -> None:
    program = f"import sys, jina_v4_serve.cli; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    shown = subprocess.run([BIN / "jina-v4-serve", "--help"], capture_output=True, text=True, check=True).stdout
    assert "retrieval" in shown


def test_the_page_for_developers_names_modules_that_exist() -> None:
    page = (Path(__file__).parents[2] / "docs" / "development.md").read_text()
    table = page.partition("### What goes where")[2].partition("## client")[0]
    named = set(re.findall(r"`((?:api|launch|gateway|vllm_side|doctor|settings)[/.\w]*)`", table))
    assert len(named) > 10
    for name in named:
        path = PACKAGE / name.split(".")[0]
        assert path.is_dir() or path.with_suffix(".py").exists(), name
