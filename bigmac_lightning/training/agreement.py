"""Compares what all ranks must have alike, and names the rank and the key that differ.

It knows neither models nor batches: facts are texts by key, in sections. Ranks compare the digests of sections first,
and exchange the facts themselves only where digests differ.
"""

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence

from bigmac_lightning.ranks import Ranks

Facts = Mapping[str, str]
"""What a rank has, as texts by key."""

SHOWN = 8
"""How many keys an error names."""


def digest(texts: Iterable[str | bytes]) -> int:
    """A number of 62 bits that depends on these texts and their order."""
    found = hashlib.blake2b(digest_size=8)
    for text in texts:
        found.update(text.encode() if isinstance(text, str) else text)
        found.update(b"\0")
    return int.from_bytes(found.digest()) >> 2


def digest_of(facts: Facts) -> int:
    """A number of 62 bits that depends on these facts."""
    return digest(text for pair in sorted(facts.items()) for text in pair)


def check_same(ranks: Ranks, sections: Mapping[str, Facts], what: str) -> None:
    """Check that the facts of each section are the same on all ranks that have the section. Collective over the world.

    Args:
        ranks: exchanges objects between all ranks.
        sections: this rank's facts by section.
        what: what is compared, for the error: "settings".

    Raises:
        ValueError: some facts differ; raised on all ranks, with the keys, the values and the ranks that have them.
    """
    digests = {name: digest_of(facts) for name, facts in sections.items()}
    everyone = ranks.exchange(digests)()[0]
    found: dict[str, set[int]] = {}
    for row in everyone:
        for name, value in row.items():
            found.setdefault(name, set()).add(value)
    differing = [name for name, values in found.items() if len(values) > 1]
    if differing:
        details = ranks.gather({name: dict(sections[name]) for name in differing if name in sections})
        raise ValueError(message(details, what))


def message(everyone: Sequence[Mapping[str, Facts]], what: str) -> str:
    """The error about facts that differ.

    Args:
        everyone: by rank, its facts by section.
    """
    lines: list[str] = []
    for section in dict.fromkeys(name for row in everyone for name in row):
        having = {rank: row[section] for rank, row in enumerate(everyone) if section in row}
        for key in dict.fromkeys(key for facts in having.values() for key in facts):
            values: dict[str, list[int]] = {}
            for rank, facts in having.items():
                values.setdefault(facts.get(key, "missing"), []).append(rank)
            if len(values) > 1:
                lines.append(f"{section}: {key} is " + _by_ranks(values))
    more = f"\n  and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
    return f"{what} must be the same on all ranks, but differ:\n  " + "\n  ".join(lines[:SHOWN]) + more


def _by_ranks(values: Mapping[str, Collection[int]]) -> str:
    """The values, the rarest first, with the ranks that have them."""
    rarest = sorted(values.items(), key=lambda pair: len(pair[1]))
    return ", ".join(f"{value} on {ranks_text(ranks)}" for value, ranks in rarest)


def ranks_text(ranks: Collection[int]) -> str:
    """ "rank 3", or "ranks 0, 1, 2 and 5 more" """
    listed = sorted(ranks)
    more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return ("rank " if len(listed) == 1 else "ranks ") + ", ".join(map(str, listed[:SHOWN])) + more
