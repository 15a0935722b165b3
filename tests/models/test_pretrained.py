"""Starting from the folder of a checkpoint: what is read, what is refused, what it costs."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from bigmac_lightning.contracts.batch import PipelineLayout
from bigmac_lightning.models import HFDecoder, HFVideoEncoder, HFVisionEncoder, MultimodalLM
from bigmac_lightning.models.families import FAMILIES
from bigmac_lightning.models.meta_model import auto_class
from bigmac_lightning.models.vision.hf_encoders import encoders_of
from tests.models import more_families, tiny, zoo
from tests.ranks import run_ranks


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    zoo.save("qwen3_vl", tmp_path)
    return tmp_path / "qwen3_vl"


def whole(folder: Path, **changes: Any) -> MultimodalLM:
    module = MultimodalLM.from_pretrained(str(folder), **changes)
    module.configure_model()
    return module


def loss_and_gradients(module: MultimodalLM, name: str = "qwen3_vl") -> tuple[float, dict[str, torch.Tensor]]:
    loss = module.pipeline(zoo.batch(zoo.MODELS[name], False, PipelineLayout())).loss
    loss.backward()
    return loss.item(), {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("name", "packed"), [("qwen3_vl_moe", True), ("qwen3_vl", False), ("qwen3_moe", True), ("gemma2", False)]
)
def test_gradient_checkpointing_changes_nothing(name: str, packed: bool, tmp_path: Path) -> None:
    zoo.save(name, tmp_path)
    attention = zoo.MODELS[name].attention
    results, saved_numbers = [], []
    for checkpointing in (False, True):
        module = whole(tmp_path / name, gradient_checkpointing=checkpointing, attn_implementation=attention)
        saved = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal saved
            saved += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = module.pipeline(zoo.batch(zoo.MODELS[name], packed, PipelineLayout())).loss
        saved_numbers.append(saved)
        loss.backward()
        results.append((loss.item(), {n: p.grad for n, p in module.named_parameters() if p.grad is not None}))
    (loss, gradients), (again, others) = results
    assert loss == again
    assert gradients.keys() == others.keys()
    assert all(torch.equal(gradients[n], others[n]) for n in gradients)
    assert saved_numbers[1] < 0.6 * saved_numbers[0]


def test_weights_are_read_in_the_wanted_precision(folder: Path) -> None:
    hf.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    assert {p.dtype for p in whole(folder).parameters()} == {torch.float32}
    assert {p.dtype for p in whole(folder, dtype="auto").parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "qwen3_5_moe", "deepseek_v3", "granitemoehybrid", "mimo_v2_flash"])
def test_types_are_those_of_the_library(name: str, tmp_path: Path) -> None:
    """In bfloat16 some weights and the rotary frequencies stay float32, whether weights are drawn or read."""
    config = zoo.MODELS[name].config() if name in zoo.MODELS else tiny.tiny_config(name, output_router_logits=False)
    auto = hf.AutoModelForImageTextToText if name in zoo.VISION_LANGUAGE else hf.AutoModelForCausalLM
    auto.from_config(config, attn_implementation="eager").save_pretrained(tmp_path)
    reference = auto.from_pretrained(tmp_path, dtype=torch.bfloat16)
    expected = {n: t.dtype for n, t in [*reference.named_parameters(), *reference.named_buffers()]}
    assert torch.bfloat16 in expected.values()
    for source, weights in ((config, None), (str(tmp_path), str(tmp_path))):
        llm = HFDecoder(source, dtype="bfloat16", attn_implementation="eager", weights=weights)
        llm.materialize(range(llm.num_layers), True, True)
        for n, tensor in [*llm.named_parameters(), *llm.named_buffers()]:
            assert tensor.dtype == expected[n], (n, weights)


def test_a_part_reads_its_slices_only(folder: Path) -> None:
    """Tensors of other parts may even be missing."""
    tensors = load_file(folder / "model.safetensors")
    of_part = {name: tensor for name, tensor in tensors.items() if re.search(r"language_model\.layers\.[12]\.", name)}
    save_file(of_part, folder / "model.safetensors", {"format": "pt"})
    llm = HFDecoder(str(folder), weights=str(folder))
    llm.materialize([1, 2], embedding=False, head=False)
    assert {name for name, _ in llm.named_parameters()} == of_part.keys()
    assert all(torch.equal(parameter, of_part[name]) for name, parameter in llm.named_parameters())


def _peak(rank: int, folder: Path) -> tuple[float, float]:
    """Bytes of a loaded stage, and by how many the process grew at most while it was loaded and used."""

    def resident(field: str) -> int:
        return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024

    llm = HFDecoder(str(folder), weights=str(folder))
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = resident("VmRSS")
    llm.materialize([2, 3, 4], embedding=False, head=False)
    size = 0
    for parameter in llm.parameters():
        size += parameter.numel() * parameter.element_size()
        parameter.sum()  # files are mapped: only what is touched is there
    return size, resident("VmHWM") - before


def test_memory_while_loading_a_stage(tmp_path: Path) -> None:
    """Within 10% of the stage's own size, for a checkpoint of 400 MB."""
    config = hf.LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=8, vocab_size=4000
    )
    hf.LlamaForCausalLM(config).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size > 400e6
    ((size, peak),) = run_ranks(1, _peak, tmp_path)
    assert size > 140e6
    assert peak < 1.1 * size


