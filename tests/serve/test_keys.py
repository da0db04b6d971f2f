"""API keys: several by name, replaced while requests arrive, and named in the log."""

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path

import pytest
from jina_v4_serve.api.keys import Keys, read_key_file
from jina_v4_serve.errors import OptionError
from jina_v4_serve.settings import Settings
from servers import Server, free_port, gateway_server, started, wait_until

pytestmark = pytest.mark.proof

TESTS = Path(__file__).parents[1]
OLD, NEW, OTHER = "o" * 32, "n" * 32, "x" * 32


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys") / "keys"


@pytest.fixture(scope="module")
def doors(file: Path) -> Iterator[dict[str, Server]]:
    """Our guard on uvicorn with a route that embeds nothing, and the gateway before it; both have the file of keys."""
    write(file, f"search: {OLD}")
    environment = {
        "JINA_V4_API_KEY_FILE": str(file),
        "JINA_V4_SERVED_TASKS": "retrieval",
        "JINA_V4_LOG": "json",
        "JINA_V4_API_KEY": "",
    }
    port = free_port()
    command = [sys.executable, TESTS / "door_server.py", str(port)]
    with started(command, port, file.parent / "server", **environment) as server:
        server.wait_ready()
        with gateway_server({"retrieval": server.base_url}, file.parent / "gateway", **environment) as gateway:
            yield {"server": server, "gateway": gateway}


def write(file: Path, text: str) -> None:
    """Replace the file at once, as operators and Kubernetes do."""
    new = file.with_suffix(".new")
    new.write_text(text)
    new.replace(file)


def embed(server: Server, key: str) -> int:
    connection = HTTPConnection("127.0.0.1", int(server.base_url.rpartition(":")[2]), timeout=30)
    body = json.dumps({"input": "x", "task": "retrieval"})
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    connection.request("POST", "/v1/embeddings", body, headers)
    status = connection.getresponse().status
    connection.close()
    return status


def embed_until(server: Server, key: str, status: int) -> None:
    wait_until(lambda: embed(server, key) == status)


@pytest.mark.parametrize("door", ["server", "gateway"])
def test_a_key_is_replaced_without_a_refused_good_request(door: str, doors: dict[str, Server], file: Path) -> None:
    server = doors[door]
    write(file, f"search: {OLD}")
    embed_until(doors["server"], OLD, 200)
    embed_until(server, OLD, 200)
    assert embed(server, NEW) == 401
    current, stop, found = [OLD], threading.Event(), list[int]()
    use_new: set[int] = set()  # callers whose calls with the old key have ended

    def call() -> None:
        while not stop.is_set():
            key = current[0]
            found.append(embed(server, key))
            if key == NEW:
                use_new.add(threading.get_ident())

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    write(file, f"# two for a while\nsearch: {OLD}\nsearch-2: {NEW}\n")
    for each in doors.values():
        embed_until(each, NEW, 200)
    current[0] = NEW
    wait_until(lambda: len(use_new) == len(callers))
    write(file, f"search-2: {NEW}\n")
    for each in doors.values():
        embed_until(each, OLD, 401)
    wait_until(lambda: len(found) > 50)
    stop.set()
    for caller in callers:
        caller.join()
    assert set(found) == {200}


def test_a_broken_file_leaves_the_keys_as_they_were(doors: dict[str, Server], file: Path) -> None:
    write(file, f"search: {OLD}")
    embed_until(doors["server"], OLD, 200)
    write(file, "\n")

    def says() -> bool:
        assert embed(doors["server"], OLD) == 200
        return "the API keys stay as they were" in doors["server"].log.read_text()

    wait_until(says)
    assert embed(doors["server"], OTHER) == 401


def test_the_log_has_the_name_and_never_the_key(doors: dict[str, Server], file: Path) -> None:
    write(file, f"search: {OLD}\nindexing: {NEW}")
    for server in doors.values():
        embed_until(server, NEW, 200)
    for name, server in doors.items():

        def names(name: str = name, server: Server = server) -> set[str]:
            lines = [json.loads(line) for line in server.log.read_text().splitlines() if '"message":"request"' in line]
            return {line["key"] for line in lines if line["program"] == name}

        wait_until(lambda: {"search", "indexing", None} <= names(), names)  # a line comes after its reply
        log = server.log.read_text()
        assert not [key for key in (OLD, NEW, OTHER) if key in log]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("secret", {"default": "secret"}, id="one without a name"),
        pytest.param("\n  secret with blanks \n\n", {"default": "secret with blanks"}, id="blanks"),
        pytest.param("a: 1\nb-2.c_d:   two words\n# c: 3\n", {"a": "1", "b-2.c_d": "two words"}, id="names"),
        pytest.param("a:1", {"default": "a:1"}, id="a colon within a key"),
        pytest.param("a: 1\nloose", {"a": "1", "default": "loose"}, id="with and without a name"),
    ],
)
def test_a_key_file_holds_keys_with_or_without_names(text: str, expected: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(text)
    assert read_key_file(tmp_path / "keys") == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty; write a key into it"),
        ("# nothing\n", "is empty; write a key into it"),
        ("a: 1\na: 2", "has two keys of the name a"),
        ("one\ntwo", "has two keys of the name default; write NAME: KEY in each line"),
        ("a: schlüssel", "has a key that no header can hold"),
        ("a: 1\nb: \n", "has no key after b: write NAME: KEY"),
    ],
)
def test_a_bad_key_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(text)
    with pytest.raises(OptionError, match=message):
        read_key_file(tmp_path / "keys")


def test_half_a_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that somebody is still writing has changed just now; it is read a second later."""
    file = tmp_path / "keys"
    file.write_text(f"a: {OLD}")
    keys = Keys(Settings(api_key_file=str(file)))
    file.write_text(f"a: {NEW}")
    just_now = file.stat().st_mtime
    monkeypatch.setattr(time, "time", lambda: just_now)
    looked_at = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: looked_at + 2)
    assert keys.name_of(f"Bearer {OLD}") == "a"
    monkeypatch.setattr(time, "time", lambda: just_now + 5)
    monkeypatch.setattr(time, "monotonic", lambda: looked_at + 4)
    assert (keys.name_of(f"Bearer {OLD}"), keys.name_of(f"bearer  {NEW}")) == (None, "a")


def test_a_file_that_could_not_be_read_once_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It was replaced by one of another owner, say, or the disk was away; nothing of the file changes after that."""
    file = tmp_path / "keys"
    file.write_text(f"a: {OLD}")
    keys = Keys(Settings(api_key_file=str(file)))
    write(file, f"a: {NEW}")
    past = time.time() - 5
    os.utime(file, (past, past))
    begin = time.monotonic()
    read = Path.read_text

    def refused(path: Path) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refused)
    for look in (2, 4):
        monkeypatch.setattr(time, "monotonic", lambda now=begin + look: now)
        assert keys.name_of(f"Bearer {OLD}") == "a"
    assert caplog.text.count("the API keys stay as they were: JINA_V4_API_KEY_FILE: cannot read") == 1
    monkeypatch.setattr(Path, "read_text", read)
    monkeypatch.setattr(time, "monotonic", lambda: begin + 6)
    assert (keys.name_of(f"Bearer {OLD}"), keys.name_of(f"Bearer {NEW}")) == (None, "a")
