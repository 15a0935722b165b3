"""`AudioEncoder` against Whisper's encoder of the library, one sound at a time."""

from typing import Any

import pytest
import torch

from bigmac_lightning.models import AudioEncoder

WHISPER: dict[str, Any] = {
    "model_type": "whisper",
    "d_model": 16,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 24,
    "num_mel_bins": 8,
    "max_source_positions": 20,
    "vocab_size": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "decoder_start_token_id": 1,
    "dropout": 0.0,
    "encoder_layerdrop": 0.5,
}


def sounds(merge: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"windows": torch.randn(windows, 8, 40, generator=generator), "frames": torch.arange(rows * merge)}
        for windows, rows in ((1, 1), (2, 30 // merge), (1, 20 // merge))
    ]


def made(**changes: Any) -> AudioEncoder:
    encoder = AudioEncoder(WHISPER, 12, **changes)
    encoder.materialize()
    return encoder


@pytest.mark.parametrize("merge", [1, 5])
@pytest.mark.parametrize("hidden", [None, 10])
def test_it_equals_whisper(merge: int, hidden: int | None) -> None:
    encoder = made(merge=merge, projector_hidden=hidden)
    given = sounds(merge)
    found = encoder(given)
    rows = [len(sound["frames"]) // merge for sound in given]
    assert found.shape == (sum(rows), 12)
    expected = []
    for sound in given:
        frames = torch.cat([encoder.tower.encoder(window[None]).last_hidden_state[0] for window in sound["windows"]])
        joined = frames[: len(sound["frames"])].reshape(-1, merge * 16)
        expected.append(encoder.projector(joined))
    torch.testing.assert_close(found, torch.cat(expected))
    alone = [encoder([sound]) for sound in given]
    torch.testing.assert_close(found, torch.cat(alone))
    found.square().sum().backward()
    untrained = [name for name, p in encoder.named_parameters() if p.grad is None]
    assert untrained == ["tower.encoder.embed_positions.weight"], "the fixed positions of Whisper"
    assert not any("decoder" in name for name, _ in encoder.named_parameters())


def test_weights_depend_on_the_seed_alone() -> None:
    one, other, third = made(), made(), made(seed=1)
    torch.rand(3)
    for (name, a), b, c in zip(one.named_parameters(), other.parameters(), third.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.ndim == 1 or torch.equal(a, c) == ("embed_positions" in name), name
    assert torch.equal(one(sounds(1)), other(sounds(1))), "no layer is dropped, and no dropout"


def test_checkpointing_changes_nothing() -> None:
    one, other = made(), made(gradient_checkpointing=True)
    for encoder in (one, other):
        encoder(sounds(1)).square().sum().backward()
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"supports the towers \['whisper'\], not model_type 'siglip_vision_model'"):
        AudioEncoder({"model_type": "siglip_vision_model"}, 12)
    with pytest.raises(ValueError, match="merge=3 must divide max_source_positions=20"):
        AudioEncoder(WHISPER, 12, merge=3)


def test_the_smallest_sound_and_the_cost() -> None:
    encoder = made(merge=5)
    assert encoder([encoder.smallest()]).shape == (1, 12)
    costs = [encoder.forward_cost(rows) for rows in (1, 4, 5, 8)]
    assert costs[0].multiplications < costs[1].multiplications < costs[2].multiplications
    one, two = (costs[k].multiplications - costs[k - 1].multiplications for k in (1, 3))
    assert one == two, "of one window, only the projector's rows differ"
    from torch.utils.flop_counter import FlopCounterMode

    encoder = made(merge=5, attn_implementation="eager")  # torch does not count fused attention on the CPU
    with FlopCounterMode(display=False) as counted:
        encoder([{"windows": torch.randn(2, 8, 40), "frames": torch.arange(30)}])
    assert 2 * encoder.forward_cost(6).multiplications == pytest.approx(counted.get_total_flops(), rel=0.05)
