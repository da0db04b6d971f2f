"""The journal of `jina-v4-embed` where a step to the disk fails: what is kept later is what it says it is."""

import errno
import itertools
import json
import os
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from embed_command import Embed, embed_with, read, read_errors
from jina_v4_client.embed.errors import StoppedError, UsageError
from jina_v4_client.embed.journal import Journal, Settled
from numpy.typing import NDArray
from PIL import Image
from small_disk import DISK, fill, needs_namespaces, on_small_disk

WIDTH = 8
TEXTS = [f"text {number}" for number in range(200)]
# The text of each row is sent in a request of its own; the server is down for the tenth, and for no other.
OPTIONS = ("--task", "retrieval", "--max-retries", 0, "--workers", 1, "--batch-size", 1, "--quiet")
GO_ON = "run the same command again to resume"


class FullAfter:
    """A file on a disk that is full once some bytes are written."""

    def __init__(self, file: Any, n_bytes: int) -> None:
        self._file, self._left = file, n_bytes

    def write(self, content: memoryview) -> int:
        if not self._left:
            raise OSError(errno.ENOSPC, "No space left on device")
        n_written: int = self._file.write(content[: self._left])
        self._left -= n_written
        return n_written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with Journal(tmp_path, "float32") as made:
        yield made


def vector(value: float) -> NDArray[np.float32]:
    return np.full(WIDTH, value, np.float32)


def record(journal: Journal, number: int) -> None:
    digest = bytes([number])
    journal.record({digest: vector(number)}, [Settled(number, f"row {number}", digest)])


def kept(journal: Journal) -> dict[int, NDArray[np.generic]]:
    return {row.number: journal.vectors([row.span])[0] for row in journal.recorded() if row.span is not None}


def check(journal: Journal, *numbers: int) -> None:
    found = kept(journal)
    assert list(found) == list(numbers)
    for number in numbers:
        np.testing.assert_array_equal(found[number], vector(number))


@pytest.mark.parametrize("n_bytes", [0, 5, WIDTH * 4 - 1])
def test_what_comes_after_an_append_that_broke_off_is_in_its_place(
    n_bytes: int, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the disk is full, and the batches in flight, which are kept all the same, are smaller."""
    record(journal, 1)
    with monkeypatch.context() as patch:
        patch.setattr(journal, "_file", FullAfter(journal._file, n_bytes))
        with pytest.raises(StoppedError, match="No space left on device"):
            record(journal, 2)
    record(journal, 3)
    check(journal, 1, 3)


def test_what_comes_after_a_transaction_that_failed_is_in_its_place(journal: Journal, tmp_path: Path) -> None:
    record(journal, 1)
    before = journal._database

    class Failing:
        def __getattr__(self, name: str) -> Any:
            return getattr(before, name)

        def __enter__(self) -> None:
            raise sqlite3.OperationalError("database or disk is full")

        def __exit__(self, *_: object) -> None:
            pass

    journal._database = Failing()  # type: ignore[assignment]
    with pytest.raises(StoppedError, match="disk is full"):
        record(journal, 2)
    journal._database = before
    record(journal, 3)
    check(journal, 1, 3)


def test_what_a_killed_run_left_behind_the_last_vector_is_cut_off(tmp_path: Path) -> None:
    with Journal(tmp_path, "float32") as journal:
        record(journal, 1)
    with (tmp_path / "vectors.bin").open("ab") as file:
        file.write(b"half of a vector")
    with Journal(tmp_path, "float32") as journal:
        assert (tmp_path / "vectors.bin").stat().st_size == WIDTH * 4
        record(journal, 2)
        check(journal, 1, 2)


@pytest.fixture
def embed(server: Any) -> Iterator[Embed]:
    """Run the command in a folder that every user may enter and write; the first run is stopped by the server."""
    server.play_ours()
    play, numbers = server.routes["/v1/embeddings"], itertools.count(1)
    server.routes["/v1/embeddings"] = lambda seen: server.json_answer({}, 503) if next(numbers) == 10 else play(seen)
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        os.chdir(folder)
        Path("a.txt").write_text("\n".join(TEXTS))
        yield embed_with("--base-url", server.url, *OPTIONS)
        os.chdir(before)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Let this process read a folder and not write it, also if it is root's."""
    folder.chmod(0o555)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)  # nobody
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)
        folder.chmod(0o755)


def n_sent(server: Any) -> int:
    return len(server.bodies("/v1/embeddings"))


def check_output(path: str, server: Any) -> None:
    _, vectors = read(Path(path))
    assert (vectors == np.stack([server.vector(f"Passage: {text}") for text in TEXTS])).all()


@pytest.mark.parametrize("restart", [False, True], ids=["resumed", "restarted"])
def test_work_that_may_not_be_written_stays_where_it_was(restart: bool, embed: Embed, server: Any) -> None:
    assert embed("a.txt", "out.parquet").code == 1
    work = Path("out.parquet.partial")
    with read_only(work):
        there = sorted(path.name for path in work.iterdir())
        ran = embed(*["--restart"] * restart, "a.txt", "out.parquet")
        assert sorted(path.name for path in work.iterdir()) == there
    if restart:
        assert (ran.code, ran.line) == (2, f"error: {work} cannot be removed: Permission denied")
    else:
        assert ran.code == 1
        assert ran.line.startswith(f"error: {work} cannot be used until this is mended: ")
        assert ran.line.endswith(GO_ON)
    before = n_sent(server)
    assert embed("a.txt", "out.parquet").code == 0
    assert n_sent(server) - before == len(TEXTS) - 9
    check_output("out.parquet", server)


