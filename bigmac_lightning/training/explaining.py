"""Says in words what an action of a batch was computing when it failed."""

from collections.abc import Iterable, Sequence

from bigmac_lightning.contracts.batch import Batch, MediaItem, Microbatch, TargetItem
from bigmac_lightning.schedule.action import Action
from bigmac_lightning.schedule.budget import MemoryBudget, size_text
from bigmac_lightning.schedule.liveness import encoder_unit_steps, llm_microbatch_steps
from bigmac_lightning.schedule.plan import Plan
from bigmac_lightning.training.agreement import SHOWN
from bigmac_lightning.training.batch_computation import BatchComputation


def explain(computation: BatchComputation, action: Action, numbers: Sequence[int]) -> str:
    """The microbatches, items and samples of an action of a batch.

    Args:
        computation: the batch.
        action: one of this rank's actions.
        numbers: the number of each of its microbatches in the batch that was given.
    """
    batch, place = computation.batch, (computation.rank, action.piece)
    if action.kind in ("EF", "EB"):
        places = computation.features.items(action.index, place)
        return _items(batch, numbers, [(m, batch.microbatches[m].media[i]) for m, i in places], "media items")
    if action.kind == "G":
        places = computation.conditions.items(action.index, place)
        return _items(batch, numbers, [(m, batch.microbatches[m].targets[i]) for m, i in places], "targets")
    given, names = batch.microbatches[action.index], [o.name for o in batch.microbatches[action.index].origins]
    shape = " x ".join(str(size) for size in given.shape)
    return f"microbatch {numbers[action.index]} ({shape} tokens), {_samples(names)}"


def _items(batch: Batch, numbers: Sequence[int], items: Sequence[tuple[int, MediaItem | TargetItem]], what: str) -> str:
    if not items:
        return f"no {what}: the rank has none in this piece, and runs the component with the others"
    components = {item.encoder if isinstance(item, MediaItem) else item.generator: None for _, item in items}
    found = {numbers[m]: None for m, _ in items}
    microbatches = f"microbatch{'es' * (len(found) > 1)} {_listed(found)}"
    largest = max(items, key=lambda entry: entry[1].rows)
    names = [name for m, item in items if (name := _sample(batch.microbatches[m], item)) is not None]
    most = f"{sum(item.rows for _, item in items)} rows, {largest[1].rows} in the largest"
    name = _sample(batch.microbatches[largest[0]], largest[1])
    most += "" if name is None or len(items) == 1 else f", of sample {name!r}"
    return f"{len(items)} {what} of {_listed(components)} ({most}) of {microbatches}, {_samples(names)}"


def _sample(microbatch: Microbatch, item: MediaItem | TargetItem) -> str | None:
    return microbatch.origins[item.origin].name if item.origin < len(microbatch.origins) else None


def _samples(names: Sequence[str]) -> str:
    known = dict.fromkeys(names)
    return f"sample{'s' * (len(known) > 1)} {_listed(map(repr, known))}" if known else "samples without names"


def _listed(values: Iterable[object]) -> str:
    texts = [str(value) for value in values]
    more = f" and {len(texts) - SHOWN} more" if len(texts) > SHOWN else ""
    return ", ".join(texts[:SHOWN]) + more


def alive_in_plan(plan: Plan, rank: int, action: Action, budget: MemoryBudget | None) -> str:
    """How much a plan had alive on a rank when an action ran, and what the budget says of it."""
    position = plan.ranks[rank].index(action)
    units, microbatches = encoder_unit_steps(plan)[rank][position][0], llm_microbatch_steps(plan)[rank][position][0]
    text = f"the plan has {units:.3g} encoder units and {microbatches:.3g} LLM microbatches alive there"
    if budget is None or budget.budget is None:
        return f"{text}; schedule.memory sets no budget"
    used = size_text(budget.bytes(units, microbatches))
    return f"{text}, {used} by schedule.memory, whose budget is {size_text(budget.limit)}"
