"""Files that are not what their names say: Git LFS pointers, pickles and web pages, in a base and in its adapters."""

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN
from damage import split_adapters
from jina_v4_merge.errors import MergeError, SourceError
from jina_v4_merge.fold import fold
from jina_v4_merge.reading.weights import stored_tensors
from safetensors.torch import load_file

pytestmark = pytest.mark.long

Run = Callable[..., subprocess.CompletedProcess[str]]

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{7:064x}\nsize 11421896\n"
PAGE = "\n<!DOCTYPE html>\n<html><body>Log in</body></html>\n"
SHARD = "model-00001-of-00002.safetensors"
WEIGHTS = "adapters/adapter_model.safetensors"
FILES = [
    *sorted(path.name for path in (GOLDEN / "checkpoint").glob("*") if path.is_file() and "chat" not in path.name),
    "adapters/adapter_config.json",
    WEIGHTS,
]


@pytest.fixture(autouse=True)
def nothing_is_left_behind(out: Path) -> Iterator[None]:
    yield
    assert not out.exists()


def refusal(run: Run, out: Path, *options: object) -> str:
    """Fold with the command, and return the one line it prints."""
    done = run("fold", "--out", out, *options)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    return line


def pickle(path: Path) -> Path:
    """Put a pickle in the place of a file of safetensors; return where."""
    pickled = path.with_suffix(".bin")
    torch.save(load_file(path), pickled)
    path.unlink()
    return pickled


@pytest.mark.parametrize("content", [POINTER, PAGE], ids=["pointer", "web page"])
@pytest.mark.parametrize("name", FILES)
def test_a_pointer_or_web_page_in_the_place_of_any_file_is_named(
    name: str, content: str, base: Path, out: Path
) -> None:
    (base / name).write_text(content)
    with pytest.raises(SourceError) as caught:
        fold(str(base), out)
    what = "a Git LFS pointer" if content is POINTER else "a web page"
    assert str(caught.value).startswith(f"{base / name}: this is {what} and not the file itself; fetch the file ")
    assert "`hf download`" in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer.json", SHARD, WEIGHTS])
def test_the_command_says_how_to_fetch_what_a_pointer_points_to(name: str, base: Path, out: Path, run: Run) -> None:
    (base / name).write_text(POINTER)
    line = refusal(run, out, "--base", base)
    assert line.startswith(f"error: {base / name}: this is a Git LFS pointer")
    assert "`git lfs pull`" in line


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_pointer_in_a_folder_of_one_task_is_named(name: str, base: Path, out: Path) -> None:
    split_adapters(base / "adapters", ["code"])
    path = base / "adapters" / "code" / name
    path.write_text(POINTER)
    with pytest.raises(SourceError, match=f"{path}: this is a Git LFS pointer"):
        fold(str(base), out, ["code"])


def test_a_base_of_pickles_is_refused(base: Path, out: Path, run: Run) -> None:
    for path in base.glob("model-*.safetensors"):
        pickle(path).rename(base / f"pytorch_{path.stem}.bin")
    (base / "model.safetensors.index.json").rename(base / "pytorch_model.bin.index.json")
    line = refusal(run, out, "--base", base)
    assert "neither model.safetensors.index.json nor model.safetensors is there. pytorch_model-00001-of-000" in line
    assert "00002.bin is there, which is a pickle: only safetensors are read" in line
    assert "torch.load(FILE, weights_only=True)" in line


def test_an_index_of_pickles_is_refused(base: Path, out: Path) -> None:
    for path in base.glob("model-*.safetensors"):
        pickle(path)
    index = base / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(".safetensors", ".bin"))
    with pytest.raises(SourceError, match=r"model-00001-of-00002\.bin: this is a pickle of PyTorch; only safetensors"):
        fold(str(base), out)


@pytest.mark.parametrize("layout", ["one file", "a folder a task"])
def test_adapters_that_are_pickles_fold_once_they_are_converted_as_the_page_says(
    layout: str, base: Path, out: Path, run: Run, monkeypatch: pytest.MonkeyPatch, folded: Callable[[str], Path]
) -> None:
    folder = base / "adapters"
    if layout == "a folder a task":
        split_adapters(folder, ["code"])
        folder /= "code"
    (folder / "training_args.bin").touch()  # lies beside many, and holds no weights
    pickle(folder / "adapter_model.safetensors")
    line = refusal(run, out, "--base", base, "--task", "code")
    assert f"{folder / 'adapter_model.safetensors'}: no such file" in line
    assert "adapter_model.bin is there, which is a pickle: only safetensors are read" in line
    monkeypatch.chdir(folder)
    page = (Path(__file__).parents[2] / "docs" / "merge.md").read_text()
    (block,) = re.findall(r"^```python\n(import torch\n.*?)^```", page, re.MULTILINE | re.DOTALL)
    exec(block, {})  # noqa: S102 - our own page
    name = "jina-embeddings-v4-code/multi_vector_projector.safetensors"
    fold(str(base), out.with_name("made"), ["code"])
    assert (out.with_name("made") / name).read_bytes() == (folded("bfloat16") / name).read_bytes()


def test_a_pickle_that_was_only_renamed_is_refused(base: Path, out: Path) -> None:
    pickle(base / WEIGHTS).rename(base / WEIGHTS)
    with pytest.raises(SourceError, match=f"{base / WEIGHTS}: this is a pickle of PyTorch"):
        fold(str(base), out)


class Trap:
    """Does something when it is loaded from a pickle."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_no_pickle_is_ever_loaded(base: Path, out: Path, tmp_path: Path) -> None:
    for name in (SHARD, WEIGHTS):
        torch.save({"x": Trap(tmp_path / "sprung")}, base / name)
        with pytest.raises(SourceError, match="this is a pickle"):
            stored_tensors(base / name)
    with pytest.raises(SourceError, match="this is a pickle"):
        fold(str(base), out)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("command", [["verify", "folded", "--base"], ["export-adapters", "--out", "out", "--base"]])
@pytest.mark.parametrize("name", ["tokenizer.json", WEIGHTS])
def test_every_command_that_reads_a_base_names_a_pointer(
    name: str, command: list[str], base: Path, tmp_path: Path, folded: Callable[[str], Path], run: Run
) -> None:
    (base / name).write_text(POINTER)
    places = {"folded": folded("bfloat16"), "out": tmp_path / "out"}
    done = run(*(places.get(part, part) for part in command), base)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"error: {base / name}: this is a Git LFS pointer")


@pytest.mark.parametrize("name", ["manifest.json", "model-00001-of-00002.safetensors", "tokenizer.json"])
def test_a_checkpoint_that_is_pointers_is_found_out(
    name: str, tmp_path: Path, folded: Callable[[str], Path], run: Run
) -> None:
    copy = Path(shutil.copytree(folded("bfloat16") / "jina-embeddings-v4-code", tmp_path / "copy"))
    (copy / name).write_text(POINTER)
    done = run("verify", copy)
    assert done.returncode == 1
    what = "has 133 bytes" if name == "tokenizer.json" else "this is a Git LFS pointer"
    assert f"error: {copy / name}: {what}" in done.stderr


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "special_tokens_map.json", "generation_config.json"])
@pytest.mark.parametrize("content", ["", "{", "[1]"], ids=["empty", "cut short", "a list"])
def test_a_small_file_that_is_not_the_json_expected(name: str, content: str, base: Path, out: Path) -> None:
    (base / name).write_text(content)
    with pytest.raises(MergeError, match=f"{base / name}: (cannot be read|must be a JSON object)"):
        fold(str(base), out)
