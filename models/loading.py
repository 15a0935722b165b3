"""Weights for some modules of a Hugging Face model: read from a checkpoint with the library's own loader, or drawn."""

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose, WeightConverter
from transformers.utils import logging

from bigmac_lightning.checkpoints.mismatches import first_few

from .folders import reading_weights
from .initialization import allocate_and_initialize
from .meta_model import implementations
from .rows import DrawnAgainError, Once, cut_rows

Cut = Callable[[Any, str], None]
"""Replaces the parameters of a module of this name (all modules: "") in a model by this rank's part of them: slices or
rows."""


def materialize(
    whole: PreTrainedModel,
    keep: Callable[[Any], None],
    source: str | None,
    seed: int,
    dtype: torch.dtype | None,
    cut: Cut | None = None,
) -> Any:
    """Drop the modules that are not needed and give the others weights, on the CPU.

    Args:
        whole: a model on the meta device. It must not be used any longer.
        keep: drops modules of such a model.
        source: the folder of a checkpoint; only tensors of modules that are left are read. ``None``: draw the weights.
        seed: the seed of drawn weights.
        dtype: the type of the weights; ``None``: as in the checkpoint.
        cut: makes this rank's part of parameters. From a checkpoint only this part is read; drawn weights are cut layer
            by layer.

    Raises:
        ValueError: the checkpoint cannot be read, or belongs to another model.
    """
    if source is not None:
        loaded = _load(type(whole), keep, source, whole.config, dtype, cut)
        if cut is not None:
            cut(loaded, "")  # the loader may have read views of more than slices
        return loaded
    keep(whole)
    if cut is None:
        return _drawn(whole, seed, dtype)
    try:
        made = _drawn(copy.deepcopy(whole), seed, dtype, cut)
    except DrawnAgainError:  # then all weights are drawn before any is cut
        made = _drawn(whole, seed, dtype)
    cut(made, "")
    return made


def _drawn(whole: Any, seed: int, dtype: torch.dtype | None, cut: Cut | None = None) -> Any:
    """A model with drawn weights, whose layers are cut one by one.

    Raises:
        DrawnAgainError: the model draws weights of a layer anew after the layer.
    """
    convert = _conversion(whole, dtype)
    lists = [name for name, module in whole.named_modules() if isinstance(module, nn.ModuleList)]
    outermost = {name for name in lists if not any(name.startswith(f"{other}.") for other in lists)}

    def finish(name: str) -> None:
        if cut is not None and name.rpartition(".")[0] in outermost:
            convert(whole.get_submodule(name), f"{name}.")
            cut(whole, name)

    with Once():
        allocate_and_initialize(whole, seed, finish)
    convert(whole, "")
    return whole


def rows_over(mesh: DeviceMesh | None) -> Cut | None:
    """Leaves this rank's rows of each parameter, if they are to lie in shards on the ranks of a mesh.

    The loader reads them as rows of a tensor in the checkpoint. Where it converts tensors (it joins, splits or turns
    them), rows of the result are others; these parameters are read whole. Experts that it stacks are rows of a weight.
    """
    return None if mesh is None else partial(_cut_rows, mesh=mesh)


def _cut_rows(whole: Any, inside: str, mesh: DeviceMesh) -> None:
    drawn = not any(parameter.is_meta for parameter in whole.get_submodule(inside).parameters())
    conversions = [] if drawn else get_model_conversion_mapping(whole)
    converted = [one for one in conversions if isinstance(one, WeightConverter)]

    def stays(name: str, parameter: Tensor) -> bool:
        found = [one for one in converted if any(_literal(target) in name for target in one.target_patterns)]
        return not all(_stacks(one) and parameter.ndim == 3 and len(parameter) % mesh.size() == 0 for one in found)

    cut_rows(whole, mesh, inside, stays)


def _literal(pattern: str) -> str:
    """The longest part of a pattern of names that means itself."""
    return max(re.split(r"[^\w.]+", pattern), key=len).strip(".")


def _stacks(converter: WeightConverter) -> bool:
    """Whether each row of what a converter makes comes from tensors of its own, which the loader then reads alone."""
    kinds = [type(operation) for operation in converter.operations]
    along = [getattr(operation, "dim", None) for operation in converter.operations]
    return (
        kinds[:1] == [MergeModulelist]
        and along[0] == 0
        and all(kind is Concatenate and dim == 1 for kind, dim in zip(kinds[1:], along[1:], strict=True))
    )


