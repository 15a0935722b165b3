"""A checkpoint's contents as the ranks of a pipeline hold them: each a part, all together the whole.

What is kept by the names of the model's tensors (weights, moments, a callback's moving average, the names in an
optimizer's group) differs from rank to rank, as they hold different layers. The whole has the names of all ranks; a
rank gets those that it holds, and whatever has another name. Knows nested dicts and names; knows no files, no ranks.
"""

import copy
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Tree = dict[str, Any]
"""A checkpoint, or a dict in it."""

MODEL, OTHERS = "model", "others"
"""Under what a directory keeps the `state_dict`, and tensors that are neither of it nor of optimizers."""


@dataclass(frozen=True)
class Names:
    """The names of the whole model's tensors, as one rank sees them.

    Attributes:
        own: of tensors that this rank holds.
        elsewhere: of those that only other ranks hold.
        copies: for each tied weight, the name of the weight that it is a copy of.
    """

    own: frozenset[str]
    elsewhere: frozenset[str]
    copies: Mapping[str, str]

    @classmethod
    def of(cls, own: Collection[str], everyone: Sequence[Collection[str]], copies: Mapping[str, str]) -> "Names":
        """
        Args:
            everyone: the names of each rank.
        """
        mine = frozenset(own)
        return cls(mine, frozenset().union(*everyone) - mine, copies)

    def of_model(self, key: object) -> str | None:
        """The name of the model's tensor that a key is, or ends with ("module.", "ema." may stand before it)."""
        while isinstance(key, str) and key:
            if key in self.own or key in self.elsewhere:
                return key
            key = key.partition(".")[2]
        return None

    def kept(self, tree: Any) -> Any:
        """What this rank gets of something in a checkpoint of the whole model."""
        if isinstance(tree, dict):
            return _like(tree, {k: self.kept(v) for k, v in tree.items() if self.keeps(k, tree.__contains__)})
        if isinstance(tree, list):
            return self._kept_names(tree) if self.are_names(tree) else [self.kept(item) for item in tree]
        return tree

    def keeps(self, key: object, beside: Callable[[str], bool]) -> bool:
        """Whether this rank gets an entry of a dict; a tied weight's original stands in for it where it is not stored.

        Args:
            beside: whether a key is in the same dict.
        """
        name = self.of_model(key)
        if name is None or name in self.own:
            return True
        before = str(key)[: -len(name)]
        copies = [copy for copy, original in self.copies.items() if original == name and copy in self.own]
        return any(not beside(before + copy) for copy in copies)

    def are_names(self, items: Sequence[Any]) -> bool:
        """Whether a list consists of names of the model's tensors."""
        return bool(items) and all(isinstance(item, str) and self.of_model(item) == item for item in items)

    def _kept_names(self, items: Sequence[str]) -> list[str]:
        """A tied weight that lies here with its original is one parameter, by the original's name."""
        copies = {copy: original for copy, original in self.copies.items() if copy in self.own and original in items}
        apart = [copy for copy, original in copies.items() if original not in self.own and copy not in items]
        return [name for name in items if name in self.own and copies.get(name) not in self.own] + apart


def split(tree: Tree, names: Names, inside: bool = False) -> tuple[Tree, Tree]:
    """The tensors that are kept by names of the model, and all the rest, both nested as before.

    Args:
        inside: whether all of its tensors are.
    """
    tensors: Tree = {}
    rest: Tree = {}
    for key, value in tree.items():
        here = inside or names.of_model(key) is not None
        if here and isinstance(value, Tensor):
            tensors[key] = value
        elif isinstance(value, dict):
            some, others = split(value, names, here)
            if some:
                tensors[key] = some
            if others or not some:
                rest[key] = _like(value, others)
        else:
            rest[key] = value
    return tensors, rest


def joined(trees: Sequence[Any], names: Names, where: str = "") -> Any:
    """The whole of what several ranks have: the entries of all their dicts, and all names in lists of names. Of
    anything else the first rank's counts.

    Raises:
        ValueError: tensors without a name of the model's have another shape on another rank.
    """
    first = trees[0]
    if all(isinstance(tree, dict) for tree in trees):
        return _like(
            first,
            {k: joined([t[k] for t in trees if k in t], names, f"{where}[{k!r}]") for k in _in_order(trees)},
        )
    if all(isinstance(tree, list) for tree in trees):
        if names.are_names([item for tree in trees for item in tree]):
            return _in_order(trees)
        if len({len(tree) for tree in trees}) == 1:
            return [joined(items, names, f"{where}[{i}]") for i, items in enumerate(zip(*trees, strict=True))]
        if not any(isinstance(item, Tensor) for tree in trees for item in tree):
            return first
    elif len({tree.shape if isinstance(tree, Tensor) else None for tree in trees}) == 1:
        return first
    raise ValueError(
        f"checkpoint{where} has other tensors on each rank, which cannot be joined: a callback or hook that keeps "
        "something of each parameter must keep it in a dict, by the parameter's name"
    )


def complete(rest: Tree, tensors: Tree) -> Tree:
    """A checkpoint, as Lightning knows it, of the two parts of a directory.

    Args:
        rest: what lies in the metadata file.
        tensors: what lies in DCP: under `MODEL`, "optimizer_0", ..., and `OTHERS`.
    """
    states = rest.get("optimizer_states")
    whole = overlaid({**rest, "state_dict": tensors.get(MODEL, {})}, tensors.get(OTHERS, {}))
    if states is not None:
        whole["optimizer_states"] = [overlaid(s, tensors.get(f"optimizer_{i}", {})) for i, s in enumerate(states)]
    return whole


def nested(entries: Mapping[tuple[Any, ...], Any]) -> Tree:
    """A nested dict of what lies at these paths."""
    tree: Tree = {}
    for path, value in entries.items():
        inner = tree
        for key in path[:-1]:
            inner = inner.setdefault(key, {})
        inner[path[-1]] = value
    return tree


def overlaid(tree: Tree, other: Tree) -> Tree:
    """A nested dict with the entries of another."""
    both = {k: overlaid(tree[k], v) for k, v in other.items() if isinstance(v, dict) and isinstance(tree.get(k), dict)}
    return _like(tree, {**tree, **other, **both})


def _in_order(parts: Sequence[Iterable[Any]]) -> list[Any]:
    """All items, each once, in an order that each part has them in: what is new stands before what it stood before."""
    order: list[Any] = []
    for items in parts:
        known, before, new = set(order), dict[Any, list[Any]](), list[Any]()
        for item in dict.fromkeys(items):
            if item in known:
                before[item], new = new, []
            else:
                new.append(item)
        order = [item for old in order for item in (*before.get(old, ()), old)] + new
    return order


def _like(tree: Tree, entries: Mapping[Any, Any]) -> Tree:
    """A dict of the same kind (a Counter, a defaultdict, ...) with other entries."""
    new = copy.copy(tree)
    new.clear()
    new.update(entries)
    return new
