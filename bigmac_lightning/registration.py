"""Makes ``Trainer(strategy="bigmac")`` work without importing Lightning.

A strategy of another package has to be registered in Lightning's registry. If Lightning has been imported already, this
is done at once; otherwise as soon as Lightning has been imported.
"""

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

LIGHTNING = "lightning.pytorch.strategies"
START_METHODS = {"bigmac": "popen", "bigmac_spawn": "spawn", "bigmac_fork": "fork", "bigmac_notebook": "fork"}


def register() -> None:
    """Register the strategies now, or when Lightning is imported."""
    if LIGHTNING in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    from lightning.pytorch.strategies import StrategyRegistry

    for name, start_method in START_METHODS.items():
        text = f"encoder and generator nested into the LLM's pipeline, processes started by {start_method}"
        StrategyRegistry.register(name, _strategy, description=text, override=True, start_method=start_method)


def _strategy(**arguments: Any) -> Any:
    """A `BigMacStrategy`, whose module is imported only when a Trainer asks for it."""
    from bigmac_lightning.training.strategy import BigMacStrategy

    return BigMacStrategy(**arguments)


class _Finder(MetaPathFinder):
    """Finds Lightning's strategies as the other finders do, once, and lets `_Loader` load them."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != LIGHTNING:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """Loads a module by another loader, and then registers the strategies."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self._loader
        _register()