def test_a_journal_that_cannot_be_opened_leaves_no_file_open(tmp_path: Path) -> None:
    """While the error is held, the files of a failed run would be too, and with them its lock."""
    (tmp_path / "journal.sqlite").write_bytes(bytes(4096))
    n_open = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(UsageError, match="is damaged") as held:
        Journal(tmp_path, "float32")
    assert len(list(Path("/proc/self/fd").iterdir())) == n_open, held


@needs_namespaces
def test_a_run_on_a_full_disk_says_so_and_resumes_once_there_is_room(embed: Embed, server: Any) -> None:
    script = f"""
import json
from pathlib import Path
from embed_command import embed_with
from small_disk import fill
embed = embed_with("--base-url", {server.url!r}, *{OPTIONS!r})
Path("a.txt").write_text({chr(10).join(TEXTS)!r})
ran = [embed("a.txt", "out.parquet")]
full = fill(Path())
ran.append(embed("a.txt", "out.parquet"))
full.unlink()
ran.append(embed("a.txt", "out.parquet"))
print(json.dumps([(one.code, one.stderr) for one in ran]))
"""
    command = [str(part) for part in on_small_disk(2**22, [sys.executable, "-c", script])]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    (_, _), (code, said), (last_code, _) = json.loads(done.stdout)
    assert (code, last_code) == (1, 0)
    assert said.startswith("error: out.parquet.partial cannot be used until this is mended: ")
    assert "disk" in said  # "disk I/O error", as SQLite says
    assert said.endswith(f"{GO_ON}\n")
    assert n_sent(server) == len(TEXTS) + 1


@needs_namespaces
def test_a_disk_that_is_full_before_the_first_row_is_reported_in_one_line(server: Any) -> None:
    server.play_ours()
    server.revisions = {"retrieval": "94ab5b9a669fa4df-float32-602112"}  # which is noted in the work folder
    models = server.routes["/v1/models"]
    command = [sys.executable, "-m", "jina_v4_client.embed", "--base-url", server.url, *OPTIONS, "-", "out.parquet"]
    command = [str(part) for part in on_small_disk(2**20, command)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:

        def fill_and_answer(seen: Any) -> Any:
            fill(Path(f"/proc/{process.pid}/root{DISK}"))
            return models(seen)

        server.routes["/v1/models"] = fill_and_answer
        _, said = process.communicate('{"text": "x"}')
    reason = "out.parquet.partial cannot be used until this is mended: No space left on device"
    assert (process.returncode, said) == (1, f"error: {reason}\n")


@needs_namespaces
def test_a_full_folder_for_temporary_files_ends_no_run_at_its_end(server: Any, tmp_path: Path) -> None:
    server.play_ours()
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "x", "id": "{"long" * 200} {i}"}}\n' for i in range(8192)))
    command = [sys.executable, "-m", "jina_v4_client.embed", "--base-url", server.url, "--task", "retrieval"]
    command += ["--id-column", "id", str(tmp_path / "a.jsonl"), str(tmp_path / "out.npy")]
    command = [str(part) for part in on_small_disk(2**18, command)]
    done = subprocess.run(command, env={**os.environ, "SQLITE_TMPDIR": str(DISK)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning: repeated ids were not counted: no room for temporary files; set SQLITE_TMPDIR" in done.stderr
    assert len(np.load(tmp_path / "out.npy")) == 8192


def test_a_message_with_a_name_that_is_not_utf_8_is_kept(embed: Embed) -> None:
    Path("scans").mkdir()
    for name in (b"ok.png", b"caf\xe9.png"):
        Image.new("RGB", (40, 30)).save(f"scans/{os.fsdecode(name)}")
    Path(f"scans/{os.fsdecode(name)}").chmod(0)
    with read_only(Path("scans")):
        ran = embed("--on-error", "skip", "scans", "out.parquet")
    assert ran.code == 3
    escaped = "scans/caf\\udce9.png"
    assert read_errors("out.parquet") == [{"row": 1, "id": escaped, "error": f"{escaped}: Permission denied"}]


@pytest.mark.parametrize("first_byte", [0, 8192], ids=["all of it", "its tables"])
def test_a_damaged_database_is_reported_as_damaged(first_byte: int, embed: Embed, server: Any) -> None:
    assert embed("a.txt", "out.parquet").code == 1
    with Path("out.parquet.partial/journal.sqlite").open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(first_byte)
        file.write(b"\xaa" * (size - first_byte))
    ran = embed("a.txt", "out.parquet")
    assert ran.code == 2
    assert ran.line.startswith("error: out.parquet.partial is damaged (")
    assert ran.line.endswith("; start anew with --restart")
    assert embed("--restart", "a.txt", "out.parquet").code == 0
    check_output("out.parquet", server)
