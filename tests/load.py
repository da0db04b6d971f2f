"""Clients that load a server while something is done to it, and what became of each of their requests."""

import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from types import TracebackType

import httpx2
import numpy as np
from near import largest_difference

BOUND = 1e-5


@dataclass
class Load:
    """Clients that send texts of one task, each its next request when its last one is answered.

    Attributes:
        answers: moments of sending and of the answer, and what it was: a status, or the name of an error.
    """

    base_url: str
    task: str
    texts: list[str]
    n_clients: int = 4
    pause_s: float = 0.0  # after an answer
    answers: list[tuple[float, float, str]] = field(default_factory=list)
    wrong: int = 0

    def __enter__(self) -> "Load":
        self._stop = threading.Event()
        self._expected: np.ndarray | None = None
        self._threads = [threading.Thread(target=self._send) for _ in range(self.n_clients)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _send(self) -> None:
        body = {"task": self.task, "input": self.texts}
        with httpx2.Client(base_url=self.base_url, timeout=60) as client:
            while not self._stop.is_set():
                begin = time.monotonic()
                try:
                    answer = client.post("/v1/embeddings", json=body)
                    outcome = str(answer.status_code)
                    if answer.status_code == 200:
                        self._check(np.array([item["embedding"] for item in answer.json()["data"]], np.float32))
                except httpx2.TransportError as failure:
                    outcome = type(failure).__name__
                self.answers.append((begin, time.monotonic(), outcome))
                time.sleep(self.pause_s if outcome == "200" else 0.5)

    def _check(self, vectors: np.ndarray) -> None:
        if self._expected is None:
            self._expected = vectors
        if largest_difference([vectors], [self._expected]) > BOUND:
            self.wrong += 1

    def outcomes(self, *, after: float = 0.0) -> Counter[str]:
        return Counter(outcome for begin, _, outcome in self.answers if begin >= after)

    def flying(self, told: float) -> Counter[str]:
        """What became of requests that were on their way at a moment."""
        return Counter(outcome for begin, end, outcome in self.answers if begin < told <= end)
