"""A request of each kind, for /docs. Tests send them all."""

from typing import Any

_PICTURE = (
    "data:image/png;base64,"
    "iVBORw0KGgoAAAANSUhEUgAAABwAAAAcCAAAAABXZoBIAAAAFklEQVR42mM8wYAbMDGMSo5KjkpCAQDVsgEA+rCF1wAAAABJRU5ErkJggg=="
)
# Two empty pages.
_PDF = (
    "data:application/pdf;base64,"
    "JVBERi0xLjQKMSAwIG9iajw8L1R5cGUvQ2F0YWxvZy9QYWdlcyAyIDAgUj4+ZW5kb2JqIDIgMCBvYmo8PC9UeXBlL1BhZ2VzL0NvdW50IDIvS2lk"
    "c1szIDAgUiAzIDAgUl0+PmVuZG9iaiAzIDAgb2JqPDwvVHlwZS9QYWdlL1BhcmVudCAyIDAgUi9NZWRpYUJveFswIDAgOTkgOTldPj5lbmRvYmog"
    "dHJhaWxlcjw8L1Jvb3QgMSAwIFI+Pg=="
)
_PART = {"type": "image_url", "image_url": {"url": _PICTURE}}

EMBEDDINGS: dict[str, dict[str, Any]] = {
    "passages": {"input": ["A beautiful sunset over the beach"], "prompt_name": "passage"},
    "texts and images": {"input": ["A beautiful sunset over the beach", {"image": _PICTURE}]},
    "pages of a PDF file": {"input": [{"pdf": _PDF, "pages": "1-2"}]},
    "content parts": {"input": [{"type": "text", "text": "A beautiful sunset"}, {"content": [_PART]}]},
    "a chat": {"messages": [{"role": "user", "content": [_PART]}]},
    "the hosted API's names": {
        "texts": ["A beautiful sunset"],
        "output_dimension": 128,
        "truncation": True,
        "embedding_types": ["float", "int8"],
    },
    "a smaller multi-vector": {
        "input": "A beautiful sunset over the beach",
        "prompt_name": "passage",
        "return_multivector": True,
        "pool_factor": 2,
        "embedding_type": "int8",
    },
    "both vectors": {"input": "A beautiful sunset", "outputs": ["dense", "multivector"]},
}
COHERE: dict[str, dict[str, Any]] = {
    "texts": {"texts": ["A beautiful sunset"], "input_type": "search_document", "embedding_types": ["float"]},
    "images": {"images": [_PICTURE], "input_type": "image"},
    "inputs": {
        "inputs": [{"content": [{"type": "text", "text": "A beautiful sunset"}]}, {"content": [_PART]}],
        "input_type": "search_document",
        "output_dimension": 128,
        "embedding_types": ["int8", "ubinary"],
    },
}
RERANK: dict[str, dict[str, Any]] = {
    "texts": {"query": "Where is the sea?", "documents": ["A sunset over the beach", "Tax law"], "top_n": 1},
    "texts and images": {
        "query": "Where is the sea?",
        "documents": [{"text": "A sunset over the beach"}, {"image": _PICTURE}],
        "return_documents": False,
    },
    "an image as query": {"query": {"image": _PICTURE}, "documents": ["A grey square", "A sunset"], "by": "dense"},
}
COHERE_RERANK = {"texts": RERANK["texts"]}
SCORE: dict[str, dict[str, Any]] = {
    "one query": {"text_1": "Where is the sea?", "text_2": ["A sunset over the beach", "Tax law"]},
    "pairs": {"queries": ["Where is the sea?", "What is due?"], "documents": ["A sunset", "Tax law"]},
    "images": {"queries": "A grey square", "documents": {"content": [_PART]}},
}
