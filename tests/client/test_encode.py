"""encode, in the form of sentence-transformers; progress; and that both clients offer the same."""

import base64
import errno
import inspect
import sys
from pathlib import Path
from typing import Any

import jina_v4_client
import numpy as np
import pytest
from jina_v4_client import ArgumentError, AsyncEmbeddingsClient, BadReplyError, EmbeddingsClient, ImageError
from PIL import Image
from safetensors.numpy import save_file

PICTURE = Image.new("RGB", (40, 30), (9, 8, 7))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    PICTURE.save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def test_texts_and_images_may_be_mixed_and_keep_their_places(server: Any, make_client: Any, picture: Path) -> None:
    server.play_ours()
    server.routes["/p.png"] = lambda _: server.answer(picture.read_bytes())
    items = ["a", str(picture), "b", PICTURE, f"{server.url}/p.png", "/no/such/file.png", "c\nd", "x" * 5000, "e\0f"]
    client = make_client(server.url)
    found = client.encode(items, prompt_name="passage")
    assert (found.shape, found.dtype) == ((9, 256), np.float32)
    image = client.encode_image(picture)
    for place, item in enumerate(items):
        right = image if place in (1, 3, 4) else server.vector(f"Passage: {item}")
        if place != 3:
            np.testing.assert_array_equal(found[place], right)
    bodies = server.bodies("/v1/embeddings")
    texts, images, _ = sorted(bodies, key=lambda body: -len(body["input"]))
    assert (len(texts["input"]), len(images["input"])) == (6, 3)
    assert "prompt_name" not in images


@pytest.mark.parametrize("item", ["a text", PICTURE], ids=["text", "image"])
def test_one_item_gives_one_vector(server: Any, make_client: Any, item: Any) -> None:
    server.play_ours()
    assert make_client(server.url).encode(item, prompt_name="query", truncate_dim=128).shape == (128,)


def test_a_list_gives_an_array_unless_another_form_is_wanted(server: Any, make_client: Any) -> None:
    server.play_ours()
    client = make_client(server.url)
    assert client.encode(["a"], prompt_name="query").shape == (1, 256)
    assert [row.shape for row in client.encode(["a"], prompt_name="query", convert_to_numpy=False)] == [(256,)]
    assert [rows.shape for rows in client.encode(["a b"], "query", return_multivector=True)] == [(3, 128)]
    assert client.encode(["a", None], "query", on_error="skip").vectors[1] is None


def test_texts_are_cut_where_the_published_code_cuts_them(server: Any, make_client: Any) -> None:
    server.play_stock()
    card = {"id": "jina-embeddings-v4-retrieval", "max_model_len": 32768}
    server.routes["/v1/models"] = lambda _: server.json_answer({"data": [card]})
    make_client(server.url).encode("a", prompt_name="query")
    assert server.bodies("/pooling")[0]["truncate_prompt_tokens"] == 8192


@pytest.mark.parametrize("task", ["retrieval", "text-matching"])
@pytest.mark.parametrize("told", [{}, {"prompt": ""}], ids=["unnamed", "empty"])
def test_without_a_prompt_texts_stay_as_they_are(server: Any, make_client: Any, task: str, told: Any) -> None:
    server.play_ours(task)
    client = make_client(server.url)
    np.testing.assert_array_equal(client.encode(["a"], task=task, **told), [server.vector("a")])
    with pytest.raises(ArgumentError, match=r"sentences\[1\] is empty, and without prompt_name no token is left"):
        client.encode(["a", ""], task=task, **told)


def test_a_stock_server_gets_no_prefix_without_a_prompt(server: Any, make_client: Any) -> None:
    server.play_stock()
    make_client(server.url).encode(["a", "b"])
    assert server.bodies("/pooling")[0]["input"] == ["a", "b"]


