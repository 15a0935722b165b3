"""The memory that a plan takes on each rank, in bytes, and its limit.

``liveness`` counts the encoder units and LLM microbatches that are alive; this module multiplies the counts by given
bytes. The runtime measures real bytes: see ``runtime.measure.memory``.
"""

import math
import re
from dataclasses import dataclass

from bigmac_lightning.schedule.action import Action
from bigmac_lightning.schedule.liveness import encoder_unit_steps, llm_microbatch_steps
from bigmac_lightning.schedule.plan import Plan, PlanError
from bigmac_lightning.schedule.workload import Workload

Size = str | int
"""A number of bytes, or a text such as "16GiB", "1.5 GB" or "300MiB"."""

_UNITS = {"": 1} | {
    f"{letter}{end}": base**power
    for power, letter in enumerate("KMGT", start=1)
    for end, base in (("iB", 1024), ("B", 1000))
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B|B|)", re.IGNORECASE)


@dataclass(frozen=True)
class MemoryBudget:
    """The memory of a rank. Each attribute is a number of bytes or a text such as "16GiB".

    Attributes:
        budget: the most memory that may be in use at any moment; ``None`` means that memory is reported, but not
            limited.
        encoder_unit: memory of one live encoder unit (the encoder's activations of one mean microbatch).
        llm_microbatch: memory of one live LLM microbatch (its activations on all stages of a rank together).
        static: memory that is always in use: weights, gradients, optimizer states, and the temporary tensors of one
            action.

    Raises:
        ValueError: an attribute is not a size.
    """

    budget: Size | None = None
    encoder_unit: Size = 0
    llm_microbatch: Size = 0
    static: Size = 0

    def __post_init__(self) -> None:
        for name in ("budget", "encoder_unit", "llm_microbatch", "static"):
            value = getattr(self, name)
            if value is not None:
                parse_size(value, f"memory.{name}")

    @property
    def limit(self) -> float:
        """The budget in bytes; infinite if there is none."""
        return math.inf if self.budget is None else float(parse_size(self.budget))

    def bytes(self, encoder_units: float, llm_microbatches: float) -> float:
        """Bytes in use on a rank while this many encoder units and LLM microbatches are alive."""
        return (
            parse_size(self.static)
            + encoder_units * parse_size(self.encoder_unit)
            + llm_microbatches * parse_size(self.llm_microbatch)
        )

    def steps(self, plan: Plan, workload: Workload | None = None) -> list[list[tuple[float, float]]]:
        """Per rank and position in its list, the bytes in use while that action runs, and right after it."""
        units, microbatches = encoder_unit_steps(plan, workload), llm_microbatch_steps(plan)
        return [
            [(self.bytes(u, m), self.bytes(v, n)) for (u, v), (m, n) in zip(us, ms, strict=True)]
            for us, ms in zip(units, microbatches, strict=True)
        ]

    def peaks(self, plan: Plan, workload: Workload | None = None) -> list[float]:
        """Per rank, the most bytes in use at any moment."""
        return [max((during for during, _ in row), default=self.bytes(0, 0)) for row in self.steps(plan, workload)]

    def encoder_units(self, llm_microbatches: list[float]) -> float:
        """The number of encoder units that fit on every rank, given each rank's peak of LLM microbatches.

        More may fit in a plan whose two peaks occur at different moments.
        """
        unit = parse_size(self.encoder_unit)
        free = min((self.limit - self.bytes(0, peak) for peak in llm_microbatches), default=math.inf)
        return max(0.0, free / unit) if unit else math.inf

    def check(self, plan: Plan, workload: Workload | None = None) -> None:
        """Check that a plan stays within the budget.

        Raises:
            PlanError: an action brings the memory of its rank above the budget; names rank, action and bytes.
        """
        for rank, (actions, row) in enumerate(zip(plan.ranks, self.steps(plan, workload), strict=True)):
            for position, (action, (used, _)) in enumerate(zip(actions, row, strict=True)):
                if used > self.limit * (1 + 1e-9):
                    raise PlanError(self._refusal(plan, rank, position, action, used, workload))

    def _refusal(
        self, plan: Plan, rank: int, position: int, action: Action, used: float, workload: Workload | None
    ) -> str:
        units, _ = encoder_unit_steps(plan, workload)[rank][position]
        microbatches, _ = llm_microbatch_steps(plan)[rank][position]
        if self.bytes(0, 0) > self.limit:
            advice = "memory.static alone is above it: use more ranks or a smaller model"
        elif self.bytes(0, microbatches) > self.limit:
            advice = "use a backbone with fewer LLM microbatches in flight, or smaller microbatches"
        else:
            advice = "use a smaller group_size, policy nested or filled, or smaller microbatches"
        return (
            f"rank {rank}: {action} brings the memory to {size_text(used)} ({units:.3g} encoder units, "
            f"{microbatches:g} LLM microbatches, {size_text(parse_size(self.static))} static); "
            f"the budget is {size_text(self.limit)}: {advice}"
        )


def parse_size(size: Size, name: str = "size") -> int:
    """Return the bytes of a size such as "16GiB", "1.5 GB", "4096" or 4096. KiB is 1024 bytes, KB is 1000 bytes.

    Raises:
        ValueError: `size` is not a size; the message begins with `name`.
    """
    match = _SIZE.fullmatch(str(size).strip())
    if match is None:
        raise ValueError(f"{name} is {size!r}; expected bytes, or a size such as 16GiB, 1.5GB or 300MiB")
    number, unit = match.groups()
    unit = unit[:1].upper() + unit[1:-1].lower() + "B" if len(unit) > 1 else ""
    return round(float(number) * _UNITS[unit])


def size_text(size: float) -> str:
    """Return a number of bytes as a short text such as "1.5 GiB"."""
    power = min(4, int(math.log(size, 1024))) if size >= 1 else 0
    return f"{size / 1024**power:.4g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
