"""The paper's FLOPs accounting reproduces its figures and step counts; the complete one those of docs/numbers.md.

Figures are of the 360M base at 2,048 tokens (arXiv 2507.10524, appendix on FLOPs).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megamor.config import Config, load_config
from megamor.config.segments import segments
from megamor.model import ModelOutput, build_model
from megamor.model.flops import executed_flops, nominal_flops, nominal_work
from tests.combinations import BATCH, ROUTERS, SEQ_LEN, tiny_config, tokens, vanilla_config

CONFIGS = Path(__file__).parents[2] / "configs"
SHARE = "recursion.kv_policy=share_first"

# Model and overrides -> GFLOP of one sequence's forward pass, counted as the paper counts.
PUBLISHED = {
    ("360m",): 1707.25,
    ("360m_rec3",): 1707.25,
    ("360m_mor2",): 1276.91,
    ("360m_mor3",): 1137.69,
    ("360m_mor4",): 1133.47,
    ("360m_mor3", SHARE): 1098.01,
}
# GFLOP and fraction of vanilla, counting grouped queries, causal attention, head and router.
HONEST = {
    ("360m",): (1739.59, 1.0),
    ("360m_mor2",): (1346.98, 0.774),
    ("360m_mor3",): (1220.35, 0.702),
    ("360m_mor4",): (1216.11, 0.699),
    ("360m_mor3", SHARE): (1230.99, 0.708),
}
# Optimizer steps of the published runs.
STEPS = {
    ("vanilla_360m",): 9438,
    ("mor_360m_nr2",): 12619,
    ("mor_360m",): 14161,
    ("mor_360m_nr4",): 14216,
    ("mor_360m", SHARE): 14672,
}
BUDGET = 16.5e18
OPS = ((), ("sdpa",), ("mm",), ("sdpa", "mm"), ("silu",))


def model_config(name: str, *overrides: str) -> Config:
    return load_config(CONFIGS / "model" / f"{name}.yaml", ["train.max_steps=1000", *overrides])


def paper_flops(config: Config) -> float:
    """Forward FLOPs of one sequence as the paper counts them: keys and values at full width, no embedding, head or
    router (appendix on FLOPs)."""
    model, seq_len = config.model, config.data.seq_len
    unshared, core = (sum(s.num_blocks for s in segments(config) if bool(s.schedule) == x) for x in (False, True))
    dim, ffn = model.dim, 3 * model.dim * model.ffn_dim
    total = unshared * (2.0 * seq_len * (4 * dim**2 + ffn) + 2 * dim * seq_len**2)
    for recursion, (length, _) in enumerate(nominal_work(config, 1)):
        shared = recursion > 0 and config.recursion.kv_policy == "share_first"
        projections, keys = (2, seq_len) if shared else (4, length)
        total += core * (2 * length * (projections * dim**2 + ffn) + 2 * dim * length * keys)
    return total


@pytest.mark.parametrize("model", PUBLISHED, ids=" ".join)
def test_paper_accounting(model: tuple[str, ...]) -> None:
    assert round(paper_flops(model_config(*model)) / 1e9, 2) == PUBLISHED[model]


@pytest.mark.parametrize("model", HONEST, ids=" ".join)
def test_complete_accounting(model: tuple[str, ...]) -> None:
    gflop, fraction = HONEST[model]
    flops = nominal_flops(model_config(*model))
    assert round(flops.forward / 1e9, 2) == gflop
    assert round(flops.forward / nominal_flops(model_config("360m")).forward, 3) == fraction
    assert flops.training == 3 * flops.forward


@pytest.mark.parametrize("recipe", STEPS, ids=" ".join)
def test_published_steps_spend_the_same_compute(recipe: tuple[str, ...]) -> None:
    """Exact where capacities are whole tokens; at Nr = 3 (thirds, rounded down) within 3 steps."""
    config = load_config(CONFIGS / f"{recipe[0]}.yaml", recipe[1:])
    steps = BUDGET / (config.train.global_batch_size * paper_flops(config))
    assert steps == pytest.approx(STEPS[recipe], abs=3 if config.recursion.num_recursions == 3 else 0.5)


def count_forward_and_backward(config: Config) -> tuple[ModelOutput, float]:
    """A step's output and torch's count of its FLOPs, with only the causal half of attention.

    Attention's backward pass isn't counted; only recomputation makes a difference here.
    """
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def causal_half(query: torch.Size, key: torch.Size, *_: object, **__: object) -> int:
        batch, heads, length, dim = query
        assert key[2] == length
        return 4 * batch * heads * dim * length * (length + 1) // 2

    model, ids = build_model(config), tokens(length=SEQ_LEN + 1)
    model.set_activation_checkpointing(config.train.activation_checkpointing, config.train.selective_ops)
    with FlopCounterMode(display=False, custom_mapping={attention: causal_half}) as counter:
        out = model(ids[:, :-1], ids[:, 1:])
        (out.loss_sum / out.num_tokens + sum(out.router_losses.values())).backward()
    return out, counter.get_total_flops()


@pytest.mark.parametrize("lora_rank", [0, 3])
@pytest.mark.parametrize("router", ["vanilla", "fixed", "expert_choice"])
def test_recomputed_flops_are_the_profilers(router: str, lora_rank: int) -> None:
    """Exactly equal, because both count the same matrix products."""
    base = vanilla_config() if router == "vanilla" else tiny_config(ROUTERS[router])
    if router != "vanilla":
        base = replace(base, recursion=replace(base.recursion, lora_rank=lora_rank))
    _, without = count_forward_and_backward(base)
    policies = [("recursion", ()), ("block", ()), *(("selective", ops) for ops in OPS)]
    seen = set()
    for policy, ops in policies:
        train = replace(base.train, activation_checkpointing=policy, selective_ops=ops)
        out, profiled = count_forward_and_backward(replace(base, train=train))
        work = [] if out.work is None else [(n, pairs) for n, pairs in out.work.tolist()]
        assert profiled - without == executed_flops(base, BATCH, work).recomputed(train), (policy, ops)
        seen.add(profiled)
    assert len(seen) >= 4


def test_recomputation_is_apart() -> None:
    config = model_config("360m_mor3")
    flops = nominal_flops(config)

    def recomputed(**train: Any) -> float:
        return flops.recomputed(replace(config.train, **train))

    assert recomputed() == 0
    assert (
        recomputed(activation_checkpointing="block") < recomputed(activation_checkpointing="recursion") < flops.blocks
    )
    assert recomputed(activation_checkpointing="block", compile=True) == flops.blocks
    assert recomputed(activation_checkpointing="selective") == 0, "projections and attention are kept"


@pytest.mark.parametrize(
    "router", ["expert_choice", "expert_choice_mlp_tanh", "expert_choice_aux_router", "token_choice", "act_soft"]
)
def test_routers_cost_what_their_layers_multiply(router: str) -> None:
    """The sum of 2 · rows · weights over all calls of a router's layers in one pass."""
    config = tiny_config(ROUTERS[router])
    model, products = build_model(config), list[int]()
    assert model.stage is not None
    for module in model.stage.router.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(
                lambda layer, args, _: products.append(2 * len(args[0]) * layer.weight.numel())
            )
    out = model(tokens(), tokens())
    assert out.work is not None
    biases = 2 * BATCH * SEQ_LEN * 3 if router == "act_soft" else 0  # a head with a bias counts as one weight more
    assert executed_flops(config, BATCH, out.work.tolist()).routers == sum(products) + biases
