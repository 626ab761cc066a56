"""Every router × KV policy × sharing as a tiny model, for tests that must hold for all of them.

MEGAMOR_ROUTER=module:Class adds your own router as "custom"; MEGAMOR_ROUTER_OPTIONS gives its options as a JSON object
(docs/routers.md).
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor

from megamor.config import (
    Config,
    CustomRouterConfig,
    DataConfig,
    EmaThresholdConfig,
    ExpertChoiceConfig,
    FixedDepthConfig,
    HaltingConfig,
    LearnedThresholdConfig,
    ModelConfig,
    MonotoneConfig,
    PonderNetConfig,
    RandomConfig,
    RecursionConfig,
    RouterConfig,
    SkipForwardRecurseConfig,
    StageConfig,
    TokenChoiceConfig,
    TrainConfig,
)
from megamor.config.schema import Sharing
from megamor.model import Transformer, build_model

VOCAB, SEQ_LEN, BATCH = 97, 24, 3

ROUTERS: dict[str, RouterConfig] = {
    "fixed": FixedDepthConfig(),
    "fixed_2_of_3": FixedDepthConfig(depth=2),
    "expert_choice": ExpertChoiceConfig(),
    "expert_choice_mlp_tanh": ExpertChoiceConfig(head="mlp", activation="tanh"),
    "expert_choice_aux_router": ExpertChoiceConfig(sampling="aux_router"),
    "expert_choice_additive": ExpertChoiceConfig(gating="additive", activation="none", head="wide_mlp"),
    "token_choice": TokenChoiceConfig(),
    "token_choice_loss_free": TokenChoiceConfig(activation="sigmoid", alpha=0.1, balancing="loss_free"),
    "ema_threshold": EmaThresholdConfig(),
    "learned_threshold": LearnedThresholdConfig(),
    "learned_threshold_target": LearnedThresholdConfig(gating="additive", head="mlp", target_depth=1.8),
    "random": RandomConfig(),
    "skip_forward_recurse": SkipForwardRecurseConfig(hidden=16),
    "skip_forward_recurse_attention": SkipForwardRecurseConfig(
        hidden=8, gate="attention", routers="per_recursion", inference_threshold=0.3, recursion_rate=0.3
    ),
    "skip_forward_recurse_sequence": SkipForwardRecurseConfig(hidden=8, granularity="sequence", recursion_input=True),
    "act_hard": HaltingConfig(mode="hard"),
    "act_soft": HaltingConfig(mode="soft"),
    "monotone": MonotoneConfig(),
    "pondernet": PonderNetConfig(),
}
if "MEGAMOR_ROUTER" in os.environ:
    ROUTERS["custom"] = CustomRouterConfig(
        target=os.environ["MEGAMOR_ROUTER"], options=json.loads(os.environ.get("MEGAMOR_ROUTER_OPTIONS", "{}"))
    )
SERVED_ROUTERS = [name for name in ROUTERS if not name.endswith("sequence")]
"""Those that the serving engine doesn't refuse."""
KV_POLICIES: tuple[str, ...] = ("recursion_wise", "share_first", "hybrid", "halted_reuse")
REPRESENTATIVES = ("fixed", "expert_choice", "token_choice", "skip_forward_recurse", "act_hard", "monotone", "custom")
"""Routers that are tested with everything by default. Of the others, combinations with `halted_reuse` and with
`RARE_SHARINGS` are slow tests (tests/conftest.py)."""
RARE_SHARINGS = ("cycle", "sequence", "middle_sequence")
SHARINGS: tuple[str, ...] = tuple(s for s in get_args(Sharing) if s != "none")
STRUCTURES = (*SHARINGS, "stages")
"""All sharings of one stage, and several stages."""


def tiny_config(router: RouterConfig, kv_policy: str = "recursion_wise", sharing: str = "middle_cycle") -> Config:
    """Three recursions of two shared blocks (and two unshared ones in the middle sharings)."""
    if sharing == "stages":
        return staged_config(router, kv_policy)
    num_layers = 8 if sharing.startswith("middle") else 6
    recursion: Any = RecursionConfig(3, sharing, kv_policy)  # type: ignore[arg-type]
    return Config(
        model=ModelConfig(
            vocab_size=VOCAB,
            dim=32,
            num_layers=num_layers,
            num_heads=4,
            num_kv_heads=2,
            ffn_dim=64,
            max_seq_len=SEQ_LEN,
        ),
        recursion=recursion,
        router=router,
        data=DataConfig(seq_len=SEQ_LEN),
        train=TrainConfig(max_steps=10),
    )


def staged_config(router: RouterConfig, kv_policy: str = "recursion_wise") -> Config:
    """Layers 0, 2 + 3 and 4 are stages of different recursions and sharings; the last has another router."""
    base = tiny_config(router, kv_policy)
    second = StageConfig(first_layer=2, num_layers=2, num_recursions=2, sharing="sequence")
    if isinstance(router, FixedDepthConfig) and router.depth:
        second = replace(second, num_recursions=3)
    last = StageConfig(first_layer=4, kv_policy="share_first", router=TokenChoiceConfig(), separate_norms=True)
    recursion = replace(base.recursion, sharing="none", router_layers=(0,), stages=(second, last))
    return replace(base, model=replace(base.model, num_layers=6), recursion=recursion)


def vanilla_config(num_layers: int = 8) -> Config:
    """The same width without recursion."""
    config = tiny_config(FixedDepthConfig())
    return replace(config, model=replace(config.model, num_layers=num_layers), recursion=RecursionConfig())


def lively_model(config: Config, seed: int = 0, dtype: torch.dtype = torch.float64) -> Transformer:
    """A model with weights so large that an error in any component changes the output; fp64 by default."""
    model = build_model(config, seed=seed).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(20 if "router" in name else 6)
        for name, buffer in model.named_buffers():
            if name.endswith("router.shift"):
                buffer.fill_(0.5)  # of a target
    return model


def fitted(model: Transformer, steps: int, lr: float = 3e-3, batch: int = 8) -> Any:
    """Train on one batch, with Adam and all losses; returns the `ModelOutput` of the last step, before its update."""
    ids, optimizer = tokens(batch=batch, length=SEQ_LEN + 1), torch.optim.Adam(model.parameters(), lr=lr)
    for step in range(steps):
        optimizer.zero_grad()
        out = model(ids[:, :-1], ids[:, 1:], step=step)
        (out.loss_sum / out.num_tokens + sum(out.router_losses.values())).backward()
        optimizer.step()
    return out


def tokens(seed: int = 0, batch: int = BATCH, length: int = SEQ_LEN) -> Tensor:
    """Random token ids [batch, length]."""
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))
