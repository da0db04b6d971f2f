"""What a request means: every rule, and every contradiction by name. Real servers answer the same in end_to_end."""

import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest
from api_limits import limits
from bad_bodies import COHERE, EMBEDDINGS, PAIRS, RANKINGS, Bad
from jina_v4_serve.api.errors import ApiError, shorten
from jina_v4_serve.api.forms import cohere, rankings
from jina_v4_serve.api.forms.embeddings import settle
from jina_v4_serve.api.forms.errors import error_body
from jina_v4_serve.api.forms.foreign import FOREIGN, HARMLESS
from jina_v4_serve.api.forms.schema import EmbeddingsBody, parse
from jina_v4_serve.api.request import EmbedRequest
from wire import MAX_ITEMS, MAX_LENGTH


def asked(served: str = "retrieval", /, **fields: Any) -> EmbedRequest:
    return settle(parse(orjson.dumps({"input": "x", **fields}), EmbeddingsBody), limits(served))


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
        ({"model": "jina-embeddings-v4-none"}, ""),
        ({"model": "jina-embeddings-v4-retrieval-none", "task": "retrieval", "prompt_name": "none"}, ""),
        ({"model": "our-name-none"}, ""),
        ({"prompt_name": None, "task": None}, "Query: "),
        ({"prompt_name": "none"}, ""),
        ({"prompt_name": "none", "task": "retrieval", "model": "jina-embeddings-v4-retrieval"}, ""),
    ],
)
def test_each_task_and_prompt_has_its_prefix(fields: dict[str, Any], prefix: str) -> None:
    assert asked(**fields).prefix == prefix


def test_the_prompts_that_were_used_are_named() -> None:
    image = {"image": PNG}
    for fields, expected in (
        ({}, ["query"]),
        ({"prompt_name": "passage"}, ["passage"]),
        ({"model": "jina-embeddings-v4-none"}, ["none"]),
        ({"input": [image], "prompt_name": "passage"}, ["image"]),
        ({"input": [image, "x"], "task": "retrieval.passage"}, ["passage", "image"]),
    ):
        assert asked(**fields).prompts_used == expected
    assert asked("text-matching", prompt_name="passage").prompts_used == ["query"], "it has one prefix"


def test_texts_that_begin_with_their_prefix_are_named() -> None:
    texts = ["Query: x", {"text": "Query: y"}, "query: z", "Passage: x"]
    assert asked(input=texts).prefixed == ["input[0]", "input[1]"]
    assert asked(input=texts, prompt_name="passage").prefixed == ["input[3]"]
    assert asked(input=texts, prompt_name="none").prefixed == []
    assert asked(input=["x", "Query: y"], late_chunking=True).prefixed == [], "nothing is put before the second"
    assert asked(input=["Query: x"], late_chunking=True).prefixed == ["input[0]"]
    assert asked(input=texts).items[0].text == "Query: x", "it is embedded as it was sent"


@pytest.mark.parametrize("fields", [{}, {"prompt_name": "passage"}, {"model": "jina-embeddings-v4-passage"}])
def test_text_matching_knows_one_prefix(fields: dict[str, Any]) -> None:
    assert asked("text-matching", **fields).prefix == "Query: "
    assert asked("text-matching", prompt_name="none").prefix == ""


FORMS: dict[str, tuple[type[Any], Callable[..., object], dict[str, Bad]]] = {
    "/v1/embeddings": (EmbeddingsBody, settle, EMBEDDINGS),
    "/v2/embed": (cohere.CohereBody, cohere.settle, COHERE),
    "/v1/rerank": (rankings.RerankBody, rankings.settle_rerank, RANKINGS),
    "/v1/score": (rankings.ScoreBody, rankings.settle_score, PAIRS),
}


@pytest.mark.parametrize(
    ("path", "bad"),
    [pytest.param(path, bad, id=f"{path} {name}") for path, form in FORMS.items() for name, bad in form[2].items()],
)
def test_a_bad_body_is_refused_by_the_name_of_its_field(path: str, bad: Bad) -> None:
    kind, settle_it, _ = FORMS[path]
    served = replace(limits("retrieval"), max_length=MAX_LENGTH, max_items=MAX_ITEMS)
    with pytest.raises(ApiError) as caught:
        settle_it(parse(bad.content, kind), served)
    assert caught.value.status == bad.status
    assert bad.message in caught.value.message
    assert bad.param in (None, caught.value.param)


