"""`jina-v4-serve all` with real vLLM: the published vectors on one address, an engine killed and a stop under load.

The tests run in their order, and the last one stops the fleet.
"""

import os
import signal
import time
from collections import Counter
from pathlib import Path

import httpx2
import mteb
import mteb_tasks
import numpy as np
import pytest
from conftest import TASKS, Figure, Golden
from jina_v4_client import EmbeddingsClient
from jina_v4_client.integrations.mteb import JinaV4Encoder
from load import Load
from model_card import (
    check_sentence_transformers,
    check_transformers,
    sentence_transformers_sections,
    transformers_sections,
)
from near import largest_difference
from servers import PATIENCE_S, START_TIMEOUT_S, Server, engines_of
from wire import opened_site

BOUND = 1e-5


def golden_rows_are_right(fleet: Server, golden: Golden, task: str) -> None:
    with EmbeddingsClient(base_url=fleet.base_url, model=f"jina-embeddings-v4-{task}", task=task) as client:
        found = client.encode_text(golden.texts, prompt_name="query")
        found += client.encode_image(golden.images)
    names = [f"query/{i}" for i in range(len(golden.texts))] + [f"image/{i}" for i in range(len(golden.images))]
    difference = largest_difference(found, [golden.rows[f"{task}/{name}/dense"] for name in names])
    print(f"{task}: largest difference of {len(found)} rows {difference:.1e}")
    assert difference <= BOUND


def ready_tasks(fleet: Server) -> dict[str, str]:
    return httpx2.get(f"{fleet.base_url}/ready", timeout=PATIENCE_S).json()["tasks"]


def engine_of(fleet: Server, task: str) -> int:
    """The process id of the engine of a task's server."""
    (engine,) = engines_of(fleet.process.pid, f"jina-embeddings-v4-{task}")
    return engine


@pytest.mark.parametrize("task", TASKS)
def test_one_address_gives_the_published_vectors_of_every_task(fleet: Server, golden: Golden, task: str) -> None:
    golden_rows_are_right(fleet, golden, task)


def test_the_model_cards_examples_run(fleet: Server, golden: Golden) -> None:
    with opened_site({path.name: path.read_bytes() for path in golden.images[:2]}) as site:
        pictures = [f"{site.url}/{path.name}" for path in golden.images[:2]]
        with EmbeddingsClient(base_url=fleet.base_url) as model:
            published = transformers_sections(model, pictures)
            check_transformers(published, dim=256, n_pictures=2)
            found = sentence_transformers_sections(model, pictures)
    check_sentence_transformers(found, published)
    difference = np.abs(published["image_embeddings"][0] - golden.rows["retrieval/image/0/dense"]).max()
    assert difference <= BOUND


def test_mteb_reaches_the_adapter_of_a_tasks_type(fleet: Server) -> None:
    pairs = [(f"left {i}", f"right {i}") for i in range(12)]
    grades = [float(i * 5 % 12) for i in range(12)]
    with JinaV4Encoder(fleet.base_url) as encoder, EmbeddingsClient(fleet.base_url) as client:
        result = mteb.evaluate(encoder, mteb_tasks.sts(pairs, grades), cache=None, show_progress_bar=False)
        left, right = (
            client.encode_text([pair[side] for pair in pairs], "text-matching", return_numpy=True) for side in (0, 1)
        )
    assert result.task_results[0].get_score() == pytest.approx(mteb_tasks.spearman(left, right, grades), abs=1e-5)


def test_one_address_lists_all_servers(fleet: Server) -> None:
    with httpx2.Client(base_url=fleet.base_url, timeout=PATIENCE_S) as client:
        names = [card["id"] for card in client.get("/v1/models").json()["data"]]
        assert {f"jina-embeddings-v4-{task}" for task in TASKS} <= set(names)
        assert client.get("/ready").json() == {"ready": True, "tasks": dict.fromkeys(TASKS, "ready")}
        page = client.get("/metrics").text
        for task in TASKS:
            assert (
                f'vllm:num_requests_running{{engine="0",model_name="jina-embeddings-v4-{task}",task="{task}"}}' in page
            )
        assert set(client.get("/version").json()["servers"]) == set(TASKS)


