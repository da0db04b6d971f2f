"""Our adapters for LangChain and LlamaIndex, with the frameworks' own vector stores, against a real server."""

import asyncio
import base64
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from conftest import Golden
from jina_v4_client.integrations.langchain import JinaV4Embeddings
from jina_v4_client.integrations.llama_index import JinaV4Embedding
from langchain_core.vectorstores import InMemoryVectorStore
from llama_index.core import StorageContext, VectorStoreIndex
from llama_index.core.indices import MultiModalVectorStoreIndex
from llama_index.core.schema import ImageNode, QueryBundle, TextNode
from llama_index.core.vector_stores import SimpleVectorStore
from oracle import cut
from servers import Server
from wire import BOUND, IMAGES, TASK, TEXTS, Array, array, assert_near

PATHS = [str(path) for path in IMAGES]
NAMES = [*TEXTS, *PATHS]


@pytest.fixture
def langchain(wire_server: Server) -> Iterator[JinaV4Embeddings]:
    with JinaV4Embeddings(wire_server.base_url) as embeddings:
        yield embeddings


@pytest.fixture
def llama_index(wire_server: Server) -> Iterator[JinaV4Embedding]:
    embedding = JinaV4Embedding(wire_server.base_url)
    yield embedding
    embedding.close()


def rows(golden: Golden, kind: str) -> list[Array]:
    """The golden rows of all texts with a prompt, or of all images."""
    n_items = len(IMAGES) if kind == "image" else len(TEXTS)
    return [golden.rows[f"{TASK}/{kind}/{i}/dense"] for i in range(n_items)]


def ranked(golden: Golden, i: int, *kinds: str) -> tuple[list[str], list[float]]:
    """The items that a query finds, best first, and their scores, by the golden rows."""
    names = [name for kind in kinds for name in (PATHS if kind == "image" else TEXTS)]
    scores = np.stack([row for kind in kinds for row in rows(golden, kind)]) @ rows(golden, "query")[i]
    order = np.argsort(-scores)
    return [names[place] for place in order], scores[order].tolist()


@pytest.mark.parametrize("way", ["threads", "coroutines"])
def test_langchain_gives_the_golden_rows(langchain: JinaV4Embeddings, golden: Golden, way: str) -> None:
    async def embed() -> tuple[Any, Any, Any]:
        queries = await asyncio.gather(*map(langchain.aembed_query, TEXTS))
        found = queries, await langchain.aembed_documents(TEXTS), await langchain.aembed_image(PATHS)
        await langchain.aclose()
        return found

    if way == "coroutines":
        found = asyncio.run(embed())
    else:
        found = list(map(langchain.embed_query, TEXTS)), langchain.embed_documents(TEXTS), langchain.embed_image(PATHS)
    for vectors, kind in zip(found, ("query", "passage", "image"), strict=True):
        assert_near(list(map(array, vectors)), rows(golden, kind))


def test_langchain_s_store_finds_texts_and_images(langchain: JinaV4Embeddings, golden: Golden) -> None:
    store = InMemoryVectorStore(langchain)
    store.add_texts(TEXTS)
    for path, vector in zip(PATHS, langchain.embed_image(PATHS), strict=True):
        store.store[path] = {"id": path, "vector": vector, "text": path, "metadata": {}}
    for i, text in enumerate(TEXTS):
        found = store.similarity_search_with_score(text, k=len(NAMES))
        names, scores = ranked(golden, i, "passage", "image")
        assert found[0][0].page_content == names[0] == text
        assert [score for _, score in found] == pytest.approx(scores, abs=10 * BOUND)
    (page,) = store.similarity_search_by_vector(langchain.embed_image([PATHS[3]])[0], k=1)
    assert page.page_content == PATHS[3]

    async def search() -> list[Any]:
        store = await InMemoryVectorStore.afrom_texts(TEXTS, langchain)
        found = await store.asimilarity_search(TEXTS[2], k=1)
        await langchain.aclose()
        return found

    assert asyncio.run(search())[0].page_content == TEXTS[2]