SAME = {
    "input": (("input", "content", "texts"), "x", "y"),
    "task": (("task", "task_type"), "retrieval.passage", "retrieval.query"),
    "dimensions": (("dimensions", "output_dimension", "output_dimensionality", "truncate_dim"), 100, 101),
    "truncate": (("truncate", "truncation"), True, False),
    "embedding_type": (("embedding_type", "encoding_format", "encoding_type", "embedding_types"), ["int8"], ["float"]),
    "one dtype": (("embedding_type", "output_dtype"), "int8", "float"),
}


@pytest.mark.parametrize(("names", "value", "other"), SAME.values(), ids=SAME.keys())
def test_the_names_of_one_field_mean_the_same_and_may_not_contradict(
    names: tuple[str, ...], value: Any, other: Any
) -> None:
    def read(**fields: Any) -> EmbedRequest:
        body = fields if "texts" in names else {"input": "x", **fields}
        return settle(parse(orjson.dumps(body), EmbeddingsBody), limits("retrieval"))

    plain = read(**{names[0]: value})
    assert plain != asked() or value == "x"
    for name in names:
        found = read(**{name: value})
        assert replace(found, items=()) == replace(plain, items=())
        assert [(item.text, item.image) for item in found.items] == [("x", None)]
    assert replace(read(**dict.fromkeys(names, value)), items=()) == replace(plain, items=())
    for name in names[1:]:
        with pytest.raises(ApiError, match="contradicts") as caught:
            read(**{names[0]: value, name: other})
        assert (caught.value.status, caught.value.param) == (422, name)


def test_base64_is_a_way_to_write_floats() -> None:
    assert asked(output_dtype="float", encoding_format="base64").encodings == ["base64"]
    # Voyage's client asks for base64 by itself, and takes a list where numbers are whole.
    assert asked(output_dtype="int8", encoding_format="base64").encodings == ["int8"]


PNG = "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAEklEQVR4nGNgGAWjYBSMAggAAAQIAAF/TXiOAAAAAElFTkSuQmCC"


@pytest.mark.parametrize(
    "source",
    [
        f"data:image/png;base64,{PNG}",
        f"data:image/jpeg;charset=utf-8;base64,{PNG}",
        f"data:;base64,{PNG}",
        f"data:image/*;base64,{PNG}",
        f"  data:image/png;base64,{PNG}",
        f"\n\ufeffDATA:IMAGE/PNG;BASE64,{PNG}",
        f"data: image/png;base64,{PNG}",
        f"data:\n;base64,{PNG}",
        "data:,x",
        "data:text/plain,hello",
        "data:image/svg+xml;utf8,<svg/>",
        "data:nothing",
        PNG,
        f"\n{PNG}\n",
        "/9j/" + "4AAQSkZJRgABAQAAAQABAAD" * 4,
        "_9j_" + "4AAQSkZJRgABAQAAAQABAAD" * 4,
        "R0lGODlh" + "AQABAIAAAAAAAP" * 4,
        "UklGRh4AAABXRUJQ" + "VlA4TBEAAAAvAAAA" * 4,
    ],
)
def test_a_bare_string_that_is_meant_as_an_image_is_one(source: str) -> None:
    assert asked(input=source).items[0].image == source
    assert asked(input=["x", source]).items[1].image == source
    assert asked(input={"text": source}).items[0].text == source, "what is declared is not guessed"
    assert asked(input=source, modality="text").items[0].text == source


@pytest.mark.parametrize(
    "text",
    [
        "Data: 12 March 2024",
        "data: we found that, in all, 12 of 20 did",
        "data:",
        "metadata:image/png;base64,AAAA",
        "See data:image/png;base64,AAAA",
        "https://example.com/cat.png",
        "/9j/ is how a JPEG file begins in base64, and iVBORw0KGgo is how a PNG file does: both are in many logs.",
        "iVBORw0KGgo",
        "x" * 500,
    ],
)
def test_a_bare_string_that_is_a_text_stays_one(text: str) -> None:
    assert asked(input=text).items[0].text == text
    assert asked(input=text, modality="image").items[0].image == text


