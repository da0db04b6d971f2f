"""Room on the disk is known to the byte before the first byte is written."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import GOLDEN, TASKS
from jina_v4_merge import fold as fold_module
from jina_v4_merge.errors import OutputError
from jina_v4_merge.export.adapters import export_adapters
from jina_v4_merge.export.gguf import export_gguf
from jina_v4_merge.fold import fold
from jina_v4_merge.standin.weights import standin
from jina_v4_merge.writing import filesystem as space

BASE = str(GOLDEN / "checkpoint")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The sizes for which room was asked."""
    calls: list[list[int]] = []
    require_space = space.require_space

    def note(folder: Path, sizes: list[int]) -> None:
        calls.append(sizes)
        require_space(folder, sizes)

    monkeypatch.setattr(fold_module, "require_space", note)
    return calls


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "copies"])
@pytest.mark.parametrize("tasks", [TASKS, TASKS[1:2]], ids=["all", "one"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_bytes_asked_for_are_those_written(
    dtype: str, tasks: tuple[str, ...], links: bool, out: Path, asked: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fold_module, "can_link", lambda _: links)
    fold(BASE, out, tasks, dtype)
    files = {path.stat().st_ino: path.stat().st_size for path in out.rglob("*") if path.is_file()}
    assert sorted(asked[0]) == sorted([*files.values(), *(1 for _ in tasks)])
    assert all((path.stat().st_nlink == len(tasks)) == links for path in out.glob("*/model-00001*") if len(tasks) > 1)


def with_room(monkeypatch: pytest.MonkeyPatch, n_blocks: int) -> None:
    monkeypatch.setattr(space.os, "statvfs", lambda _: SimpleNamespace(f_frsize=4096, f_bavail=n_blocks))


def test_room_that_is_one_block_short_is_an_error_before_anything_is_written(
    out: Path, asked: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    fold(BASE, out)
    needed = sum(-(-size // 4096) for size in asked[0])
    other = out.with_name("other")
    with_room(monkeypatch, needed - 1)
    with pytest.raises(OutputError, match=rf"{other}: {needed * 4096} bytes .* are needed and {(needed - 1) * 4096} "):
        fold(BASE, other)
    assert not other.exists()
    with_room(monkeypatch, needed)
    assert len(fold(BASE, other)) == 3


@pytest.mark.parametrize(
    "write",
    [
        lambda out: fold(BASE, out),
        lambda out: export_adapters(BASE, out),
        lambda out: export_gguf(BASE, out, "code"),
        lambda out: standin(out),
    ],
    ids=["fold", "export-adapters", "export-gguf", "standin"],
)
def test_a_disk_that_is_full_from_the_start_is_an_error(
    write: Callable[[Path], object], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_room(monkeypatch, 0)
    for writer in ("writing.shards", "export.gguf_file"):
        monkeypatch.setattr(f"jina_v4_merge.{writer}.HashedFile", None)  # stopped before that
    with pytest.raises(OutputError, match=r"are needed and 0 .* are free; make room or choose another place"):
        write(out)
    assert not out.exists()


@pytest.mark.parametrize("with_base", [True, False])
def test_the_room_asked_for_adapters_is_enough(with_base: bool, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr("jina_v4_merge.export.adapters.require_space", lambda _, sizes: asked.extend(sizes))
    n_folders = len(export_adapters(BASE, out, with_base=with_base))
    written = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    assert written <= sum(asked) <= written + n_folders * (1 << 20)


def test_the_room_asked_for_a_gguf_file_is_enough(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr("jina_v4_merge.export.gguf.require_space", lambda _, sizes: asked.extend(sizes))
    export_gguf(BASE, out, "code", "f32")
    written = sum(path.stat().st_size for path in out.iterdir())
    assert written <= sum(asked) <= written + (16 << 20)


def test_the_room_asked_for_a_standin_is_that_which_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr("jina_v4_merge.standin.weights.require_space", lambda _, sizes: asked.extend(sizes))
    standin(tmp_path / "tiny")
    files = [path.stat().st_size for path in (tmp_path / "tiny").rglob("*") if path.is_file()]
    assert sorted(asked) == sorted([*files, 1, 1])
