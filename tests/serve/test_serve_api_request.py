"""What a request means: every rule, and every contradiction by name. Real servers answer the same in end_to_end."""

from typing import Any

import orjson
import pytest
from jina_v4_serve.api.errors import ApiError
from jina_v4_serve.api.request import Asked, Limits, settle
from jina_v4_serve.api.schema import parse


def limits(*tasks: str) -> Limits:
    return Limits(
        tasks=tasks,
        model_names=frozenset({"our-name"}),
        max_length=1000,
        max_pixels=602_112,
        dimensions=(128, 256),
        max_items=4,
    )


def asked(served: str = "retrieval", /, **fields: Any) -> Asked:
    return settle(parse(orjson.dumps({"input": "x", **fields})), limits(served))


@pytest.mark.parametrize(
    ("fields", "prefix"),
    [
        ({}, "Query: "),
        ({"prompt_name": "passage"}, "Passage: "),
        ({"input_type": "document"}, "Passage: "),
        ({"input_type": "search_query"}, "Query: "),
        ({"task": "retrieval.passage"}, "Passage: "),
        ({"task": "retrieval"}, "Query: "),
        ({"model": "jina-embeddings-v4-passage"}, "Passage: "),
        ({"model": "jina-embeddings-v4-retrieval-passage"}, "Passage: "),
        ({"model": "jinaai/jina-embeddings-v4"}, "Query: "),
        ({"model": "our-name"}, "Query: "),
        ({"model": "our-name-passage"}, "Passage: "),
        ({"model": "jina-embeddings-v4-passage", "task": "retrieval.passage", "prompt_name": "passage"}, "Passage: "),
        ({"prompt_name": None, "task": None}, "Query: "),
        ({"prompt_name": "none"}, ""),
        ({"prompt_name": "none", "task": "retrieval", "model": "jina-embeddings-v4-retrieval"}, ""),
    ],
)
def test_the_prefix(fields: dict[str, Any], prefix: str) -> None:
    assert asked(**fields).prefix == prefix


