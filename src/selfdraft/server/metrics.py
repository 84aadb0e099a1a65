"""What Prometheus reads at `/metrics`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from ..engine_loop import Stats

STEPS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)


class Metrics:
    """Counters of one server, and the engine's figures at the time of reading."""

    def __init__(self, stats: Callable[[], Stats]) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter(
            "selfdraft_requests",
            "Requests by endpoint and outcome",
            ["endpoint", "outcome"],
            registry=registry,
        )
        self.first_token = Histogram(
            "selfdraft_time_to_first_token_seconds",
            "From the request to its first text",
            buckets=SECONDS,
            registry=registry,
        )
        self.token = Histogram(
            "selfdraft_time_per_token_seconds",
            "Between two pieces of text, per token",
            buckets=(0.0005, 0.001, 0.002, *SECONDS),
            registry=registry,
        )
        self.step = Histogram(
            "selfdraft_step_seconds", "Steps of the engine", buckets=STEPS, registry=registry
        )
        registry.register(_Engine(stats))
        self._seen = stats()

    def observe(self, stats: Stats) -> None:
        """Note the engine's last step."""
        before, self._seen = self._seen, stats
        if stats.steps == before.steps + 1:
            self.step.observe(stats.seconds - before.seconds)

    def page(self) -> bytes:
        return generate_latest(self._registry)


class _Engine(Collector):
    def __init__(self, stats: Callable[[], Stats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        gauges = {
            "running": "Requests that run",
            "waiting": "Requests that wait",
            "kv_tokens_used": "Tokens whose keys and values are held for running requests",
            "kv_tokens": "Tokens that the memory for keys and values holds",
        }
        counters = {
            "prompt_tokens": "Tokens of prompts",
            "reused_tokens": "Tokens of prompts that were remembered and not read again",
            "generated_tokens": "Tokens of answers",
            "drafted_tokens": "Draft tokens that were verified",
            "accepted_tokens": "Draft tokens that were accepted",
            "preemptions": "Times that a request gave its memory back and waited",
        }
        for name, about in gauges.items():
            yield GaugeMetricFamily(f"selfdraft_{name}", about, getattr(stats, name) or 0)
        for name, about in counters.items():
            yield CounterMetricFamily(f"selfdraft_{name}", about, getattr(stats, name))
        for name in ("drafted", "accepted"):
            metric = f"selfdraft_{name}_tokens_by_source"
            family = CounterMetricFamily(metric, f"Draft tokens {name}, by source", labels=["source"])
            for source, count in stats.sources.items():
                family.add_metric([source], getattr(count, name))
            yield family
