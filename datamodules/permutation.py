"""Random orders of any length of which each place is found alone: nothing as long as the order is made or kept.

The numbers below `size` are the cells of a table of nearly as many rows as columns. Rounds shift the row of a cell by a
hash of its column, and its column by a hash of its row, each of which can be undone: so the cells change places. (It is
a Feistel network over whole numbers.) A number that lands outside of `size` goes through the rounds again until it does
not; the table has few such cells.

No version of numpy changes these numbers, as they need nothing but the arithmetic of 64-bit integers.
"""

import hashlib

import numpy as np

ROUNDS = 12
STEP, FIRST, SECOND = (np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def key_of(text: str) -> np.uint64:
    """A key that depends on a text."""
    return np.uint64(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little"))


def keys_of(key: np.uint64, *numbers: np.ndarray) -> np.ndarray:
    """Keys (n,) that depend on a key and on numbers (n,)."""
    keys = np.full(len(numbers[0]), key, np.uint64)
    for column in numbers:
        keys = _hashed(keys + column.astype(np.uint64) * STEP)
    return keys


def permuted(places: np.ndarray, sizes: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """What is at places (n,) of random orders.

    Args:
        sizes: (n,) of the order that each place is one of; above the place.
        keys: (n,) of the order; orders of other keys are others.

    Returns: (n,) whole numbers below the sizes. Over all places of an order, each comes once.
    """
    found, left = places.astype(np.uint64), np.arange(len(places))
    sizes = sizes.astype(np.uint64)
    while len(left):
        found[left] = _moved(found[left], sizes[left], keys[left])
        left = left[found[left] >= sizes[left]]
    # shifts of an odd number of rows are even permutations: this makes half of all orders odd ones
    swapped = (found < np.uint64(2)) & (sizes > np.uint64(1))
    found[swapped] ^= _hashed(keys[swapped]) & np.uint64(1)
    return found.astype(np.int64)


def _moved(cells: np.ndarray, sizes: np.ndarray, keys: np.ndarray) -> np.ndarray:
    columns = np.ceil(np.sqrt(sizes.astype(np.float64))).astype(np.uint64)
    rows = (sizes + columns - np.uint64(1)) // columns
    row, column = cells // columns, cells % columns
    for number in range(ROUNDS):
        keys = keys + STEP
        if number % 2:
            column = (column + _hashed(row ^ keys) % columns) % columns
        else:
            row = (row + _hashed(column ^ keys) % rows) % rows
    return row * columns + column


def _hashed(values: np.ndarray) -> np.ndarray:
    """The last steps of the generator splitmix64, which spread every bit over all others."""
    values = (values ^ (values >> np.uint64(30))) * FIRST
    values = (values ^ (values >> np.uint64(27))) * SECOND
    return values ^ (values >> np.uint64(31))
