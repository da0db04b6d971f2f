"""Rankings of a real server against plain numpy over golden rows, and against the client's own MaxSim."""

import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Golden
from jina_v4_client import EmbeddingsClient
from jina_v4_client.scoring import maxsim
from servers import Server
from sklearn.metrics import ndcg_score
from wire import BOUND, IMAGES_BASE64, MAX_LENGTH, TASK, TEXTS, Site, Wire

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/rerank.md").read_text()
PICTURES = [{"image": image} for image in IMAGES_BASE64]
DOCUMENTS: list[Any] = [*TEXTS, *PICTURES]
DOCUMENT_ROWS = [f"passage/{i}" for i in range(len(TEXTS))] + [f"image/{i}" for i in range(len(PICTURES))]
QUERIES: list[Any] = [*TEXTS, *PICTURES]
QUERY_ROWS = [f"query/{i}" for i in range(len(TEXTS))] + [f"image/{i}" for i in range(len(PICTURES))]
KINDS = {"multivector": "multi", "dense": "dense"}


def ask(wire: Wire, path: str, body: dict[str, Any]) -> Any:
    answer = wire.http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def expected_scores(golden: Golden, query: str, documents: list[str], by: str) -> Any:
    """Plain numpy: of each row of the query the best inner product, and their mean; one row is the cosine."""
    rows = [np.atleast_2d(golden.rows[f"{TASK}/{name}/{KINDS[by]}"]).astype(np.float64) for name in (query, *documents)]
    return np.array([(rows[0] @ document.T).max(axis=1).mean() for document in rows[1:]])


@pytest.mark.parametrize("by", KINDS)
@pytest.mark.parametrize("place", range(len(QUERIES)), ids=QUERY_ROWS)
def test_texts_and_images_rank_as_their_golden_rows_do(place: int, by: str, wire: Wire, golden: Golden) -> None:
    expected = expected_scores(golden, QUERY_ROWS[place], DOCUMENT_ROWS, by)
    order = np.argsort(-expected, kind="stable")
    assert np.abs(np.diff(expected[order])).min() > 10 * BOUND, "the order is beyond doubt"
    body = {"query": QUERIES[place], "documents": DOCUMENTS, "by": by}
    for path in ("/v1/rerank", "/v2/rerank"):
        results = ask(wire, path, body)["results"]
        assert [result["index"] for result in results] == order.tolist()
        found = np.array([result["relevance_score"] for result in results])
        print(f"largest difference: {np.abs(found - expected[order]).max():.1e}")
        assert np.abs(found - expected[order]).max() <= BOUND
    scores = ask(wire, "/v1/score", {"text_1": QUERIES[place], "text_2": DOCUMENTS, "by": by})["data"]
    assert [item["index"] for item in scores] == list(range(len(DOCUMENTS)))
    assert np.abs(np.array([item["score"] for item in scores]) - expected).max() <= BOUND


def test_maxsim_is_what_a_ranking_is_by(wire: Wire) -> None:
    plain = ask(wire, "/v1/rerank", {"query": TEXTS[0], "documents": DOCUMENTS})
    named = ask(wire, "/v1/rerank", {"query": TEXTS[0], "documents": DOCUMENTS, "by": "multivector"})
    assert [result["index"] for result in plain["results"]] == [result["index"] for result in named["results"]]
    dense = ask(wire, "/v1/rerank", {"query": TEXTS[0], "documents": DOCUMENTS, "by": "dense"})
    assert plain["results"][0]["relevance_score"] != pytest.approx(dense["results"][0]["relevance_score"], abs=0.01)


def test_pairs_each_have_a_query_of_their_own(wire: Wire, golden: Golden) -> None:
    body = {"queries": QUERIES, "documents": DOCUMENTS[::-1]}
    found = [item["score"] for item in ask(wire, "/v1/score", body)["data"]]
    expected = [
        expected_scores(golden, query, [document], "multivector")[0]
        for query, document in zip(QUERY_ROWS, DOCUMENT_ROWS[::-1], strict=True)
    ]
    assert np.abs(np.array(found) - expected).max() <= BOUND


def test_items_in_every_spelling_rank_alike(wire: Wire, pictures: Site) -> None:
    uri = f"data:image/png;base64,{IMAGES_BASE64[0]}"
    spellings: list[Any] = [
        {"image": IMAGES_BASE64[0]},
        uri,
        {"image": uri},
        {"content": [{"type": "image_url", "image_url": {"url": uri}}]},
        {"image": f"{pictures.url}/{golden_name(0)}"},
    ]
    found = ask(wire, "/v1/score", {"text_1": TEXTS[0], "text_2": spellings})["data"]
    scores = [item["score"] for item in found]
    assert max(scores) - min(scores) <= BOUND
    texts = [TEXTS[1], {"text": TEXTS[1]}, {"content": [{"type": "text", "text": TEXTS[1]}]}]
    scores = [item["score"] for item in ask(wire, "/v1/score", {"text_1": TEXTS[0], "text_2": texts})["data"]]
    assert max(scores) - min(scores) <= BOUND


def golden_name(number: int) -> str:
    return sorted(path.name for path in (ROOT / "tests/golden/img").glob("*.png"))[number]


def test_documents_that_come_twice_have_one_score_and_are_both_returned(wire: Wire) -> None:
    body = {"query": TEXTS[0], "documents": [TEXTS[1], TEXTS[0], TEXTS[1], TEXTS[0]]}
    results = ask(wire, "/v1/rerank", body)["results"]
    assert [{result["index"] for result in pair} for pair in (results[:2], results[2:])] == [{1, 3}, {0, 2}]
    for first, second in (results[:2], results[2:]):
        assert first["relevance_score"] == pytest.approx(second["relevance_score"], abs=BOUND)


