"""`jina-v4-embed --ray`: a corpus through Ray Data, whatever is killed on the way."""

import json
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest
from conftest import Figure, Golden
from embed_command import embed_with, write_jsonl
from numpy.typing import NDArray
from pdf_files import ONE_BAD, pdf, stream
from PIL import Image
from pyarrow import fs, parquet
from servers import PATIENCE_S, free_port

pytestmark = pytest.mark.long

TASK = "retrieval"
REVISION = "94ab5b9a669fa4df-float32-602112"
OTHER_REVISION = "0000000000000000-float32-602112"
TIMEOUT_S, SLOW_TIMEOUT_S = 300.0, 900.0
CLUSTER = Path(__file__).parents[1] / "ray_cluster.py"
MOTO = Path(__file__).parents[2] / ".venv-clients/bin/moto_server"
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("JINA_V4_")}
KEYS = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_EC2_METADATA_DISABLED": "true"}
COMMAND = [sys.executable, "-m", "jina_v4_client.embed", "--task", TASK]
COUNTED = Path(__file__).parents[1] / "ray_bytes.py"
N_ROWS = 20_000  # of the slow test


@dataclass(frozen=True)
class Ran:
    code: int
    stderr: str


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster of these tests, and who starts commands on it."""

    process: "subprocess.Popen[str]"
    address: str
    environment: dict[str, str]

    def start(self, *arguments: object, cwd: Path, **more: str) -> "subprocess.Popen[str]":
        command = [*COMMAND, "--ray", self.address, *map(str, arguments)]
        return subprocess.Popen(
            command, cwd=cwd, env=self.environment | more, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )

    def run(self, *arguments: object, cwd: Path, **more: str) -> Ran:
        with self.start(*arguments, cwd=cwd, **more) as command:
            try:
                _, said = command.communicate(timeout=TIMEOUT_S)
            finally:
                command.kill()
        return Ran(command.returncode, said)

    def workers(self) -> list[psutil.Process]:
        """The processes of the actors that embed."""
        return processes(self.process.pid, "ray::MapWorker(MapBatches(Worker))")


def processes(parent: int, having: str) -> list[psutil.Process]:
    found = []
    for one in psutil.Process(parent).children(recursive=True):
        try:
            if having in " ".join(one.cmdline()):
                found.append(one)
        except psutil.Error:  # it has ended meanwhile
            pass
    return found


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    environment = ENVIRONMENT | KEYS | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with subprocess.Popen(
        [sys.executable, CLUSTER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        try:
            line = next(line for line in process.stdout if line.startswith("> "))
            yield Cluster(process, line.removeprefix("> ").strip(), environment)
        finally:
            everything = psutil.Process(process.pid).children(recursive=True)
            process.stdin.close()
            for one in psutil.wait_procs(everything, PATIENCE_S)[1]:
                one.kill()
            process.kill()


def read_vectors(output: Path) -> tuple[list[str], NDArray[np.float32]]:
    """The ids and vectors of all parts, in the order of the input."""
    table = parquet.read_table(output / "vectors").sort_by("row")
    assert table["row"].to_pylist() == sorted(set(table["row"].to_pylist()))
    return table["id"].to_pylist(), np.stack(table["vector"].to_numpy())


def read_errors(output: Path) -> dict[str, str]:
    if not list((output / "errors").iterdir()):
        return {}
    table = parquet.read_table(output / "errors")
    return dict(zip(table["id"].to_pylist(), table["error"].to_pylist(), strict=True))


def n_parts(output: Path) -> int:
    return len(list((output / "vectors").glob("*.parquet")))


def wait_for(condition: Callable[[], bool], command: "subprocess.Popen[str]", timeout_s: float = TIMEOUT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert command.poll() is None, command.stderr and command.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def slowed(server: Any, pause_s: float) -> None:
    embed = server.routes["/v1/embeddings"]

    def play(seen: Any) -> Any:
        server.closing.wait(pause_s)
        return embed(seen)

    server.routes["/v1/embeddings"] = play


def run_again(cluster: Cluster, *arguments: object, cwd: Path) -> Ran:
    """Run a command whose first run was killed, once Ray has noticed that."""
    deadline = time.monotonic() + TIMEOUT_S
    while (ran := cluster.run(*arguments, cwd=cwd)).code == 2 and "another run" in ran.stderr:
        assert time.monotonic() < deadline
    return ran


def test_a_killed_worker_and_a_killed_driver_lose_no_row_and_double_none(
    cluster: Cluster, server: Any, tmp_path: Path
) -> None:
    n_rows = 8 * 1024  # eight blocks
    texts = [f"text {number}" for number in range(n_rows)]
    write_jsonl(tmp_path / "corpus.jsonl", [{"id": f"row-{i}", "text": text} for i, text in enumerate(texts)])
    server.play_ours()
    server.revisions[TASK] = REVISION
    slowed(server, 0.1)
    options = ["--base-url", server.url, "--workers", 2, "--id-column", "id", "--batch-size", 64, "--dimensions", 128]
    command = [*options, "corpus.jsonl", "out"]
    out = tmp_path / "out"
    with cluster.start(*command, cwd=tmp_path) as run:
        wait_for(lambda: n_parts(out) >= 1, run)
        victim = cluster.workers()[0]
        victim.kill()
        killed_at = n_parts(out)
        wait_for(lambda: n_parts(out) > killed_at, run)
        run.kill()
    before = {part.name for part in (out / "vectors").iterdir()}
    assert 0 < len(before) < 8
    ran = run_again(cluster, *command, cwd=tmp_path)
    assert ran.code == 0, ran.stderr
    ids, vectors = read_vectors(out)
    assert ids == [f"row-{number}" for number in range(n_rows)]
    assert (vectors == np.stack([server.vector(f"Passage: {text}", 128) for text in texts])).all()
    done = {part.name for part in (out / "vectors").iterdir()}
    assert len(before & done) >= len(before) - 2  # what was written stays: it is not done again
    assert f"{n_rows:,} rows" not in ran.stderr
    assert not (tmp_path / "out.partial").exists()
    (facts,) = {parquet.read_schema(part).metadata[b"jina_v4"] for part in (out / "vectors").iterdir()}
    assert json.loads(facts)["revision"] == REVISION == json.loads((out / "job.json").read_text())["revision"]

    again = cluster.run(*command, cwd=tmp_path)
    assert (again.code, "is there already; use --force" in again.stderr) == (2, True)


def pages(n_pages: int) -> bytes:
    """A PDF file whose pages differ."""
    kids = b" ".join(b"%d 0 R" % (4 + 2 * page) for page in range(n_pages))
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[%s]/Count %d>>" % (kids, n_pages),
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    ]
    for page in range(n_pages):
        objects.append(
            b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 60 40]/Resources<</Font<</F 3 0 R>>>>/Contents %d 0 R>>"
            % (5 + 2 * page)
        )
        objects.append(stream(b"BT /F 12 Tf 10 20 Td (%d) Tj ET" % page))
    return pdf(objects)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with everything that one may hold."""
    folder = tmp_path / "pages"
    (folder / "below").mkdir(parents=True)
    for number, n_pages in enumerate([3, 70, 1]):
        (folder / f"below/{number}.pdf").write_bytes(pages(n_pages))
    (folder / "bad.pdf").write_bytes(ONE_BAD)
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "notes.xyz").write_text("no image either")
    (folder / ".hidden.png").write_bytes(b"")
    (folder / "self").symlink_to(".")
    (folder / "lost.png").symlink_to("nowhere")
    Image.new("RGB", (40, 30), "red").save(folder / "red.png")
    frames = [Image.new("RGB", (40, 30), color) for color in ("green", "blue")]
    frames[0].save(folder / "two.tiff", save_all=True, append_images=frames[1:])
    return folder


