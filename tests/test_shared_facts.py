"""The three programs never import one another; the facts that more than one of them needs are held equal here."""

import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
from conftest import TASKS
from jina_v4_client import _images as client_images
from jina_v4_client import _model as client_facts
from jina_v4_client.embed import cli as client_embed
from jina_v4_client.embed import pages as client_pages
from jina_v4_merge import prompts as merge_facts
from jina_v4_merge import quantize as merge_quantize
from jina_v4_merge.verify import reference as merge_reference
from jina_v4_serve import __version__ as serve_version
from jina_v4_serve import checkpoint as serve_checkpoint
from jina_v4_serve import facts as serve_facts
from jina_v4_serve.api import canary as serve_canary
from jina_v4_serve.api import encoded as serve_encoded
from jina_v4_serve.api import images as serve_images
from jina_v4_serve.api import pdf_render as serve_pdf
from jina_v4_serve.api.forms import items as serve_items
from jina_v4_serve.settings import Settings
from tokenizers import Tokenizer
from typer.main import get_command

PROJECTS = ("client", "merge", "serve")


def test_all_packages_have_the_version_of_the_changelog() -> None:
    root = Path(__file__).parents[1]
    projects = {tomllib.loads((root / name / "pyproject.toml").read_text())["project"]["version"] for name in PROJECTS}
    (newest, *_) = re.findall(r"^## (\S+)", (root / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert projects == {newest, serve_version}


def test_all_packages_know_the_same_tasks() -> None:
    assert merge_facts.TASKS == client_facts.TASKS == get_args(client_facts.Task) == TASKS
    assert serve_facts.TASKS == TASKS


@pytest.mark.parametrize("task", TASKS)
def test_all_packages_use_the_same_prefixes(task: client_facts.Task) -> None:
    expected = {name: client_facts.text_prefix(task, name) for name in client_facts.PROMPT_NAMES}
    assert merge_facts.text_prefixes(task) == expected


def test_all_packages_use_the_same_image_prompt(folded: Callable[[str], Path]) -> None:
    checkpoint = folded("float32") / "jina-embeddings-v4-code"
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert manifest["image_prompt"] == merge_facts.IMAGE_PROMPT
    tokens = Tokenizer.from_file(str(checkpoint / "tokenizer.json")).encode(merge_facts.IMAGE_PROMPT).tokens
    before, after = client_facts.IMAGE_FRAME
    assert tokens[before : len(tokens) - after] == ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>"]


def test_all_packages_know_the_same_special_tokens(folded: Callable[[str], Path]) -> None:
    tokenizer = json.loads((folded("float32") / "jina-embeddings-v4-code" / "tokenizer.json").read_text())
    special = {token["content"] for token in tokenizer["added_tokens"] if token["special"]}
    assert set(client_facts.SPECIAL_TOKENS) == special


def test_server_and_client_use_the_same_limits(folded: Callable[[str], Path]) -> None:
    settings = json.loads((folded("float32") / "jina-embeddings-v4-code" / "preprocessor_config.json").read_text())
    assert settings["min_pixels"] == client_facts.MIN_PIXELS
    assert settings["max_pixels"] == client_facts.MAX_PIXELS
    assert client_facts.MAX_LENGTH == serve_facts.MAX_MODEL_LEN
    assert serve_facts.PIXELS_PER_TOKEN == client_facts._PATCH**2


def test_client_and_server_render_pdf_pages_alike() -> None:
    found = (serve_pdf.MAX_PIXELS, serve_pdf.MAX_PNG_BYTES, serve_pdf.SAFE_PIXELS)
    assert found == (client_pages._SERVER_PIXELS, client_pages._SERVER_BYTES, client_pages._SAFE_PIXELS)
    assert found[:2] == (Settings().max_image_pixels, Settings().max_image_bytes)
    ratios = {serve_pdf.MAX_ASPECT_RATIO, serve_images.MAX_ASPECT_RATIO, client_facts.MAX_ASPECT_RATIO}
    assert len(ratios) == 1
    (scale,) = [option for option in get_command(client_embed.app).params if "--pdf-scale" in option.opts]
    assert scale.default == serve_pdf.SCALE


def test_the_manifest_is_the_one_that_the_launcher_reads(folded: Callable[[str], Path]) -> None:
    for task in TASKS:
        found = serve_checkpoint.read_checkpoint(folded("bfloat16") / f"jina-embeddings-v4-{task}", task)
        assert (found.task, found.dtype, found.random_weights) == (task, "bfloat16", False)


def test_merge_and_serve_name_quantized_matrices_alike() -> None:
    assert (
        tuple(merge_quantize.KINDS) == tuple(serve_checkpoint.QUANTIZED_DTYPES) == tuple(serve_canary.QUANTIZED_BOUNDS)
    )
    said = {kind: merge_quantize.quantization_config(kind)["format"] for kind in merge_quantize.KINDS}
    assert said == serve_checkpoint.FORMATS
    assert merge_quantize.scale_name("weight") == f"weight{serve_checkpoint.SCALE}"
    assert merge_reference._BOUNDS == serve_canary.BOUNDS | serve_canary.QUANTIZED_BOUNDS


READERS = [client_images.read_base64, serve_encoded.read_base64]
SPELLINGS = [
    "+/Aa", "-_Aa", "Zm 9v\n", "Zm9v==", "Zm9vYg", "Zm9vYg%3D%3D", "Zm9%76", "Z", "Zm9v!", "Zm=9v", "", "Zm9\u00e9",
]  # fmt: skip


@pytest.mark.parametrize("text", SPELLINGS)
def test_base64_is_read_by_one_rule(text: str) -> None:
    """Server and client each have the reader; what it accepts is tested with the server's."""
    found = []
    for read in READERS:
        try:
            found.append(read(text))
        except ValueError as error:
            found.append(str(error))
    assert found[0] == found[1]


TEXTS = ["data:image/png;base64,A", " DATA:;base64,A", "data: image/*;base64,A", "data:x", "Data: 12 March", "a data:x"]


@pytest.mark.parametrize("text", TEXTS)
def test_a_data_uri_is_known_by_one_rule(text: str) -> None:
    assert client_images.is_data_uri(text) is bool(serve_items._DATA_URI.match(text))
