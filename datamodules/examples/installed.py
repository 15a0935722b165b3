"""Data that come with installed packages. The packages are not imported, since they may need others."""

import importlib.util
from pathlib import Path


def installed_folder(package: str, requirement: str) -> Path:
    """The folder of an installed package.

    Args:
        requirement: the name by which pip installs it.

    Raises:
        ValueError: it is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"these data come with a package: pip install {requirement}")
    return Path(spec.submodule_search_locations[0])
