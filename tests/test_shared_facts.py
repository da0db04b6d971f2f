"""The three programs never import one another; the facts that more than one of them needs are held equal here."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
from conftest import TASKS
from jina_v4_client import _model as client_facts
from jina_v4_merge import prompts as merge_facts
from jina_v4_serve import checkpoint as serve_checkpoint
from jina_v4_serve import cli, launcher


def test_tasks() -> None:
    assert merge_facts.TASKS == client_facts.TASKS == get_args(client_facts.Task) == TASKS
    assert tuple(task.value for task in cli.Task) == tuple(launcher.PORTS) == TASKS


@pytest.mark.parametrize("task", TASKS)
def test_prefixes(task: client_facts.Task) -> None:
    expected = {name: client_facts.text_prefix(task, name) for name in client_facts.PROMPT_NAMES}
    assert merge_facts.text_prefixes(task) == expected


def test_the_image_prompt(folded: Callable[[str], Path]) -> None:
    assert f"{client_facts.IMAGE_HEAD}<|image_pad|>{client_facts.IMAGE_TAIL}" == merge_facts.IMAGE_PROMPT
    manifest = json.loads((folded("float32") / "jina-embeddings-v4-code" / "manifest.json").read_text())
    assert manifest["image_prompt"] == merge_facts.IMAGE_PROMPT


def test_limits(folded: Callable[[str], Path]) -> None:
    settings = json.loads((folded("float32") / "jina-embeddings-v4-code" / "preprocessor_config.json").read_text())
    assert client_facts.MIN_PIXELS == launcher.MIN_PIXELS == settings["min_pixels"]
    assert settings["max_pixels"] == client_facts.MAX_PIXELS
    assert client_facts.MAX_LENGTH == launcher.MAX_MODEL_LEN
    assert serve_checkpoint.PIXELS_PER_TOKEN == client_facts._PATCH**2


def test_the_manifest_is_the_one_that_the_launcher_reads(folded: Callable[[str], Path]) -> None:
    for task in TASKS:
        found = serve_checkpoint.read_checkpoint(folded("bfloat16") / f"jina-embeddings-v4-{task}", task)
        assert (found.task, found.dtype, found.random_weights) == (task, "bfloat16", False)
