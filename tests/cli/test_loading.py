"""Any checkpoint of any model is loaded as it was saved, without the pretrained weights that training started from."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import bigmac_lightning
from bigmac_lightning.datamodules import DigitsDataModule
from bigmac_lightning.models import HFDecoder, LatentCodec, MultimodalLM
from tests.models.parts import collate, decoder_config, flow, model

CODEC: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "in_channels": 1,
    "out_channels": 1,
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "block_out_channels": [8],
    "norm_num_groups": 4,
    "latent_channels": 2,
}
LORA = {
    "llm": {"r": 2, "target_modules": ["q_proj", "down_proj"]},
    "encoders.image": {"r": 2, "target_modules": ["fc1"]},
}


def _decoder(weights: str | None = None, **changes: Any) -> HFDecoder:
    return HFDecoder(decoder_config(**changes), weights=weights)


def _built(kind: str, weights: str | None = None) -> MultimodalLM:
    changes: dict[str, Any] = {
        "tied": {"llm": _decoder(weights, tie_word_embeddings=True)},
        "untied": {"llm": _decoder(weights, tie_word_embeddings=False)},
        "lora": {"llm": _decoder(weights), "lora": LORA},
        "frozen": {"llm": _decoder(weights), "freeze": ["llm", "encoders.image.tower"]},
        "codec": {"llm": _decoder(weights), "generators": {"image": flow(channels=2, codec=LatentCodec(CODEC))}},
        "experts": {
            "llm": HFDecoder(
                decoder_config("qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
                weights=weights,
            )
        },
    }[kind]
    return model(learning_rate=1e-2, schedule="constant", **changes)


def _outputs(module: MultimodalLM, batch: Any) -> tuple[Tensor, list[Tensor]]:
    with torch.no_grad():
        out = module.eval().pipeline(batch, sample=True)
    assert out.predictions is not None
    return out.predictions, out.samples or []


@pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode")  # the codec
@pytest.mark.parametrize("kind", ["tied", "untied", "lora", "frozen", "codec", "experts"])
def test_as_it_was_saved(kind: str, tmp_path: Path) -> None:
    """After a step of training, from a file; the folder of pretrained weights is gone."""
    trained, batch = _built(kind), collate("rdt", 2)
    loader: Any = DataLoader([batch], batch_size=None)  # pyright: ignore[reportArgumentType]
    options: dict[str, Any] = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "limit_val_batches": 0,
    }
    trainer = pl.Trainer(accelerator="cpu", max_steps=2, enable_checkpointing=False, **options)
    trainer.fit(trained, loader, loader)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    run = bigmac_lightning.load(tmp_path / "x.ckpt", _built(kind, "folder/that/is/gone"), DigitsDataModule(), "cpu")
    expected, state = trained.state_dict(), run.module.state_dict()
    assert expected.keys() == state.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    predictions, samples = _outputs(trained, batch)
    assert isinstance(run.module, MultimodalLM)
    torch.testing.assert_close(_outputs(run.module, batch), (predictions, samples), rtol=0, atol=0)


def test_another_type_of_weights(tmp_path: Path) -> None:
    """It writes and draws in it."""
    module = MultimodalLM(_decoder(), {}, {"image": flow()})
    module.configure_model()
    torch.save({"state_dict": module.state_dict(), "pytorch-lightning_version": pl.__version__}, tmp_path / "x.ckpt")
    again = MultimodalLM(_decoder(), {}, {"image": flow()})
    run = bigmac_lightning.load(tmp_path / "x.ckpt", again, DigitsDataModule(draw_rows=2), "cpu", torch.bfloat16)
    assert {parameter.dtype for parameter in run.module.parameters()} == {torch.bfloat16}
    prompt = run.prompt("what comes after 3 ?")
    assert len([*run.generate(prompt, max_new_tokens=4)]) == 4
    assert run.draw("draw a 3 :")[0].size == (8, 8)


def test_a_newer_checkpoint_that_is_damaged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is skipped and named."""
    module = MultimodalLM(_decoder())
    module.configure_model()
    (tmp_path / "config.yaml").write_text("")
    (tmp_path / "checkpoints").mkdir()
    whole = tmp_path / "checkpoints" / "a.ckpt"
    torch.save({"state_dict": module.state_dict(), "pytorch-lightning_version": pl.__version__}, whole)
    (tmp_path / "checkpoints" / "b.ckpt").write_bytes(whole.read_bytes()[:-1000])
    run = bigmac_lightning.load(tmp_path, MultimodalLM(_decoder()), DigitsDataModule(), "cpu")
    assert run.checkpoint == whole
    assert f"{whole} is loaded; not whole, and skipped: {tmp_path}/checkpoints/b.ckpt" in caplog.text


def test_data_without_prompts(tmp_path: Path) -> None:
    module = MultimodalLM(_decoder())
    module.configure_model()
    torch.save({"state_dict": module.state_dict(), "pytorch-lightning_version": pl.__version__}, tmp_path / "x.ckpt")
    run = bigmac_lightning.load(tmp_path / "x.ckpt", MultimodalLM(_decoder()), pl.LightningDataModule(), "cpu")
    with pytest.raises(ValueError, match="LightningDataModule makes no prompts: derive it from ParallelDataModule"):
        run.chat("hello")
