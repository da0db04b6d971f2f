"""How vLLM cuts the work must not show: prompts over many scheduling steps, batches of any make-up."""

import re
import shutil
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import Figure, Golden
from jina_v4_client import EmbeddingsClient
from near import largest_difference
from servers import Server, engine_server

pytestmark = pytest.mark.long

BOUND = 1e-5
LONG_STEP = 4096  # tokens; with so many a server measures how fast its engine is


@pytest.fixture(scope="module")
def long_steps(folded: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose step is longer than a CPU's own."""
    log = tmp_path_factory.mktemp("whole") / "log"
    options = [f"--max-num-batched-tokens={LONG_STEP}"]
    with engine_server("retrieval", folded("float32") / "jina-embeddings-v4-retrieval", log, *options) as server:
        server.wait_ready()
        yield server


@pytest.fixture(scope="module")
def whole(long_steps: Server) -> Iterator[EmbeddingsClient]:
    """A client of a server that takes every prompt of these tests in one step."""
    with EmbeddingsClient(base_url=long_steps.base_url) as client:
        yield client


@pytest.fixture(scope="module", params=["budget of 64 tokens a step", "64 tokens of a prompt a step, compiled"])
def stepwise(
    request: pytest.FixtureRequest, folded: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EmbeddingsClient]:
    """A server that takes at most 64 tokens of a prompt a step: in all, or with other prompts' tokens beside them."""
    options = {
        "budget of 64 tokens a step": ["--max-num-batched-tokens=64", "--max-num-seqs=64"],
        "64 tokens of a prompt a step, compiled": [
            "--max-num-batched-tokens=512",
            "--long-prefill-token-threshold=64",
            "--no-enforce-eager",
        ],
    }[request.param]
    if "compiled" in request.param and shutil.which("g++") is None:
        pytest.skip("vLLM compiles with g++ on a CPU, and there is none")
    log = tmp_path_factory.mktemp("stepwise") / "log"
    with engine_server("retrieval", folded("float32") / "jina-embeddings-v4-retrieval", log, *options) as server:
        server.wait_ready()
        with EmbeddingsClient(base_url=server.base_url) as client:
            yield client


def test_a_server_takes_in_what_it_has_measured_that_it_computes(long_steps: Server, figure: Figure) -> None:
    with urllib.request.urlopen(f"{long_steps.base_url}/metrics") as page:  # noqa: S310 - our own
        text = page.read().decode()
    (limit,) = re.findall(r"^jina_v4_max_in_flight_tokens\S* (\S+)$", text, re.MULTILINE)
    figure(f"{float(limit):,.0f} tokens")
    assert 2 * 32768 <= float(limit) <= 32 * LONG_STEP


def test_a_text_and_an_image_over_many_steps_have_the_vectors_of_one_step(
    whole: EmbeddingsClient, stepwise: EmbeddingsClient, golden: Golden, figure: Figure
) -> None:
    text, page = golden.texts[3], golden.images[2]  # 459 and 747 tokens: 8 and 12 steps
    for call, item in ((EmbeddingsClient.encode_text, text), (EmbeddingsClient.encode_image, page)):
        difference = np.abs(call(stepwise, item, task="retrieval") - call(whole, item, task="retrieval")).max()
        figure(f"largest difference {difference:.1e}")
        assert difference <= BOUND


def test_texts_and_images_at_once_over_many_steps_have_the_published_vectors(
    stepwise: EmbeddingsClient, golden: Golden, figure: Figure
) -> None:
    """Requests of all lengths in flight together: vLLM mixes their steps."""

    def embed(index: int) -> tuple[str, np.ndarray]:
        i = index % 10
        if i < len(golden.texts):
            return f"retrieval/query/{i}/dense", stepwise.encode_text(golden.texts[i], task="retrieval")
        i -= len(golden.texts)
        return f"retrieval/image/{i}/dense", stepwise.encode_image(golden.images[i], task="retrieval")

    with ThreadPoolExecutor(12) as pool:
        results = list(pool.map(embed, range(60)))
    difference = largest_difference((vector for _, vector in results), (golden.rows[name] for name, _ in results))
    figure(f"largest difference {difference:.1e}")
    assert difference <= BOUND


def test_a_batch_equals_its_items_one_by_one(whole: EmbeddingsClient, golden: Golden, figure: Figure) -> None:
    texts = golden.texts * 5
    batch = whole.encode_text(texts, task="retrieval", batch_size=len(texts))
    singles = [whole.encode_text(text, task="retrieval") for text in texts]
    images = golden.images * 3
    batch += whole.encode_image(images, task="retrieval", batch_size=len(images))
    singles += [whole.encode_image(image, task="retrieval") for image in images]
    difference = largest_difference(batch, singles)
    figure(f"largest difference {difference:.1e}")
    assert difference <= BOUND


def test_requests_of_one_step_may_have_different_dimensions(whole: EmbeddingsClient, golden: Golden) -> None:
    def embed(index: int) -> np.ndarray:
        return whole.encode_text(golden.texts[0], task="retrieval", truncate_dim=128 if index % 2 else None)

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(embed, range(32)))
    for index, vector in enumerate(results):
        expected = golden.rows["retrieval/query/0/dense128" if index % 2 else "retrieval/query/0/dense"]
        assert np.abs(vector - expected).max() <= BOUND
