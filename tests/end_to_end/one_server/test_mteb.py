"""mteb against a real server: what it scores are the published vectors, and its figures are those of plain numpy."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mteb
import mteb_tasks
import numpy as np
import pytest
from conftest import Figure, Golden
from jina_v4_client import EmbeddingsClient
from jina_v4_client.integrations.mteb import JinaV4Encoder
from PIL import Image
from servers import Server
from wire import BOUND, IMAGES, TASK, TEXTS

# mteb strips what surrounds a document, so the golden text that ends with a space would be another one.
GOLDEN_TEXTS = {f"golden {i}": text for i, text in enumerate(TEXTS) if text == text.strip()}
QUERIES = GOLDEN_TEXTS | {f"query {i}": f"what is said about {word}" for i, word in enumerate(("ships", "tea", "rain"))}
DOCUMENTS = GOLDEN_TEXTS | {
    f"note {i}": f"{opening} {word}, number {i}."
    for i, (opening, word) in enumerate(
        (opening, word)
        for opening in ("A note on", "Nothing more was found about", "Old letters tell of")
        for word in ("ships", "tea", "rain", "bridges", "music")
    )
}
LATE_BOUND = 10 * BOUND  # of a sum over the tokens of a query
PAGES = {f"golden {i}": path for i, path in enumerate(IMAGES)}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.delenv("JINA_V4_API_KEY", raising=False)


@pytest.fixture(scope="module")
def client(wire_server: Server) -> Iterator[EmbeddingsClient]:
    with EmbeddingsClient(wire_server.base_url, task=TASK) as made:
        yield made


@pytest.fixture(params=[False, True], ids=["dense", "multivector"])
def encoder(request: pytest.FixtureRequest, wire_server: Server) -> Iterator[JinaV4Encoder]:
    with JinaV4Encoder(wire_server.base_url, multivector=request.param, batch_size=3, image_batch_size=2) as made:
        yield made


def text_rows(client: EmbeddingsClient, texts: Sequence[str], prompt_name: str, multivector: bool) -> list[Any]:
    return list(client.encode_text(texts, prompt_name=prompt_name, return_multivector=multivector))


def image_rows(client: EmbeddingsClient, images: Sequence[Any], multivector: bool) -> list[Any]:
    return list(client.encode_image(images, return_multivector=multivector))


def all_scores(queries: Sequence[Any], documents: Sequence[Any], multivector: bool) -> Any:
    score = mteb_tasks.maxsim if multivector else np.dot
    return np.array([[score(query, document) for document in documents] for query in queries])


def as_columns(texts: dict[str, str]) -> dict[str, dict[str, Any]]:
    return {name: {"text": text} for name, text in texts.items()}


def evaluated(encoder: JinaV4Encoder, task: Any, folder: Path) -> tuple[float, mteb_tasks.Scores]:
    """What mteb reports as the main score, and the scores of the documents that it made it of."""
    result = mteb.evaluate(
        encoder, task, cache=None, prediction_folder=folder, show_progress_bar=False, co2_tracker=False
    )
    predictions = json.loads((folder / f"{task.metadata.name}_predictions.json").read_text())
    return result.task_results[0].get_score(), predictions["default"]["test"]


def assert_as_expected(
    found: tuple[float, mteb_tasks.Scores], expected: mteb_tasks.Scores, grades: mteb_tasks.Grades, bound: float = BOUND
) -> float:
    """Check mteb's figure and every score behind it; return the largest difference of these."""
    main_score, scores = found
    assert {query: row.keys() for query, row in scores.items()} == {
        query: row.keys() for query, row in expected.items()
    }
    places = [(query, name) for query, row in expected.items() for name in row]
    difference = float(np.max([abs(scores[query][name] - expected[query][name]) for query, name in places]))
    print(f"largest difference: {difference:.1e}")
    assert difference <= bound
    value = mteb_tasks.ndcg(expected, grades)
    assert 0.05 < value < 0.95  # grades by chance: a figure that could not be wrong would prove nothing
    assert main_score == pytest.approx(value, abs=1e-5)  # mteb keeps five digits
    return difference


def test_texts_are_ranked_as_by_numpy(
    encoder: JinaV4Encoder, client: EmbeddingsClient, golden: Golden, tmp_path: Path, figure: Figure
) -> None:
    many = encoder.multivector
    grades = mteb_tasks.some_grades(list(QUERIES), list(DOCUMENTS))
    found = evaluated(encoder, mteb_tasks.retrieval(as_columns(QUERIES), as_columns(DOCUMENTS), grades), tmp_path)
    queries = text_rows(client, list(QUERIES.values()), "query", many)
    documents = text_rows(client, list(DOCUMENTS.values()), "passage", many)
    expected = mteb_tasks.table(list(QUERIES), list(DOCUMENTS), all_scores(queries, documents, many))
    difference = assert_as_expected(found, expected, grades, bound=LATE_BOUND if many else BOUND)
    # The published code has its word, too: queries and passages have the prompts that it was given.
    kind = "multi" if many else "dense"
    rows = {
        (prompt_name, name): golden.rows[f"{TASK}/{prompt_name}/{name.split()[1]}/{kind}"]
        for prompt_name in ("query", "passage")
        for name in GOLDEN_TEXTS
    }
    for query in GOLDEN_TEXTS:
        for name in GOLDEN_TEXTS:
            (published,) = all_scores([rows["query", query]], [rows["passage", name]], many)[0]
            assert found[1][query][name] == pytest.approx(published, abs=LATE_BOUND if many else BOUND)
    figure(f"ndcg@10 {found[0]:.5f} as by numpy, scores differ by {difference:.1e}")


