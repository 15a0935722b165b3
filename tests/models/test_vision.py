from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel

from bigmac_lightning.models import HFVideoEncoder, HFVisionEncoder, VisionEncoder
from bigmac_lightning.runtime.measure.memory import MemoryTracker
from tests.models import zoo
from tests.models.parts import TOWER, counting, image, ready

WIDTH = 20


def test_rows_of_mixed_sizes_keep_their_order() -> None:
    encoder = ready(VisionEncoder(TOWER, WIDTH))
    images = [image(0, 8, 8), image(1, 4, 8), image(2, 8, 8), image(3, 8, 4), image(4, 4, 8)]
    together = encoder(images)
    assert together.shape == (16 + 8 + 16 + 8 + 8, WIDTH)
    torch.testing.assert_close(together, torch.cat([encoder([one]) for one in images]), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(encoder([images[1]]), encoder([images[1].transpose(1, 2)]))


@pytest.mark.parametrize("projector_hidden", [None, 28])
def test_every_weight_learns(projector_hidden: int | None) -> None:
    encoder = ready(VisionEncoder(TOWER, WIDTH, projector_hidden))
    encoder([image(0, 8, 8)]).square().sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert {name.split(".")[0] for name, _ in encoder.named_parameters()} == {"tower", "projector"}


def test_weights_depend_on_the_seed_only() -> None:
    torch.manual_seed(1)
    one = ready(VisionEncoder(TOWER, WIDTH, 28, seed=2)).state_dict()
    before = torch.get_rng_state()
    torch.rand(3)
    two = ready(VisionEncoder(TOWER, WIDTH, 28, seed=2)).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    other = ready(VisionEncoder(TOWER, WIDTH, 28, seed=3)).state_dict()
    assert not torch.equal(one["projector.0.weight"], other["projector.0.weight"])
    assert not torch.equal(one["tower.encoder.layers.0.mlp.fc1.weight"], other["tower.encoder.layers.0.mlp.fc1.weight"])
    torch.set_rng_state(before)
    ready(VisionEncoder(TOWER, WIDTH))
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_are_as_hugging_face_draws_them() -> None:
    """A module may draw the weights of its children anew: parents come last."""
    biases = ready(VisionEncoder(TOWER, WIDTH)).tower.encoder.layers[0].mlp.fc1.bias
    assert 0 < biases.abs().max() < 1e-5


SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 2,
}
TOWERS: dict[str, dict[str, Any]] = {
    "siglip_vision_model": SMALL,
    "clip_vision_model": SMALL,
    "dinov2": SMALL,
    "dinov2_with_registers": {**SMALL, "num_register_tokens": 2},
    "dinov3_vit": {**SMALL, "num_register_tokens": 2},
}
GRIDS: dict[str, dict[str, Any]] = {
    "qwen2_5_vl_vision": {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "out_hidden_size": 24,
        "patch_size": 4,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    },
    "qwen3_vl_vision": {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "out_hidden_size": 24,
        "patch_size": 4,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    },
}


