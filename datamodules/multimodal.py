"""MultimodalDataModule: sources of examples in, packed and balanced batches with an owner for every item out.

Does all that lies between: chat template, tokens, sizes of media without decoding them, packing, microbatches,
ownership, decoding by the owner in a worker, validation loaders, exact resume, broken files. Works under any strategy.
Knows Lightning's DataModule; knows nothing of models or process groups.
"""

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.types import EVAL_DATALOADERS, TRAIN_DATALOADERS
from torch import nn
from torch.utils._pytree import tree_flatten

from bigmac_lightning.checkpoints.resuming import repeats_batches, uncounted_in
from bigmac_lightning.contracts.module import PipelineModule
from bigmac_lightning.ranks import Ranks

from .base import PlacedDataModule
from .encoding.chat import DRAW, IMAGE, VIDEO, ChatEncoder
from .encoding.hf_processor import HFVisual
from .encoding.replies import Learn
from .encoding.special import InText
from .encoding.template import read_template
from .encoding.tokenizers import load_processor
from .encoding.visual import TargetProcessor, VisualProcessor
from .example import ExampleError
from .loading.failures import Agreement, OnError
from .loading.loader import EncodedSteps, StepCollate, StepLoader
from .loading.windows import StreamCollate, StreamLoader, StreamSteps
from .packing.measuring import Measurements, measurements
from .packing.steps import PackingOptions, StepSampler
from .sources.source import Source
from .sources.splitting import HeldOut, held_out_of
from .sources.stream import SourceStream, Stream

Split = str
SHOWN_ERRORS = 10
log = logging.getLogger(__name__)