def test_a_prompt_may_be_given_by_its_text(server: Any, make_client: Any) -> None:
    server.play_ours()
    client = make_client(server.url)
    np.testing.assert_array_equal(client.encode(["a"], prompt="Passage: "), [server.vector("Passage: a")])
    with pytest.raises(ArgumentError, match="prompt='Find: ' is not offered: give prompt_name="):
        client.encode(["a"], prompt="Find: ")
    with pytest.raises(ArgumentError, match=r"prompt=\['Query: '\] is not offered"):
        client.encode(["a"], prompt=["Query: "])
    with pytest.raises(ArgumentError, match="Invalid prompt_name: "):  # None and prompt="" have no prefix
        client.encode(["a"], prompt_name="")


def test_a_file_that_is_no_image_is_a_text_and_a_broken_image_is_an_error(
    server: Any, make_client: Any, tmp_path: Path, picture: Path
) -> None:
    server.play_ours()
    (tmp_path / "notes").write_text("notes")
    (tmp_path / "half.png").write_bytes(picture.read_bytes()[:60])
    client = make_client(server.url)
    text = str(tmp_path / "notes")
    np.testing.assert_array_equal(client.encode(text, "query"), server.vector(f"Query: {text}"))
    with pytest.raises(ImageError, match=r"sentences\[1\] .*half\.png"):
        client.encode(["a", str(tmp_path / "half.png")], "query")


SVG = b'<svg xmlns="http://www.w3.org/2000/svg"/>'
# By the name of the file or by how it begins; nothing of these may be embedded as the text of its path.
BROKEN = {
    "empty.png": (b"", "not an image"),
    "zeros.PNG": (bytes(5000), "not an image"),
    "page.jpg": (b"<!DOCTYPE html><html>log in</html>", "not an image"),
    "photo.heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC, which needs|not an image"),
    "drawing.svg": (SVG, "SVG, a drawing without pixels"),
    "report.pdf": (b"%PDF-1.4 x", "a PDF file; encode_pdf embeds its pages"),
    "a drawing": (SVG, "SVG, a drawing without pixels"),
    "a report": (b"\n%PDF-1.4 x", "a PDF file; encode_pdf embeds its pages"),
    "half a photo": (b"\xff\xd8\xff\xe0 and no more", "not an image|a broken image"),
    "raw.nef": (b"II*\0 of a camera", "not an image|a broken image"),
}


