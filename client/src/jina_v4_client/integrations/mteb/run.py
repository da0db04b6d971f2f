"""A run: tasks and benchmarks by name, evaluated one by one, with what went wrong kept beside the scores."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import mteb

from jina_v4_client.errors import ArgumentError, ServerAuthenticationError, ServerConnectionError
from jina_v4_client.integrations.mteb.encoder import JinaV4Encoder
from jina_v4_client.integrations.mteb.published import published

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask

# What the next task would meet as well.
_ENDS_THE_RUN = (ServerConnectionError, ServerAuthenticationError)


@dataclass(frozen=True)
class Group:
    """What one name on the command line stands for.

    Attributes:
        name: of the task or benchmark, with the types that were chosen of it.
        tasks: one, or those of the benchmark.
    """

    name: str
    tasks: Sequence["AbsTask"]


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        name: of a task; of a benchmark for the mean over its tasks.
        metric: the task's main score; of a mean the number of tasks.
        score: in percent; None if the task failed.
        published: in percent, if there is one.
        error: why it failed.
    """

    name: str
    metric: str
    score: float | None
    published: float | None
    error: str | None = None


def find_groups(names: Sequence[str], types: Sequence[str]) -> list[Group]:
    """Look up tasks and benchmarks.

    Args:
        names: of tasks or benchmarks, as mteb has them.
        types: which types of tasks are taken; all if none is given.

    Raises:
        ArgumentError: a name that mteb does not know, or one that has no task of these types.
    """
    known = {task.metadata.name for task in mteb.get_tasks()}
    groups = []
    for name in names:
        try:
            tasks = [mteb.get_task(name)] if name in known else list(mteb.get_benchmark(name).tasks)
        except KeyError as error:
            raise ArgumentError(
                f"mteb {mteb.__version__} has no task or benchmark {name!r}: {error.args[0]}"
            ) from error
        chosen = [task for task in tasks if not types or task.metadata.type in types]
        if not chosen:
            found = sorted({task.metadata.type for task in tasks})
            raise ArgumentError(f"{name} has no task of type {' or '.join(types)}; it has {', '.join(found)}")
        groups.append(Group(" ".join([name, *(types if len(tasks) > 1 else [])]), chosen))
    return groups


def evaluate(
    encoder: JinaV4Encoder, groups: Sequence[Group], folder: Path, *, overwrite: bool = False, progress: bool = True
) -> Iterator[Row]:
    """Evaluate tasks one by one; those that the folder has for this model and these settings are not run again.

    A task that fails does not end the run: data sets are of many makers, and some cannot be had.

    Args:
        encoder: the model.
        groups: what to evaluate.
        folder: where mteb keeps results.
        overwrite: run again what is there.
        progress: show bars.

    Yields:
        A row for each task as it is done, and after the tasks of a benchmark one for their mean.

    Raises:
        ServerError: the server is gone or wants another key; what was done is in the folder.
    """
    cache = mteb.ResultCache(folder)
    for group in groups:
        scores: list[float] = []
        for task in group.tasks:
            try:
                score = _score(encoder, task, cache, overwrite=overwrite, progress=progress)
            except _ENDS_THE_RUN:
                raise
            except Exception as error:
                yield _row(encoder, task.metadata.name, task.metadata.main_score, None, _said(error))
            else:
                scores.append(score)
                yield _row(encoder, task.metadata.name, task.metadata.main_score, score)
        if len(group.tasks) > 1:
            whole = len(scores) == len(group.tasks)
            mean = sum(scores) / len(scores) if whole else None
            reason = None if whole else f"{len(group.tasks) - len(scores)} of {len(group.tasks)} tasks have no score"
            yield _row(encoder, group.name, f"mean of {len(group.tasks)}", mean, reason)


def _score(
    encoder: JinaV4Encoder, task: "AbsTask", cache: "mteb.ResultCache", *, overwrite: bool, progress: bool
) -> float:
    result = mteb.evaluate(
        encoder,  # type: ignore[arg-type]  # its protocol wants the arguments with which mteb itself would make one
        task,
        co2_tracker=False,
        encode_kwargs={"batch_size": 32, "show_progress_bar": progress},
        cache=cache,
        overwrite_strategy="always" if overwrite else "only-missing",
        show_progress_bar=progress,
    )
    # The folder may hold more of the task, such as other languages, than is asked for.
    return float(result.task_results[0].validate_and_filter_scores(task).get_score())


def _row(encoder: JinaV4Encoder, name: str, metric: str, score: float | None, error: str | None = None) -> Row:
    percent = None if score is None else 100 * score
    return Row(name, metric, percent, published(name, multivector=encoder.multivector), error)


def _said(error: Exception) -> str:
    """Give an error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
