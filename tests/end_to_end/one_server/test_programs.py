"""What the programs of docs/other-clients.md send, as their sources have it: each body gives the rows of its prompt.

The bodies were read in November 2026, at the versions that the page names; `source` is the file that makes them. Each
vector is compared with the golden row of the prompt that it should have, and must differ from that of the other one.
"""

import base64
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Golden
from wire import BOUND, IMAGES_BASE64, TASK, TEXTS, Array, Wire, array, assert_near

PAGE = (Path(__file__).parents[3] / "docs" / "other-clients.md").read_text().partition("\n## Programs\n")[2]
SECTIONS = dict(section.partition("\n")[::2] for section in PAGE.partition("\n## ")[0].split("\n### ")[1:])
OTHER = {"query": "passage", "passage": "query"}
QUERY, PASSAGES = TEXTS[0], [TEXTS[1], TEXTS[4]]
ROWS = {"query": ["query/0"], "passage": ["passage/1", "passage/4"]}


@dataclass(frozen=True)
class Sent:
    """A request of a program.

    Attributes:
        program: its section of the page.
        source: the file that makes the body.
        body: as it is sent.
        rows: golden rows of the reply, without the task.
        typed: what a user types for it, beside the model's name.
        warning: of the reply.
    """

    program: str
    source: str
    body: dict[str, Any]
    rows: list[str]
    typed: tuple[str, ...] = ()
    warning: str | None = None


OPEN_WEBUI = ("Open WebUI", "open_webui/retrieval/utils.py")
ANYTHING_LLM = ("AnythingLLM", "server/utils/EmbeddingEngines/genericOpenAi/index.js")
DIFY_JINA = ("Dify", "models/jina/models/text_embedding/text_embedding.py")
DIFY_OPENAI = ("Dify", "models/openai_api_compatible/models/text_embedding/text_embedding.py")
RAGFLOW = ("RAGFlow", "rag/llm/embedding_model.py")
N8N = ("n8n", "nodes/embeddings/EmbeddingsOpenAI/EmbeddingsOpenAi.node.ts")
LIBRECHAT = ("LibreChat", "app/config.py")
EMPTY = [{"type": "text", "text": ""}]

