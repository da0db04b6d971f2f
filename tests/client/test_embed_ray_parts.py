"""`jina-v4-embed --ray` without a cluster: what is listed, read, resumed and refused."""

import contextlib
import json
import os
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import ray
from embed_command import embed_with
from jina_v4_client.embed.errors import StoppedError, UsageError
from jina_v4_client.embed.folder import Folder
from jina_v4_client.embed.job import Job
from jina_v4_client.embed.places import list_files, on_this_machine
from jina_v4_client.embed.ray import Plan
from jina_v4_client.embed.ray.corpus import Corpus, read_contents
from jina_v4_client.embed.ray.parts import Output
from jina_v4_client.embed.ray.run import run
from jina_v4_client.embed.ray.worker import Worker
from PIL import Image
from pyarrow import fs, parquet

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")  # Ray's, of its own defaults

OPTIONS = {"pdf-scale": 1.0, "text-column": "text", "image-column": None, "id-column": None, "input-format": None}
JOB = Job(OPTIONS, [{"path": "corpus.txt"}], "a revision")
STORE = "s3://USER:SECRET@bucket/corpus?region=us-east-1&endpoint_override=127.0.0.1:"


def plan(*, skip: bool) -> Plan:
    return Plan(
        inputs=[],
        output="out",
        address="local",
        n_workers=None,
        urls=[],
        server=[],
        client={},
        batch_sizes={"text": 1, "image": 1},
        options=OPTIONS,
        skip=skip,
        quiet=True,
    )


def save_tiff(path: Path, n_frames: int) -> None:
    frames = [Image.new("RGB", (8, 8), (number, 0, 0)) for number in range(n_frames)]
    frames[0].save(path, "TIFF", save_all=True, append_images=frames[1:])


def listed(path: Path) -> Any:
    files, filesystems, _ = list_files([str(path)], "out")
    return pa.concat_tables(table for task in Corpus(files, filesystems, plan(skip=True)).tasks for table in task())


def names(path: Path) -> list[str]:
    return [file.name for file in list_files([str(path)], "out")[0]]


@pytest.mark.parametrize("n_left", [2, 0])
def test_pages_that_are_lost_between_listing_and_reading_are_errors(tmp_path: Path, n_left: int) -> None:
    file = tmp_path / "pages.tiff"
    save_tiff(file, 4)
    rows = listed(file)
    file.unlink() if n_left == 0 else save_tiff(file, n_left)
    read = read_contents(rows, {}, plan(skip=True)).to_pylist()
    assert [row["row"] for row in read] == [0, 1, 2, 3]
    assert [row["error"] is None for row in read] == [number < n_left for number in range(4)]
    assert read[3]["error"] == "the file has changed, or cannot be read on this node"
    with pytest.raises(StoppedError, match=r"row .*pages\.tiff#3: the file has changed"):
        read_contents(rows.slice(2), {}, plan(skip=False))