@pytest.mark.parametrize("way", ["threads", "coroutines"])
def test_llama_index_gives_the_golden_rows(llama_index: JinaV4Embedding, golden: Golden, way: str) -> None:
    async def embed() -> tuple[Any, Any, Any]:
        queries = await asyncio.gather(*map(llama_index.aget_query_embedding, TEXTS))
        texts, images = await asyncio.gather(
            llama_index.aget_text_embedding_batch(TEXTS), llama_index.aget_image_embedding_batch(PATHS)
        )
        await llama_index.aclose()
        return queries, texts, images

    if way == "coroutines":
        found = asyncio.run(embed())
    else:
        found = (
            list(map(llama_index.get_query_embedding, TEXTS)),
            llama_index.get_text_embedding_batch(TEXTS),
            llama_index.get_image_embedding_batch(PATHS),
        )
    for vectors, kind in zip(found, ("query", "passage", "image"), strict=True):
        assert_near(list(map(array, vectors)), rows(golden, kind))


def test_llama_index_s_index_of_both_finds_texts_and_images(llama_index: JinaV4Embedding, golden: Golden) -> None:
    images = [ImageNode(image_path=path, metadata={"file_path": path}) for path in PATHS]
    nodes = [*(TextNode(text=text) for text in TEXTS), *images]
    index = MultiModalVectorStoreIndex(nodes, embed_model=llama_index, image_embed_model=llama_index)
    retriever = index.as_retriever(similarity_top_k=len(TEXTS), image_similarity_top_k=len(PATHS))
    for i, text in enumerate(TEXTS):
        found = retriever.retrieve(text)
        texts = [hit for hit in found if not isinstance(hit.node, ImageNode)]
        images = [hit for hit in found if isinstance(hit.node, ImageNode)]
        assert texts[0].node.get_content() == text
        for hits, kind in ((texts, "passage"), (images, "image")):
            names, scores = ranked(golden, i, kind)
            assert len(hits) == len(names)
            assert [hit.score for hit in hits] == pytest.approx(scores, abs=10 * BOUND)
    assert retriever.text_to_image_retrieve(TEXTS[0])[0].node.image_path == ranked(golden, 0, "image")[0][0]

    async def retrieve() -> list[Any]:
        found = await retriever.aretrieve(QueryBundle(TEXTS[0], image_path=PATHS[3]))
        await llama_index.aclose()
        return found

    assert asyncio.run(retrieve())[0].node.get_content() == TEXTS[0]
    (same, *_) = retriever.image_to_image_retrieve(QueryBundle("", image_path=PATHS[3]))
    assert same.node.image_path == PATHS[3]


def test_llama_index_s_simple_store_takes_cut_vectors_and_images_in_memory(wire_server: Server, golden: Golden) -> None:
    embedding = JinaV4Embedding(wire_server.base_url, truncate_dim=128)
    store = SimpleVectorStore()
    index = VectorStoreIndex(
        [TextNode(text=text, id_=str(i)) for i, text in enumerate(TEXTS)],
        embed_model=embedding,
        storage_context=StorageContext.from_defaults(vector_store=store),
    )
    stored = [array(store.data.embedding_dict[str(i)]) for i in range(len(TEXTS))]
    assert_near(stored, [cut(row, 128) for row in rows(golden, "passage")])
    found = index.as_retriever(similarity_top_k=len(TEXTS)).retrieve(TEXTS[3])
    best = np.stack(stored) @ cut(rows(golden, "query")[3], 128)
    assert [hit.node.get_content() for hit in found] == [TEXTS[i] for i in np.argsort(-best)]
    assert found[0].node.get_content() == TEXTS[3]
    node = ImageNode(image=base64.b64encode(IMAGES[0].read_bytes()).decode())
    assert isinstance(node.resolve_image(), io.BytesIO)
    image = array(embedding.get_image_embedding(node.resolve_image()))
    assert_near([image], [cut(rows(golden, "image")[0], 128)])
    embedding.close()
