"""A checkpoint's contents, as nested dicts, taken apart for the ranks of a pipeline and put together again.

Ranks hold different layers, so entries that go by the names of the model's tensors (weights, moments, a callback's
moving average, the names in an optimizer's group) differ from rank to rank. The whole checkpoint has the names of all
ranks. A rank's part has those that it holds, and every entry that does not go by the name of a tensor.
"""

import copy
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Tree = dict[str, Any]
"""A checkpoint, or a dict in it."""

MODEL, OTHERS = "model", "others"
"""The keys of a checkpoint directory for the `state_dict`, and for tensors of neither the model nor an optimizer."""


@dataclass(frozen=True)
class Names:
    """The names of the whole model's tensors, as one rank sees them.

    Attributes:
        own: the names of tensors that this rank holds.
        elsewhere: the names of those that only other ranks hold.
        copies: for each tied weight, the name of the weight that it is a copy of.
    """

    own: frozenset[str]
    elsewhere: frozenset[str]
    copies: Mapping[str, str]

    @classmethod
    def of(cls, own: Collection[str], everyone: Sequence[Collection[str]], copies: Mapping[str, str]) -> "Names":
        """
        Args:
            own: the names of this rank.
            everyone: the names of each rank.
            copies: see above.
        """
        mine = frozenset(own)
        return cls(mine, frozenset().union(*everyone) - mine, copies)

    def of_model(self, key: object) -> str | None:
        """The name of a tensor of the model with which a key ends: before it there may be "module." or "ema."."""
        while isinstance(key, str) and key:
            if key in self.own or key in self.elsewhere:
                return key
            key = key.partition(".")[2]
        return None

    def select(self, tree: Any) -> Any:
        """This rank's part of something in a checkpoint of the whole model."""
        if isinstance(tree, dict):
            return _like(tree, {k: self.select(v) for k, v in tree.items() if self.selects(k, tree.__contains__)})
        if isinstance(tree, list):
            return self._select_names(tree) if self.are_names(tree) else [self.select(item) for item in tree]
        return tree

    def selects(self, key: object, beside: Callable[[str], bool]) -> bool:
        """Whether an entry of a dict is in this rank's part. The entry of a tied weight's original is, too, if the dict
        has no entry for the tied weight itself.

        Args:
            key: the key of the entry.
            beside: tells whether a key is in the same dict.
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

    def _select_names(self, items: Sequence[str]) -> list[str]:
        """Those names in a list that this rank holds. A tied weight and its original, if both are here, are one
        parameter, which goes by the original's name."""
        copies = {copy: original for copy, original in self.copies.items() if copy in self.own and original in items}
        apart = [copy for copy, original in copies.items() if original not in self.own and copy not in items]
        return [name for name in items if name in self.own and copies.get(name) not in self.own] + apart


def split(tree: Tree, names: Names, inside: bool = False) -> tuple[Tree, Tree]:
    """The tensors that go by names of the model, and all the rest, both nested as before.

    Args:
        inside: whether an entry around `tree` goes by a name of the model, so that all of its tensors do.
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
                rest[key] = _like(value, others) if some else value
        else:
            rest[key] = value
    return tensors, rest


def joined(trees: Sequence[Any], names: Names, where: str = "", known: dict[Any, Any] | None = None) -> Any:
    """The whole of which several ranks have parts: the entries of all dicts, and all names in lists of names. Of
    anything else the whole has what the first rank has.

    Args:
        where: the path to `trees` in the checkpoint, for errors.
        known: what has been joined so far, by the identities of its parts: all parameters of a group share a dict.

    Raises:
        ValueError: a tensor that does not go by a name of the model has another shape on another rank.
    """
    first = trees[0]
    if len(trees) == 1 or not any(isinstance(tree, (dict, list, Tensor)) for tree in trees):
        return first
    if all(isinstance(tree, dict) for tree in trees):
        known, parts = {} if known is None else known, tuple(map(id, trees))
        if parts not in known:
            entries = {k: ([t[k] for t in trees if k in t], f"{where}[{k!r}]") for k in _in_order(trees)}
            known[parts] = _like(first, {k: joined(found, names, at, known) for k, (found, at) in entries.items()})
        return known[parts]
    if all(isinstance(tree, list) for tree in trees):
        if names.are_names([item for tree in trees for item in tree]):
            return _in_order(trees)
        if len({len(tree) for tree in trees}) == 1:
            return [joined(items, names, f"{where}[{i}]", known) for i, items in enumerate(zip(*trees, strict=True))]
        if not any(isinstance(item, Tensor) for tree in trees for item in tree):
            return first
    elif len({tree.shape if isinstance(tree, Tensor) else None for tree in trees}) == 1:
        return first
    raise ValueError(
        f"checkpoint{where} has other tensors on each rank, which cannot be joined: a callback or hook that keeps "
        "something of each parameter must keep it in a dict, by the parameter's name"
    )


def complete(rest: Tree, tensors: Tree) -> Tree:
    """A checkpoint in Lightning's form, from the two parts of a directory.

    Args:
        rest: the contents of the metadata file.
        tensors: the contents in the DCP format, with the keys `MODEL`, "optimizer_0", ..., and `OTHERS`.
    """
    states = rest.get("optimizer_states")
    whole = overlaid({**rest, "state_dict": tensors.get(MODEL, {})}, tensors.get(OTHERS, {}))
    if states is not None:
        whole["optimizer_states"] = [overlaid(s, tensors.get(f"optimizer_{i}", {})) for i, s in enumerate(states)]
    return whole


def nested(entries: Mapping[tuple[Any, ...], Any]) -> Tree:
    """A nested dict that has these values at these paths."""
    tree: Tree = {}
    for path, value in entries.items():
        inner = tree
        for key in path[:-1]:
            inner = inner.setdefault(key, {})
        inner[path[-1]] = value
    return tree


def overlaid(tree: Tree, other: Tree) -> Tree:
    """A nested dict with the entries of another added, which replace its own at the same path."""
    both = {k: overlaid(tree[k], v) for k, v in other.items() if isinstance(v, dict) and isinstance(tree.get(k), dict)}
    return _like(tree, {**tree, **other, **both})


def _in_order(parts: Sequence[Iterable[Any]]) -> list[Any]:
    """All items, each once, in an order that agrees with the order of each part.

    An item that the parts so far do not have comes right before the item that follows it in its own part.
    """
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
    """A dict of the same class and state as `tree` (a Counter, a defaultdict, ...) with other entries."""
    new = copy.copy(tree)
    new.clear()
    new.update(entries)
    return new
