"""The command `bigmac data`: it shows what the model will see of a run's data, before the run.

It makes the DataModule of a config, measures its sources, and shows samples. The model is made without weights, to
check that it can take the batches. What is shown comes from datamodules/inspection.py; this file prints and draws it.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from bigmac_lightning.commands.answer import answer
from bigmac_lightning.commands.config import ConfigReader
from bigmac_lightning.commands.plan import PICTURES
from bigmac_lightning.commands.request import check_suffix
from bigmac_lightning.datamodules import (  # pyright: ignore[reportMissingImports]
    ExampleError,
    MultimodalDataModule,
    inspection,
)
from bigmac_lightning.datamodules.inspection import (  # pyright: ignore[reportMissingImports]
    ItemView,
    SampleView,
    SourceView,
    StepView,
)
from bigmac_lightning.whole_tables import print_whole

SPLITS = ("train", "val", "test", "predict")
BLOCKS = " ▁▂▃▄▅▆▇█"
STYLES = {"given": "", "learnt": "black on green", "media": "cyan", "target": "magenta"}
MOST_PICTURES = 24


class DataReader(ConfigReader):
    """Makes the DataModule of a config, and checks it against the model.

    Attributes:
        data: the DataModule, as in a run.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        optional: Any = str | None
        parser.add_argument("--split", default="train", choices=SPLITS, help="the split whose samples are shown")
        parser.add_argument("--samples", type=int, default=5, help="number of samples shown, from each source in turn")
        parser.add_argument("--refused", type=int, default=5, help="number of unusable examples listed for each source")
        parser.add_argument("--stream_examples", type=int, default=200, help="number of examples read of each stream")
        parser.add_argument("--replicas", type=int, default=1, help="number of pipelines that share a step")
        parser.add_argument("--output", type=optional, help="file of a picture of the decoded images: .png, .svg, .pdf")

    def instantiate_classes(self) -> None:
        """Instantiate the data, and the model, which is only checked."""
        if self.config.get("data") is None:
            raise ValueError("the config has no data; give it a DataModule")
        self.data = self.parser.instantiate_classes(Namespace(data=self.config["data"]))["data"]
        if not isinstance(self.data, MultimodalDataModule):
            raise ValueError(
                f"data is {type(self.data).__name__}, which makes its tokens itself: only a MultimodalDataModule, or "
                "a class derived from it, can be shown"
            )
        self.data.check(self.parser.instantiate_classes(Namespace(model=self.config["model"]))["model"])

    @property
    def microbatches(self) -> int | None:
        """The number of microbatches that the strategy sets."""
        strategy = self.config["trainer"]["strategy"]
        return strategy["init_args"].get("microbatches") if isinstance(strategy, Namespace) else None


