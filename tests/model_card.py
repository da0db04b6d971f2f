"""The calls of the published model's card: only the line that makes `model` is another. The texts are ours."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Results = dict[str, Any]

TEXTS = [
    "Ein ruhiger Abend am See",
    "Une soirée calme au bord du lac",
    "湖畔の静かな夕べ",
    "호숫가의 고요한 저녁",
    "أمسية هادئة على البحيرة",
]


def transformers_sections(model: Any, pictures: Sequence[str]) -> Results:
    """The four sections with AutoModel."""
    model.to("cuda")

    # 1. retrieval
    query_embeddings = model.encode_text(
        texts=["How do glaciers shape a valley"],
        task="retrieval",
        prompt_name="query",
    )
    passage_embeddings = model.encode_text(
        texts=["A glacier carves the valley floor and leaves a wide trough behind it"],
        task="retrieval",
        prompt_name="passage",
    )
    image_embeddings = model.encode_image(
        images=[pictures[0]],
        task="retrieval",
    )

    # 2. text matching
    text_embeddings = model.encode_text(texts=TEXTS, task="text-matching")

    # 3. code
    query_embedding = model.encode_text(
        texts=["a function that adds two numbers"],
        task="code",
        prompt_name="query",
    )
    code_embeddings = model.encode_text(
        texts=["def add(a, b):\n    return a + b"],
        task="code",
        prompt_name="passage",
    )

    # 4. multi-vectors
    multivector_embeddings = model.encode_text(
        texts=TEXTS,
        task="retrieval",
        prompt_name="query",
        return_multivector=True,
    )
    images = list(pictures)
    multivector_image_embeddings = model.encode_image(
        images=images,
        task="retrieval",
        return_multivector=True,
    )
    return {name: value for name, value in locals().items() if "embedding" in name}


def sentence_transformers_sections(model: Any, pictures: Sequence[str]) -> Results:
    """The three sections with SentenceTransformer."""
    # 1. retrieval
    query_embeddings = model.encode(
        sentences=["How do glaciers shape a valley"],
        task="retrieval",
        prompt_name="query",
    )
    passage_embeddings = model.encode(
        sentences=["A glacier carves the valley floor and leaves a wide trough behind it"],
        task="retrieval",
        prompt_name="passage",
    )
    image_embeddings = model.encode(
        sentences=[pictures[0]],
        task="retrieval",
    )

    # 2. text matching
    text_embeddings = model.encode(sentences=TEXTS, task="text-matching")

    # 3. code
    query_embedding = model.encode(
        sentences=["a function that adds two numbers"],
        task="code",
        prompt_name="query",
    )
    code_embeddings = model.encode(
        sentences=["def add(a, b):\n    return a + b"],
        task="code",
        prompt_name="passage",
    )
    return {name: value for name, value in locals().items() if "embedding" in name}


def check_transformers(found: Mapping[str, Any], dim: int, n_pictures: int) -> None:
    """List in, list out; a row a token for multi-vectors; float32 of unit length."""
    n_items = {"text_embeddings": len(TEXTS), "multivector_embeddings": len(TEXTS)}
    n_items["multivector_image_embeddings"] = n_pictures
    assert len(found) == 8
    for name, vectors in found.items():
        assert isinstance(vectors, list), name
        assert len(vectors) == n_items.get(name, 1)
        for vector in vectors:
            assert vector.dtype == np.float32
            assert vector.shape[1:] == (128,) if "multivector" in name else vector.shape == (dim,)
            np.testing.assert_allclose(np.linalg.norm(vector.astype(float), axis=-1), 1, atol=1e-5)


def check_sentence_transformers(found: Mapping[str, Any], published: Mapping[str, Any]) -> None:
    """One array for a list, with the vectors of the other form, but where the card names no prompt."""
    assert len(found) == 6
    for name, array in found.items():
        assert isinstance(array, np.ndarray), name
        assert array.shape == (len(published[name]), len(published[name][0]))
        if name == "text_embeddings":  # encode_text takes "query" then
            continue
        np.testing.assert_allclose(array, np.stack(published[name]), atol=1e-5)