def _conversion(whole: Any, dtype: torch.dtype | None) -> Callable[[Any, str], None]:
    """Converts a module's drawn weights to the types that they would have if they were loaded in this type: the library
    leaves in float32 what it computes with in float32, such as the frequencies of rotary embeddings and some routers.
    It gets the module and what its names begin with in the model."""
    tensors = [*whole.named_parameters(remove_duplicate=False), *whole.named_buffers()]
    if dtype is None or (dtype == torch.float32 and all(t.dtype == dtype for _, t in tensors if t.is_floating_point())):
        return lambda module, prefix: None
    with torch.device("meta"):
        model = type(whole)._from_config(copy.deepcopy(whole.config), dtype=dtype)
        made = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    float32 = [re.compile(pattern.replace("*", ".*")) for pattern in whole._get_dtype_plan(dtype)]

    def convert(module: Any, prefix: str) -> None:
        for own, tensor in [*module.named_parameters(remove_duplicate=False), *module.named_buffers()]:
            if not isinstance(tensor, DTensor):  # slices have been converted
                exact = any(pattern.search(f"{prefix}{own}") for pattern in float32)
                tensor.data = tensor.data.to(torch.float32 if exact else made[f"{prefix}{own}"].dtype)

    return convert


def _load(
    model: type[PreTrainedModel],
    keep: Callable[[Any], None],
    source: str,
    config: PreTrainedConfig,
    dtype: torch.dtype | None,
    cut: Cut | None,
) -> Any:
    """Load through a subclass whose constructor drops modules. The library's loader then reads only the tensors of
    what is left, one by one, and knows how the names of tensors have changed over time."""

    def build(self: Any, *args: Any, **kwargs: Any) -> None:
        model.__init__(self, *args, **kwargs)
        keep(self)
        if cut is not None:
            whole = dict(self.named_parameters())
            cut(self, "")  # on the meta device: the loader reads what slices there are
            _keep_turned(self, whole)

    def slice_of(self: Any, name: str) -> Any:
        """By its shape the loader sees whether a tensor, of which it has read a slice, has to be turned."""
        found = model.get_parameter(self, name)
        if isinstance(found, DTensor) and any(part in name for part in _turned(self)):
            return found.to_local()
        return found

    # The subclass has the same name and module, because the library looks up conversions of names by them.
    changed = {"__init__": build, "get_parameter": slice_of, "__module__": model.__module__}
    part: Any = type(model.__name__, (model,), changed)
    part._keys_to_ignore_on_load_unexpected = [r".*"]
    with reading_weights(source, model.__name__) as folder, _quietly():
        loaded, found = part.from_pretrained(
            folder,
            config=config,
            dtype="auto" if dtype is None else dtype,
            attn_implementation=implementations(config, config._attn_implementation),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # the error below names them
            local_files_only=True,
            weights_only=True,
            trust_remote_code=False,  # of code besides the model's class, such as for generating text
        )
    wrong = [f"{name}: missing" for name in sorted(found["missing_keys"])]
    wrong += [f"{name}: wrong shape" for name, *_ in sorted(found["mismatched_keys"])]
    if wrong:
        raise ValueError(
            f"cannot load {source} as a {model.__name__}: tensors do not fit its config: {first_few(wrong)}"
        )
    return loaded.train()


def _turned(whole: Any) -> list[str]:
    """Parts of the names of parameters for which the loader may transpose what it has read."""
    converted = [one for one in get_model_conversion_mapping(whole) if isinstance(one, WeightConverter)]
    turning = [one for one in converted if any(isinstance(step, Transpose) for step in one.operations)]
    return [_literal(target) for one in turning for target in one.target_patterns]


def _keep_turned(whole: Any, parameters: Mapping[str, nn.Parameter]) -> None:
    """Put back these parameters where the loader turns a tensor after it has read a slice of it that is not along the
    first dimension: it would be the wrong slice. They are cut when they have been read."""
    turned = _turned(whole)
    for name, parameter in parameters.items():
        path, _, own = name.rpartition(".")
        module = whole.get_submodule(path)
        slices = module._parameters[own]
        if isinstance(slices, DTensor) and slices.placements != (Shard(0),) and any(part in name for part in turned):
            module._parameters[own] = parameter


@contextmanager
def _quietly() -> Iterator[None]:
    """Silences the library's progress bars, and its report of all tensors that this process does not read."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
