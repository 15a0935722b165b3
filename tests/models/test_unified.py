"""A model that reads and draws in one LLM: loss and gradients against the formulas written out, in one process and in a
pipeline; who sees whom; drawing."""

from functools import cache
from itertools import pairwise
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, rms_norm, scaled_dot_product_attention, silu
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding, apply_rotary_pos_emb

from bigmac_lightning.contracts.batch import Batch, MediaItem, Microbatch, PipelineLayout, TargetItem
from bigmac_lightning.contracts.growing_text import GrowingText
from bigmac_lightning.contracts.owners import assign_owners
from bigmac_lightning.models import (
    FlowGenerator,
    HFDecoder,
    LatentCodec,
    NoisyPictureEncoder,
    UnifiedDecoder,
    UnifiedLM,
    VelocityHead,
)
from bigmac_lightning.models.generation.flow import Draw
from bigmac_lightning.runtime.gradients import reduce_gradients
from bigmac_lightning.runtime.mesh import build_mesh
from bigmac_lightning.runtime.sharding import shard_like
from bigmac_lightning.schedule.request import ScheduleOptions
from bigmac_lightning.training.options import PipelineOptions, ShardingOptions
from bigmac_lightning.training.runner import PipelineRunner
from bigmac_lightning.training.stages import part_of
from tests.models import tiny, zoo
from tests.ranks import run_ranks
from tests.runtime.matrix import whole
from tests.toy import split_layers

WIDTH, LAYERS, DRAWN, SIDE = zoo.WIDTH, 4, 5, 2
CONFIG = {"model_type": "qwen3", **zoo.TEXT, "num_hidden_layers": LAYERS, "tie_word_embeddings": True}
DROPOUT = 0.388  # two of the four pictures lose their condition
GUIDED = {"condition_dropout": DROPOUT, "guidance_scale": 2.0}
NAMES = ("weight", "bias")
CODEC = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "latent_channels": 4,
    "norm_num_groups": 4,
}


def module(
    codec: bool = False,
    freeze: tuple[str, ...] = (),
    recomputes: bool = False,
    attention: str = "sdpa",
    **options: float,
) -> UnifiedLM:
    made = [LatentCodec(CODEC) if codec else None for _ in range(2)]
    encoder = NoisyPictureEncoder(WIDTH, patch_size=SIDE, codec=made[0])
    head = VelocityHead(WIDTH, patch_size=SIDE, codec=made[1])
    llm = UnifiedDecoder(CONFIG, DRAWN, attn_implementation=attention, gradient_checkpointing=recomputes)
    return UnifiedLM(llm, {"drawn": encoder}, {"picture": head}, steps=3, freeze=freeze, **options)


@cache
def weights(codec: bool = False) -> dict[str, Tensor]:
    """Random ones; those for drawing differ from the others."""
    alone = module(codec)
    alone.configure_model()
    generator = torch.Generator().manual_seed(1)
    made = {
        name: tensor if "codec" in name else tensor + 0.05 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in alone.state_dict().items()
    }
    return {**made, "llm.lm_head.weight": made["llm.model.embed_tokens.weight"]}


def load(made: UnifiedLM, codec: bool = False) -> UnifiedLM:
    made.configure_model()
    made.load_state_dict({name: shard_like(weights(codec)[name], own) for name, own in made.state_dict().items()})
    return made


def picture(seed: int, height: int, width: int) -> Tensor:
    return torch.randn(3, height, width, generator=torch.Generator().manual_seed(seed))