@pytest.mark.parametrize(("top_n", "n_results"), [(1, 1), (3, 3), (len(DOCUMENTS), len(DOCUMENTS)), (1000, None)])
def test_top_n_are_the_first_of_all(top_n: int, n_results: int | None, wire: Wire) -> None:
    body = {"query": TEXTS[0], "documents": DOCUMENTS, "return_documents": False}
    whole = [result["index"] for result in ask(wire, "/v1/rerank", body)["results"]]
    some = [result["index"] for result in ask(wire, "/v1/rerank", body | {"top_n": top_n})["results"]]
    assert some == whole[: n_results or len(DOCUMENTS)]


def test_long_queries_and_documents_are_cut_where_that_is_asked_for(wire: Wire, golden: Golden) -> None:
    body = {"query": TEXTS[3], "documents": [TEXTS[1]], "by": "dense", "max_tokens_per_query": 16}
    (result,) = ask(wire, "/v1/rerank", body)["results"]
    expected = float(golden.rows[f"{TASK}/query/3/max16"] @ golden.rows[f"{TASK}/passage/1/dense"])
    assert result["relevance_score"] == pytest.approx(expected, abs=BOUND)
    usage = ask(wire, "/v1/rerank", {"query": "x", "documents": ["a b " * 10_000], "truncate": True})["usage"]
    assert usage["total_tokens"] == MAX_LENGTH + len(golden.rows[f"{TASK}/query/5/multi"])
    usage = ask(wire, "/v1/rerank", {"query": "x", "documents": ["a b " * 10_000], "max_tokens_per_doc": 20})["usage"]
    assert usage["total_tokens"] == 20 + len(golden.rows[f"{TASK}/query/5/multi"])


SUBJECTS = {
    "river": ["water", "fish", "boat", "bridge", "flood", "current"],
    "money": ["loan", "price", "interest", "bank", "tax", "market"],
    "forest": ["tree", "leaf", "wolf", "moss", "shade", "timber"],
    "train": ["ticket", "rail", "station", "engine", "carriage", "delay"],
    "kitchen": ["bread", "oven", "salt", "knife", "soup", "recipe"],
}


def made_up() -> tuple[list[str], list[str], np.ndarray]:
    """Queries, documents, and how relevant each is: by the words that they share, 0 to 3."""
    random = np.random.default_rng(5)
    words = {subject: [subject, *others] for subject, others in SUBJECTS.items()}
    documents, of_subject = [], []
    for subject in SUBJECTS:
        for _ in range(6):
            other = str(random.choice([name for name in SUBJECTS if name != subject]))
            chosen = [*random.choice(words[subject], 5, replace=False), *random.choice(words[other], 3, replace=False)]
            documents.append(" ".join(random.permutation(chosen)))
            of_subject.append(subject)
    queries = [" ".join(random.choice(words[subject], 3, replace=False)) for subject in SUBJECTS for _ in range(2)]
    shared = [[len(set(query.split()) & set(text.split())) for text in documents] for query in queries]
    return queries, documents, np.array(shared)  # (n_queries, n_documents)


def test_ndcg_is_that_of_the_client_s_maxsim(wire: Wire, wire_server: Server) -> None:
    queries, documents, relevance = made_up()
    with EmbeddingsClient(wire_server.base_url, task=TASK) as client:
        of_documents = client.encode_text(documents, prompt_name="passage", return_multivector=True)
        of_queries = client.encode_text(queries, prompt_name="query", return_multivector=True)
    sums = maxsim(of_queries, of_documents)  # (n_queries, n_documents)
    by_client = sums / np.array([len(rows) for rows in of_queries])[:, None]
    by_server = np.zeros_like(by_client)
    for i, query in enumerate(queries):
        for result in ask(wire, "/v1/rerank", {"query": query, "documents": documents})["results"]:
            by_server[i, result["index"]] = result["relevance_score"]
    print(f"largest difference: {np.abs(by_server - by_client).max():.1e}")
    assert np.abs(by_server - by_client).max() <= BOUND
    server, client_s = ndcg_score(relevance, by_server, k=10), ndcg_score(relevance, by_client, k=10)
    print(f"nDCG@10: {server:.4f} by rerank, {client_s:.4f} by the client")
    assert server == pytest.approx(client_s, abs=1e-9)
    assert 0.3 < server < 1


def test_no_multi_vector_leaves_the_server_and_usage_counts_both_sides(wire: Wire, golden: Golden) -> None:
    answer = wire.http.post("/v1/rerank", json={"query": TEXTS[0], "documents": PICTURES})
    assert len(answer.content) < 1000
    rows = ["query/0", *DOCUMENT_ROWS[len(TEXTS) :]]
    n_tokens = sum(len(golden.rows[f"{TASK}/{name}/multi"]) for name in rows)
    assert answer.json()["usage"] == {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
    assert answer.headers["x-jina-v4-prompt"] == "query, image"
    units = ask(wire, "/v2/rerank", {"query": TEXTS[0], "documents": PICTURES})["meta"]["billed_units"]
    assert sum(units.values()) == n_tokens


def test_the_page_s_commands_run(wire: Wire, tmp_path: Path) -> None:
    commands = re.findall(r"```console\n\$ (.*?)```", PAGE, re.DOTALL)
    assert commands
    for command in commands:
        local = command.replace("http://127.0.0.1:8001", wire.base_url)
        assert local != command
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", local.replace("curl", "curl --silent --fail-with-body --noproxy '*'")],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert '"score' in done.stdout or "relevance_score" in done.stdout
