"""What the screen and the log file have of a server, with a program that logs as vLLM does and holds no model."""

import asyncio
import os
import re
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from jina_v4_serve.launch import log_file
from jina_v4_serve.launch.known_lines import is_routine, is_warning
from jina_v4_serve.launch.log_file import LogFile
from jina_v4_serve.launch.screen import Screen, example, open_logs
from jina_v4_serve.launch.server import ServerSettings
from jina_v4_serve.launch.supervisor import Policy, Supervisor
from servers import PATIENCE_S, free_port

POLICY = Policy(max_restarts=1, first_pause_s=0.1, unhealthy_s=1.0, stop_s=5.0)
HEAD = """
    import logging, os, signal, sys, threading, time
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from jina_v4_serve.phases import STARTED, STARTED_HEADER, reached

    def log(level, text):
        for line in text.splitlines():
            print(f"(APIServer pid=7) {level} 11-30 05:42:39 [core.py:1] {line}", flush=True)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(READY if self.path == "/ready" else 200)
            self.send_header(STARTED_HEADER, os.environ[STARTED])
            self.end_headers()
            self.wfile.write(b'{"ready": false, "reason": "the canary is dead"}')

        def log_message(self, *_):
            pass

    def serve(ready=200):
        global READY
        READY = ready
        HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()

    def end(*_):
        log("ERROR", "an error of the end")
        os._exit(0)

    signal.signal(signal.SIGTERM, end)
"""
START = """
    log("INFO", "Resolved architecture")
    log("WARNING", "Enforce eager set, disabling torch.compile, CUDAGraphs")
    reached("vLLM imported")
    print("Loading shards: 0%\\rLoading shards: 100%", file=sys.stderr)
    time.sleep(0.3)
    reached("weights loaded")
    reached("weights loaded")
    log("WARNING", "the moon is full")
    log("ERROR", "Traceback (most recent call last):\\n  File x\\nKeyError: y")
"""


@pytest.fixture
def run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, list[str]]]:
    """Supervise a program until it ends by itself, or until the screen has `until`; return code and screen."""

    def run(program: str, until: str = "", **about: str) -> tuple[int, list[str]]:
        port = free_port()
        script = tmp_path / "program.py"
        script.write_text(textwrap.dedent(HEAD) + textwrap.dedent(program))
        screen = Screen("fake", LogFile(tmp_path / "logs" / "fake.log"), **about)
        command = [sys.executable, str(script), str(port)]
        supervisor = Supervisor("fake", command, f"http://127.0.0.1:{port}", policy=POLICY, screen=screen)
        lines: list[str] = []

        async def supervise() -> int:
            task = asyncio.create_task(supervisor.run())
            async with asyncio.timeout(PATIENCE_S):
                while until and not any(until in line for line in lines):
                    lines.extend(capfd.readouterr().err.splitlines())
                    await asyncio.sleep(0.1)
                if until:
                    supervisor.stop()
                return await task

        code = asyncio.run(supervise())
        return code, lines + capfd.readouterr().err.splitlines()

    return run


def test_a_start_shows_phases_and_what_is_not_known_to_be_harmless(
    run: Callable[..., tuple[int, list[str]]], tmp_path: Path
) -> None:
    code, lines = run(START + "    serve()", until="try: ", example="curl it")
    print("\n".join(lines))
    assert code == 0
    imported, weights, *others = lines
    assert imported.split()[:2] == ["vLLM", "imported"]
    assert imported.endswith(" s")
    assert weights.split()[:2] == ["weights", "loaded"]
    assert 0.2 <= float(weights.split()[-2]) < float(PATIENCE_S)
    assert [line.rpartition("] ")[2] for line in others[:4]] == [
        "the moon is full",
        "Traceback (most recent call last):",
        "  File x",
        "KeyError: y",
    ]
    ready, tried = others[4:]  # nothing of what is logged while it ends
    assert ready.startswith("ready on http://127.0.0.1:")
    assert tried == "try: curl it"
    text = (tmp_path / "logs" / "fake.log").read_text()
    for said in ("Resolved architecture", "Enforce eager", "Loading shards: 100%", "an error of the end"):
        assert said in text


def test_lines_of_one_of_several_servers_name_it(run: Callable[..., tuple[int, list[str]]]) -> None:
    _, lines = run(START + "    serve()", until="ready after", label="[fake] ")
    assert all("[fake] " in line for line in lines)


def test_a_server_that_computes_no_vectors_is_not_called_ready(run: Callable[..., tuple[int, list[str]]]) -> None:
    _, lines = run("serve(503)", until="the canary is dead", example="curl it")
    assert len(lines) == 1
    assert "but is not ready: the canary is dead" in lines[0]


