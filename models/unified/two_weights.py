"""Two sets of weights for the modules of an LLM: one for tokens of pictures that are being drawn, one for all others
(mixture of transformers, arXiv 2411.04996). Attention has no weights, so all tokens meet there.

Shape suffixes: B samples, S tokens, K tokens of one kind.
"""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

DRAWN, OTHERS = "drawn_positions", "other_positions"
"""The inputs that say which tokens these are: flat indices into B * S."""


class Places:
    """Where the tokens of each kind are, while layers run."""

    def __init__(self) -> None:
        self.drawn: Tensor | None = None
        self.others: Tensor | None = None

    @contextmanager
    def given(self, inputs: dict[str, Tensor]) -> Iterator[None]:
        """Within this context, modules with two sets of weights get tokens of these inputs."""
        before, (self.drawn, self.others) = (self.drawn, self.others), (inputs[DRAWN], inputs[OTHERS])
        try:
            yield
        finally:
            self.drawn, self.others = before

    def contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """For a layer that runs now, and again in the backward, when tokens of other inputs may be the given ones."""
        assert self.drawn is not None, "layers run within `given`"
        assert self.others is not None, "it gives both"
        return nullcontext(), self.given({DRAWN: self.drawn, OTHERS: self.others})


class TwoWeights(nn.Module):
    """A module that treats each token alone, with weights for each kind of token.

    Attributes:
        others: for all tokens but those of pictures that are being drawn.
        drawn: for those.
    """

    def __init__(self, module: nn.Module, places: Places) -> None:
        super().__init__()
        self.others, self.drawn = module, copy.deepcopy(module)
        self._places = places

    def forward(self, x: Tensor) -> Tensor:
        drawn, others = self._places.drawn, self._places.others
        assert drawn is not None, "layers run within `Places.given`"
        assert others is not None, "it gives both"
        flat = x.flatten(0, 1)
        others_K, drawn_K = self.others(flat[others]), self.drawn(flat[drawn])
        out = others_K.new_empty(len(flat), *others_K.shape[1:])
        out = out.index_copy(0, others, others_K).index_copy(0, drawn, drawn_K)
        return out.unflatten(0, x.shape[:2])


def divide(parent: nn.Module, places: Places, inside: str = "") -> None:
    """Give two sets of weights to all modules in another one that have weights of their own.

    Raises:
        ValueError: one of them may not treat each token alone.
    """
    for name, child in list(parent.named_children()):
        path = f"{inside}{name}"
        if next(child.parameters(recurse=False), None) is None:
            divide(child, places, f"{path}.")
        elif _treats_tokens_alone(child):
            parent._modules[name] = TwoWeights(child, places)
        else:
            raise ValueError(
                f"{path} is a {type(child).__name__}, of which it is not known whether it treats each token alone"
            )


def for_both(plan: dict[str, str], whole: nn.Module) -> dict[str, str]:
    """A plan by names of parameters and modules, that of tensor parallelism, for both sets of weights.

    Args:
        plan: of the model before `divide`.
        whole: the model after it.
    """
    both = {name for name, module in whole.named_modules() if isinstance(module, TwoWeights)}
    made = dict[str, str]()
    for name, style in plan.items():
        path, _, own = name.rpartition(".")
        if name in both:
            made |= {f"{name}.{kind}": style for kind in ("others", "drawn")}
        elif path in both:
            made |= {f"{path}.{kind}.{own}": style for kind in ("others", "drawn")}
        if name not in both:  # parameters may also be cut before `divide`
            made[name] = style
    return made


def _treats_tokens_alone(module: nn.Module) -> bool:
    own: list[Any] = list(module.parameters(recurse=False))
    is_norm = type(module).__name__.endswith("Norm") and len(own) <= 2 and all(p.ndim == 1 for p in own)
    return not list(module.children()) and (isinstance(module, nn.Linear) or is_norm)


def positions_of(drawn_BS: Tensor) -> dict[str, Tensor]:
    """The inputs that `Places` needs."""
    flat = drawn_BS.flatten().bool()
    return {DRAWN: torch.nonzero(flat)[:, 0], OTHERS: torch.nonzero(~flat)[:, 0]}
