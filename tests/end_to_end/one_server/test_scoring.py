"""Scoring of what a real server gives: its bits are ours, and the rows of an image are its patches in their places."""

import base64

import numpy as np
from conftest import Figure
from image_files import written
from jina_v4_client import EmbeddingsClient
from jina_v4_client.quantization import BinaryVectors, hamming, quantize_binary, quantize_int8
from jina_v4_client.scoring import best, image_grid, maxsim, rank, similarity_map
from jina_v4_client.token_pooling import pool_tokens
from PIL import Image
from servers import Server
from wire import TASK, TEXTS, Wire

TOP = 10
WORDS = [
    "river", "bank", "money", "loan", "water", "fish", "boat", "bridge", "city", "train", "ticket", "price", "tree",
    "wall",
]  # fmt: skip


def test_the_server_s_bits_are_ours(wire_server: Server, wire: Wire) -> None:
    with EmbeddingsClient(wire_server.base_url, task=TASK) as client:
        vectors = client.encode_text(TEXTS, return_numpy=True)
    for encoding, dtype, less in (("ubinary", np.uint8, 0), ("binary", np.int8, 128)):
        answer = wire.ask({"input": TEXTS, "task": "retrieval.query", "embedding_type": encoding})
        codes = np.array([item["embedding"] for item in answer["data"]], dtype=dtype)
        restored = BinaryVectors((codes.astype(np.int16) + less).astype(np.uint8))
        assert restored.dim == vectors.shape[1]
        np.testing.assert_array_equal(restored.codes, quantize_binary(vectors).codes)
    assert (np.diag(hamming(restored.codes, quantize_binary(vectors).codes)) == 0).all()


def test_the_rows_of_an_image_are_its_patches_in_their_places(wire_server: Server) -> None:
    rows, columns = grid = (4, 7)
    grey = np.full((28 * rows, 28 * columns, 3), 128, dtype=np.uint8)
    places = [(0, 0), (0, 6), (2, 3), (3, 0), (3, 6)]
    pictures = [Image.fromarray(grey)]
    for row, column in places:
        changed = grey.copy()
        changed[28 * row : 28 * (row + 1), 28 * column : 28 * (column + 1)] = (250, 10, 10)
        pictures.append(Image.fromarray(changed))
    assert image_grid(*pictures[0].size) == grid
    with EmbeddingsClient(wire_server.base_url, task=TASK) as client:
        plain, *others = client.encode_image([png(picture) for picture in pictures], return_multivector=True)
    for other, place in zip(others, places, strict=True):
        # How like itself each row stays: the patch that was painted over changes the most.
        kept = similarity_map(plain, other, grid)[4 : 4 + rows * columns].reshape(rows, columns, rows, columns)
        itself = np.einsum("ijij->ij", kept)
        assert np.unravel_index(itself.argmin(), itself.shape) == place


def test_what_a_search_in_a_server_s_rows_loses(wire_server: Server, figure: Figure) -> None:
    """Random weights: it shows that all of it runs on rows of a server, and little of what real rows would lose."""
    random = np.random.default_rng(6)
    texts = [" ".join(random.choice(WORDS, random.integers(8, 40))) for _ in range(200)]
    asked = [" ".join(text.split()[:6]) for text in texts[:30]]
    with EmbeddingsClient(wire_server.base_url, task=TASK) as client:
        documents = client.encode_text(texts, return_multivector=True, prompt_name="passage", batch_size=64)
        queries = client.encode_text(asked, return_multivector=True, batch_size=64)
    exact = [set(best(scores, TOP).tolist()) for scores in maxsim(queries, documents)]
    assert [hit.index for hit in rank(queries[0], documents, TOP)] == best(
        maxsim(queries[0], documents)[0], TOP
    ).tolist()
    for name, stored in {
        "int8": quantize_int8(documents),
        "binary": quantize_binary(documents),
        "pooled 2": pool_tokens(documents, 2),
        "pooled 4": pool_tokens(documents, 4),
    }.items():
        found = [set(best(scores, TOP).tolist()) for scores in maxsim(queries, stored)]
        recall = np.mean([len(a & b) / TOP for a, b in zip(found, exact, strict=True)])
        figure(f"random weights, multi-vector, {name:<8} recall@10 {recall:.3f}")
        assert recall > (0.9 if name == "int8" else 0.05)


def png(picture: Image.Image) -> str:
    return "data:image/png;base64," + base64.b64encode(written(picture)).decode()