@pytest.mark.parametrize("name", list(FOREIGN))
def test_a_field_that_changes_vectors_elsewhere_is_refused_unless_it_asks_for_what_is_done(name: str) -> None:
    with pytest.raises(ApiError) as caught:
        asked(**{name: "something else"})
    assert (caught.value.status, caught.value.param) == (422, name)
    assert caught.value.message == f"{name}=something else is not offered here: {FOREIGN[name].advice}"
    usual = asked()
    for value in (None, *FOREIGN[name].same):
        assert asked(**{name: value}) == usual


def test_vllms_name_of_max_length_is_taken() -> None:
    assert asked(truncate_prompt_tokens=7).max_length == 7
    assert asked(truncate_prompt_tokens=-1).max_length == 1000
    assert asked(truncate_prompt_tokens=7, max_length=7).max_length == 7
    assert asked(truncate_prompt_tokens=None, truncate=True).max_length == 1000


def test_nvidias_words_for_truncate_are_taken() -> None:
    assert asked(truncate="END") == asked(truncate=True)
    assert asked(truncate="NONE") == asked(truncate=False)


def test_a_priority_is_kept_and_is_the_first_where_there_is_none() -> None:
    assert [asked(**fields).priority for fields in ({}, {"priority": None}, {"priority": 999})] == [0, 0, 999]


def test_harmless_fields_are_passed_over_and_unknown_ones_are_named() -> None:
    assert asked(**dict.fromkeys(HARMLESS, "x")) == asked()
    assert asked(user="me", odd=1, odder=[1, {}], oddest=None).ignored == ["odd", "odder"]


@pytest.mark.parametrize(
    "item",
    [
        {"text": "x", "image_url": "https://example.com/x.png"},
        {"text": "x", "title": "y"},
        {"image": PNG, "instruction": "y"},
        {"text": "x", "y\u0000" * 99: 1},
    ],
    ids=["image_url", "title", "instruction", "nonsense"],
)
def test_an_item_with_more_than_its_content_is_refused(item: dict[str, Any]) -> None:
    with pytest.raises(
        ApiError, match=r"input\[1\] has .* which is not offered; an item has only text or image"
    ) as caught:
        asked(input=["x", item])
    assert len(caught.value.message) < 200


def test_an_item_may_have_what_cannot_matter() -> None:
    found = asked(input=[{"type": "text", "text": "x", "image": None, "id": 7, "index": 0, "metadata": {"a": 1}}])
    assert found.items == asked(input=["x"]).items


def test_every_field_of_other_servers_is_in_the_document() -> None:
    document = (Path(__file__).parents[2] / "docs" / "serve.md").read_text()
    section = document.partition("### Fields of other servers")[2].partition("\n## ")[0]
    listed = set(re.findall(r"`([a-z_]+)`", section))
    assert FOREIGN.keys() | HARMLESS <= listed
    assert not FOREIGN.keys() & HARMLESS
    assert not (FOREIGN.keys() | HARMLESS) & EmbeddingsBody.model_fields.keys()


HALF = ["\\ud83d", "\\ude00", "\\ude00\\ud83d", "a\\ud83d\\u0041", "\\\\\\ud83d"]


@pytest.mark.parametrize("half", HALF)
@pytest.mark.parametrize(
    ("body", "param"),
    [
        ('{"input": "HALF"}', "input"),
        ('{"input": ["x", "y", "z", "HALF", "HALF"]}', "input[3]"),
        ('{"input": ["x", {"text": "HALF"}]}', "input[1].text"),
        ('{"input": {"image": "HALF"}}', "input.image"),
        ('{"input": "x", "task": "HALF"}', "task"),
        ('{"input": "x", "y": [{"z": "HALF"}]}', "y[0].z"),
        ('{"input": "x", "HALF": 1}', None),
        ('{"input": ["\\ud83d\\ude00", "\\\\ud83d", "HALF"]}', "input[2]"),
    ],
)
def test_half_a_character_names_its_item(body: str, param: str | None, half: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse(body.replace("HALF", half).encode(), EmbeddingsBody)
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, "INVALID_JSON", param)
    assert f"{param or 'a name'} is not Unicode" in caught.value.message
    orjson.loads(error_body(caught.value, "some-id"))


