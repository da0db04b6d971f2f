"""When requests are repeated and given up: through a real server, and the two rules by themselves."""

import itertools
import threading
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from jina_v4_client import (
    ServerConnectionError,
    ServerError,
    ServerFailedError,
    ServerRefusedError,
    ServerTimeoutError,
    _calls,
)
from jina_v4_client._images import prepare
from jina_v4_client._send import choose_pause_s, may_pass
from jina_v4_client._server import read_retry_after_s
from PIL import Image

BROKEN = ServerConnectionError("broken")
TEXTS = [f"text {n}" for n in range(8)]


class Busy:
    """Notes when each request came; the first so many are refused with 429 and a Retry-After."""

    def __init__(self, server: Any, n_refused: int, retry_after_s: str) -> None:
        server.play_ours()
        self.at: list[float] = []
        embed, lock, numbers = server.routes["/v1/embeddings"], threading.Lock(), itertools.count()

        def play(seen: Any) -> Any:
            with lock:
                self.at.append(time.monotonic())
                number = next(numbers)
            if number < n_refused:
                return server.json_answer({"error": "busy"}, 429, retry_after=retry_after_s)
            if number < 3:  # on their way with the refused one; answered later than it
                time.sleep(1)
            return embed(seen)

        server.routes["/v1/embeddings"] = play


@pytest.mark.proof
def test_a_busy_server_is_left_alone_by_all_requests_of_the_call(server: Any, make_client: Any) -> None:
    busy = Busy(server, 1, "3")
    found = make_client(server.url, max_concurrency=3).encode_text(TEXTS, batch_size=1)
    np.testing.assert_array_equal(found, [server.vector(f"Query: {text}") for text in TEXTS])
    # Those that were on their way with the refused one are answered; every other waits until the time is over.
    later = busy.at[3:]
    assert len(later) == len(TEXTS) + 1 - 3
    assert min(later) - busy.at[0] >= 3


def test_what_waits_to_be_repeated_keeps_its_place(server: Any, make_client: Any) -> None:
    """Else a server that fails for long would have every request of the call written and kept."""
    server.play_ours()
    lock, seen = threading.Lock(), []

    def play(request: Any) -> Any:
        with lock:
            seen.append(request.body["input"][0]["text"])
        return server.json_answer({}, 503)

    server.routes["/v1/embeddings"] = play
    with pytest.raises(ServerFailedError):
        make_client(server.url, max_concurrency=2, max_retries=3).encode_text(TEXTS, batch_size=1)
    assert set(seen) == {"text 0", "text 1"}
    assert max(seen.count(text) for text in set(seen)) == 4


def test_a_pause_that_ends_after_the_call_is_not_begun(server: Any, make_client: Any) -> None:
    busy = Busy(server, 9, "30")
    with pytest.raises(ServerRefusedError, match="busy"):
        make_client(server.url, total_timeout_s=20, max_retries=5).encode_text("a")
    assert len(busy.at) == 1


def test_a_call_whose_time_is_over_before_it_begins_sends_nothing(
    server: Any, make_client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading its images may have taken so long."""
    server.play_ours()
    monkeypatch.setattr(_calls, "prepare", lambda source: (time.sleep(0.3), prepare(source))[1])
    with pytest.raises(ServerTimeoutError, match=r"the call did not end within total_timeout_s=0\.2"):
        make_client(server.url, total_timeout_s=0.2).encode_image(Image.new("RGB", (40, 30)))
    assert server.seen == []


def test_pauses_grow_to_a_limit_and_differ_by_chance() -> None:
    for n_failures, longest_s in ((1, 0.5), (2, 1), (3, 2), (5, 8), (9, 8), (5000, 8)):
        pauses = {choose_pause_s(BROKEN, n_failures) for _ in range(50)}
        assert len(pauses) > 40
        assert longest_s / 2 <= min(pauses) <= max(pauses) <= longest_s


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": "0"}, 0),
        ({"retry-after-ms": "20", "retry-after": "7"}, 0.02),
        ({"retry-after-ms": "soon", "retry-after": "7"}, 7),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 30),
        ({"retry-after": "Wed, 21 Oct 2015 07:27:00 GMT"}, 0),
        ({"retry-after": "-1"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": ""}, None),
    ],
    ids=str,
)
def test_retry_after_is_read_in_every_form(headers: Mapping[str, str], seconds: float | None) -> None:
    assert read_retry_after_s(headers, now=1445412450) == seconds


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (BROKEN, True),
        (ServerTimeoutError("late"), True),
        *((ServerRefusedError("", status_code=status), status in (408, 409, 429)) for status in range(400, 430)),
        *((ServerFailedError("", status_code=status), True) for status in (500, 502, 503, 504)),
        (ServerError("another"), False),
    ],
    ids=lambda value: f"{type(value).__name__} {getattr(value, 'status_code', value)}",
)
def test_only_what_may_pass_is_repeated(error: ServerError, passes: bool) -> None:
    assert may_pass(error) is passes