def test_a_folder_gives_the_same_rows_as_on_one_machine(
    cluster: Cluster, server: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.play_ours()
    monkeypatch.chdir(tmp_path)
    options = ["--base-url", server.url, "--on-error", "skip"]
    ran = cluster.run(*options, folder, "out", cwd=tmp_path)
    assert ran.code == 3, ran.stderr
    ended = embed_with("--task", TASK, *options)(folder, "one.parquet")
    assert ended.code == 3, ended.stderr
    expected = parquet.read_table("one.parquet")
    ids, vectors = read_vectors(tmp_path / "out")
    assert ids == expected["id"].to_pylist()
    assert len(ids) > 75
    assert (vectors == np.stack(expected["vector"].to_numpy())).all()
    lines = [json.loads(line) for line in Path("one.parquet.errors.jsonl").read_text().splitlines()]
    assert read_errors(tmp_path / "out") == {line["id"]: line["error"] for line in lines}
    assert f"{len(lines)} rows have no vector; out/errors says why" in ran.stderr


def test_tables_give_the_same_rows_as_on_one_machine(
    cluster: Cluster, server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.play_ours()
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 30), "red").save("red.png")
    red = Path("red.png").read_bytes()
    rows = [{"text": "one", "image": None}, {"text": None, "image": "red.png"}, {"text": "two", "image": "lost.png"}]
    write_jsonl(tmp_path / "part-1.jsonl", [*rows, {"text": None, "image": "lost.png"}])
    with Path("part-1.jsonl").open("a") as file:
        file.write("{no json\n")
    Path("part-2.csv").write_text('text,image\nthree,\n,red.png\n"four, five",\n')
    images = pa.array([None, {"bytes": red, "path": None}], pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    parquet.write_table(pa.table({"text": ["six", None], "image": images}), "part-3.parquet")
    options = ["--base-url", server.url, "--on-error", "skip", "--text-column", "text", "--image-column", "image"]
    options += ["--multivector", "--dtype", "float16"]
    ran = cluster.run(*options, tmp_path / "part-*", "out", cwd=tmp_path)
    assert ran.code == 3, ran.stderr
    inputs = sorted(tmp_path.glob("part-*"))
    assert embed_with("--task", TASK, *options)(*inputs, "one.parquet").code == 3
    expected, found = parquet.read_table("one.parquet"), parquet.read_table("out/vectors").sort_by("row")
    assert found["id"].to_pylist() == expected["id"].to_pylist()
    assert found["vector"].type == expected["vector"].type
    assert found["vector"].to_pylist() == expected["vector"].to_pylist()
    lines = [json.loads(line) for line in Path("one.parquet.errors.jsonl").read_text().splitlines()]
    assert read_errors(tmp_path / "out") == {line["id"]: line["error"] for line in lines}


def test_a_run_goes_on_with_its_options_and_its_revision_only(cluster: Cluster, server: Any, tmp_path: Path) -> None:
    n_rows = 3 * 128
    corpus, out = tmp_path / "corpus.txt", tmp_path / "out"
    corpus.write_text("".join(f"text {number}\n" for number in range(n_rows)))
    server.play_ours()
    server.revisions[TASK] = REVISION
    working = server.routes["/v1/embeddings"]

    def fail_in_the_third_block(seen: Any) -> Any:
        if int(seen.body["input"][0]["text"].split()[1]) < 256:
            return working(seen)
        deadline = time.monotonic() + TIMEOUT_S
        while not n_parts(out) and time.monotonic() < deadline:
            server.closing.wait(0.05)
        return server.json_answer({"error": {"message": "no", "code": "x"}}, 401)

    server.routes["/v1/embeddings"] = fail_in_the_third_block
    options = ["--base-url", server.url, "--multivector", "--batch-size", 2]
    ran = cluster.run(*options, "corpus.txt", "out", cwd=tmp_path)
    assert ran.code == 1
    assert "401" in ran.stderr
    assert "what is done is kept in out.partial" in ran.stderr
    assert n_parts(out)

    server.routes["/v1/embeddings"] = working
    ran = cluster.run("--base-url", server.url, "--dimensions", 128, "corpus.txt", "out", cwd=tmp_path)
    assert (ran.code, "holds the work of another run: --dimensions was not given" in ran.stderr) == (2, True)
    server.revisions[TASK] = OTHER_REVISION
    n_sent = server.paths().count("/v1/embeddings")
    ran = cluster.run(*options, "corpus.txt", "out", cwd=tmp_path)
    assert ran.code == 1
    assert f"a server has revision {OTHER_REVISION} of the model, and other vectors are of {REVISION}" in ran.stderr
    assert server.paths().count("/v1/embeddings") == n_sent
    server.revisions[TASK] = REVISION
    ran = cluster.run(*options, "corpus.txt", "out", cwd=tmp_path)
    assert ran.code == 0, ran.stderr
    assert sorted(parquet.read_table(out / "vectors")["row"].to_pylist()) == list(range(n_rows))

    (tmp_path / "empty.txt").touch()
    ran = cluster.run(*options, "empty.txt", "none", cwd=tmp_path)
    assert (ran.code, "the input has no rows" in ran.stderr) == (2, True)
    assert not list(tmp_path.glob("none.*"))


def test_a_server_that_does_not_start_on_a_gpu_ends_the_run_with_a_message(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("a text\n")
    ran = cluster.run("--checkpoint", "nowhere", "corpus.txt", "out", cwd=tmp_path)
    assert (ran.code, f"error: jina-v4-serve {TASK} ended with exit code" in ran.stderr) == (1, True), ran.stderr


@dataclass(frozen=True)
class Store:
    """An S3 server on this machine: its file system, and what follows a URI to reach it."""

    files: fs.S3FileSystem
    query: str


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    port = free_port()
    with (
        (tmp_path_factory.mktemp("moto") / "log").open("wb") as log,
        subprocess.Popen([MOTO, "-H", "127.0.0.1", "-p", str(port)], stdout=log, stderr=log) as moto,
    ):
        try:
            there = {"endpoint_override": f"127.0.0.1:{port}", "scheme": "http", "region": "us-east-1"}
            files = fs.S3FileSystem(
                access_key=KEYS["AWS_ACCESS_KEY_ID"],
                secret_key=KEYS["AWS_SECRET_ACCESS_KEY"],
                allow_bucket_creation=True,
                retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=20),
                **there,
            )
            files.create_dir("bucket")
            yield Store(files, "?" + "&".join(f"{name}={value}" for name, value in there.items()))
        finally:
            moto.kill()


def test_objects_of_a_store_are_embedded_into_a_store(
    cluster: Cluster, server: Any, store: Store, tmp_path: Path
) -> None:
    server.play_ours()
    n_rows = 3 * 128
    texts = [f"text {number}" for number in range(n_rows)]
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts[:200]])
    parquet.write_table(pa.table({"text": texts[200:]}), tmp_path / "b.parquet")
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages/one.pdf").write_bytes(pages(5))
    Image.new("RGB", (40, 30), "red").save(tmp_path / "pages/red.png")
    (tmp_path / "pages/broken.jpg").write_bytes(b"no image")
    (tmp_path / "pages/notes.xyz").write_text("no image either")
    fs.copy_files(str(tmp_path), "bucket/corpus", destination_filesystem=store.files)
    inputs = [f"s3://bucket/corpus/{name}{store.query}" for name in ("*.jsonl", "*.parquet", "pages")]
    command = ["--base-url", server.url, "--multivector", "--on-error", "skip", *inputs]
    command.append(f"s3://bucket/out{store.query}")
    working = server.routes["/v1/embeddings"]
    reached = threading.Event()

    def stop_in_the_last_block(seen: Any) -> Any:
        if "text 300" in str(seen.body["input"][0]):
            reached.set()
            server.closing.wait(TIMEOUT_S)
        return working(seen)

    def names(folder: str) -> set[str]:
        found = store.files.get_file_info(fs.FileSelector(f"bucket/{folder}", allow_not_found=True))
        return {one.path for one in found if not one.path.endswith(".pending.parquet")}

    server.routes["/v1/embeddings"] = stop_in_the_last_block
    with cluster.start(*command, "--batch-size", 1, cwd=tmp_path) as run:
        wait_for(lambda: reached.is_set() and len(names("out.partial/done")) > 0, run)
        run.kill()
    done = names("out.partial/done")
    for path in done:  # as if it had been killed while the object store renamed this checkpoint, which is a copy
        store.files.copy_file(path, path.replace(".parquet", ".pending.parquet"))
    server.routes["/v1/embeddings"] = working
    ran = run_again(cluster, *command, "--batch-size", 1, cwd=tmp_path)
    assert ran.code == 3, ran.stderr
    assert {Path(path).name for path in done} < {Path(path).name for path in names("out/vectors")}
    table = parquet.read_table("bucket/out/vectors", filesystem=store.files).sort_by("row")
    ids = [f"a.jsonl#{i + 1}" for i in range(200)] + [f"b.parquet#{i + 1}" for i in range(n_rows - 200)]
    ids += [*(f"pages/one.pdf#{page + 1}" for page in range(5)), "pages/red.png"]
    assert table["id"].to_pylist() == [f"s3://bucket/corpus/{name}" for name in ids]
    for place, text in enumerate(texts):
        assert (np.stack(table["vector"][place].as_py()) == server.token_rows(f"Passage: {text}")).all()
    errors = parquet.read_table("bucket/out/errors", filesystem=store.files)
    broken, notes = (f"s3://bucket/corpus/pages/{name}" for name in ("broken.jpg", "notes.xyz"))
    assert sorted(errors["id"].to_pylist()) == [broken, notes]
    assert not any("jina-v4-embed-" in why for why in errors["error"].to_pylist())
    assert [one.base_name for one in store.files.get_file_info(fs.FileSelector("bucket"))] == ["corpus", "out"]


