import functools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bigmac_lightning.contracts.batch import TargetItem
from bigmac_lightning.models import FlowGenerator, LatentCodec
from bigmac_lightning.runtime.measure.memory import MemoryTracker
from tests.models.parts import WIDTH, counting, flow, image, ready


def given(count: int = 6) -> tuple[list[Tensor], list[TargetItem]]:
    """Items of two shapes and two numbers of rows."""
    items = [
        TargetItem("image", 3 + i % 2, (1, 8, 4 + 4 * (i % 3 > 0)), seed=40 + i, data=image(i, 8, 4 + 4 * (i % 3 > 0)))
        for i in range(count)
    ]
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(item.rows, WIDTH, generator=generator) for item in items], items


@pytest.mark.parametrize("condition_dropout", [0.0, 0.5])
def test_the_loss_does_not_depend_on_batching(condition_dropout: float) -> None:
    generator = flow(condition_dropout=condition_dropout)
    conditions, items = given()
    torch.manual_seed(0)
    together = generator(conditions, items)
    torch.manual_seed(1)
    apart = [generator([c], [item]) for c, item in zip(conditions, items, strict=True)]
    torch.testing.assert_close(together, torch.stack(apart).sum(), rtol=1e-6, atol=0)
    reversed_order = generator(conditions[::-1], items[::-1])
    torch.testing.assert_close(together, reversed_order, rtol=1e-6, atol=0)


def test_the_loss_depends_on_seed_and_conditions() -> None:
    generator = flow()
    conditions, items = given(1)
    loss = generator(conditions, items)
    assert not torch.isclose(loss, generator(conditions, [replace(items[0], seed=7)]))
    assert not torch.isclose(loss, generator([conditions[0] + 1], items))


def test_against_the_formula() -> None:
    """A transformer that predicts nothing leaves the mean square of noise - target."""
    generator = flow()
    torch.nn.init.zeros_(generator.transformer.proj_out.weight)
    torch.nn.init.zeros_(generator.transformer.proj_out.bias)
    conditions, items = given()
    expected = 0.0
    for item in items:
        noise = torch.randn(item.shape, generator=torch.Generator().manual_seed(item.seed))
        assert item.data is not None
        expected += (noise - item.data).square().mean().item()
    assert generator(conditions, items).item() == pytest.approx(expected, rel=1e-6)


def test_every_trained_weight_learns() -> None:
    generator = flow()
    conditions, items = given()
    conditions = [c.requires_grad_() for c in conditions]
    for _, group in generator.named_parameters():
        group.data += 0.01  # the transformer starts with gates at zero
    generator(conditions, items).backward()
    trained = [(name, p.grad) for name, p in generator.named_parameters() if p.requires_grad]
    unused = [name for name, gradient in trained if gradient is None or not gradient.any()]
    assert unused == []
    assert all(c.grad is not None and c.grad.any() for c in conditions)


def test_dropped_conditions_do_not_matter() -> None:
    generator = flow(condition_dropout=1.0)
    conditions, items = given(2)
    assert torch.equal(generator(conditions, items), generator([c + 1 for c in conditions], items))


def test_it_learns_and_samples_what_it_learnt() -> None:
    """Two conditions, two images: after a short training, samples are nearer to their own image."""
    torch.manual_seed(0)
    generator = flow(steps=10)
    images = [torch.ones(1, 8, 8), -torch.ones(1, 8, 8)]
    conditions = [torch.randn(2, WIDTH) for _ in images]
    optimizer = torch.optim.Adam([p for p in generator.parameters() if p.requires_grad], 3e-3)
    for step in range(60):
        items = [TargetItem("image", 2, (1, 8, 8), 2 * step + i, data=images[i]) for i in range(2)]
        optimizer.zero_grad()
        generator(conditions, items).backward()
        optimizer.step()
    made = generator.sample(conditions, [TargetItem("image", 2, (1, 8, 8), 999 + i) for i in range(2)])
    assert made[0].mean() > 0.5
    assert made[1].mean() < -0.5


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_samples_do_not_depend_on_batching(guidance_scale: float) -> None:
    generator = flow(condition_dropout=0.1, guidance_scale=guidance_scale)
    conditions, items = given()
    items = [replace(item, data=None) for item in items]
    together = generator.sample(conditions, items)
    assert [tuple(one.shape) for one in together] == [item.shape for item in items]
    for one, c, item in zip(together, conditions, items, strict=True):
        torch.testing.assert_close(one, generator.sample([c], [item])[0], rtol=1e-4, atol=1e-5)


def test_guidance_moves_samples() -> None:
    conditions, items = given(1)
    plain, guided = (flow(condition_dropout=0.1, guidance_scale=scale) for scale in (1.0, 3.0))
    assert not torch.allclose(plain.sample(conditions, items)[0], guided.sample(conditions, items)[0])


