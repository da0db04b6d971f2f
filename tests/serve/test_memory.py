"""Freed memory is given back: in a process of its own, set as the engine's is."""

import os
import subprocess
import sys
import threading

from jina_v4_serve import trimming as memory
from jina_v4_serve.launch import cpu
from servers import PATIENCE_S

# 200 MB in blocks of many sizes, of which every second is freed: nothing at the end of the heap can be given back.
PROGRAM = """
import time
from jina_v4_serve.trimming import trim_regularly

def anonymous_mib():
    lines = open("/proc/self/smaps_rollup")
    return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) / 1024

blocks = [bytes(90_000 + 10 * i) for i in range(2_000)]
blocks[::2] = [b""] * 1_000
before = anonymous_mib()
trim_regularly(0.05)
deadline = time.monotonic() + 20
while anonymous_mib() > before - 60 and time.monotonic() < deadline:
    time.sleep(0.05)
print(before - anonymous_mib())
"""


def test_what_is_freed_between_blocks_in_use_is_given_back() -> None:
    program = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, **cpu.allocator(), "LD_PRELOAD": ""},  # glibc, whatever else is installed
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE_S,
    )
    assert float(program.stdout) > 60  # of some 95


def test_memory_is_given_back_by_one_thread_of_a_process() -> None:
    for _ in range(2):
        memory.trim_regularly()
    assert [thread.name for thread in threading.enumerate()].count("memory-trim") == 1
