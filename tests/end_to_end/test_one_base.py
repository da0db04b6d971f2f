"""`jina-v4-serve all --one-base`: the published vectors of every task from one engine, tasks mixed in its batches."""

import asyncio
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from conftest import TASKS, Figure, Golden
from jina_v4_client import AsyncEmbeddingsClient
from near import largest_difference
from numpy.typing import NDArray
from servers import BIN, Server, one_base_server

BOUND = 1e-5
Rows = NDArray[np.float32]


@pytest.fixture(scope="module")
def one_base(one_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("one-base")
    exported = shutil.copytree(one_export, folder / "exported")
    subprocess.run([BIN / "jina-v4-merge", "verify", exported, "--canary"], check=True, capture_output=True)
    with one_base_server(exported, folder / "log") as server:
        yield server


@pytest.fixture(scope="module")
def behind(one_base: Server) -> str:
    """The address of the one server behind the gateway."""
    (url,) = set(re.findall(r"it will answer on (http://\S+)/v1", one_base.log.read_text()))
    return str(url)


def names(golden: Golden, task: str) -> list[str]:
    """The golden inputs of a task, `query/0` and `image/0` among them."""
    texts = [f"{prompt_name}/{i}" for prompt_name in ("query", "passage") for i in range(len(golden.texts))]
    return [f"{task}/{name}" for name in (*texts, *(f"image/{i}" for i in range(len(golden.images))))]


def mixed(golden: Golden) -> list[str]:
    """All golden inputs, tasks in turn."""
    return [name for turn in zip(*(names(golden, task) for task in TASKS), strict=True) for name in turn]


@pytest.mark.parametrize("kind", ["dense", "multi"])
def test_every_task_has_the_published_vectors_with_tasks_mixed(
    one_base: Server, golden: Golden, kind: str, figure: Figure
) -> None:
    async def embed() -> list[Rows]:
        async with AsyncEmbeddingsClient(base_url=one_base.base_url) as client:

            async def one(name: str) -> Rows:
                task, source, number = name.split("/")
                if source == "image":
                    return await client.encode_image(
                        golden.images[int(number)], task, return_multivector=kind == "multi"
                    )
                return await client.encode_text(
                    golden.texts[int(number)], task, prompt_name=source, return_multivector=kind == "multi"
                )

            return await asyncio.gather(*map(one, mixed(golden)))

    found = asyncio.run(embed())
    expected = [golden.rows[f"{name}/{kind}"] for name in mixed(golden)]
    difference = largest_difference(found, expected)
    figure(f"largest difference of {len(found)} {kind} vectors of three tasks {difference:.1e}")
    assert difference <= BOUND


def test_dense_and_multi_vector_of_one_pass_are_the_published_ones(one_base: Server, golden: Golden) -> None:
    async def embed() -> dict[str, Any]:
        async with httpx2.AsyncClient(base_url=one_base.base_url, timeout=120, trust_env=False) as http:

            async def one(task: str) -> Any:
                body = {"task": task, "input": golden.texts, "outputs": ["dense", "multivector"]}
                answer = await http.post("/v1/embeddings", json=body)
                assert answer.headers["x-jina-v4-task"] == task
                return answer.json()["data"]

            return dict(zip(TASKS, await asyncio.gather(*map(one, TASKS)), strict=True))

    for task, items in asyncio.run(embed()).items():
        for i, item in enumerate(items):
            for key, kind in (("embedding", "dense"), ("embeddings", "multi")):
                found = np.array(item[key], np.float32)
                assert np.abs(found - golden.rows[f"{task}/query/{i}/{kind}"]).max() <= BOUND


def test_a_request_without_a_task_or_of_another_is_refused_here_and_behind(one_base: Server, behind: str) -> None:
    messages = {}
    for url in (one_base.base_url, behind):
        with httpx2.Client(base_url=url, timeout=60, trust_env=False) as http:
            bodies: list[dict[str, str]] = [
                {},
                {"model": "jina-embeddings-v4"},
                {"task": "clustering"},
                {"model": "jina-embeddings-v4-clustering"},
                {"task": "code", "model": "jina-embeddings-v4-retrieval"},
            ]
            answers = [http.post("/v1/embeddings", json={"input": "x", **body}) for body in bodies]
            assert [answer.status_code for answer in answers] == [422, 422, 422, 404, 422]
            messages[url] = [answer.json()["error"]["message"] for answer in answers]
            assert http.post("/v1/embeddings", json={"input": "x", "task": "code.nothing"}).status_code == 422
    assert "the request names no task; send task (retrieval, " in messages[behind][0]
    assert messages[one_base.base_url] == messages[behind]


def test_each_answer_names_its_own_task_and_revision(one_base: Server, behind: str) -> None:
    for url in (one_base.base_url, behind):
        with httpx2.Client(base_url=url, timeout=60, trust_env=False) as http:
            listed = http.get("/v1/models")
            assert listed.headers["x-jina-v4-task"] == ", ".join(TASKS)
            revisions = dict(zip(TASKS, listed.headers["x-jina-v4-revision"].split(", "), strict=True))
            assert len(set(revisions.values())) == len(TASKS)
            shown = {card["root"] for card in listed.json()["data"]}
            assert shown == {"jina-embeddings-v4", *(f"jina-embeddings-v4-{task}" for task in TASKS)}
            for task in TASKS:
                for body in ({"task": task}, {"model": f"jina-embeddings-v4-{task}-query"}):
                    answer = http.post("/v1/embeddings", json={"input": "x", **body})
                    assert answer.headers["x-jina-v4-task"] == task
                    assert answer.headers["x-jina-v4-revision"] == revisions[task]


def test_adapters_cannot_be_loaded_or_taken_away(behind: str) -> None:
    with httpx2.Client(base_url=behind, timeout=60, trust_env=False) as http:
        for route in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
            assert http.post(route, json={"lora_name": "jina-embeddings-v4-code", "lora_path": "/"}).status_code == 404


def test_the_gateway_counts_the_one_server_once(one_base: Server, figure: Figure) -> None:
    page = httpx2.get(f"{one_base.base_url}/metrics", timeout=60).text
    served = re.findall(r"^jina_v4_served_info\{(.*)\} 1.0$", page, re.MULTILINE)
    assert [task for task in TASKS for labels in served if f'task="{task}"' in labels] == list(TASKS)
    assert len(re.findall(r"^process_resident_memory_bytes\{", page, re.MULTILINE)) == 1
    distances = re.findall(r'^jina_v4_canary_distance\{task="(\S+)"\} (\S+)$', page, re.MULTILINE)
    assert {task for task, _ in distances} == set(TASKS)
    worst = np.max([float(distance) for _, distance in distances])
    figure(f"1 - cosine of the canaries at most {worst:.1e}")
    assert worst <= BOUND
