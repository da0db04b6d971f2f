"""The chain of proof: published code = adapters unfolded in plain transformers = the folded checkpoint there."""

from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from conftest import TASKS, Golden
from near import largest_difference
from oracle import Vectors, cut, folded_vectors, oracle_vectors

pytestmark = pytest.mark.proof

BOUND = 1e-5
TEXTS = ["Overview of climate change impacts on coastal cities", "غروب جميل على الشاطئ", "def f(x):\n    return x", ""]


def all_vectors(vectors: Vectors) -> list[np.ndarray]:
    return [*vectors.text_dense, *vectors.text_multi, *vectors.image_dense, *vectors.image_multi]


def reference(golden: Golden, task: str, prompt_name: str) -> list[np.ndarray]:
    rows = golden.rows
    return [
        *(rows[f"{task}/{prompt_name}/{i}/{kind}"] for kind in ("dense", "multi") for i in range(len(golden.texts))),
        *(rows[f"{task}/image/{i}/{kind}"] for kind in ("dense", "multi") for i in range(len(golden.images))),
    ]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("prompt_name", ["query", "passage"])
def test_unfolded_and_folded_give_what_the_published_code_gives(
    task: str, prompt_name: str, golden: Golden, folded: Callable[[str], Path]
) -> None:
    expected = reference(golden, task, prompt_name)
    inputs = (task, golden.texts, golden.images, prompt_name)
    unfolded = all_vectors(oracle_vectors(golden.checkpoint, *inputs))
    made = all_vectors(folded_vectors(folded("float32") / f"jina-embeddings-v4-{task}", *inputs))
    assert len(expected) == 20
    assert largest_difference(unfolded, expected) <= BOUND
    assert largest_difference(made, expected) <= BOUND


@pytest.mark.parametrize("task", TASKS)
def test_cutting_and_truncation_are_those_of_the_published_code(task: str, golden: Golden) -> None:
    whole = oracle_vectors(golden.checkpoint, task, golden.texts[:1]).text_dense[0]
    short = oracle_vectors(golden.checkpoint, task, golden.texts[3:4], max_length=16).text_dense[0]
    expected = [golden.rows[f"{task}/query/0/dense128"], golden.rows[f"{task}/query/3/max16"]]
    assert largest_difference([cut(whole, 128), short], expected) <= BOUND


@pytest.mark.parametrize("task", TASKS)
def test_folding_does_not_change_what_a_standin_computes(
    task: str, tiny: Path, tiny_folded: dict[str, Path], golden: Golden
) -> None:
    unfolded = all_vectors(oracle_vectors(tiny, task, TEXTS, golden.images))
    made = all_vectors(folded_vectors(tiny_folded[task], task, TEXTS, golden.images))
    difference = largest_difference(made, unfolded)
    print(f"largest difference: {difference:.1e}")
    assert difference <= BOUND


def test_the_tasks_of_a_standin_differ_clearly(tiny_folded: dict[str, Path], golden: Golden) -> None:
    vectors = [folded_vectors(folder, task, TEXTS, golden.images) for task, folder in tiny_folded.items()]
    for one, other in combinations(vectors, 2):
        dense = zip([*one.text_dense, *one.image_dense], [*other.text_dense, *other.image_dense], strict=True)
        assert np.max([a @ b for a, b in dense]) < 0.9


def test_the_inputs_of_a_standin_differ_clearly(tiny_folded: dict[str, Path], golden: Golden) -> None:
    vectors = folded_vectors(tiny_folded["code"], "code", TEXTS, golden.images)
    dense = [*vectors.text_dense, *vectors.image_dense]
    assert np.max([a @ b for a, b in combinations(dense, 2)]) < 0.99