def test_engines_that_are_killed_and_stopped_under_load_come_back_right(
    fleet: Server, golden: Golden, figure: Figure
) -> None:
    failing = {"code": signal.SIGKILL, "text-matching": signal.SIGSTOP}
    hit = {task: Load(fleet.base_url, task, golden.texts, n_clients=2) for task in failing}
    other = Load(fleet.base_url, "retrieval", golden.texts, n_clients=1, pause_s=0.2)
    with hit["code"], hit["text-matching"], other:
        time.sleep(3)
        for task, sent in failing.items():
            os.kill(engine_of(fleet, task), sent)
        killed = time.monotonic()
        not_ready_s, recovered_s = dict[str, float](), dict[str, float]()
        while len(recovered_s) < len(failing):
            seconds, ready = time.monotonic() - killed, ready_tasks(fleet)
            assert seconds < START_TIMEOUT_S, fleet.tail()
            for task in failing:
                if ready[task] != "ready":
                    not_ready_s.setdefault(task, seconds)
                elif task in not_ready_s:
                    recovered_s.setdefault(task, seconds)
            time.sleep(0.02 if len(not_ready_s) < len(failing) else 0.5)
        time.sleep(2)
    for task, sent in failing.items():
        load = hit[task]
        before = Counter(outcome for begin, end, outcome in load.answers if end < killed)
        flying = Counter(outcome for begin, end, outcome in load.answers if begin < killed <= end)
        figure(
            f"{sent.name} of {task}: not ready after {not_ready_s[task]:.2f} s, ready again after "
            f"{recovered_s[task]:.0f} s; before {dict(before)}, in flight {dict(flying)}, "
            f"after {dict(load.outcomes(after=killed))}"
        )
        assert (f"the {task} server is hung, and is killed" in fleet.log.read_text()) == (sent == signal.SIGSTOP)
        assert set(before) == {"200"}
        assert set(load.outcomes()) <= {"200", "503"}
        assert load.outcomes(after=killed)["200"] > 0
        assert load.wrong == 0
    assert not_ready_s["code"] <= 5
    figure(f"retrieval meanwhile {dict(other.outcomes())}")
    assert set(other.outcomes()) == {"200"}
    assert other.wrong == 0
    for task in TASKS:
        golden_rows_are_right(fleet, golden, task)


def test_a_fleet_told_to_stop_under_load_answers_what_it_accepted(fleet: Server, golden: Golden) -> None:
    loads = [Load(fleet.base_url, task, golden.texts) for task in TASKS]
    with loads[0], loads[1], loads[2]:
        time.sleep(3)
        fleet.process.send_signal(signal.SIGTERM)
        told = time.monotonic()
        code = fleet.process.wait(PATIENCE_S)
        ended_s = time.monotonic() - told
    outcomes = sum((load.outcomes() for load in loads), Counter[str]())
    flying = sum((load.flying(told) for load in loads), Counter[str]())
    print(f"ended after {ended_s:.1f} s; in flight {dict(flying)}, in all {dict(outcomes)}")
    assert code == 0
    assert set(flying) == {"200"}
    # What came later was answered or never accepted: refused, or reset in the closed socket's queue.
    assert set(outcomes) <= {"200", "ConnectError", "ReadError"}
    assert sum(load.wrong for load in loads) == 0
    assert processes_of(fleet) == []


def processes_of(fleet: Server) -> list[str]:
    """Command lines that hold the address of one of the fleet's servers."""
    folder = next(line for line in fleet.log.read_text(errors="replace").splitlines() if " from " in line)
    checkpoints = folder.rpartition(" from ")[2].rpartition("/")[0]
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if checkpoints in line:
            found.append(line)
    return found
