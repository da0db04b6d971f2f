"""Small tasks for mteb, made on the spot: no data set is fetched."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, Image
from mteb.abstasks import AbsTask, AbsTaskRetrieval, AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata
from numpy.typing import NDArray
from scipy.stats import spearmanr

Grades = Mapping[str, Mapping[str, int]]  # by query, then by document
Scores = Mapping[str, Mapping[str, float]]


def metadata(**changes: Any) -> TaskMetadata:
    facts: dict[str, Any] = {
        "name": "LocalTask",
        "description": "Made on the spot.",
        "dataset": {"path": "local/local", "revision": "1"},
        "type": "Retrieval",
        "category": "t2t",
        "modalities": ["text"],
        "eval_splits": ["test"],
        "eval_langs": ["eng-Latn"],
        "main_score": "ndcg_at_10",
    }
    return TaskMetadata(**facts | changes)


def retrieval(
    queries: Mapping[str, Mapping[str, Any]],
    corpus: Mapping[str, Mapping[str, Any]],
    grades: Grades,
    *,
    top_ranked: Mapping[str, list[str]] | None = None,
    **changes: Any,
) -> AbsTask:
    """A task that ranks; queries and documents are columns by id."""

    class Local(AbsTaskRetrieval):
        def load_data(self, *_args: object, **_kwargs: object) -> None:
            split = {
                "queries": _rows(queries),
                "corpus": _rows(corpus),
                "relevant_docs": {query: dict(graded) for query, graded in grades.items()},
                "top_ranked": None if top_ranked is None else dict(top_ranked),
            }
            self.dataset = {"default": {"test": split}}  # type: ignore[typeddict-item]
            self.data_loaded = True

    Local.metadata = metadata(**changes)
    return Local()


def sts(pairs: Sequence[tuple[str, str]], scores: Sequence[float], **changes: Any) -> AbsTask:
    """A task that compares texts."""

    class Local(AbsTaskSTS):
        def load_data(self, *_args: object, **_kwargs: object) -> None:
            rows = [{"sentence1": a, "sentence2": b, "score": s} for (a, b), s in zip(pairs, scores, strict=True)]
            self.dataset = {"test": Dataset.from_list(rows)}
            self.data_loaded = True

    Local.metadata = metadata(**{"type": "STS", "main_score": "cosine_spearman", **changes})
    return Local()


def _rows(columns_by_id: Mapping[str, Mapping[str, Any]]) -> Dataset:
    rows = Dataset.from_list([{"id": name, **columns} for name, columns in columns_by_id.items()])
    return rows.cast_column("image", Image()) if "image" in rows.column_names else rows


def some_grades(queries: Sequence[str], documents: Sequence[str], n_each: int = 4) -> Grades:
    """Grades that have nothing to do with the texts, so that no score is 0 or 1 by itself."""
    random = np.random.default_rng(7)
    chosen = {query: random.choice(documents, n_each, replace=False) for query in queries}
    return {query: {str(name): i % 2 + 1 for i, name in enumerate(names)} for query, names in chosen.items()}


def ndcg(scores: Scores, grades: Grades, k: int = 10) -> float:
    """The mean over the queries, with the grades as gains, as trec_eval has it."""
    discounts = 1 / np.log2(np.arange(2, k + 2))

    def gain(ordered: Sequence[int]) -> float:
        return float(np.dot(ordered[:k], discounts[: len(ordered[:k])]))

    values = []
    for query, graded in grades.items():
        found = sorted(scores[query], key=lambda document: -scores[query][document])
        ideal = sorted(graded.values(), reverse=True)
        values.append(gain([graded.get(document, 0) for document in found]) / gain(ideal))
    return float(np.mean(values))


def spearman(first: NDArray[Any], second: NDArray[Any], scores: Sequence[float]) -> float:
    """Of the inner products of rows of unit length."""
    return float(spearmanr((first * second).sum(axis=1), scores).statistic)


def table(queries: Sequence[str], documents: Sequence[str], scores: NDArray[Any]) -> Scores:
    """Name the rows and columns of (n_queries, n_documents)."""
    return {query: dict(zip(documents, row.tolist(), strict=True)) for query, row in zip(queries, scores, strict=True)}


def maxsim(query: NDArray[Any], document: NDArray[Any]) -> float:
    """By the definition, one pair at a time."""
    return float((query.astype(np.float64) @ document.T.astype(np.float64)).max(axis=1).sum())
