"""Folds again and again, killing each run with SIGKILL somewhere; prints a line of JSON on what each left.

One process imports torch and forks a child a run: a fold takes less time than that import. `merge/test_killed.py` runs
it, in a process of its own because it forks.

    python killing.py bytes BASE OUT N_KILLS [--force]   at random shares of the bytes that a run writes
    python killing.py int8 BASE OUT N_KILLS              the same of a fold with quantized matrices
    python killing.py gguf BASE OUT N_KILLS              the same of an export for llama.cpp
    python killing.py steps BASE OUT                     before and after each step of replacing checkpoints
"""

import contextlib
import hashlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

from jina_v4_merge.export import gguf_file as _imported_before_forks  # noqa: F401
from jina_v4_merge.export.gguf import export_gguf
from jina_v4_merge.fold import fold
from jina_v4_merge.verify.checks import verify
from jina_v4_merge.writing import staging
from jina_v4_serve.checkpoint import read_checkpoint
from jina_v4_serve.errors import CheckpointError

GGUF = "jina-embeddings-v4-code"


def start(base: str, out: Path, dtype: str, force: bool, prepare: Callable[[], None] = lambda: None) -> int:
    """Start a fold in a dtype or to int8, or an export of q8_0, in a child process; return its process id."""
    if (child := os.fork()) != 0:
        return child
    try:
        prepare()
        if dtype == "q8_0":
            export_gguf(base, out / GGUF, "code", dtype)
        elif dtype == "int8":
            fold(base, out, quantized=dtype, force=force)
        else:
            fold(base, out, dtype=dtype, force=force)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def staged_bytes(out: Path, remains: set[str]) -> int:
    """Return what the child has written so far, beside what those before it left."""
    n_bytes = 0
    for staged in {path.name for path in out.iterdir()} - remains:
        for folder, _, names in os.walk(out / staged):  # lets pass what is moved or removed meanwhile
            for name in names if staged.startswith(".") else []:
                with contextlib.suppress(FileNotFoundError):
                    n_bytes += (Path(folder) / name).stat().st_size
    return n_bytes


def dtype_if_whole(folder: Path) -> str | None:
    """Return the dtype that a checkpoint's manifest says, or None if it does not hold exactly what that says."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        names = {path.name for path in folder.iterdir()}
        for name, entry in manifest["files"].items():
            content = (folder / name).read_bytes()
            if (len(content), hashlib.sha256(content).hexdigest()) != (entry["size"], entry["sha256"]):
                return None
    except (OSError, ValueError, KeyError):
        return None
    return str(manifest["dtype"]) if names == {*manifest["files"], "manifest.json"} else None


def is_accepted(folder: Path) -> bool:
    """Tell whether `verify` or the launcher takes a folder for a checkpoint, whatever it is called."""
    with contextlib.suppress(CheckpointError):
        read_checkpoint(folder, folder.name.removeprefix("jina-embeddings-v4-"))
        return True
    return not verify([folder])[0].problems


def report(out: Path, status: int, **more: object) -> None:
    """Print what a run left, and which of it is accepted though it is not whole."""
    finals = [path for path in sorted(out.iterdir()) if not path.name.startswith(".")]
    left = [path for path in out.rglob("jina-embeddings-v4-*") if path.is_dir()]
    wrong = [str(path) for path in left if dtype_if_whole(path) is None and is_accepted(path)]
    whole = {path.name: dtype_if_whole(path) for path in finals}
    print(json.dumps({"status": status, "finals": whole, "left": len(left), "wrongly_accepted": wrong} | more))


def wait(child: int) -> int:
    """Wait for the end of a run; return its status."""
    return os.waitpid(child, 0)[1]


def hold() -> None:
    """Have this process wait before anything gets its final name: however late its end comes, it has none."""
    staging._sync = lambda _: time.sleep(100)


def kill_at_bytes(base: str, out: Path, n_kills: int, dtype: str, force: bool) -> None:
    """Kill runs when they have written random shares of the bytes that a whole run writes; let a last one through."""
    whole = out.with_name("whole")
    wait(start(base, whole, dtype, False))
    total = sum(path.stat().st_size for path in whole.glob("*/*"))
    chance = random.Random(7)  # noqa: S311 - no secret
    for _ in range(n_kills):
        share, remains = chance.random(), {path.name for path in out.iterdir()}
        child = start(base, out, dtype, force, hold)
        ended = os.WEXITED | os.WNOHANG | os.WNOWAIT
        while staged_bytes(out, remains) < share * total and not os.waitid(os.P_PID, child, ended):
            time.sleep(0.0005)
        os.kill(child, signal.SIGKILL)
        report(out, wait(child), share=share)
    report(out, wait(start(base, out, dtype, force)))


def kill_at_steps(base: str, out: Path) -> None:
    """Kill a run at the first step, the next at the second, and so on; the one that has no such step gets through."""
    dtypes = ("bfloat16", "float16")
    fold(base, out, dtype=dtypes[0])
    for number in count(1):
        status = wait(start(base, out, dtypes[number % 2], True, lambda number=number: die_at_step(number)))
        report(out, status)
        if os.WIFEXITED(status):
            return


def die_at_step(number: int) -> None:
    """Have this process kill itself when it comes so far in replacing checkpoints and removing the old ones."""
    steps, exchange = count(1), staging.exchange

    def step() -> None:
        if next(steps) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def between_steps(one: Path, other: Path) -> None:
        step()
        exchange(one, other)
        step()

    staging.exchange = between_steps
    sys.addaudithook(lambda event, _: step() if event in ("shutil.rmtree", "os.rmdir") else None)


if __name__ == "__main__":
    if sys.argv[1] == "steps":
        kill_at_steps(sys.argv[2], Path(sys.argv[3]))
    else:
        kind = {"gguf": "q8_0", "int8": "int8"}.get(sys.argv[1], "bfloat16")
        kill_at_bytes(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), kind, "--force" in sys.argv)