def test_no_row_passes_through_the_driver(cluster: Cluster, server: Any, tmp_path: Path, figure: Figure) -> None:
    server.play_ours()
    found = {}
    for n_rows, dimensions in ((1024, 128), (1024, 2048), (4096, 2048)):
        name = f"{n_rows}-{dimensions}"
        (tmp_path / f"{name}.txt").write_text(
            "".join(f"text {number}, long: {'x' * 500}\n" for number in range(n_rows))
        )
        command = [sys.executable, COUNTED, "--task", TASK, "--ray", cluster.address, "--base-url", server.url]
        command += ["--dimensions", str(dimensions), f"{name}.txt", name]
        ran = subprocess.run(
            command, cwd=tmp_path, env=cluster.environment, stderr=subprocess.PIPE, text=True, timeout=TIMEOUT_S
        )
        assert ran.returncode == 0, ran.stderr
        found[name] = int(ran.stderr.rpartition("> ")[2])
    # What there is of a block: its size, schema and statistics.
    assert found["1024-2048"] < found["1024-128"] + 20_000
    assert found["4096-2048"] < found["1024-2048"] + 3 * 100_000
    figure(
        "jina-v4-embed --ray: bytes of objects that reach the driver: "
        + ", ".join(f"{n_bytes:,} for {name.replace('-', ' texts of ')} dimensions" for name, n_bytes in found.items())
    )