@pytest.mark.parametrize("fields", [{}, {"prompt_name": "passage"}, {"model": "jina-embeddings-v4-passage"}])
def test_text_matching_knows_one_prefix(fields: dict[str, Any]) -> None:
    assert asked("text-matching", **fields).prefix == "Query: "
    assert asked("text-matching", prompt_name="none").prefix == ""


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"prompt_name": "query", "task": "retrieval.passage"}, "prompt_name", "contradicts itself"),
        ({"prompt_name": "none", "task": "retrieval.query"}, "prompt_name", "contradicts itself"),
        ({"prompt_name": "none", "input": ""}, "input", "is empty, and with prompt_name=none nothing stands before"),
        ({"prompt_name": "none", "input": ["x", {"text": ""}]}, "input[1]", "is empty, and with prompt_name=none"),
        ({"task": "retrieval.none"}, "task", "is not offered"),
        ({"task": "code.query"}, "task", "is for the code server"),
        ({"task": "text-matching"}, "task", "is for the text-matching server"),
        ({"task": "text-matching.query"}, "task", "is not offered"),
        ({"task": "retrieval.other"}, "task", "is not offered"),
        ({"model": "jina-embeddings-v4-code-query"}, "model", "is for the code server"),
        ({"embedding_type": "float", "encoding_format": "base64"}, "encoding_format", "contradicts embedding_type"),
        ({"embedding_type": []}, "embedding_type", "is empty"),
        ({"outputs": []}, "outputs", "is empty"),
        ({"outputs": ["dense"], "return_multivector": True}, "return_multivector", "contradicts outputs"),
        ({"return_multivector": True, "dimensions": 128}, "dimensions", "is for dense vectors"),
        ({"dimensions": 512}, "dimensions", "dimensions=512 is not offered; choose 128, 256"),
        ({"late_chunking": True, "return_multivector": True}, "late_chunking", "dense vectors only"),
        ({"late_chunking": True, "input": [{"image": "x"}]}, "late_chunking", "for texts"),
        ({"max_length": 1001}, "max_length", "choose 1 to 1000"),
        ({"max_pixels": 602_113}, "max_pixels", "choose 3136 to 602112"),
        ({"input": ["x"] * 5}, "input", "at most 4"),
        ({"input": [[1, 2]]}, "input[0]", "token ids"),
        ({"input": ["x", {"text": 1}]}, "input[1].text", "must be a string"),
        ({"input": ["x", {"text": "a", "image": "b"}]}, "input[1]", "exactly one"),
        ({"input": ["x", {"pdf": "a"}]}, "input[1]", "send its pages as images"),
    ],
)
def test_a_contradiction_is_named(fields: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(ApiError) as caught:
        asked(**fields)
    assert (caught.value.status, caught.value.param) == (422, param)
    assert message in caught.value.message


def test_without_a_prefix_a_later_part_of_a_text_may_be_empty() -> None:
    fields = {"prompt_name": "none", "late_chunking": True}
    assert len(asked(input=["x", ""], **fields).items) == 2
    with pytest.raises(ApiError, match=r"input\[0\] is empty"):
        asked(input=["", "x"], **fields)


def test_an_unknown_model_is_not_found() -> None:
    with pytest.raises(ApiError, match=r"there is no model gpt here; this server has jina-embeddings-v4,") as caught:
        asked(model="gpt")
    assert caught.value.status == 404
    with pytest.raises(ApiError, match="there is no model"):
        asked(model="jina-embeddings-v4-none")


def test_the_rest_of_a_request() -> None:
    found = asked(
        input=["a", {"image": "b"}], dimensions=128, encoding_format="base64", outputs=["multivector", "dense"]
    )
    assert [(item.text, item.image) for item in found.items] == [("a", None), (None, "b")]
    assert (found.dimensions, found.encodings, found.outputs) == (128, ["base64"], {"dense", "multivector"})
    assert (found.keyed, found.single, found.max_length) == (False, False, None)
    assert asked(truncate=True).max_length == 1000
    assert asked(truncate=True, max_length=7).max_length == 7
    assert asked(embedding_type=["float", "binary", "float"]).encodings == ["float", "binary"]


def test_an_error_can_be_read_by_clients_of_both_kinds() -> None:
    with pytest.raises(ApiError) as caught:
        asked(dimensions=300)
    body = orjson.loads(caught.value.body("some-id"))
    message = "dimensions=300 is not offered; choose 128, 256"
    assert body == {
        "error": {
            "message": message,
            "type": "invalid_request_error",
            "param": "dimensions",
            "code": "VALIDATION_ERROR",
        },
        "detail": {"message": message, "request_id": "some-id", "code": "VALIDATION_ERROR"},
        "errors": [{"field": "body -> dimensions", "message": message, "type": "VALIDATION_ERROR", "input": "300"}],
    }


@pytest.mark.parametrize(
    ("fields", "task", "prefix"),
    [
        ({"task": "code"}, "code", "Query: "),
        ({"task": "code.passage"}, "code", "Passage: "),
        ({"model": "jina-embeddings-v4-retrieval-passage"}, "retrieval", "Passage: "),
        ({"model": "our-name", "task": "retrieval"}, "retrieval", "Query: "),
        ({"task": "text-matching", "prompt_name": "passage"}, "text-matching", "Query: "),
    ],
    ids=str,
)
def test_of_several_tasks_the_request_says_which(fields: dict[str, str], task: str, prefix: str) -> None:
    found = settle(parse(orjson.dumps({"input": "x", **fields})), limits("retrieval", "text-matching", "code"))
    assert (found.task, found.prefix) == (task, prefix)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"model": "jina-embeddings-v4"},
        {"task": "clustering"},
        {"task": "code.nothing"},
        {"task": "code", "model": "jina-embeddings-v4-retrieval"},
        {"model": "our-name"},
    ],
    ids=str,
)
def test_of_several_tasks_none_is_guessed(fields: dict[str, str]) -> None:
    with pytest.raises(ApiError) as caught:
        settle(parse(orjson.dumps({"input": "x", **fields})), limits("retrieval", "text-matching", "code"))
    assert caught.value.status in (404, 422)
