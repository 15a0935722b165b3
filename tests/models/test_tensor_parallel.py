"""Decoders in slices on several ranks, against the same decoder in one process: loss and every gradient."""

import copy
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.distributed.tensor import DTensor

from bigmac_lightning.contracts.parallel import ParallelSizes, StagePeers
from bigmac_lightning.contracts.token_loss import token_loss
from bigmac_lightning.models import HFDecoder
from bigmac_lightning.models.lora import add_lora
from bigmac_lightning.runtime.gradients import unequal_gradients
from bigmac_lightning.runtime.split_backward import backward_input, backward_weight
from tests.models import divided, more_families, sweep, zoo
from tests.models.parts import decoder_config
from tests.ranks import run_ranks

MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ROUTED = {**MOE, "output_router_logits": True, "router_aux_loss_coef": 0.1}


def build(model_type: str = "qwen3", config: dict[str, Any] | None = None, **arguments: Any) -> Callable[[], HFDecoder]:
    @cache
    def made() -> HFDecoder:
        return HFDecoder(decoder_config(model_type, **{"num_hidden_layers": 2, **(config or {})}), **arguments)

    return lambda: copy.deepcopy(made())


def lora(*names: str) -> Callable[[HFDecoder], None]:
    options = {"r": 4, "lora_alpha": 16, "target_modules": list(names)}

    def add(llm: HFDecoder) -> None:
        found = [(name, m) for name, m in llm.named_modules() if name.rpartition(".")[2] in names]
        add_lora(llm, "llm", options, [name for name, m in found if isinstance(m, torch.nn.Linear)])

    return add


LATENT: dict[str, Any] = {
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "head_dim"), 8),
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}
PER_LAYER: dict[str, Any] = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 4,
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": 40,
    "hidden_size_per_layer_input": 6,
}
"""Of Gemma 3n and Gemma 4: the upper stage uses keys and values of the lower one."""
STREAMS: dict[str, Any] = {
    **PER_LAYER,
    "intermediate_size": [48] * 4,
    "activation_sparsity_pattern": [0.5, 0.0, 0.8, 0.0],
    "altup_num_inputs": 3,
    "laurel_rank": 8,
}
GLOBAL: dict[str, Any] = {
    **PER_LAYER,
    "num_key_value_heads": 4,
    "num_global_key_value_heads": 2,
    "global_head_dim": 16,
    "attention_k_eq_v": True,
    "use_double_wide_mlp": True,
    "final_logit_softcapping": 2.0,
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 24,
}
LINEAR = ("q_proj", "k_proj", "o_proj", "up_proj", "down_proj")
CASES: dict[str, tuple[Callable[[], HFDecoder], dict[str, Any]]] = {
    "qwen3": (build(), {}),
    "tied": (build(config={"tie_word_embeddings": True}), {}),
    "biases": (build(config={"attention_bias": True}), {}),
    "batch": (build("llama", {"attention_bias": True, "mlp_bias": True}), {}),
    "padding": (build(config={"pad_token_id": 20}), {}),  # the first token of the second slice
    "soft caps": (build("gemma2", {"query_pre_attn_scalar": 8}, attn_implementation="eager"), {}),
    "scaled logits": (build("cohere", {"logit_scale": 0.3}), {}),
    "experts": (build("qwen3_moe", ROUTED), {}),
    "checkpointing": (build("qwen3_moe", ROUTED, gradient_checkpointing=True), {}),
    "shared keys": (build("gemma4_text", GLOBAL), {}),
    "streams": (build("gemma3n_text", STREAMS, gradient_checkpointing=True), {}),
    "fused": (build(fused_loss=True), {"fused": True}),
    "fused, tied": (build(config={"tie_word_embeddings": True}, fused_loss=True), {"fused": True}),
    "adapters": (build(), {"adapters": lora(*LINEAR, "lm_head")}),
    "adapters, tied": (build(config={"tie_word_embeddings": True}), {"adapters": lora(*LINEAR)}),
    "adapters, checkpointing": (build(gradient_checkpointing=True), {"adapters": lora(*LINEAR)}),
    "adapters, latent attention": (build("deepseek_v2", LATENT), {"adapters": lora("kv_a_proj_with_mqa", "kv_b_proj")}),
}


def _cases(rank: int, names: list[str]) -> dict[str, dict[str, float]]:
    peers = divided.tensor_peers(2)
    return {name: divided.wrong_of(CASES[name][0], peers, **CASES[name][1]) for name in names}