def test_the_exact_velocity_has_no_loss_and_leads_to_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """With x_s = (1 - s) * x_0 + s * noise, (x_s - x_0) / s is noise - x_0."""
    generator = flow()
    items = [TargetItem("image", 2, (1, 8, 8), seed, data=image(0, 8, 8)) for seed in range(3)]
    conditions = [torch.zeros(2, WIDTH)] * 3
    monkeypatch.setattr(generator, "_velocity", lambda x, s, c: (x - image(0, 8, 8)) / s[:, None, None, None])
    assert generator(conditions, items).item() < 1e-6
    for made in generator.sample(conditions, items):
        torch.testing.assert_close(made, image(0, 8, 8), rtol=0, atol=1e-5)


def test_patches_come_back_where_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = flow(channels=2)
    monkeypatch.setattr(
        generator.transformer, "forward", lambda hidden_states, **kwargs: SimpleNamespace(sample=hidden_states)
    )
    x_BCHW = torch.randn(2, 2, 8, 4)
    assert torch.equal(generator._velocity(x_BCHW, torch.ones(2), torch.zeros(2, 1, WIDTH)), x_BCHW)


def test_training_after_inference_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rotary tables that the transformer caches must not be those of inference mode."""
    generator = flow()
    rope = generator.transformer.pos_embed
    on_device = functools.cache(lambda device: (rope.pos_freqs.clone(), rope.neg_freqs.clone()))  # as on a GPU
    monkeypatch.setattr(rope, "_get_device_freqs", on_device)
    conditions, items = given()
    with torch.inference_mode():
        generator(conditions, items)
        generator.sample(conditions, items)
    generator(conditions, items).backward()


def test_weights_depend_on_the_seed_only() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one, two, other = flow(seed=2).state_dict(), flow(seed=2).state_dict(), flow(seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["connector.weight"], other["connector.weight"])


def test_misuse() -> None:
    with pytest.raises(ValueError, match="set condition_dropout"):
        flow(guidance_scale=2.0)
    conditions, items = given(1)
    with pytest.raises(ValueError, match="has no data on its owner, rank 0"):
        flow()(conditions, [replace(items[0], data=None)])


DIFFUSION: dict[str, dict[str, Any]] = {
    "qwen_image": {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": [4, 6, 6]},
    "sd3": {
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "sample_size": 8,
        "qk_norm": "rms_norm",
    },
    "sana": {
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 16,
        "cross_attention_dim": 32,
        "sample_size": 8,
    },
    "lumina2": {
        "hidden_size": 48,
        "num_layers": 2,
        "num_refiner_layers": 1,
        "num_attention_heads": 3,
        "num_kv_heads": 1,
        "multiple_of": 16,
        "axes_dim_rope": [4, 6, 6],
        "axes_lens": [64, 64, 64],
        "sample_size": 8,
    },
}
CODECS: dict[str, dict[str, Any]] = {
    "AutoencoderKL": {
        "in_channels": 1,
        "out_channels": 1,
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "block_out_channels": [8, 8],
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "scaling_factor": 0.5,
        "shift_factor": 0.1,
    },
    "AutoencoderDC": {
        "in_channels": 1,
        "latent_channels": 4,
        "attention_head_dim": 8,
        "encoder_block_types": ["ResBlock"] * 2,
        "decoder_block_types": ["ResBlock"] * 2,
        "encoder_block_out_channels": [8, 8],
        "decoder_block_out_channels": [8, 8],
        "encoder_layers_per_block": [1, 1],
        "decoder_layers_per_block": [1, 1],
        "encoder_qkv_multiscales": [[], []],
        "decoder_qkv_multiscales": [[], []],
        "upsample_block_type": "interpolate",
        "downsample_block_type": "stride_conv",
        "decoder_norm_types": "rms_norm",
        "decoder_act_fns": "silu",
        "scaling_factor": 0.5,
    },
}


def codec_config(kind: str = "AutoencoderKL") -> dict[str, Any]:
    return {"_class_name": kind, **CODECS[kind]}


def codec(kind: str) -> LatentCodec:
    return ready(LatentCodec(codec_config(kind)))


@pytest.mark.parametrize("queries", [None, 5])
@pytest.mark.parametrize("kind", DIFFUSION)
def test_every_transformer_learns_with_every_weight(kind: str, queries: int | None) -> None:
    torch.manual_seed(0)
    generator = ready(FlowGenerator(WIDTH, 1, config=DIFFUSION[kind], transformer=kind, queries=queries, steps=3))
    conditions, items = given(3)
    conditions = [c.requires_grad_() for c in conditions]
    for _, parameter in generator.named_parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)  # gates start at zero
    together = generator(conditions, items)
    apart = [generator([c], [item]) for c, item in zip(conditions, items, strict=True)]
    torch.testing.assert_close(together, torch.stack(apart).sum(), rtol=1e-5, atol=0)
    together.backward()
    trained = {name: p.grad for name, p in generator.named_parameters() if p.requires_grad}
    assert [name for name, gradient in trained.items() if gradient is None or not gradient.any()] == []
    assert all(c.grad is not None and c.grad.any() for c in conditions)
    assert [tuple(made.shape) for made in generator.sample(conditions, items)] == [item.shape for item in items]


@pytest.mark.parametrize("queries", [None, 5])
@pytest.mark.parametrize("kind", DIFFUSION)
def test_work_against_counted_operations(kind: str, queries: int | None) -> None:
    generator = ready(FlowGenerator(WIDTH, 1, config=DIFFUSION[kind], transformer=kind, queries=queries))
    conditions, items = given(1)
    with counting() as counted:
        generator([conditions[0].requires_grad_()], items)
    work = generator.forward_cost(items[0].shape, items[0].rows)
    assert work.multiplications == pytest.approx(counted.get_total_flops() / 2, rel=0.05)


@pytest.mark.parametrize("kind", DIFFUSION)
def test_gradient_checkpointing_changes_no_gradient(kind: str) -> None:
    settings: dict[str, Any] = {"config": DIFFUSION[kind], "transformer": kind}
    generators = [ready(FlowGenerator(WIDTH, 1, gradient_checkpointing=again, **settings)) for again in (False, True)]
    saved: list[int] = []
    for generator in generators:
        memory = MemoryTracker(generator.parameters())
        with memory.component("generator"):
            loss = generator.train()(*given(2))
        saved.append(memory.live["generator"])
        loss.backward()
    for one, other in zip(*(generator.parameters() for generator in generators), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-7)
    assert saved[1] < 0.7 * saved[0]


def test_no_weights_before_they_are_wanted() -> None:
    generator = FlowGenerator(WIDTH, config=DIFFUSION["qwen_image"], codec=LatentCodec(codec_config()))
    assert all(parameter.is_meta for parameter in generator.parameters())
    generator.connector.requires_grad_(False)
    frozen = [name for name, parameter in generator.named_parameters() if not parameter.requires_grad]
    generator.materialize()
    assert not any(parameter.is_meta for parameter in generator.parameters())
    assert frozen == [name for name, parameter in generator.named_parameters() if not parameter.requires_grad]


@pytest.mark.parametrize("kind", DIFFUSION)
def test_every_transformer_learns_a_picture(kind: str) -> None:
    """The direction of time and the sign of the velocity: what has been learnt is what is drawn."""
    torch.manual_seed(0)
    generator = ready(FlowGenerator(WIDTH, 1, config=DIFFUSION[kind], transformer=kind, steps=10))
    condition, picture = torch.randn(2, WIDTH), torch.ones(1, 8, 8)
    optimizer = torch.optim.Adam([p for p in generator.parameters() if p.requires_grad], 3e-3)
    for step in range(0, 240, 4):
        items = [TargetItem("image", 2, (1, 8, 8), step + i, data=picture) for i in range(4)]
        optimizer.zero_grad()
        generator([condition] * 4, items).backward()
        optimizer.step()
    (made,) = generator.sample([condition], [TargetItem("image", 2, (1, 8, 8), 999)])
    assert made.mean() > 0.5


@pytest.mark.parametrize("kind", CODECS)
def test_latents(kind: str, tmp_path: Path) -> None:
    generator = ready(FlowGenerator(WIDTH, config=DIFFUSION["qwen_image"], codec=codec(kind), steps=2))
    conditions, items = given(3)
    generator.train()
    loss = generator(conditions, items)
    loss.backward()
    assert generator.codec is not None
    assert not generator.codec.training
    assert all(p.grad is None for p in generator.codec.parameters())
    assert generator.codec.latent_shape((1, 8, 4)) == (4, 4, 2)
    assert [tuple(made.shape) for made in generator.sample(conditions, items)] == [item.shape for item in items]
    with pytest.raises(ValueError, match=r"7 \* 8 pixels do not fit the codec: resize to multiples of 2"):
        generator(conditions[:1], [replace(items[0], shape=(1, 7, 8))])
    generator.codec.autoencoder.save_pretrained(tmp_path)
    again = LatentCodec(str(tmp_path))
    again.materialize()
    picture = image(0, 8, 8)[None]
    assert torch.equal(again.encode(picture), generator.codec.encode(picture))


@pytest.mark.parametrize("kind", DIFFUSION)
def test_pretrained_transformers(kind: str, tmp_path: Path) -> None:
    one = ready(FlowGenerator(WIDTH, 1, config=DIFFUSION[kind], transformer=kind))
    one.transformer.save_pretrained(tmp_path)
    two = FlowGenerator(WIDTH, 1, transformer=kind, weights=str(tmp_path), seed=7)
    two.materialize()
    assert all(
        torch.equal(a, b) for a, b in zip(one.transformer.parameters(), two.transformer.parameters(), strict=True)
    )
    two.connector.load_state_dict(one.connector.state_dict())
    assert torch.equal(one(*given(2)), two(*given(2)))


def test_arguments_that_do_not_go_together(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="transformer='unet' is not known; choose one of qwen_image, sd3"):
        FlowGenerator(WIDTH, 1, transformer="unet")
    with pytest.raises(ValueError, match="give config or weights"):
        FlowGenerator(WIDTH, 1, config={"num_layers": 1}, weights=str(tmp_path))
    with pytest.raises(ValueError, match="needs _class_name AutoencoderKL or AutoencoderDC"):
        LatentCodec({"_class_name": "VQModel"})
