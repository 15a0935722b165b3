"""Refuses what cannot work with the GPUs that the ranks have."""

import torch

from bigmac_lightning.ranks import Ranks


def check_cards(ranks: Ranks, device: torch.device, backend: str) -> None:
    """Check that NCCL finds a card for each rank, as it fails in the first collective otherwise. Collective over the
    world.

    Args:
        ranks: exchanges objects between all ranks.
        device: this rank's device.
        backend: of the process groups, as ``dist.get_backend()`` says it.

    Raises:
        ValueError: two ranks have the same card; raised on all ranks.
    """
    if device.type == "cuda" and "nccl" in backend:
        refuse_shared(ranks.exchange(str(torch.cuda.get_device_properties(device).uuid))()[0])


def refuse_shared(cards: list[str]) -> None:
    """Raise an error if two ranks have the same card.

    Args:
        cards: by rank, what tells its card from all others.

    Raises:
        ValueError: with the ranks.
    """
    for card in dict.fromkeys(cards):
        found = [rank for rank, own in enumerate(cards) if own == card]
        if len(found) > 1:
            raise ValueError(
                f"ranks {', '.join(map(str, found))} have the same card, which NCCL does not allow: give each rank a "
                "card of its own (Trainer(devices=...)), or set the strategy's process_group_backend to gloo"
            )