@pytest.mark.parametrize(
    ("last", "advice"),
    [
        ("RuntimeError: DefaultCPUAllocator: can't allocate memory", "docs/operations.md#memory"),
        ("OSError: [Errno 28] No space left on device", "free some space"),
        ("x: error: unrecognized arguments: --y", "the options after the --"),
        ("something else", "`jina-v4-serve doctor`"),
    ],
)
def test_a_failed_start_shows_what_was_printed_last_and_what_to_do(
    run: Callable[..., tuple[int, list[str]]], tmp_path: Path, last: str, advice: str
) -> None:
    program = f"""
    log("INFO", "routine")
    print("!!! native line !!!", file=sys.stderr)
    print({last!r}, file=sys.stderr)
    sys.exit(9)
    """
    code, lines = run(program)
    print("\n".join(lines))
    assert code == 9
    assert lines[:2] == ["  | !!! native line !!!", f"  | {last}"]
    assert lines[2] == f"the fake server ended with exit code 9; all of its log is in {tmp_path / 'logs' / 'fake.log'}"
    assert lines[3].startswith("what to do: ")
    assert advice in lines[3]
    assert len(lines) == 4


def test_tracebacks_are_shown_whole_and_the_first_error_again_at_the_end(
    run: Callable[..., tuple[int, list[str]]],
) -> None:
    _, lines = run("""
    log("ERROR", "Traceback (most recent call last):\\n  File x\\nValueError: the cause")
    raise RuntimeError('see above')
    """)
    print("\n".join(lines))
    assert "Traceback (most recent call last):" in lines
    assert "RuntimeError: see above" in lines
    assert lines[-2] == "its first error: ValueError: the cause"


def test_an_error_of_ours_is_the_last_line(run: Callable[..., tuple[int, list[str]]]) -> None:
    code, lines = run("sys.exit('error: no. Do that')")
    assert (code, lines) == (1, ["error: no. Do that"])


@pytest.mark.proof
def test_a_server_that_dies_says_why_and_starts_again(run: Callable[..., tuple[int, list[str]]]) -> None:
    program = """
    class Dying(Handler):
        def do_GET(self):
            super().do_GET()
            if self.path == "/ready":  # asked once it answers
                threading.Timer(1, lambda: (print("!!! native line !!!", flush=True), os._exit(5))).start()

    Handler = Dying
    reached("vLLM imported")
    serve()
    """
    code, lines = run(program, example="curl it")
    print("\n".join(lines))
    assert code == 5
    assert lines.pop().endswith("giving up")
    lines = [line for line in lines if not line.startswith("  vLLM imported")]
    assert [re.split(" on | in |(?<=what to do):", line)[0] for line in lines] == [
        "ready",
        "try: curl it",
        "  | !!! native line !!!",
        "the fake server ended with exit code 5; all of its log is",
        "what to do",
        "the fake server ended unexpectedly (exit code 5); it restarts",
        "ready",
        "  | !!! native line !!!",
        "the fake server ended with exit code 5; all of its log is",
        "what to do",
    ]


@pytest.mark.parametrize(
    ("line", "warns", "is_usual"),
    [
        ("(EngineCore pid=8279) INFO 11-30 05:42:55 [core.py:402] WARNING: no", False, True),
        ("(EngineCore pid=8279) WARNING 11-30 05:42:55 [core.py:402] hm", True, False),
        ("[code] (APIServer pid=1) ERROR 11-30 05:42:55 [core.py:402] hm", True, False),
        ("WARNING 11-30 05:42:55 [core.py:402] hm", True, False),
        ("(jina-v4-serve) WARNING 11-30 05:42:55 [canary.py:1] no canary", True, False),
        ("ERROR:    Exception in ASGI application", True, False),
        ("INFO:     Started server process [8219]", False, True),
        ("(EngineCore pid=1) WARNING 11-30 05:42:53 [w.py:1] libiomp is not found in LD_PRELOAD.", False, True),
        ("Loading shards: 100%", False, False),
    ],
)
def test_warnings_are_told_from_routine(line: str, warns: bool, is_usual: bool) -> None:
    assert (is_warning(line), is_routine(line)) == (warns, is_usual)


# --- the file


def test_the_file_is_the_owners_and_the_one_before_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "some" / "place" / "x.log"
    for text in (b"first\n", b"second\n"):
        log = LogFile(path)
        os.write(log.file, text)
        os.close(log.file)
    assert path.read_bytes() == b"second\n"
    assert path.with_name("x.log.1").read_bytes() == b"first\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_link_that_another_user_laid_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("keep")
    (tmp_path / "x.log").symlink_to(tmp_path / "target")
    os.write(LogFile(tmp_path / "x.log").file, b"log\n")
    assert (tmp_path / "target").read_text() == "keep"