@pytest.mark.parametrize("content", [b"\xff", b"\xed\xa0\xbd", "é".encode("latin-1")], ids=["ff", "CESU-8", "Latin-1"])
def test_bytes_that_are_not_utf_8_name_their_item(content: bytes) -> None:
    with pytest.raises(ApiError, match=r"input\[1\] is not Unicode"):
        parse(b'{"input": ["x", "' + content + b'"]}', EmbeddingsBody)


def test_of_two_equal_names_the_last_counts_and_nul_is_a_character() -> None:
    found = settle(
        parse(b'{"input": "x", "task": "code", "input": "a\\u0000b", "task": "retrieval"}', EmbeddingsBody),
        limits("retrieval"),
    )
    assert found.items[0].text == "a\0b"


def test_without_a_prefix_a_later_part_of_a_text_may_be_empty() -> None:
    fields = {"prompt_name": "none", "late_chunking": True}
    assert len(asked(input=["x", ""], **fields).items) == 2
    with pytest.raises(ApiError, match=r"input\[0\] is empty"):
        asked(input=["", "x"], **fields)


def test_fields_of_a_request_are_read_into_their_settings() -> None:
    found = asked(
        input=["a", {"image": "b"}], dimensions=128, encoding_format="base64", outputs=["multivector", "dense"]
    )
    assert [(item.text, item.image) for item in found.items] == [("a", None), (None, "b")]
    assert (found.dimensions, found.encodings, found.outputs) == (128, ["base64"], {"dense", "multivector"})
    assert found.max_length is None
    assert asked(truncate=True).max_length == 1000
    assert asked(truncate=True, max_length=7).max_length == 7
    assert asked(embedding_type=["float", "binary", "float"]).encodings == ["float", "binary"]


HOSTILE = {
    "white space in pages": b'{"input": [{"pdf": "x", "pages": "1' + b" " * 19_000 + b'1"}]}',
    "white space behind a dash": b'{"input": [{"pdf": "x", "pages": "1-' + b" " * 19_000 + b'x"}]}',
    "long pages": b'{"input": [{"pdf": "x", "pages": "' + b"1," * 10_000_000 + b'1"}]}',
    "a list as text": b'{"input": {"text": [' + b'"x",' * 1_000_000 + b'"x"]}}',
    "an object as text": b'{"input": {"text": {"x": [' + b'"x",' * 1_000_000 + b'"x"]}}}',
    "wrong outputs": b'{"input": "x", "outputs": [' + b"1," * 1_000_000 + b"1]}",
    "wrong encodings": b'{"input": "x", "embedding_types": [' + b"1," * 1_000_000 + b"1]}",
}


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE)
def test_to_refuse_a_body_takes_no_longer_than_to_read_it(body: bytes) -> None:
    began = time.process_time()
    orjson.loads(body)
    reading_s = time.process_time() - began
    began = time.process_time()
    with pytest.raises(ApiError) as caught:
        settle(parse(body, EmbeddingsBody), limits("retrieval"))
    answered = error_body(caught.value, "some-id")
    assert caught.value.status == 422
    assert len(answered) < 2000
    assert time.process_time() - began < 0.2 + 10 * reading_s


def test_pages_are_read_with_white_space_between_them() -> None:
    (item,) = asked(input={"pdf": "x", "pages": " 1 - 4 ,\t9, 12 - "}).items
    assert item.pages == ((1, 4), (9, 9), (12, None))
    with pytest.raises(ApiError, match="pages has 20001 characters; at most 20000 are read"):
        asked(input={"pdf": "x", "pages": "1" + " " * 20_000})


def test_a_value_in_a_message_looks_as_in_python() -> None:
    for value in ({}, [], [[]], {"a": 1, "b": [1, "x", None, True, {"c": 1.5}]}, 5, None, ["x", "y"]):
        assert shorten(value) == repr(value)
    assert shorten(["y" * 100]) == "['" + "y" * 75 + "..."


