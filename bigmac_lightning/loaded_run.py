"""A trained model without a Trainer: `load` builds what a run has trained, and it can then be asked and can draw."""

import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from PIL import Image as Pictures
from torch import Tensor

from bigmac_lightning.checkpoints import files
from bigmac_lightning.checkpoints.fetching import local_folder
from bigmac_lightning.checkpoints.mismatches import first_few
from bigmac_lightning.checkpoints.newest import in_words, newest_whole
from bigmac_lightning.checkpoints.remote import Place, at
from bigmac_lightning.checkpoints.weights import CheckpointWeights
from bigmac_lightning.commands.answer import PROBLEMS, text_of
from bigmac_lightning.commands.config import ConfigReader
from bigmac_lightning.contracts.batch import Batch
from bigmac_lightning.contracts.module import PipelineModule
from bigmac_lightning.run_config import CONFIG, config_of, read_exported

log = logging.getLogger(__name__)

Messages = str | Sequence[Mapping[str, Any]] | Mapping[str, Any]
"""What the user says; or the messages of a `Conversation`; or all of one."""


@dataclass
class LoadedRun:
    """A trained model and its data's way of making prompts, in this process.

    What is said may be a text, in which ``<image>`` stands for the next one of `images`; a list of messages with parts
    of their own; or a whole `Conversation`, which may have ``images`` (and so on), ``tools`` and
    ``chat_template_kwargs``. An image is a path, a picture of Pillow, or bytes; a video and a sound is a path or bytes.
    One of them needs no list.

    Attributes:
        module: the model, with all of its weights, in eval mode.
        data: the DataModule, which makes prompts and texts.
        checkpoint: what the weights come from.
    """

    module: PipelineModule
    data: Any
    checkpoint: Place

    def chat(
        self,
        messages: Messages,
        images: Sequence[Any] = (),
        videos: Sequence[Any] = (),
        audios: Sequence[Any] = (),
        **sampling: Any,
    ) -> str:
        """The model's reply.

        Args:
            sampling: fields of `Sampling`, such as ``max_new_tokens=20`` or ``temperature=0.7``; ``None``: its default.
                By default, always the most likely token is taken.

        Raises:
            ExampleError: the messages are no prompt for this model.
            ValueError: a field of `sampling` has a value that it cannot have.
        """
        prompt = self.prompt(messages, images, videos, audios)
        return self.data.reply([*self.generate(prompt, **sampling)])

    def stream(
        self,
        messages: Messages,
        images: Sequence[Any] = (),
        videos: Sequence[Any] = (),
        audios: Sequence[Any] = (),
        **sampling: Any,
    ) -> Iterator[str]:
        """As `chat`, piece by piece, as soon as each is known."""
        return self.pieces(self.prompt(messages, images, videos, audios), **sampling)

    def pieces(self, prompt: Batch, **sampling: Any) -> Iterator[str]:
        """The pieces of the text that the model writes after a prompt; see `stream`."""
        shown, tokens = "", list[int]()
        for token in self.generate(prompt, **sampling):
            tokens.append(token)
            text = self.data.reply(tokens)
            if not text.endswith("\N{REPLACEMENT CHARACTER}") and text.startswith(shown):  # else a part of a character
                yield text[len(shown) :]
                shown = text
        yield self.data.reply(tokens)[len(shown) :]

    def generate(self, prompt: Batch, **sampling: Any) -> Iterator[int]:
        """The tokens that the model writes after a prompt, see `chat`.

        Args:
            prompt: a batch of one sample, such as `prompt` makes.
        """
        from bigmac_lightning.models.writing import written  # pyright: ignore[reportMissingImports]

        return written(self.module, prompt, self.sampling(**sampling), self.data.reply_ends())

    def sampling(self, **options: Any) -> Any:
        """The `Sampling` of these options; see `chat`."""
        # imported here because it imports transformers
        from bigmac_lightning.models.writing import Sampling  # pyright: ignore[reportMissingImports]

        given = {name: value for name, value in options.items() if value is not None}
        return Sampling(**{"max_new_tokens": self.data.reply_tokens, **given})

    def draw(
        self, messages: Messages, images: Sequence[Any] = (), seed: int = 0, number: int = 1
    ) -> list[Pictures.Image]:
        """Pictures that a generator draws as the reply.

        Args:
            seed: of the noise from which the first picture is made; the others have the seeds after it.
            number: of pictures.

        Raises:
            ValueError: the model has no generator, or none that draws pictures.
        """
        return self.pictures(self.prompt(messages, images, draws=True), seed, number)

    def pictures(self, prompt: Batch, seed: int = 0, number: int = 1) -> list[Pictures.Image]:
        """Pictures that a generator draws after a prompt for one; see `draw`."""
        if not self.module.generators:
            raise ValueError("this model has no generator that could draw")
        [microbatch], pictures = prompt.microbatches, list[Pictures.Image]()
        for k in range(number):
            targets = [replace(target, seed=seed + k) for target in microbatch.targets]
            batch = Batch([replace(microbatch, targets=targets)]).to(self.module.device)
            with torch.inference_mode():
                made = self.module.pipeline(batch, sample=True).samples
            pictures += [_picture(tensor) for tensor in made or []]
        return pictures

    def prompt(
        self,
        messages: Messages,
        images: Sequence[Any] = (),
        videos: Sequence[Any] = (),
        audios: Sequence[Any] = (),
        draws: bool = False,
    ) -> Batch:
        """A batch of one sample, which ends where the model is to reply, or with `draws` to draw.

        Raises:
            ValueError: the DataModule makes no prompts; or, as an ExampleError, the messages are none.
        """
        if not hasattr(self.data, "prompt"):
            raise ValueError(
                f"{type(self.data).__name__} makes no prompts: derive it from ParallelDataModule, and define prompt, "
                "reply and reply_ends"
            )
        from bigmac_lightning.datamodules import File, Image, Size, example_of  # pyright: ignore[reportMissingImports]
        from bigmac_lightning.datamodules.media.modalities import MODALITIES  # pyright: ignore[reportMissingImports]
        from bigmac_lightning.datamodules.sources.media_files import media_at  # pyright: ignore[reportMissingImports]

        said: Any = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        conversation = dict(said) if isinstance(said, Mapping) else {"messages": said}
        conversation["messages"] = [_with_bytes(turn) for turn in conversation.get("messages", ())]
        roots = [Path.cwd(), Path(Path.cwd().anchor)]  # paths of the caller are trusted
        given = {"image": _list(images), "video": _list(videos), "audio": _list(audios)}
        for kind in MODALITIES:
            for name in (kind, f"{kind}s"):
                given[kind] = [*given.get(kind, ()), *_list(conversation.pop(name, None) or ())]
        items = {kind: [media_at(kind, _bytes(item), roots) for item in given[kind]] for kind in given}
        target = Image(File.lazy("the picture to be drawn", bytes), Size(1, 1)) if draws else None
        others = {kind: items[kind] for kind in items if kind not in ("image", "video")}
        return self.data.prompt(
            example_of(conversation, items["image"], items["video"], target, media_root=roots, others=others)
        )


