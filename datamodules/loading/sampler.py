"""The sampler and the loader of `PipelineDataModule`: the same order under every strategy, from any batch on."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, Self

from torch.utils.data import DataLoader, DistributedSampler

from bigmac_lightning.checkpoints.resuming import ResumableLoader


class EpochSampler(DistributedSampler):
    """Yields (epoch, index), so that the random parts of a sample can depend on both, in any worker process.

    It is a `DistributedSampler` because Lightning does not replace one, and sets its epoch. With several replicas the
    last samples are repeated until all have equally many: an evaluation then counts a few samples twice.

    Attributes:
        start: the first sample that the next iterator yields; iterators after it begin with sample 0.
    """

    start: int = 0

    def __iter__(self) -> Iterator[Any]:
        first, self.start = self.start, 0
        return ((self.epoch, index) for index in islice(super().__iter__(), first, None))


class EpochLoader(ResumableLoader, DataLoader[Any]):
    """A DataLoader with an `EpochSampler` that can continue after any batch. It is made by `of`.

    Lightning makes another one of it, with a sampler of its own, to overfit and to predict.
    """

    @classmethod
    def of(cls, *args: Any, uncounted: Callable[[], int] | None = None, **kwargs: Any) -> Self:
        """
        Args:
            uncounted: see `ResumableLoader`.
            args, kwargs: of a DataLoader.
        """
        made = cls(*args, **kwargs)
        made.uncounted = uncounted
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        DataLoader.__init__(self, *args, **kwargs)
        ResumableLoader.__init__(self)
        self.stands = [{"epoch": 0, "step": 0}]

    def __iter__(self) -> Any:
        epoch, step, stand = 0, 0, self.stands[-1]
        if isinstance(self.sampler, EpochSampler):
            epoch = self.sampler.epoch
            step = stand["step"] if self.resumes and stand["epoch"] == epoch else 0
            self.sampler.start = step * (self.batch_size or 1)
        self.resumes = False
        for batch in super().__iter__():
            step += 1
            self.reach({"epoch": epoch, "step": step})
            yield batch

    def describe(self) -> dict[str, Any]:
        sampler: Any = self.sampler
        order = {name: getattr(sampler, name, None) for name in ("seed", "shuffle", "num_replicas")}
        return {"steps": len(self), "batch_size": self.batch_size, "samples": len(sampler), **order}

    def stand_of(self, state: dict[str, Any]) -> dict[str, Any]:
        """
        Raises:
            ValueError: the run was saved within an epoch, the rest of which this loader would not yield.
        """
        own = self.describe()
        within_epoch = 0 < state["step"] < state["steps"]
        if within_epoch and (other := {name: state[name] for name in own if state[name] != own[name]}):
            raise ValueError(
                f"the run was saved in the middle of an epoch with {other}, and now has "
                f"{ {name: own[name] for name in other} }: the rest of the epoch is not known. Restore it, or resume "
                "from a checkpoint of the end of an epoch"
            )
        return {"epoch": state["epoch"], "step": state["step"] if within_epoch else 0}
