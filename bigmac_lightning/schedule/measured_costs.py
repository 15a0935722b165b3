"""Costs that were measured on real hardware, and the file that keeps them.

`bigmac profile` writes the file; plan, compare, tune and fit take it. This module knows times and where they were
measured. Whether they fit a model is for those to decide who know the model.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate, pairwise
from math import ceil
from os import PathLike
from typing import Any

from bigmac_lightning.schedule.budget import MemoryBudget
from bigmac_lightning.schedule.costs import Costs
from bigmac_lightning.schedule.rates import Rate, RateKey, Rates
from bigmac_lightning.schedule.reading import Reader, is_amount, is_integer, read_text

FORMAT = "bigmac-costs/1"
SUFFIX = ".json"
LLM = ("F", "B", "I", "W")
KINDS = (*LLM, "EF", "EB", "G")
OPTIONAL = ("message", "optimizer", "reduction", "outside", "encoder_unit", "llm_microbatch", "generator_unit", "peak")
"""Numbers that cannot be measured everywhere, and are then left out of the file."""


@dataclass(frozen=True)
class MeanWork:
    """The work of a mean microbatch. Costs are in the units of the data.

    Attributes:
        tokens, llm: the number of its tokens, and its cost.
        items, rows, media: the number of its media items, of their feature rows, and the sum of their costs.
        targets, target_cost: the number of its targets, and the sum of their costs.
        target_rows: the number of condition rows of its targets.
        target_shape: the shape of the largest target; empty: there are no targets.
    """

    tokens: float
    llm: float
    items: float = 0.0
    rows: float = 0.0
    media: float = 0.0
    targets: float = 0.0
    target_cost: float = 0.0
    target_rows: float = 0.0
    target_shape: tuple[int, ...] = ()

    def with_amounts(self, tokens: float, rows: float, targets: float) -> "MeanWork":
        """The work of a microbatch with these amounts of what has the same mean costs. An amount that is the mean one,
        rounded up, stands for the mean one."""
        more, media, drawn = (
            1.0 if wanted == ceil(known) else wanted / known if known else 0.0
            for wanted, known in ((tokens, self.tokens), (rows, self.rows), (targets, self.targets))
        )
        return MeanWork(
            self.tokens * more,
            self.llm * more,
            self.items * media,
            self.rows * media,
            self.media * media,
            self.targets * drawn,
            self.target_cost * drawn,
            self.target_rows * drawn,
            self.target_shape,
        )


@dataclass(frozen=True)
class MeasuredCosts:
    """What actions of a model cost on some hardware.

    Attributes:
        rates: the seconds of the actions, as functions of their work.
        work: the mean microbatch.
        layers: the number of layers of each stage.
        pipeline_parallel_size: number of ranks, P.
        tensor_parallel_size, context_parallel_size: over how many processes a stage was divided.
        device: name of the device.
        precision: the Trainer's precision.
        model: a text that differs if the model differs.
        trained: names of the components that are trained.
        versions: versions of packages by name.
        message: seconds until a message from a rank has arrived at the next one.
        optimizer: seconds of the optimizer's step.
        reduction: seconds from the last action's end until gradients are summed.
        outside: seconds of a step before its first action and after the optimizer's step, such as those in which data
            are waited for.
        encoder_unit: bytes of the activations of an encoder unit.
        llm_microbatch: bytes of the activations of an LLM microbatch on all stages of a rank, where that is most.
        generator_unit: bytes of the activations of a microbatch's targets.
        rank_microbatches: per rank, bytes of the activations of an LLM microbatch on all of its stages; empty: not
            measured.
        peak: the most bytes that were allocated on a device.
        left_out: what was not measured, and why.
    """

    rates: Rates
    work: MeanWork
    layers: tuple[int, ...]
    pipeline_parallel_size: int
    tensor_parallel_size: int = 1
    context_parallel_size: int = 1
    device: str = ""
    precision: str = ""
    model: str = ""
    trained: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    message: float | None = None
    optimizer: float | None = None
    reduction: float | None = None
    outside: float | None = None
    encoder_unit: float | None = None
    llm_microbatch: float | None = None
    generator_unit: float | None = None
    rank_microbatches: tuple[float, ...] = ()
    peak: float | None = None
    left_out: tuple[str, ...] = ()

    # -- what plans take -----------------------------------------------------------------------------------------------

    def costs(self, size: int) -> Costs:
        """Seconds of the actions on the mean microbatch.

        Backwards that were measured whole are taken as two equal halves, I and W.

        Args:
            size: number of ranks over which all stages are spread.
        """
        peers = self.tensor_parallel_size * self.context_parallel_size
        forward, backward, inputs, weights = (sum(column) / size for column in zip(*self.stage_rows, strict=True))
        nested = {kind: self._nested(kind, rate) / peers for (kind, stage), rate in self.rates.items() if stage is None}
        return Costs(forward, backward, inputs, weights, **nested, latency=self.message or 0.0)

    @property
    def stage_rows(self) -> list[list[float]]:
        """Per stage, its seconds of F, B, I and W on the mean microbatch."""
        rows: list[list[float]] = []
        for stage in range(len(self.layers)):
            known = [self.rates.get((kind, stage)) for kind in LLM]
            forward, backward, inputs, weights = (rate.of(self.work.llm) if rate else 0.0 for rate in known)
            if inputs or weights:
                backward = inputs + weights
            else:
                inputs = weights = backward / 2
            rows.append([forward, backward, inputs, weights])
        return rows

    def of_equal_work(self, items: int, targets: int) -> Rates:
        """Rates by which every microbatch takes as long as the mean one, if it has so many media items and targets of
        cost 1."""
        made: dict[RateKey, Rate] = {}
        for (kind, stage), rate in self.rates.items():
            seconds = rate.of(self.work.llm) if stage is not None else self._nested(kind, rate)
            number = 0 if stage is not None else targets if kind == "G" else items
            made[kind, stage] = Rate(0.0, seconds / number, seconds) if number else Rate(seconds, 0.0, seconds)
        return made

    def _nested(self, kind: str, rate: Rate) -> float:
        """The seconds of the encoder's or the generator's work for the mean microbatch, on one process."""
        work = self.work
        items, cost = (work.targets, work.target_cost) if kind == "G" else (work.items, work.media)
        return rate.each * items + rate.per_cost * cost

    @property
    def beside(self) -> float:
        """Seconds of a step in which no action runs: sums of gradients, the optimizer, and the rest."""
        return sum(seconds for seconds in (self.reduction, self.optimizer, self.outside) if seconds is not None)

    def stage_costs(self, size: int, virtual_stages: int) -> list[list[float]] | None:
        """The seconds of each stage, as `Plan.stage_costs`; ``None`` if other stages were measured."""
        same = size == self.pipeline_parallel_size and size * virtual_stages == len(self.layers)
        return self.stage_rows if same else None

    def memory(self, given: MemoryBudget, size: int) -> MemoryBudget:
        """A memory budget with the measured bytes of activations where none are given.

        Args:
            size: number of ranks. On more ranks than were measured each has a smaller part of the LLM.
        """
        found = {"encoder_unit": self.encoder_unit}
        if self.llm_microbatch is not None:
            found["llm_microbatch"] = self.llm_microbatch * self.pipeline_parallel_size / size
        return replace(given, **{k: round(v) for k, v in found.items() if v is not None and not getattr(given, k)})

    def at(self, layers: Sequence[int], parts: Mapping[str, Sequence[float]], factor: float = 1.0) -> Rates:
        """The rates of other stages: each stage's time is spread over its layers by their estimated costs.

        Args:
            layers: the number of layers of each stage.
            parts: for F, B, I and W, the estimated costs of embedding, layers and head, in any unit.
            factor: by which the time of the LLM is multiplied.
        """
        if tuple(layers) == self.layers and factor == 1:
            return self.rates
        made = {key: rate for key, rate in self.rates.items() if key[1] is None}
        measured, wanted = _parts(self.layers), _parts(layers)
        for kind in LLM:
            of_part: dict[int, Rate] = {}
            for stage, held in enumerate(measured):
                rate, total = self.rates.get((kind, stage)), sum(parts[kind][k] for k in held)
                if rate is not None:
                    shares = {k: parts[kind][k] / total if total else 1 / len(held) for k in held}
                    of_part |= {k: _scaled(rate, share * factor) for k, share in shares.items()}
            for stage, held in enumerate(wanted):
                if found := [of_part[k] for k in held if k in of_part]:
                    key: Any = (kind, stage)
                    made[key] = _sum(found)
        return made

    # -- file ----------------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """The text of a costs file."""
        values = asdict(self) | {"rates": [_record(key, rate) for key, rate in self.rates.items()]}
        values = {"format": FORMAT} | {key: value for key, value in values.items() if value is not None}
        return json.dumps(values, indent=1) + "\n"

    def save(self, path: str | PathLike[str]) -> None:
        """Write a costs file."""
        with open(path, "w", encoding="utf-8") as file:
            file.write(self.to_json())

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "MeasuredCosts":
        """Read a costs file.

        Raises:
            ValueError: the file cannot be read, or ``from_json`` refuses its text.
        """
        return cls.from_json(read_text(str(path), ValueError), str(path))

    @classmethod
    def from_json(cls, text: str, source: str = "costs") -> "MeasuredCosts":
        """Read the text of a costs file.

        Raises:
            ValueError: the text has another form; names the source, the key and the expected value.
        """
        reader = Reader.of_format(text, source, ValueError, FORMAT, set(cls.__dataclass_fields__))
        layers = reader.items("layers", "a list with the number of layers of each stage", _is_count)
        values: dict[str, Any] = {"rates": _read_rates(reader, len(layers)), "work": _read_work(reader)}
        values["layers"], values["versions"] = tuple(layers), reader.get("versions", "an object of texts")
        if not isinstance(values["versions"], dict) or not all(map(_is_text, values["versions"].values())):
            raise reader.refuse("versions", "an object of texts", values["versions"])
        for name in ("pipeline_parallel_size", "tensor_parallel_size", "context_parallel_size"):
            values[name] = reader.integer(name, 1)
        values |= {name: reader.text(name) for name in ("device", "precision", "model")}
        values |= {name: tuple(reader.items(name, "a list of texts", _is_text)) for name in ("trained", "left_out")}
        values |= {name: reader.number(name) for name in OPTIONAL if name in reader.data}
        if "rank_microbatches" in reader.data:
            values["rank_microbatches"] = tuple(reader.items("rank_microbatches", "a list of bytes", is_amount))
        return cls(**values)


def _read_rates(reader: Reader, stages: int) -> Rates:
    """The rates; those of F must be there for each stage, as all other times are relative to them."""
    rates: dict[RateKey, Rate] = {}
    expected = "a list of objects with kind, stage, each, per_cost and mean"
    for number, entry in enumerate(reader.items("rates", expected, lambda value: isinstance(value, dict))):
        one = Reader(entry, f"{reader.source}: rates[{number}]", ValueError)
        one.only({"kind", "stage", "each", "per_cost", "mean"})
        kind: Any = one.text("kind")
        if kind not in KINDS:
            raise one.refuse("kind", f"one of {', '.join(KINDS)}", kind)
        if kind not in LLM and "stage" in entry:
            raise one.refuse("stage", f"no such key, as {kind} belongs to no stage", entry["stage"])
        stage = one.integer("stage", 0) if kind in LLM else None
        if stage is not None and stage >= stages:
            raise one.refuse("stage", f"a number below {stages}, as layers has {stages} stages", stage)
        if (kind, stage) in rates:
            raise one.refuse("kind", "a kind and a stage that occur once", kind)
        rates[kind, stage] = Rate(*(one.number(name) for name in ("each", "per_cost", "mean")))
    for stage in range(stages):
        rate = rates.get(("F", stage))
        if rate is None or not rate.each + rate.per_cost:
            raise reader.refuse("rates", f"a time above 0 for F of stage {stage}", reader.data["rates"])
    return rates


def _read_work(reader: Reader) -> MeanWork:
    one = Reader(reader.get("work", "an object"), f"{reader.source}: work", ValueError)
    names = [name for name in MeanWork.__dataclass_fields__ if name != "target_shape"]
    one.only({*names, "target_shape"})
    for name in ("tokens", "llm"):
        if not one.number(name):
            raise one.refuse(name, "a number above 0", one.data[name])
    shape = tuple(one.items("target_shape", "a list of the lengths of a target's dimensions", _is_count))
    return MeanWork(**{name: one.number(name) for name in names}, target_shape=shape)


def _record(key: RateKey, rate: Rate) -> dict[str, object]:
    kind, stage = key
    return {"kind": kind, **({} if stage is None else {"stage": stage}), **asdict(rate)}


def _parts(layers: Sequence[int]) -> list[range]:
    """The parts of each stage, where part 0 is the embedding, and the last part the head."""
    bounds = [0, *(end + 1 for end in accumulate(layers))]
    bounds[-1] += 1
    return [range(a, b) for a, b in pairwise(bounds)]


def _scaled(rate: Rate, factor: float) -> Rate:
    return Rate(rate.each * factor, rate.per_cost * factor, rate.mean * factor)


def _sum(rates: Sequence[Rate]) -> Rate:
    return Rate(*(sum(getattr(rate, name) for rate in rates) for name in ("each", "per_cost", "mean")))


def _is_count(value: Any) -> bool:
    return is_integer(value) and value >= 1


def _is_text(value: Any) -> bool:
    return isinstance(value, str)
