"""How much memory a process takes while a component gets its weights, which lie in shards on two processes."""

import ctypes
import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import DeviceMesh

from bigmac_lightning.checkpoints.safe import without_group
from bigmac_lightning.checkpoints.weights import CheckpointWeights
from bigmac_lightning.contracts.components import LanguageModel
from bigmac_lightning.models import FlowGenerator, HFDecoder, VisionEncoder
from bigmac_lightning.runtime.sharding import ShardedModule
from tests.models.parts import WIDTH, decoder_config
from tests.ranks import run_ranks

RANKS = 2
BLOCKS = 16


def return_memory() -> None:
    """Let memory of freed tensors go back to the system at once, as it does for tensors above 32 MiB in any case."""
    mmap_threshold, libc = -3, ctypes.CDLL(None)
    libc.mallopt(mmap_threshold, 64 * 1024)
    libc.malloc_trim(0)  # what was freed before would serve again, and not be seen


def memory() -> int:
    """Bytes of this process's own memory. Pages of mapped files are not counted, as the system can drop them."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) * 1024


class Peak:
    """The largest growth of memory within a context, looked at a thousand times a second."""

    def __enter__(self) -> "Peak":
        gc.collect()
        self.growth, self._before, self._done = 0, memory(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.001):
            self.growth = max(self.growth, memory() - self._before)


def tower(weights: str | None) -> VisionEncoder:
    config = {
        "model_type": "siglip_vision_model",
        "image_size": 16,
        "patch_size": 4,
        "hidden_size": 384,
        "intermediate_size": 768,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 4,
    }
    return VisionEncoder(config, WIDTH, weights=weights)


def flow(weights: str | None) -> FlowGenerator:
    config = {"num_layers": BLOCKS, "num_attention_heads": 4, "attention_head_dim": 64, "axes_dims_rope": [16, 24, 24]}
    return FlowGenerator(WIDTH, **({"config": config} if weights is None else {"weights": weights}))


def decoder(weights: str | None) -> HFDecoder:
    sizes = {"hidden_size": 384, "intermediate_size": 768, "num_hidden_layers": BLOCKS, "head_dim": 64}
    return HFDecoder(decoder_config(**sizes, num_attention_heads=8, tie_word_embeddings=True), weights=weights)


def experts(weights: str | None) -> HFDecoder:
    sizes = {"hidden_size": 256, "moe_intermediate_size": 256, "num_hidden_layers": BLOCKS, "head_dim": 32}
    return HFDecoder(decoder_config("qwen3_moe", **sizes, num_experts=8, num_experts_per_tok=2), weights=weights)


COMPONENTS: dict[str, Callable[[str | None], Any]] = {
    "tower": tower,
    "flow": flow,
    "decoder": decoder,
    "experts": experts,
}
WIDE = pytest.mark.wide


def materialize(component: Any) -> None:
    if isinstance(component, LanguageModel):
        component.materialize(range(component.num_layers), True, True)
    else:
        component.materialize()


def _save(rank: int, name: str, how: str, folder: Path) -> None:
    component = COMPONENTS[name](None)
    materialize(component)
    if how == "folder":  # in another type, as the library would map the file into memory otherwise
        model = getattr(component, {"tower": "tower", "flow": "transformer"}.get(name, "_whole"))
        model.bfloat16().save_pretrained(folder)
    else:
        with without_group():
            dcp.save({"model": component.state_dict()}, checkpoint_id=folder, no_dist=True)


def _growth(rank: int, name: str, how: str, folder: Path) -> float:
    """In fractions of the component's size."""
    return_memory()
    world: Any = dist.group.WORLD
    component, ranks = COMPONENTS[name](str(folder) if how == "folder" else None), DeviceMesh.from_group(world, "cpu")
    size = sum(parameter.nbytes for parameter in component.parameters())
    with Peak() as peak:
        component.shard_mesh = ranks
        materialize(component)
        if how == "checkpoint":
            CheckpointWeights(folder).read_into(component.state_dict())
        ShardedModule(component, ranks, by_block=True)
    return peak.growth / size


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("tower", "drawn"),
        ("experts", "folder"),
        *(
            pytest.param(name, how, marks=WIDE)
            for name in COMPONENTS
            for how in ("drawn", "folder", "checkpoint")
            if (name, how) not in (("tower", "drawn"), ("experts", "folder"), ("flow", "checkpoint"))
        ),
    ],
)
def test_a_shard_and_a_block(name: str, how: str, tmp_path: Path) -> None:
    """Half of the weights, and what is needed for a block or a tensor; whole weights were once."""
    if how != "drawn":
        run_ranks(1, _save, name, how, tmp_path)
    # Fresh processes: in copies of this one, what earlier tests left in its heap was counted now and then.
    for growth in run_ranks(RANKS, _growth, name, how, tmp_path, start_method="spawn"):
        assert 0.5 < growth < 0.9, f"{growth:.2f} of the weights; it was 1.04 and more before"
