"""Replacing checkpoints: only our own, only by whole ones, and in one step."""

import errno
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, TASKS
from damage import files_of
from jina_v4_merge import fold as fold_module
from jina_v4_merge.errors import MergeError, OutputError
from jina_v4_merge.fold import fold
from jina_v4_merge.writing import filesystem as exchange_module
from jina_v4_merge.writing import staging as staging_module

BASE = str(GOLDEN / "checkpoint")
Run = Callable[..., subprocess.CompletedProcess[str]]


def dtypes_of(out: Path) -> dict[str, str]:
    return {path.parent.name: json.loads(path.read_text())["dtype"] for path in out.glob("*/manifest.json")}


@pytest.fixture
def old(out: Path) -> Path:
    """Two of three checkpoints, in float16."""
    fold(BASE, out, TASKS[:2], "float16")
    return out


@pytest.mark.long
def test_force_replaces_what_is_there_and_makes_what_is_not(old: Path, run: Run, folded: Callable[[str], Path]) -> None:
    done = run("fold", "--base", BASE, "--out", old, "--force")
    assert (done.returncode, done.stderr) == (0, "")
    assert files_of(old) == files_of(folded("bfloat16"))


def test_without_force_the_old_ones_are_an_error_and_stay(old: Path) -> None:
    before = files_of(old)
    with pytest.raises(OutputError, match="exist already; remove them, add --force"):
        fold(BASE, old)
    assert files_of(old) == before


@pytest.mark.parametrize(
    "manifest",
    [None, "", "[]", "{}", '{"model": "jina-embeddings-v4"}', '{"model": "x", "tool": {"name": "jina-v4-merge"}}'],
)
def test_what_is_no_checkpoint_of_ours_is_never_replaced(manifest: str | None, old: Path) -> None:
    precious = old / f"jina-embeddings-v4-{TASKS[2]}"
    precious.mkdir()
    if manifest is not None:
        (precious / "manifest.json").write_text(manifest)
    before = files_of(old)
    with pytest.raises(OutputError, match=f"{precious} has no manifest.json of jina-v4-merge"):
        fold(BASE, old, force=True)
    assert precious.exists()
    assert files_of(old) == before


@pytest.mark.parametrize("to", ["itself", "a checkpoint", "nothing"])
def test_a_link_is_never_replaced(to: str, old: Path) -> None:
    link = old / f"jina-embeddings-v4-{TASKS[2]}"
    link.symlink_to({"itself": link, "a checkpoint": old / f"jina-embeddings-v4-{TASKS[0]}", "nothing": "x"}[to])
    with pytest.raises(OutputError, match=f"{link} has no manifest"):
        fold(BASE, old, force=True)
    assert link.is_symlink()


def test_a_failure_leaves_the_old_ones(old: Path, base: Path, edit_weights: Callable[..., None]) -> None:
    edit_weights(base, lambda tensors: tensors["model.norm.weight"].view(-1)[3].fill_(torch.nan))
    before = files_of(old)
    with pytest.raises(MergeError, match=r"model\.norm\.weight"):
        fold(str(base), old, force=True)
    assert files_of(old) == before


def test_an_interruption_between_two_of_them_takes_the_first_back(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files_of(old)
    calls: list[Path] = []

    def once(one: Path, other: Path) -> None:
        calls.append(other)
        if len(calls) == 2:
            raise KeyboardInterrupt
        exchange_module.exchange(one, other)

    monkeypatch.setattr(staging_module, "exchange", once)
    with pytest.raises(KeyboardInterrupt):
        fold(BASE, old, force=True)
    assert [path.name for path in calls] == [f"jina-embeddings-v4-{task}" for task in (*TASKS[:2], TASKS[0])]
    assert files_of(old) == before


def test_what_becomes_something_else_meanwhile_is_not_replaced(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish, first = fold_module.publish, old / f"jina-embeddings-v4-{TASKS[0]}"

    def publish_late(*arguments: object) -> None:
        (first / "manifest.json").unlink()
        publish(*arguments)

    monkeypatch.setattr(fold_module, "publish", publish_late)
    with pytest.raises(OutputError, match=f"{first} has no manifest"):
        fold(BASE, old, force=True)
    assert dtypes_of(old) == {f"jina-embeddings-v4-{TASKS[1]}": "float16"}


def test_where_folders_cannot_change_places_nothing_is_replaced(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(exchange_module, "exchange", refuse)
    before = files_of(old)
    with pytest.raises(OutputError, match=r"cannot be replaced in one step on this file system; remove .*retrieval"):
        fold(BASE, old, force=True)
    assert files_of(old) == before
    assert len(fold(BASE, old, TASKS[2:], force=True)) == 1, "nothing to replace"


def test_an_exchange_of_what_is_not_there_says_so(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    with pytest.raises(FileNotFoundError, match="other"):
        exchange_module.exchange(tmp_path / "one", tmp_path / "other")
    assert (tmp_path / "one").exists()
