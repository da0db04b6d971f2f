"""One base with three adapters: what is refused before and after vLLM starts, and what vLLM is told."""

import asyncio
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN, TASKS
from damage import edit_and_rehash
from gpus import Machine
from jina_v4_merge.export.adapters import export_adapters
from jina_v4_serve.api import start_check
from jina_v4_serve.api.start_check import adapters_failure
from jina_v4_serve.api.vectors import Floats, NonFiniteError
from jina_v4_serve.checkpoint import BASE, Checkpoint, read_checkpoint
from jina_v4_serve.errors import CheckpointError, EngineError, OptionError
from jina_v4_serve.exported import Adapter, check_patterns, read_adapters
from jina_v4_serve.gateway.metrics import GatewayMetrics, merge
from jina_v4_serve.gateway.pages import merge_models
from jina_v4_serve.gateway.servers import Page
from jina_v4_serve.launch import sizing as room
from jina_v4_serve.launch.arguments import check_options, lora_arguments
from jina_v4_serve.launch.checks import environment, prepare
from jina_v4_serve.launch.revision import revision
from jina_v4_serve.launch.server import ServerSettings
from servers import free_port

WEIGHTS = "adapter_model.safetensors"
PROJECTOR = "multi_vector_projector.safetensors"
LAYER = "base_model.model.model.language_model.layers.1.mlp.up_proj.lora_B.weight"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The same base in another place."""
    return Path(shutil.copytree(GOLDEN / "checkpoint", tmp_path / "base"))


def base_of(exported: Path) -> Checkpoint:
    return read_checkpoint(exported / BASE, BASE)


def adapter(rank: int = 32, has_patterns: bool = False) -> Adapter:
    return Adapter(Path("/somewhere/code"), "code", "0" * 64, weight_bytes=0, rank=rank, has_patterns=has_patterns)


def edit_json(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def test_what_export_writes_is_accepted(one_export: Path) -> None:
    found = read_adapters(base_of(one_export))
    assert tuple(found) == TASKS
    assert {each.rank for each in found.values()} == {32}
    assert len({each.digest for each in found.values()} | {base_of(one_export).digest}) == 4


def test_a_digest_is_of_the_files_and_not_of_where_the_base_lay(one_export: Path, tmp_path: Path, base: Path) -> None:
    export_adapters(str(base), tmp_path / "again", with_base=True)
    again, first = (read_adapters(base_of(folder)) for folder in (tmp_path / "again", one_export))
    assert {task: each.digest for task, each in again.items()} == {task: each.digest for task, each in first.items()}


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "no adapter of a task": (lambda e: shutil.rmtree(e / "code"), "code is missing: each task's adapter"),
    "no manifest": (lambda e: (e / "code" / "manifest.json").unlink(), "code has no manifest.json"),
    "an adapter of another task": (
        lambda e: shutil.copytree(e / "retrieval", e / "code", dirs_exist_ok=True),
        "code is the checkpoint of task retrieval, not of code",
    ),
    "a projector cut short": (
        lambda e: (e / "code" / PROJECTOR).write_bytes((e / "code" / PROJECTOR).read_bytes()[:-4]),
        f"code/{PROJECTOR} has 131804 bytes, the manifest says 131808",
    ),
    "no projector": (lambda e: (e / "code" / PROJECTOR).unlink(), f"{PROJECTOR} is missing"),
    "a projector that is none": (
        lambda e: edit_and_rehash(e / "code" / PROJECTOR, lambda tensors: tensors.pop("multi_vector_projector.bias")),
        f"{PROJECTOR} is not a projector: it has multi_vector_projector.weight",
    ),
    "a layer without tensors": (
        lambda e: edit_and_rehash(e / "code" / WEIGHTS, lambda tensors: tensors.pop(LAYER)),
        f"{LAYER} is missing (1 in all)",
    ),
    "a tensor of no layer": (
        lambda e: edit_and_rehash(
            e / "code" / WEIGHTS, lambda tensors: tensors.update(other=torch.zeros(1).bfloat16())
        ),
        "other fits no layer",
    ),
    "a tensor of another dtype": (
        lambda e: edit_and_rehash(
            e / "code" / WEIGHTS, lambda tensors: tensors.update({LAYER: tensors[LAYER].float()})
        ),
        f"{LAYER} is F32, the manifest says bfloat16",
    ),
    "an adapter of another base": (
        lambda e: edit_json(e / "code" / "manifest.json", '"size": 824', '"size": 825'),
        "code was made for another base than",
    ),
    "a checkpoint in an adapter's place": (
        lambda e: edit_json(e / "code" / "manifest.json", '"part": "adapter"', '"part": null'),
        "code is not an adapter of `jina-v4-merge export-adapters`",
    ),
    "a canary of another export": (
        lambda e: (e / "code" / "canary.json").write_text('{"manifest_sha256": "0"}'),
        "canary.json was made for another checkpoint",
    ),
    "a base cut short": (
        lambda e: (e / BASE / "model-00001-of-00001.safetensors").write_bytes(b""),
        "has 0 bytes, the manifest says",
    ),
}


@pytest.mark.parametrize(("spoil", "said"), SPOILT.values(), ids=SPOILT)
def test_what_would_be_served_wrongly_is_named(spoil: Callable[[Path], object], said: str, exported: Path) -> None:
    spoil(exported)
    with pytest.raises(CheckpointError, match=re.escape(said)):
        prepare(ServerSettings(BASE, exported / BASE, port=free_port()))


def test_vllm_is_started_with_all_adapters_and_projectors(one_export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    launch = prepare(ServerSettings(BASE, one_export / BASE, port=free_port()))
    assert "--served-model-name=jina-embeddings-v4" in launch.arguments
    assert {"--enable-lora", "--max-lora-rank=32", "--max-loras=3", "--max-cpu-loras=3"} <= set(launch.arguments)
    modules = launch.arguments[launch.arguments.index("--lora-modules") + 1 :]
    assert [json.loads(module) for module in modules] == [
        {"name": f"jina-embeddings-v4-{task}", "path": str(one_export / task)} for task in TASKS
    ]
    (overrides,) = (each.partition("=")[2] for each in launch.arguments if each.startswith("--hf-overrides="))
    assert json.loads(overrides)["jina_v4_projectors"] == {task: str(one_export / task) for task in TASKS}
    assert launch.environment["JINA_V4_SERVED_TASKS"] == ",".join(TASKS)
    assert launch.environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "0"
    assert launch.banner.startswith("jina-embeddings-v4, one base for retrieval, text-matching, code, ")


@pytest.mark.parametrize(("rank", "told"), [(1, 8), (8, 8), (32, 32), (33, 64), (300, 320), (512, 512)])
def test_vllm_is_asked_for_the_next_rank_that_it_has(rank: int, told: int) -> None:
    assert f"--max-lora-rank={told}" in lora_arguments({"code": adapter(rank)})


def test_a_rank_that_vllm_has_no_room_for_is_refused() -> None:
    with pytest.raises(OptionError, match="rank 513 cannot be served: vLLM allows 512 at most"):
        lora_arguments({"code": adapter(513)})


def test_patterns_are_for_a_vllm_that_reads_them(exported: Path) -> None:
    config = exported / "code" / "adapter_config.json"
    before = config.stat().st_size
    edit_json(config, '"rank_pattern": {}', '"rank_pattern": {"q_proj": 8}')
    edit_json(config.parent / "manifest.json", f'"size": {before}', f'"size": {config.stat().st_size}')
    found = read_adapters(base_of(exported))
    assert [task for task, each in found.items() if each.has_patterns] == ["code"]
    check_patterns(found, (0, 32))
    with pytest.raises(OptionError, match=r"code/adapter_config.json sets rank_pattern .* reads from 0.32 on"):
        check_patterns(found, (0, 31))


@pytest.mark.parametrize(
    "option", ["enable_lora", "lora_modules", "max_lora_rank", "max_loras", "lora_dtype", "lora_target_modules"]
)
def test_options_about_adapters_are_ours(option: str) -> None:
    with pytest.raises(OptionError, match=f"--{option.replace('_', '-')} cannot be changed: adapters are folded into"):
        check_options({option: 1}, {option: 2})


def test_each_task_has_a_revision_of_its_own(one_export: Path) -> None:
    base = base_of(one_export)
    found = {task: revision(base, "float32", None, each) for task, each in read_adapters(base).items()}
    assert len(set(found.values())) == 3
    assert all(text.endswith("-float32-602112") for text in found.values())
    assert environment(TASKS)["JINA_V4_SERVED_TASKS"] == "retrieval,text-matching,code"


ROWS = {None: [1.0, 0, 0, 0], "retrieval": [0, 1.0, 0, 0], "text-matching": [0, 0, 1.0, 0], "code": [0, 0, 0, 1.0]}


def compared(**changes: list[float]) -> str | None:
    rows = ROWS | {name.replace("_", "-"): row for name, row in changes.items()}
    asked: list[str | None] = []

    async def embed(task: str | None) -> Floats:
        asked.append(task)
        return np.array(rows[task], np.float32)

    found = asyncio.run(adapters_failure(TASKS, embed))
    assert asked == [*TASKS, None]
    return found


def test_adapters_that_differ_are_right() -> None:
    assert compared() is None
    nearly = float(np.cos(0.02))  # 1 - cosine is 2e-4
    assert compared(code=[nearly, 0, 0, float(np.sin(0.02))]) is None


@pytest.mark.parametrize(
    ("changes", "pair"),
    [
        ({"code": ROWS[None]}, "code and no adapter"),
        ({"text_matching": ROWS["retrieval"]}, "retrieval and text-matching"),
        ({"code": [float("nan")] * 4}, "code and no adapter"),
        ({"code": [float(np.cos(0.01)), 0, 0, float(np.sin(0.01))]}, "code and no adapter"),
    ],
    ids=["the base's vector", "another task's", "NaN", "nearly the base's"],
)
def test_an_adapter_that_does_nothing_is_named(changes: dict[str, list[float]], pair: str) -> None:
    found = compared(**changes) or ""
    assert pair in found
    assert found.endswith("an adapter is not applied")


def test_adapters_that_cannot_be_compared_end_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(_: str | None) -> Floats:
        raise RuntimeError("no")

    async def hang(_: str | None) -> Floats:
        await asyncio.sleep(60)
        raise AssertionError

    async def not_finite(_: str | None) -> Floats:
        raise NonFiniteError("probe-0")

    monkeypatch.setattr(start_check, "TIMEOUT_S", 0.05)
    for embed in (fail, hang):
        with pytest.raises(EngineError, match="no vectors for the comparison of adapters"):
            asyncio.run(adapters_failure(TASKS, embed))
    assert "NaN or infinity" in (asyncio.run(adapters_failure(TASKS, not_finite)) or "")


def test_one_server_of_several_tasks_is_counted_once_by_the_labels_of_its_own() -> None:
    page = 'jobs{task="code"} 2.0\nupdates 3.0\n'
    text = merge(GatewayMetrics().registry, {"retrieval,code": page}).decode()
    assert 'jobs{task="code"} 2.0' in text
    assert 'updates{task="retrieval,code"} 3.0' in text


def test_the_gateway_names_each_tasks_own_revision() -> None:
    headers = {"X-Jina-V4-Task": "code, retrieval", "X-Jina-V4-Revision": "c, r", "X-Jina-V4-Pooling": "engine"}
    page = Page(200, headers, b'{"data": [{"id": "jina-embeddings-v4"}]}')
    alone = Page(200, headers | {"X-Jina-V4-Task": "text-matching", "X-Jina-V4-Revision": "t"}, page.body)
    content, merged = merge_models({"retrieval": page, "text-matching": alone, "code": page}, TASKS)
    assert merged["X-Jina-V4-Task"] == "retrieval, text-matching, code"
    assert merged["X-Jina-V4-Revision"] == "r, t, c"
    assert content["data"] == [{"id": "jina-embeddings-v4"}]


@pytest.mark.parametrize(("gib", "fits"), [(6, False), (60, True)])
def test_whether_three_servers_fit_a_cpus_memory(
    gib: int, fits: bool, folded: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "find_vllm", lambda: True)
    monkeypatch.setattr(room.cpu, "memory_bytes", lambda: gib * 2**30)
    found = room.fit(folded("bfloat16"), "bfloat16")
    assert found.fits == fits
    # 3 x (0.006 of weights, 0.094 of keys and values, 2)
    assert found.line.startswith(f"3 servers need 6.3 GiB in bfloat16, of {gib}.0 GiB of memory: they ")
    assert found.line.endswith("they fit" if fits else "they do not fit")


@pytest.mark.parametrize(("free_mib", "fits"), [(8_000, False), (9_000, True), (80_000, True)])
def test_whether_three_servers_fit_what_is_free_of_a_gpu(
    free_mib: int, fits: bool, folded: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Machine((f"L4, 580.0, 23034, {free_mib}, 8.9, [N/A]",)).use(tmp_path, monkeypatch)
    found = room.fit(folded("bfloat16"))
    assert found.fits == fits  # 3 x (0.006 of weights, 0.097 of keys and values, 2.25) GiB in nine tenths of it
    assert found.line.startswith("3 servers need 7.1 GiB in bfloat16, of ")


@pytest.mark.parametrize("step", [None, room.Step(2048, 1024)], ids=["CPU", "GPU"])
def test_adapters_count_with_the_base(one_export: Path, step: room.Step | None) -> None:
    base = base_of(one_export)
    adapters = read_adapters(base).values()
    alone, together = (room.needed_bytes(base, beside, base.dtype, step) for beside in ((), adapters))
    files = [one_export / task / name for task in TASKS for name in (WEIGHTS, PROJECTOR)]
    assert together - alone == sum(path.stat().st_size for path in files)