EMBEDDINGS = {
    "Open WebUI, chunks": Sent(
        *OPEN_WEBUI,
        {"input": PASSAGES, "model": "jina-embeddings-v4-retrieval", "prompt_name": "passage"},
        ROWS["passage"],
        ("`RAG_EMBEDDING_PREFIX_FIELD_NAME` | `prompt_name`", "`RAG_EMBEDDING_CONTENT_PREFIX` | `passage`"),
    ),
    "Open WebUI, a query": Sent(
        *OPEN_WEBUI,
        {"input": [QUERY], "model": "jina-embeddings-v4-retrieval", "prompt_name": "query"},
        ROWS["query"],
        ("`RAG_EMBEDDING_PREFIX_FIELD_NAME` | `prompt_name`", "`RAG_EMBEDDING_QUERY_PREFIX` | `query`"),
    ),
    "AnythingLLM, chunks": Sent(
        *ANYTHING_LLM,
        {
            "model": "jina-embeddings-v4-retrieval-none",
            "input": [f"Passage: {PASSAGES[0]}", f"Passage: {PASSAGES[1]}"],
            "encoding_format": "base64",
        },
        ROWS["passage"],
        ("`GENERIC_OPEN_AI_EMBEDDING_PASSAGE_PREFIX` | `'Passage: '`",),
    ),
    "AnythingLLM, a query": Sent(
        *ANYTHING_LLM,
        {"model": "jina-embeddings-v4-retrieval-none", "input": [f"Query: {QUERY}"], "encoding_format": "base64"},
        ROWS["query"],
        ("`GENERIC_OPEN_AI_EMBEDDING_QUERY_PREFIX` | `'Query: '`",),
    ),
    "Dify, Jina's provider, chunks": Sent(
        *DIFY_JINA,
        {
            "model": "jina-embeddings-v4",
            "input": [{"text": PASSAGES[0]}, {"text": PASSAGES[1]}],
            "task": "retrieval.passage",
        },
        ROWS["passage"],
    ),
    "Dify, Jina's provider, a query": Sent(
        *DIFY_JINA,
        {"model": "jina-embeddings-v4", "input": [{"text": QUERY}], "task": "retrieval.query"},
        ROWS["query"],
    ),
    "Dify, Jina's provider, a text and an image": Sent(
        *DIFY_JINA,
        {
            "model": "jina-embeddings-v4",
            "input": [{"text": PASSAGES[0]}, {"image": IMAGES_BASE64[0]}],
            "task": "retrieval.passage",
        },
        ["passage/1", "image/0"],
    ),
    "Dify, OpenAI-API-compatible, chunks": Sent(
        *DIFY_OPENAI,
        {
            "model": "jina-embeddings-v4-retrieval-none",
            "input": [f"Passage: {PASSAGES[0]}", f"Passage: {PASSAGES[1]}"],
        },
        ROWS["passage"],
        ("Document prefix | `Passage:`",),
    ),
    "Dify, OpenAI-API-compatible, a query": Sent(
        *DIFY_OPENAI,
        {"model": "jina-embeddings-v4-retrieval-none", "input": [f"Query: {QUERY}"], "encoding_format": "float"},
        ROWS["query"],
        ("Query prefix | `Query:`",),
    ),
    "Dify, OpenAI-API-compatible, an image": Sent(
        *DIFY_OPENAI,
        {
            "messages": [
                {"role": "system", "content": [{"type": "text", "text": "Represent the user's input."}]},
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{IMAGES_BASE64[0]}"}},
                        *EMPTY,
                    ],
                },
                {"role": "assistant", "content": EMPTY},
            ],
            "model": "jina-embeddings-v4-retrieval-none",
            "encoding_format": "float",
            "continue_final_message": True,
            "add_special_tokens": True,
        },
        ["image/0"],
        ("Vision Support | Support",),
        warning="instructions left out, as the model's prompt has none: messages[0]",
    ),
    "RAGFlow, NVIDIA, chunks": Sent(
        *RAGFLOW,
        {
            "input": PASSAGES,
            "input_type": "passage",
            "model": "jina-embeddings-v4-retrieval",
            "encoding_format": "float",
            "truncate": "END",
        },
        ROWS["passage"],
    ),
    "RAGFlow, NVIDIA, a query": Sent(
        *RAGFLOW,
        {
            "input": [QUERY],
            "input_type": "query",
            "model": "jina-embeddings-v4-retrieval",
            "encoding_format": "float",
            "truncate": "END",
        },
        ROWS["query"],
    ),
    "RAGFlow, OpenAI-API-Compatible, chunks that become queries": Sent(
        *RAGFLOW,
        {
            "input": PASSAGES,
            "model": "jina-embeddings-v4-retrieval",
            "encoding_format": "float",
            "drop_params": True,
        },
        ["query/1", "query/4"],
        warning="unknown fields ignored: drop_params",
    ),
    "n8n, chunks": Sent(
        *N8N,
        {"model": "jina-embeddings-v4-retrieval-passage", "input": PASSAGES, "encoding_format": "base64"},
        ROWS["passage"],
    ),
    "n8n, a query": Sent(
        *N8N,
        {"model": "jina-embeddings-v4-retrieval-query", "input": QUERY, "encoding_format": "base64"},
        ROWS["query"],
    ),
    "LibreChat, chunks": Sent(
        *LIBRECHAT,
        {"input": PASSAGES, "model": "jina-embeddings-v4-retrieval-passage", "encoding_format": "base64"},
        ROWS["passage"],
        ("`RAG_CHECK_EMBEDDING_CTX_LENGTH` | `False`",),
    ),
    "LibreChat, a query": Sent(
        *LIBRECHAT,
        {"input": [QUERY], "model": "jina-embeddings-v4-retrieval-query", "encoding_format": "base64"},
        ROWS["query"],
        ("`RAG_CHECK_EMBEDDING_CTX_LENGTH` | `False`",),
    ),
}

