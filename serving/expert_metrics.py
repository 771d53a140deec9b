"""What Prometheus sees of experts that ranks share, beside what metrics.py has: where they are, and what is known."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from serving.expert_parallel import ExpertState


def expert_metrics(state: ExpertState) -> Iterator[Metric]:
    yield GaugeMetricFamily("serving_expert_ranks", "Ranks that share the experts", state.ranks)
    yield CounterMetricFamily("serving_expert_steps", "Steps of all ranks together", state.steps)
    planned = GaugeMetricFamily("serving_expert_rank_imbalance_planned", "Maximum over mean load of the ranks, as the "
                                "placement should have it by the average loads", labels=["layer"])  # fmt: skip
    average = GaugeMetricFamily("serving_expert_load", "Moving average of the tokens of all ranks between two plans",
                                labels=["layer", "expert"])  # fmt: skip
    copies = GaugeMetricFamily("serving_expert_copies", "Copies by layer and expert", labels=["layer", "expert"])
    for layer, loads in state.average.items():
        planned.add_metric([layer], state.planned[layer])
        held = [expert for rank in state.slots[layer] for expert in rank]
        for expert, load in enumerate(loads):
            average.add_metric([layer, str(expert)], load)
            copies.add_metric([layer, str(expert)], held.count(expert))
    yield planned
    yield average
    yield copies
