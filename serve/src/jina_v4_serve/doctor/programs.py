"""What to type into programs such as Open WebUI, so that they embed passages as passages and queries as queries.

This is the short form of docs/other-clients.md, which also has the versions; tests keep the two equal.
"""

MODEL = "jina-embeddings-v4-retrieval"
# The fields of each program that decide about the prompt, and their values.
TYPED = {
    "Open WebUI": {
        "RAG_EMBEDDING_MODEL": MODEL,
        "RAG_EMBEDDING_PREFIX_FIELD_NAME": "prompt_name",
        "RAG_EMBEDDING_QUERY_PREFIX": "query",
        "RAG_EMBEDDING_CONTENT_PREFIX": "passage",
    },
    "AnythingLLM": {
        "EMBEDDING_MODEL_PREF": f"'{MODEL}-none'",
        "GENERIC_OPEN_AI_EMBEDDING_PASSAGE_PREFIX": "'Passage: '",
        "GENERIC_OPEN_AI_EMBEDDING_QUERY_PREFIX": "'Query: '",
    },
    "Dify": {"provider": "Jina", "Model Name": "jina-embeddings-v4"},
    "RAGFlow": {"provider": "NVIDIA", "model_name": MODEL},
    "n8n": {
        "the vector store that inserts documents": f"{MODEL}-passage",
        "the vector store that retrieves, or is a tool": f"{MODEL}-query",
    },
    "LibreChat": {
        "EMBEDDINGS_MODEL of the first": f"{MODEL}-passage",
        "EMBEDDINGS_MODEL of the second": f"{MODEL}-query",
    },
}


def what_to_type() -> str:
    """Return a line per field, below the name of its program."""
    lines = ["The address is http://127.0.0.1:8000/v1, with the server's key; docs/other-clients.md has the rest."]
    for program, typed in TYPED.items():
        lines += ["", program, *(f"  {field:46} {value}" for field, value in typed.items())]
    return "\n".join(lines)