@pytest.mark.parametrize(("name", "content", "message"), [(name, *of) for name, of in BROKEN.items()], ids=BROKEN)
def test_the_path_of_an_image_that_cannot_be_read_is_an_error_and_never_a_text(
    server: Any, make_client: Any, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    server.play_ours()
    (tmp_path / name).write_bytes(content)
    client, path = make_client(server.url), str(tmp_path / name)
    with pytest.raises(ImageError, match=rf"sentences\[1\] .*{name}.*({message})"):
        client.encode(["a", path], "passage")
    with pytest.raises(ImageError, match=name):
        client.encode_both(path, "passage")
    assert server.seen == []


def test_the_path_of_a_file_that_cannot_be_opened_is_an_error_and_never_a_text(
    server: Any, make_client: Any, tmp_path: Path, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.play_ours()
    client, unnamed = make_client(server.url), tmp_path / "picture"
    unnamed.write_bytes(picture.read_bytes())
    expected = client.encode([picture, unnamed])
    np.testing.assert_array_equal(client.encode([str(picture), str(unnamed)]), expected)

    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    for method in ("open", "is_file"):  # the file, or its folder
        monkeypatch.setattr(Path, method, refuse)
        with pytest.raises(ImageError, match=r"sentences\[0\] .*cannot be read \(Permission denied\)"):
            client.encode([str(picture)])
    np.testing.assert_array_equal(
        client.encode("/locked/is a folder", "query"), server.vector("Query: /locked/is a folder")
    )
    monkeypatch.undo()
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ImageError, match=r"sentences\[0\] .*cannot be read \(Permission denied\)"):
        client.encode([str(unnamed)])


def test_an_image_without_a_mark_of_its_own_is_known_by_its_name(
    server: Any, make_client: Any, tmp_path: Path, picture: Path
) -> None:
    server.play_ours()
    with Image.open(picture) as image:
        image.convert("RGB").save(tmp_path / "page.TGA")
    client = make_client(server.url)
    np.testing.assert_array_equal(client.encode(str(tmp_path / "page.TGA")), client.encode(tmp_path / "page.TGA"))


@pytest.mark.parametrize(
    "content", [b"", b"BMW is a maker of cars", b"P2 is the second", b"# A title\n", b"II. and III."], ids=str
)
def test_the_path_of_a_plain_text_file_is_a_text(server: Any, make_client: Any, tmp_path: Path, content: bytes) -> None:
    server.play_ours()
    for name in ("README.txt", "README"):
        (tmp_path / name).write_bytes(content)
        path = str(tmp_path / name)
        np.testing.assert_array_equal(make_client(server.url).encode(path, "query"), server.vector(f"Query: {path}"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt_name": "document"}, r"Invalid prompt_name: document\. Must be one of \['query', 'passage'\]\."),
        ({"truncate_dim": 3}, "Invalid truncate_dim: 3"),
        ({"task": "x"}, "Invalid task: x"),
        ({"batch_size": 0}, "batch_size=0 is not allowed"),
        ({"sentences": []}, "sentences is empty"),
        ({"sentences": [3]}, r"sentences\[0\] \(int\): an image is a path"),
    ],
    ids=str,
)
def test_what_is_not_allowed_says_why(server: Any, make_client: Any, arguments: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make_client(server.url).encode(**{"sentences": ["a"], "prompt_name": "query", **arguments})
    assert server.seen == []


def test_a_data_uri_is_an_image_or_an_error_and_never_a_text(server: Any, make_client: Any, picture: Path) -> None:
    server.play_ours()
    encoded = base64.b64encode(picture.read_bytes()).decode()
    client = make_client(server.url)
    expected = client.encode(picture)
    for head in ("data:image/png;base64", " DATA:;base64", "data: image/jpeg;charset=utf-8;base64"):
        np.testing.assert_array_equal(client.encode(f"{head},{encoded}"), expected)
    for broken in ("data:,hello", "data:image/png;base64,!!!", "data:text/plain;base64,aGVsbG8="):
        with pytest.raises(ImageError, match=r"^sentences\[0\] "):
            client.encode([broken], on_error="raise")
    np.testing.assert_array_equal(client.encode("Data: 12 March", "query"), server.vector("Query: Data: 12 March"))


def test_the_error_is_that_of_the_first_place_of_either_kind(server: Any, make_client: Any) -> None:
    client = make_client(server.url)
    with pytest.raises(ImageError, match=r"^sentences\[1\] "):
        client.encode(["a", b"no image", "", b"no image"])
    with pytest.raises(ArgumentError, match=r"^sentences\[1\] is empty"):
        client.encode(["a", "", b"no image"])
    assert server.seen == []


# --- both kinds of vectors ---


@pytest.mark.parametrize("wire_format", ["safetensors", "base64", "float"])
def test_one_pass_gives_both_kinds_of_vectors(server: Any, make_client: Any, picture: Path, wire_format: str) -> None:
    server.play_ours()
    items = ["a b", picture, "c", "d e f"]
    client = make_client(server.url, wire_format=wire_format)
    found = client.encode_both(items, "passage", batch_size=2, truncate_dim=128)
    assert {tuple(body["outputs"]) for body in server.bodies("/v1/embeddings")} == {("dense", "multivector")}
    n_requests = len(server.bodies("/v1/embeddings"))
    dense = client.encode(items, "passage", truncate_dim=128)
    multivectors = client.encode(items, "passage", return_multivector=True)
    assert n_requests == 3
    for both, vector, rows in zip(found, dense, multivectors, strict=True):
        np.testing.assert_array_equal(both.dense, vector)
        np.testing.assert_array_equal(both.multivector, rows)


def test_a_stock_server_gives_both_from_one_request_too(server: Any, make_client: Any, tmp_path: Path) -> None:
    server.play_stock()
    projector = tmp_path / "multi_vector_projector.safetensors"
    weight = np.random.default_rng(0).standard_normal((128, 256)).astype(np.float32)
    names = {"multi_vector_projector.weight": weight, "multi_vector_projector.bias": np.zeros(128, np.float32)}
    save_file(names, projector)
    client = make_client(server.url, projector=projector)
    (found,) = client.encode_both("a b c", "query")
    assert server.paths().count("/pooling") == 1
    np.testing.assert_array_equal(found.dense, client.encode_text("a b c"))
    np.testing.assert_array_equal(found.multivector, client.encode_text("a b c", return_multivector=True))
    with pytest.raises(ArgumentError, match="returns no multi-vectors by itself"):
        make_client(server.url).encode_both(["a"])


@pytest.mark.parametrize("missing", ["dense", "multivector"])
def test_a_reply_with_only_one_of_both_kinds_is_refused(server: Any, make_client: Any, missing: str) -> None:
    server.play_ours(change=lambda tensors: tensors.pop(missing))
    with pytest.raises(BadReplyError, match="where dense and multivector and offsets was asked for"):
        make_client(server.url, max_retries=0).encode_both(["a", "b"], "query")


# --- progress ---


def test_progress_is_told_batch_by_batch(server: Any, make_client: Any) -> None:
    server.play_ours()
    told: list[tuple[int, int]] = []
    client = make_client(server.url, max_concurrency=1)
    client.encode_text(["a"] * 10, batch_size=4, progress=lambda done, total: told.append((done, total)))
    assert told == [(4, 10), (8, 10), (10, 10)]
    told.clear()
    client.encode_text(["a", None, "b"], on_error="skip", progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (3, 3)]


def test_a_progress_bar_is_drawn_if_asked_for(
    server: Any, make_client: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    server.play_ours()
    make_client(server.url).encode(["a"] * 10, "query", show_progress_bar=True)
    assert "10/10" in capsys.readouterr().err


def test_only_the_progress_bar_needs_tqdm(server: Any, make_client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server.play_ours()
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    client = make_client(server.url)
    assert client.encode_text("a").shape == (256,)
    with pytest.raises(ArgumentError, match=r"needs tqdm: pip install 'jina-v4-client\[progress\]'"):
        client.encode_text("a", progress=True)
    with pytest.raises(ArgumentError, match="progress=3 is not allowed"):
        client.encode_text("a", progress=3)


# --- both clients ---


@pytest.mark.parametrize(
    "name",
    ["__init__", "encode_text", "encode_image", "encode", "encode_both", "encode_pdf", "revision", "to", "close"],
)
def test_both_clients_take_the_same_arguments(name: str) -> None:
    sync, awaited = (getattr(kind, name) for kind in (EmbeddingsClient, AsyncEmbeddingsClient))
    assert inspect.signature(sync) == inspect.signature(awaited)
    assert sync.__doc__ == awaited.__doc__
    assert inspect.iscoroutinefunction(awaited) is (name not in ("__init__", "to"))
    assert not inspect.iscoroutinefunction(sync)


def test_both_clients_offer_the_same_methods() -> None:
    sync, awaited = (
        {name.replace("__a", "__") for name in dir(kind) if name.startswith("__") or not name.startswith("_")}
        for kind in (EmbeddingsClient, AsyncEmbeddingsClient)
    )
    assert sync == awaited


@pytest.mark.parametrize(("old", "new"), [("Both", "DenseAndMulti"), ("Embedded", "PartialResult")])
def test_the_names_of_version_0_1_still_work_and_say_the_new_ones(old: str, new: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"{old} is now called {new}") as warned:
        assert getattr(jina_v4_client, old) is getattr(jina_v4_client, new)
    assert warned[0].filename == __file__
    with pytest.raises(AttributeError, match="no attribute 'Neither'"):
        _ = jina_v4_client.Neither


def test_all_that_is_exported_is_there() -> None:
    assert sorted(jina_v4_client.__all__, key=str.lower) == sorted(set(jina_v4_client.__all__), key=str.lower)
    for name in jina_v4_client.__all__:
        assert hasattr(jina_v4_client, name)
