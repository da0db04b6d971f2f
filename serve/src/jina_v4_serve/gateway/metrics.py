"""One Prometheus page for all: the gateway's own metrics, and those of the servers with their task as a label."""

from collections.abc import Iterable, Mapping
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from jina_v4_serve.api.record import SECONDS, Record


class GatewayMetrics:
    """The gateway's own metrics."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        counter = partial(Counter, registry=self.registry)
        self.answers = counter("jina_v4_gateway_answers", "Replies to embedding requests", ["task", "status"])
        self.request_bytes = counter("jina_v4_gateway_request_bytes", "Bytes of request bodies", ["task"])
        self.response_bytes = counter("jina_v4_gateway_response_bytes", "Bytes of replies", ["task"])
        self.in_flight = Gauge("jina_v4_gateway_in_flight", "Embedding requests in flight", registry=self.registry)
        self.ready = Gauge(
            "jina_v4_gateway_server_ready", "Whether the server of a task is ready", ["task"], registry=self.registry
        )
        self.seconds = Histogram(
            "jina_v4_gateway_request_seconds",
            "From the head of a request to the end of its reply, for replies with vectors",
            ["task"],
            buckets=SECONDS,
            registry=self.registry,
        )

    def prepare(self, tasks: Iterable[str]) -> None:
        """Create all series at 0. If one began at 1, Prometheus would see no increase, and miss the first failure."""
        for task in tasks:
            self.seconds.labels(task)
            for status in ("200", "503", "504"):
                self.answers.labels(task, status)

    def count(self, record: Record) -> None:
        """Count a finished embedding request."""
        self.answers.labels(record.task, str(record.status)).inc()
        self.request_bytes.labels(record.task).inc(record.request_bytes)
        self.response_bytes.labels(record.task).inc(record.response_bytes)
        if record.outcome == "ok":
            self.seconds.labels(record.task).observe(record.duration_s)


class _Pages(Collector):
    def __init__(self, pages: Mapping[str, str]) -> None:
        self._pages = pages

    def collect(self) -> Iterable[Metric]:
        """Return each family once, with the samples of all servers."""
        families: dict[str, Metric] = {}
        for task, page in self._pages.items():
            for part in text_string_to_metric_families(page):
                family = families.setdefault(part.name, Metric(part.name, part.documentation, part.type))
                for sample in part.samples:
                    labels = dict(sample.labels)
                    if "task" in labels and "," not in task:  # as Prometheus itself does; a server of several keeps it
                        labels["exported_task"] = labels.pop("task")
                    family.add_sample(sample.name, {"task": task, **labels}, sample.value, sample.timestamp)
        return families.values()


def merge(own: CollectorRegistry, pages: Mapping[str, str]) -> bytes:
    """Write one page.

    Args:
        own: the gateway's metrics.
        pages: the servers' pages, by task. For a server of several tasks the key is "one,other".

    Raises:
        ValueError: a page is not in Prometheus' text format.
    """
    servers = CollectorRegistry()
    servers.register(_Pages(pages))
    return generate_latest(own) + generate_latest(servers)
