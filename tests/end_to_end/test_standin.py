"""On a stand-in of the real width: a second judge, every Matryoshka size, and what the README shows.

The judge is transformers with the adapters not folded: it shares no code with merge, serve or client.
"""

import contextlib
import io
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import Figure, Golden
from jina_v4_client import EmbeddingsClient
from near import largest_difference
from oracle import oracle_vectors
from servers import BIN, Server, engine_server

TASK = "retrieval"
TEXTS = ["def add(a, b):\n    return a + b", "Add two numbers", "海滩上美丽的日落", ""]
BOUND = 1e-5
ROOT = Path(__file__).parents[2]
PROGRAMS = re.compile(r"```python\n(.*?)```", re.DOTALL)


@pytest.fixture(scope="module")
def standin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("standin") / "base"
    subprocess.run([BIN / "jina-v4-merge", "standin", folder, "--seed", "7"], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def server(standin: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    out = tmp_path_factory.mktemp("merged")
    command = [BIN / "jina-v4-merge", "fold", "--base", standin, "--out", out, "--task", TASK, "--dtype", "float32"]
    subprocess.run(command, check=True, capture_output=True)
    with engine_server(TASK, out / f"jina-embeddings-v4-{TASK}", out / "log") as server:
        server.wait_ready()
        assert "RANDOM weights" in server.log.read_text(errors="replace")
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[EmbeddingsClient]:
    with EmbeddingsClient(base_url=server.base_url, task=TASK) as client:
        yield client


def test_vectors_are_those_of_the_unfolded_model(
    client: EmbeddingsClient, standin: Path, golden: Golden, figure: Figure
) -> None:
    expected = oracle_vectors(standin, TASK, texts=TEXTS, images=golden.images[:2])
    unprompted = oracle_vectors(standin, TASK, texts=TEXTS[:-1], prompt_name=None)
    found = [*client.encode_text(TEXTS), *client.encode_image(golden.images[:2]), *client.encode(TEXTS[:-1])]
    assert {vector.shape for vector in found} == {(2048,)}
    wanted = [*expected.text_dense, *expected.image_dense, *unprompted.text_dense]
    difference = largest_difference(found, wanted)
    figure(f"largest difference {difference:.1e}")
    assert difference <= BOUND


@pytest.mark.parametrize("size", [128, 256, 512, 1024, 2048])
def test_each_matryoshka_size_is_the_beginning_of_the_whole(client: EmbeddingsClient, size: int) -> None:
    whole = client.encode_text(TEXTS[0])
    cut = client.encode_text(TEXTS[0], truncate_dim=size)
    assert cut.shape == (size,)
    np.testing.assert_allclose(cut, whole[:size] / np.linalg.norm(whole[:size]), atol=1e-6)


@pytest.mark.parametrize("program", PROGRAMS.findall((ROOT / "README.md").read_text()), ids=["client", "openai"])
def test_the_readme_prints_what_it_says(server: Server, program: str) -> None:
    expected = re.findall(r"print\(.*\)  # (.*)", program)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(program.replace("http://127.0.0.1:8001", server.base_url), {})  # noqa: S102 - our own README
    assert printed.getvalue().splitlines() == expected
