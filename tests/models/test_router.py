"""Load balancing of experts: padding does not count, and its sums are as exact between ranks as within one."""

from typing import Any

import pytest
import torch
import transformers as hf

from bigmac_lightning.contracts.batch import Batch, PipelineLayout
from bigmac_lightning.datamodules.loading.collate import Sample, make_batch
from bigmac_lightning.models import HFDecoder, MultimodalLM
from bigmac_lightning.runtime.gradients import reduce_gradients
from bigmac_lightning.runtime.mesh import build_mesh
from bigmac_lightning.schedule.request import ScheduleOptions
from bigmac_lightning.training.options import PipelineOptions
from bigmac_lightning.training.runner import PipelineRunner
from bigmac_lightning.training.stages import part_of
from tests.models import zoo
from tests.ranks import run_ranks
from tests.toy import split_layers

LENGTHS = ([5, 11, 8], [7, 7], [12, 3])  # of each microbatch's samples


def module_of(name: str = "qwen3_moe", **changes: Any) -> MultimodalLM:
    return MultimodalLM(HFDecoder(zoo.MODELS[name].config(), **changes))


def batch(layout: PipelineLayout, packed: bool = False) -> Batch:
    generator, made = torch.Generator().manual_seed(0), []
    for lengths in LENGTHS:
        tokens = [torch.randint(3, 50, (length,), generator=generator).tolist() for length in lengths]
        made.append([Sample(row, [False] + [True] * (len(row) - 1)) for row in tokens])
    return make_batch(made, layout, packed=packed)


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_padding_does_not_count(name: str) -> None:
    """Against the library's loss with an attention mask."""
    module = module_of(name)
    module.configure_model()
    whole: Any = hf.AutoModelForCausalLM.from_config(zoo.MODELS[name].config())
    whole.load_state_dict(module.llm.state_dict())
    given = batch(PipelineLayout())
    losses = []
    for lengths, microbatch in zip(LENGTHS, given.microbatches, strict=True):
        mask = torch.tensor([[1] * length + [0] * (max(lengths) - length) for length in lengths])
        losses.append(whole(input_ids=microbatch.inputs["input_ids"], attention_mask=mask).aux_loss)
    expected = torch.stack(losses).mean()
    expected.backward()
    out = module.pipeline(given)
    assert out.metrics["router"].item() == pytest.approx(expected.item(), rel=1e-6)
    module.loss_weights["text"] = 0.0
    module.loss_weights["router"] = 1.0
    module.pipeline(given).loss.backward()
    gradients = dict(module.llm.named_parameters())
    for weight, parameter in whole.named_parameters():
        if parameter.grad is not None:
            error = (gradients[weight].grad - parameter.grad).norm()
            assert error <= 3e-6 * parameter.grad.norm() + 1e-9, weight


def _run(rank: int, size: int, dtype: str) -> tuple[float, float, dict[str, Any]]:
    mesh = build_mesh(torch.device("cpu"), 1, size, range(size))
    module = module_of(dtype=dtype)
    module.loss_weights["router"] = 5.0
    module.part = part_of(rank, split_layers(zoo.LAYERS, size), range(size))
    module.configure_model()
    module.runner = PipelineRunner(module, mesh, PipelineOptions(ScheduleOptions(group_size=2)))
    out = module.pipeline(batch(module.runner.layout))
    reduce_gradients(module.runner.places, mesh)
    gradients = {name: p.grad for name, p in module.named_parameters()}
    return out.metrics["loss"].item(), out.metrics["router"].item(), gradients


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_sums_travel_as_they_are(dtype: str) -> None:
    """Two ranks have the loss of one to the last bit, and its gradients but for the order of sums."""
    ((loss, router, expected),) = run_ranks(1, _run, 1, dtype)
    for other_loss, other_router, gradients in run_ranks(2, _run, 2, dtype):
        assert other_router == router
        assert other_loss == pytest.approx(loss, rel=1e-7)
        for name, gradient in gradients.items():
            error = (gradient.float() - expected[name].float()).norm()
            assert error <= (1e-6 if dtype == "float32" else 1e-2) * expected[name].float().norm() + 1e-9, name
