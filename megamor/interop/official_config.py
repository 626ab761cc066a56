"""Translation of the paper authors' run settings (github.com/raymin0223/mixture_of_recursions) to a megamor config.

Their settings are one YAML file per run, with the sections `recursive`, `kv_sharing`, `relaxation` and `mor`; the shape
of the backbone is that of a published model (`model_name_or_path`), changed by `model_config`. Widths and the number of
layers are read from the weights. Warm-ups are dropped, because the imported model has been trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megamor.config import Config, config_from_dict
from megamor.config.validate import validate
from megamor.errors import ConfigError
from megamor.interop.dense import known_settings, model_section

NUM_HEADS = {"SmolLM-135M": 9, "SmolLM-360M": 15, "SmolLM-1.7B": 32}
"""Attention heads of the published models that the released runs start from. All have RoPE theta 10000, eps 1e-5."""


@dataclass(frozen=True)
class Shape:
    """What the weights say. `num_layers` is the effective depth; `router_hidden` is 0 for linear routers; `tied_head`:
    the output head equals the embedding.
    """

    vocab_size: int
    dim: int
    kv_dim: int
    ffn_dim: int
    num_layers: int
    router_hidden: int = 0
    tied_head: bool = True


class Settings:
    """Dotted access to nested run settings. A key with the value null counts as absent."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    def get(self, key: str, default: Any = None) -> Any:
        """The value at `key`, or `default`.

        Raises:
            ConfigError: a section in `key` is not a mapping.
        """
        value: Any = self.values
        for name in key.split("."):
            if not isinstance(value, Mapping):
                raise ConfigError(f"official run config: {key} can't be read: found {value!r}, expected a section")
            value = value.get(name)
            if value is None:
                return default
        return value

    def number(self, key: str, default: float) -> float:
        """The value at `key` as a number."""
        value = self.get(key, default)  # may be a string: YAML 1.1 reads 1e-5 as one
        try:
            return float(value)
        except (TypeError, ValueError):
            raise ConfigError(f"official run config: {key} = {value!r} is not a number") from None

    def choice(self, key: str, default: str, *choices: str) -> str:
        """The value at `key`, which must be one of `choices` (or absent, if `default` is)."""
        value = self.get(key, default)
        if value not in choices:
            raise refusal(key, value, f"known are {', '.join(choices)}")
        return str(value)

    @property
    def routing(self) -> str | None:
        """`expert` or `token`; None for models without routers."""
        if not self.get("mor.enable", False):
            return None
        return self.choice("mor.type", "", "expert", "token")

    @property
    def num_recursions(self) -> int:
        """1 for vanilla models and for the released code's shallow baselines (recursive with one recursion)."""
        return int(self.number("recursive.num_recursion", 1)) if self.get("recursive.enable", False) else 1


def refusal(key: str, value: Any, reason: str) -> ConfigError:
    """The error for a setting that has no counterpart."""
    return ConfigError(f"official run config: {key} = {value} can't be imported: {reason}")


def config_of(settings: Settings, shape: Shape) -> Config:
    """The megamor config of a released run whose weights have `shape`.

    Raises:
        ConfigError: a setting has no counterpart in megamor, or contradicts the weights.
    """
    refuse_what_has_no_counterpart(settings)
    seq_len = int(settings.number("max_length", settings.number("model_config.max_position_embeddings", 2048)))
    sections: dict[str, Any] = {
        "model": backbone(settings, shape, seq_len),
        "data": {"seq_len": seq_len},
        "train": {"max_steps": max(1, int(settings.number("num_train_steps", 1)))},
        "optim": {"warmup_steps": 0},
    }
    if settings.num_recursions > 1:
        sections["recursion"] = {
            "num_recursions": settings.num_recursions,
            "sharing": settings.get("recursive.sharing"),
            "kv_policy": kv_policy(settings),
            "separate_norms": not settings.get("recursive.ln_share", True),
        }
    if settings.routing == "expert":
        sections["router"] = expert_choice(settings, shape)
    elif settings.routing == "token":
        sections["router"] = token_choice(settings, shape)
    config = config_from_dict(sections, "official run config")
    validate(config)
    return config


def refuse_what_has_no_counterpart(settings: Settings) -> None:
    """Raise ConfigError for settings that change the model in ways that megamor doesn't support."""
    if settings.get("relaxation.enable", False):
        raise refusal("relaxation.enable", True, "adapters on top of shared weights have no counterpart")
    sharing = settings.get("recursive.sharing")
    if settings.num_recursions > 1 and not settings.get("recursive.ln_share", True) and "cycle" not in str(sharing):
        raise refusal("recursive.ln_share", False, f"with {sharing} a block would need several norms in one recursion")
    if settings.routing is None:
        return
    if settings.num_recursions == 1:
        raise refusal("mor.enable", True, "it needs recursive.enable with more than one recursion")
    if settings.get("mor.rand_router", False):
        raise refusal("mor.rand_router", True, "its gates are random numbers, not weights")
    if sharing not in ("cycle", "middle_cycle"):
        raise refusal("recursive.sharing", sharing, "the released code has routers with cycle and middle_cycle only")


