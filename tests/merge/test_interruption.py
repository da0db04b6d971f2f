"""A fold is whole or not there: failures, signals and races, in real processes where they matter."""

import fcntl
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import GOLDEN, TASKS
from jina_v4_merge import fold as fold_module
from jina_v4_merge.errors import OutputError
from jina_v4_merge.export.gguf import export_gguf
from jina_v4_merge.fold import fold
from jina_v4_merge.standin.weights import standin
from servers import PATIENCE_S

pytestmark = pytest.mark.proof

BASE = str(GOLDEN / "checkpoint")
FINAL_NAMES = sorted(f"jina-embeddings-v4-{task}" for task in TASKS)

# The real command, which stops and says so when it comes to the last tensor that has adapters.
PAUSED = """
import sys, time
from jina_v4_merge import cli
from jina_v4_merge.reading import model
lora = model.Model.lora
def pause(self, task, base_name):
    if base_name == "multi_vector_projector.weight":
        print("half way", flush=True)
        for _ in range(6000):
            time.sleep(0.1)  # a signal just before a sleep is handled after it
    return lora(self, task, base_name)
model.Model.lora = pause
cli.app(sys.argv[1:])
"""


@contextmanager
def paused_fold(out: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-c", PAUSED, "fold", "--base", BASE, "--out", str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"half way\n"
            yield process
        finally:
            process.kill()


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    with paused_fold(tmp_path / "out") as process:
        (remains,) = (tmp_path / "out").iterdir()
        assert remains.name.startswith(".")
        assert list(remains.rglob("*.safetensors"))
        process.send_signal(number)
        assert process.wait(PATIENCE_S) != 0
        assert process.stderr is not None
        assert b"Traceback" not in process.stderr.read()
    assert names_in(tmp_path) == []


def test_a_killed_fold_has_no_final_name_and_the_next_one_clears_up(tmp_path: Path) -> None:
    with paused_fold(tmp_path) as process:
        process.kill()
        process.wait(PATIENCE_S)
    (remains,) = tmp_path.iterdir()
    assert remains.name.startswith(".jina-v4-merge-")
    assert remains.name.endswith(".tmp")
    fold(BASE, tmp_path)
    assert names_in(tmp_path) == FINAL_NAMES


def test_the_work_of_a_fold_that_is_still_alive_is_left_alone(tmp_path: Path) -> None:
    with paused_fold(tmp_path):
        (work,) = tmp_path.iterdir()
        fold(BASE, tmp_path, ["code"])
        assert names_in(tmp_path) == [work.name, "jina-embeddings-v4-code"]
        assert list(work.rglob("*.safetensors"))


def test_remains_that_cannot_be_locked_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".jina-v4-merge-old.tmp").mkdir()

    def refuse(*_: object) -> None:
        raise OSError("no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    fold(BASE, tmp_path, ["code"])
    assert names_in(tmp_path) == [".jina-v4-merge-old.tmp", "jina-embeddings-v4-code"]


def test_a_limit_on_the_size_of_files_leaves_nothing(tmp_path: Path) -> None:
    def no_file_over_a_megabyte() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    command = [sys.executable, "-c", "from jina_v4_merge.cli import app; app()", "fold", "--base", BASE]
    done = subprocess.run(
        [*command, "--out", tmp_path / "out"],
        preexec_fn=no_file_over_a_megabyte,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == f"error: {tmp_path / 'out'}: cannot finish what was begun here: [Errno 27] File too large\n"
    assert names_in(tmp_path) == []


# The real command on a disk of 24 MB, which has room for one checkpoint and which somebody else fills meanwhile.
ON_A_SMALL_DISK = """
import ctypes, errno, os, sys
from pathlib import Path
from jina_v4_merge import cli, files
out = Path(sys.argv[sys.argv.index("--out") + 1])
libc = ctypes.CDLL(None, use_errno=True)
mounted = libc.mount(b"none", bytes(out), b"tmpfs", 0, b"size=24m") == 0
write = files.HashedFile.write
n_written = 0
def fill(writer, content):
    global n_written
    n_written += len(content)
    if "fill" in os.environ and n_written > 4_000_000:
        if not mounted:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with (out / "of somebody else").open("wb") as file:
            file.write(bytes(os.statvfs(out).f_bavail * os.statvfs(out).f_bsize))
    write(writer, content)
files.HashedFile.write = fill
try:
    cli.app(sys.argv[1:], standalone_mode=False)
except BaseException as error:
    print(repr(error))
print(mounted, sorted(path.name for path in out.iterdir()))
if mounted:
    libc.umount(bytes(out))
"""


def test_a_disk_that_gets_full_leaves_nothing(tmp_path: Path) -> None:
    """On a file system of its own where one may be mounted, else with the error that the kernel gives on a full one."""
    command = [sys.executable, "-c", ON_A_SMALL_DISK, "fold", "--base", BASE, "--out", str(tmp_path), "--task", "code"]
    done = subprocess.run(command, env=os.environ | {"fill": "yes"}, capture_output=True, text=True, check=True)
    print(done.stdout)
    reason = "[Errno 28] No space left on device"
    assert done.stderr == f"error: {tmp_path}: cannot finish what was begun here: {reason}\n"
    mounted = done.stdout.splitlines()[-1].startswith("True")
    assert done.stdout.splitlines()[-1] == ("True ['of somebody else']" if mounted else "False []")
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout.splitlines()[-1], done.stderr) == (f"{mounted} ['jina-embeddings-v4-code']", "")


def test_a_target_that_appears_meanwhile_takes_the_finished_ones_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = fold_module.publish

    def publish_late(staged: list[Path], parent: Path, may_replace: None) -> None:
        (parent / staged[-1].name / "precious").mkdir(parents=True)
        publish(staged, parent, may_replace)

    monkeypatch.setattr(fold_module, "publish", publish_late)
    with pytest.raises(OutputError, match="not empty"):
        fold(BASE, tmp_path)
    assert names_in(tmp_path) == [f"jina-embeddings-v4-{TASKS[-1]}"]
    assert names_in(tmp_path / f"jina-embeddings-v4-{TASKS[-1]}") == ["precious"]


@pytest.mark.parametrize(
    "write",
    [
        lambda out: fold(BASE, out, ["code"]),
        lambda out: export_gguf(BASE, out / "gguf", "code"),
        lambda out: standin(out / "tiny"),
    ],
    ids=["fold", "export-gguf", "standin"],
)
def test_everything_is_on_the_disk_before_it_has_its_name(
    write: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[int] = set()
    at_rename: list[set[int]] = []
    fsync, rename = os.fsync, Path.rename

    def note_sync(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def note_rename(source: Path, target: Path) -> Path:
        at_rename.append({path.stat().st_ino for path in [source, *source.rglob("*")]} - synced)
        return rename(source, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "rename", note_rename)
    write(tmp_path)
    assert at_rename == [set()]
    assert tmp_path.stat().st_ino in synced


def test_a_standin_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jina_v4_merge.standin.weights.write_file", no_space)
    with pytest.raises(OutputError, match="No space left on device"):
        standin(tmp_path / "tiny")
    assert names_in(tmp_path) == []


def test_a_standin_does_not_replace_anything(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=f"{tmp_path} exists already"):
        standin(tmp_path)
    assert names_in(tmp_path) == []