def test_the_file_stays_small_and_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_file, "MAX_BYTES", 20_000)
    log = LogFile(tmp_path / "x.log")
    # Ten lines each time that it is told to, while they are read.
    program = """
        import sys
        for told in range(50):
            sys.stdin.readline()
            for i in range(10):
                print(10 * told + i, "x" * 200, flush=True)
            print("done", file=sys.stderr, flush=True)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    found: list[str] = []
    sizes = []
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log.file, stderr=subprocess.PIPE, text=True) as writer:
        assert writer.stdin is not None
        assert writer.stderr is not None
        for _ in range(50):
            print(file=writer.stdin, flush=True)
            found += log.new_lines()
            assert writer.stderr.readline() == "done\n"
            sizes.append(log.path.stat().st_size)
    found += log.new_lines()
    numbers = [int(line.split()[0]) for line in found]
    assert numbers == sorted(set(numbers))
    assert len(numbers) >= 450  # a line that comes between the copy and the emptying is lost
    assert max(sizes) < 40_000
    former = log.path.with_name("x.log.1")
    assert 20_000 < former.stat().st_size < 40_000
    assert stat.S_IMODE(former.stat().st_mode) == 0o600


def test_lines_are_read_without_colours_and_once_they_are_whole(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "x.log")
    os.write(log.file, b"(A pid=1) \x1b[33mWARNING\x1b[0m one\n10%\r20%\rtw")
    assert log.new_lines() == ["(A pid=1) WARNING one", "10%", "20%"]
    os.write(log.file, b"o\r\n\n")
    assert log.new_lines() == ["two"]


def test_a_full_disk_empties_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_file, "MAX_BYTES", 10)
    log = LogFile(tmp_path / "x.log")
    log.path.with_name("x.log.1").symlink_to("/dev/full")
    os.write(log.file, b"a line of some length\n")
    assert log.new_lines() == ["a line of some length"]
    assert log.path.stat().st_size == 0


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[ServerSettings]:
    for name in ("JINA_V4_LOG", "JINA_V4_LOG_DIR", "JINA_V4_API_KEY", "JINA_V4_API_KEY_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return [ServerSettings(task, tmp_path, port=port) for task, port in (("code", 8003), ("retrieval", 8001))]


def test_each_server_has_a_file_of_its_own_that_is_named(
    servers: list[ServerSettings], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [log.path for log in open_logs(servers, verbose=False) if log]
    folder = tmp_path / "state" / "jina-v4-serve"
    assert paths == [folder / "code-8003.log", folder / "retrieval-8001.log"]
    named = capfd.readouterr().err
    assert named == f"vLLM's log: {folder}/code-8003.log, retrieval-8001.log (--verbose: on this screen)\n"
    monkeypatch.setenv("JINA_V4_LOG_DIR", str(tmp_path / "mine"))
    assert [log.path.parent for log in open_logs(servers, verbose=False) if log] == [tmp_path / "mine"] * 2
    monkeypatch.delenv("JINA_V4_LOG_DIR")
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (log, _) = open_logs(servers, verbose=False)
    assert log is not None
    assert log.path == tmp_path / "home/.local/state/jina-v4-serve/code-8003.log"


@pytest.mark.parametrize("style", ["json", "verbose", "--verbose"])
def test_the_log_is_on_the_screen_where_asked(
    servers: list[ServerSettings], style: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if style != "--verbose":
        monkeypatch.setenv("JINA_V4_LOG", style)
    assert open_logs(servers, verbose=style == "--verbose") == [None, None]
    assert not (tmp_path / "state").exists()


def test_a_place_that_cannot_be_written_is_said_and_ends_nothing(
    servers: list[ServerSettings], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JINA_V4_LOG_DIR", "/proc/nowhere")
    assert open_logs(servers, verbose=False) == [None, None]
    (line,) = capfd.readouterr().err.splitlines()
    assert "/proc/nowhere" in line
    assert "JINA_V4_LOG_DIR" in line


@pytest.mark.usefixtures("servers")
def test_the_command_to_try_has_a_key_where_one_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Authorization" not in example("http://x", "code")
    monkeypatch.setenv("JINA_V4_API_KEY", "secret")
    assert "Authorization: Bearer KEY" in example("http://x", "code")
    assert "secret" not in example("http://x", "code")
