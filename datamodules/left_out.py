"""Numbers that remain when some are left out, without a list of those that remain."""

import numpy as np


def remaining(places: np.ndarray, left_out: np.ndarray) -> np.ndarray:
    """What is at places (n,) of the row 0, 1, 2, ... without some numbers.

    Args:
        left_out: (m,) the numbers, sorted, each once.
    """
    return places + np.searchsorted(left_out - np.arange(len(left_out)), places, side="right")
