"""What the published model's card shows runs with another line for the model: here against a played gateway."""

import functools
from typing import Any

import numpy as np
import pytest
from image_files import plain
from model_card import (
    TEXTS,
    check_sentence_transformers,
    check_transformers,
    sentence_transformers_sections,
    transformers_sections,
)
from PIL import Image


@pytest.fixture
def pictures(server: Any) -> list[str]:
    server.play_gateway()
    for number in range(2):
        content = plain((60, 40 + number), (1, 2, number), "JPEG")
        server.routes[f"/beach{number}.jpg"] = functools.partial(lambda content, _: server.answer(content), content)
    return [f"{server.url}/beach{number}.jpg" for number in range(2)]


def test_all_sections_of_the_model_card_run(server: Any, make_client: Any, pictures: list[str]) -> None:
    model = make_client(server.url, task=None)
    if hasattr(model, "client"):
        model.to = lambda *_: model  # the adapter of these tests awaits everything; `to` is no coroutine
    published = transformers_sections(model, pictures)
    check_transformers(published, dim=256, n_pictures=2)
    np.testing.assert_array_equal(published["text_embeddings"], [server.vector(f"Query: {text}") for text in TEXTS])
    found = sentence_transformers_sections(model, pictures)
    np.testing.assert_array_equal(found["text_embeddings"], [server.vector(text) for text in TEXTS])
    check_sentence_transformers(found, published)
    tasks = [body["task"] for body in server.bodies("/v1/embeddings")]
    rest = ["text-matching", "code", "code"]
    assert tasks == ["retrieval"] * 3 + rest + ["retrieval"] * 5 + rest


@pytest.mark.parametrize(
    ("call", "form"),
    [
        pytest.param(lambda model, picture: model.encode_text("a", task="code"), (256,), id="str in, one out"),
        pytest.param(lambda model, picture: model.encode_text(["a"], "code", 64, 4, False, True), (1, 256), id="numpy"),
        pytest.param(
            lambda model, picture: model.encode_text("a", task="code", truncate_dim=128), (128,), id="truncate_dim"
        ),
        pytest.param(lambda model, picture: model.encode_image(picture, task="code"), (256,), id="URL"),
        pytest.param(
            lambda model, picture: model.encode_image(Image.new("RGB", (30, 30)), "code", 4, False, True, 128, 50000),
            (128,),
            id="PIL",
        ),
        pytest.param(
            lambda model, picture: model.encode_image([picture] * 3, task="code", return_numpy=True),
            (3, 256),
            id="URLs",
        ),
    ],
)
def test_every_form_of_a_call_of_the_model_card_works(
    server: Any, make_client: Any, pictures: list[str], call: Any, form: Any
) -> None:
    assert call(make_client(server.url, task=None), pictures[0]).shape == form


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "code", "prompt_name": "x"}, "Invalid prompt_name: x. Must be one of ['query', 'passage']."),
        ({"task": "code", "truncate_dim": 9}, "Invalid truncate_dim: 9. Must be one of [128, 256, 512, 1024, 2048]."),
        ({"task": "x"}, "Invalid task: x. Must be one of ['retrieval', 'text-matching', 'code']."),
    ],
    ids=str,
)
def test_errors_are_those_of_the_published_model(make_client: Any, arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match="Invalid") as caught:
        make_client("http://127.0.0.1:9").encode_text(["a"], **arguments)
    assert str(caught.value) == message