def test_against_one_process() -> None:
    for found in run_ranks(2, _cases, list(CASES)):
        assert not any(found.values()), found


# -- the halves of a backward ------------------------------------------------------------------------------------------


def _halves(rank: int) -> dict[str, dict[str, float]]:
    """The errors of the upper stage's gradients, and of its input's, after a backward in two halves."""
    peers, found = divided.tensor_peers(2), {}
    for name in ("qwen3", "experts", "checkpointing", "fused", "adapters", "soft caps"):
        built, more = CASES[name]
        changes = [change for change in more.values() if callable(change)]
        llm = divided.one_process(built, **{str(k): change for k, change in enumerate(changes)})
        weights = {n: t.detach().clone() for n, t in llm.state_dict().items()}
        gradients = []
        for stage in (
            llm,
            divided.stages_of(built, peers, weights, **{str(k): c for k, c in enumerate(changes)})[1][0],
        ):
            splits: dict[Any, Any] = {}
            taken: dict[str, Tensor] = {}
            for microbatch, inputs in enumerate(divided.batches(llm)):
                generator = torch.Generator().manual_seed(microbatch)
                length = inputs["input_ids"].shape[1]
                h = torch.randn(1, length, llm.width, generator=generator, requires_grad=True)
                extras = {"router": torch.rand(2, 4, generator=generator)} if llm.auxiliary_losses else {}
                loss = divided.loss_of([(stage, range(1, 2))], {**inputs, "h": h}, "fused" in more, extras)
                if stage is llm:
                    loss.backward()
                else:
                    deferred = backward_input([get_gradient_edge(loss)], [None], [h], splits, 1)
                    assert (deferred is None) == (name == "checkpointing")
                    if deferred is not None:
                        assert all(p.grad is None for p in stage.parameters()) or microbatch
                        backward_weight(deferred)
                taken[f"input {microbatch}"] = h.grad if h.grad is not None else torch.empty(0)
            gradients.append({**divided.whole_gradients([(stage, range(0))], llm.tied), **taken})
        found[name] = {n: e for n, e in divided.errors(gradients[1], gradients[0]).items() if not e <= 5e-6}
    return found


def test_halves_of_a_backward() -> None:
    for found in run_ranks(2, _halves):
        assert not any(found.values()), found


# -- weights -----------------------------------------------------------------------------------------------------------


IN_SLICES = ("qwen3", "qwen3_moe", "gemma2")


def _made_in_slices(rank: int, folder: Path, source: bool) -> dict[str, bool]:
    """Whether each weight that is made in slices is the one that is made whole; it has no more memory than it needs."""
    peers, equal = divided.tensor_peers(2), {}
    both = StagePeers(tensor=peers.tensor, expert=peers.tensor, experts_see_same_tokens=True)
    for name in IN_SLICES:
        for dtype in ("float32", "bfloat16") if name == "qwen3_moe" else ("float32",):
            for here in (peers, both) if name == "qwen3_moe" else (peers,):
                arguments: dict[str, Any] = {"dtype": dtype, "attn_implementation": "eager"}
                if source:
                    arguments["weights"] = str(folder / name)
                whole, part = (HFDecoder(zoo.MODELS[name].config(), **arguments) for _ in range(2))
                whole.materialize(range(zoo.LAYERS), True, True)
                part.materialize(range(zoo.LAYERS), True, True, here)
                expected = whole.state_dict()
                assert part.state_dict().keys() == expected.keys()
                for weight, tensor in part.state_dict().items():
                    assert tensor.dtype == expected[weight].dtype
                    if isinstance(tensor, DTensor):
                        local = tensor.to_local()
                        assert local.untyped_storage().nbytes() == local.nbytes
                        assert local.numel() * 2 == tensor.numel()
                        tensor = tensor.full_tensor()
                    equal[f"{name} {dtype} {weight}"] = torch.equal(tensor, expected[weight])
                sliced = {weight for weight, tensor in part.state_dict().items() if isinstance(tensor, DTensor)}
                part.parallelize(here)
                assert sliced == {weight for weight, tensor in part.state_dict().items() if isinstance(tensor, DTensor)}
                assert len(list(part.parameters())) == len(list(whole.parameters()))  # tied ones are one
    return equal


