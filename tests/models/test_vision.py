import pytest
import torch

from bigmac_lightning.models import VisionEncoder
from tests.models.parts import TOWER, image

WIDTH = 20


def test_rows_of_mixed_sizes_keep_their_order() -> None:
    encoder = VisionEncoder(TOWER, WIDTH)
    images = [image(0, 8, 8), image(1, 4, 8), image(2, 8, 8), image(3, 8, 4), image(4, 4, 8)]
    together = encoder(images)
    assert together.shape == (16 + 8 + 16 + 8 + 8, WIDTH)
    torch.testing.assert_close(together, torch.cat([encoder([one]) for one in images]), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(encoder([images[1]]), encoder([images[1].transpose(1, 2)]))


@pytest.mark.parametrize("projector_hidden", [None, 28])
def test_every_weight_learns(projector_hidden: int | None) -> None:
    encoder = VisionEncoder(TOWER, WIDTH, projector_hidden)
    encoder([image(0, 8, 8)]).square().sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert {name.split(".")[0] for name, _ in encoder.named_parameters()} == {"tower", "projector"}


def test_weights_depend_on_the_seed_only() -> None:
    torch.manual_seed(1)
    one = VisionEncoder(TOWER, WIDTH, 28, seed=2).state_dict()
    before = torch.get_rng_state()
    torch.rand(3)
    two = VisionEncoder(TOWER, WIDTH, 28, seed=2).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    other = VisionEncoder(TOWER, WIDTH, 28, seed=3).state_dict()
    assert not torch.equal(one["projector.0.weight"], other["projector.0.weight"])
    assert not torch.equal(one["tower.encoder.layers.0.mlp.fc1.weight"], other["tower.encoder.layers.0.mlp.fc1.weight"])
    torch.set_rng_state(before)
    VisionEncoder(TOWER, WIDTH)
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_are_as_hugging_face_draws_them() -> None:
    """A module may draw the weights of its children anew: parents come last."""
    biases = VisionEncoder(TOWER, WIDTH).tower.encoder.layers[0].mlp.fc1.bias
    assert 0 < biases.abs().max() < 1e-5


def test_another_tower() -> None:
    with pytest.raises(ValueError, match="needs model_type \"siglip_vision_model\", not 'vit'"):
        VisionEncoder({"model_type": "vit"}, WIDTH)
