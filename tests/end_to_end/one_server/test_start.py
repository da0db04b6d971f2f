"""What a user sees of a real start: few lines on the screen, and all of vLLM's in a file or on the screen."""

import json
import re
import shlex
import stat
import subprocess
from pathlib import Path

import pytest
from servers import PATIENCE_S, START_TIMEOUT_S, Server, engine_server, engines_of, wait_until
from wire import TASK

pytestmark = pytest.mark.long

MOST_LINES = 15


def screen_once_it_says(server: Server, text: str) -> list[str]:
    server.wait_until_said(text)
    return server.log.read_text().splitlines()


def test_a_start_is_short_and_a_failure_says_what_to_do(wire_checkpoint: Path, tmp_path: Path) -> None:
    with engine_server(TASK, wire_checkpoint, tmp_path / "screen", JINA_V4_LOG="plain") as server:
        server.wait_ready()
        lines = screen_once_it_says(server, "try: ")
        print("\n".join(lines))
        assert len(lines) <= MOST_LINES
        phases = [line.rpartition("  ")[0].strip() for line in lines if line.startswith("  ")]
        assert phases == [
            "checkpoint, settings, address",
            "vLLM imported",
            "engine started",
            "weights loaded",
            "memory reserved, warmed up",
            f"canary of {TASK} right",
        ]
        seconds = [float(line.split()[-2]) for line in lines if line.startswith("  ")]
        (total,) = re.findall(rf"^ready on {server.base_url}/v1 after (\d+) s$", "\n".join(lines), re.MULTILINE)
        assert sum(seconds) <= int(total) + 1
        assert not [line for line in lines if "INFO" in line or "WARNING" in line or "ERROR" in line]

        command = lines[-1].removeprefix("try: ")
        answer = subprocess.run(shlex.split(command), capture_output=True, check=True, timeout=60)
        assert len(json.loads(answer.stdout)["data"][0]["embedding"]) == 128

        (path,) = tmp_path.glob("*.log")
        assert f"vLLM's log: {path} " in "\n".join(lines)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        for said in (
            "Resolved architecture",
            "Loading safetensors",
            "Application startup complete",
            "the canary passes",
        ):
            assert said in path.read_text()

        (engine,) = engines_of(server.process.pid)
        subprocess.run(["kill", "-9", str(engine)], check=True)
        died = screen_once_it_says(server, "it restarts in")[len(lines) :]
        print("\n".join(died))
        assert [line for line in died if "ERROR" in line]
        assert any(line.endswith(f"all of its log is in {path}") for line in died)
        assert any(line.startswith("what to do: ") for line in died)
        begin = len(lines) + len(died)

        def ready_again() -> bool:
            return any(line.startswith("ready on ") for line in server.log.read_text().splitlines()[begin:])

        wait_until(ready_again, server.tail, START_TIMEOUT_S)
        server.process.terminate()
        assert server.process.wait(PATIENCE_S) == 0
        again = server.log.read_text().splitlines()[begin:]
        print("\n".join(again))
        assert [line for line in again if line.startswith(("ready on ", "try: ", "stopping"))] == again[-2:]
        assert not [line for line in again if "ERROR" in line or "WARNING" in line]


def test_all_of_the_log_is_json_on_the_screen_where_asked(
    wire_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_LOGGING_LEVEL", raising=False)
    cache = tmp_path / "cache"
    with engine_server(
        TASK, wire_checkpoint, tmp_path / "screen", JINA_V4_LOG="json", VLLM_CACHE_ROOT=str(cache)
    ) as server:
        server.wait_ready()
        lines = screen_once_it_says(server, "try: ")
        # What vLLM keeps where it started itself once more to look at the model class: 8 s of a start.
        assert list(cache.glob("modelinfos/*")) == []
        assert any("Application startup complete" in line for line in lines)
        assert any("weights loaded" in line for line in lines)
        assert any(line.startswith(f"ready on {server.base_url}/v1 after ") for line in lines)
        assert list(tmp_path.glob("*.log")) == []
        entries = [json.loads(line) for line in lines if line.startswith("{")]
        # uvicorn's few are JSON with some versions of vLLM only
        assert {entry["logger"].partition(".")[0] for entry in entries} >= {"vllm", "jina_v4_serve"}
        assert {entry["tasks"] for entry in entries if entry["logger"].startswith("vllm")} == {TASK}
        assert not [line for line in lines if re.search(r"\b(?:INFO|WARNING) \d\d-\d\d", line)]
