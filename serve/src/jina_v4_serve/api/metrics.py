"""The metrics of the routes, beside vLLM's own. docs/monitoring.md lists them all.

Labels have few values, all of them ours: nothing that a caller wrote becomes one. A request is counted once, when it is
over (`count`). With several API processes (`--api-server-count`) vLLM adds up their pages, gauges as each says.
"""

from collections.abc import Iterable, Mapping
from typing import get_args

from prometheus_client import Counter, Gauge, Histogram

from jina_v4_serve.api.record import KINDS, SECONDS, STAGES, Outcome, Record

OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)

REQUESTS = Counter(
    "jina_v4_requests",
    "Embedding requests: ok had vectors, refused a 4xx status, failed a 5xx status, of cancelled the client left",
    ["task", "outcome"],
)
REFUSED = Counter(
    "jina_v4_refused_requests", "Requests that were not answered with vectors, by the code in their answer", ["code"]
)
KEY_REQUESTS = Counter("jina_v4_key_requests", "Embedding requests by the name of their API key", ["key", "outcome"])
ITEMS = Counter(
    "jina_v4_items",
    "Texts, images and pages of the requests that could be read, by what became of them",
    ["task", "kind", "outcome"],
)
TOKENS = Counter("jina_v4_tokens", "Tokens of the texts and images that were answered with vectors", ["task", "kind"])
PREFIXED = Counter(
    "jina_v4_prefixed_texts",
    "Texts that were answered with vectors and had begun with the very prefix that is put before them",
    ["task"],
)
REQUEST_BYTES = Counter("jina_v4_request_bytes", "Bytes of request bodies", ["task"])
RESPONSE_BYTES = Counter("jina_v4_response_bytes", "Bytes of answers, refusals included", ["task"])
REQUEST_SECONDS = Histogram(
    "jina_v4_request_seconds",
    "From the head of a request to that of its answer, where it has vectors",
    ["task"],
    buckets=SECONDS,
)
STAGE_SECONDS = Histogram(
    "jina_v4_stage_seconds",
    "Where that time went, a value a request and stage: body, fetch, preprocessing, engine, serialising",
    ["task", "stage"],
    buckets=SECONDS,
)
NON_FINITE = Counter("jina_v4_non_finite_requests", "Requests whose vectors were not finite and were not sent")
IMAGE_FETCHES = Counter(
    "jina_v4_image_fetches",
    "URLs of images and PDF files: ok, or why not: private, redirects, status, timeout, too_large, unreachable",
    ["outcome"],
)
IMAGE_FETCH_BYTES = Counter("jina_v4_image_fetch_bytes", "Bytes of the files that were fetched")
IN_FLIGHT_TOKENS = Gauge(
    "jina_v4_in_flight_tokens", "Tokens of accepted requests, as estimated", multiprocess_mode="livesum"
)
MAX_IN_FLIGHT_TOKENS = Gauge(
    "jina_v4_max_in_flight_tokens", "Tokens in flight past which requests are refused", multiprocess_mode="livesum"
)
LAST_VECTORS = Gauge(
    "jina_v4_last_vectors_timestamp_seconds",
    "When the engine last gave vectors, in Unix time",
    multiprocess_mode="livemax",
)
LAST_STEP = Gauge(
    "jina_v4_last_step_timestamp_seconds",
    "When the engine last finished a scheduling step, in Unix time",
    multiprocess_mode="livemax",
)
HUNG_AFTER = Gauge(
    "jina_v4_hung_after_seconds",
    "An engine with work that finishes no step for so long is hung; 0 where that is not watched",
    multiprocess_mode="livemax",
)
STARTED = Gauge(
    "jina_v4_start_timestamp_seconds", "When the server began to serve, in Unix time", multiprocess_mode="livemax"
)
SERVED = Gauge(
    "jina_v4_served_info",
    "1; its labels say which revision of which task is served",
    ["task", "revision"],
    multiprocess_mode="livemax",
)
CANARY_OK = Gauge(
    "jina_v4_canary_ok",
    "1 where the canary was right at the start, 0 where not; absent without a canary",
    ["task"],
    multiprocess_mode="livemin",
)
CANARY_DISTANCE = Gauge(
    "jina_v4_canary_distance",
    "Largest 1 - cosine of vectors here and in the canary; NaN where unchecked",
    ["task"],
    multiprocess_mode="livemax",
)


def prepare(tasks: Iterable[str], revisions: Mapping[str, str]) -> None:
    """Begin at 0: of a series that begins at 1, Prometheus sees no increase, and no alert its first failure."""
    STARTED.set_to_current_time()
    LAST_VECTORS.set_to_current_time()
    REFUSED.labels("OVERLOADED")
    for outcome in ("ok", "private", "redirects", "status", "timeout", "too_large", "unreachable"):
        IMAGE_FETCHES.labels(outcome)
    for task in tasks:
        SERVED.labels(task, revisions.get(task, "unknown")).set(1)
        REQUEST_SECONDS.labels(task)
        PREFIXED.labels(task)
        for outcome in OUTCOMES:
            REQUESTS.labels(task, outcome)
        for kind in KINDS:
            TOKENS.labels(task, kind)
            for outcome in OUTCOMES:
                ITEMS.labels(task, kind, outcome)
        for stage in STAGES:
            STAGE_SECONDS.labels(task, stage)
        for counter in (REQUEST_BYTES, RESPONSE_BYTES):
            counter.labels(task)


def count(record: Record) -> None:
    """Count a request that is over."""
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
