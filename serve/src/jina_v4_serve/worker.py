"""The process that vLLM runs in, started by the supervisor: `python -m jina_v4_serve.worker ARGUMENTS OPTIONS`.

It is the first of a process group of its own, and holds the reading end of a pipe as its standard input. When that
pipe ends, the supervisor is gone (with SIGKILL, perhaps), and the whole group ends with it.
"""

import json
import os
import signal
import sys
import threading

from jina_v4_serve.errors import ServeError
from jina_v4_serve.launcher import run_vllm


def end_with_parent() -> None:
    """Kill the process group as soon as the pipe on standard input ends."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def main() -> int:
    """Run vLLM until it ends; return the exit code."""
    arguments, options = (json.loads(text) for text in sys.argv[1:])
    end_with_parent()
    try:
        run_vllm(arguments, options)
    except ServeError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201 - the user's screen
        return 1
    except KeyboardInterrupt:  # what vLLM makes of a SIGTERM while it starts
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
