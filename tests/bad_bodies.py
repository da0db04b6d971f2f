"""Bodies that a server refuses as soon as it has read them: the status and the message of each, by form.

serve/test_api_request.py reads them without a server, end_to_end/one_server/test_bad_inputs.py sends them to one.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from wire import IMAGES_BASE64, MAX_ITEMS, MAX_LENGTH

SITE = "http://site"  # stands for the address of a site of the test


@dataclass(frozen=True)
class Bad:
    """A bad request and what the server says to it; `body` is JSON, or the bytes themselves."""

    status: int
    message: str
    body: Any = None
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def content(self) -> bytes:
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()


NOT_JSON = "the body is not JSON"
JSON = {
    "an empty body": Bad(400, NOT_JSON, b""),
    "white space": Bad(400, NOT_JSON, b" \n"),
    "an open brace": Bad(400, NOT_JSON, b"{"),
    "an unfinished string": Bad(400, NOT_JSON, b'{"input": "x'),
    "an unfinished body": Bad(400, NOT_JSON, b'{"input": ["a", "b"'),
    "a trailing comma": Bad(400, NOT_JSON, b'{"input": "x",}'),
    "single quotes": Bad(400, NOT_JSON, b"{'input': 'x'}"),
    "no quotes": Bad(400, NOT_JSON, b"{input: 1}"),
    "a comment": Bad(400, NOT_JSON, b'{"input": "x" /* why */}'),
    "something after the end": Bad(400, NOT_JSON, b'{"input": "x"} x'),
    "two bodies": Bad(400, NOT_JSON, b'{"input": "x"}{"input": "x"}'),
    "form data": Bad(400, NOT_JSON, b"input=x"),
    "a raw control character": Bad(400, NOT_JSON, b'{"input": "\x00"}'),
    "an unknown escape": Bad(400, NOT_JSON, b'{"input": "\\x41"}'),
    "half an escape": Bad(400, NOT_JSON, b'{"input": "\\u00"}'),
    "a lone high surrogate": Bad(400, NOT_JSON, b'{"input": "a\\ud800b"}'),
    "a lone low surrogate": Bad(400, NOT_JSON, b'{"input": "a\\udc00b"}'),
    "surrogates the wrong way round": Bad(400, NOT_JSON, b'{"input": "\\udc00\\ud800"}'),
    "a surrogate in a name": Bad(400, NOT_JSON, b'{"input": "x", "\\ud800": 1}'),
    "half an emoji among texts": Bad(400, NOT_JSON, b'{"input": ["x", "y", "z", "a\\ud83d"]}', "input[3]"),
    "half an emoji in an item": Bad(400, NOT_JSON, b'{"input": ["x", {"text": "\\ude00"}]}', "input[1].text"),
    "half an emoji as UTF-8": Bad(400, NOT_JSON, b'{"input": ["x", "\xed\xa0\xbd"]}', "input[1]"),
    "a number of 5,000 digits": Bad(400, NOT_JSON, b'{"input": "x", "dimensions": ' + b"9" * 5000 + b"}"),
    "an input of 5,000 digits": Bad(400, NOT_JSON, b'{"input": ' + b"9" * 5000 + b"}"),
    "half an emoji before deep lists": Bad(
        400, NOT_JSON, b'{"input": "\\ud83d", "y": ' + b"[" * 3000 + b"]" * 3000 + b"}"
    ),
    "half an emoji in an unfinished body": Bad(400, NOT_JSON, b'{"input": ["\\ud83d"'),
    "a surrogate as UTF-8": Bad(400, NOT_JSON, b'{"input": "\xed\xa0\x80"}'),
    "no UTF-8": Bad(400, NOT_JSON, b'{"input": "\xff"}'),
    "overlong UTF-8": Bad(400, NOT_JSON, b'{"input": "\xc0\xaf"}'),
    "Latin-1": Bad(400, NOT_JSON, '{"input": "é"}'.encode("latin-1")),
    "UTF-16": Bad(400, NOT_JSON, '{"input": "x"}'.encode("utf-16")),
    "a byte order mark": Bad(400, NOT_JSON, b'\xef\xbb\xbf{"input": "x"}'),
    "deep lists": Bad(400, NOT_JSON, b"[" * 100_000),
    "deep objects": Bad(400, NOT_JSON, b'{"input":' * 100_000),
    "deep lists in a field": Bad(400, NOT_JSON, b'{"input": ' + b"[" * 5000 + b"]" * 5000 + b"}"),
    "deep lists in an unknown field": Bad(400, NOT_JSON, b'{"input": "x", "y": ' + b"[" * 5000 + b"]" * 5000 + b"}"),
    "a list": Bad(400, "the body is JSON, but not an object", ["x"]),
    "a string": Bad(400, "the body is JSON, but not an object", "x"),
    "a number": Bad(400, "the body is JSON, but not an object", 5),
    "null": Bad(400, "the body is JSON, but not an object", b"null"),
    "NaN": Bad(400, "the body is JSON, but not an object", b"NaN"),
}

TYPES = {
    **{
        f"{name} {json.dumps(value)}": Bad(422, f"{name}={shown} is not offered", {"input": "x", name: value}, name)
        for name, value, shown in (
            ("model", 5, "5"),
            ("model", ["jina-embeddings-v4"], "['jina-embeddings-v4']"),
            ("task", 5, "5"),
            ("task", {}, "{}"),
            ("task", "", ""),
            ("task", "classification", "classification"),
            ("task", "retrieval.document", "retrieval.document"),
            ("task", "text-matching.query", "text-matching.query"),
            ("task", "RETRIEVAL", "RETRIEVAL"),
            ("prompt_name", "document", "document"),
            ("prompt_name", "Query", "Query"),
            ("prompt_name", True, "True"),
            ("input_type", "image", "image"),
            ("input_type", 0, "0"),
            ("dimensions", "128", "128"),
            ("dimensions", 128.0, "128.0"),
            ("dimensions", 128.5, "128.5"),
            ("dimensions", True, "True"),
            ("dimensions", [128], "[128]"),
            ("return_multivector", "yes", "yes"),
            ("return_multivector", 1, "1"),
            ("pool_factor", 0, "0"),
            ("pool_factor", "2", "2"),
            ("pool_factor", 1.5, "1.5"),
            ("pool_factor", True, "True"),
            ("late_chunking", "true", "true"),
            ("late_chunking", 0, "0"),
            ("truncate", "START", "START"),
            ("truncate", 1, "1"),
            ("max_length", 0, "0"),
            ("max_length", -1, "-1"),
            ("max_length", "16", "16"),
            ("max_length", True, "True"),
            ("max_length", 16.5, "16.5"),
            ("max_pixels", 3135, "3135"),
            ("max_pixels", -(2**70), str(-(2**70))),
            ("max_pixels", "602112", "602112"),
            ("outputs", "dense", "dense"),
            ("outputs", {"dense": True}, "{'dense': True}"),
            ("embedding_type", 5, "5"),
            ("embedding_type", {"float": True}, "{'float': True}"),
        )
    },
    **{
        f"{name} {value}": Bad(422, "is not offered", {"input": "x", name: value}, f"{name}[{at}]")
        for name, value, at in (
            ("embedding_type", "int4", 0),
            ("embedding_type", ["float", "int4"], 1),
            ("embedding_type", [None], 0),
            ("encoding_format", "hex", 0),
            ("encoding_format", ["FLOAT"], 0),
            ("outputs", ["sparse"], 0),
            ("outputs", ["dense", 1], 1),
        )
    },
    **{
        f"dimensions {value}": Bad(
            422,
            f"dimensions={value} is not offered; choose 1 to 256",
            {"input": "x", "dimensions": value},
            "dimensions",
        )
        for value in (-128, -1, 0, 257, 300, 2048, 10**30)
    },
    "dimensions NaN": Bad(422, "dimensions=nan is not offered", b'{"input": "x", "dimensions": NaN}', "dimensions"),
    "dimensions 1e400": Bad(422, "dimensions=inf is not offered", b'{"input": "x", "dimensions": 1e400}', "dimensions"),
    "max_length over the limit": Bad(
        422, f"choose 1 to {MAX_LENGTH}", {"input": "x", "max_length": MAX_LENGTH + 1}, "max_length"
    ),
    "max_length 2^63": Bad(422, f"choose 1 to {MAX_LENGTH}", {"input": "x", "max_length": 2**63}, "max_length"),
    "max_pixels over the limit": Bad(422, "choose 3136 to 602112", {"input": "x", "max_pixels": 602_113}, "max_pixels"),
    "no encoding": Bad(422, "embedding_type is empty", {"input": "x", "embedding_type": []}, "embedding_type"),
    "no output": Bad(422, "outputs is empty", {"input": "x", "outputs": []}, "outputs"),
    "a huge value is shortened": Bad(422, "...", {"input": "x", "task": "y" * 100_000}, "task"),
    "a value with control characters": Bad(422, "task=?[31m? is not", {"input": "x", "task": "\x1b[31m\n"}, "task"),
}

TOKENS = "has token ids: they are another tokenizer's"
ITEM = 'is a text, {"text": ...}, {"image": ...} or {"pdf": ...}'
EITHER = "send exactly one of text, image and pdf"
INPUTS = {
    "no input": Bad(422, "input is required", {"model": "jina-embeddings-v4"}, "input"),
    "input null": Bad(422, "input is required", {"input": None}, "input"),
    "input a number": Bad(422, "input is a text, an item or a list", {"input": 5}, "input"),
    "input true": Bad(422, "input is a text, an item or a list", {"input": True}, "input"),
    "no items": Bad(422, "input is empty", {"input": []}, "input"),
    "an empty item": Bad(422, EITHER, {"input": {}}, "input"),
    "an item of nulls": Bad(422, EITHER, {"input": ["x", {"text": None, "image": None}]}, "input[1]"),
    "an item of other fields": Bad(422, EITHER, {"input": ["x", {"contents": "y"}]}, "input[1]"),
    "an item that is null": Bad(422, ITEM, {"input": ["x", None]}, "input[1]"),
    "an item that is a float": Bad(422, ITEM, {"input": ["x", 1.5]}, "input[1]"),
    "an item that is a list of texts": Bad(422, ITEM, {"input": ["x", ["y"]]}, "input[1]"),
    "token ids": Bad(422, TOKENS, {"input": [1, 2, 3]}, "input[0]"),
    "lists of token ids": Bad(422, TOKENS, {"input": [[1, 2], [3]]}, "input[0]"),
    "an item that is true": Bad(422, ITEM, {"input": [True]}, "input[0]"),
    "an item that is an empty list": Bad(422, ITEM, {"input": [[]]}, "input[0]"),
    "negative token ids": Bad(422, TOKENS, {"input": ["x", [-1]]}, "input[1]"),
    "a text that is a number": Bad(422, "input.text must be a string", {"input": {"text": 5}}, "input.text"),
    "a text that is a list": Bad(422, "must be a string", {"input": ["x", {"text": ["y"]}]}, "input[1].text"),
    "an image that is a number": Bad(422, "must be a string", {"input": [{"image": 5}]}, "input[0].image"),
    "an image as OpenAI's chat has it": Bad(
        422, "must be a string", {"input": [{"image": {"url": f"{SITE}/x.png"}}]}, "input[0].image"
    ),
    "text and image": Bad(422, "has text and image", {"input": {"text": "x", "image": "y"}}, "input"),
    "too many items": Bad(
        422, f"has {MAX_ITEMS + 1} items; at most {MAX_ITEMS} go", {"input": ["x"] * (MAX_ITEMS + 1)}, "input"
    ),
}

NAME = "jina-embeddings-v4"
ENDINGS = ("query-query", "query-passage", "passage-query", "none-query", "query-none", "none-none")
OTHER_MODELS = ("gpt-4", "jina-embeddings-v3", "", "../../../etc/passwd", *(f"{NAME}-{both}" for both in ENDINGS))
WRONG_PAGES = (
    *("", "0", "0-2", "3-1", "1,1", "2,1", "2-,3", "1-2,2", "-2", "1-2-3", "all", "1.5", "1;2", "1 2", "1-0", "1-4 9"),
    *(1, [1]),
)
RANGES = 'must have ascending numbers and ranges from 1, such as "1-4,9" or "10-"'
BOTH = "not trained to make one vector of both. Send them as two items, with a vector each, or send only an image"
PICTURE = {"type": "image_url", "image_url": {"url": IMAGES_BASE64[0]}}
WORDS = {"type": "text", "text": "x"}


def chat(*messages: object, **others: object) -> dict[str, Any]:
    return {"messages": list(messages), **others}


def user(content: object) -> dict[str, Any]:
    return {"role": "user", "content": content}


PARTS = {
    "a part of another type": Bad(
        422, "type=video_url is not offered; choose text", {"input": [{"content": [{"type": "video_url"}]}]}
    ),
    "a part without type": Bad(
        422, "type=None is not offered", {"input": {"content": [{"text": "x"}]}}, "input.content[0].type"
    ),
    "a part of a list as type": Bad(422, "is not offered", {"input": {"content": [{"type": ["text"]}]}}),
    "a part that is a number": Bad(422, "is a content part", {"input": {"content": [5]}}, "input.content[0]"),
    "a part without its text": Bad(
        422, "is of type text; send its text", {"input": {"content": [{"type": "text"}]}}, "input.content[0]"
    ),
    "a part of a file id": Bad(
        422, "has file_id", {"input": {"content": [{"type": "input_image", "file_id": "x"}]}}, "input.content[0]"
    ),
    "an image part of another": Bad(
        422, "has text", {"input": [{"type": "image_url", "image_url": "y", "text": "x"}]}, "input[0]"
    ),
    "a part with two contents": Bad(
        422, "send its text or value", {"input": {"content": [WORDS | {"value": "y"}]}}, "input.content[0]"
    ),
    "an image part without URL": Bad(
        422,
        "must be a string",
        {"input": {"content": [{"type": "image_url", "image_url": {}}]}},
        "input.content[0].image_url.url",
    ),
    "a text part of a number": Bad(
        422, "must be a string", {"input": {"content": [{"type": "text", "text": 5}]}}, "input.content[0].text"
    ),
    "no parts": Bad(422, "list of one part", {"input": {"content": []}}, "input.content"),
    "content that is a number": Bad(422, "list of one part", {"input": ["x", {"content": 5}]}, "input[1].content"),
    "two texts in an item": Bad(422, "has 2 parts", {"input": {"content": [WORDS, WORDS]}}, "input.content"),
    "two images in an item": Bad(422, "has 2 parts", {"input": {"content": [PICTURE, PICTURE]}}, "input.content"),
    "text and image fused in content": Bad(422, BOTH, {"input": {"content": [WORDS, PICTURE]}}, "input.content"),
    "text and image fused in an item": Bad(422, BOTH, {"input": [{"text": "x", "image": "y"}]}, "input[0]"),
    "text and image fused in a chat": Bad(422, BOTH, chat(user([PICTURE, WORDS])), "messages[0].content"),
    "a text of type image": Bad(
        422, "read as text; send it as", {"input": [{"type": "image", "text": "x"}]}, "input[0].type"
    ),
    "an image of type text": Bad(
        422, "read as image; send it as", {"input": ["x", {"type": "text", "image": IMAGES_BASE64[0]}]}, "input[1].type"
    ),
    "a video": Bad(422, "read as text", {"input": ["x", {"type": "video_url", "content": "http://x/"}]}),
    "content and a role": Bad(422, "has role", {"input": [user("x")]}, "input[0]"),
    "input and messages": Bad(422, "input and messages", chat(user("x"), input="x"), "messages"),
    "messages a text": Bad(422, "messages is a list of messages", {"messages": "x"}, "messages"),
    "no messages": Bad(422, "messages is a list of messages", {"messages": []}, "messages"),
    "a message that is a text": Bad(422, "is a message", chat("x"), "messages[0]"),
    "a list among messages": Bad(422, "is a message", chat(user("x"), [user("y")]), "messages[1]"),
    "a message among chats": Bad(422, "is a list of messages", chat([user("x")], user("y")), "messages[1]"),
    "no user turn": Bad(422, "0 user turns", chat({"role": "system", "content": "x"}), "messages"),
    "two user turns": Bad(422, "2 user turns", chat(user("x"), user("y")), "messages"),
    "an assistant's turn": Bad(422, "role=assistant", chat(user("x"), {"role": "assistant", "content": "y"})),
    "a tool's turn": Bad(422, "role=tool", chat(user("x"), {"role": "tool", "content": ""}), "messages[1].role"),
    "no role": Bad(422, "role=None", chat({"content": "x"}), "messages[0].role"),
    "a call in a message": Bad(422, "has tool_calls", chat(user("x") | {"tool_calls": [1]}), "messages[0]"),
    "a user turn without content": Bad(422, "list of one part", chat(user(None)), "messages[0].content"),
    "an empty chat": Bad(422, "0 user turns", chat([user("x")], []), "messages[1]"),
    "too many chats": Bad(422, f"has {MAX_ITEMS + 1} chats", chat(*[[user("x")]] * (MAX_ITEMS + 1)), "messages"),
    "a template for a chat": Bad(422, "chat_template=", chat(user("x"), chat_template="{{ x }}"), "chat_template"),
}

# Of one text unless they name another input: the fields, the one that is named, and what is said.
CONTRADICTIONS: list[tuple[dict[str, Any], str, str]] = [
    ({"return_multivector": True, "dimensions": 128}, "dimensions", "dimensions is for dense vectors"),
    ({"outputs": ["multivector"], "dimensions": 128}, "dimensions", "dimensions is for dense vectors"),
    ({"pool_factor": 2}, "pool_factor", "pool_factor is for multi-vectors"),
    ({"outputs": ["multivector"], "pool_factor": 65}, "pool_factor", "is not offered"),
    ({"outputs": ["dense"], "return_multivector": True}, "return_multivector", "contradicts outputs"),
    ({"outputs": ["multivector"], "return_multivector": False}, "return_multivector", "contradicts outputs"),
    ({"embedding_type": "float", "encoding_format": "base64"}, "encoding_format", "contradicts embedding_type"),
    ({"encoding_format": "float", "output_dtype": "int8"}, "output_dtype", "int8 contradicts encoding_format=float"),
    ({"encoding_type": []}, "encoding_type", "encoding_type is empty"),
    ({"dimensions": 100, "embedding_type": ["float", "ubinary"]}, "dimensions", "for bits choose a multiple of 8"),
    ({"output_dimension": 20, "embedding_types": "ubinary"}, "output_dimension", "output_dimension=20 "),
    ({"prompt_name": "query", "model": f"{NAME}-passage"}, "prompt_name", "prompt_name says query, model says passage"),
    ({"prompt_name": "passage", "task": "retrieval.query"}, "prompt_name", "prompt_name says passage, task says query"),
    ({"prompt_name": "none", "task": "retrieval.query"}, "prompt_name", "contradicts itself"),
    ({"prompt_name": "none", "input": ""}, "input", "is empty, and with prompt_name=none it gets no prefix"),
    ({"prompt_name": "none", "input": ["x", {"text": ""}]}, "input[1]", "is empty, and with prompt_name=none"),
    ({"model": f"{NAME}-none", "input": ""}, "input", "is empty"),
    ({"input_type": "search_query", "task": "retrieval.passage"}, "input_type", "says query, task says passage"),
    ({"task": "retrieval.query", "model": f"{NAME}-retrieval-passage"}, "task", "task says query, model says passage"),
    ({"task": "retrieval.query", "model": f"{NAME}-none"}, "task", "task says query, model says none"),
    ({"task": "retrieval.none"}, "task", "is not offered"),
    ({"task": "retrieval.other"}, "task", "is not offered"),
    ({"task": "code.query"}, "task", "is for the code server and this is the retrieval server: send it to"),
    ({"task_type": "code.query"}, "task_type", "task_type=code.query is for the code server"),
    ({"task": "text-matching"}, "task", "`make serve-text-matching` serves (port 8002"),
    ({"model": f"{NAME}-code"}, "model", "port 8003"),
    ({"model": f"{NAME}-code-passage"}, "model", "for the code server"),
    ({"late_chunking": True, "input": ["x", {"image": "y"}]}, "late_chunking", "late_chunking is for texts"),
    ({"late_chunking": True, "return_multivector": True}, "late_chunking", "returns dense vectors only"),
    ({"late_chunking": True, "max_length": 1}, "late_chunking", "cuts no text"),
    ({"late_chunking": True, "truncate_prompt_tokens": 1}, "late_chunking", "cuts no text"),
    ({"max_length": 5, "truncate": False}, "max_length", "max_length contradicts truncate=false; send one of them"),
    ({"max_length": 5, "truncation": "NONE"}, "max_length", "max_length contradicts truncation=false"),
    ({"truncate_prompt_tokens": -1, "truncate": False}, "truncate_prompt_tokens", "contradicts truncate=false"),
    ({"max_length": 5, "truncate_prompt_tokens": 6}, "truncate_prompt_tokens", "contradicts max_length"),
    ({"modality": "image", "input": None, "messages": [user("x")]}, "modality", "of input"),
    ({"priority": 1000}, "priority", "less than or equal to 999"),
    ({"priority": -1}, "priority", "greater than or equal to 0"),
    ({"priority": "low"}, "priority", "valid integer"),
    ({"input": ["x", {"text": "a", "pages": "1"}]}, "input[1]", "has pages"),
    ({"input": ["x", {"text": "y", "image_url": "http://10.0.0.1/"}]}, "input[1]", "has image_url"),
    ({"output_dimension": 128, "output_dimensionality": 256}, "output_dimensionality", "contradicts output_dimension"),
]
CONFLICTS = {
    **{str(fields): Bad(422, said, {"input": "x", **fields}, param) for fields, param, said in CONTRADICTIONS},
    **{
        f"model {model}": Bad(404, f"no model {model} here; this server has", {"input": "x", "model": model}, "model")
        for model in OTHER_MODELS
    },
    **{
        f"pages {json.dumps(pages)}": Bad(422, RANGES, {"input": ["x", {"pdf": "y", "pages": pages}]}, "input[1].pages")
        for pages in WRONG_PAGES
    },
}

FIELDS = {
    **{
        f"{name} {json.dumps(value)}": Bad(422, f"{name}=", {"input": "x", name: value}, name)
        for name, value in (
            ("normalized", False), ("normalize", False), ("use_activation", False), ("embd_normalize", -1),
            ("pooling", "cls"), ("instruction", "Represent this:"), ("prompt", "Represent this:"),
            ("prompt_template", "Represent {text}"), ("task_type", "RETRIEVAL_QUERY"), ("modality", "audio"),
            ("truncation", "START"), ("truncation_side", "left"), ("truncation_direction", "Left"),
            ("truncate_prompt_tokens", 0), ("truncate_prompt_tokens", -2), ("truncate_prompt_tokens", MAX_LENGTH + 1),
            ("truncate_prompt_tokens", "5"), ("max_tokens", 5), ("padding", "max_length"), ("embed_dtype", "float16"),
            ("endianness", "big"), ("output_dimension", 257), ("output_dimensionality", 0), ("output_dtype", "int4"),
            ("output_dtype", ["int8"]), ("mm_processor_kwargs", {"max_pixels": 3136}), ("options", {"num_ctx": 5}),
            ("chat_template", "{{ messages }}"), ("lora_path", "x"), ("images", ["y"]),
            ("image", "http://10.0.0.1/x.png"), ("pdf", "y"), ("query", "y"), ("documents", ["y"]), ("dimension", 128),
            ("prefix", "Passage: "),
        )
    },
}  # fmt: skip

SEARCH = {"texts": ["x"], "input_type": "search_query"}
COHERE = {
    "no body": Bad(400, NOT_JSON, b""),
    "a list as body": Bad(400, "not an object", []),
    "nothing to embed": Bad(422, "none of texts, images and inputs", {"input_type": "search_query"}, "texts"),
    "input": Bad(422, "input is a field of /v1/embeddings", SEARCH | {"input": "x"}),
    "dimensions": Bad(422, "dimensions is a field of /v1/embeddings", SEARCH | {"dimensions": 128}, "dimensions"),
    "texts and images": Bad(422, "has texts and images", SEARCH | {"images": ["y"]}, "texts"),
    "texts and inputs": Bad(
        422, "has texts and inputs", SEARCH | {"inputs": [{"content": [{"type": "text", "text": "y"}]}]}
    ),
    "texts as one text": Bad(422, "texts=x is not offered", SEARCH | {"texts": "x"}),
    "no texts": Bad(422, "texts is empty", SEARCH | {"texts": []}),
    "token ids as texts": Bad(422, "texts[0]=1 is not offered", SEARCH | {"texts": [1]}),
    "too many texts": Bad(422, f"has {MAX_ITEMS + 1} items", SEARCH | {"texts": ["x"] * (MAX_ITEMS + 1)}, "texts"),
    "no input_type": Bad(422, "input_type is required with texts", {"texts": ["x"]}, "input_type"),
    "an input_type of ours": Bad(422, "input_type=query is not offered", SEARCH | {"input_type": "query"}),
    "clustering": Bad(422, "or the text-matching model", SEARCH | {"input_type": "clustering"}),
    "classification": Bad(422, "or the text-matching model", SEARCH | {"input_type": "classification"}),
    "image for texts": Bad(422, "input_type=image is for images", SEARCH | {"input_type": "image"}),
    "input_type and model": Bad(
        422, "contradicts itself", SEARCH | {"model": "jina-embeddings-v4-passage"}, "input_type"
    ),
    "Cohere's model": Bad(404, "no model embed-v4.0 here", SEARCH | {"model": "embed-v4.0"}),
    "another task's model": Bad(422, "for the code server", SEARCH | {"model": "jina-embeddings-v4-code"}),
    "START": Bad(422, "truncate=START is not offered: texts are cut at their end", SEARCH | {"truncate": "START"}),
    "true as truncate": Bad(422, "truncate=True is not offered", SEARCH | {"truncate": True}),
    "NONE and max_tokens": Bad(422, "contradicts truncate=NONE", SEARCH | {"truncate": "NONE", "max_tokens": 5}),
    "max_tokens 0": Bad(422, f"choose 1 to {MAX_LENGTH}", SEARCH | {"max_tokens": 0}),
    "257 dimensions": Bad(
        422,
        "output_dimension=257 is not offered; choose 1 to 256",
        SEARCH | {"output_dimension": 257},
        "output_dimension",
    ),
    "an unknown type": Bad(
        422, "embedding_types[0]=int4 is not offered", SEARCH | {"embedding_types": ["int4"]}, "embedding_types[0]"
    ),
    "inputs of texts": Bad(422, 'inputs[0] is {"content": [...]}', {"inputs": ["x"], "input_type": "search_query"}),
    "an input without content": Bad(422, "inputs[0] is", {"inputs": [{"text": "x"}], "input_type": "search_query"}),
    "text and image fused in an input": Bad(
        422, BOTH, {"inputs": [{"content": [WORDS, PICTURE]}], "input_type": "search_document"}
    ),
    "bits that fill no bytes": Bad(
        422, "multiple of 8", SEARCH | {"output_dimension": 12, "embedding_types": ["binary"]}, "output_dimension"
    ),
    "priority 1000": Bad(422, "less than or equal to 999", SEARCH | {"priority": 1000}, "priority"),
    "no key of Cohere's": Bad(422, "normalized=False", SEARCH | {"normalized": False}, "normalized"),
}

RANK: dict[str, Any] = {"query": "q", "documents": ["a", "b"]}
RANKINGS = {
    "no body": Bad(400, NOT_JSON, b""),
    "a list as body": Bad(400, "not an object", []),
    "half an emoji in a document": Bad(400, NOT_JSON, b'{"query": "q", "documents": ["a", "\\ud83d"]}', "documents[1]"),
    "no query": Bad(422, "query is required", {"documents": ["a"]}, "query"),
    "query null": Bad(422, "query is one text or image", RANK | {"query": None}, "query"),
    "two queries": Bad(422, "query is one text or image", RANK | {"query": ["q", "r"]}, "query"),
    "a number as query": Bad(422, "query is one text or image", RANK | {"query": 5}, "query"),
    "a query without anything": Bad(422, EITHER, RANK | {"query": {}}, "query"),
    "text and image fused in a query": Bad(422, BOTH, RANK | {"query": {"text": "x", "image": "y"}}, "query"),
    "no documents": Bad(422, "documents is required", {"query": "q"}, "documents"),
    "an empty list": Bad(422, "documents is empty", RANK | {"documents": []}, "documents"),
    "documents null": Bad(422, "documents is a text, an item or a list", RANK | {"documents": None}, "documents"),
    "documents a number": Bad(422, "documents is a text, an item or a list", RANK | {"documents": 5}, "documents"),
    "a document that is null": Bad(422, ITEM, RANK | {"documents": ["a", None]}, "documents[1]"),
    "token ids as documents": Bad(422, TOKENS, RANK | {"documents": [1, 2]}, "documents[0]"),
    "a document of other fields": Bad(422, EITHER, RANK | {"documents": [{"title": "x"}]}, "documents[0]"),
    "a text document of type image": Bad(
        422, "read as text", RANK | {"documents": [{"type": "image", "text": "x"}]}, "documents[0].type"
    ),
    "a document with a title": Bad(422, "has title", RANK | {"documents": [{"text": "x", "title": "y"}]}),
    "two texts in a document": Bad(
        422, "has 2 parts", RANK | {"documents": [{"content": [WORDS, WORDS]}]}, "documents[0].content"
    ),
    "a PDF file": Bad(
        422, "a PDF file has many pages", RANK | {"documents": ["a", {"pdf": "AAAA"}]}, "documents[1].pdf"
    ),
    "too many documents": Bad(
        422, f"has {MAX_ITEMS + 1} items", RANK | {"documents": ["x"] * (MAX_ITEMS + 1)}, "documents"
    ),
    "top_n 0": Bad(422, "top_n=0 is not offered", RANK | {"top_n": 0}, "top_n"),
    "top_n -1": Bad(422, "top_n=-1 is not offered", RANK | {"top_n": -1}, "top_n"),
    "top_n 1.5": Bad(422, "top_n=1.5 is not offered", RANK | {"top_n": 1.5}, "top_n"),
    "top_n NaN": Bad(422, "top_n=nan is not offered", b'{"query": "q", "documents": ["a"], "top_n": NaN}', "top_n"),
    "top_n a text": Bad(422, "top_n=3 is not offered", RANK | {"top_n": "3"}, "top_n"),
    "by cosine": Bad(422, "by=cosine is not offered", RANK | {"by": "cosine"}, "by"),
    "return_documents a text": Bad(422, "return_documents=yes", RANK | {"return_documents": "yes"}),
    "max_tokens_per_doc and truncate false": Bad(
        422, "contradicts truncate=false", RANK | {"truncate": False, "max_tokens_per_doc": 5}, "max_tokens_per_doc"
    ),
    "max_tokens_per_query and truncate false": Bad(
        422, "contradicts truncate=false", RANK | {"truncate": False, "max_tokens_per_query": 5}, "max_tokens_per_query"
    ),
    "an empty query without prefix": Bad(
        422, "is empty", RANK | {"query": "", "model": "jina-embeddings-v4-none"}, "query"
    ),
    "max_tokens_per_doc -1": Bad(422, "max_tokens_per_doc=-1", RANK | {"max_tokens_per_doc": -1}),
    "max_tokens_per_query over the limit": Bad(
        422, f"choose 0 to {MAX_LENGTH}", RANK | {"max_tokens_per_query": MAX_LENGTH + 1}, "max_tokens_per_query"
    ),
    "max_pixels over the limit": Bad(422, "choose 3136 to 602112", RANK | {"max_pixels": 602_113}, "max_pixels"),
    "a model of one prompt": Bad(422, "uses both prompts", RANK | {"model": "jina-embeddings-v4-query"}, "model"),
    "a task of one prompt": Bad(422, "uses both prompts", RANK | {"task": "retrieval.passage"}, "task"),
    "another task's model": Bad(422, "for the code server", RANK | {"model": "jina-embeddings-v4-code"}, "model"),
    "a reranker's model": Bad(404, "no model jina-reranker-m0 here", RANK | {"model": "jina-reranker-m0"}, "model"),
    "prompt_name": Bad(422, "is a field of /v1/embeddings", RANK | {"prompt_name": "query"}, "prompt_name"),
    "dimensions": Bad(422, "is a field of /v1/embeddings", RANK | {"dimensions": 128}, "dimensions"),
    "rank_fields": Bad(422, "rank_fields is not offered", RANK | {"rank_fields": ["title"]}, "rank_fields"),
    "an instruction": Bad(422, "instruction=Find is not offered", RANK | {"instruction": "Find"}, "instruction"),
    "an empty document without prefix": Bad(
        422, "is empty", RANK | {"documents": [""], "model": "jina-embeddings-v4-none"}, "documents[0]"
    ),
}
PAIRS = {
    "no body": Bad(400, NOT_JSON, b""),
    "no queries": Bad(422, "queries is required", {"documents": "a"}, "queries"),
    "no documents": Bad(422, "documents is required", {"text_1": "q"}, "documents"),
    "empty queries": Bad(422, "text_1 is empty", {"text_1": [], "text_2": "a"}, "text_1"),
    "empty documents": Bad(422, "text_2 is empty", {"text_1": "q", "text_2": []}, "text_2"),
    "two queries for three documents": Bad(
        422, "2 queries and 3 documents", {"text_1": ["q", "r"], "text_2": ["a", "b", "c"]}, "queries"
    ),
    "two queries for one document": Bad(422, "2 queries and 1 documents", {"text_1": ["q", "r"], "text_2": "a"}),
    "two names": Bad(422, "contradicts queries", {"queries": "q", "text_1": "r", "text_2": "a"}, "text_1"),
    "an instruction": Bad(422, "instruction=x is not", {"text_1": "q", "text_2": "a", "instruction": "x"}),
    "a prompt for the template": Bad(422, "chat_template=x", {"text_1": "q", "text_2": "a", "chat_template": "x"}),
}

EMBEDDINGS = {**JSON, **TYPES, **INPUTS, **PARTS, **CONFLICTS, **FIELDS}
