"""The work of the microbatches of one batch, as times, for batches whose microbatches differ."""

from dataclasses import dataclass
from os import PathLike

from bigmac_lightning.schedule.reading import Reader, is_amount, parse_json, read_text


@dataclass(frozen=True)
class MicrobatchWork:
    """The work of one microbatch. Times are in the unit of ``Costs``.

    Attributes:
        llm: factor that the times of its F, B, I and W actions are multiplied by.
        encoder: encoder forward time of each of its media items; the backward takes costs.EB / costs.EF times as long.
        generator: forward and backward time of each of its generator targets.
    """

    llm: float = 1.0
    encoder: tuple[float, ...] = ()
    generator: tuple[float, ...] = ()


@dataclass(frozen=True)
class Workload:
    """The work of all microbatches of a batch.

    Attributes:
        microbatches: the work of each microbatch, in order.
    """

    microbatches: tuple[MicrobatchWork, ...]

    def total(self, kind: str, microbatches: list[int] | None = None) -> float:
        """Return the encoder forward time (kind "EF") or the generator time (kind "G") of these microbatches together,
        by default of all microbatches."""
        works = self.microbatches if microbatches is None else [self.microbatches[m] for m in microbatches]
        return sum(sum(work.generator if kind == "G" else work.encoder) for work in works)

    @classmethod
    def from_json(cls, text: str, source: str = "workload") -> "Workload":
        """Read ``[{"llm": f, "encoder": [item times], "generator": [item times]}, ...]``; keys may be left out.

        Raises:
            ValueError: the text has another form; names the source, the microbatch, the key and the expected value.
        """
        data = parse_json(text, source, ValueError)
        if not isinstance(data, list) or not data:
            raise ValueError(f"{source}: expected a list with one object per microbatch")
        return cls(tuple(_read_microbatch(entry, f"{source}: microbatch {m}") for m, entry in enumerate(data)))

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "Workload":
        """Read a workload file.

        Raises:
            ValueError: the file cannot be read, or ``from_json`` refuses its text.
        """
        return cls.from_json(read_text(str(path), ValueError), str(path))


def _read_microbatch(data: object, source: str) -> MicrobatchWork:
    reader = Reader(data, source, ValueError)
    reader.only({"llm", "encoder", "generator"})
    llm = reader.number("llm", 1.0)
    if llm == 0:
        raise reader.refuse("llm", "a number above 0", llm)
    items = {
        key: tuple(reader.items(key, "a list of item times of at least 0", is_amount)) if key in reader.data else ()
        for key in ("encoder", "generator")
    }
    return MicrobatchWork(llm, items["encoder"], items["generator"])