RANKED = {"model": "jina-embeddings-v4-retrieval", "query": QUERY, "documents": PASSAGES}
CONTENTS = [
    {"content": [{"type": "text", "text": PASSAGES[0]}]},
    {"content": [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{IMAGES_BASE64[0]}"}}]},
]
DIFY_RANKS = "models/openai_api_compatible/models/rerank/rerank.py"
RANKINGS = {
    "Open WebUI": Sent(
        "Open WebUI", "open_webui/retrieval/models/external.py", {**RANKED, "top_n": 2}, ROWS["passage"]
    ),
    "Dify, Jina's provider": Sent(
        "Dify",
        "models/jina/models/rerank/rerank.py",
        {**RANKED, "top_n": None, "return_documents": False},
        ROWS["passage"],
    ),
    "Dify, OpenAI-API-compatible": Sent("Dify", DIFY_RANKS, {**RANKED, "top_n": 2}, ROWS["passage"]),
    "Dify, OpenAI-API-compatible, a text and an image": Sent(
        "Dify", DIFY_RANKS, {**RANKED, "documents": CONTENTS, "top_n": 2}, ["passage/1", "image/0"]
    ),
    "RAGFlow": Sent("RAGFlow", "rag/llm/rerank_model.py", {**RANKED, "top_n": 2}, ROWS["passage"]),
}


def vector(embedding: list[float] | str) -> Array:
    """Read a vector as the program does: numbers, or base64 of little-endian float32."""
    return np.frombuffer(base64.b64decode(embedding), "<f4") if isinstance(embedding, str) else array(embedding)


@pytest.mark.parametrize("sent", EMBEDDINGS.values(), ids=EMBEDDINGS.keys())
def test_what_a_program_sends_gets_the_prompt_that_the_page_promises(sent: Sent, wire: Wire, golden: Golden) -> None:
    answer = wire.post(sent.body, authorization="Bearer none")
    assert answer.status_code == 200, answer.text
    assert answer.headers.get("x-jina-v4-warning") == sent.warning
    found = [vector(item["embedding"]) for item in sorted(answer.json()["data"], key=lambda item: item["index"])]
    assert_near(found, [golden.rows[f"{TASK}/{row}/dense"] for row in sent.rows])
    for row, of_reply in zip(sent.rows, found, strict=True):
        prompt, _, number = row.partition("/")
        if prompt in OTHER:
            other = golden.rows[f"{TASK}/{OTHER[prompt]}/{number}/dense"]
            assert np.abs(of_reply - other).max() > 100 * BOUND, "the other prompt would have passed as well"


def scores(golden: Golden, query: str, documents: list[str]) -> Array:
    """MaxSim of golden rows, as the mean over the query's tokens."""
    tokens, *others = (golden.rows[f"{TASK}/{row}/multi"] for row in (query, *documents))
    return array([(tokens @ rows.T).max(axis=1).mean() for rows in others])


@pytest.mark.parametrize("sent", RANKINGS.values(), ids=RANKINGS.keys())
def test_what_a_program_sends_is_ranked_with_both_prompts(sent: Sent, wire: Wire, golden: Golden) -> None:
    answer = wire.http.post("/v1/rerank", json=sent.body, headers={"authorization": "Bearer none"})
    assert answer.status_code == 200, answer.text
    assert "x-jina-v4-warning" not in answer.headers
    by_index = {result["index"]: result["relevance_score"] for result in answer.json()["results"]}
    found = np.array([by_index[0], by_index[1]])
    assert np.abs(found - scores(golden, "query/0", sent.rows)).max() <= BOUND
    as_queries = [row.replace("passage", "query") for row in sent.rows]
    for wrong in (scores(golden, "passage/0", sent.rows), scores(golden, "query/0", as_queries)):
        assert np.abs(found - wrong).max() > 10 * BOUND, "another prompt would have passed as well"


def test_every_program_of_the_page_is_replayed_with_what_the_page_has_users_type() -> None:
    everything = [*EMBEDDINGS.values(), *RANKINGS.values()]
    assert SECTIONS.keys() == {sent.program for sent in everything}
    for sent in everything:
        section = SECTIONS[sent.program]
        assert f"`{sent.body['model']}`" in section
        for typed in sent.typed:
            assert typed in section
    sent_names = {sent.body["model"] for sent in everything}
    assert set(re.findall(r"`(jina-embeddings-v4[a-z-]*)`", "".join(SECTIONS.values()))) == sent_names