def test_pages_are_ranked_as_by_numpy(
    encoder: JinaV4Encoder, client: EmbeddingsClient, golden: Golden, tmp_path: Path
) -> None:
    many = encoder.multivector
    made = [Image.new("RGB", (84 + 28 * i, 140), (25 * i, 200 - 20 * i, 90)) for i in range(6)]
    pages = {f"page {i}": image for i, image in enumerate(made)} | {
        name: Image.open(path).convert("RGB") for name, path in PAGES.items()
    }
    grades = mteb_tasks.some_grades(list(QUERIES), list(pages))
    columns = {name: {"image": image} for name, image in pages.items()}
    task = mteb_tasks.retrieval(
        as_columns(QUERIES),
        columns,
        grades,
        type="DocumentUnderstanding",
        category="t2i",
        modalities=["text", "image"],
    )
    found = evaluated(encoder, task, tmp_path)
    queries = text_rows(client, list(QUERIES.values()), "query", many)
    kind = "multi" if many else "dense"
    published = [golden.rows[f"{TASK}/image/{i}/{kind}"] for i in range(len(PAGES))]
    documents = [*image_rows(client, made, many), *published]
    expected = mteb_tasks.table(list(QUERIES), list(pages), all_scores(queries, documents, many))
    assert_as_expected(found, expected, grades, bound=LATE_BOUND if many else BOUND)


def test_candidates_are_reranked_as_by_numpy(encoder: JinaV4Encoder, client: EmbeddingsClient, tmp_path: Path) -> None:
    many = encoder.multivector
    names, texts = list(DOCUMENTS), list(DOCUMENTS.values())
    candidates = {query: names[i : i + 10] for i, query in enumerate(QUERIES)}
    grades = {query: dict.fromkeys(candidates[query][2::3], 1) for query in QUERIES}
    task = mteb_tasks.retrieval(
        as_columns(QUERIES), as_columns(DOCUMENTS), grades, type="Reranking", top_ranked=candidates
    )
    found = evaluated(encoder, task, tmp_path)
    scores = all_scores(
        text_rows(client, list(QUERIES.values()), "query", many), text_rows(client, texts, "passage", many), many
    )
    whole = mteb_tasks.table(list(QUERIES), names, scores)
    expected = {query: {name: whole[query][name] for name in candidates[query]} for query in QUERIES}
    assert_as_expected(found, expected, grades, bound=LATE_BOUND if many else BOUND)


def test_fewer_dimensions_are_those_of_the_server(
    wire_server: Server, client: EmbeddingsClient, tmp_path: Path
) -> None:
    grades = mteb_tasks.some_grades(list(QUERIES), list(DOCUMENTS))
    task = mteb_tasks.retrieval(as_columns(QUERIES), as_columns(DOCUMENTS), grades)
    with JinaV4Encoder(wire_server.base_url, truncate_dim=128) as encoder:
        found = evaluated(encoder, task, tmp_path)
    queries, documents = (
        client.encode_text(list(texts.values()), prompt_name=prompt_name, truncate_dim=128, return_numpy=True)
        for texts, prompt_name in ((QUERIES, "query"), (DOCUMENTS, "passage"))
    )
    assert_as_expected(found, mteb_tasks.table(list(QUERIES), list(DOCUMENTS), queries @ documents.T), grades)


def test_results_are_filed_under_what_the_server_tells_of_itself(wire_server: Server, client: EmbeddingsClient) -> None:
    with JinaV4Encoder(wire_server.base_url) as encoder:
        assert encoder.revisions == {TASK: client.revision()}
        assert encoder.mteb_model_meta.revision == f"{TASK}-{client.revision()}"


def test_the_example_of_the_docs_runs(wire_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = (Path(__file__).parents[3] / "docs" / "evaluation.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", document, re.DOTALL)
    assert "http://127.0.0.1:8001" in example
    grades = mteb_tasks.some_grades(list(QUERIES), list(DOCUMENTS))
    task = mteb_tasks.retrieval(as_columns(QUERIES), as_columns(DOCUMENTS), grades, name="Example")
    monkeypatch.setattr(mteb, "get_benchmark", {"ViDoRe(v1)": mteb.Benchmark(name="x", tasks=[task])}.__getitem__)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(example.replace("http://127.0.0.1:8001", wire_server.base_url), names)  # noqa: S102 - our own page
    (result,) = names["results"].task_results
    assert 0.05 < result.get_score() < 0.95
    (stored,) = Path("results").rglob("Example.json")
    assert "multivector_True" in stored.parts