@pytest.mark.parametrize("source", [False, True], ids=["drawn", "read"])
def test_weights_are_made_in_slices(source: bool, tmp_path: Path) -> None:
    for name in IN_SLICES:
        zoo.save(name, tmp_path)
    for equal in run_ranks(2, _made_in_slices, tmp_path, source):
        assert len(equal) > 200
        assert all(equal.values()), [name for name, same in equal.items() if not same]


# -- logits ------------------------------------------------------------------------------------------------------------


def _logits(rank: int) -> None:
    for name in ("qwen3", "soft caps", "scaled logits"):
        whole = divided.one_process(CASES[name][0])
        weights = {n: t.detach() for n, t in whole.state_dict().items()}
        last, _ = divided.stages_of(CASES[name][0], divided.tensor_peers(2), weights)[1]
        h_LD = torch.randn(7, whole.width, generator=torch.Generator().manual_seed(1))
        h_LD[3] = 0.0  # all logits are equal
        labels = torch.tensor([0, 19, 20, 39, 5, 25, 3])
        assert torch.allclose(last.logits(h_LD), whole.logits(h_LD), atol=1e-6)
        (loss, predicted), (expected, likeliest) = (llm.text_loss(h_LD, labels, True) for llm in (last, whole))
        assert predicted is not None
        assert likeliest is not None
        assert torch.allclose(loss, expected)
        assert predicted.tolist() == likeliest.tolist()
        assert last.text_loss(h_LD, labels, False)[1] is None
        leaves = [h_LD.clone().requires_grad_() for _ in range(3)]
        own = last._division.vocabulary
        assert own is not None
        of_slice = partial(divided.slice_of_logits, last)
        token_loss(of_slice, leaves[0], labels, own.size, False, 2 * own.size, own.loss)[0].backward()  # in 4 chunks
        last.text_loss(leaves[1], labels, False)[0].backward()
        whole.text_loss(leaves[2], labels, False)[0].backward()
        for leaf in leaves[:2]:
            assert sweep._error(leaf.grad, leaves[2].grad) < 1e-6


def test_logits_and_predictions() -> None:
    run_ranks(2, _logits)


def _half_precision(rank: int) -> dict[str, tuple[float, float]]:
    """The errors of the gradients in bfloat16, of two ranks and of one process, against single precision."""
    found, peers = {}, divided.tensor_peers(2)
    for name, dtype, autocast in (
        ("qwen3", "bfloat16", False),
        ("experts", "bfloat16", False),
        ("fused", "float32", True),
    ):
        built, more = CASES[name]
        exact = divided.one_process(built)
        weights = {n: t.detach() for n, t in exact.state_dict().items()}
        layers = range(exact.num_layers)
        runs: list[list[tuple[HFDecoder, range]]] = [[(exact, layers)]]

        def lower(llm: HFDecoder, dtype: str = dtype) -> None:
            llm.to(getattr(torch, dtype))

        alone = divided.one_process(built, dtype=lower)
        alone.load_state_dict(weights)
        runs += [[(alone, layers)], divided.stages_of(built, peers, weights, dtype=lower)]
        gradients = []
        for k, stages in enumerate(runs):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast and k > 0):
                loss = divided.loss_of(stages, divided.batches(exact)[0], "fused" in more)
            loss.backward()
            gradients.append(divided.whole_gradients(stages, {}))
        one, two = (torch.tensor(list(divided.errors(g, gradients[0]).values())) for g in gradients[1:])
        found[name] = float(one.mean()), float(two.mean())
    return found


def test_half_precision() -> None:
    for found in run_ranks(2, _half_precision):
        for one, two in found.values():
            assert 1e-4 < two < 1.5 * one


# -- vision-language models --------------------------------------------------------------------------------------------


def _vision(rank: int, names: list[str]) -> dict[str, dict[str, float]]:
    sweep_change = divided.tensor_peers(2)
    return {name: sweep.vision_language(name, lambda part: part.parallelize(sweep_change)).wrong for name in names}


def test_vision_language_models() -> None:
    """Deepstack features, M-RoPE, packed rows, experts; layers that attend to images."""
    for found in run_ranks(2, _vision, ["qwen3_vl_moe", "mllama"]):
        assert not any(found.values()), found


@pytest.mark.wide
@pytest.mark.timeout(1200)
def test_all_vision_language_models() -> None:
    """Each family is exact, or refused by name."""
    whole = {name: HFDecoder(m.config(), attn_implementation=m.attention) for name, m in more_families.ALL.items()}
    names = [name for name, llm in whole.items() if not llm.why_not_parallel(ParallelSizes(tensor=2))]
    for found in run_ranks(2, _vision, names, timeout=1200):
        assert not any(found.values()), found