def load(
    path: str | Path,
    module: PipelineModule | None = None,
    data: Any = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> LoadedRun:
    """What a run has trained, ready to be used in this process, without a Trainer::

        run = bigmac_lightning.load("runs/digits/version_0")
        run.draw("draw a 3 :")[0].save("three.png")
        print(run.chat("<image> which digit is this ?", images=["three.png"]))

    A config names classes, which are imported: load only runs of people whom you trust.

    Args:
        path: the folder of a run, whose newest whole checkpoint is taken; or a checkpoint, with the run's config.yaml
            in one of the three folders above it; or a folder that `bigmac export` has written. Each may be remote.
        module: the model, if there is no config.yaml, or to replace the one that it names.
        data: the DataModule, likewise.
        device: default: the GPU, if there is one.
        dtype: the type of the weights; default: those of the components, whatever the Trainer's precision was.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: there is no config, or it is not one of this checkpoint; or the checkpoint is damaged.
    """
    place = at(path)
    exported = _is_exported(place)
    checkpoint = Path(local_folder(place, weights=True)) if exported else _checkpoint(place)
    if module is None or data is None:
        reader = _Reader.of(*_config_of(checkpoint, exported))
        module, data = reader.model if module is None else module, reader.data if data is None else data
        assert module is not None
    _without_sources(module)
    (_read_exported_weights if exported else _read_weights)(module, checkpoint)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return LoadedRun(module.to(device, dtype).eval(), data, checkpoint)


def _is_exported(path: Place) -> bool:
    if not any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
        return False
    # imported here because it imports transformers
    from bigmac_lightning.models.exported import is_exported  # pyright: ignore[reportMissingImports]

    return is_exported(path)


def _read_exported_weights(module: PipelineModule, folder: Place) -> None:
    if not hasattr(module, "init_from"):
        raise ValueError(f"{folder} was exported from a MultimodalLM, and {type(module).__name__} is none")
    if module._materialized:
        raise ValueError(f"the module for {folder} has weights already: give load a new one")
    module.init_from = {"": str(folder)}  # pyright: ignore[reportArgumentType]
    module.configure_model()


def _read_weights(module: PipelineModule, checkpoint: Place) -> None:
    weights = CheckpointWeights(checkpoint)
    module.configure_model()
    state, copies = module.state_dict(), module.tied_copies
    expected = {name: tuple(tensor.shape) for name, tensor in state.items() if name not in copies}
    if wrong := weights.mismatches(expected, allowed=copies):
        raise ValueError(f"{checkpoint} is not of this model: {first_few(wrong)}")
    weights.check()
    weights.check_ties(copies)
    weights.read_into({name: tensor for name, tensor in state.items() if name not in copies})


class _Reader(ConfigReader):
    """Builds the model and the DataModule of a config, and nothing else."""

    @classmethod
    def of(cls, config: Place, text: str | None) -> "_Reader":
        """
        Args:
            config: the file of the config.
            text: what is read in place of the file.
        """
        try:
            return cls("load", ["--config", str(config) if text is None else text])
        except (*PROBLEMS, TypeError) as error:
            raise ValueError(f"{config} cannot be read: {text_of(error)}") from error

    def instantiate_classes(self) -> None:
        wanted = Namespace({name: self.config[name] for name in ("model", "data") if self.config.get(name)})
        made = self.parser.instantiate_classes(wanted)
        self.model, self.data = made["model"], made.get("data")
        if self.data is None:
            raise ValueError("it has no data, which would make prompts: give load(..., data=...)")


def _checkpoint(path: Place) -> Place:
    """The checkpoint at a path, or the newest whole one of a run."""
    if not (path / CONFIG).is_file():
        return files.present(path)
    found, skipped = newest_whole([(path / "checkpoints", ".ckpt"), (path, ".ckpt")])
    if found is None:
        raise FileNotFoundError(f"there is no whole checkpoint in {path} or its folder checkpoints{in_words(skipped)}")
    if skipped:
        log.warning("%s is loaded%s", found, in_words(skipped))
    return found


def _config_of(checkpoint: Place, exported: bool) -> tuple[Place, str | None]:
    if exported:
        assert isinstance(checkpoint, Path)
        return checkpoint / CONFIG, read_exported(checkpoint)
    if found := config_of(checkpoint):
        return found, None
    raise ValueError(
        f"there is no {CONFIG} of the run in the folders above {checkpoint}: give load(..., module=..., data=...)"
    )


def _without_sources(module: PipelineModule) -> None:
    """All weights come from the checkpoint, so pretrained ones and those of earlier runs need not be read, or be there
    at all."""
    for part in module.modules():
        if isinstance(getattr(part, "source", None), str):
            part.source = None  # pyright: ignore[reportArgumentType]
    if hasattr(module, "init_from"):
        module.init_from = {}  # pyright: ignore[reportArgumentType]


def _with_bytes(turn: Mapping[str, Any]) -> dict[str, Any]:
    """A message whose pictures are files."""
    content = turn.get("content")
    if isinstance(content, str) or not isinstance(content, Sequence):
        return dict(turn)
    parts = [
        {key: _bytes(value) for key, value in part.items()} if isinstance(part, dict) else part for part in content
    ]
    return {**turn, "content": parts}


def _list(given: Any) -> Sequence[Any]:
    """Several items, or one."""
    return [given] if isinstance(given, str | bytes | Path | Pictures.Image) else given


def _bytes(item: Any) -> Any:
    """A picture of Pillow as the bytes of a PNG; anything else as it is, but for paths, which become texts."""
    if isinstance(item, Pictures.Image):
        file = io.BytesIO()
        item.save(file, "PNG")
        return file.getvalue()
    return str(item) if isinstance(item, Path) else item


def _picture(tensor: Tensor) -> Pictures.Image:
    """
    Args:
        tensor: (1 or 3, H, W), in [-1, 1].
    """
    from torchvision.transforms.v2.functional import to_pil_image

    if tensor.ndim != 3 or tensor.shape[0] not in (1, 3):
        raise ValueError(
            f"the generator made something of shape {tuple(tensor.shape)}, which is no picture: take it from "
            "run.module.pipeline(run.prompt(..., draws=True), sample=True)"
        )
    return to_pil_image(((tensor.float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))
