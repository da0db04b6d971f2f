"""What the launcher tells vLLM's CPU build, by the machine: threads, executor, dtype."""

import os
import sys
from pathlib import Path

import pytest
from jina_v4_serve.launch import cpu
from jina_v4_serve.launch.arguments import ONE_PROCESS, executor_option


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two cores, 24 GiB, no container, a processor without AMX."""
    for name in ("OMP_NUM_THREADS", "VLLM_CPU_OMP_THREADS_BIND"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    memory, real = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 6 * 2**20}, os.sysconf
    monkeypatch.setattr(os, "sysconf", lambda name: memory.get(name) or real(name))  # libraries ask for more
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    for name in ("_CGROUPS", "_OWN_CGROUPS", "_CPU_INFO"):
        monkeypatch.setattr(cpu, name, tmp_path / name)
    (tmp_path / "_CGROUPS").mkdir()
    (tmp_path / "_CPU_INFO").write_text("vendor_id\t: GenuineIntel\nflags\t\t: avx512f avx512_bf16 lm\n")


@pytest.mark.parametrize(
    ("limit", "n_cores"),
    [(None, 2), ("max 100000", 2), ("100000 100000", 1), ("50000 100000", 1), ("900000 100000", 2)],
)
def test_the_cores_of_a_container_count(limit: str | None, n_cores: int, tmp_path: Path) -> None:
    if limit is not None:
        (tmp_path / "_CGROUPS/cpu.max").write_text(f"{limit}\n")
    assert cpu.n_cores() == n_cores


@pytest.mark.parametrize(("limit", "n_gib"), [(None, 24), ("max", 24), (str(4 * 2**30), 4), (str(99 * 2**30), 24)])
def test_the_memory_of_a_container_counts(limit: str | None, n_gib: int, tmp_path: Path) -> None:
    if limit is not None:
        (tmp_path / "_CGROUPS/memory.max").write_text(f"{limit}\n")
    assert cpu.memory_bytes() == n_gib * 2**30


V2 = {"cpu.max": "150000 100000", "memory.max": str(4 * 2**30)}
V1_CPU = {"cpu.cfs_quota_us": "150000", "cpu.cfs_period_us": "100000"}
V1_MEMORY = {"memory.limit_in_bytes": str(4 * 2**30)}


@pytest.mark.parametrize(
    ("own", "limits"),
    [
        ("0::/system.slice/jina.service", {"system.slice/jina.service": V2}),
        ("0::/slurm/job_7/step_0", {"slurm/job_7": V2}),
        ("4:memory:/docker/abc\n2:cpu,cpuacct:/docker/abc", {"cpu": V1_CPU, "memory": V1_MEMORY}),
        ("4:memory:/job/a\n2:cpu:/job\n0::/", {"cpu/job": V1_CPU, "memory/job": V1_MEMORY}),
    ],
    ids=["a service", "the job above", "a container of v1", "a job of v1"],
)
def test_limits_are_found_wherever_the_kernel_has_them(
    own: str, limits: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    (tmp_path / "_OWN_CGROUPS").write_text(f"{own}\n")
    unlimited = {"cpu": {"cpu.cfs_quota_us": "-1"}, "memory": {"memory.limit_in_bytes": str(2**63 - 4096)}}
    for folder, files in (*unlimited.items(), *limits.items()):
        (tmp_path / "_CGROUPS" / folder).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (tmp_path / "_CGROUPS" / folder / name).write_text(f"{content}\n")
    assert (cpu.n_cores(), cpu.memory_bytes()) == (1, 4 * 2**30)


def test_a_server_takes_all_cores_of_a_small_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cpu.threads(1) == {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "2"}
    assert cpu.threads(3)["OMP_NUM_THREADS"] == "2"
    assert cpu.threads(3)["OMP_WAIT_POLICY"] == "passive", "a thread that waits must not keep a core from the others"
    assert executor_option(1, ()) == (f"--distributed-executor-backend={ONE_PROCESS}",)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(32)))
    assert cpu.threads(3)["OMP_NUM_THREADS"] == "10"
    assert cpu.threads(1) == {}, "on a large machine vLLM binds its threads itself"
    assert executor_option(1, ()) == ()
    (tmp_path / "_CGROUPS/cpu.max").write_text("1600000 100000\n")
    assert cpu.threads(1)["OMP_NUM_THREADS"] == "16", "vLLM would use all 32 cores in a container that may use 16"


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "VLLM_CPU_OMP_THREADS_BIND"])
def test_what_the_operator_has_set_is_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    assert (cpu.threads(1), cpu.threads(3), executor_option(1, ())) == ({}, {}, ())
    monkeypatch.setenv(name, "")  # as Compose's ${NAME:-} sets it
    assert cpu.threads(1) == {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "2"}


def test_the_engine_keeps_freed_memory_unless_the_operator_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "65536")
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "7")
    monkeypatch.setattr(cpu, "tcmalloc", lambda: None)
    assert cpu.allocator() == {
        "MALLOC_MMAP_MAX_": "65536",
        "MALLOC_TRIM_THRESHOLD_": str(2**40),
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "7",
    }


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", "libtcmalloc_minimal.so.4"),
        ("libgomp.so.1", "libtcmalloc_minimal.so.4:libgomp.so.1"),
        ("/opt/libjemalloc.so.2", None),
    ],
)
def test_tcmalloc_is_preloaded_where_it_is_installed(
    before: str, after: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    installed = {"tcmalloc_minimal": "libtcmalloc_minimal.so.4"}
    monkeypatch.setattr(cpu, "find_library", installed.get)
    monkeypatch.setenv("LD_PRELOAD", before)
    assert cpu.allocator().get("LD_PRELOAD") == after


@pytest.mark.parametrize("folder", ["venv", "a venv"])
def test_the_fetched_tcmalloc_goes_before_the_systems(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = tmp_path / folder / "lib/tcmalloc/libtcmalloc_minimal.so.4"
    fetched.parent.mkdir(parents=True)
    fetched.touch()
    monkeypatch.setattr(sys, "prefix", str(tmp_path / folder))
    monkeypatch.setattr(cpu, "find_library", {"tcmalloc_minimal": "libtcmalloc_minimal.so.4"}.get)
    assert cpu.tcmalloc() == (str(fetched) if folder == "venv" else "libtcmalloc_minimal.so.4")


@pytest.mark.filterwarnings("ignore")  # vLLM's imports are not ours to mend
def test_pictures_are_prepared_on_one_thread_whatever_the_engine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from jina_v4_serve.vllm_side.endpoints import leave_cores_to_the_engine
    from vllm.utils.torch_utils import set_default_torch_num_threads

    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    before = torch.get_num_threads()
    try:
        with set_default_torch_num_threads():  # as vLLM does around its image processor
            assert torch.get_num_threads() == 2
        leave_cores_to_the_engine()
        with set_default_torch_num_threads():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("option", ["--tensor-parallel-size=2", "--data_parallel_size", "-tp=2", "-dp"])
def test_several_workers_have_vllms_own_executor(option: str) -> None:
    assert executor_option(1, ("--max-num-seqs", "8", option)) == ()


def test_float32_is_faster_where_bfloat16_is_slow_and_memory_has_room(tmp_path: Path) -> None:
    real_weights, real_keys_and_values = 14 * 2**30, 48 * 10**8
    assert not cpu.float32_is_faster(real_weights + real_keys_and_values), "24 GiB are not enough for the real model"
    assert cpu.float32_is_faster(16 * 2**30)
    (tmp_path / "_CGROUPS/memory.max").write_text(str(16 * 2**30))
    assert not cpu.float32_is_faster(16 * 2**30)


def test_bfloat16_stays_where_it_is_fast_or_not_known_to_be_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "_CPU_INFO").write_text("flags\t\t: avx512f amx_bf16 amx_tile lm\n")
    assert not cpu.float32_is_faster(1)
    (tmp_path / "_CPU_INFO").write_text("vendor_id\t: AuthenticAMD\nflags\t\t: avx512f avx512_bf16 lm\n")
    assert not cpu.float32_is_faster(1)
    (tmp_path / "_CPU_INFO").write_text("vendor_id\t: AuthenticAMD\nflags\t\t: avx512f lm\n")
    assert cpu.float32_is_faster(1)
    (tmp_path / "_CPU_INFO").unlink()
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert not cpu.float32_is_faster(1)