def main(argv: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    return answer("data", lambda: _show(DataReader("data", argv), Console()), further=[TypeError])


def _show(run: DataReader, console: Console) -> None:
    config, data = run.config, run.data
    check_suffix(config["output"], PICTURES)
    for name, least in (("samples", 0), ("refused", 0), ("stream_examples", 1), ("replicas", 1)):
        if config[name] < least:
            raise ValueError(f"--{name} is {config[name]}; expected an integer of at least {least}")
    views: dict[str, list[SourceView]] = {}
    for split in SPLITS:
        if data.split_sources(split):
            views[split] = inspection.sources_of(data, split, config["stream_examples"])
    if not views:
        raise ValueError("the DataModule has no sources: give it train, val, test or predict")
    if config["split"] not in views:
        raise ValueError(
            f"--split is {config['split']!r}, for which the DataModule has no sources; it has {list(views)}"
        )
    if not console.is_terminal:
        console.width = max(console.width, 220)  # no line of a sample is cut off in a file
    print_whole(console, _sources(views))
    for split, view in ((split, view) for split, some in views.items() for view in some):
        _print_refused(console, split, view, config["refused"], data.on_error)
    split = config["split"]
    step = inspection.first_step(data, views.get(split, ()), split, run.microbatches, config["replicas"])
    if step is not None:
        print_whole(console, _step(step, data, config["replicas"]))
    samples = []
    for view, index in inspection.evenly_chosen(views.get(split, ()), config["samples"]):
        samples.append(inspection.sample_of(data, view, index, split))
        console.print(_sample(samples[-1], console.is_terminal))
    if samples:
        console.print(_legend(console.is_terminal))
    if config["output"]:
        drawn = _draw(samples, config["output"])
        console.print(f"{config['output']}: {drawn}", highlight=False, soft_wrap=True)


def _sources(views: dict[str, list[SourceView]]) -> Table:
    table = Table(title="sources")
    for name in ("split", "source"):
        table.add_column(name, overflow="fold")
    for name in ("examples", "refused", "tokens", "learnt", "of media", "least", "median", "most", "lengths"):
        table.add_column(name, justify="left" if name == "lengths" else "right", no_wrap=True)
    for split, some in views.items():
        for view in some:
            usable, arrays = view.usable, view.measured.arrays
            lengths = view.measured.tokens[usable]
            counts = [int(arrays[name][usable].sum()) for name in ("tokens", "learnt", "rows")]
            spread = [int(np.quantile(lengths, q, method="nearest")) for q in (0, 0.5, 1)] if usable else ["", "", ""]
            numbers = [len(view.measured), len(view.measured.errors), *counts, *spread]
            shown = [f"{number:,}" if isinstance(number, int) else number for number in numbers]
            table.add_row(split, view.source.name, *shown, _histogram(lengths))
    table.caption = "lengths: numbers of examples from 0 tokens to the most, in 24 equal steps"
    return table


def _histogram(lengths: np.ndarray, bins: int = 24) -> str:
    if not len(lengths):
        return ""
    counts, _ = np.histogram(lengths, bins, (0, int(lengths.max()) + 1))
    return "".join(BLOCKS[-(-8 * int(count) // int(counts.max()))] for count in counts)


def _print_refused(console: Console, split: str, view: SourceView, most: int, on_error: str) -> None:
    errors = list(view.measured.errors.values())
    if not errors:
        return
    what = "the run would end with this error; on_error=skip leaves them out" if on_error == "raise" else "left out"
    lines = [Text(f"{count} x {reason}") for reason, count in view.reasons()[:most]]
    lines += [Text(f"  {error}", style="dim") for error in errors[:most]]
    if len(errors) > most:
        lines.append(Text(f"  ... and {len(errors) - most} more (--refused {len(errors)} lists all)", style="dim"))
    title = f"{split}: {len(errors)} of {len(view.measured)} examples of {view.source.name} cannot be used ({what})"
    console.print(Panel(Group(*lines), title=Text(title), title_align="left", border_style="red"))


def _step(step: StepView, data: MultimodalDataModule, replicas: int) -> Table:
    table = Table(
        title=f"first step of {step.steps:,} in an epoch" + (", of the first replica" if replicas > 1 else "")
    )
    for name in ("microbatch", "samples", "tokens", "of the budget", "learnt", "of media", "encoders' cost"):
        table.add_column(name, justify="right")
    for number, m in enumerate(step.microbatches):
        share = f"{m.tokens / data.token_budget:.1%}"
        table.add_row(str(number), *(f"{n:,}" for n in (m.samples, m.tokens)), share, f"{m.learnt:,}", f"{m.rows:,}",
                      f"{m.cost:,.0f}")  # fmt: skip
    rows = "packed into one row" if data.packing.packed else "a row for each sample, padded"
    table.caption = f"{step.used:.1%} of token_budget={data.token_budget} are used; {rows}"
    return table


def _sample(sample: SampleView, colours: bool) -> Panel:
    """The text of a sample and its items. Without colours, learnt runs are in brackets."""
    text = Text(overflow="fold")
    for span in sample.spans:
        if span.kind in ("media", "target"):
            text.append(f"<{span.text}>", STYLES[span.kind])
        elif span.kind == "learnt" and not colours:
            text.append(f"⟦{span.text}⟧")
        else:
            text.append(span.text, STYLES[span.kind])
    lines = [text, Text(f"{sample.tokens:,} tokens, {sample.learnt:,} of them learnt", style="dim")]
    lines += [Text(_description_of(item), style="dim") for item in sample.items]
    return Panel(Group(*lines), title=Text(sample.name), title_align="left")


def _description_of(item: ItemView) -> str:
    size = item.size
    frames = f", {size.frames} frames" if size.frames > 1 or size.seconds else ""
    frames += f" in {size.seconds:.2f} s" if size.seconds else ""
    return f"{item.label}: {item.item.file.name}, {size.width} x {size.height}{frames}, {item.rows:,} tokens"


def _legend(colours: bool) -> Text:
    learnt = "on green" if colours else "between ⟦ and ⟧"
    return Text(
        f"Text {learnt} is learnt; all other text is not. For a picture of the media: --output FILE.png", style="dim"
    )


def _pictures(samples: Sequence[SampleView]) -> Iterator[tuple[str, Any]]:
    for number, sample in enumerate(samples, start=1):
        for item in sample.items:
            label = f"{number}. {item.label}, {item.size.width} x {item.size.height}\n{item.rows} tokens"
            try:
                for k, pixels in enumerate(item.pixels()):
                    yield label if not k else "", pixels
            except ExampleError as error:
                yield f"{label}\n{error}", np.zeros((3, 1, 1), dtype=np.uint8)


def _draw(samples: Sequence[SampleView], output: str) -> str:
    """Write the picture; returns a description of its content."""
    try:
        from matplotlib.figure import Figure
    except ImportError as problem:
        raise ImportError("pictures need matplotlib: pip install 'bigmac-lightning[quickstart]'") from problem
    pictures = [pair for _, pair in zip(range(MOST_PICTURES), _pictures(samples), strict=False)]
    if not pictures:
        raise ValueError("--output: the samples that are shown have no images or videos; show more with --samples")
    across = min(6, len(pictures))
    down = -(-len(pictures) // across)
    figure = Figure(figsize=(2.4 * across, 2.8 * down), layout="constrained")
    for axes in figure.subplots(down, across, squeeze=False).flat:
        axes.axis("off")
    for axes, (label, pixels) in zip(figure.axes, pictures, strict=False):
        axes.imshow(np.asarray(pixels).transpose(1, 2, 0))
        axes.set_title(label, fontsize=7)
    figure.savefig(output, dpi=150)
    return f"{len(pictures)} images, as decoded"
