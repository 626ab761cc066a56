"""Reference cases: outputs and gradients of the paper authors' model, with their settings mapped to a config.

The directory (MEGAMOR_FIXTURES, default ../shared/fixtures) holds `meta.json` and one safetensors file per case; its
README lists the tensors. Any directory of that form works.
"""

from __future__ import annotations

import json
import os
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from megamor.config import Config, config_from_dict
from megamor.model import Transformer, build_model

DIRECTORY = Path(os.environ.get("MEGAMOR_FIXTURES", Path(__file__).parents[3] / "shared" / "fixtures"))

LAYER_NAMES = {
    "ln1": "attention_norm",
    "q": "attention.q_proj",
    "k": "attention.k_proj",
    "v": "attention.v_proj",
    "o": "attention.o_proj",
    "ln2": "ffn_norm",
    "gate": "ffn.gate_proj",
    "up": "ffn.up_proj",
    "down": "ffn.down_proj",
}


class Case:
    """One reference case."""

    def __init__(self, name: str, meta: dict[str, Any]) -> None:
        self.name = name
        self.meta = meta

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Inputs and expected outputs."""
        return load_file(DIRECTORY / f"{self.name}.safetensors")

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """Weights by their reference names."""
        return load_file(DIRECTORY / self.meta["weights"])

    @property
    def settings(self) -> dict[str, Any]:
        """Run settings of the released code; empty for vanilla."""
        return self.meta.get("cfg") or {}

    @property
    def warmup_step(self) -> int:
        """Training step within the capacity warm-up, if the case's note states one."""
        note = self.meta.get("note", "")
        return int(note.split("incremented to ")[1].split()[0]) if "incremented to " in note else 0

    def parameter_name(self, reference: str) -> str:
        """The name of a reference weight in megamor."""
        parts = reference.split(".")
        if parts[0] in ("embed", "norm"):
            return reference
        if parts[0] == "token_router":
            return ".".join(["stage.router.head", *parts[1:]])
        if parts[0] == "router":
            return ".".join(["stage.router.heads", *parts[1:]])
        if parts[0] == "aux_router":
            return ".".join(["stage.router.aux_router", *parts[1:]])
        prefix, rest = {
            "layer": (f"prelude.{parts[1]}", parts[2:]),
            "block": (f"stage.blocks.{parts[1]}", parts[2:]),
            "first": ("prelude.0", parts[1:]),
            "last": ("coda.0", parts[1:]),
        }[parts[0]]
        return ".".join([prefix, LAYER_NAMES[rest[0]], *rest[1:]])

    def config(self) -> Config:
        """The megamor config of this case."""
        embed = self.weights["embed.weight"]
        q, k, up = (next(w for n, w in self.weights.items() if n.endswith(f".{x}.weight")) for x in ("q", "k", "up"))
        head_dim = 8
        kind, mor = self.meta["kind"], self.settings.get("mor", {})
        sections: dict[str, Any] = {
            "model": {
                "vocab_size": embed.shape[0],
                "dim": embed.shape[1],
                "num_layers": self.meta["layers_effective"],
                "num_heads": q.shape[0] // head_dim,
                "num_kv_heads": k.shape[0] // head_dim,
                "ffn_dim": up.shape[0],
                "max_seq_len": self.tensors["input_ids"].shape[1],
            },
            "data": {"seq_len": self.tensors["input_ids"].shape[1]},
            "train": {"max_steps": 100, "global_batch_size": 2, "micro_batch_size": 2},
            "optim": {"warmup_steps": 0},
        }
        if kind != "vanilla":
            sections["recursion"] = {
                "num_recursions": self.meta["num_recursion"],
                "sharing": self.meta["sharing"],
                "kv_policy": kv_policy(self.settings["kv_sharing"]),
            }
        if kind == "mor":
            warmup = self.settings.get("num_warmup_steps", 0) * self.settings.get("gradient_accumulation_steps", 1)
            router = token_choice(mor) if mor["type"] == "token" else expert_choice(mor, warmup)
            sections["router"] = router | {"head": self.head_kind(mor["router_type"])}
        return config_from_dict(sections)

    def head_kind(self, named: str) -> str:
        """The router network's name in megamor, from the width of its hidden layer."""
        hidden = [w.shape for name, w in self.weights.items() if "router" in name and name.endswith("fc1.weight")]
        if not hidden:
            return named
        return {2: "mlp", 4: "wide_mlp"}[hidden[0][0] // hidden[0][1]]

    def model(self) -> Transformer:
        """megamor's model with this case's weights, copied by name."""
        model = build_model(self.config())
        state = model.state_dict()
        loaded = {self.parameter_name(name): weight for name, weight in self.weights.items()}
        if "router_bias" in self.tensors:
            loaded["stage.router.bias"] = self.tensors["router_bias"].flatten()
        missing = set(state) - set(loaded) - {"stage.router.bias"}
        assert not missing, f"weights without a reference: {sorted(missing)}"
        model.load_state_dict(loaded, strict=False)
        return model


def kv_policy(kv_sharing: dict[str, Any]) -> str:
    """KV policy of the released settings."""
    if not kv_sharing.get("enable"):
        return "recursion_wise"
    return "hybrid" if kv_sharing.get("update_cache") else "share_first"


def expert_choice(mor: dict[str, Any], default_warmup: int) -> dict[str, Any]:
    """Router section of a released expert-choice run; by default its capacity warms up as long as its learning rate."""
    expert = mor["expert"]
    return {
        "kind": "expert_choice",
        "head": mor["router_type"],
        "activation": expert["router_func"] or "none",
        # Without an activation the released code doesn't apply alpha.
        "alpha": expert["alpha"] if expert["router_func"] else 1.0,
        "temperature": mor["temp"],
        "gating": expert["gating"],
        "capacity": [float(fraction) for fraction in mor["capacity"].split(",")],
        "capacity_warmup_steps": default_warmup if expert["cap_warmup_step"] is None else expert["cap_warmup_step"],
        "sampling": expert["sampling"],
        "aux_coeff": expert["coeff"],
        "z_coeff": mor["z_coeff"] if mor["z_loss"] else 0.0,
    }


def token_choice(mor: dict[str, Any]) -> dict[str, Any]:
    """Router section of a released token-choice run."""
    token = mor["token"]
    return {
        "kind": "token_choice",
        "head": mor["router_type"],
        "activation": token["router_func"],
        "alpha": token["alpha"],
        "temperature": mor["temp"],
        "gating": token["gating"],
        "balancing": token["balancing"],
        "balance_coeff": token["coeff"],
        "bias_update_rate": token["u"],
        "balance_warmup_steps": token["bal_warmup_step"] or 0,
        "z_coeff": mor["z_coeff"] if mor["z_loss"] else 0.0,
    }


def cases() -> list[Case]:
    """All cases of the directory; empty if it doesn't exist."""
    path = DIRECTORY / "meta.json"
    if not path.exists():
        return []
    return [Case(name, meta) for name, meta in json.loads(path.read_text()).items()]
