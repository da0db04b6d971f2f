"""The metrics of our routes, in addition to vLLM's. docs/monitoring.md lists them all.

Labels have few values, and never text from a request. A request is counted once, when it is over (`count`). With
several API processes (`--api-server-count`) vLLM adds up their pages; for gauges see `multiprocess_mode`.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import get_args

from prometheus_client import Counter, Gauge, Histogram

from jina_v4_serve.api.record import KINDS, SECONDS, STAGES, Outcome, Record

OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)

REQUESTS = Counter(
    "jina_v4_requests",
    "Embedding requests: ok returned vectors, refused is status 4xx, failed is 5xx, cancelled by the client",
    ["task", "outcome"],
)
REFUSED = Counter("jina_v4_refused_requests", "Requests that returned an error, by its code", ["code"])
KEY_REQUESTS = Counter("jina_v4_key_requests", "Embedding requests by the name of their API key", ["key", "outcome"])
ITEMS = Counter(
    "jina_v4_items",
    "Texts, images and pages of valid requests, by the outcome of the request",
    ["task", "kind", "outcome"],
)
TOKENS = Counter("jina_v4_tokens", "Tokens of texts and images whose vectors were returned", ["task", "kind"])
PREFIXED = Counter(
    "jina_v4_prefixed_texts",
    "Embedded texts that already began with the prefix that the server adds",
    ["task"],
)
REQUEST_BYTES = Counter("jina_v4_request_bytes", "Bytes of request bodies", ["task"])
RESPONSE_BYTES = Counter("jina_v4_response_bytes", "Bytes of replies, errors included", ["task"])
REQUEST_SECONDS = Histogram(
    "jina_v4_request_seconds",
    "From the head of a request to the head of its reply, for replies with vectors",
    ["task"],
    buckets=SECONDS,
)
STAGE_SECONDS = Histogram(
    "jina_v4_stage_seconds",
    "Parts of that time: body, fetch, preprocessing, engine, serialising",
    ["task", "stage"],
    buckets=SECONDS,
)
NON_FINITE = Counter("jina_v4_non_finite_requests", "Requests whose vectors were not finite, so not sent")
IMAGE_FETCHES = Counter(
    "jina_v4_image_fetches",
    "URLs of images and PDF files: ok, or the reason of a failure, such as timeout or too_large",
    ["outcome"],
)
IMAGE_FETCH_BYTES = Counter("jina_v4_image_fetch_bytes", "Bytes of fetched files")
IN_FLIGHT_TOKENS = Gauge(
    "jina_v4_in_flight_tokens", "Tokens of accepted requests, as estimated", multiprocess_mode="livesum"
)
MAX_IN_FLIGHT_TOKENS = Gauge(
    "jina_v4_max_in_flight_tokens", "Tokens in flight above which requests are refused", multiprocess_mode="livesum"
)
_latest = partial(Gauge, multiprocess_mode="livemax")  # the highest value of all API processes
LAST_VECTORS = _latest("jina_v4_last_vectors_timestamp_seconds", "When the engine last returned vectors, in Unix time")
LAST_STEP = _latest(
    "jina_v4_last_step_timestamp_seconds", "When the engine last finished a scheduling step, in Unix time"
)
HUNG_AFTER = _latest(
    "jina_v4_hung_after_seconds",
    "After this time without a finished step, an engine with work is hung; 0 if this is not watched",
)
STARTED = _latest("jina_v4_start_timestamp_seconds", "When the server began to serve, in Unix time")
SERVED = _latest(
    "jina_v4_served_info", "1; the labels are the tasks and revisions that are served", ["task", "revision"]
)
CANARY_OK = Gauge(
    "jina_v4_canary_ok",
    "1 if the canary was right at the start, 0 if not; absent without a canary",
    ["task"],
    multiprocess_mode="livemin",
)
CANARY_DISTANCE = _latest(
    "jina_v4_canary_distance", "Largest 1 - cosine of computed vectors and the canary's; NaN if unchecked", ["task"]
)


def prepare(tasks: Iterable[str], revisions: Mapping[str, str]) -> None:
    """Create all series at 0. If a series began at 1, Prometheus would see no increase, and miss the first failure."""
    STARTED.set_to_current_time()
    LAST_VECTORS.set_to_current_time()
    REFUSED.labels("OVERLOADED")
    for outcome in ("ok", "private", "redirects", "status", "timeout", "too_large", "unreachable"):
        IMAGE_FETCHES.labels(outcome)
    for task in tasks:
        SERVED.labels(task, revisions.get(task, "unknown")).set(1)
        for metric in (REQUEST_SECONDS, PREFIXED, REQUEST_BYTES, RESPONSE_BYTES):
            metric.labels(task)
        for outcome in OUTCOMES:
            REQUESTS.labels(task, outcome)
        for kind in KINDS:
            TOKENS.labels(task, kind)
            for outcome in OUTCOMES:
                ITEMS.labels(task, kind, outcome)
        for stage in STAGES:
            STAGE_SECONDS.labels(task, stage)


def count(record: Record) -> None:
    """Count a finished request."""
    task, outcome = record.task, record.outcome
    REQUESTS.labels(task, outcome).inc()
    REQUEST_BYTES.labels(task).inc(record.request_bytes)
    RESPONSE_BYTES.labels(task).inc(record.response_bytes)
    if record.key is not None:
        KEY_REQUESTS.labels(record.key, outcome).inc()
    if record.code is not None:
        REFUSED.labels(record.code).inc()
    for kind in KINDS:
        if record.n_items[kind]:
            ITEMS.labels(task, kind, outcome).inc(record.n_items[kind])
            TOKENS.labels(task, kind).inc(record.n_tokens[kind])
    if outcome == "ok":
        REQUEST_SECONDS.labels(task).observe(record.duration_s)
        for stage, duration_s in record.stages_s.items():
            STAGE_SECONDS.labels(task, stage).observe(duration_s)
