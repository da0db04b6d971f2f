"""A small disk that only the processes of one test see: a tmpfs in a mount namespace of their own."""

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

DISK = Path("/mnt")  # in the namespace; a short name, as sockets are made in it
_NAMESPACE = ("unshare", "--map-root-user", "--mount")

needs_namespaces = pytest.mark.skipif(
    shutil.which("unshare") is None or subprocess.run([*_NAMESPACE, "true"], capture_output=True).returncode != 0,
    reason="no mount namespace can be made here",
)


def on_small_disk(n_bytes: int, command: Sequence[object]) -> list[object]:
    """Return a command that runs on a disk of its own; its process has the id of the one that is started."""
    script = f'mount -t tmpfs -o size={n_bytes} tmpfs {DISK} && cd {DISK} && exec "$@"'
    return [*_NAMESPACE, "sh", "-c", script, "sh", *command]


def fill(disk: Path) -> Path:
    """Fill a disk to its last byte; return the file that does it."""
    path = disk / "fill"
    with path.open("wb", buffering=0) as file:
        size = 2**16
        while size:
            try:
                file.write(bytes(size))
            except OSError:
                size //= 2
    return path
