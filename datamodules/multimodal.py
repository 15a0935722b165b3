"""MultimodalDataModule: sources of examples become packed, balanced batches, in which every media item has an owner.

It applies the chat template, tokenizes, measures media without decoding them, packs examples into microbatches, lets
the owner of each media item decode it in a worker, makes the validation loaders, resumes exactly, and handles broken
files. It works under any strategy.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.types import EVAL_DATALOADERS, TRAIN_DATALOADERS
from torch.utils._pytree import tree_flatten

from bigmac_lightning.checkpoints.resuming import repeats_batches, uncounted_in
from bigmac_lightning.contracts.batch import Batch, PipelineLayout
from bigmac_lightning.contracts.module import PipelineModule
from bigmac_lightning.ranks import Ranks

from .base import ParallelDataModule
from .encoding.media_processor import MediaProcessor
from .encoding.processors import chat_encoder
from .encoding.visual import TargetProcessor, VisualProcessor
from .example import Example, Size
from .loading.collate import make_batch
from .loading.failures import Agreement, OnError
from .loading.source_loader import EncodedSteps, StepCollate, StepLoader
from .loading.stream_loader import StreamCollate, StreamLoader
from .loading.stream_steps import StreamSteps
from .media.decoding import measure
from .model_checks import check_items, check_model
from .options import ChatOptions, LoadingOptions, MixtureOptions, PackingOptions
from .packing.epoch import StepSize
from .packing.measuring import Measurements, measurements, report_errors
from .packing.steps import StepSampler
from .sources.source import Source
from .sources.stream import Stream
from .splits import Split, Splits


class MultimodalDataModule(ParallelDataModule):
    """A DataModule for any `Source`s and `Stream`s.

    To use data of your own, pass a `Source` that you have written, or derive from this class and override `sources`.
    """

    def __init__(
        self,
        train: Sequence[Source | Stream] = (),
        val: Sequence[Source] = (),
        test: Sequence[Source] = (),
        predict: Sequence[Source] = (),
        processor: Any = "bytes",
        visual: VisualProcessor | None = None,
        target: TargetProcessor | None = None,
        token_budget: int = 4096,
        microbatches: int = 8,
        on_error: OnError = "raise",
        num_workers: int = 0,
        seed: int = 0,
        mixture: MixtureOptions = MixtureOptions(),
        chat: ChatOptions = ChatOptions(),
        packing: PackingOptions = PackingOptions(),
        loading: LoadingOptions = LoadingOptions(),
        media: Mapping[str, MediaProcessor] | None = None,
    ) -> None:
        """
        Args:
            train: the sources of the training, which may include streams.
            val: the sources of the validation.
            test: the sources of the test.
            predict: the sources of the prediction, in which generators make new targets.
            processor: the folder or name of a pretrained processor or tokenizer; or one that has been loaded; or
                "bytes": one token per byte, for tiny models.
            visual: makes the encoders' inputs from images and videos; ``None``: the processor does, if it can.
            target: makes the generators' targets from images.
            token_budget: maximum number of tokens in a microbatch.
            microbatches: number of microbatches per step and replica, unless the strategy sets it. Without a number
                set by the strategy, training steps may differ by one microbatch.
            on_error: "raise" ends the run at the first broken example, on every rank. "skip" leaves it out, and logs
                ``data/skipped``: how many have been skipped in training so far over all replicas
                (``data/skipped_val`` and so on for the other splits).
            num_workers: number of processes per rank that encode and decode.
            seed: of the order of examples, the mixture, augmentation and the generators' noise.
            mixture: the weights of training sources, the length of an epoch, and how many examples are held out.
            chat: the chat template, and what the model learns of a conversation.
            packing: how examples become microbatches.
            loading: augmentation, prefetching, and where measurements are stored.
            media: by modality, what makes the encoders' inputs from items of modalities besides images and videos.
        """
        super().__init__()
        for name, number, least in (
            ("token_budget", token_budget, 1),
            ("microbatches", microbatches, 1),
            ("num_workers", num_workers, 0),
        ):
            if number < least:
                raise ValueError(f"{name}={number}: it must be at least {least}")
        if on_error not in ("raise", "skip"):
            raise ValueError(f'on_error={on_error!r}: choose "raise" or "skip"')
        if mixture.weights is not None and len(mixture.weights) != len(train):
            raise ValueError(
                f"mixture.weights={list(mixture.weights)} for {len(train)} training sources: give one for each"
            )
        self.prepare_data_per_node = True
        self.token_budget, self.microbatches, self.num_workers, self.seed = (
            token_budget,
            microbatches,
            num_workers,
            seed,
        )
        self.on_error: OnError = on_error
        self.mixture, self.packing, self.loading = mixture, packing, loading
        cut_at = token_budget if packing.truncation == "end" else None
        self.encoder = chat_encoder(
            processor, visual, target, chat, loading.augment, seed, cut_at, loading.trust_remote_code, media or {}
        )
        self._sources: dict[Split, Sequence[Source | Stream]]
        self._sources = {"train": train, "val": val, "test": test, "predict": predict}
        self._splits = Splits(self.sources, mixture, seed, shuffle=not packing.ordered)
        self._measured: dict[Split, list[Measurements]] = {}
        self._ranks = Ranks()
        self._last_stream: tuple[Any, StreamLoader | None] = (None, None)

    @property
    def typical_amounts(self) -> Mapping[str, Any]:
        visual, target = self.encoder.visual, self.encoder.target
        amounts: dict[str, Any] = {"tokens": self.token_budget}
        amounts |= {"item_rows": getattr(visual, "max_rows", None)}  # a user's own processor may have none
        return amounts | ({"target_rows": target.rows, "target_shape": target.shape} if target else {})

    # -- sources -------------------------------------------------------------------------------------------------------

    def sources(self, split: Split) -> Sequence[Source | Stream]:
        """The sources of "train", "val", "test" or "predict", before `mixture.val_split` is applied."""
        return self._sources[split]

    def split_sources(self, split: Split) -> Sequence[Source | Stream]:
        """The sources of a split after `mixture.val_split` has moved examples from "train" to "val".

        Raises:
            ValueError: the examples cannot be held out.
        """
        return self._splits.of(split)

    # -- measuring -----------------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Measure all sources, in one process per node."""
        try:
            self._check()
        except ValueError:  # `setup` raises it, on every rank
            return
        for split in self._sources:
            self._measure(split, read_only=False)

    def setup(self, stage: str) -> None:
        """
        Raises:
            ExampleError: an example cannot be used and `on_error` is "raise"; on every rank.
            ValueError: see `check`; on every rank.
        """
        self._check()
        for split in {"fit": ("train", "val"), "validate": ("val",)}.get(stage, (stage,)):
            self._measurements(split)

    def _check(self) -> None:
        """`check`, if a pipeline module is trained, and whether its weights can be read afterwards."""
        module = getattr(self.trainer, "lightning_module", None)
        if isinstance(module, PipelineModule):
            self.check(module)
            if not module._materialized:
                module.check_weights()

    def check(self, module: PipelineModule) -> None:
        """
        Raises:
            ValueError: the model cannot take the batches (see `check_model`), or the first example of a source: it is a
                conversation and there is no chat template, or it has media that the model has no encoder for.
        """
        check_model(module, self.encoder, self.packing.packed)
        for source in (source for split in self._sources for source in self._splits.sources(split)):
            first = _first(source)
            if first is None:
                continue
            check_items(module, self.encoder, first.media, source.name)
            if not (first.is_text or self.encoder.has_template):
                raise ValueError(
                    f"{source.name} gives messages, and the processor's tokenizer has no chat template that makes a "
                    "text of them: set chat.template"
                )

    def _measure(self, split: Split, read_only: bool) -> list[Measurements]:
        if self._splits.streams(split):
            return []  # the loader measures each example when it reads it
        return [self.measure(source, split, read_only) for source in self._splits.sources(split)]

    def measure(self, source: Source, split: Split, read_only: bool = False) -> Measurements:
        """Measure the examples of a source as examples of a split; for `read_only` see `measurements`."""
        learns, workers = split == "train", self.num_workers
        return measurements(source, self.encoder, self.token_budget, self._kept_in, workers, read_only, learns)

    @property
    def _kept_in(self) -> Path:
        return Path(self.loading.cache_dir).expanduser()

    def _measurements(self, split: Split) -> list[Measurements]:
        if split not in self._measured:
            self._measured[split] = self._measure(split, read_only=True)
            report_errors(self._measured[split], split, self.on_error)
            for source, measured in zip(self._splits.sources(split), self._measured[split], strict=False):
                if not measured.number_usable:
                    raise ValueError(
                        f"{source.name} has no example that can be used: take it out of {split}, or correct its path"
                    )
        return self._measured[split]

    # -- prompts -------------------------------------------------------------------------------------------------------

    def prompt(self, example: Example) -> Batch:
        """See the base class.

        Raises:
            ExampleError: the example is no prompt, or an item of media cannot be read.
        """
        sample = self.encoder.prompt(example, _sizes(example))
        return make_batch([[sample]], PipelineLayout(), self.encoder.tokenizer.pad_token_id or 0)

    def question(self, example: Example) -> tuple[Batch, str | None]:
        """The prompt of an example up to its last reply, and that reply as the template writes it, with reasoning and
        calls of tools; ``None``: it has none, or a generator is to draw it.

        Raises:
            ExampleError: see `prompt`; or the reply cannot be learnt, for instance as it is empty.
        """
        *before, last = example.messages
        replies = last.role == "assistant" or (last.role == "text" and bool(before))
        if example.target is not None or not replies:
            return self.prompt(example), None
        learnt = replace(example, messages=[*before, replace(last, learn=True)])
        sample = self.encoder.encode(learnt, _sizes(example), example.name)
        stop = max(i for i, label in enumerate(sample.labelled) if label) + 1
        start = max(i for i in range(stop) if not sample.labelled[i]) + 1
        return self.prompt(replace(example, messages=before)), self.reply(sample.tokens[start:stop])

    def reply(self, tokens: Sequence[int]) -> str:
        return self.encoder.tokenizer.decode(list(tokens), skip_special_tokens=True)

    def reply_ends(self) -> Collection[int]:
        return self.encoder.reply_ends

    # -- loaders -------------------------------------------------------------------------------------------------------

    def loader(self, split: Split) -> StepLoader | StreamLoader:
        """Batches of a split."""
        if streams := self._splits.streams(split):
            return self._stream_loader(split, streams)
        training, layout = split == "train", self.layout
        sources, measured = self._splits.sources(split), self._measurements(split)
        sampler = self.sampler(split, measured, layout.microbatches, self.data_parallel, repeats_batches(self.trainer))
        ordered = self._packing(split).ordered
        steps = EncodedSteps(sources, measured, self.encoder, training, ordered, split == "predict")
        uncounted = uncounted_in(self.trainer) if training else None
        workers = (self.num_workers, self.loading.prefetch)
        return StepLoader(steps, sampler, self._collate(), self._agreement(split), *workers, uncounted)

    def _stream_loader(self, split: Split, streams: Sequence[Stream]) -> StreamLoader:
        steps_per_epoch = self.mixture.steps_per_epoch
        assert steps_per_epoch is not None, "checked with the streams"
        steps = StreamSteps(
            streams,
            self.mixture.weights or [1.0] * len(streams),
            self.encoder,
            self._step_size(split, self.layout.microbatches),
            self._packing(split),
            self.seed,
            replicas=self.data_parallel["num_replicas"],
            replica=self.data_parallel["rank"],
            parts=self.mixture.stream_parts,
        )
        loader = StreamLoader(
            steps,
            StreamCollate(self._collate()),
            self._agreement(split),
            self.num_workers,
            self.loading.prefetch,
            steps_per_epoch,
            uncounted_in(self.trainer),
            repeats_batches(self.trainer),
        )
        # Trainer(reload_dataloaders_every_n_epochs=...) asks for new loaders within one training
        trainer, before = self._last_stream
        if before is not None and trainer is self.trainer and trainer.global_step:
            loader.follow(before)
        self._last_stream = (self.trainer, loader)
        return loader

    def sampler(
        self,
        split: Split,
        measured: Sequence[Measurements],
        microbatches: int | None = None,
        data_parallel: Mapping[str, int] | None = None,
        same: bool = False,
    ) -> StepSampler:
        """The sampler that yields the steps of a split.

        Args:
            measured: the measurements of each source.
            microbatches: number of microbatches per step; ``None``: the DataModule's.
            data_parallel: "num_replicas" and "rank" of a data-parallel replica; ``None``: the only one.
            same: every epoch repeats the first one.
        """
        training = split == "train"
        return StepSampler(
            measured,
            self._step_size(split, microbatches),
            self._packing(split),
            self.mixture.weights if training else None,
            self.mixture.samples_per_epoch if training else None,
            shuffle=training and not self.packing.ordered and not same,
            seed=self.seed,
            same=same,
            kept_in=self._kept_in,
            **(data_parallel or {}),
        )

    def _step_size(self, split: Split, microbatches: int | None) -> StepSize:
        exact = split == "train" and microbatches is not None
        return StepSize(self.token_budget, microbatches or self.microbatches, exact)

    def _packing(self, split: Split) -> PackingOptions:
        return self.packing if split == "train" else replace(self.packing, ordered=True)

    def _collate(self) -> StepCollate:
        padding = self.encoder.tokenizer.pad_token_id or 0
        return StepCollate(self.layout, self.packing.packed, padding, self.packing.attention_tokens)

    def _agreement(self, split: Split) -> Agreement:
        return Agreement(self._ranks, self.data_parallel["rank"], self.on_error, partial(self._log_skipped, split))

    def _log_skipped(self, split: Split, samples: int) -> None:
        if self.trainer is None:
            return
        name = "data/skipped" if split == "train" else f"data/skipped_{split}"
        for logger in self.trainer.loggers:  # they write on rank 0 alone
            logger.log_metrics({name: samples}, step=self.trainer.global_step)

    def train_dataloader(self) -> TRAIN_DATALOADERS:
        return self.loader("train")

    def val_dataloader(self) -> EVAL_DATALOADERS:
        return self.loader("val") if self.split_sources("val") else _no_loaders()

    def test_dataloader(self) -> EVAL_DATALOADERS:
        return self.loader("test")

    def predict_dataloader(self) -> EVAL_DATALOADERS:
        return self.loader("predict")


def _first(source: Source) -> Example | None:
    try:
        return source[0] if len(source) else None
    except Exception:  # a source may raise anything; measuring reports it
        return None


def _sizes(example: Example) -> list[Size]:
    """The sizes of its media, and that of its target, whose file need not be there."""
    target = [] if example.target is None else [example.target.size or Size(1, 1)]
    return [*(measure(item) for item in example.media), *target]


def _no_loaders() -> CombinedLoader:
    """A combined loader without loaders. Lightning would take an empty list for a loader of length 0, and warn."""
    combined = CombinedLoader([], "sequential")
    combined._flattened, combined._spec = tree_flatten([])
    return combined
