"""What a supervised server looks like from outside, without a model: `python fake_server.py PORT FOLDER [TRAIT...]`.

It writes its process id and that of a grandchild into FOLDER, a file a start. Traits: `broken` ends with 3 before it
answers; `broken-later` does so from the second start on; `mortal` ends with 5 half a second after it began to answer;
`deaf` ignores SIGTERM; `sick` turns /health into 503 after half a second; `slow` starts in 1 s.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from jina_v4_serve.worker import end_with_parent


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        sick = "sick" in traits and time.monotonic() - begin > 0.5
        self.send_response(503 if sick else 200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the standard library's name
        pass


port, folder, traits = int(sys.argv[1]), Path(sys.argv[2]), set(sys.argv[3:])
start = len(list(folder.glob("start-*"))) + 1
if "broken" in traits or ("broken-later" in traits and start > 1):
    (folder / f"start-{start}").write_text(f"{time.monotonic()} {os.getpid()}")
    sys.exit(3)
end_with_parent()
grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
(folder / f"start-{start}").write_text(f"{time.monotonic()} {os.getpid()} {grandchild.pid}")
if "slow" in traits:
    time.sleep(1)
server = ThreadingHTTPServer(("127.0.0.1", port), Handler)


def end(number: int, _: object) -> None:
    (folder / f"signal-{number}").touch()
    if "deaf" not in traits:
        os._exit(0)


signal.signal(signal.SIGTERM, end)
if "mortal" in traits:
    threading.Timer(0.5, os._exit, [5]).start()
begin = time.monotonic()
server.serve_forever()
