"""What Prometheus sees of a server. Tokens per second are rates of the counters; all else is read when it is asked for.

A registry per server, so two can live in one process.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serving.worker import Listeners, Worker

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class Metrics:
    """requests: answered ones by endpoint and HTTP status (499: the client hung up)."""

    def __init__(self, worker: Worker) -> None:
        self.registry = CollectorRegistry()
        labels = ("endpoint", "status")
        self.requests = Counter("serving_requests", "Requests by endpoint and status", labels, registry=self.registry)
        first = Histogram("serving_first_token_seconds", "From a request to its first token", buckets=_SECONDS,
                          registry=self.registry)  # fmt: skip
        between = Histogram("serving_between_tokens_seconds", "Between tokens of a request", buckets=_SECONDS,
                            registry=self.registry)  # fmt: skip
        worker.listeners = Listeners(first.observe, between.observe)
        self.registry.register(_EngineState(worker))

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _EngineState(Collector):
    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def collect(self) -> Iterator[Metric]:
        engine = self._worker.engine
        counters, scheduler, pool = engine.counters, engine.scheduler, engine.pool
        gauges = {
            "serving_waiting": ("Requests in the queue", len(scheduler.waiting)),
            "serving_running": ("Requests that are being computed", len(scheduler.running)),
            "serving_cache_tokens": ("Tokens that the cache can hold", pool.total * pool.size),
            "serving_cache_used_tokens": ("Tokens of the pages in use", pool.used * pool.size),
            "serving_draft_acceptance": ("Share of drafts that were right, since the start", counters.acceptance),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(name, text, value)
        sums = {
            "serving_steps": ("Steps of the engine", counters.steps),
            "serving_read_tokens": ("Prompt tokens read, again after a preemption", counters.read),
            "serving_made_tokens": ("Tokens made", counters.made),
            "serving_drafted_tokens": ("Drafts checked", counters.drafted),
            "serving_accepted_tokens": ("Drafts that were right", counters.accepted),
            "serving_preemptions": ("Requests that gave up their pages", scheduler.preemptions),
        }
        for name, (text, value) in sums.items():
            yield CounterMetricFamily(name, text, value)
        yield from self._experts()

    def _experts(self) -> Iterator[Metric]:
        loads = CounterMetricFamily("serving_expert_tokens", "Tokens by layer and expert", labels=("layer", "expert"))
        imbalance = GaugeMetricFamily("serving_expert_imbalance", "Maximum over mean load of the experts of a layer",
                                      labels=("layer",))  # fmt: skip
        for layer, load_E in self._worker.engine.decoder.loads.items():
            counts = load_E.tolist()
            for expert, count in enumerate(counts):
                loads.add_metric((layer, str(expert)), count)
            imbalance.add_metric((layer,), max(counts) * len(counts) / max(1, sum(counts)))
        yield loads
        yield imbalance
