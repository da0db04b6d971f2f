"""What a supervised server looks like from outside, without a model: `python fake_server.py PORT FOLDER [TRAIT...]`.

It writes its process id and that of a grandchild into FOLDER, a file a start. Traits: `broken` ends with 3 before it
answers; `broken-later` does so from the second start on; `mortal` ends with 5 half a second after its first answer;
`deaf` ignores SIGTERM; `slow` starts in 1 s; `stuck-later` answers nothing from the second start on; `waits` answers
once a server has started in each folder beside FOLDER. After its first three answers `sick` turns /health into 503,
`hung` says there that its engine is hung, and `mute` answers no more. `sick-once` is so for one answer, and notes the
next one. `another` does not say which start it is of.
"""

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from jina_v4_serve.phases import STARTED, STARTED_HEADER
from jina_v4_serve.vllm_side.worker import end_with_parent


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        number = next(answers)
        broken = traits & {"sick", "hung", "mute"} if number >= 3 else set()
        if "sick-once" in traits and number >= 3:
            broken = {"sick"} if number == 3 else set()
            if number == 5:
                (folder / "well").touch()
        if "mortal" in traits and not doomed.is_set():
            doomed.set()
            threading.Timer(0.5, os._exit, [5]).start()
        if "mute" in broken:
            time.sleep(600)
        self.send_response(503 if broken else 200)
        if "another" not in traits:
            self.send_header(STARTED_HEADER, os.environ[STARTED])
        self.send_header("x-jina-v4-task", folder.name)  # a fleet's folders have the names of their tasks
        self.end_headers()
        if "hung" in broken:
            self.wfile.write(b'{"status": "hung", "reason": "no step for 9 s"}')

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the standard library's name
        pass


def note_start(*pids: int) -> None:
    """Write the file of this start; it appears whole, as this process may be killed at any moment."""
    (folder / "new").write_text(" ".join(map(str, (time.monotonic(), os.getpid(), *pids))))
    (folder / "new").rename(folder / f"start-{start}")


port, folder, traits = int(sys.argv[1]), Path(sys.argv[2]), set(sys.argv[3:])
start = len(list(folder.glob("start-*"))) + 1
if "broken" in traits or ("broken-later" in traits and start > 1):
    note_start()
    sys.exit(3)
end_with_parent()
grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
note_start(grandchild.pid)
if "slow" in traits:
    time.sleep(1)
while "stuck-later" in traits and start > 1:
    time.sleep(0.05)
while "waits" in traits and not all(
    (beside / "start-1").exists() for beside in folder.parent.iterdir() if beside.is_dir()
):
    time.sleep(0.05)
server = ThreadingHTTPServer(("127.0.0.1", port), Handler)


def end(number: int, _: object) -> None:
    (folder / f"signal-{number}").touch()
    if "deaf" not in traits:
        os._exit(0)


signal.signal(signal.SIGTERM, end)
doomed = threading.Event()
answers = itertools.count()
server.serve_forever()
