"""Files on their way into the index, one after another in a thread of its own, and how far each is."""

import itertools
import queue
import threading
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from jina_v4_client import EmbeddingsClient

from document_search.documents import read_document
from document_search.indexing import index_document
from document_search.page.errors import PageError, as_page_error
from document_search.page.uploads import Upload
from document_search.store import PROBE_TEXT, Store

State = Literal["waiting", "indexing", "done", "unchanged", "failed"]
_MAX_JOBS = 500  # that are remembered
_MAX_PROBLEMS = 10  # of a file, that are remembered: every reply has those of all files
_STOP_TIMEOUT_S = 5


@dataclass(frozen=True)
class Job:
    """A file on its way.

    Attributes:
        n_done: pages that are embedded, or cannot be.
        problems: why pages of it, or all of it, are not in the index; the first 10 pages.
        n_more_problems: pages beyond these that are not in the index.
        code: of the error that ended it.
    """

    id: int
    name: str
    path: Path
    n_pages: int
    n_done: int = 0
    state: State = "waiting"
    problems: tuple[str, ...] = ()
    n_more_problems: int = 0
    code: str | None = None

    def shown(self) -> dict[str, object]:
        """Return what the page shows."""
        facts = asdict(self)
        del facts["path"]
        return facts


class _StoppedError(Exception):
    pass


class Jobs:
    """The queue, and the thread that works it off."""

    def __init__(self, client: EmbeddingsClient, index: Path) -> None:
        self._client = client
        self._index = index
        self._jobs: dict[int, Job] = {}
        self._ids = itertools.count(1)
        self._lock = threading.Lock()
        self._queue: queue.Queue[int | None] = queue.Queue()
        self._stopping = threading.Event()
        # A daemon: what it does may be given up at any time, a file is in the index as a whole or not.
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def add(self, upload: Upload) -> Job:
        """Put a file at the end of the queue."""
        with self._lock:
            job = Job(next(self._ids), upload.name, upload.path, upload.n_pages)
            self._jobs[job.id] = job
            ended = [other.id for other in self._jobs.values() if other.state not in ("waiting", "indexing")]
            for old in ended[: max(0, len(self._jobs) - _MAX_JOBS)]:
                del self._jobs[old]
        self._queue.put(job.id)
        return job

    def retry(self, job_id: int) -> Job:
        """Put a file that failed into the queue again.

        Raises:
            PageError: there is no such job, or it has not failed.
        """
        with self._lock:
            job = self._jobs.get(job_id)
            if job is None or job.state != "failed":
                raise PageError(404, "NO_JOB", "there is no such file that failed")
            job = self._jobs[job_id] = Job(job.id, job.name, job.path, job.n_pages)
        self._queue.put(job.id)
        return job

    def all(self) -> list[Job]:
        """Return all that are remembered, in the order in which they came."""
        with self._lock:
            return list(self._jobs.values())

    def stop(self) -> None:
        """End the thread; a file that is being embedded is given up."""
        self._stopping.set()
        self._queue.put(None)
        self._thread.join(_STOP_TIMEOUT_S)

    def _work(self) -> None:
        while (job_id := self._queue.get()) is not None and not self._stopping.is_set():
            try:
                self._set(job_id, state="indexing")
                self._index_job(job_id)
            except _StoppedError:
                return
            except Exception as error:
                page_error = as_page_error(error)
                message = str(page_error).removeprefix(f"{self._jobs[job_id].path}: ")
                self._set(job_id, state="failed", problems=(message,), code=page_error.code)

    def _index_job(self, job_id: int) -> None:
        path = self._jobs[job_id].path
        store = Store.open_or_make(self._index, self._client.encode_text(PROBE_TEXT))

        def report(n_done: int) -> None:
            if self._stopping.is_set():
                raise _StoppedError
            self._set(job_id, n_done=n_done)

        indexed = index_document(self._client, store, read_document(path), report=report)
        problems = tuple(str(error).removeprefix(f"{path}, ") for error in indexed.broken[:_MAX_PROBLEMS])
        self._set(
            job_id,
            state="done" if indexed.n_pages else "unchanged",
            n_done=self._jobs[job_id].n_pages,
            problems=problems,
            n_more_problems=len(indexed.broken) - len(problems),
        )

    def _set(self, job_id: int, **changes: object) -> None:
        with self._lock:
            self._jobs[job_id] = replace(self._jobs[job_id], **changes)  # type: ignore[arg-type] # of many types
