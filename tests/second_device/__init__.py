"""A second device of torch for tests on machines without a GPU, called "second".

It is a device as a GPU is one: its tensors are others than those of the CPU, operations refuse tensors of both, and
process groups refuse tensors of the CPU. A copy into pinned memory that need not block has other numbers until somebody
waits for an event. Nothing else runs in the background, so streams do nothing, and there is no autocast. device.cpp
takes a C++ compiler half a minute, once.

Its process groups are "relay", which has tensors of the device, as NCCL has, or "staged", as on a GPU by gloo, with a
gloo that refuses tensors of the device.
"""

import types
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.fsdp._fully_shard._fsdp_init as fsdp
from lightning.pytorch.accelerators import Accelerator
from torch import Tensor, nn
from torch.utils.cpp_extension import load

from bigmac_lightning.runtime import staging
from tests.ranks import free_port, run_ranks

NAME, BACKEND = "second", "second:relay"


def ranks(world_size: int, function: Any, *args: Any, backend: str = BACKEND, timeout: float = 300) -> list[Any]:
    """`run_ranks` with a process group of the second device. This process must have run no backward before, as autograd
    makes its threads once, for the devices that there are then."""
    build()
    return run_ranks(world_size, _on_second, world_size, free_port(), backend, function, args, timeout=timeout)


def _on_second(rank: int, world_size: int, port: int, backend: str, function: Any, args: tuple[Any, ...]) -> Any:
    dist.barrier()
    dist.destroy_process_group()
    register()
    if backend == staging.NAME:
        staging.staged_backend(torch.device(NAME))
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    return function(rank, *args)


def build() -> Any:
    return load("second_device", [str(Path(__file__).parent / "device.cpp")], extra_cflags=["-O1"])


def register() -> None:
    """Let this process have the device."""
    device = build()
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _module())
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)

    gloo: Any = dist.ProcessGroupGloo

    def relay(store: Any, rank: int, size: int, timeout: Any) -> Any:
        return device.Relay(gloo(store, rank, size, timeout), True)

    def careful(store: Any, rank: int, size: int, timeout: Any) -> Any:
        return device.Relay(gloo(store, rank, size, timeout), False)

    dist.Backend.register_backend("relay", relay, devices=[NAME])
    staging.dist.ProcessGroupGloo = careful  # pyright: ignore[reportAttributeAccessIssue]
    _Event.synchronize = lambda *_: device.finish()
    torch.accelerator.current_stream = lambda *_: _Stream()
    # torch gives a parameter data of another device for CPUs and GPUs only. Here, parameters are swapped, so that tied
    # ones stay one parameter.
    torch.__future__.set_swap_module_params_on_conversion(True)
    fsdp._move_states_to_device = _move


def _move(parameters: Iterable[nn.Parameter], buffers: Iterable[Tensor], device: torch.device) -> None:
    for tensor in [*parameters, *buffers]:
        if tensor.device != device and not tensor.is_meta:
            moved: Any = tensor.detach().to(device)
            is_parameter = isinstance(tensor, nn.Parameter)
            torch.utils.swap_tensors(tensor, nn.Parameter(moved, tensor.requires_grad) if is_parameter else moved)


class _Event:
    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, *_: Any) -> "_Event":
        return self

    def synchronize(self) -> None: ...


class _Stream(_Event):
    def __enter__(self) -> None: ...

    def __exit__(self, *_: Any) -> None: ...

    def wait_stream(self, *_: Any) -> None: ...

    def wait_event(self, *_: Any) -> None: ...

    def record_event(self) -> _Event:
        return _Event()


def _module() -> types.ModuleType:
    """What torch asks a module such as torch.cuda for."""
    module: Any = types.ModuleType(f"torch.{NAME}")
    module.Stream, module.Event = _Stream, _Event
    module.current_stream = lambda *_: _Stream()
    module.stream = module.device = lambda *_: nullcontext()
    module.is_available = module.is_initialized = lambda: True
    module._is_in_bad_fork = module.is_autocast_enabled = lambda: False
    module.device_count, module.current_device = lambda: 1, lambda: 0
    module.synchronize = lambda *_: _Event().synchronize()
    module.set_device = module.manual_seed = module.manual_seed_all = lambda *_: None
    module.get_rng_state, module.set_rng_state = lambda *_: torch.zeros(1, dtype=torch.uint8), lambda *_: None
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    return module


class SecondAccelerator(Accelerator):
    """The device for a Trainer."""

    def setup_device(self, device: torch.device) -> None: ...

    def teardown(self) -> None: ...

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}

    @staticmethod
    def parse_devices(devices: Any) -> int:
        return int(devices)

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [torch.device(NAME, 0)] * devices

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return NAME