@pytest.mark.parametrize("breaks", [False, True])
def test_a_worker_blames_a_row_only_where_the_server_is_well(
    breaks: bool, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.play_ours()
    play, is_broken = server.routes["/v1/embeddings"], threading.Event()

    def answer(seen: Any) -> Any:
        if is_broken.is_set() or {"text": "bad"} in seen.body["input"]:
            is_broken.set() if breaks else None
            return server.json_answer({"error": {"message": "not finite"}}, 500)
        return play(seen)

    server.routes["/v1/embeddings"] = answer
    monkeypatch.setattr(ray, "get", lambda held: held)
    holder = SimpleNamespace(hold=SimpleNamespace(remote=lambda revision: revision))
    options = dict.fromkeys(("dimensions", "max-pixels")) | {"multivector": False, "max-length": 64, "dtype": "float32"}
    options |= {"prompt-name": "passage", "text-column": "text"}
    client = {"task": "retrieval", "max_retries": 0}
    worker = Worker(
        holder,
        replace(plan(skip=True), options=options, urls=[server.url], client=client, batch_sizes={"text": 16}),
    )
    names = [f"text {number}" for number in range(30)]
    columns = {"row": range(31), "id": ["bad", *names], "text": ["bad", *names], "kind": ["text"] * 31}
    rows = pa.table(columns | dict.fromkeys(("image", "note", "error"), pa.nulls(31, "string")))
    if breaks:
        with pytest.raises(StoppedError, match="status 500: not finite; then the server did not embed a plain text"):
            worker(rows)
        return
    tables = [worker(rows.slice(0, 1)), worker(rows.slice(1))]
    found = tables[0].to_pylist() + tables[1].to_pylist()
    assert [row["id"] for row in found if row["vector"] is None] == ["bad"]
    assert found[0]["error"].endswith("failed with status 500: not finite")
    said = {"multivector": False, "max-length": 64, "dtype": "float32", "prompt-name": "passage"}
    assert all(json.loads(table.schema.metadata[b"jina_v4"]) == said for table in tables)


@pytest.mark.parametrize("image", ["http://x/\ud83d.png", "\ud83d.png", "data:image/png;base64,\ud83d"])
def test_an_image_whose_name_is_not_utf_8_is_an_error_of_its_row(image: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": image}))
    of_images = replace(plan(skip=True), options=OPTIONS | {"text-column": None, "image-column": "image"})
    files, filesystems, _ = list_files([str(tmp_path / "rows.jsonl")], "out")
    (task,) = Corpus(files, filesystems, of_images).tasks
    (row,) = read_contents(pa.concat_tables(task()), {}, of_images).to_pylist()
    assert row["kind"] is None
    assert row["error"]


def test_a_tiff_file_that_is_named_as_an_image_in_an_object_store_is_an_error(tmp_path: Path) -> None:
    save_tiff(tmp_path / "two.png", 2)
    row = {"row": 0, "id": "s3:///two.png", "read": None, "file": "s3:///two.png", "error": None}
    store = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    (read,) = read_contents(pa.Table.from_pylist([row]), {"s3": store}, plan(skip=True)).to_pylist()
    assert read["error"] == "named as an image, but a TIFF file: rename it"


def test_a_folder_is_listed_as_without_ray(tmp_path: Path) -> None:
    for name in ("b.png", "a/x.png", "a.b/x.png", "line\nfeed.png", "notes.xyz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "self").symlink_to(".")
    (tmp_path / "lost.png").symlink_to("nowhere")
    folder = Folder(str(tmp_path), 1.0)
    left_out = {entry.path: entry.why for entry in folder.left_out()}
    rows = [row.id for row in folder.rows()]
    assert len(rows) == 4
    found = listed(tmp_path).to_pylist()
    assert [row["id"] for row in found if not row["error"]] == rows
    assert {row["id"]: row["error"] for row in found if row["error"]} == left_out
    assert left_out[str(tmp_path / "lost.png")] == "a link that leads nowhere"
    with pytest.raises(UsageError, match=r"lost\.png"):
        names(tmp_path / "*.png")
    (tmp_path / "lost.png").unlink()
    assert names(tmp_path / "*.png") == [str(tmp_path / name) for name in ("b.png", "line\nfeed.png")]


def test_the_output_is_no_input(tmp_path: Path) -> None:
    for name in ("a.png", "out/vectors/a.png", "out.partial/a.png", "outer/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    files = list_files([str(tmp_path)], str(tmp_path / "out"))[0]
    assert [file.name for file in files] == [str(tmp_path / name) for name in ("a.png", "outer/a.png")]


def test_an_output_by_another_name_is_no_input(tmp_path: Path) -> None:
    for name in ("real/a.png", "real/out/vectors/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    (tmp_path / "link").symlink_to("real")
    files = list_files([str(tmp_path / "real")], str(tmp_path / "link/out"))[0]
    assert [file.name for file in files] == [str(tmp_path / "real/a.png")]


def test_a_pattern_in_the_root_folder_is_not_in_an_output_that_is_this_folder(tmp_path: Path) -> None:
    with contextlib.chdir(tmp_path), pytest.raises(UsageError, match="is not there, or holds no files"):
        list_files(["/no-such-file-*"], ".")


@pytest.mark.parametrize("given", ["out", "out/vectors", "out/vectors/*.png", "out/vectors/a.png", "link/a.png"])
def test_an_input_in_the_output_is_refused(given: str, tmp_path: Path) -> None:
    (tmp_path / "out/vectors").mkdir(parents=True)
    (tmp_path / "out/vectors/a.png").touch()
    (tmp_path / "link").symlink_to("out/vectors")
    with pytest.raises(UsageError, match=r"^INPUT .* is in OUTPUT .*; choose another OUTPUT$"):
        list_files([str(tmp_path / given)], str(tmp_path / "out"))


def test_a_name_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    Path(f"{tmp_path}/\udcff.png").touch()
    with pytest.raises(UsageError, match=r"udcff\.png': the name is not UTF-8; rename it"):
        list_files([str(tmp_path)], "out")
    with pytest.raises(UsageError, match="the name is not UTF-8"):
        list_files([f"{tmp_path}/\udcff.png"], "out")


def test_a_key_may_hold_a_scheme(tmp_path: Path) -> None:
    (tmp_path / "a:").mkdir()
    (tmp_path / "a:/b.txt").write_text("x")
    store = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    with on_this_machine("s3://a://b.txt", {"s3": store}) as copy:
        assert Path(copy).read_text() == "x"
    with on_this_machine("/a://b.txt", {}) as path:
        assert path == "/a://b.txt"


def test_two_endpoints_of_one_scheme_are_refused() -> None:
    with pytest.raises(UsageError, match="all inputs with s3:// need the same endpoint"):
        list_files([f"{STORE}1", f"{STORE}2"], "out")


def test_no_fingerprint_holds_a_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/a.png").touch()
    store = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    monkeypatch.setattr(
        "jina_v4_client.embed.places.place", lambda name: ("s3", store, "out" if name == "out" else "corpus")
    )
    files, _, (fingerprint,) = list_files([f"{STORE}1"], "out")
    assert (files[0].name, fingerprint["path"]) == ("s3://corpus/a.png", "s3://bucket/corpus")


def begun(path: Path, *, force: bool = False, restart: bool = False) -> Output:
    output = Output(str(path / "out"))
    output.begin(JOB, force=force, restart=restart)
    return output


def write_part(path: Path, name: str, **columns: object) -> Path:
    part = path / f"out/{name}/1.parquet"
    parquet.write_table(pa.table({key: [value] for key, value in columns.items()}), part)
    return part


def test_force_removes_a_whole_output_and_resumes_its_own_work(tmp_path: Path) -> None:
    begun(tmp_path)
    part = write_part(tmp_path, "vectors", row=1)
    begun(tmp_path, force=True)
    assert part.exists()
    assert begun(tmp_path, force=True).finish() == 0
    with pytest.raises(UsageError, match="is there already; use --force"):
        begun(tmp_path, restart=True)
    begun(tmp_path, force=True)
    assert not part.exists()
    write_part(tmp_path, "vectors", row=1)
    begun(tmp_path, restart=True)
    assert not part.exists()


@pytest.mark.parametrize("step", range(1, 5))
def test_an_output_that_was_removed_by_half_is_not_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    begun(tmp_path)
    part = write_part(tmp_path, "vectors", row=1)
    checkpoint = tmp_path / "out.partial/done/1.parquet"
    checkpoint.parent.mkdir()
    checkpoint.touch()
    calls: list[str] = []

    def killed_after_some(filesystem: fs.FileSystem, path: str) -> None:
        if len(calls) == step:
            raise KeyboardInterrupt
        calls.append(path)
        remove(filesystem, path)

    from jina_v4_client.embed.ray.parts import remove

    with monkeypatch.context() as patch:
        patch.setattr("jina_v4_client.embed.ray.parts.remove", killed_after_some)
        with pytest.raises(KeyboardInterrupt):
            begun(tmp_path, restart=True)
    if (tmp_path / "out/errors").exists():
        with pytest.raises(UsageError, match="is there already"):
            begun(tmp_path)
    begun(tmp_path, restart=step % 2 == 1 or (tmp_path / "out/errors").exists())
    assert not part.exists()
    assert not checkpoint.exists()


def test_an_output_without_rows_or_vectors_is_not_complete(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the input has no rows"):
        begun(tmp_path).finish()
    assert not (tmp_path / "out.partial").exists()
    output = begun(tmp_path)
    write_part(tmp_path, "errors", id="a", error="is broken")
    with pytest.raises(StoppedError, match="no row could be embedded; one of them: a: is broken"):
        output.finish()
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())
    assert not (tmp_path / "out.partial").exists()  # the same command tries all rows again


@pytest.mark.parametrize("first", [None, "94ab5b9a669fa4df-float32-602112"])
@pytest.mark.parametrize("is_resumed", [False, True])
def test_a_server_that_tells_no_revision_does_not_go_with_one_that_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str | None, is_resumed: bool
) -> None:
    monkeypatch.setattr(f"{__name__}.JOB", replace(JOB, revision=None))
    second = "94ab5b9a669fa4df-float32-602112" if first is None else None
    output = begun(tmp_path)
    output.hold(first)
    output.hold(first)
    if is_resumed:
        write_part(tmp_path, "vectors", row=1)
        output = begun(tmp_path)
    with pytest.raises(StoppedError, match=f"a server has revision {second} of the model"):
        output.hold(second)
    output.hold(first)


@pytest.mark.parametrize("change", ["it is written to", "it is written to, and the run fails", "a file is added"])
def test_work_of_a_file_that_was_changed_for_a_while_is_not_resumed(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that are done are known by their numbers alone, so nothing shows of which state of the file they are."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    page, added = corpus / "page.png", corpus / "zz.png"
    page.write_bytes(b"before")
    before = page.stat()

    def embed(*_: object) -> None:
        (added if change == "a file is added" else page).write_bytes(b"during")
        if not (tmp_path / "out/vectors/1.parquet").exists():
            write_part(tmp_path, "vectors", row=0)
        if change.endswith("fails"):
            raise StoppedError("the server is gone")

    monkeypatch.setattr("jina_v4_client.embed.ray.run._connect", lambda _: contextlib.nullcontext())
    monkeypatch.setattr("jina_v4_client.embed.ray.run._hold", lambda _: None)
    monkeypatch.setattr("jina_v4_client.embed.ray.run._embed", embed)
    a_plan = replace(plan(skip=True), inputs=[str(corpus)], output=str(tmp_path / "out"))
    with pytest.raises(StoppedError):  # ChangedError is one
        run(a_plan, force=False, restart=False)
    page.write_bytes(b"before")
    os.utime(page, ns=(before.st_atime_ns, before.st_mtime_ns))
    added.unlink(missing_ok=True)
    monkeypatch.setattr("jina_v4_client.embed.ray.run._embed", lambda *_: None)
    if change != "a file is added":
        with pytest.raises(UsageError, match=r"changed while it was read; start anew with --restart"):
            run(a_plan, force=False, restart=False)
        with pytest.raises(UsageError, match="the input has no rows"):  # nothing of it was kept
            run(a_plan, force=False, restart=True)
    else:
        assert run(a_plan, force=False, restart=False) == 0


def test_the_last_error_of_a_chain_is_the_one_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = (
        "jina_v4_client.embed.errors.RowError: broken\n\nThe above exception was the direct cause\n\n"
        "jina_v4_client.embed.errors.StoppedError: row a.pdf#1: broken"
    )

    def fail(_: Plan) -> None:
        raise ray.exceptions.RayError(said)

    monkeypatch.setattr("jina_v4_client.embed.ray.run._connect", fail)
    (tmp_path / "corpus.txt").touch()
    with pytest.raises(StoppedError, match=r"^row a\.pdf#1: broken$"):
        run(replace(plan(skip=True), inputs=[str(tmp_path / "corpus.txt")]), force=False, restart=False)


def test_server_args_that_cannot_be_split_are_refused(tmp_path: Path) -> None:
    run = embed_with("--task", "retrieval", "--ray", "local", "--checkpoint", "x", "--server-args", "'")
    ran = run(tmp_path, tmp_path / "out")
    assert (ran.code, ran.line) == (2, "error: --server-args ' cannot be read: No closing quotation")
