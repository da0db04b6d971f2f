"""The file that names the gateway's servers, read again while the gateway runs: real HTTP on both sides."""

import asyncio
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from jina_v4_serve import watched_file
from jina_v4_serve.errors import OptionError
from jina_v4_serve.gateway.run import GatewaySettings, read_servers, running
from jina_v4_serve.gateway.servers import Servers
from jina_v4_serve.watched_file import WatchedFile
from servers import BIN, free_port
from upstreams import Upstream, listening

pytestmark = pytest.mark.long

URL = "/v1/embeddings"
JSON = {"Content-Type": "application/json"}


@pytest.fixture(autouse=True)
def polled_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jina_v4_serve.watched_file._POLL_S", 0.25)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.02)


def name_servers(file: Path, *upstreams: Upstream) -> None:
    file.write_text("# by hand\n\n" + "".join(f"{each.task}={each.url}/  # one\n" for each in upstreams))


@asynccontextmanager
async def gateway(file: Path) -> AsyncIterator[aiohttp.ClientSession]:
    port = free_port()
    async with (
        running(GatewaySettings(port=port, servers_file=file), asyncio.Event()),
        aiohttp.ClientSession(f"http://127.0.0.1:{port}", headers=JSON) as client,
    ):
        yield client


async def embed(client: aiohttp.ClientSession, task: str = "code") -> int:
    async with client.post(URL, data=b'{"task": "%s"}' % task.encode()) as answer:
        await answer.read()
        return answer.status


async def test_a_server_is_replaced_under_load_and_no_request_is_refused_or_lost(tmp_path: Path) -> None:
    reached, go_on = asyncio.Event(), asyncio.Event()

    async def slowly(request: web.Request) -> web.Response:
        if await request.read() != b'{"task": "code"}':
            reached.set()
            await go_on.wait()
        await asyncio.sleep(0.05)
        return web.json_response({})

    old, new = Upstream("code", slowly), Upstream("code", slowly)
    file = tmp_path / "servers"
    outcomes: Counter[int | str] = Counter()
    stop = asyncio.Event()

    async def load(client: aiohttp.ClientSession) -> None:
        while not stop.is_set():
            try:
                outcomes[await embed(client)] += 1
            except aiohttp.ClientError as error:
                outcomes[repr(error)] += 1

    async with listening(new):
        async with listening(old):
            name_servers(file, old)
            stand = gateway(file)
            client = await stand.__aenter__()
            clients = [asyncio.create_task(load(client)) for _ in range(8)]
            late = asyncio.create_task(client.post(URL, data=b'{"task": "code", "input": "late"}'))
            await reached.wait()
            name_servers(file, new)
            await until(lambda: len(new.seen) > 50)
            n_old = len(old.seen)
            await until(lambda: len(new.seen) > 200)
            assert len(old.seen) == n_old > 8
            assert not late.done()
            go_on.set()
            async with await late as answer:
                assert answer.status == 200
        await until(lambda: len(new.seen) > 400)  # the old one is gone
        stop.set()
        await asyncio.gather(*clients)
        await stand.__aexit__(None, None, None)
    print(f"{dict(outcomes)}, {n_old} at the old server and {len(new.seen)} at the new one")
    assert set(outcomes) == {200}


