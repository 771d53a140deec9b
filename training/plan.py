"""Which schedule a run follows, and where it cuts the model: by name, or by what the layers cost.

Both are functions of the configuration alone, so every rank comes to the same without asking.
"""

from __future__ import annotations

from dualpipe.auto import search
from dualpipe.costs import Costs
from dualpipe.schedule import Schedule
from dualpipe.schedules import SCHEDULES, make_schedule
from dualpipe.simulator import simulate
from model.config import split_layers
from training.config import Config
from training.work import work_of

AUTO = "auto"


def choose_schedule(config: Config) -> Schedule:
    """The schedule that the configuration asks for. Raises ValueError, naming the overrides, if there is none."""
    name, sizes = config.schedule.name, (config.parallel.pp, config.schedule.micro_batches)
    if name != AUTO and name not in SCHEDULES:
        raise ValueError(f"schedule.name={name!r} is unknown; choose one of {', '.join((*SCHEDULES, AUTO))}")
    try:
        return _search(config, sizes[1], None) if name == AUTO else make_schedule(name, *sizes)
    except ValueError as error:
        raise ValueError(
            f"{error} (parallel.pp={sizes[0]}, schedule.micro_batches={sizes[1]}; change one of them, or schedule)"
        ) from error


def schedule_for(config: Config, micro_batches: int, like: Schedule) -> Schedule:
    """The schedule for another number of micro-batches, on the placement of `like`."""
    if config.schedule.name == AUTO:
        return _search(config, micro_batches, like)
    return make_schedule(config.schedule.name, config.parallel.pp, micro_batches)


def stage_sizes(config: Config, schedule: Schedule) -> tuple[int, ...] | None:
    """Layers per stage: as listed, or so that ranks have equal work; None: equal."""
    if config.parallel.layers_per_stage:
        return tuple(config.parallel.layers_per_stage)
    if config.parallel.split == "equal":
        return None
    if config.schedule.name == AUTO:
        schedule = _stand_in(config, schedule.num_stages)
    return _fastest_cut(config, schedule)


def _fastest_cut(config: Config, schedule: Schedule) -> tuple[int, ...]:
    """Of the equal cut and two balanced ones, the fastest in the simulator."""
    work, num_stages = work_of(config), schedule.num_stages
    cuts = [tuple(len(layers) for layers in split_layers(config.model, num_stages))]
    cuts += [work.balanced(num_stages, _mirrored(schedule), pairs) for pairs in (True, False)]
    return min(cuts, key=lambda sizes: simulate(schedule, work.stages(sizes)).makespan)


def _stand_in(config: Config, num_stages: int) -> Schedule:
    """A known schedule to choose the cut by, before one is searched for at its costs."""
    pp, micro_batches = config.parallel.pp, config.schedule.micro_batches
    if num_stages == 2 * pp:
        return make_schedule("zbv", pp, micro_batches)
    try:
        return make_schedule("dualpipe", pp, micro_batches)
    except ValueError:
        return make_schedule("gpipe", pp, micro_batches)


def _mirrored(schedule: Schedule) -> bool:
    """Does every rank hold a stage and its mirror?"""
    held = [schedule.stages_of(rank) for rank in range(schedule.num_ranks)]
    return all(len(stages) == 2 and sum(stages) == schedule.num_stages - 1 for stages in held)


def stage_costs(config: Config, schedule: Schedule) -> Costs:
    """What the stages of a schedule cost."""
    layers = split_layers(config.model, schedule.num_stages, stage_sizes(config, schedule))
    return work_of(config).stages([len(r) for r in layers])


def _search(config: Config, micro_batches: int, like: Schedule | None) -> Schedule:
    pp, given = config.parallel.pp, config.parallel.layers_per_stage
    if given and len(given) not in (pp, 2 * pp):
        raise ValueError(f"parallel.layers_per_stage={given}: schedule=auto takes PP or 2·PP stages")
    work = work_of(config)
    cuts = []
    for num_stages in (pp, 2 * pp):
        if (given and len(given) != num_stages) or num_stages > config.model.num_layers:
            continue
        if given or config.parallel.split == "equal":
            sizes = tuple(len(r) for r in split_layers(config.model, num_stages, given))
        else:
            sizes = _fastest_cut(config, _stand_in(config, num_stages))
        cuts.append(work.stages(sizes))
    if not cuts:
        raise ValueError(f"model.num_layers={config.model.num_layers} cannot fill {pp} stages")
    found = search(
        pp,
        micro_batches,
        cuts,
        config.schedule.max_activations or None,
        placement=None if like is None else like.placement,
        effort=config.schedule.effort,
    )
    return found.schedule