def test_images_and_videos_share_the_tower(folder: Path) -> None:
    module = whole(folder)
    image, video = module.encoders["image"], module.encoders["video"]
    assert isinstance(image, HFVisionEncoder)
    assert isinstance(video, HFVideoEncoder)
    assert not list(video.parameters())
    assert image.levels == video.levels == 4
    assert image.width == video.width == module.llm.width
    names = [name for name, _ in module.named_parameters() if name.startswith("encoders.")]
    assert all(name.startswith("encoders.image.model.visual.") for name in names)
    image.to(torch.bfloat16)  # what videos are turned into, too
    assert image.input_dtype() == video.input_dtype() == torch.bfloat16


def initial_decoder(name: str, layers: range) -> HFDecoder:
    decoder = HFDecoder(zoo.KNOWN[name].config(), seed=3, attn_implementation=zoo.KNOWN[name].attention)
    decoder.materialize(layers, layers.start == 0, layers.stop == zoo.LAYERS)
    return decoder


@pytest.mark.parametrize("name", more_families.ALL)
def test_initial_weights_of_a_config_alone(name: str) -> None:
    """Those of a part are those of the whole; decoder and encoder have all that the library's model has."""
    config = zoo.KNOWN[name].config()
    encoder = HFVisionEncoder(config, seed=3, attn_implementation=zoo.KNOWN[name].attention)
    encoder.materialize()
    decoder = initial_decoder(name, range(zoo.LAYERS))
    known = {**decoder.state_dict(), **encoder.state_dict()}
    assert known.keys() == auto_class(config).from_config(config).state_dict().keys()
    assert not any(tensor.isnan().any() for tensor in known.values())  # limits that are not set are infinite
    seen: set[str] = set()
    for layers in (range(2), range(2, zoo.LAYERS)):
        part = initial_decoder(name, layers).state_dict()
        assert all(torch.equal(tensor, known[weight]) for weight, tensor in part.items())
        seen |= part.keys()
    assert seen == decoder.state_dict().keys()


@pytest.mark.parametrize("name", more_families.ALL)
def test_smallest_items_and_costs(name: str) -> None:
    """Ranks without items run a smallest one where weights lie in shards; costs are known without weights."""
    model = zoo.KNOWN[name]
    encoder = HFVisionEncoder(model.config(), attn_implementation=model.attention)
    costs = [encoder.forward_cost(rows).multiplications for rows in (4, 8)]
    assert 0 < costs[0] < costs[1]
    encoder.materialize()
    if FAMILIES[name].calls_vary:
        with pytest.raises(ValueError, match="run more often for some images than for others, so ranks"):
            encoder.smallest()
        return
    for one in encoders_of(encoder).values():
        rows = one([one.smallest()])
        assert len(rows) >= 1
        assert rows.isfinite().all()


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.update(changes)
    path.write_text(json.dumps(config))


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no config.json in .*nowhere"):
        MultimodalLM.from_pretrained(str(tmp_path / "nowhere"))


