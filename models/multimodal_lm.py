"""The LightningModule that most users want: any encoders, LLM and generators, trained together or in part.

Adds to `PipelineModule` what training needs: ordinary steps, metrics, frozen components, AdamW with warm-up. Works
under any strategy; knows nothing of ranks. Every rank logs the same keys whatever is in its batches.
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from bigmac_lightning.checkpoints.mismatches import first_few
from bigmac_lightning.checkpoints.weights import CheckpointWeights
from bigmac_lightning.contracts.batch import Batch
from bigmac_lightning.contracts.components import Encoder, Generator, LanguageModel
from bigmac_lightning.contracts.module import PipelineModule
from bigmac_lightning.estimates.partition import TrainedLayers

from .initialization import to_config
from .llm.decoder import HFDecoder
from .lora import add_lora, targets_of
from .vision.hf import HFVideoEncoder, HFVisionEncoder


class MultimodalLM(PipelineModule):
    """Encoders + LLM + generators with a text loss and a loss of each generator.

    Logs ``train/loss``, ``train/text`` and ``train/<generator>`` at each step, the same of ``val`` and ``test`` over
    each evaluation, and there ``val/accuracy``: the share of labelled tokens that are the most likely ones.
    """

    def __init__(
        self,
        llm: LanguageModel,
        encoders: dict[str, Encoder] | None = None,
        generators: dict[str, Generator] | None = None,
        loss_weights: dict[str, float] | None = None,
        freeze: Sequence[str] = (),
        learning_rate: float = 3e-4,
        weight_decay: float = 0.01,
        warmup_steps: int = 0,
        schedule: Literal["constant", "cosine"] = "cosine",
        optimization: dict[str, dict[str, float]] | None = None,
        lora: dict[str, dict[str, Any]] | None = None,
        init_from: str | dict[str, str] | None = None,
    ) -> None:
        """
        Args:
            llm, encoders, generators, loss_weights: as in `PipelineModule`.
            freeze: what not to train: names of components ("llm", "generators"), of modules in them
                ("encoders.image.tower") or of parameters, or patterns of parameter names ("llm.model.layers.*.mlp.*").
            learning_rate: peak, after the warm-up.
            weight_decay: of matrices; vectors (biases, norms) have none.
            warmup_steps: optimizer steps of linear warm-up.
            schedule: after the warm-up; "cosine" falls to zero at the last step.
            optimization: other settings for some: ``{"encoders.image.projector": {"learning_rate": 1e-3}}``, by the
                names and patterns of `freeze`; also "weight_decay". Where several match, the last one counts.
            lora: low-rank adapters by component: ``{"llm": {"r": 8, "target_modules": ["q_proj", "v_proj"]}}``, also
                "lora_alpha", "lora_dropout", "use_rslora"; of such a component nothing else is trained.
            init_from: a checkpoint of an earlier run to take weights from, and nothing else; of any strategy and number
                of ranks. Or one for each component that has one: ``{"llm": PATH, "encoders.image": PATH}``. What a run
                is resumed from, or evaluated with, comes after it and counts.

        Raises:
            ValueError: an argument names something that the model does not have.
        """
        super().__init__(llm, encoders, generators, loss_weights)
        self.freeze_patterns = list(freeze)
        self.lora = dict(lora or {})
        self.optimization = dict(optimization or {})
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps
        self.schedule = schedule
        self.init_from = {"": init_from} if isinstance(init_from, str) else dict(init_from or {})
        self._check_patterns("freeze", self.freeze_patterns)
        self._check_patterns("optimization", self.optimization)
        for argument, names in (("lora", self.lora), ("init_from", self.init_from.keys() - {""})):
            for name in names:
                if name not in self._components():
                    raise ValueError(f"{argument}: {name!r} is no component; there are {self._components()}")
        self._lora_targets = {name: targets_of(self.get_submodule(name), name, s) for name, s in self.lora.items()}
        if isinstance(self.llm, HFDecoder):
            self.llm.check_adapters(self._lora_targets.get("llm", ()))
        for pattern, settings in self.optimization.items():
            if unknown := settings.keys() - {"learning_rate", "weight_decay"}:
                raise ValueError(
                    f"optimization: {pattern!r} has {sorted(unknown)}; there are learning_rate and weight_decay"
                )
        for name in self.lora:
            self.get_submodule(name).requires_grad_(False)  # of such a component only the adapters are trained
        self._freeze()
        self.evaluations = nn.ModuleDict({stage: _Evaluation(self.loss_names) for stage in ("val", "test")})

    def _check_patterns(self, argument: str, patterns: Iterable[str]) -> None:
        """All of the LLM's names are known before it has weights, whichever part is kept later."""
        modules = {name for name, _ in self.named_modules() if name}
        parameters = {name for name, _ in self._named_aliases()}
        for pattern in patterns:
            if pattern not in modules and not any(_matches(name, pattern) for name in parameters):
                raise ValueError(
                    f"{argument}: {pattern!r} matches no component, module or parameter. "
                    f"Components are {self._components()}; "
                    "below them, names are those of `named_parameters()`; patterns may use *"
                )

    def _components(self) -> list[str]:
        encoders = [f"encoders.{name}" for name in self.encoders]
        return ["llm", *encoders, *(f"generators.{name}" for name in self.generators)]

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        attn_implementation: str = "sdpa",
        dtype: str = "float32",
        gradient_checkpointing: bool = False,
        fused_loss: bool | Literal["liger"] = False,
        encoders: dict[str, Encoder] | None = None,
        generators: dict[str, Generator] | None = None,
        loss_weights: dict[str, float] | None = None,
        freeze: Sequence[str] = (),
        learning_rate: float = 1e-5,
        weight_decay: float = 0.01,
        warmup_steps: int = 0,
        schedule: Literal["constant", "cosine"] = "cosine",
        optimization: dict[str, dict[str, float]] | None = None,
        lora: dict[str, dict[str, Any]] | None = None,
        init_from: str | dict[str, str] | None = None,
    ) -> "MultimodalLM":  # not Self: the command line looks for this class
        """A model from the folder of a Hugging Face checkpoint: a decoder, or a vision-language model, whose tower
        becomes the encoder "image" (and "video", if it takes videos). Weights are read later, by each process only what
        it keeps.

        Args:
            path: folder with ``config.json`` and safetensors.
            attn_implementation, dtype, gradient_checkpointing: as of `HFDecoder`, for LLM and encoder.
            fused_loss: as of `HFDecoder`.
            encoders, generators: further ones, with weights of their own.
            loss_weights, freeze, learning_rate, weight_decay, warmup_steps, schedule, optimization, lora, init_from:
                as of this class.

        Raises:
            ValueError: there is no such folder, or the model cannot be trained in a pipeline, with the reason.
        """
        if not (Path(path) / "config.json").is_file():
            raise ValueError(f"there is no config.json in {path}: give the folder of a Hugging Face checkpoint")
        config = to_config(path)
        given: dict[str, Any] = {
            "weights": path,
            "attn_implementation": attn_implementation,
            "dtype": dtype,
            "gradient_checkpointing": gradient_checkpointing,
        }
        llm, vision = HFDecoder(config, fused_loss=fused_loss, **given), dict[str, Encoder]()
        if llm.family is not None:
            image = vision["image"] = HFVisionEncoder(config, **given)
            if llm.family.video is not None:
                vision["video"] = HFVideoEncoder(image)
        optimizing = (learning_rate, weight_decay, warmup_steps, schedule, optimization)
        training = (loss_weights, freeze, *optimizing, lora, init_from)
        return cls(llm, {**vision, **(encoders or {})}, generators, *training)

    def materialize(self) -> None:
        shapes = {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}  # of the whole model
        super().materialize()
        self._load_initial_weights(shapes)

    def adapt(self) -> None:
        for name, settings in self.lora.items():
            add_lora(self.get_submodule(name), name, settings, self._lora_targets[name])
        self._freeze()

    def _freeze(self) -> None:
        for name, parameter in self._named_aliases():
            if any(_matches(name, pattern) for pattern in self.freeze_patterns):
                parameter.requires_grad_(False)

    def _find_trained_layers(self) -> TrainedLayers:
        found = super()._find_trained_layers()
        return replace(found, below=found.below or any(not name.startswith("generators.") for name in self.lora))

    def _load_initial_weights(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Read what `init_from` has of the tensors that are here; complain, on all ranks alike, of any that do not fit.

        Args:
            shapes: of the whole model's tensors.
        """
        copies = {f"llm.{copy}": f"llm.{canonical}" for copy, canonical in self.llm.tied.items()}
        expected = {name: shape for name, shape in shapes.items() if name not in copies}
        here = {copies.get(name, name): tensor for name, tensor in self.state_dict().items()}
        for component, path in self.init_from.items():
            stored = CheckpointWeights(path)
            if wrong := stored.mismatches(expected, component, copies):
                raise ValueError(
                    f"init_from: {component or 'the model'} cannot start from {path}: {first_few(wrong)}. To "
                    "start some components from a checkpoint, give it by their names; one of a run with lora serves "
                    "after `bigmac export`, as the folder to start from"
                )
            inside = f"{component}." if component else ""
            stored.read_into({name: tensor for name, tensor in here.items() if name.startswith(inside)})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Notes which Hugging Face model this is, for `bigmac export`."""
        super().on_save_checkpoint(checkpoint)
        if isinstance(self.llm, HFDecoder):
            config = json.loads(self.llm.config.to_json_string(use_diff=False))
            checkpoint["hugging_face"] = {"config": config, "source": self.llm.source, "lora": self.lora}

    def _named_aliases(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All parameters; those of tied weights under both names, wherever the other copy is."""
        other = {f"llm.{a}": f"llm.{b}" for a, b in self.llm.tied.items()}
        other |= {b: a for a, b in other.items()}
        for name, parameter in self.named_parameters(remove_duplicate=False):
            yield name, parameter
            if name in other:
                yield other[name], parameter

    # -- steps -----------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        out = self.pipeline(batch)
        metrics = {f"train/{name}": value for name, value in out.metrics.items()}
        self.log_dict(metrics, prog_bar=True, batch_size=batch.samples)
        return out.loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("test", batch)

    def on_validation_epoch_end(self) -> None:
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test")

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """``{"predictions": (sum of L,) token ids, "samples": one tensor per generator target}``"""
        out = self.pipeline(batch, sample=True)
        return {"predictions": out.predictions, "samples": out.samples}

    def _evaluate(self, stage: str, batch: Batch) -> None:
        out = self.pipeline(batch)
        assert out.predictions is not None, "only training goes without predictions"
        self._evaluation(stage).update(out.metrics, self.counts(batch), out.predictions, batch.labels)

    def _log_evaluation(self, stage: str) -> None:
        values = self._evaluation(stage).compute()
        values["loss"] = torch.stack(
            [self.loss_weights.get(name, 1.0) * values[name] for name in self.loss_names]
        ).sum()
        # the values are equal on all ranks already; sync_dist spares the user Lightning's warning
        self.log_dict({f"{stage}/{name}": value for name, value in values.items()}, prog_bar=True, sync_dist=True)

    def _evaluation(self, stage: str) -> "_Evaluation":
        evaluation = self.evaluations[stage]
        assert isinstance(evaluation, _Evaluation)
        return evaluation

    # -- optimization ----------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        if self.runner is None and not any(parameter.requires_grad for parameter in self.parameters()):
            raise ValueError(f"nothing is left to train: freeze={self.freeze_patterns} covers every parameter")
        defaults = {"learning_rate": self.learning_rate, "weight_decay": self.weight_decay}
        groups: list[dict[str, Any]] = []  # two for each entry of `optimization`: the same on all ranks
        chosen: dict[nn.Parameter, int] = {}  # the entry that a parameter belongs to; 0: none
        for entry, (pattern, settings) in enumerate([("", {}), *self.optimization.items()]):
            rate, decay = ({**defaults, **settings}[name] for name in ("learning_rate", "weight_decay"))
            groups += [{"params": [], "lr": rate, "weight_decay": d} for d in (decay, 0.0)]
            for name, parameter in self._named_aliases():
                if entry == 0 or _matches(name, pattern):
                    chosen[parameter] = entry
        for parameter, entry in chosen.items():
            if parameter.requires_grad:
                groups[2 * entry + (parameter.ndim < 2)]["params"].append(parameter)
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._schedule())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _schedule(self) -> "_WarmupSchedule":
        if self.schedule == "constant":
            return _WarmupSchedule(self.warmup_steps, None)
        total = self.trainer.estimated_stepping_batches
        if not math.isfinite(total):
            raise ValueError('schedule="cosine" has to know its end: set max_epochs or max_steps, or use "constant"')
        return _WarmupSchedule(self.warmup_steps, int(total))


def _matches(name: str, pattern: str) -> bool:
    """Whether a parameter is, or lies in, what a `freeze` entry names."""
    return name == pattern or name.startswith(f"{pattern}.") or fnmatchcase(name, pattern)


class _WarmupSchedule:
    """Factor of the learning rate at a step: linear warm-up, then constant or, with a `total`, a cosine to zero."""

    def __init__(self, warmup: int, total: int | None) -> None:
        self.warmup, self.total = warmup, total

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        if self.total is None:
            return 1.0
        done = (step - self.warmup) / max(1, self.total - self.warmup)
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


class _Evaluation(nn.Module):
    """Losses and accuracy over a whole evaluation, equal on every rank; only `compute` communicates.

    Batches differ in how many labels and targets they have, or have none, so every loss is weighted by its count.
    """

    def __init__(self, losses: Sequence[str]) -> None:
        super().__init__()
        self.names = list(losses)
        self.means = _Means(len(losses))
        self.accuracy = MulticlassAccuracy(average="micro", validate_args=False)

    def update(self, metrics: dict[str, Tensor], counts: list[float], predictions: Tensor, labels: Tensor) -> None:
        self.means.update(torch.stack([metrics[name] for name in self.names]), counts)
        self.accuracy.update(predictions[None], labels[None])

    def compute(self) -> dict[str, Tensor]:
        """Each loss and "accuracy"; 0 for what never occurred. Starts anew."""
        means = self.means.compute().view(-1)  # torchmetrics makes a scalar of a single one
        values = dict(zip(self.names, means.unbind(), strict=True))
        values["accuracy"] = self.accuracy.compute()
        self.means.reset()
        self.accuracy.reset()
        return values


class _Means(Metric):
    """Several weighted means."""

    sums: Tensor
    counts: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(size), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(size), dist_reduce_fx="sum")

    def update(self, values: Tensor, counts: Sequence[float]) -> None:
        weights = torch.tensor(counts, device=values.device)
        self.sums = self.sums + values * weights  # not in place: a state may be an inference tensor
        self.counts = self.counts + weights

    def compute(self) -> Tensor:
        return self.sums / self.counts.clamp(min=1.0)
