"""Reserves disk space for the metrics of several API processes.

The client library of Prometheus keeps them in sparse files (`PROMETHEUS_MULTIPROC_DIR`, which vLLM sets) that are
mapped into memory. If the disk is full when a block is first written, the kernel kills the process (SIGBUS) in the
middle of a good request. So all blocks are reserved at the start.
"""

import errno
import os
from pathlib import Path

from jina_v4_serve.errors import OptionError

_BYTES = 2**16  # of a new file
_TIMES = 2  # the library doubles a file that is full


def reserve() -> None:
    """Reserve the blocks of this process's files, and as many again for later series.

    Raises:
        OptionError: the disk is full.
    """
    if not (folder := os.environ.get("PROMETHEUS_MULTIPROC_DIR")):
        return
    # vLLM's routes make their summaries at the first request; all other metrics are made at the start.
    for path in {*Path(folder).glob(f"*_{os.getpid()}.db"), Path(folder, f"summary_{os.getpid()}.db")}:
        try:
            path.touch()
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, max(_BYTES, _TIMES * path.stat().st_size))
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):  # the file system cannot reserve
                continue
            raise OptionError(f"no space for the metrics in {folder}: {error}; free some, or set TMPDIR") from error