def lives(process: psutil.Process) -> bool:
    """Whether a process still runs; one that is dead, and not reaped by a slow init, does not."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.slow
@pytest.mark.timeout(4 * SLOW_TIMEOUT_S)
def test_twenty_thousand_rows_survive_a_killed_worker_and_a_killed_driver(
    folded: Callable[[str], Path], golden: Golden, tmp_path: Path, figure: Figure
) -> None:
    texts = [f"text {number} of the corpus" for number in range(N_ROWS)]
    texts[::7] = [golden.texts[number % len(golden.texts)] for number in range(len(texts[::7]))]
    write_jsonl(tmp_path / "corpus.jsonl", [{"id": f"row-{i}", "text": text} for i, text in enumerate(texts)])
    checkpoint = folded("float32") / f"jina-embeddings-v4-{TASK}"
    command = [*COMMAND, "--ray", "local", "--checkpoint", str(checkpoint), "--server-args=--dtype float32"]
    command += ["--workers", "2", "--prompt-name", "query", "--id-column", "id", "--on-error", "skip"]
    command += ["corpus.jsonl", str(golden.images[0].parent), "out"]
    out, start = tmp_path / "out", time.monotonic()

    def begin() -> "subprocess.Popen[str]":
        return subprocess.Popen(
            command, cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    with begin() as run:
        everything: list[psutil.Process] = []
        try:
            wait_for(lambda: n_parts(out) >= 5, run, SLOW_TIMEOUT_S)
            everything = processes(run.pid, "")
            processes(run.pid, "ray::MapWorker(MapBatches(Worker))")[0].kill()
            wait_for(lambda: n_parts(out) >= 10, run, SLOW_TIMEOUT_S)
            everything += processes(run.pid, "")
        finally:
            run.kill()
            left = [one for one in psutil.wait_procs(everything, PATIENCE_S)[1] if lives(one)]
            alive = [one.name() for one in left]
            for one in left:
                one.kill()
    assert alive == []  # a Ray of its own ends with the command, and so do its servers
    before = n_parts(out)
    memory = []
    with begin() as run:
        try:
            while run.poll() is None:
                assert time.monotonic() - start < 3 * SLOW_TIMEOUT_S
                memory.append((n_parts(out), psutil.Process(run.pid).memory_info().rss))
                time.sleep(0.5)
        finally:
            run.kill()
        assert run.stderr is not None
        said = run.stderr.read()
    assert run.returncode == 0, said
    ids, vectors = read_vectors(out)
    images = sorted(str(path) for path in golden.images[0].parent.iterdir())
    assert ids == [*(f"row-{number}" for number in range(N_ROWS)), *images]
    places = {text: place for place, text in enumerate(golden.texts)}
    expected = [(i, f"query/{places[text]}") for i, text in enumerate(texts) if text in places]
    expected += [(N_ROWS + place, f"image/{place}") for place in range(len(images))]
    rows = np.stack([golden.rows[f"{TASK}/{name}/dense"] for _, name in expected])
    worst = float(np.abs(vectors[[number for number, _ in expected]] - rows).max())
    assert worst < 1e-5
    grown = memory[-1][1] - next(rss for done, rss in memory if done > before)
    figure(
        f"jina-v4-embed --ray local, two workers, kill -9 of one and of the command: {N_ROWS:,} texts and {len(images)}"
        f" images, each once; no element off by over {worst:.1e}; {before} parts of the first run stayed; the driver"
        f" grew by {grown / 2**20:.1f} MiB while {memory[-1][0] - before} blocks were written;"
        f" {time.monotonic() - start:.0f} s in all"
    )
