"""The LightningModule that most users want: any encoders, LLM and generators, trained together or in part.

It adds to `PipelineModule` what training needs: ordinary steps, metrics, frozen components, low-rank adapters, AdamW
with warm-up. It works under any strategy, and every rank logs the same keys whatever is in its batches.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bigmac_lightning.checkpoints.fetching import local_folder
from bigmac_lightning.checkpoints.mismatches import first_few
from bigmac_lightning.checkpoints.weights import CheckpointWeights
from bigmac_lightning.contracts.batch import Batch
from bigmac_lightning.contracts.components import Encoder, Generator, LanguageModel
from bigmac_lightning.contracts.module import PipelineModule
from bigmac_lightning.estimates.partition import TrainedLayers

from .evaluation import Evaluation
from .exported import ExportedFolder, is_exported
from .folders import check_weights
from .hf_component import HFComponent
from .initialization import to_config
from .llm.decoder import HFDecoder
from .lora import add_lora, targets_of
from .optimization import matches, parameter_groups, warmup_factor
from .vision.hf_encoders import HFVisionEncoder, encoders_of


class MultimodalLM(PipelineModule):
    """Encoders + LLM + generators with a text loss and a loss of each generator.

    Logs ``train/loss``, ``train/text`` and ``train/<generator>`` at each step, the same of ``val`` and ``test`` over
    each evaluation; and there ``val/accuracy``, the share of labelled tokens that are the most likely ones, and
    ``val/exact_match``, the share of samples of which all labelled tokens are: they would be written exactly so.
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
            llm, encoders, generators, loss_weights: see `PipelineModule`.
            freeze: what is not trained: names of components ("llm", "generators"), of modules in them
                ("encoders.image.tower") or of parameters, or patterns of parameter names
                (``llm.model.layers.*.mlp.*``).
            learning_rate: the learning rate after the warm-up.
            weight_decay: the weight decay of matrices; vectors (biases, norms) have none.
            warmup_steps: the number of optimizer steps in which the learning rate rises linearly.
            schedule: the learning rate after the warm-up; "cosine" falls to zero at the last step.
            optimization: "learning_rate" and "weight_decay" for some parameters:
                ``{"encoders.image.projector": {"learning_rate": 1e-3}}``, with the names and patterns of `freeze`. If
                several fit a parameter, the last one counts.
            lora: low-rank adapters by component: ``{"llm": {"r": 8, "target_modules": ["q_proj", "v_proj"]}}``, with
                "lora_alpha", "lora_dropout", "use_rslora" as further options. Of such a component only the adapters are
                trained.
            init_from: the checkpoint of an earlier run, of any strategy and number of ranks, or the folder that
                `bigmac export` has made of it, whose weights this run starts with. Or one for each of some components:
                ``{"llm": PATH, "encoders.image": PATH}``. A checkpoint that a run is resumed from, or evaluated with,
                is read after it and replaces these weights.

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
            self._check_levels(self.llm)
            self.llm.check_adapters(self._lora_targets.get("llm", ()))
        for pattern, values in self.optimization.items():
            if unknown := values.keys() - {"learning_rate", "weight_decay"}:
                raise ValueError(
                    f"optimization: {pattern!r} has {sorted(unknown)}; there are learning_rate and weight_decay"
                )
        for name in self.lora:
            self.get_submodule(name).requires_grad_(False)  # of such a component only the adapters are trained
        self._freeze()
        self.evaluations = nn.ModuleDict({stage: Evaluation(self.loss_names) for stage in ("val", "test")})

    def _check_levels(self, llm: HFDecoder) -> None:
        """
        Raises:
            ValueError: an encoder makes features for more layers than take some.
        """
        for name, encoder in self.encoders.items():
            assert isinstance(encoder, Encoder)
            if encoder.levels - 1 > len(llm.layers_with_features):
                raise ValueError(
                    f"encoders.{name} makes features for {encoder.levels - 1} layers of its own LLM besides the "
                    f"embeddings, and the LLM of model_type {llm.config.model_type!r} takes them in "
                    f"{len(llm.layers_with_features)} layers: take an encoder without these, such as VisionEncoder"
                )

    def _check_patterns(self, argument: str, patterns: Iterable[str]) -> None:
        """
        Raises:
            ValueError: a pattern means nothing. Every rank finds that, as the LLM is still whole and without weights.
        """
        modules = {name for name, _ in self.named_modules() if name}
        parameters = {name for name, _ in self._named_aliases()}
        for pattern in patterns:
            if pattern not in modules and not any(matches(name, pattern) for name in parameters):
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
        trust_remote_code: bool = False,
    ) -> "MultimodalLM":  # not Self: the command line looks for this class
        """A model from the folder of a Hugging Face checkpoint: a decoder, or a vision- or audio-language model, whose
        towers become the encoder "image" (and "video" and "audio", if the model takes videos and sounds). Weights are
        read later, when each process reads only what it holds.

        Args:
            path: a folder with ``config.json`` and safetensors, local or remote.
            attn_implementation, dtype, gradient_checkpointing: see `HFDecoder`; they are for LLM and encoder.
            fused_loss: see `HFDecoder`.
            encoders, generators: further encoders and generators, with weights of their own.
            loss_weights, freeze, learning_rate, weight_decay, warmup_steps, schedule, optimization, lora, init_from:
                see the constructor of this class.
            trust_remote_code: see `HFDecoder`.

        Raises:
            ValueError: there is no such folder, or the model cannot be trained in a pipeline; the message says why.
        """
        if not (Path(local_folder(path)) / "config.json").is_file():
            raise ValueError(f"there is no config.json in {path}: give the folder of a Hugging Face checkpoint")
        config = to_config(path, trust_remote_code)
        shared: dict[str, Any] = {
            "weights": path,
            "attn_implementation": attn_implementation,
            "dtype": dtype,
            "gradient_checkpointing": gradient_checkpointing,
        }
        llm = HFDecoder(config, fused_loss=fused_loss, trust_remote_code=trust_remote_code, **shared)
        vision: dict[str, Encoder] = {}
        if llm.family is not None:
            vision = encoders_of(HFVisionEncoder(config, **shared))
        # jsonargparse cannot follow **kwargs into `cls`, so the arguments are written out here.
        optimizing = (learning_rate, weight_decay, warmup_steps, schedule, optimization)
        training = (loss_weights, freeze, *optimizing, lora, init_from)
        return cls(llm, {**vision, **(encoders or {})}, generators, *training)

    def materialize(self) -> None:
        whole = {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}
        expected = {name: shape for name, shape in whole.items() if name not in self.tied_copies}
        for component, path in self.init_from.items():
            if is_exported(path):
                self._start_from_exported(component, path, expected)
        super().materialize()
        self._load_initial_weights(expected)

    def adapt(self) -> None:
        for name, options in self.lora.items():
            add_lora(self.get_submodule(name), name, options, self._lora_targets[name])
        self._freeze()

    def _freeze(self) -> None:
        for name, parameter in self._named_aliases():
            if any(matches(name, pattern) for pattern in self.freeze_patterns):
                parameter.requires_grad_(False)

    def _find_trained_layers(self) -> TrainedLayers:
        found = super()._find_trained_layers()
        return replace(found, below=found.below or any(not name.startswith("generators.") for name in self.lora))

    def _start_from_exported(self, component: str, path: str, expected: dict[str, tuple[int, ...]]) -> None:
        parts = {name: self.get_submodule(name) for name in self._components() if component in ("", name)}
        inside = {name: shape for name, shape in expected.items() if name.startswith(_inside(component))}
        if wrong := ExportedFolder(path).start(parts, inside, whole=not component):
            raise ValueError(
                f"init_from: {component or 'the model'} cannot start from {path}: {first_few(wrong)}. To start some "
                "components from an exported folder, give it by their names"
            )

    def _load_initial_weights(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Read those tensors of `init_from` that this process holds, but those that components have read themselves.

        Args:
            expected: the shapes of the whole model's tensors, without those that are tied to others.

        Raises:
            ValueError: a tensor of the whole model does not fit, a file is damaged, or weights differ that the model
                ties; on all ranks alike.
        """
        copies = self.tied_copies
        here = {copies.get(name, name): tensor for name, tensor in self.state_dict().items()}
        for component, path in self.init_from.items():
            inside = {name: tensor for name, tensor in here.items() if name.startswith(_inside(component))}
            if is_exported(path):
                exported = ExportedFolder(path)
                exported.read_into({name: tensor for name, tensor in inside.items() if name in exported.others})
                continue
            weights = CheckpointWeights(path)
            if wrong := weights.mismatches(expected, component, copies):
                raise ValueError(
                    f"init_from: {component or 'the model'} cannot start from {path}: {first_few(wrong)}. To "
                    "start some components from a checkpoint, give it by their names; one of a run with lora serves "
                    "after `bigmac export`, as the folder to start from"
                )
            weights.check()
            weights.check_ties(copies)
            weights.read_into(inside)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds to the checkpoint which Hugging Face model this is, for `bigmac export`."""
        super().on_save_checkpoint(checkpoint)
        if isinstance(self.llm, HFDecoder):
            config = json.loads(self.llm.config.to_json_string(use_diff=False))
            described = {"config": config, "source": self.llm.source, "lora": self.lora}
            checkpoint["hugging_face"] = {**described, "source_is_base": self._source_is_base()}

    def _source_is_base(self) -> bool:
        """Whether the Hugging Face model has started from the weights of one folder alone."""
        parts = {name: self.get_submodule(name) for name in self._components()}
        parts = {name: part for name, part in parts.items() if isinstance(part, HFComponent)}
        others = any(name in ("", *parts) and not is_exported(path) for name, path in self.init_from.items())
        return not others and len({part.source for part in parts.values()}) == 1

    def _named_aliases(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All parameters by name. A tied weight comes under both of its names, also where this rank has one copy."""
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
        """Returns ``{"predictions": (sum of L,) token ids, "samples": one tensor per generator target}``."""
        out = self.pipeline(batch, sample=True)
        return {"predictions": out.predictions, "samples": out.samples}

    def _evaluate(self, stage: str, batch: Batch) -> None:
        out = self.pipeline(batch)
        assert out.predictions is not None, "only training goes without predictions"
        self._evaluation(stage).update(out.metrics, self.counts(batch), out.predictions, batch)

    def _log_evaluation(self, stage: str) -> None:
        values = self._evaluation(stage).compute()
        values["loss"] = torch.stack(
            [self.loss_weights.get(name, 1.0) * values[name] for name in self.loss_names]
        ).sum()
        # The values are equal on all ranks already; without sync_dist Lightning would warn.
        self.log_dict({f"{stage}/{name}": value for name, value in values.items()}, prog_bar=True, sync_dist=True)

    def _evaluation(self, stage: str) -> Evaluation:
        evaluation = self.evaluations[stage]
        assert isinstance(evaluation, Evaluation)
        return evaluation

    # -- weights -----------------------------------------------------------------------------------------------------

    def check_weights(self) -> None:
        sources = [getattr(part, "source", None) for part in self.modules()]
        for source in dict.fromkeys(source for source in sources if isinstance(source, str)):
            check_weights(source)

    # -- optimization ----------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        if self.runner is None and not any(parameter.requires_grad for parameter in self.parameters()):
            raise ValueError(f"nothing is left to train: freeze={self.freeze_patterns} covers every parameter")
        groups = parameter_groups(self._named_aliases(), self.learning_rate, self.weight_decay, self.optimization)
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._warmup_schedule())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _warmup_schedule(self) -> Callable[[int], float]:
        """No object with attributes, which a checkpoint would keep: a run that goes on for longer has another end."""
        if self.schedule == "constant":
            return partial(warmup_factor, warmup=self.warmup_steps, total=None)
        total = self.trainer.estimated_stepping_batches
        if not math.isfinite(total):
            raise ValueError('schedule="cosine" has to know its end: set max_epochs or max_steps, or use "constant"')
        return partial(warmup_factor, warmup=self.warmup_steps, total=int(total))


def _inside(component: str) -> str:
    """What the names of a component's tensors begin with; all tensors: ""."""
    return f"{component}." if component else ""
