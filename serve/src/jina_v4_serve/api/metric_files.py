"""Room on the disk for the metrics of several API processes.

The client library of Prometheus keeps them in files (`PROMETHEUS_MULTIPROC_DIR`, which vLLM sets) that are mapped into
memory. The files have a length, and get their blocks where something is written. When the disk is full by then, the
kernel ends the process (SIGBUS), in the middle of counting a good request. So they get their blocks at the start.
"""

import errno
import os
from pathlib import Path

from jina_v4_serve.errors import OptionError

# The instrumentation of vLLM's routes makes the summaries with the first request. Gauges are all made at the start.
_MADE_LATE = ("summary",)
_BYTES = 2**16  # of a new file
_TIMES = 2  # a file that is full is made twice as long


def reserve() -> None:
    """Reserve the blocks of this process's files, and as many for the series that are still to come.

    Raises:
        OptionError: the disk is full already.
    """
    if not (folder := os.environ.get("PROMETHEUS_MULTIPROC_DIR")):
        return
    made = Path(folder).glob(f"*_{os.getpid()}.db")
    for path in {*made, *(Path(folder, f"{kind}_{os.getpid()}.db") for kind in _MADE_LATE)}:
        try:
            path.touch()
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, max(_BYTES, _TIMES * path.stat().st_size))
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):  # a file system that reserves nothing
                continue
            raise OptionError(f"no room for the metrics in {folder}: {error}; free some, or set TMPDIR") from error
