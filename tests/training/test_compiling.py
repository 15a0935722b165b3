"""`BigMacStrategy(compile=...)`: the weights of a run without it, and few compilations.

The layers are traced and differentiated as always, but run by PyTorch: Inductor's code, which takes minutes to make for
real layers, is tried by tests/runtime/test_compiled.py and by the wide test here."""

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from bigmac_lightning import BigMacStrategy, ShardingOptions
from bigmac_lightning.training.compiling import compile_layers
from tests.toy import ToyData, ToyModule
from tests.training.trainers import assert_close, on_ranks, pipeline_trainer, plain_trainer, weights

pytestmark = pytest.mark.filterwarnings("ignore")  # of Dynamo, which looks at tensors

TRACED = {"backend": "aot_eager"}
MODEL: dict[str, Any] = {"tied": True, "checkpointed": (1, 2), "freeze": ["encoders.audio", "llm.layers.0.mix"]}
BLOCKS = ShardingOptions("fsdp", "fsdp", "zero1")


def _fit(rank: int, layers: int, steps: int, strategy: dict[str, Any]) -> tuple[dict[str, torch.Tensor], int]:
    module = ToyModule(layers, optimizer="sgd", **MODEL)
    torch._dynamo.reset()
    counters.clear()
    trainer = pipeline_trainer(2, {"compile": TRACED, **strategy}, max_steps=steps)
    trainer.fit(module, ToyData(steps=steps, text_only=(1,)))
    trainer.strategy.open_module()  # pyright: ignore[reportAttributeAccessIssue]
    return weights(module), counters["stats"]["unique_graphs"]


def _compare(layers: int, steps: int, strategy: dict[str, Any]) -> list[int]:
    """Returns: how many graphs each rank has compiled."""
    expected = ToyModule(layers, optimizer="sgd", **MODEL)
    plain_trainer(max_steps=steps).fit(expected, ToyData(steps=steps, text_only=(1,)))
    graphs = []
    for found, number in on_ranks(2, _fit, layers, steps, strategy):
        assert_close(found, weights(expected), 2e-6)
        graphs.append(number)
    return graphs


def test_against_one_process() -> None:
    graphs = _compare(4, 2, {"sharding": BLOCKS, "backbone": "zb1p"})
    assert min(graphs) > 3
    assert max(graphs) <= 24


def test_a_checkpointed_layer_runs_the_same_code_again() -> None:
    """Its first code is for equal sizes alone; when it runs again, there is one for any sizes, too."""
    torch._dynamo.reset()
    module = ToyModule()
    module.configure_model()
    compile_layers(module, {**TRACED, "dynamic": True})
    llm: Any = module.llm
    inputs = [torch.randn(*sizes, 12, requires_grad=True) for sizes in ((3, 3), (2, 16))]
    for hidden in [checkpoint(llm.layers["0"], h_BSD, use_reentrant=False) for h_BSD in inputs]:
        hidden.square().sum().backward()
    assert all(h_BSD.grad is not None for h_BSD in inputs)


@pytest.mark.wide
@pytest.mark.parametrize("backbone", ["1f1b", "zb1p"])
@pytest.mark.parametrize("kinds", [("ddp", "ddp", "ddp"), ("zero1", "zero1", "zero1"), ("fsdp", "fsdp", "zero1")])
def test_more_layers_and_batches_are_not_compiled_more_often(kinds: Any, backbone: str) -> None:
    strategy = {"backbone": backbone, "sharding": ShardingOptions(*kinds)}
    few, many = _compare(4, 2, strategy), _compare(8, 5, strategy)
    assert all(b <= a + 4 for a, b in zip(few, many, strict=True)), (few, many)


def test_what_is_refused() -> None:
    with pytest.raises(TypeError, match="compile='yes' must be true, false, or a dict"):
        BigMacStrategy(compile="yes")  # pyright: ignore[reportArgumentType]
    for wanted in ({"mode": "reduce-overhead"}, {"options": {"triton.cudagraphs": True}}):
        with pytest.raises(ValueError, match="uses CUDA graphs"):
            BigMacStrategy(compile=wanted)
    with pytest.raises(ValueError, match="compile does not go with tensor_parallel_size=2"):
        BigMacStrategy(compile=True, tensor_parallel_size=2)