def test_an_error_can_be_read_by_clients_of_both_kinds() -> None:
    with pytest.raises(ApiError) as caught:
        asked(dimensions=300)
    body = orjson.loads(error_body(caught.value, "some-id"))
    message = "dimensions=300 is not offered; choose 1 to 256"
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
    found = settle(
        parse(orjson.dumps({"input": "x", **fields}), EmbeddingsBody), limits("retrieval", "text-matching", "code")
    )
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
        settle(
            parse(orjson.dumps({"input": "x", **fields}), EmbeddingsBody), limits("retrieval", "text-matching", "code")
        )
    assert caught.value.status in (404, 422)


DATA_URI = "data:image/png;base64,iVBORw0KGgo="


@pytest.mark.parametrize(
    "fields",
    [
        {"input": {"content": DATA_URI}},
        {"input": [{"content": [DATA_URI]}]},
        {"input": None, "content": DATA_URI},
        {"input": None, "messages": [{"role": "user", "content": DATA_URI}]},
    ],
    ids=["content", "a list of one", "the field content", "a message"],
)
def test_a_string_that_begins_like_an_image_is_one_everywhere(fields: dict[str, Any]) -> None:
    (item,) = asked(**fields).items
    assert (item.image, item.text) == (DATA_URI, None)


URL = "https://example.org/x.png"


@pytest.mark.parametrize("content", [URL, [URL]], ids=["a string", "a list of one"])
def test_modality_counts_for_the_strings_of_a_content_too(content: object) -> None:
    (item,) = asked(input={"content": content}, modality="image").items
    assert (item.image, item.text) == (URL, None)


@pytest.mark.parametrize("kind", ["image", "image_url", "input_image"])
@pytest.mark.parametrize("content", [URL, [URL]], ids=["a string", "a list of one"])
def test_a_type_says_what_a_content_is(kind: str, content: object) -> None:
    (item,) = asked(input=[{"type": kind, "content": content}], modality="text").items
    assert (item.image, item.text) == (URL, None)
    (item,) = asked(input=[{"type": "text", "content": DATA_URI}]).items
    assert (item.image, item.text) == (None, DATA_URI)


@pytest.mark.parametrize(
    ("item", "held"),
    [
        ({"type": "image", "text": URL}, "text"),
        ({"type": "image_url", "text": URL}, "text"),
        ({"type": "input_image", "text": URL}, "text"),
        ({"type": "image", "content": [{"type": "text", "text": URL}]}, "text"),
        ({"type": "pdf", "text": URL}, "text"),
        ({"type": "pdf", "content": URL}, "text"),
        ({"type": "video_url", "content": URL}, "text"),
        ({"type": "audio", "text": URL}, "text"),
        ({"type": "text", "image": URL}, "image"),
        ({"type": "text", "pdf": URL}, "pdf"),
        ({"type": "image", "pdf": URL}, "pdf"),
        ({"type": "pdf", "image": URL}, "image"),
    ],
    ids=str,
)
def test_a_type_that_contradicts_its_item_is_refused(item: dict[str, Any], held: str) -> None:
    with pytest.raises(ApiError) as caught:
        asked(input=["x", item])
    assert (caught.value.status, caught.value.param) == (422, "input[1].type")
    assert f"type={item['type']} contradicts its content, which is read as {held};" in caught.value.message


def test_a_type_that_agrees_or_is_a_programs_own_changes_nothing() -> None:
    for item in ({"type": "text", "text": "x"}, {"type": "Title", "text": "x"}, {"type": ["a"], "content": "x"}):
        assert asked(input=[item]).items[0].text == "x"
    assert asked(input=[{"type": "image", "image": URL}]).items[0].image == URL
    assert asked(input=[{"type": "pdf", "pdf": URL, "pages": "1"}]).items[0].pdf == URL


def test_only_an_empty_text_is_an_empty_answer() -> None:
    image = {"type": "image_url", "image_url": {"url": "https://example.org/y.png"}}
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": [image]}]
    with pytest.raises(ApiError, match=r"messages\[1\].role=assistant is not offered"):
        asked(input=None, messages=chat)
    assert asked(input=None, messages=[chat[0], {"role": "assistant", "content": [{"type": "text", "text": ""}]}])


def test_late_chunking_counts_its_texts_whole() -> None:
    assert asked(input=["x", "y"], late_chunking=True, truncate=True).max_length is None
