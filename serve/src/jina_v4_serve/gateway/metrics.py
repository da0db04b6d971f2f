"""One Prometheus page for all servers: their samples, each with its task as a label, and the gateway's own."""

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from jina_v4_serve.api.record import SECONDS, Record


class GatewayMetrics:
    """The gateway's own metrics."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.answers = Counter(
            "jina_v4_gateway_answers", "Answers to embedding requests", ["task", "status"], registry=self.registry
        )
        self.in_flight = Gauge("jina_v4_gateway_in_flight", "Embedding requests in flight", registry=self.registry)
        self.ready = Gauge(
            "jina_v4_gateway_server_ready", "Whether the server of a task is ready", ["task"], registry=self.registry
        )
        self.seconds = Histogram(
            "jina_v4_gateway_request_seconds",
            "From the head of a request to the end of its answer, where it has vectors",
            ["task"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.request_bytes = Counter(
            "jina_v4_gateway_request_bytes", "Bytes of request bodies", ["task"], registry=self.registry
        )
        self.response_bytes = Counter(
            "jina_v4_gateway_response_bytes", "Bytes of answers", ["task"], registry=self.registry
        )

    def prepare(self, tasks: Iterable[str]) -> None:
        """Begin at 0: of a series that begins at 1, Prometheus sees no increase, and no alert its first failure."""
        for task in tasks:
            self.seconds.labels(task)
            for status in ("200", "503", "504"):
                self.answers.labels(task, status)

    def count(self, record: Record) -> None:
        """Count an embedding request that is over."""
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
            for found in text_string_to_metric_families(page):
                family = families.setdefault(found.name, Metric(found.name, found.documentation, found.type))
                for sample in found.samples:
                    labels = dict(sample.labels)
                    if "task" in labels and "," not in task:  # as Prometheus itself does it
                        labels["exported_task"] = labels.pop("task")
                    family.add_sample(sample.name, {"task": task, **labels}, sample.value, sample.timestamp)
        return families.values()


def merge(own: CollectorRegistry, pages: Mapping[str, str]) -> bytes:
    """Write one page.

    Args:
        own: the gateway's metrics.
        pages: of the servers, by task; by "one,other" where a server has several, whose samples say it by themselves.

    Raises:
        ValueError: a page is not in Prometheus' text format.
    """
    servers = CollectorRegistry()
    servers.register(_Pages(pages))
    return generate_latest(own) + generate_latest(servers)