def backbone(settings: Settings, shape: Shape, seq_len: int) -> dict[str, Any]:
    """The backbone, from the weights, `model_config` and the name of the published model."""
    given = dict(settings.get("model_config", {}))
    name = str(settings.get("model_name_or_path", "")).rpartition("/")[2]
    num_heads = int(given.get("num_attention_heads") or NUM_HEADS.get(name, 0))
    if not num_heads:
        raise ConfigError(
            f"official run config: the number of attention heads is unknown. It can't be read from the weights, and "
            f"model_name_or_path = {name or None} is none of {', '.join(NUM_HEADS)}: give "
            "model_config.num_attention_heads (and rope_theta, rms_norm_eps unless they are 10000 and 1e-5)"
        )
    if shape.dim % num_heads or shape.kv_dim % (shape.dim // num_heads):
        reason = f"it doesn't divide the widths {shape.dim} and {shape.kv_dim}"
        raise refusal("model_config.num_attention_heads", num_heads, reason)
    values = {
        **given,
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.dim,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": shape.kv_dim // (shape.dim // num_heads),
        "intermediate_size": shape.ffn_dim,
        "max_position_embeddings": seq_len,
        "rope_theta": settings.number("model_config.rope_theta", 10000.0),
        "rms_norm_eps": settings.number("model_config.rms_norm_eps", 1e-5),
        "tie_word_embeddings": shape.tied_head,
        "model_type": given.get("model_type", "llama"),
    }
    source = "official run config: model_config"
    return model_section(*known_settings(values, source), source)


def kv_policy(settings: Settings) -> str:
    """The key/value policy. The released settings repeat the recursions' number and sharing, which must agree."""
    if not settings.get("kv_sharing.enable", False):
        return "recursion_wise"
    for name in ("num_recursion", "sharing"):
        found, wanted = settings.get(f"kv_sharing.{name}"), settings.get(f"recursive.{name}")
        if found is not None and found != wanted:
            raise refusal(f"kv_sharing.{name}", found, f"recursive.{name} is {wanted}")
    return "hybrid" if settings.get("kv_sharing.update_cache", False) else "share_first"


def router_head(settings: Settings, shape: Shape) -> str:
    """The kind of router head, by the width of its weights."""
    kind = settings.choice("mor.router_type", "linear", "linear", "mlp", "wide_mlp")
    # Earlier versions of the released code built a `wide_mlp` as narrow as its `mlp`, so the name doesn't decide.
    by_width = {0: "linear", 2 * shape.dim: "mlp", 4 * shape.dim: "wide_mlp"}
    if shape.router_hidden not in by_width or (kind == "linear") != (shape.router_hidden == 0):
        raise refusal("mor.router_type", kind, f"the routers have a hidden layer of width {shape.router_hidden}")
    return by_width[shape.router_hidden]


def common_router_settings(settings: Settings, shape: Shape, section: str) -> dict[str, Any]:
    """Settings that expert-choice and token-choice have in common."""
    return {
        "head": router_head(settings, shape),
        "temperature": settings.number("mor.temp", 1.0),
        "gating": settings.choice(f"mor.{section}.gating", "weighted", "weighted", "additive"),
        "z_coeff": settings.number("mor.z_coeff", 0.0) if settings.get("mor.z_loss", False) else 0.0,
    }


def expert_choice(settings: Settings, shape: Shape) -> dict[str, Any]:
    """Router section of an expert-choice run."""
    # Without a function the released code uses the score itself and doesn't apply alpha.
    activation = settings.choice("mor.expert.router_func", "none", "sigmoid", "tanh", "none")
    sampling = settings.choice("mor.expert.sampling", "none", "aux_loss", "aux_router", "none")
    capacity = settings.get("mor.capacity")
    return {
        "kind": "expert_choice",
        **common_router_settings(settings, shape, "expert"),
        "activation": activation,
        "alpha": 1.0 if activation == "none" else settings.number("mor.expert.alpha", 0.1),
        "capacity": None if capacity is None else [float(fraction) for fraction in str(capacity).split(",")],
        "sampling": "aux_loss" if sampling == "none" else sampling,
        "aux_coeff": 0.0 if sampling == "none" else settings.number("mor.expert.coeff", 0.001),
    }


def token_choice(settings: Settings, shape: Shape) -> dict[str, Any]:
    """Router section of a token-choice run."""
    activation = settings.choice("mor.token.router_func", "softmax", "softmax", "sigmoid")
    return {
        "kind": "token_choice",
        **common_router_settings(settings, shape, "token"),
        "activation": activation,
        "alpha": settings.number("mor.token.alpha", 1.0 if activation == "softmax" else 0.1),
        "balancing": settings.choice("mor.token.balancing", "none", "loss", "loss_free", "none"),
        "balance_coeff": settings.number("mor.token.coeff", 0.1),
        "bias_update_rate": settings.number("mor.token.u", 0.001),
    }
