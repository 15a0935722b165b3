"""The sampler of every strategy: the same order on one device, under ddp and under bigmac; and a loader with it, which
can go on anywhere.

Knows epochs and replicas as numbers; knows nothing of samples.
"""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, Self

from torch.utils.data import DataLoader, DistributedSampler

from bigmac_lightning.checkpoints.resuming import ResumableLoader


class EpochSampler(DistributedSampler):
    """Yields (epoch, index), so that what is random about a sample can depend on both, in any worker process.

    Lightning leaves a `DistributedSampler` alone and tells it the epoch. With several replicas the last samples are
    repeated until all have equally many: an evaluation then counts a few samples twice.

    Attributes:
        start: first sample that the next iterator yields; the ones after it begin with the first.
    """

    start: int = 0

    def __iter__(self) -> Iterator[Any]:
        first, self.start = self.start, 0
        return ((self.epoch, index) for index in islice(super().__iter__(), first, None))


class EpochLoader(ResumableLoader, DataLoader[Any]):
    """A DataLoader with an `EpochSampler`, which can go on after any batch; made by `of`.

    Lightning may make another one of it, with a sampler of its own: where it overfits or predicts.
    """

    @classmethod
    def of(cls, *args: Any, uncounted: Callable[[], int] | None = None, **kwargs: Any) -> Self:
        """
        Args:
            uncounted: as of `ResumableLoader`.
            args, kwargs: as of a DataLoader.
        """
        made = cls(*args, **kwargs)
        made.uncounted = uncounted
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        DataLoader.__init__(self, *args, **kwargs)
        ResumableLoader.__init__(self)
        self.stands = [{"epoch": 0, "step": 0}]

    def __iter__(self) -> Any:
        epoch, given, stand = 0, 0, self.stands[-1]
        if isinstance(self.sampler, EpochSampler):
            epoch = self.sampler.epoch
            given = stand["step"] if self.resumes and stand["epoch"] == epoch else 0
            self.sampler.start = given * (self.batch_size or 1)
        self.resumes = False
        for batch in super().__iter__():
            given += 1
            self.reach({"epoch": epoch, "step": given})
            yield batch

    def describe(self) -> dict[str, Any]:
        sampler: Any = self.sampler
        order = {name: getattr(sampler, name, None) for name in ("seed", "shuffle", "num_replicas")}
        return {"steps": len(self), "batch_size": self.batch_size, "samples": len(sampler), **order}

    def stand_of(self, state: dict[str, Any]) -> dict[str, Any]:
        own = self.describe()
        within = 0 < state["step"] < state["steps"]
        if within and (other := {name: state[name] for name in own if state[name] != own[name]}):
            raise ValueError(
                f"the run was saved in the middle of an epoch with {other}, and now has "
                f"{ {name: own[name] for name in other} }: the rest of the epoch is not known. Restore it, or resume "
                "from a checkpoint of the end of an epoch"
            )
        return {"epoch": state["epoch"], "step": state["step"] if within else 0}
