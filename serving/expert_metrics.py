"""What Prometheus sees of shared experts: how even the ranks are, and what was done about it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from serving.expert_parallel import ExpertState

Labels = Mapping[str, str]

_SUMS = {
    "serving_expert_swaps": ("Copies of experts that were exchanged, on all ranks", "swaps"),
    "serving_expert_steps": ("Steps of all ranks together", "steps"),
    "serving_expert_rebuilds": ("Times that other ranks went on after a loss", "rebuilt"),
}
_BY_LAYER = {
    "serving_expert_rank_imbalance": ("Maximum over mean of the rows that ranks computed, when last measured",
                                      "imbalance"),
    "serving_expert_rank_imbalance_planned": ("The same as the placement should have it by the average loads",
                                              "planned"),
}  # fmt: skip


def expert_metrics(states: Sequence[tuple[Labels, ExpertState]]) -> Iterator[Metric]:
    """States with the labels that tell them from each other; all have the same names of labels."""
    names = list(states[0][0]) if states else []
    ranks = GaugeMetricFamily("serving_expert_ranks", "Ranks that share the experts", labels=names)
    for labels, state in states:
        ranks.add_metric(list(labels.values()), state.ranks)
    yield ranks
    for name, (text, attribute) in _SUMS.items():
        total = CounterMetricFamily(name, text, labels=names)
        for labels, state in states:
            total.add_metric(list(labels.values()), getattr(state, attribute))
        yield total
    for name, (text, attribute) in _BY_LAYER.items():
        even = GaugeMetricFamily(name, text, labels=[*names, "layer"])
        for labels, state in states:
            for layer, value in getattr(state, attribute).items():
                even.add_metric([*labels.values(), layer], value)
        yield even
    average = GaugeMetricFamily("serving_expert_load", "Moving average of the tokens of all ranks between two plans",
                                labels=[*names, "layer", "expert"])  # fmt: skip
    copies = GaugeMetricFamily("serving_expert_copies", "Copies by layer and expert",
                               labels=[*names, "layer", "expert"])  # fmt: skip
    for labels, state in states:
        for layer, loads in state.average.items():
            held = [expert for rank in state.slots[layer] for expert in rank]
            for expert, load in enumerate(loads):
                average.add_metric([*labels.values(), layer, str(expert)], load)
                copies.add_metric([*labels.values(), layer, str(expert)], held.count(expert))
    yield average
    yield copies