class MultimodalDataModule(PlacedDataModule):
    """Trains and evaluates on any `Source`s.

    With data of your own, give it a `Source` of yours, or derive from it and override `sources`.
    """

    def __init__(
        self,
        train: Sequence[Source | Stream] = (),
        val: Sequence[Source] = (),
        test: Sequence[Source] = (),
        predict: Sequence[Source] = (),
        val_split: HeldOut | Sequence[HeldOut] | None = None,
        weights: Sequence[float] | None = None,
        samples_per_epoch: int | None = None,
        steps_per_epoch: int | None = None,
        processor: Any = "bytes",
        visual: VisualProcessor | None = None,
        target: TargetProcessor | None = None,
        token_budget: int = 4096,
        truncation: Literal["refuse", "end"] = "refuse",
        microbatches: int = 8,
        packed: bool = True,
        window: int = 1024,
        ordered: bool = False,
        attention_tokens: float = 12 * 4096,
        augment: Sequence[nn.Module] = (),
        on_error: OnError = "raise",
        num_workers: int = 0,
        prefetch: int = 2,
        seed: int = 0,
        image_token: str = IMAGE,
        video_token: str = VIDEO,
        draw_token: str = DRAW,
        chat_template: str | Path | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        learn: Learn = "all",
        end_of_reply: str | None = None,
        special_tokens: InText = "text",
        allowed_special: Sequence[str] = (),
        cache_dir: str | Path = "~/.cache/bigmac_lightning",
    ) -> None:
        """
        Args:
            train, val, test, predict: sources of each split. In prediction, generators make their targets anew. In
                training there may be streams among them.
            val_split: how much of each training source is held out and added to `val`: a share (0.05) or a number of
                examples (500), or one for each source, 0 for none. Which ones depends on `seed`.
            weights: shares of the training sources in an epoch; ``None``: in proportion to their sizes, or equal ones
                if there are streams among them.
            samples_per_epoch: of training; ``None``: as many as the training sources have together.
            steps_per_epoch: an epoch's length if there are streams among the training sources. They go on in the next.
            processor: the folder or name of a pretrained processor or tokenizer; or one that is loaded already;
                "bytes": one token per byte, for tiny models.
            visual: makes the encoders' inputs of images and videos; ``None``: as the processor does, if it does.
            target: makes the generators' targets of images.
            token_budget: most tokens of a microbatch.
            truncation: what becomes of an example with more tokens than that: "refuse" counts it as broken; "end" cuts
                off its end, unless images, videos or a target would be cut, or nothing be learnt of it.
            microbatches: per step and replica, unless the strategy asks for another number. Training steps may differ
                by one, unless the strategy has been told how many there must be.
            packed: samples of a microbatch stand in one row, without padding, kept apart by positions that start anew.
                ``False``: each has a row, padded to the longest.
            window, attention_tokens: as in `PackingOptions`.
            ordered: keep the order of examples, as evaluation always does: no shuffling, and a microbatch ends where
                the next example does not fit.
            augment: torchvision v2 transforms of training images and videos, drawn anew in each epoch.
            on_error: "raise" ends the run at the first broken example, on every rank; "skip" goes on without it, and
                logs ``data/skipped``, how many have been skipped in training so far over all replicas
                (``data/skipped_val`` and so on for the other splits).
            num_workers: processes per rank that encode and decode.
            prefetch: batches that each of them prepares in advance.
            seed: of order, mixture, augmentation and generators' noise.
            image_token, video_token: what the chat template writes for an image or a video.
            draw_token: stands for each row that conditions a generator.
            chat_template: instead of the processor's own: the path of a .jinja file, or the template itself.
            chat_template_kwargs: variables of the chat template, such as ``{"enable_thinking": False}``; an example
                may have its own, which come before these.
            learn: "all" that the assistant says, or the "last": what it says behind the last message of the user. What
                a message says of itself (`Message.learn`) comes before that.
            end_of_reply: a special token that is put behind each reply, and learnt, where the chat template puts none;
                ``None``: such conversations are refused; empty: their replies are learnt without an end.
            special_tokens: what becomes of texts that contain special tokens, such as ``<|im_end|>``: "text" encodes
                them as the characters that they consist of, "refuse" counts such an example as broken.
            allowed_special: special tokens that are tokens in texts, too.
            cache_dir: for what was measured of the sources: sizes and token counts.
        """
        super().__init__()
        if token_budget < 1 or microbatches < 1 or window < 1:
            raise ValueError(
                f"token_budget={token_budget}, microbatches={microbatches} and window={window} must all be at least 1"
            )
        if on_error not in ("raise", "skip"):
            raise ValueError(f'on_error={on_error!r}: choose "raise" or "skip"')
        if weights is not None and (len(weights) != len(train) or min(weights, default=1) <= 0):
            raise ValueError(f"weights={list(weights)} for {len(train)} training sources: give a positive one for each")
        self.prepare_data_per_node = True
        self._given: dict[Split, Sequence[Source | Stream]] = {
            "train": train,
            "val": val,
            "test": test,
            "predict": predict,
        }
        self.val_split = val_split
        self._parted: dict[Split, Sequence[Source | Stream]] | None = None
        self.weights, self.samples_per_epoch, self.steps_per_epoch = weights, samples_per_epoch, steps_per_epoch
        if learn not in ("all", "last"):
            raise ValueError(f'learn={learn!r}: choose "all" or "last"')
        if special_tokens not in ("text", "refuse"):
            raise ValueError(f'special_tokens={special_tokens!r}: choose "text" or "refuse"')
        if truncation not in ("refuse", "end"):
            raise ValueError(f'truncation={truncation!r}: choose "refuse" or "end"')
        tokenizer, made = load_processor(processor)
        feature_tokens: tuple[str, ...] = ()
        if made is not None:  # a processor's own tokens and preparation, unless others are given
            if visual is None and getattr(made, "image_processor", None) is not None:
                visual = HFVisual(made)
                feature_tokens = visual.feature_tokens
            image_token = getattr(made, "image_token", image_token)
            video_token = getattr(made, "video_token", video_token)
        self.encoder = ChatEncoder(
            tokenizer, visual, target, image_token, video_token, draw_token, tuple(augment), seed, feature_tokens, made,
            None if chat_template is None else read_template(chat_template), chat_template_kwargs or {}, learn,
            end_of_reply, special_tokens, tuple(allowed_special), token_budget if truncation == "end" else None,
        )  # fmt: skip
        self.encoder.check()
        self.token_budget, self.microbatches, self.packed = token_budget, microbatches, packed
        self.window, self.ordered, self.attention_tokens = window, ordered, attention_tokens
        self.on_error: OnError = on_error
        self.num_workers, self.prefetch, self.seed = num_workers, prefetch, seed
        self.cache_dir = Path(cache_dir).expanduser()
        self._measured: dict[Split, list[Measurements]] = {}
        self._ranks = Ranks()
        self._streamed: tuple[Any, StreamLoader | None] = (None, None)

    def sources(self, split: Split) -> Sequence[Source | Stream]:
        """The sources of "train", "val", "test" or "predict", as they were given."""
        return self._given[split]

    def parts(self, split: Split) -> Sequence[Source | Stream]:
        """What of the sources belongs to a split: `val_split` gives parts of those of "train" to "val".

        Raises:
            ValueError: nothing can be held out of them.
        """
        if self.val_split is None or split not in ("train", "val"):
            return self.sources(split)
        if self._parted is None:
            train, held_out = held_out_of(self.sources("train"), self.val_split, self.seed)
            self._parted = {"train": train, "val": [*self.sources("val"), *held_out]}
        return self._parted[split]

    def _streams(self, split: Split) -> list[Stream]:
        """The sources of a split as streams, if there is a stream among them; else none.

        Raises:
            ValueError: streams are not for this split, or the length of an epoch is not given.
        """
        sources = self.parts(split)
        if not any(isinstance(source, Stream) for source in sources):
            return []
        if split != "train":
            raise ValueError(
                f"{split} has streams, which are for training; give the start of one as a source: Taken(stream, 500)"
            )
        if self.steps_per_epoch is None or self.samples_per_epoch is not None:
            raise ValueError("with streams, whose lengths are not known, an epoch is given by steps_per_epoch alone")
        shuffle = not self.ordered
        return [s if isinstance(s, Stream) else SourceStream(s, self.seed, shuffle) for s in sources]

    # -- measuring -----------------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Measure all sources, on one process per node."""
        if self._refused_packing():  # which `setup` says on every rank
            return
        for split in self._given:
            self._measure(split, read_only=False)

    def setup(self, stage: str) -> None:
        """
        Raises:
            ExampleError: on every rank, if an example cannot be used and `on_error` is "raise".
            ValueError: on every rank, if samples are packed and the model cannot keep them apart, or if the model does
                not know all tokens.
        """
        if reason := self._refused_packing():
            raise ValueError(
                f"{reason}: use MultimodalDataModule(..., packed=False), which gives each a row of its own"
            )
        self._check_vocabulary()
        for split in {"fit": ("train", "val"), "validate": ("val",)}.get(stage, (stage,)):
            self._known(split)

    def _check_vocabulary(self) -> None:
        module = getattr(self.trainer, "lightning_module", None)
        if not isinstance(module, PipelineModule) or not module.llm.vocabulary:
            return
        llm, ids = module.llm, self.encoder.tokenizer.get_vocab()
        beyond = sorted(token for token, i in ids.items() if i >= llm.vocabulary and i not in llm.placeholders)
        if beyond:
            raise ValueError(
                f"{len(beyond)} tokens of the tokenizer, such as {beyond[0]!r} with the id {ids[beyond[0]]}, lie "
                f"beyond the LLM's vocabulary of {llm.vocabulary}: give MultimodalDataModule the processor that "
                "belongs to the model, or the model a larger vocab_size"
            )

    def _refused_packing(self) -> str:
        """Why the model does not take what `packed` makes; empty: it does."""
        module = getattr(self.trainer, "lightning_module", None)
        return module.llm.refuses_packing if self.packed and isinstance(module, PipelineModule) else ""

    def _measure(self, split: Split, read_only: bool) -> list[Measurements]:
        if self._streams(split):
            return []  # each example is measured when it comes
        sources = [source for source in self.parts(split) if isinstance(source, Source)]
        return [self.measured_of(source, split, read_only) for source in sources]

    def measured_of(self, source: Source, split: Split, read_only: bool = False) -> Measurements:
        """What is known of the examples of a source, as examples of a split; arguments as of `measurements`."""
        where = (self.cache_dir, self.num_workers, read_only)
        return measurements(source, self.encoder, self.token_budget, *where, learns=split == "train")

    def _known(self, split: Split) -> list[Measurements]:
        if split not in self._measured:
            self._measured[split] = self._measure(split, read_only=True)
            self._report(split)
        return self._measured[split]

    def _report(self, split: Split) -> None:
        errors = [text for measured in self._measured[split] for text in measured.errors.values()]
        if not errors:
            return
        shown = "\n".join(errors[:SHOWN_ERRORS]) + (
            f"\n... and {len(errors) - SHOWN_ERRORS} more" * (len(errors) > SHOWN_ERRORS)
        )
        total = sum(len(measured) for measured in self._measured[split])
        if self.on_error == "raise":
            raise ExampleError(
                f'{len(errors)} of {total} {split} examples cannot be used (on_error="skip" leaves them out):\n{shown}'
            )
        log.warning("left out %d of %d %s examples:\n%s", len(errors), total, split, shown)

    # -- loaders -------------------------------------------------------------------------------------------------------

    def loader(self, split: Split) -> StepLoader | StreamLoader:
        """Batches of a split."""
        training, layout, place = split == "train", self.layout, self.place
        options = self._packing(split, layout.microbatches)
        collate = StepCollate(layout, self.packed, self.encoder.tokenizer.pad_token_id or 0, self.attention_tokens)
        agreement = Agreement(self._ranks, place["rank"], self.on_error, partial(self._log_skipped, split))
        same, counting = repeats_batches(self.trainer), uncounted_in(self.trainer) if training else None
        if streams := self._streams(split):
            assert self.steps_per_epoch is not None
            weights = self.weights or [1.0] * len(streams)
            replicas, replica = place["num_replicas"], place["rank"]
            windows = StreamSteps(streams, weights, self.encoder, options, self.seed, replicas, replica)
            return self._following(
                StreamLoader(
                    windows,
                    StreamCollate(collate),
                    agreement,
                    self.num_workers,
                    self.prefetch,
                    self.steps_per_epoch,
                    counting,
                    same,
                )
            )
        sources, measured = [s for s in self.parts(split) if isinstance(s, Source)], self._known(split)
        sampler = self.sampler(split, measured, layout.microbatches, place, same)
        steps = EncodedSteps(sources, measured, self.encoder, training, options.ordered, split == "predict")
        return StepLoader(steps, sampler, collate, agreement, self.num_workers, self.prefetch, counting)

    def sampler(
        self,
        split: Split,
        measured: Sequence[Measurements],
        microbatches: int | None = None,
        place: Mapping[str, int] | None = None,
        same: bool = False,
    ) -> StepSampler:
        """What each step of a split consists of.

        Args:
            measured: of each source.
            microbatches: of a step; ``None``: the DataModule's.
            place: "num_replicas" and "rank", of data-parallel replicas.
            same: every epoch is the first one.
        """
        training, options = split == "train", self._packing(split, microbatches)
        weights, samples = (self.weights, self.samples_per_epoch) if training else (None, None)
        shuffle, place = training and not self.ordered and not same, dict(place or {})
        return StepSampler(measured, options, weights, samples, shuffle, self.seed, **place, same=same)

    def _packing(self, split: Split, microbatches: int | None) -> PackingOptions:
        training = split == "train"
        return PackingOptions(
            self.token_budget,
            microbatches or self.microbatches,
            exact=training and microbatches is not None,
            window=self.window,
            ordered=self.ordered or not training,
            attention_tokens=self.attention_tokens,
        )

    def _following(self, loader: StreamLoader) -> StreamLoader:
        """A stream goes on where the loader before it stopped, if the same training goes on (`Trainer` may ask for new
        loaders every few epochs)."""
        trainer, before = self._streamed
        if before is not None and trainer is self.trainer and trainer.global_step:
            loader.follow(before)
        self._streamed = (self.trainer, loader)
        return loader

    def _log_skipped(self, split: Split, samples: int) -> None:
        if self.trainer is None:
            return
        name = "data/skipped" if split == "train" else f"data/skipped_{split}"
        for logger in self.trainer.loggers:  # they write on rank 0 alone
            logger.log_metrics({name: samples}, step=self.trainer.global_step)

    def train_dataloader(self) -> TRAIN_DATALOADERS:
        return self.loader("train")

    def val_dataloader(self) -> EVAL_DATALOADERS:
        return self.loader("val") if self.parts("val") else _nothing()

    def test_dataloader(self) -> EVAL_DATALOADERS:
        return self.loader("test")

    def predict_dataloader(self) -> EVAL_DATALOADERS:
        return self.loader("predict")


def _nothing() -> CombinedLoader:
    """No loaders: a list without any is one of length 0 to Lightning, which warns of it."""
    combined = CombinedLoader([], "sequential")
    combined._flattened, combined._spec = tree_flatten([])
    return combined
