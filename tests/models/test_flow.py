import functools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from bigmac_lightning.batch import TargetItem
from tests.models.parts import WIDTH, flow, image


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
