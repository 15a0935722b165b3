"""Voxtral from its folder against the library's own processor and model. It runs where mistral-common is installed
(``pip install 'bigmac-lightning[voxtral]'``)."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
import transformers as hf

from bigmac_lightning.datamodules import Audio, Example, File, MultimodalDataModule
from bigmac_lightning.datamodules.encoding import voxtral
from bigmac_lightning.datamodules.media.decoding import measure
from bigmac_lightning.datamodules.media.sounds import read_sound
from tests.datamodules import test_hf_audio
from tests.datamodules.sound_processors import extractor
from tests.datamodules.sounds import write_sound
from tests.datamodules.test_hf_visual import said
from tests.models import zoo
from tests.models.more_families import ALL

pytest.importorskip("mistral_common")
CONTROLS = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"]
CONTROLS += ["[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]"]
CONTROLS += ["[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]", *(f"<SPECIAL_{i}>" for i in range(4))]
CONTROLS += ["[AUDIO]", "[BEGIN_AUDIO]", "[TRANSCRIBE]"]
PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def processor(folder: Path) -> Any:
    """Voxtral's, with a vocabulary of bytes and a few pairs of them."""
    tokens = [*(bytes([byte]) for byte in range(256)), b"th", b"he", b" a", b"oth"]
    made = {
        "config": {
            "pattern": PATTERN,
            "num_vocab_tokens": len(tokens),
            "default_vocab_size": len(CONTROLS) + len(tokens),
            "default_num_special_tokens": len(CONTROLS),
            "version": "v7",
        },
        "vocab": [
            {"rank": i, "token_bytes": base64.b64encode(t).decode(), "token_str": None} for i, t in enumerate(tokens)
        ],
        "special_tokens": [{"rank": i, "token_str": name, "is_control": True} for i, name in enumerate(CONTROLS)],
        "audio": {
            "sampling_rate": 16000,
            "frame_rate": 12.5,
            "audio_encoding_config": {"num_mel_bins": 8, "hop_length": 160, "window_size": 400},
            "chunk_length_s": 30.0,
        },
    }
    (folder / "tekken.json").write_text(json.dumps(made))
    tokenizer = hf.MistralCommonBackend(folder / "tekken.json", mode="finetuning")
    return hf.VoxtralProcessor(extractor(chunk_length=30, return_attention_mask=False), tokenizer)


def by_library(made: Any, example: Example) -> dict[str, Any]:
    messages: list[Any] = []
    for message in example.messages:
        parts: list[Any] = []
        for part in message.parts:
            if isinstance(part, str):
                parts.append({"type": "text", "text": part})
            else:
                assert isinstance(part, Audio)
                stream, sound = io.BytesIO(), read_sound(part.file, measure(part), 16_000).numpy()
                pytest.importorskip("soundfile").write(stream, sound, 16_000, format="WAV", subtype="FLOAT")
                parts.append({"type": "audio", "base64": base64.b64encode(stream.getvalue()).decode()})
        messages.append({"role": message.role, "content": parts})
    return dict(made.apply_chat_template(messages))


class VoxtralCase(test_hf_audio.SoundCase):
    def datamodule(self, **changes: Any) -> MultimodalDataModule:
        return super().datamodule(token_budget=2400, **changes)


def test_voxtral(tmp_path: Path) -> None:
    made = processor(tmp_path)
    config = ALL["voxtral"].config()
    config.text_config.vocab_size, config.text_config.max_position_embeddings = 296, 4096
    config.audio_config.max_source_positions, config.audio_token_id = 1500, 24
    zoo.save("voxtral", tmp_path, config)
    folder = tmp_path / "voxtral"
    made.save_pretrained(folder)
    long, short = (Audio(File.at(write_sound(tmp_path / f"{s}.wav", s, 16_000, 1))) for s in (30.2, 0.5))
    examples = [
        Example([*said(long, "who?\n", reply="both "), *said("and ", short, " other ", reply="one")]),
        Example(said(short, reply="a tone")),
        Example([*said("only text", reply="yes"), *said("more", reply="  no  ")]),
    ]
    case = VoxtralCase("voxtral", folder, examples, [by_library(made, example) for example in examples])
    encoder = case.datamodule().encoder
    sample = encoder.encode(examples[0], [measure(long), measure(short)], "it")
    learnt = [token for token, labelled in zip(sample.tokens, sample.labelled, strict=True) if labelled]
    assert encoder.tokenizer.decode(learnt) == "both</s>one</s>"
    test_hf_audio.test_against_the_library(case, packed=True)


def test_other_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(voxtral, "PRELUDE", "")
    with pytest.raises(ValueError, match="mistral-common makes other tokens of"):
        voxtral.fast_tokenizer(processor(tmp_path))
