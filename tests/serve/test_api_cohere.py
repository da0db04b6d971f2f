"""What a body of Cohere's form means, and what is refused in it. Real servers answer the same in end_to_end."""

import time
from typing import Any

import orjson
import pytest
from api_limits import limits
from jina_v4_serve.api.errors import ApiError
from jina_v4_serve.api.forms.cohere import CohereBody, settle
from jina_v4_serve.api.forms.errors import error_body
from jina_v4_serve.api.forms.schema import parse
from jina_v4_serve.api.request import EmbedRequest

QUERY = {"texts": ["x"], "input_type": "search_query"}


def asked(served: str = "retrieval", /, **fields: Any) -> EmbedRequest:
    return settle(parse(orjson.dumps(fields), CohereBody), limits(served))


@pytest.mark.parametrize(
    ("fields", "prefix"),
    [
        ({"input_type": "search_query"}, "Query: "),
        ({"input_type": "search_document"}, "Passage: "),
        ({"model": "jina-embeddings-v4-retrieval-passage"}, "Passage: "),
        ({"model": "jina-embeddings-v4-passage", "input_type": "search_document"}, "Passage: "),
        ({"task": "retrieval.passage"}, "Passage: "),
    ],
)
def test_each_input_type_has_its_prefix(fields: dict[str, Any], prefix: str) -> None:
    assert asked(texts=["x"], **fields).prefix == prefix


@pytest.mark.parametrize("kind", [None, "search_query", "search_document", "classification", "clustering"])
def test_text_matching_takes_every_input_type_of_texts(kind: str | None) -> None:
    assert asked("text-matching", texts=["x"], input_type=kind).prefix == "Query: "


def test_long_texts_are_cut_as_cohere_cuts_them() -> None:
    assert asked(**QUERY).max_length == 1000
    assert asked(**QUERY, truncate="END", max_tokens=7).max_length == 7
    assert asked(**QUERY, truncate="NONE").max_length is None


def test_a_long_list_of_wrong_texts_is_refused_at_its_first() -> None:
    began = time.process_time()
    with pytest.raises(ApiError, match=r"texts\[0\]=1 is not offered"):
        asked(texts=[1] * 1_000_000)
    assert time.process_time() - began < 1


def test_images_need_no_input_type() -> None:
    for kind in (None, "image", "search_document", "search_query"):
        found = asked(images=["y"], input_type=kind)
        assert [(item.image, item.path) for item in found.items] == [("y", "images[0]")]


def test_a_text_of_texts_is_a_text_whatever_it_begins_with() -> None:
    assert asked(texts=["data:image/png;base64,AAAA"], input_type="search_query").items[0].image is None


def test_unknown_fields_are_named() -> None:
    assert asked(**QUERY, odd=1).ignored == ["odd"]


def test_a_priority_is_kept() -> None:
    assert asked(**QUERY, priority=3).priority == 3
    assert asked(**QUERY).priority == 0


def test_an_error_is_cohere_shaped_on_its_route_only() -> None:
    error = ApiError(422, "why", code="X")
    assert orjson.loads(error_body(error, "some-id", "/v2/embed")) == {"id": "some-id", "message": "why"}
    assert orjson.loads(error_body(error, "some-id", "/v1/embeddings")).keys() == {"error", "detail", "errors"}
