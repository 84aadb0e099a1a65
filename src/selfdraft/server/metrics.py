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
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
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
        self.rows = Histogram(
            "selfdraft_step_rows",
            "Rows of a step: tokens of trees and of prompts that went through the model at once",
            buckets=ROWS,
            registry=registry,
        )
        registry.register(_Engine(stats))
        self._seen = stats()

    def observe(self, stats: Stats) -> None:
        """Note the engine's last step."""
        before, self._seen = self._seen, stats
        if stats.steps == before.steps + 1:
            self.step.observe(stats.seconds - before.seconds)
            self.rows.observe(stats.rows - before.rows)

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
            "preemptions": "Times that a request gave its memory back and waited",
        }
        for name, about in gauges.items():
            yield GaugeMetricFamily(f"selfdraft_{name}", about, getattr(stats, name) or 0)
        for name, about in counters.items():
            yield CounterMetricFamily(f"selfdraft_{name}", about, getattr(stats, name))
        yield from _drafts(stats)


def _drafts(stats: Stats) -> Iterator[Metric]:
    """Draft tokens by where they are from; those of drafters that do not say it have an empty source."""
    for name, about, total in (
        ("drafted", "Draft tokens that were verified", stats.drafted_tokens),
        ("accepted", "Draft tokens that were accepted", stats.accepted_tokens),
    ):
        family = CounterMetricFamily(f"selfdraft_{name}_tokens", about, labels=["source"])
        known = {source: getattr(count, name) for source, count in stats.sources.items()}
        for source, count in {**known, "": max(0, total - sum(known.values()))}.items():
            family.add_metric([source], count)
        yield family