def batch(layout: PipelineLayout | None = None, patch: int = SIDE, data: bool = True, packed: bool = False) -> Batch:
    """Samples with a drawing and text after it, two drawings of other sizes, and text alone; two in a microbatch."""
    layout, microbatches, seed = layout or PipelineLayout(), list[Microbatch](), 0
    for sizes_of_rows in ([[(4, 6)], []], [[(4, 4), (2, 6)], [(2, 2)]], [[], []]):
        rows, made = list[list[int]](), Microbatch({"input_ids": torch.zeros(0)})
        labels, positions, S = list[int](), list[int](), 24
        for b, sizes in enumerate(sizes_of_rows):
            tokens, start = [7, 9 + b], sum(map(len, rows))
            for height, width in sizes:
                seed += 1
                number, shape = height * width // SIDE**2, (3, height * patch // SIDE, width * patch // SIDE)
                positions += range(start + len(tokens), start + len(tokens) + number)
                tokens += [DRAWN] * number + [11]
                image = picture(seed, *shape[1:]) if data else None
                made.media.append(MediaItem("drawn", number, data=image))
                made.targets.append(TargetItem("picture", number, shape, seed, data=image))
            labels += [start + len(tokens) + k for k in range(3)]
            tokens += [20 + b, 21, 22]
            rows.append(tokens + [0] * (0 if packed else S - len(tokens)))
        places = torch.cat([torch.arange(len(row)) for row in rows])
        made.inputs = {"input_ids": torch.tensor([token for row in rows for token in row]), "position_ids": places}
        made.inputs = {name: one.view(1 if packed else 2, -1) for name, one in made.inputs.items()}
        made.labels = made.inputs["input_ids"].flatten()[labels]
        made.label_positions = torch.tensor(labels) - 1
        made.media_positions = made.target_positions = torch.tensor(positions, dtype=torch.long)
        microbatches.append(made)
    assign_owners(microbatches, layout)
    for item in (item for m in microbatches for item in (*m.media, *m.targets)):
        item.data = item.data if layout.owns(item) else None
    return Batch(microbatches, layout)


# -- the formulas ------------------------------------------------------------------------------------------------------


def written_out(w: dict[str, Tensor], dropout: float) -> Tensor:
    """The loss of the batch, row by row."""
    given, text, velocity = batch(), list[Tensor](), list[Tensor]()
    for microbatch in given.microbatches:
        left = list(zip(microbatch.media, microbatch.targets, strict=True))
        for ids, labels in zip(microbatch.inputs["input_ids"], labels_by_row(microbatch), strict=True):
            drawn = ids == DRAWN
            h = w["llm.model.embed_tokens.weight"][ids].clone()
            runs = torch.nonzero(drawn & ~torch.cat([torch.tensor([False]), drawn[:-1]]))[:, 0].tolist()
            wanted, block, alone = [], torch.full(ids.shape, -1), torch.zeros_like(drawn)
            for number, start in enumerate(runs):
                item, target = left.pop(0)
                assert isinstance(item.data, Tensor)
                draw = Draw(target.seed, target.shape)
                noisy = (1 - draw.time) * item.data + draw.time * draw.noise
                h[start : start + item.rows] = features(w, noisy, draw.time)
                wanted.append((start, item.rows, cut(draw.noise - item.data)))
                block[start : start + item.rows] = number
                alone[start : start + item.rows] = Random(f"condition of {target.seed}").random() < dropout
            h = layers(w, h, drawn, block, alone)
            logits = linear(h, w["llm.model.embed_tokens.weight"])
            text.append(cross_entropy(logits[labels - 1], ids[labels], reduction="sum"))
            for start, rows, velocity_NE in wanted:
                made = linear(h[start : start + rows], *(w[f"generators.picture.linear.{n}"] for n in NAMES))
                velocity.append((made - velocity_NE).square().mean())
    return torch.stack(text).sum() / len(given.labels) + torch.stack(velocity).mean()


