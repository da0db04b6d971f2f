"""One Prometheus page for all servers: their samples, each with its task as a label, and the gateway's own."""

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector


class GatewayMetrics:
    """What the gateway counts itself."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.answers = Counter(
            "jina_v4_gateway_answers", "Answers to embedding requests", ["task", "status"], registry=self.registry
        )
        self.in_flight = Gauge("jina_v4_gateway_in_flight", "Embedding requests in flight", registry=self.registry)
        self.ready = Gauge(
            "jina_v4_gateway_server_ready", "Whether the server of a task is ready", ["task"], registry=self.registry
        )


class _Pages(Collector):
    def __init__(self, pages: Mapping[str, str]) -> None:
        self._pages = pages

    def collect(self) -> Iterable[Metric]:
        """Give each family once, with the samples of all servers."""
        families: dict[str, Metric] = {}
        for task, page in self._pages.items():
            for found in text_string_to_metric_families(page):
                family = families.setdefault(found.name, Metric(found.name, found.documentation, found.type))
                for sample in found.samples:
                    labels = dict(sample.labels)
                    if "task" in labels:  # as Prometheus itself does it
                        labels["exported_task"] = labels.pop("task")
                    family.add_sample(sample.name, {"task": task, **labels}, sample.value, sample.timestamp)
        return families.values()


def merge(own: CollectorRegistry, pages: Mapping[str, str]) -> bytes:
    """Write one page.

    Args:
        own: the gateway's metrics.
        pages: of the servers, by task.

    Raises:
        ValueError: a page is not in Prometheus' text format.
    """
    servers = CollectorRegistry()
    servers.register(_Pages(pages))
    return generate_latest(own) + generate_latest(servers)
