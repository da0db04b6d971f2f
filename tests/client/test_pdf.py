"""encode_pdf against a played server: which requests it sends, and which replies it refuses."""

import base64
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jina_v4_client import (
    ArgumentError,
    BadReplyError,
    EmbeddingsClient,
    ServerRefusedError,
    ServerTimeoutError,
    WrongServerError,
)

FILES = {b"%PDF three": 3, b"%PDF one": 1, b"%PDF twenty": 20}
Tensors = dict[str, np.ndarray]


def play(server: Any, change: Callable[[Tensors], object] = lambda _: None) -> None:
    """Serve pages as our server does; `change` may spoil the tensors of embeddings."""
    server.play_ours()

    def embed(seen: Any) -> Any:
        (item,) = seen.body["input"]
        content = base64.b64decode(item["pdf"])
        numbers = [int(number) for number in item["pages"].split(",")]
        if content not in FILES:
            error = {"message": "input[0].pdf is no PDF file", "param": "input[0].pdf"}
            return server.json_answer({"error": error}, 422)
        n_pages = FILES[content]
        tensors = {
            "dense": np.stack([server.vector(f"{content!r} {number}") for number in numbers]),
            "items": np.zeros(len(numbers), np.int64),
            "pages": np.array(numbers),
            "n_pages": np.full(len(numbers), n_pages),
        }
        change(tensors)
        return server.with_revisions(server.tensors_answer(tensors), ["retrieval"])

    server.routes["/v1/embeddings"] = embed


def test_pages_come_by_file_and_number_in_requests_of_a_few(
    server: Any, make_client: Callable[..., Any], tmp_path: Path
) -> None:
    play(server)
    (tmp_path / "three.pdf").write_bytes(b"%PDF three")
    done: list[tuple[int, int]] = []
    client = make_client(server.url, max_concurrency=1)
    found = client.encode_pdf(
        [tmp_path / "three.pdf", b"%PDF one", bytearray(b"%PDF twenty")],
        batch_size=10,
        progress=lambda *at: done.append(at),
    )
    assert [list(file) for file in found] == [[1, 2, 3], [1], list(range(1, 21))]
    for content, file in zip(FILES, found, strict=True):
        for number, vector in file.items():
            np.testing.assert_array_equal(vector, server.vector(f"{content!r} {number}"))
    # The first pages say how many there are; no request is of two files.
    asked = [body["input"][0]["pages"] for body in server.bodies("/v1/embeddings")]
    assert asked == ["1", "1", "1", "2,3", "2,3,4,5,6,7,8,9,10,11", "12,13,14,15,16,17,18,19,20"]
    assert (done[2], done[-1]) == ((3, 3), (21, 21))


def test_chosen_pages_need_one_round(server: Any, make_client: Callable[..., Any]) -> None:
    play(server)
    found = make_client(server.url, max_concurrency=1).encode_pdf([b"%PDF twenty", b"%PDF three"], pages=[3, 1, 3])
    assert [list(file) for file in found] == [[1, 3], [1, 3]]
    assert [body["input"][0]["pages"] for body in server.bodies("/v1/embeddings")] == ["1,3", "1,3"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda t: t.pop("pages"), r"pages \[\] where others", id="no pages"),
        pytest.param(lambda t: t.pop("n_pages"), "where others", id="no count"),
        pytest.param(lambda t: t.update(pages=t["pages"] + 1), r"pages \[2\] where others", id="other pages"),
        pytest.param(lambda t: t.update(n_pages=t["n_pages"] * 0), "where others", id="a count below the page"),
        pytest.param(lambda t: t.update(dense=np.repeat(t["dense"], 2, axis=0)), "2 vectors to", id="more vectors"),
        pytest.param(lambda t: t.update(more=t["pages"]), "dense and more where dense was asked", id="more tensors"),
    ],
)
def test_a_reply_of_other_pages_is_refused(
    change: Callable[[Tensors], object], message: str, server: Any, client: EmbeddingsClient
) -> None:
    play(server, change)
    with pytest.raises(BadReplyError, match=message):
        client.encode_pdf(b"%PDF three")


def test_pages_of_different_widths_are_refused(server: Any, client: EmbeddingsClient) -> None:
    """The first page is asked for alone, and the others later."""

    def narrow(tensors: Tensors) -> None:
        if tensors["pages"][0] > 1:
            halves = tensors["dense"][:, ::2]
            tensors["dense"] = halves / np.linalg.norm(halves, axis=1, keepdims=True)

    play(server, narrow)
    with pytest.raises(BadReplyError, match=r"vectors of \[\d+, \d+\] dimensions"):
        client.encode_pdf(b"%PDF three")


def test_a_refusal_names_the_file(server: Any, client: EmbeddingsClient, tmp_path: Path) -> None:
    play(server)
    (tmp_path / "bad.pdf").write_bytes(b"text")
    with pytest.raises(ServerRefusedError, match=r"is no PDF file \('.*bad\.pdf'\)"):
        client.encode_pdf([b"%PDF one", str(tmp_path / "bad.pdf")])


def test_nothing_is_sent_of_files_that_cannot_be_read(server: Any, client: EmbeddingsClient) -> None:
    play(server)
    for files, options, message in (
        ([], {}, "files is empty"),
        ("nothing.pdf", {}, "'nothing.pdf' cannot be read"),
        ([b"%PDF one", 5], {}, "int cannot be read"),
        (b"%PDF one", {"pages": [0]}, "pages=0 is not allowed"),
        (b"%PDF one", {"pages": []}, "pages is empty"),
        (b"%PDF one", {"task": "other"}, "Invalid task"),
    ):
        with pytest.raises(ArgumentError, match=message):
            client.encode_pdf(files, **options)  # type: ignore[arg-type]
    assert server.seen == []


def test_all_pages_of_a_call_are_of_one_revision(server: Any, client: EmbeddingsClient) -> None:
    old, new = ({"retrieval": f"{digit * 16}-float32-602112"} for digit in "12")
    play(server)
    embed, server.revisions = server.routes["/v1/embeddings"], old

    def embed_and_replace(seen: Any) -> Any:
        answer = embed(seen)
        if server.revisions is old:  # the rest is sent once the first page has said how many there are
            server.revisions = new
            client.revision()  # another thread of the program, so the client knows of the new server
        return answer

    server.routes["/v1/embeddings"] = embed_and_replace
    with pytest.raises(WrongServerError, match="its model was replaced"):
        client.encode_pdf(b"%PDF three")


def test_the_time_limit_of_a_call_is_that_of_all_its_pages(server: Any, make_client: Callable[..., Any]) -> None:
    play(server, lambda _: time.sleep(0.7))
    with pytest.raises(ServerTimeoutError, match="the call did not end within total_timeout_s=1"):
        make_client(server.url, total_timeout_s=1).encode_pdf(b"%PDF three")


def test_a_stock_server_is_not_asked_for_pdf_pages(server: Any, client: EmbeddingsClient) -> None:
    server.play_stock()
    with pytest.raises(ArgumentError, match="is a stock vLLM, which takes no PDF files: send their pages as images"):
        client.encode_pdf(b"%PDF one")
    assert server.paths() == ["/v1/models"]