@pytest.mark.wide
@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("expert", ["", "same", "both", "different"])
def test_all_decoders(expert: str) -> None:
    """Each decoder of the library is exact, or refused by name."""
    for verdicts in run_ranks(2, divided.all_verdicts, sweep.DECODERS, expert, timeout=1800):
        assert not {name: text for name, text in verdicts.items() if text.startswith(("WRONG", "FAILED"))}


# -- plans that leave something out ------------------------------------------------------------------------------------


def _left_out(rank: int) -> tuple[list[str], list[str]]:
    found = []
    for leave_out in (False, True):

        def built(leave_out: bool = leave_out) -> HFDecoder:
            llm = build()()
            if leave_out:
                plan = llm._division.tensor_plan
                llm._division.tensor_plan = {n: s for n, s in plan.items() if "layers.1.self_attn.k_norm" not in n}
            return llm

        peers = divided.tensor_peers(2)
        weights = {n: t.detach() for n, t in divided.one_process(built).state_dict().items()}
        stages = divided.stages_of(built, peers, weights)
        divided.loss_of(stages, divided.batches(stages[0][0])[0]).backward()
        assert peers.tensor is not None
        group = peers.tensor.get_group()
        cpu = torch.device("cpu")
        found.append(
            [name for llm, _ in stages for name in unequal_gradients(dict(llm.named_parameters()), group, cpu)]
        )
    return found[0], found[1]


def test_parts_of_gradients_are_found() -> None:
    for well, left_out in run_ranks(2, _left_out):
        assert well == []
        assert left_out == ["model.layers.1.self_attn.k_norm.weight"]


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("built", "size", "text"),
    [
        (build("stablelm"), 2, "'stablelm' has no plan for it in transformers (base_model_tp_plan): leave tensor out"),
        (
            build(),
            3,
            "has 32 rows in model.layers.0.self_attn.q_proj.weight: choose a number of tensor ranks that divides it",
        ),
        (build(config={"intermediate_size": 50}), 4, "has 50 rows in model.layers.0.mlp.gate_proj.weight: choose"),
        (build(), 4, "has num_key_value_heads = 2: choose a number of tensor ranks that divides it"),
        (
            build(config={"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 16}),
            2,
            "num_attention_heads = 3",
        ),
        (build(config={"vocab_size": 41}), 2, "has a vocabulary of 41 tokens: choose a number of tensor ranks"),
        (
            build("gpt_oss", attn_implementation="eager"),
            2,
            "has a plan in transformers that cuts no layer: leave tensor out",
        ),
        (build("doge"), 2, "has a plan in transformers, but one that does not fit its attention: leave tensor out"),
        (build("olmo", {"clip_qkv": 2.0}), 2, "set clip_qkv to null in the config"),
        (build(config={"attention_dropout": 0.1}), 2, "layers.0.self_attn.attention_dropout = 0.1, but ranks that"),
        (build("phi", {"resid_pdrop": 0.2}), 2, "layers.0.resid_dropout.p = 0.2, but ranks that"),
    ],
)
def test_refusals(built: Callable[[], HFDecoder], size: int, text: str) -> None:
    llm = built()
    found = llm.why_not_parallel(ParallelSizes(tensor=size))
    assert text in found
    assert found.startswith(f"tensor={size}: model_type ")
    assert all(parameter.is_meta for parameter in llm.parameters())
    assert llm.why_not_parallel(ParallelSizes()) == ""


def _dropout(rank: int) -> str:
    llm = build()()
    llm.materialize(range(2), True, True)
    add_lora(
        llm, "llm", {"r": 2, "target_modules": ["q_proj"], "lora_dropout": 0.1}, ["model.layers.0.self_attn.q_proj"]
    )
    try:
        llm.parallelize(divided.tensor_peers(2))
    except ValueError as problem:
        return str(problem)
    return ""


def test_dropout_of_adapters_is_refused() -> None:
    assert all(text.startswith("lora_dropout: ranks") for text in run_ranks(2, _dropout))


def test_liger_is_refused() -> None:
    pytest.importorskip("liger_kernel")
    assert "use fused_loss=True" in build(fused_loss="liger")().why_not_parallel(ParallelSizes(tensor=2))