async def test_tasks_are_added_and_removed_everywhere(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    one, two = (Upstream(task, pages={"/metrics": "", "/version": "{}"}) for task in ("retrieval", "code"))
    file = tmp_path / "servers"
    async with listening(one), listening(two):
        name_servers(file, one)
        async with gateway(file) as client:
            assert [await embed(client, task) for task in ("retrieval", "code")] == [200, 422]
            for upstream, other in ((two, one), (one, two)):
                name_servers(file, upstream)
                while await embed(client, upstream.task) != 200:
                    await asyncio.sleep(0.05)
                assert await embed(client, other.task) == 422
                async with client.get("/ready") as answer:
                    assert await answer.json() == {"ready": True, "tasks": {upstream.task: "ready"}}
                async with client.get("/metrics") as answer:
                    page = await answer.text()
                assert f'jina_v4_gateway_server_ready{{task="{upstream.task}"}} 1.0' in page
                assert f'jina_v4_gateway_server_ready{{task="{other.task}"}}' not in page
                assert f'jina_v4_gateway_answers_total{{status="503",task="{upstream.task}"}} 0.0' in page
            two.url = f"http://127.0.0.1:{free_port()}"
            name_servers(file, one, two)
            while await embed(client, "code") != 503:
                await asyncio.sleep(0.05)
            assert await embed(client, "retrieval") == 200
    told = capfd.readouterr().err
    assert f"the servers are now retrieval={one.url} (ready), code={two.url} (down)\n" in told


async def test_a_broken_file_is_named_once_and_changes_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    upstream = Upstream("code")
    file = tmp_path / "servers"
    told = ""
    async with listening(upstream):
        name_servers(file, upstream)
        async with gateway(file) as client:
            for content in ("code=http://h\ncode=http://i\n", "", None):
                file.unlink() if content is None else file.write_text(content)
                while "error: " not in told.rpartition("stay as they are\n")[0]:
                    await asyncio.sleep(0.05)
                    told += capfd.readouterr().err
                print(told)
                await asyncio.sleep(0.7)
                told += capfd.readouterr().err
                assert told.count("error: ") == 1
                assert str(file) in told
                told = ""
                assert await embed(client) == 200


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("code=http://h:1\n\ncode=http://i:2", "servers:3: code=http://i:2: there is a server for code already"),
        ("x=http://h", "servers:1: x=http://h: the task before the = must be one of retrieval, text-matching, code"),
        ("# one\ncode", "servers:2: code: write an address such as http://127.0.0.1:8001 after the ="),
        ("code=http://h:99999", "write an address such as"),
        ("code=http://[::1", "write an address such as"),
        ("code=http://u:p@h", "write an address such as"),
        ("code=http://a..b:8001", "write an address such as"),
        (f"code=http://{'a' * 64}.example", "write an address such as"),
        ("code=http://a\\b:1", "write an address such as"),
        ("# nothing\n", "servers has no server; write a line such as retrieval=http://127.0.0.1:8001 into it"),
        ("code=http://\udcff", "cannot read "),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "servers"
    file.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(OptionError) as error:
        read_servers(file)
    assert message in str(error.value)


async def test_what_an_old_server_says_late_is_not_the_new_ones_state() -> None:
    reached, go_on = asyncio.Event(), asyncio.Event()

    old, new = Upstream("code"), Upstream("code")

    async def late(_: web.Request) -> web.Response:
        reached.set()
        await go_on.wait()
        return web.Response(status=503)

    old.handle = late  # type: ignore[method-assign] # the test needs an answer of its own
    async with listening(old), listening(new):
        servers = Servers({"code": old.url}, 1.0)
        check = asyncio.create_task(servers.check_all())
        await reached.wait()
        before = servers.urls["code"]
        await servers.replace({"code": new.url})
        go_on.set()
        await check
        servers.note("code", before, "down")
        assert servers.states == {"code": "ready"}
        await servers.session.close()


async def test_a_file_is_not_read_while_it_is_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "servers"
    path.write_text("one")
    file = WatchedFile(path)
    n_checks, check = 0, watched_file.signature

    def write_and_check(path: Path) -> watched_file.Signature:
        """Somebody has written on before each of the first ten checks."""
        nonlocal n_checks
        n_checks += 1
        if n_checks <= 10:
            path.write_text("x" * n_checks)
        return check(path)

    monkeypatch.setattr(watched_file, "signature", write_and_check)
    monkeypatch.setattr(watched_file, "_POLL_S", 0.01)
    await file.changed()
    assert n_checks == 12  # the eleventh sees what the tenth saw; then it counts as read
    changed = asyncio.create_task(file.changed())
    await until(lambda: n_checks > 20)
    assert not changed.done()
    file.read_again()
    await changed


async def test_a_file_that_becomes_readable_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "servers"
    path.write_text("one")
    file = WatchedFile(path)
    path.chmod(0o400)  # as its content, so its owner and mode: before that it may have been unreadable
    await file.changed()


async def test_sighup_has_the_file_read_at_once(tmp_path: Path) -> None:
    one, two = Upstream("retrieval"), Upstream("code")
    file, port = tmp_path / "servers", free_port()
    async with listening(one), listening(two), aiohttp.ClientSession(f"http://127.0.0.1:{port}") as client:
        name_servers(file, one)
        process = await asyncio.create_subprocess_exec(
            *(BIN / "jina-v4-serve", "gateway", "--servers", file, "--port", str(port)),
            stderr=asyncio.subprocess.PIPE,
        )
        assert process.stderr is not None
        line = await process.stderr.readline()
        assert line.decode().endswith("/v1 for retrieval\n")
        for n_times in range(2):
            name_servers(file, *(one, two)[: 2 - n_times])
            process.send_signal(signal.SIGHUP)
            line = await process.stderr.readline()
            print(line.decode())
            assert line.decode().startswith(f"the servers are now retrieval={one.url} (ready)")
            async with client.get("/ready") as answer:
                assert len((await answer.json())["tasks"]) == 2 - n_times
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0


@pytest.mark.parametrize("both", [True, False])
async def test_servers_come_from_options_or_from_a_file(tmp_path: Path, both: bool) -> None:
    arguments = ["--server", "code=http://h", "--servers", str(tmp_path)] if both else []
    process = await asyncio.create_subprocess_exec(
        *(BIN / "jina-v4-serve", "gateway", *arguments), stderr=asyncio.subprocess.PIPE
    )
    _, told = await process.communicate()
    assert process.returncode == 2
    assert b"--servers" in told


async def test_a_server_that_speaks_no_http_does_not_end_the_watch_of_the_others() -> None:
    async def babble(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"no HTTP\r\n\r\n")
        writer.close()

    port, starting = free_port(), Upstream("code", ready=503)
    async with await asyncio.start_server(babble, "127.0.0.1", port), listening(starting):
        servers = Servers({"retrieval": f"http://127.0.0.1:{port}", "code": starting.url}, 1.0)
        servers.states["retrieval"] = "ready"
        watch = asyncio.create_task(servers.watch())
        await until(lambda: servers.states == {"retrieval": "down", "code": "not ready"})
        starting.ready = 200
        await until(lambda: servers.states["code"] == "ready")
        watch.cancel()
        await servers.session.close()
