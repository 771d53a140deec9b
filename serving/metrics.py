"""What Prometheus sees of a server. Tokens per second are rates of the counters; all else is read when it is asked for.

A registry per server, so two can live in one process.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serving.backend import Backend, EngineState
from serving.calls import Listeners

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class Metrics:
    """requests: answered ones by endpoint and HTTP status (499: the client hung up)."""

    def __init__(self, backend: Backend) -> None:
        self.registry = CollectorRegistry()
        labels = ("endpoint", "status")
        self.requests = Counter("serving_requests", "Requests by endpoint and status", labels, registry=self.registry)
        first = Histogram("serving_first_token_seconds", "From a request to its first token", buckets=_SECONDS,
                          registry=self.registry)  # fmt: skip
        between = Histogram("serving_between_tokens_seconds", "Between tokens of a request", buckets=_SECONDS,
                            registry=self.registry)  # fmt: skip
        backend.listeners = Listeners(first.observe, between.observe)
        self.registry.register(_States(backend))

    def text(self) -> bytes:
        return generate_latest(self.registry)


_GAUGES = {
    "serving_waiting": ("Requests in the queue", "waiting"),
    "serving_running": ("Requests that are being computed", "running"),
    "serving_cache_tokens": ("Tokens that the cache can hold", "cache_tokens"),
    "serving_cache_used_tokens": ("Tokens of the pages in use", "cache_used"),
    "serving_draft_acceptance": ("Share of drafts that were right, since the start", "acceptance"),
}
_SUMS = {
    "serving_steps": ("Steps of the engine", "steps"),
    "serving_read_tokens": ("Prompt tokens read, again after a preemption", "read"),
    "serving_made_tokens": ("Tokens made", "made"),
    "serving_drafted_tokens": ("Drafts checked", "drafted"),
    "serving_accepted_tokens": ("Drafts that were right", "accepted"),
    "serving_preemptions": ("Requests that gave up their pages", "preemptions"),
    "serving_expert_swaps": ("Copies of shared experts that were exchanged, on all ranks", "swaps"),
}


class _States(Collector):
    """The engines of a backend, one sample each."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def collect(self) -> Iterator[Metric]:
        states = list(self._backend.states())
        names = list(states[0][0]) if states else []
        for kind, families in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _SUMS)):
            for name, (text, attribute) in families.items():
                family = kind(name, text, labels=names)
                for labels, state in states:
                    family.add_metric(list(labels.values()), getattr(state, attribute))
                yield family
        yield from _experts(states, names)
        yield from self._backend.more_metrics()


def _experts(states: list[tuple[dict[str, str], EngineState]], names: list[str]) -> Iterator[Metric]:
    loads = CounterMetricFamily("serving_expert_tokens", "Tokens by layer and expert",
                                labels=[*names, "layer", "expert"])  # fmt: skip
    imbalance = GaugeMetricFamily("serving_expert_imbalance", "Maximum over mean load of the experts of a layer",
                                  labels=[*names, "layer"])  # fmt: skip
    ranks = GaugeMetricFamily("serving_expert_rank_imbalance", "Maximum over mean of what ranks that share experts "
                              "computed, as last measured", labels=[*names, "layer"])  # fmt: skip
    for labels, state in states:
        for layer, counts in state.loads.items():
            for expert, count in enumerate(counts):
                loads.add_metric([*labels.values(), layer, str(expert)], count)
            imbalance.add_metric([*labels.values(), layer], max(counts) * len(counts) / max(1, sum(counts)))
        for layer, value in state.rank_imbalance.items():
            ranks.add_metric([*labels.values(), layer], value)
    yield loads
    yield imbalance
    yield ranks
