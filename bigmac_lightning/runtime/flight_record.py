"""Keeps what torch's flight recorder knows when a process ends because the run hangs: its last collectives, with NCCL
also messages, whether each was begun and done, and where it was called. `torchfrtrace` compares the files of all ranks.

The recorder is on if TORCH_FR_BUFFER_SIZE is set to how many entries it keeps.
"""

import os
import pickle
import tempfile
from pathlib import Path

import torch.distributed as dist
from torch._C import _distributed_c10d as c10d

PREFIXES = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
"""Variables by which torch is told how the names of such files begin."""


def keep_flight_record(rank: int) -> Path | None:
    """Write a file; ``None`` if the recorder is off or has seen nothing.

    Args:
        rank: global rank of this process, with which the name of the file ends.

    Raises:
        OSError: it cannot be written.
    """
    nccl = dist.is_initialized() and "nccl" in dist.get_backend()
    record: bytes = (c10d._dump_nccl_trace if nccl else c10d._dump_fr_trace)()  # pyright: ignore
    if not pickle.loads(record)["entries"]:
        return None
    default = str(Path(tempfile.gettempdir()) / "bigmac_flight_record_rank_")
    path = Path(next((os.environ[name] for name in PREFIXES if os.environ.get(name)), default) + str(rank))
    path.write_bytes(record)
    return path
