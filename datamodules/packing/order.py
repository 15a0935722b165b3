"""The order of the samples of several sources in an epoch, of which any part is found without the rest."""

from collections.abc import Sequence

import numpy as np

from ..permutation import key_of, keys_of, permuted


class Order:
    """The order of the samples of several sources in an epoch.

    Each source is read in passes, each of which has a new order. An epoch continues the pass in which the last one
    stopped, so that no sample is drawn twice before all samples of its source have been drawn.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float] | None,
        samples: int | None,
        seed: int,
        epoch: int,
        shuffle: bool,
    ) -> None:
        """
        Args:
            sizes: number of samples of each source.
            weights: relative frequency of each source; ``None``: the sizes.
            samples: length of the epoch; ``None``: the sum of the sizes.
            shuffle: whether the order is random. Otherwise sources keep their order, and are interleaved evenly.
        """
        samples = sum(sizes) if samples is None else samples
        counts = apportion(samples, sizes if weights is None else weights)
        self._sizes, self._counts = np.array(sizes, np.int64), np.array(counts, np.int64)
        self._ends = np.cumsum(self._counts)
        self._drawn_before = self._counts * (epoch if shuffle else 0)
        self._shuffle = shuffle
        self._order, self._passes = key_of(f"{seed}/order/{epoch}"), key_of(f"{seed}/passes")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def part(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """The source (n,) of each of the samples from `start` up to `stop`, and the index (n,) in it."""
        if not self._shuffle:
            sources, numbers = self._interleaved(start, stop)
            return sources, numbers % self._sizes[sources]
        places = np.arange(start, stop)
        places = permuted(places, np.full(len(places), len(self)), np.full(len(places), self._order))
        sources = np.searchsorted(self._ends, places, side="right")
        numbers = places - (self._ends - self._counts)[sources] + self._drawn_before[sources]
        sizes = self._sizes[sources]
        passes, indices = np.divmod(numbers, sizes)
        return sources, permuted(indices, sizes, keys_of(self._passes, sources, passes))

    def _interleaved(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Sources, and numbers of their samples. Sample j of a source with c samples comes at (2 j + 1) / 2 c of the
        epoch, and before those of later sources at the same time."""
        total, sources = len(self), len(self._counts)
        found_sources, found_numbers, found_ranks = [], [], []
        for source, count in enumerate(self._counts.tolist()):
            # those before it are as many as its time says, except for one of each source
            first, last = count * start // total - sources, count * stop // total + sources + 1
            numbers = np.arange(max(0, first), min(count, last))
            ranks = numbers.copy()
            for other, others in enumerate(self._counts.tolist()):
                if other != source and count and others:
                    # sample i of the other comes before if (2 i + 1) count < (2 j + 1) others; or if both are equal
                    ahead = (2 * numbers + 1) * others - count
                    before = ahead // (2 * count) + 1 if other < source else -(-ahead // (2 * count))
                    ranks += before.clip(0, others)
            own = (start <= ranks) & (ranks < stop)
            found_sources.append(np.full(own.sum(), source))
            found_numbers.append(numbers[own])
            found_ranks.append(ranks[own])
        order = np.argsort(np.concatenate(found_ranks))
        return np.concatenate(found_sources)[order], np.concatenate(found_numbers)[order]


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers in proportion to the weights whose sum is the total, by the largest-remainder method."""
    whole = sum(weights)
    exact = [total * weight / whole for weight in weights]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (shares[i] - exact[i], i))
    for i in by_remainder[: total - sum(shares)]:
        shares[i] += 1
    return shares
