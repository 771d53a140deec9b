"""Expert parallelism while serving: ranks with sequences of their own share the routed experts of one model.

    groups = serving_groups(range(dist.get_world_size()))          # or of a part of the ranks
    experts = load_experts(find_model(path), "fp32", "cpu", groups, ExpertSettings(redundant=8, placement_every=100))
    engine = Engine(experts.stage, max_length, experts=experts)    # each rank has its own, with its own requests
    while not experts.ended:
        events = engine.step()                                     # all ranks, all the time, with or without work

All ranks step together. A step begins with an exchange of a few integers (`begin`), so everybody knows whether there is
work anywhere; a rank without any joins with no tokens of its own, because the others' tokens want its experts. If
nobody has work, `step` returns at once: sleep a little before the next. `leave` ends all ranks after the same step.

Each rank holds its slots' experts only, and all else of the model. Loads are counted; every `placement_every` steps a
new placement is planned, layer by layer, and experts move in the background (swaps.py). What a request gets is the same
to the bit whatever the placement and however many ranks there are, if the rank's own batch is the same.

When a rank is lost, every other one gets a RuntimeError out of `step`, and no sequence has changed. Then each calls

    experts.rebuild(serving_groups(those that are left))

which plans anew, reads the experts that are missing from the checkpoint, and goes on; so does the engine.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from model.layer import Layer
from model.stage import ModelStage
from parallel.copies import CopyTable, Slots
from parallel.replicated import ReplicatedDispatcher
from parallel.rows import Fp8Rows
from parallel.whole import FoundModel, empty_model, load_into
from serving.expert_groups import ServingGroups
from serving.expert_plan import ExpertSettings, Loads, first_slots, imbalance, next_slots
from serving.expert_weights import Source, checkpoint_source
from serving.hosted_experts import HEIGHTS, HostedExperts, SlotWeights, agreeing_heights
from serving.swaps import Mover, Swap, arrange, swaps


@dataclass
class _MoELayer:
    """label: as in Decoder.loads. prefix: the global name of its experts. way: the swaps that are still to be made."""

    label: str
    prefix: str
    module: Layer
    hosted: HostedExperts
    dispatcher: ReplicatedDispatcher
    way: deque[Swap] = field(default_factory=deque)

    @property
    def slots(self) -> Slots:
        return self.dispatcher.table.slots


@dataclass(frozen=True)
class ExpertState:
    """Where experts are, as plain numbers, by layer.

    planned   maximum over mean load of ranks as the present placement should have it, by the moving average of loads
    slots     experts by rank
    average   the moving average of each expert's tokens between two measurements
    """

    ranks: int
    steps: int
    planned: dict[str, float]
    slots: dict[str, Slots]
    average: dict[str, list[float]]


def load_experts(
    found: FoundModel,
    precision: str,
    device: str | torch.device,
    groups: ServingGroups | None,
    settings: ExpertSettings,
    averaged: bool = False,
    cpp: bool = False,
) -> ExpertParallel:
    """A model of which this rank reads its own experts only. Collective, unless it has no groups yet.

    cpp   our C++ kernels for what all ranks compute alike: attention, and the choice of experts
    Raises ValueError for settings that cannot be, FormatError or CheckpointError for what cannot be read.
    """
    settings.check(found.config.num_experts, 1 if groups is None else groups.size)
    stage = empty_model(found.config, precision, device, with_experts=False, cpp=cpp)
    load_into(found, stage, averaged)
    return ExpertParallel(stage, checkpoint_source(found, averaged), groups, settings)


class ExpertParallel:
    """Gives a stage without routed experts this rank's, and keeps them. Collective.

    stage    the whole model but for its routed experts (`empty_model(…, with_experts=False)`)
    source   where experts are read
    groups   None: not known yet; then there are no experts before `rebuild`
    ended    whether somebody has called `leave`
    quiet    whether nobody had work in the latest step
    imbalance   by layer: maximum over mean of the rows that ranks computed, in the latest measurement
    swapped     copies of experts that were exchanged so far, in all ranks
    """

    def __init__(
        self, stage: ModelStage, source: Source, groups: ServingGroups | None, settings: ExpertSettings
    ) -> None:
        config = stage.config
        self.stage, self.source, self.settings, self.groups = stage, source, settings, groups or ServingGroups()
        settings.check(config.num_experts, self.groups.size)
        found = [(name, m) for name, m in stage.named_modules() if isinstance(m, Layer) and m.is_moe]
        self.loads = Loads(len(found), config.num_experts, settings.memory)
        self.steps = self.swapped = self.rebuilt = 0
        self.ended, self.quiet = False, True
        self._leaving = False
        self._layers: list[_MoELayer] = []
        self._mover: Mover | None = None
        self._moving: _MoELayer | None = None
        self._due: deque[int] = deque()  # layers whose placement is to be planned
        self._watched: Mapping[str, Tensor] = {}
        self._seen_LE = torch.zeros(len(found), config.num_experts, dtype=torch.int64)
        self._rows_seen: list[int] = [0] * len(found)
        self.imbalance: dict[str, float] = {}
        self._rank_before: int | None = None
        self._install(found)
        if groups is not None:
            self._place([() for _ in found])
            self._choose_heights()

    # -- for the engine ------------------------------------------------------------------------------------------

    def watch(self, loads: Mapping[str, Tensor]) -> None:
        """Where this rank's tokens are counted, [E] by layer, ever rising (Decoder.loads)."""
        self._watched = loads

    def begin(self, tokens: int) -> int:
        """Agree on the next step. tokens: how many this rank has for it. Returns the most that any rank has.

        If that is not 0 all ranks must now compute a step. Between steps it also exchanges experts that have arrived,
        and plans. Raises RuntimeError if a rank is gone.
        """
        pending = 0 if self._mover is None or self._mover.poll() else 1
        told = self.groups.tell([tokens, pending, self._leaving])
        most, anyone_pending, leaving = told.max(0).values.tolist()
        self.quiet = not most
        self.ended = self.ended or bool(leaving)
        if self._mover is not None and not anyone_pending:
            self._exchange()
        if most:
            self.steps += 1
            every = self.settings.placement_every
            if every and self.steps % every == 0:
                self.measure()
                self.replan()
        if self._mover is None:
            self._go_on()
        return int(most)

    def leave(self) -> None:
        """Let all ranks know, with the next step, that serving ends: then `ended` is true on each of them."""
        self._leaving = True

    # -- loads and placements ------------------------------------------------------------------------------------

    def measure(self) -> None:
        """Bring together what ranks counted since the last time. Collective, between two steps."""
        if not self._layers:
            return
        zeros = torch.zeros(self.stage.config.num_experts, dtype=torch.int64)
        now_LE = torch.stack([self._watched.get(layer.label, zeros).cpu() for layer in self._layers])
        rows = [layer.hosted.rows for layer in self._layers]
        new_rows = [now - before for now, before in zip(rows, self._rows_seen, strict=True)]
        self.loads.add(self.groups.add_up(now_LE - self._seen_LE))
        computed_PL = self.groups.tell(new_rows)
        self.imbalance = {layer.label: imbalance(computed_PL[:, i]) for i, layer in enumerate(self._layers)}
        self._seen_LE, self._rows_seen = now_LE, rows

    def replan(self) -> None:
        """Let every layer have a new placement, one after the other in the coming steps. On all ranks alike."""
        self._due = deque(range(len(self._layers)))

    def move_to(self, wanted: Mapping[str, Slots]) -> None:
        """Set out for other placements of some layers, by label, in the coming steps. On all ranks alike.

        Raises ValueError if a placement has other ranks, slots or experts than the present one.
        """
        for layer in self._layers:
            if layer.label in wanted:
                there = arrange(layer.slots, wanted[layer.label])
                if list(map(len, there)) != list(map(len, layer.slots)):
                    raise ValueError(f"layer {layer.label}: {there} does not fit the slots of {layer.slots}")
                CopyTable.of(there, self.stage.config.num_experts)
                layer.way = deque(swaps(layer.slots, there))

    def _plan(self, layer: int) -> None:
        loads = self.loads.average[layer]
        if loads.any():
            at = self._layers[layer]
            wanted = next_slots(loads, at.slots, self.stage.config.num_groups, self.settings)
            self.move_to({at.label: wanted})

    @property
    def moving(self) -> bool:
        """Whether experts are on their way to other ranks, or layers wait for their plan."""
        return self._mover is not None or bool(self._due) or any(layer.way for layer in self._layers)

    def state(self) -> ExpertState:
        labels = [layer.label for layer in self._layers]
        planned = {label: imbalance(_rank_loads(layer.dispatcher.table, self.loads.average[i]))
                   for i, (label, layer) in enumerate(zip(labels, self._layers, strict=True))}  # fmt: skip
        slots = {layer.label: layer.slots for layer in self._layers}
        average = {label: self.loads.average[i].tolist() for i, label in enumerate(labels)}
        return ExpertState(self.groups.size, self.steps, planned, slots, average)

    # -- after a loss --------------------------------------------------------------------------------------------

    def rebuild(self, groups: ServingGroups) -> None:
        """Go on with other ranks: those that are left or new, in their new groups. Collective over these.

        Experts that nobody holds any more, and those that the new plan wants elsewhere, are read from the source.
        """
        self.groups = groups
        self.steps, self.loads.average = max(self.groups.gather((self.steps, self.loads.average)), key=lambda s: s[0])
        self._mover = self._moving = None
        self._due.clear()
        before = self._rank_before
        self._place([() if before is None else layer.slots[before] for layer in self._layers])
        self._choose_heights()
        self.rebuilt += 1

    # -- how it is done ------------------------------------------------------------------------------------------

    def _install(self, found: Sequence[tuple[str, Layer]]) -> None:
        config, tools = self.stage.config, self.stage.tools
        precision = tools.precision
        rows = None if precision.wire is None else Fp8Rows(precision.wire, precision.dtype)
        for name, module in found:
            hosted = HostedExperts([], tools, HEIGHTS[:1])
            everything = CopyTable.of((tuple(range(config.num_experts)),), config.num_experts, tools.device)
            dispatcher = ReplicatedDispatcher(None, everything, rows)
            module.tools = replace(tools, dispatcher=dispatcher)
            module.experts = hosted  # type: ignore[assignment]
            self._layers.append(_MoELayer(module.label, f"{name}.experts", module, hosted, dispatcher))

    def _place(self, held: Sequence[Sequence[int]]) -> None:
        """Placements for ranks that hold these experts, by layer; reads what this rank lacks."""
        rank, config, tools = self.groups.rank, self.stage.config, self.stage.tools
        everyone = self.groups.gather([tuple(experts) for experts in held])
        wanted: dict[str, Tensor] = {}
        for i, layer in enumerate(self._layers):
            there = dict(zip(held[i], layer.hosted.held, strict=True))
            slots = first_slots(self.loads.average[i], [experts[i] for experts in everyone], config.num_groups,
                                self.settings)  # fmt: skip
            for expert in sorted(set(slots[rank]) - there.keys()):
                there[expert] = self._empty()
                wanted |= there[expert].named(f"{layer.prefix}.{expert}")
            layer.way.clear()
            layer.hosted.put([there[expert] for expert in slots[rank]])
            layer.dispatcher.groups, layer.dispatcher.position = self.groups.tokens, rank
            layer.dispatcher.active = self.settings.active_on(config.num_experts, self.groups.size)
            layer.dispatcher.table = CopyTable.of(slots, config.num_experts, tools.device)
        self._rank_before = rank
        if wanted:
            self.source(wanted)

    def _empty(self) -> SlotWeights:
        config, tools = self.stage.config, self.stage.tools
        return SlotWeights(config.hidden_size, config.expert_ffn_size, tools.precision.dtype, tools.device)

    def _choose_heights(self) -> None:
        """Layers are alike, so one is tried; ranks take what suits all of them."""
        if not self._layers:
            return
        hosted, tools = self._layers[0].hosted, self.stage.tools
        mine = agreeing_heights(lambda x, gates: hosted.tile(0, x, gates), self.stage.config.hidden_size,
                                tools.precision.dtype, tools.device)  # fmt: skip
        common = set.intersection(*(set(heights) for heights in self.groups.gather(mine))) or {1}
        for layer in self._layers:
            layer.hosted.heights = tuple(sorted(common))

    def _go_on(self) -> None:
        """Start the next swap, or plan the next layer if there is none."""
        layer = next((layer for layer in self._layers if layer.way), None)
        if layer is None and self._due:
            at = self._due.popleft()
            self._plan(at)
            layer = self._layers[at] if self._layers[at].way else None
        if layer is None:
            return
        rank = self.groups.rank
        self._moving = layer
        self._mover = Mover(layer.way.popleft(), rank, layer.hosted.held, layer.slots[rank], self.groups.weights)

    def _exchange(self) -> None:
        """Everybody has everything of the swap under way: from now on it counts."""
        mover, layer = self._mover, self._moving
        assert mover is not None
        assert layer is not None
        slots = [list(rank) for rank in layer.slots]
        for write in mover.swap:
            slots[write.rank][write.slot] = write.expert
        layer.hosted.put([mover.arrived.get(slot, weights) for slot, weights in enumerate(layer.hosted.held)])
        table = CopyTable.of(tuple(map(tuple, slots)), self.stage.config.num_experts, self.stage.tools.device)
        layer.dispatcher.table = table
        self.swapped += len(mover.swap)
        self._mover = self._moving = None


def _rank_loads(table: CopyTable, loads: Any) -> list[float]:
    copies = table.copies_E.tolist()
    return [sum(float(loads[e]) / copies[e] for e in rank) for rank in table.slots]
