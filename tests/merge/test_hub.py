"""Bases from the hub: one on this machine that answers as the hub does, one out of reach, and its cache."""

import functools
import hashlib
import json
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import GOLDEN

pytestmark = pytest.mark.long

Run = Callable[..., subprocess.CompletedProcess[str]]
BASE = GOLDEN / "checkpoint"
NAME = "someone/some-model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(SimpleHTTPRequestHandler):
    """Answers the three questions that a download asks: which commit, which files, and each file.

    The first answer for a file in `breaks` ends in its middle, with the connection.
    """

    asked: list[str]
    breaks: set[str]
    resumed: dict[str, str]

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path in {f"/api/models/{NAME}{end}" for end in ("", "/revision/main", "/revision/v1")}:
            self.answer(json.dumps({"id": NAME, "modelId": NAME, "sha": COMMIT}).encode())
        elif path == f"/api/models/{NAME}/tree/{COMMIT}":
            files = [file for file in Path(self.directory).rglob("*") if file.is_file()]
            self.answer(json.dumps([self.described(file) for file in files]).encode())
        elif path.startswith(f"/{NAME}/resolve/{COMMIT}/"):
            name = path.removeprefix(f"/{NAME}/resolve/{COMMIT}/")
            self.asked.append(name)
            content = (Path(self.directory) / name).read_bytes()
            headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
            if wanted := self.headers["Range"]:
                self.resumed[name] = wanted
                first = int(wanted.removeprefix("bytes=").removesuffix("-"))
                headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
                self.answer(content[first:], 206, **headers)
            elif self.command == "GET" and name in self.breaks:
                self.breaks.remove(name)
                self.answer(content[: len(content) // 2], **headers, **{"Content-Length": str(len(content))})
                self.close_connection = True
            else:
                self.answer(content, **headers)
        else:
            self.answer(b"{}", 404, **{"X-Error-Code": "RevisionNotFound" if NAME in path else "RepoNotFound"})

    def described(self, file: Path) -> dict[str, object]:
        content = file.read_bytes()
        name = file.relative_to(self.directory).as_posix()
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha256(content).hexdigest()}

    def answer(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """No cache, no token, and a hub only where a test puts one."""
    return {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": ""}


@pytest.fixture
def breaks() -> set[str]:
    """Names of files whose first download is to break off."""
    return set()


@pytest.fixture
def resumed() -> dict[str, str]:
    """The range of each file that was asked for in part."""
    return {}


@pytest.fixture
def hub(base: Path, env: dict[str, str], breaks: set[str], resumed: dict[str, str]) -> Iterator[list[str]]:
    """A hub with the golden base and some files more; gives the names of the files asked for."""
    for name in ("onnx/model.onnx", "modeling_jina_embeddings_v4.py", "results.safetensors"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_bytes(b"not asked for")
    asked: list[str] = []
    handler = type("HubOfOneTest", (Hub,), {"asked": asked, "breaks": breaks, "resumed": resumed})
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(base))) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        env["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
        try:
            yield asked
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("revision", [[], ["--revision", "v1"]], ids=["newest", "a tag"])
def test_just_what_is_needed_is_fetched_and_the_commit_recorded(
    revision: list[str], hub: list[str], run: Run, base: Path, out: Path, env: dict[str, str]
) -> None:
    (base / "processor_config.json").write_text("{}")
    done = run("fold", "--base", NAME, "--out", out, "--task", "code", *revision, **env)
    assert done.returncode == 0, done.stderr
    needed = {path.relative_to(BASE).as_posix() for path in BASE.rglob("*") if path.is_file()} - {"chat_template.json"}
    assert set(hub) == needed | {"processor_config.json"}
    sources = json.loads((out / "jina-embeddings-v4-code" / "manifest.json").read_text())["sources"]
    for source in sources.values():
        assert (source["name"], source["revision"]) == (NAME, COMMIT)


def test_another_model_is_refused_before_its_weights_are_fetched(
    base: Path, edit_json: Callable[..., None], hub: list[str], run: Run, out: Path, env: dict[str, str]
) -> None:
    # What one of the maker's checkpoints for vLLM lacks, beside the adapters.
    edit_json(base / "config.json", multi_vector_projector_dim=None, task_names=None, matryoshka_dims=None)
    done = run("fold", "--base", NAME, "--out", out, **env)
    assert (done.returncode, set(hub)) == (1, {"config.json"})
    assert "The base is the published one, jinaai/jina-embeddings-v4" in done.stderr.splitlines()[-1]
    assert not out.exists()


def test_a_checkpoint_to_compare_with_is_fetched_without_what_no_vector_depends_on(
    hub: list[str], run: Run, folded: Callable[[str], Path], env: dict[str, str]
) -> None:
    ours = folded("bfloat16") / "jina-embeddings-v4-code"
    done = run("verify", ours, "--against", NAME, **env)
    assert done.returncode == 1, "the base has no adapter"
    assert ": 48 tensors equal, 0 differ by rounding, 22 differ\n" in done.stdout
    not_needed = {"generation_config.json", "adapters/adapter_config.json", "adapters/adapter_model.safetensors"}
    assert set(hub) == {path.relative_to(BASE).as_posix() for path in BASE.rglob("*") if path.is_file()} - not_needed


def test_adapters_of_another_place_on_the_hub_are_fetched_alone(
    hub: list[str], run: Run, out: Path, env: dict[str, str]
) -> None:
    from_hub = ("--adapters", NAME, "--adapters-revision", "v1")
    done = run("fold", "--base", BASE, *from_hub, "--out", out, "--task", "code", **env)
    assert done.returncode == 0, done.stderr
    assert set(hub) == {"adapters/adapter_config.json", "adapters/adapter_model.safetensors"}
    sources = json.loads((out / "jina-embeddings-v4-code" / "manifest.json").read_text())["sources"]
    assert (sources["base"]["name"], sources["base"]["revision"]) == (str(BASE), None)
    assert (sources["adapters"]["name"], sources["adapters"]["revision"]) == (NAME, COMMIT)


def test_a_download_that_broke_off_goes_on_where_it_was(
    base: Path, hub: list[str], breaks: set[str], resumed: dict[str, str], run: Run, out: Path, env: dict[str, str]
) -> None:
    n_kept = 10 << 20  # the hub's client writes so many bytes at a time
    content = (base / "vocab.json").read_bytes().ljust(5 * n_kept // 2)
    (base / "vocab.json").write_bytes(content)
    breaks.add("vocab.json")
    done = run("fold", "--base", NAME, "--out", out, "--task", "code", **env)
    assert done.returncode == 0, done.stderr
    assert resumed == {"vocab.json": f"bytes={n_kept}-"}
    assert (out / "jina-embeddings-v4-code" / "vocab.json").read_bytes() == content


@pytest.mark.parametrize(
    ("arguments", "what"),
    [(["--base", "no/such-model"], "no/such-model"), (["--base", NAME, "--revision", "v9"], f"{NAME} at revision v9")],
    ids=["model", "revision"],
)
def test_what_the_hub_does_not_have_is_named(
    arguments: list[str], what: str, hub: list[str], run: Run, out: Path, env: dict[str, str]
) -> None:
    done = run("fold", "--out", out, *arguments, **env)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1].startswith(
        f"error: {what}: the hub does not have it, or does not show it to you"
    )
    assert "Traceback" not in done.stderr


def test_a_hub_out_of_reach_names_the_ways_out(run: Run, out: Path, env: dict[str, str]) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        env["HF_ENDPOINT"] = f"http://127.0.0.1:{closed.getsockname()[1]}"
        done = run("fold", "--base", NAME, "--out", out, **env)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {NAME}: there is no such folder here, and the hub cannot be reached")
    assert all(way in line for way in ("--base DIR", "HF_HUB_OFFLINE", "HF_ENDPOINT", "`jina-v4-merge standin DIR`"))
    assert not out.exists()


def test_a_snapshot_in_the_cache_does_without_the_hub(run: Run, out: Path, env: dict[str, str]) -> None:
    repository = Path(env["HF_HOME"]) / "hub" / "models--someone--some-model"
    shutil.copytree(BASE, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    done = run("fold", "--base", NAME, "--out", out, "--task", "code", **env | {"HF_HUB_OFFLINE": "1"})
    assert (done.returncode, done.stderr) == (0, "")
    manifest = json.loads((out / "jina-embeddings-v4-code" / "manifest.json").read_text())
    assert manifest["sources"]["base"]["revision"] == COMMIT


@pytest.mark.parametrize("name", ["someone/", "some one/some model"])
def test_a_path_that_is_no_name_of_the_hub_either_is_an_error(name: str, run: Run, out: Path) -> None:
    done = run("fold", "--base", name, "--out", out)
    assert done.returncode == 1
    assert done.stderr == f"error: {name}: neither a folder here nor a possible name on the hub\n"
