"""What Prometheus sees of a cluster beside its engines: who is there or lost, what waits, what was handed over."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from serving.cluster_options import DECODE, PREFILL, WHOLE

if TYPE_CHECKING:
    from serving.router import Router

_SUMS = {
    "serving_lost_requests": ("Requests that failed since a process or a link was lost", "lost requests"),
    "serving_handovers": ("Caches that went from prefill to decode", "hand-overs"),
    "serving_handover_tokens": ("Tokens of these caches", "hand-over tokens"),
}


def cluster_metrics(router: Router) -> Iterator[Metric]:
    o = router.options
    processes = GaugeMetricFamily("serving_processes", "Engine processes that can compute", labels=("side",))
    losses = CounterMetricFamily("serving_process_losses", "Engine processes that were lost", labels=("side",))
    for side, wanted in ((PREFILL, o.prefill), (DECODE, o.decode), (WHOLE, o.together)):
        if wanted:
            processes.add_metric((side,), sum(m.side == side and m.ready for m in router.members))
            losses.add_metric((side,), router.counts[f"{side} losses"])
    yield processes
    yield losses
    yield GaugeMetricFamily("serving_front_waiting", "Requests that wait for a process", len(router.waiting))
    yield GaugeMetricFamily("serving_front_held", "Read prompts that wait for room on the decode side",
                            len(router.held))  # fmt: skip
    for name, (text, key) in _SUMS.items():
        yield CounterMetricFamily(name, text, router.counts[key])
