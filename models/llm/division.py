"""How a decoder's weights and positions are divided among the ranks of a stage."""

from typing import Any

from torch import nn

from bigmac_lightning.contracts.parallel import ParallelSizes, StagePeers

from ..meta_model import Names
from . import context_parallel, expert_parallel, tensor_parallel
from .exchange import Exchange
from .vocabulary_parallel import VocabularySlice


class Division:
    """The plans of transformers for tensor and expert parallelism of a model, and what a rank has of them.

    Attributes:
        tensor_plan, expert_plan: see `tensor_parallel.plan_of` and `expert_parallel.plan_of`.
        exchange: between the ranks that have slices of the same rows; ``None``: rows are whole.
        vocabulary: this rank's slice of the vocabulary; ``None``: it has all of it.
    """

    def __init__(self, whole: Any, names: Names, layer_configs: list[Any]) -> None:
        """
        Args:
            whole: the model on the meta device.
            layer_configs: the config of each layer.
        """
        self.tensor_plan = tensor_parallel.plan_of(whole, names)
        self.expert_plan = expert_parallel.plan_of(whole)
        self.exchange: Exchange | None = None
        self.vocabulary: VocabularySlice | None = None
        self._names, self._layer_configs = names, layer_configs

    def _tensor_plan(self, experts_apart: bool) -> tensor_parallel.Plan:
        return (
            expert_parallel.without_experts(self.tensor_plan, self.expert_plan) if experts_apart else self.tensor_plan
        )

    def why_no_tensors(self, whole: Any, sizes: ParallelSizes, kind: str) -> str:
        """Why the weights cannot be cut into slices; "": they can.

        Args:
            kind: what the model is called in the reason.
        """
        plan = self._tensor_plan(sizes.expert > 1)
        if reason := tensor_parallel.why_not(whole, self._names, plan, self._layer_configs, sizes.tensor):
            return reason
        if sizes.expert == 1 and not any(name.startswith(f"{self._names.decoder}.layers.") for name in plan):
            return f"tensor={sizes.tensor}: {kind} has a plan in transformers that cuts no layer: leave tensor out"
        return ""

    def why_no_experts(self, whole: Any, sizes: ParallelSizes) -> str:
        """Why the experts cannot be spread; "": they can."""
        return expert_parallel.why_not(whole, self.expert_plan, sizes.expert)

    def cut(self, whole: Any, inside: str, peers: StagePeers) -> None:
        """Leave this rank's slices of the weights of a module.

        Args:
            inside: the name of the module; "": the model.
        """
        if peers.tensor is not None:
            tensor_parallel.cut(whole, self._tensor_plan(peers.expert is not None), peers.tensor, inside)
        if peers.expert is not None:
            tensor_parallel.cut(whole, self.expert_plan, peers.expert, inside)

    def install(self, whole: Any, peers: StagePeers, vocabulary: int, attention: str) -> None:
        """Make modules whose weights are cut, and the attention to slices of rows, work together with the other ranks.

        Args:
            vocabulary: the number of logits of a position.
            attention: the implementation of attention.
        """
        if peers.expert is not None:
            expert_parallel.install(whole, self.expert_plan, peers.expert, peers.experts_see_same_tokens)
        if peers.tensor is not None:
            tensor_parallel.install(whole, self._tensor_plan(peers.expert is not None), peers.tensor)
            self.vocabulary = VocabularySlice(peers.tensor, vocabulary // peers.tensor.size())
        if peers.context is not None:
            self.exchange = Exchange(peers.context.get_local_rank(), peers.context.size(), peers.context.get_group())
            context_parallel.cut_attention(whole.get_submodule(self._names.decoder), self.exchange, attention)

    @property
    def tensor_ranks(self) -> int:
        """Number of ranks that have slices of this rank's weights, itself among them."""
        return 1 if self.vocabulary is None else self.vocabulary.mesh.size()

    def cuts_of(self, whole: Any, sizes: ParallelSizes) -> dict[nn.Parameter, tuple[int, int]]:
        """Of each parameter that lies in slices: the dimension that is cut, and into how many slices."""
        cuts: dict[nn.Parameter, tuple[int, int]] = {}
        if sizes.tensor > 1:
            cuts.update(tensor_parallel.cuts_of(whole, self._tensor_plan(sizes.expert > 1), sizes.tensor))
        if sizes.expert > 1:
            cuts.update(tensor_parallel.cuts_of(whole, self.expert_plan, sizes.expert))
        return cuts

    def heads(self, sizes: ParallelSizes) -> int:
        """Number of ranks that share the heads of a layer's attention."""
        return sizes.tensor if tensor_parallel.cuts_heads(self.tensor_plan) else 1