def labels_by_row(microbatch: Microbatch) -> list[Tensor]:
    places, length = microbatch.label_positions + 1, microbatch.shape[1]
    return [places[places // length == b] % length for b in range(2)]


def cut(x: Tensor) -> Tensor:
    patches = [
        x[:, i : i + SIDE, j : j + SIDE].flatten()
        for i in range(0, x.shape[1], SIDE)
        for j in range(0, x.shape[2], SIDE)
    ]
    return torch.stack(patches)


def uncut(patches: Tensor, shape: tuple[int, ...]) -> Tensor:
    columns = shape[2] // SIDE
    rows = [torch.cat(list(row.view(-1, 3, SIDE, SIDE)), dim=2) for row in patches.split(columns)]
    return torch.cat(rows, dim=1)


def features(w: dict[str, Tensor], noisy: Tensor, s: Tensor) -> Tensor:
    def of(name: str, x: Tensor) -> Tensor:
        return linear(x, w[f"encoders.drawn.layers.{name}.weight"], w[f"encoders.drawn.layers.{name}.bias"])

    angles = 1000 * s * torch.exp(-torch.log(torch.tensor(10000.0)) * torch.arange(32) / 32)
    time = of("time.linear_2", silu(of("time.linear_1", torch.cat([angles.cos(), angles.sin()])[None])))
    rows, columns = noisy.shape[1] // SIDE, noisy.shape[2] // SIDE
    omega = 1 / 10000 ** (torch.arange(WIDTH // 4, dtype=torch.float64) / (WIDTH / 4))

    def side(place: Tensor) -> Tensor:
        return torch.cat([(place[:, None] * omega).sin(), (place[:, None] * omega).cos()], 1)

    i, j = torch.arange(rows).repeat_interleave(columns).double(), torch.arange(columns).repeat(rows).double()
    places = torch.cat([side(j), side(i)], 1).float()
    return of("patches", cut(noisy)) + places + time


def layers(w: dict[str, Tensor], h: Tensor, drawn: Tensor, block: Tensor, alone: Tensor) -> Tensor:
    S = len(h)
    seen = torch.ones(S, S, dtype=torch.bool).tril() | ((block[:, None] == block) & drawn)
    seen &= ~drawn[None] | (block[:, None] == block)
    seen &= ~alone[:, None] | (block[:, None] == block)
    cos, sin = Qwen3RotaryEmbedding(HFDecoder(CONFIG).config)(h[None], torch.arange(S)[None])

    def both(name: str, apply: Any, x: Tensor) -> Tensor:
        made = [apply(x, w[f"llm.model.{name}.{kind}.weight"]) for kind in ("drawn", "others")]
        return torch.where(drawn.view(-1, *[1] * (x.ndim - 1)), *made)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight.shape, weight, 1e-6)

    for k in range(LAYERS):
        at = f"layers.{k}"
        x = both(f"{at}.input_layernorm", norm, h)
        q, key, value = (both(f"{at}.self_attn.{n}_proj", linear, x).unflatten(1, (-1, 8)) for n in "qkv")
        q, key = both(f"{at}.self_attn.q_norm", norm, q), both(f"{at}.self_attn.k_norm", norm, key)
        q, key, value = (part.transpose(0, 1)[None] for part in (q, key, value))
        q, key = apply_rotary_pos_emb(q, key, cos, sin)
        key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
        out = scaled_dot_product_attention(q, key, value, attn_mask=seen)[0].transpose(0, 1).flatten(1)
        h = h + both(f"{at}.self_attn.o_proj", linear, out)
        x = both(f"{at}.post_attention_layernorm", norm, h)
        gate, up = both(f"{at}.mlp.gate_proj", linear, x), both(f"{at}.mlp.up_proj", linear, x)
        h = h + both(f"{at}.mlp.down_proj", linear, silu(gate) * up)
    return both("norm", norm, h)


def drawn_by_hand(w: dict[str, Tensor], scale: float) -> list[Tensor]:
    """Each picture, in three steps from noise."""
    made, places = list[Tensor](), [*torch.linspace(1, 0.001, 3), torch.tensor(0.0)]
    for microbatch in batch().microbatches:
        left = list(microbatch.targets)
        for ids in microbatch.inputs["input_ids"]:
            drawn = ids == DRAWN
            first = drawn & ~torch.cat([torch.tensor([False]), drawn[:-1]])
            block = torch.where(drawn, first.cumsum(0) - 1, -1)
            count = int(first.sum())
            x, left = [Draw(target.seed, target.shape).noise for target in left[:count]], left[count:]
            for s, after in pairwise(places):
                h = w["llm.model.embed_tokens.weight"][ids].clone()
                for number, noisy in enumerate(x):
                    h[block == number] = features(w, noisy, s)
                of_text, free = (
                    linear(layers(w, h, drawn, block, alone), *(w[f"generators.picture.linear.{n}"] for n in NAMES))
                    for alone in (torch.zeros_like(drawn), drawn)
                )
                velocity = free + scale * (of_text - free)
                steps = [(after - s) * uncut(velocity[block == k], noisy.shape) for k, noisy in enumerate(x)]
                x = [noisy + step for noisy, step in zip(x, steps, strict=True)]
            made += x
    return made


@cache
def expected(dropout: float = 0.0) -> tuple[float, dict[str, Tensor]]:
    w = {name: tensor.clone().requires_grad_() for name, tensor in weights().items() if "lm_head" not in name}
    loss = written_out(w, dropout)
    loss.backward()
    return loss.item(), {name: tensor.grad for name, tensor in w.items() if tensor.grad is not None}


def check(loss: float, gradients: dict[str, Tensor | None], dropout: float = 0.0) -> None:
    wanted_loss, wanted = expected(dropout)
    assert loss == pytest.approx(wanted_loss, rel=1e-6)
    floor = 1e-3 * max(float(gradient.norm()) for gradient in wanted.values())
    for name, gradient in gradients.items():
        name = "llm.model.embed_tokens.weight" if name == "llm.lm_head.weight" else name
        assert gradient is not None, name
        error = float((gradient - wanted[name]).norm() / max(float(wanted[name].norm()), floor))
        assert error < 3e-6, f"{name}: {error:.1e}"


@pytest.mark.parametrize(
    ("packed", "recomputes", "dropout"), [(False, False, 0.0), (True, True, 0.0), (True, False, DROPOUT)]
)
def test_one_process(packed: bool, recomputes: bool, dropout: float) -> None:
    made = load(module(recomputes=recomputes, condition_dropout=dropout))
    out = made.pipeline(batch(packed=packed))
    out.loss.backward()
    check(out.loss.item(), {name: parameter.grad for name, parameter in made.named_parameters()}, dropout)


@pytest.mark.parametrize(("scale", "attention"), [(1.0, "sdpa"), (2.5, "eager")])
def test_drawing(scale: float, attention: str) -> None:
    """Each of three steps from noise, with guidance and without."""
    made = load(module(**{**GUIDED, "guidance_scale": scale}, attention=attention)).eval()
    with torch.no_grad():
        samples = made.pipeline(made.prepare(batch(data=False)), sample=True).samples
        assert samples is not None
        for one, other in zip(samples, drawn_by_hand(weights(), scale), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def _ranks(rank: int, size: int, encoders: Any, backbone: Any, freeze: Any, also: bool) -> Any:
    mesh = build_mesh(torch.device("cpu"), 1, size, range(size))
    made = module(freeze=freeze, recomputes=also, **GUIDED if also else {})
    made.part = part_of(rank, split_layers(LAYERS, size), range(size))
    load(made)
    schedule = ScheduleOptions(group_size=1, backbone=backbone)
    options = PipelineOptions(schedule, sharding=ShardingOptions(encoders=encoders))
    made.runner = PipelineRunner(made, mesh, options)
    out = made.pipeline(batch(made.runner.layout, packed=also))
    reduce_gradients(made.runner.places, mesh)
    found = {name: whole(parameter.grad) for name, parameter in made.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        drawn = made.eval().pipeline(batch(made.runner.layout, data=False, packed=also), sample=True).samples
    return out.loss.item(), found, drawn


@pytest.mark.parametrize(
    ("size", "sharded", "backbone", "freeze", "also"),
    [
        (2, "ddp", "1f1b", (), True),
        (3, "fsdp", "zb1p", ("llm",), False),
        pytest.param(2, "zero1", "zb1p", ("llm.*drawn*", "encoders"), True, marks=pytest.mark.wide),
    ],
)
def test_pipeline(size: int, sharded: str, backbone: str, freeze: tuple[str, ...], also: bool) -> None:
    """With parts that are not trained, a microbatch of text alone, and also packed rows and layers that run again."""
    alone = load(module(**GUIDED if also else {})).eval()
    with torch.no_grad():
        drawn = alone.pipeline(batch(data=False), sample=True).samples
    assert drawn is not None
    for loss, gradients, found in run_ranks(size, _ranks, size, sharded, backbone, freeze, also):
        assert gradients or freeze
        check(loss, gradients, DROPOUT if also else 0.0)
        for one, other in zip(drawn, found, strict=True):
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def test_a_codec_of_its_own() -> None:
    """Latents are half as large as pictures: the same tokens."""
    made = load(module(codec=True), codec=True)
    given = batch(patch=2 * SIDE)
    out = made.pipeline(given)
    out.loss.backward()
    assert all(p.grad is None for n, p in made.named_parameters() if "codec" in n)
    with torch.no_grad():
        drawn = made.eval().pipeline(batch(patch=2 * SIDE, data=False), sample=True).samples
    assert drawn is not None
    assert [tuple(one.shape) for one in drawn] == [target.shape for target in given.targets]


@pytest.mark.parametrize("packed", [False, True])
def test_who_sees_whom(packed: bool) -> None:
    """Text does not see what is drawn; a drawing sees the text before it, and all of itself. In a packed row a sample
    begins with a drawing, next to one of the sample before."""
    made = load(module()).eval()

    def hidden(change: int | None = None) -> Tensor:
        ids = torch.tensor([[7, 8, DRAWN, DRAWN, DRAWN, 9, 10, DRAWN]])
        positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]]) if packed else torch.arange(8)[None]
        inputs = made.llm.prepare({"input_ids": ids, "position_ids": positions})
        h = made.llm.embed(inputs)
        h = h + 0.1 * torch.arange(8)[None, :, None]
        if change is not None:
            h[0, change] += 1.0
        return made.llm.run_layers(h, inputs, range(LAYERS), {})[0]

    before = hidden()
    moved = {k: {i for i in range(8) if not torch.equal(before[i], hidden(k)[i])} for k in range(8)}
    assert moved[2] == moved[3] == ({2, 3} if packed else {2, 3, 4})
    assert moved[4] == ({4} if packed else {2, 3, 4})
    assert moved[0] == (set(range(4)) if packed else set(range(8)))
    assert moved[5] == {5, 6, 7}
    assert moved[7] == {7}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("gemma2", "other masks than those of full attention"),
        ("gemma4_text", "hand on more than hidden states"),
        ("olmoe", "cannot have two sets of weights: layer 0.mlp"),
        ("qwen3_next", "other masks|two sets of weights"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_decoders_that_are_refused(kind: str, message: str) -> None:
    config = tiny.tiny_config(kind, output_router_logits=False)
    with pytest.raises(ValueError, match=message):
        UnifiedDecoder(config, DRAWN, attn_implementation="eager" if kind == "gemma2" else "sdpa")


def test_a_target_without_its_picture() -> None:
    given = batch()
    given.microbatches[1].media.reverse()
    with pytest.raises(
        ValueError, match=r"microbatch 1: pictures of encoder 'drawn' have \[1, 3, 4\] tokens, and targets"
    ):
        module().prepare(given)


@pytest.mark.parametrize("other", [None, LatentCodec(CODEC, seed=1)], ids=["none", "other weights"])
def test_codecs_that_differ(other: LatentCodec | None) -> None:
    encoder = NoisyPictureEncoder(WIDTH, patch_size=SIDE, codec=LatentCodec(CODEC))
    head = VelocityHead(WIDTH, patch_size=SIDE, codec=other)
    with pytest.raises(ValueError, match=r"encoders\.drawn and generators\.picture need the same codec"):
        UnifiedLM(UnifiedDecoder(CONFIG, DRAWN), {"drawn": encoder}, {"picture": head})


def test_components_that_are_missing() -> None:
    generators = {"picture": FlowGenerator(WIDTH, config={"num_layers": 1})}
    with pytest.raises(ValueError, match="guidance_scale needs a model trained without conditions"):
        module(guidance_scale=2.0)
    with pytest.raises(ValueError, match="UnifiedLM needs a UnifiedDecoder, one NoisyPictureEncoder"):
        UnifiedLM(HFDecoder(CONFIG), {}, generators)  # pyright: ignore[reportArgumentType]


def prompts() -> list[Batch]:
    """Text alone, and text after a drawing, of which it sees nothing."""
    ids = torch.tensor([[7, 9, 12, *[DRAWN] * 4, 11, 8]])
    item, places = MediaItem("drawn", 4), torch.arange(3, 7)
    target = TargetItem("picture", 4, (3, 4, 4), 1)
    drawing = Microbatch({"input_ids": ids}, media=[item], media_positions=places, targets=[target])
    drawing.target_positions = places
    return [Batch([Microbatch({"input_ids": ids[:, :3]})]), Batch([drawing])]


def test_stages_keep_keys_of_their_own() -> None:
    """Also those without the first layer, behind a drawing."""
    llm = load(module()).eval().llm
    caches = {layers: llm.new_cache(layers) for layers in (range(1), range(1, LAYERS))}

    @torch.no_grad()
    def hidden(start: int, stop: int, caches: dict[range, Any]) -> Tensor:
        ids = torch.tensor([[7, 9, 12, *[DRAWN] * 4, 11, 8, 13, 14]])
        places = torch.arange(start, stop)[None]
        inputs = llm.prepare({"input_ids": ids[:, start:stop], "position_ids": places})
        h_BSD = llm.embed(inputs)
        for layers, kept in caches.items():
            with llm.using_cache(kept):
                h_BSD = llm.run_layers(h_BSD, inputs, layers, {})
        return h_BSD

    found = torch.cat([hidden(start, stop, caches) for start, stop in ((0, 9), (9, 10), (10, 11))], dim=1)
    torch.testing.assert_close(found, hidden(0, 11, {range(LAYERS): None}))
    assert [cache.get_seq_length() for cache in caches.values()] == [7, 7]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_text_is_the_same_with_kept_keys(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Token by token and logit by logit, after a drawing, too; and only the last token runs."""
    made = load(module(attention=attention)).eval()
    lengths, run = list[int](), UnifiedDecoder.run_layers

    def noted(llm: Any, h_BSD: Tensor, *further: Any) -> Tensor:
        lengths.append(h_BSD.shape[1])
        return run(llm, h_BSD, *further)

    def written() -> tuple[list[int], Tensor]:
        texts, logits = [GrowingText(prompt) for prompt in prompts()], list[Tensor]()

        def choose(number: int, logits_V: Tensor) -> int:
            logits.append(logits_V)
            return 20 + (int(logits_V.argmax()) + len(logits)) % 20  # so that texts do not repeat themselves

        return [token for _ in range(5) for token in made.write(texts, choose)], torch.stack(logits)

    made.llm.new_cache(range(LAYERS))
    monkeypatch.setattr(UnifiedDecoder, "run_layers", noted)
    tokens, logits = written()
    assert lengths == [3, 9, *[1] * 8]
    monkeypatch.setattr(UnifiedDecoder, "new_cache", lambda *_: None)
    expected = written()
    assert lengths[10:] == [3, 9, 4, 10, 5, 11, 6, 12, 7, 13]
    assert tokens == expected[0]
    torch.testing.assert_close(logits, expected[1], rtol=1e-5, atol=1e-5)