def picture(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("merge", [1, 2])
@pytest.mark.parametrize("kind", TOWERS)
def test_towers_of_images(kind: str, merge: int) -> None:
    encoder = ready(VisionEncoder({"model_type": kind, **TOWERS[kind]}, WIDTH, 28, merge))
    images = [picture(0, 3, 8, 8), picture(1, 3, 8, 16), picture(2, 3, 8, 8)]
    together = encoder(images)
    assert together.shape == (64 // merge**2, encoder.width)
    assert encoder.width == WIDTH
    torch.testing.assert_close(together, torch.cat([encoder([one]) for one in images]), rtol=1e-5, atol=1e-6)
    together.square().sum().backward()
    learning = {name for name, p in encoder.named_parameters() if p.requires_grad}
    assert learning == {name for name, p in encoder.named_parameters() if p.grad is not None and p.grad.any()}
    assert len(learning) > 20


@pytest.mark.parametrize("kind", GRIDS)
def test_towers_of_patches(kind: str) -> None:
    encoder = ready(VisionEncoder({"model_type": kind, **GRIDS[kind]}, WIDTH))
    items = [picture(0, 1, 4, 4, 96), picture(1, 2, 2, 4, 96)]
    together = encoder(items)
    assert together.shape == (4 + 4, WIDTH)
    torch.testing.assert_close(together, torch.cat([encoder([one]) for one in items]), rtol=1e-5, atol=1e-6)
    together.square().sum().backward()
    assert all(p.grad is not None for p in encoder.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", [*TOWERS, *GRIDS])
def test_work_against_counted_operations(kind: str) -> None:
    encoder = ready(VisionEncoder({"model_type": kind, **{**TOWERS, **GRIDS}[kind]}, WIDTH, 28))
    item = picture(0, 1, 4, 4, 96) if kind in GRIDS else picture(0, 3, 8, 16)
    with counting() as counted:
        rows = encoder([item])
    assert encoder.forward_cost(len(rows)).multiplications == pytest.approx(counted.get_total_flops() / 2, rel=0.05)


@pytest.mark.parametrize("name", zoo.VISION_LANGUAGE)
def test_work_of_vision_language_models(name: str) -> None:
    model = zoo.MODELS[name]
    encoder = ready(HFVisionEncoder(model.config(), attn_implementation=model.attention))
    assert model.draw is not None
    drawn = model.draw(Random(0))
    with counting() as counted:
        features = (HFVideoEncoder(encoder) if drawn.encoder == "video" else encoder)([drawn.data])
    assert features.shape[1] == encoder.width
    work = encoder.forward_cost(len(features) // encoder.levels)
    assert work.multiplications == pytest.approx(counted.get_total_flops() / 2, rel=0.2)


@pytest.mark.parametrize("kind", ["siglip_vision_model", "qwen3_vl_vision"])
def test_gradient_checkpointing_changes_no_gradient(kind: str) -> None:
    item = picture(0, 1, 4, 4, 96) if kind in GRIDS else picture(0, 3, 8, 16)
    encoders = [
        ready(VisionEncoder({"model_type": kind, **{**TOWERS, **GRIDS}[kind]}, WIDTH, gradient_checkpointing=again))
        for again in (False, True)
    ]
    saved: list[int] = []
    for encoder in encoders:
        memory = MemoryTracker(encoder.parameters())
        with memory.component("encoder"):
            loss = encoder.train()([item]).square().sum()
        saved.append(memory.live["encoder"])
        loss.backward()
    for one, other in zip(*(encoder.parameters() for encoder in encoders), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=0)
    assert saved[1] < 0.6 * saved[0]


def test_no_weights_before_they_are_wanted() -> None:
    encoder = VisionEncoder(TOWER, WIDTH, 28)
    assert all(parameter.is_meta for parameter in encoder.parameters())
    encoder.tower.requires_grad_(False)
    encoder.projector[0].requires_grad_(False)
    frozen = [name for name, parameter in encoder.named_parameters() if not parameter.requires_grad]
    encoder.materialize()
    assert frozen == [name for name, parameter in encoder.named_parameters() if not parameter.requires_grad]
    before = {name: parameter.clone() for name, parameter in encoder.named_parameters()}
    encoder.materialize()  # once more does nothing
    assert all(torch.equal(before[name], parameter) for name, parameter in encoder.named_parameters())


def test_merging_joins_squares_of_patches() -> None:
    encoder = ready(VisionEncoder(TOWER, WIDTH, merge=2))
    numbers = torch.arange(8.0).view(1, 8, 1)  # patches of a picture two high and four wide
    merged = encoder._merged(numbers, torch.Size((4, 8)))
    assert merged.tolist() == [[[0, 1, 4, 5], [2, 3, 6, 7]]]


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2"])
def test_a_pretrained_tower(kind: str, tmp_path: Path) -> None:
    """From the folder of a text and image model, or of a tower alone."""
    small = {name: value for name, value in SMALL.items() if name not in ("image_size", "patch_size")}
    config = AutoConfig.for_model(kind, **({} if kind == "dinov2" else {"vision_config": SMALL, "text_config": small}),
                                  **(SMALL if kind == "dinov2" else {}))  # fmt: skip
    whole = AutoModel.from_config(config)
    whole.save_pretrained(tmp_path)
    encoder = ready(VisionEncoder(str(tmp_path), WIDTH, weights=str(tmp_path)))
    image = picture(0, 3, 8, 8)
    tower = whole if kind == "dinov2" else whole.vision_model
    prefix = 0 if kind == "siglip" else 1
    expected = tower(pixel_values=image[None]).last_hidden_state[0, prefix:]
    torch.testing.assert_close(encoder([image]), encoder.projector(expected))


def test_another_tower() -> None:
    with pytest.raises(ValueError, match=r"supports the towers .*, not model_type 'vit'"):
        VisionEncoder({"model_type": "vit"}, WIDTH)
    with pytest.raises(ValueError, match="merges patches itself: leave merge=1"):
        VisionEncoder({"model_type": "qwen3_vl_vision", **GRIDS["qwen3_vl_vision"]}, WIDTH, merge=2)


def test_sizes_that_do_not_merge() -> None:
    encoder = ready(VisionEncoder(TOWER, WIDTH, merge=2))
    with pytest.raises(ValueError, match=r"3 \* 4 patches, which merge=2 does not divide: resize .* multiples of 4"):
        encoder([image(0, 6, 8)])