def test_a_missing_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.language_model.layers.2.mlp.up_proj.weight"], tensors["model.visual.pos_embed.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    module = MultimodalLM.from_pretrained(str(folder))
    with pytest.raises(ValueError, match=r"cannot load .* as a Qwen3VL.*visual.pos_embed.weight: missing"):
        module.configure_model()
    with pytest.raises(ValueError, match=r"layers.2.mlp.up_proj.weight: missing"):
        module.llm.materialize(range(5), True, True)
    HFDecoder(str(folder), weights=str(folder)).materialize([0, 1, 3], True, False)


def test_a_missing_shard(folder: Path) -> None:
    model = hf.AutoModelForImageTextToText.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="50KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    whole(folder)
    shards[1].unlink()
    with pytest.raises(ValueError, match=f"cannot load .*{shards[1].name}"):
        whole(folder)


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"cannot load .*model.safetensors"):
        whole(folder)


def test_another_models_config(tmp_path: Path) -> None:
    zoo.save("llama", tmp_path)
    edit_config(tmp_path / "llama", intermediate_size=56)
    with pytest.raises(ValueError, match=r"cannot load .* as a LlamaForCausalLM: .*up_proj"):
        whole(tmp_path / "llama")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (hf.IdeficsConfig(), "'idefics' cannot be cut into stages: .*cross-attention layers"),
        (hf.Gemma3nConfig(), "'gemma3n' cannot be cut into stages: embeddings of the tokens around its images"),
    ],
)
def test_families_that_cannot_work(config: Any, message: str, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        MultimodalLM.from_pretrained(str(tmp_path))


def test_linear_attention_refuses_packed_rows() -> None:
    config = hf.Qwen3NextConfig(hidden_size=32, num_hidden_layers=4, vocab_size=64, num_experts=4)
    llm = HFDecoder(config)
    ids = torch.ones(1, 6, dtype=torch.long)
    llm.prepare({"input_ids": ids, "position_ids": torch.arange(6)[None]})
    with pytest.raises(ValueError, match=r"'qwen3_next': layer 0 has a Conv1d, which cannot keep packed samples apart"):
        llm.prepare({"input_ids": ids, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])})


def test_two_way_images_refuse_packed_rows(tmp_path: Path) -> None:
    zoo.save("gemma3", tmp_path)
    batch = zoo.batch(zoo.MODELS["gemma3"], True, PipelineLayout())
    with pytest.raises(ValueError, match=r"both ways, by a mask that cannot keep packed samples apart"):
        whole(tmp_path / "gemma3").pipeline(batch)


def test_an_attention_that_is_not_there(tmp_path: Path) -> None:
    zoo.save("llama", tmp_path)
    for attention in ("flash_attention_2", "no_such"):
        with pytest.raises(ValueError, match=f"attn_implementation='{attention}' cannot be used"):
            MultimodalLM.from_pretrained(str(tmp_path / "llama"), attention)


@pytest.mark.parametrize("problem", ["missing", "short", "many"])
def test_grids_that_do_not_fit(problem: str, folder: Path) -> None:
    module = whole(folder)
    batch = zoo.batch(zoo.MODELS["qwen3_vl"], False, PipelineLayout())
    inputs = next(m.inputs for m in batch.microbatches if "image_grid_thw" in m.inputs)
    if problem == "missing":
        del inputs["image_grid_thw"]
    elif problem == "short":
        inputs["image_grid_thw"] = inputs["image_grid_thw"][:-1]
    else:
        inputs["image_grid_thw"] = inputs["image_grid_thw"].repeat(2, 1)
    message = "1 items more|2 items more|3 items more|4 items more" if problem == "many" else "do not fit the grids"
    with pytest.raises(ValueError, match=message):
        module.pipeline(batch)
