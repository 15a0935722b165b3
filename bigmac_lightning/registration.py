"""Makes ``Trainer(strategy="bigmac")`` work without importing Lightning before somebody else does.

Lightning has no other way to find strategies of other packages than a call of its registry. If it is imported already,
that is done at once; else as soon as it has been imported.
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
    """Now, or when Lightning is imported."""
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
    """A `BigMacStrategy`; its module, which imports Lightning, is imported when a Trainer asks for one."""
    from bigmac_lightning.strategy import BigMacStrategy

    return BigMacStrategy(**arguments)


class _Finder(MetaPathFinder):
    """Finds Lightning where others find it, once."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != LIGHTNING:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """Loads a module as another loader does, and registers the strategies behind it."""

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
