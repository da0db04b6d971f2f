"""Multi-vectors: sent by a server of ours, made with the checkpoint's projector from a stock vLLM's hidden states."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jina_v4_client import ArgumentError, EmbeddingsClient, WrongServerError
from PIL import Image
from safetensors.numpy import save
from safetensors.numpy import save_file as save_tensors

PICTURE = Image.new("RGB", (280, 140), (10, 200, 30))
N_PICTURE_TOKENS = 50
RANDOM = np.random.default_rng(3)
WEIGHT = RANDOM.standard_normal((128, 256)).astype(np.float32)
BIAS = RANDOM.standard_normal(128).astype(np.float32)
NAME = "multi_vector_projector.safetensors"


def tensors_of(weight: np.ndarray = WEIGHT, bias: np.ndarray = BIAS) -> dict[str, np.ndarray]:
    return {"multi_vector_projector.weight": weight, "multi_vector_projector.bias": bias}


def projected(rows: np.ndarray) -> np.ndarray:
    out = rows.astype(float) @ WEIGHT.astype(float).T + BIAS
    return out / np.linalg.norm(out, axis=1, keepdims=True)


@pytest.fixture
def projector(tmp_path: Path) -> Path:
    save_tensors(tensors_of(), tmp_path / NAME)
    return tmp_path / NAME


# --- a server of ours ---


@pytest.mark.parametrize("return_numpy", [False, True])
def test_ours_is_asked_for_a_row_a_token(server: Any, client: EmbeddingsClient, return_numpy: bool) -> None:
    server.play_ours()
    found = client.encode_text(
        ["one", "two words", "and three words"],
        batch_size=2,
        return_multivector=True,
        return_numpy=return_numpy,
        truncate_dim=256,
    )
    first, _ = server.bodies("/v1/embeddings")
    assert first["outputs"] == ["multivector"]
    assert "dimensions" not in first
    assert isinstance(found, list)
    assert [rows.shape for rows in found] == [(2, 128), (3, 128), (4, 128)]
    for rows, text in zip(found, ["one", "two words", "and three words"], strict=True):
        assert (rows.dtype, rows.flags.writeable, rows.base) == (np.float32, True, None)
        np.testing.assert_array_equal(rows, server.token_rows(f"Query: {text}"))


def test_one_item_gives_one_array(server: Any, client: EmbeddingsClient) -> None:
    server.play_ours()
    assert client.encode_text("one", return_multivector=True, return_numpy=True).shape == (2, 128)
    assert client.encode_image(PICTURE, return_multivector=True).shape == (1, 128)
    assert [body["outputs"] for body in server.bodies("/v1/embeddings")] == [["multivector"]] * 2


def test_rows_sent_as_float16_are_given_as_float32_of_unit_length(server: Any) -> None:
    server.play_ours()
    with EmbeddingsClient(server.url, task="retrieval", wire_dtype="float16") as client:
        rows = client.encode_text("a few words", return_multivector=True)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows.astype(float), axis=1), 1, atol=1e-7)
    np.testing.assert_allclose(rows, server.token_rows("Query: a few words"), atol=3e-4)


def test_ours_needs_no_projector_and_leaves_one_alone(server: Any, projector: Path) -> None:
    server.play_ours()
    with EmbeddingsClient(server.url, task="retrieval", projector=projector) as client:
        rows = client.encode_text("one", return_multivector=True)
    np.testing.assert_array_equal(rows, server.token_rows("Query: one"))


# --- a stock vLLM ---


@pytest.mark.parametrize("form", [str, Path])
def test_a_stock_servers_rows_are_projected_here(server: Any, projector: Path, form: Any) -> None:
    server.play_stock()
    texts = ["one", "and two more"]
    with EmbeddingsClient(server.url, task="retrieval", projector=form(projector)) as client:
        found = client.encode_text(texts, return_multivector=True, truncate_dim=128, prompt_name="passage")
        dense = client.encode_text(texts[0])
    assert dense.shape == (256,)
    for rows, text in zip(found, texts, strict=True):
        assert rows.dtype == np.float32
        np.testing.assert_allclose(rows, projected(server.text_rows(f"Passage: {text}")), atol=1e-6)


def test_all_of_an_images_prompt_is_projected(server: Any, projector: Path) -> None:
    hidden = server.image_rows(N_PICTURE_TOKENS)
    server.play_stock(rows_of=lambda _: hidden)
    with EmbeddingsClient(server.url, task="retrieval", projector=projector) as client:
        (rows,) = client.encode_image([PICTURE], return_multivector=True)
    assert rows.shape == (N_PICTURE_TOKENS + 11, 128)
    np.testing.assert_allclose(rows, projected(hidden), atol=1e-6)


def test_an_image_prompt_of_another_length_gives_no_rows(server: Any, projector: Path) -> None:
    server.play_stock(rows_of=lambda _: server.image_rows(N_PICTURE_TOKENS + 21))
    with (
        EmbeddingsClient(server.url, task="retrieval", projector=projector) as client,
        pytest.raises(WrongServerError, match="its chat template or its pixel limits differ"),
    ):
        client.encode_image(PICTURE, return_multivector=True)


def test_without_a_projector_the_file_to_give_is_named_and_nothing_is_embedded(
    server: Any, client: EmbeddingsClient
) -> None:
    server.play_stock()
    calls = (client.encode_text, "a"), (client.encode_image, PICTURE)
    for call, item in calls:
        with pytest.raises(ArgumentError, match=rf"projector='\.\.\./jina-embeddings-v4-retrieval/{NAME}'"):
            call(item, return_multivector=True)
    assert server.paths() == ["/v1/models"]


def test_the_projector_of_another_task_is_refused(server: Any, projector: Path) -> None:
    projector.with_name("manifest.json").write_text(json.dumps({"task": "code"}))
    server.play_stock()
    with (
        EmbeddingsClient(server.url, task="retrieval", projector=projector) as client,
        pytest.raises(ArgumentError, match="is of the task 'code', as the manifest beside it says"),
    ):
        client.encode_text("a", return_multivector=True)
    assert server.paths() == ["/v1/models"]


@pytest.mark.parametrize("manifest", ["", "[]", '{"task": "retrieval"}', '{"task": 7}'])
def test_a_manifest_that_says_no_other_task_does_no_harm(server: Any, projector: Path, manifest: str) -> None:
    projector.with_name("manifest.json").write_text(manifest)
    server.play_stock()
    with EmbeddingsClient(server.url, task="retrieval", projector=projector) as client:
        assert client.encode_text("a", return_multivector=True).shape == (2, 128)


def test_the_projector_of_another_model_is_refused(server: Any, tmp_path: Path) -> None:
    save_tensors(tensors_of(WEIGHT[:, :64].copy()), tmp_path / NAME)
    server.play_stock()
    with (
        EmbeddingsClient(server.url, task="retrieval", projector=tmp_path / NAME) as client,
        pytest.raises(WrongServerError, match=r"have 256 numbers and projector=.* takes 64"),
    ):
        client.encode_text("a", return_multivector=True)


def bfloat16_file() -> bytes:
    """The tensors as most checkpoints keep them: the upper halves of float32."""
    content = save({name: (tensor.view(np.uint32) >> 16).astype(np.uint16) for name, tensor in tensors_of().items()})
    n_head = int.from_bytes(content[:8], "little")
    head = content[8 : 8 + n_head].replace(b'"U16"', b'"BF16"')
    return len(head).to_bytes(8, "little") + head + content[8 + n_head :]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("F32", 1e-6), ("F16", 1e-2), ("BF16", 1e-1)], ids=["float32", "float16", "bfloat16"]
)
def test_a_projector_of_every_dtype_is_read(server: Any, tmp_path: Path, dtype: str, tolerance: float) -> None:
    path = tmp_path / NAME
    if dtype == "BF16":
        path.write_bytes(bfloat16_file())
    else:
        save_tensors({name: t.astype({"F32": "f4", "F16": "f2"}[dtype]) for name, t in tensors_of().items()}, path)
    server.play_stock()
    with EmbeddingsClient(server.url, task="retrieval", projector=path) as client:
        rows = client.encode_text("a few words", return_multivector=True)
    np.testing.assert_allclose(rows, projected(server.text_rows("Query: a few words")), atol=tolerance)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        pytest.param(lambda path: None, f"is no {NAME}; give the path of", id="no file"),
        pytest.param(lambda path: path.mkdir(), f"is no {NAME}; give the path of", id="folder"),
        pytest.param(lambda path: path.write_bytes(b""), "cannot be read", id="empty"),
        pytest.param(lambda path: path.write_bytes(save(tensors_of())[:-9]), "cannot be read", id="truncated"),
        pytest.param(lambda path: path.write_bytes(b"version https://git-lfs"), "cannot be read", id="LFS pointer"),
        pytest.param(lambda path: path.write_bytes(bytes(2**26 + 1)), f"is no {NAME}", id="large"),
        pytest.param(lambda path: save_tensors({"x": BIAS}, path), "does not hold multi_vector", id="other tensors"),
        pytest.param(
            lambda path: save_tensors({**tensors_of(), "x": BIAS}, path), "does not hold multi_vector", id="more"
        ),
        pytest.param(lambda path: save_tensors(tensors_of(BIAS), path), "shape or dtype", id="flat weight"),
        pytest.param(lambda path: save_tensors(tensors_of(WEIGHT[:64]), path), "shape or dtype", id="64 rows"),
        pytest.param(lambda path: save_tensors(tensors_of(WEIGHT.astype(int)), path), "shape or dtype", id="integers"),
        pytest.param(lambda path: save_tensors(tensors_of(bias=BIAS[:64]), path), "a bias that is", id="short bias"),
        pytest.param(lambda path: save_tensors(tensors_of(bias=BIAS * np.nan), path), "has NaN", id="NaN"),
    ],
)
def test_a_projector_that_cannot_be_used_is_refused_when_the_client_is_made(
    tmp_path: Path, write: Callable[[Path], object], message: str
) -> None:
    path = tmp_path / NAME
    write(path)
    with pytest.raises(ArgumentError, match=message) as caught:
        EmbeddingsClient("http://127.0.0.1:9", projector=path)
    assert NAME in str(caught.value)


def test_a_projector_is_a_path() -> None:
    with pytest.raises(ArgumentError, match=f"projector must be the path of a {NAME}, not int"):
        EmbeddingsClient("http://127.0.0.1:9", projector=7)  # type: ignore[arg-type]
