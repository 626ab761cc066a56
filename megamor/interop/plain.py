"""A model of fixed depth as a dense one, which the classes of Hugging Face transformers compute without code of ours.

Every application of a block becomes a layer, into whose weights goes what distinguishes its recursion. This is the way
back from `megamor.interop.dense`, for the same families.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor

from megamor.config import Config, FixedDepthConfig, RecursionConfig, SkipForwardRecurseConfig
from megamor.config.segments import stages
from megamor.errors import ConfigError
from megamor.interop.dense import weight_names
from megamor.interop.export import model_shape
from megamor.model import Transformer
from megamor.model.blocks import Block, RMSNorm, SharedLinear

CLASSES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM", "gemma3_text": "Gemma3ForCausalLM"}
GEMMA = ("qk_norm", "sandwich_norms", "scale_embedding")


def plain_export(model: Transformer, depth: int | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Content of `config.json`, and weights under transformers' names, of `model` at `depth` recursions (None: all).

    Raises:
        ConfigError: naming all that a dense model can't express.
    """
    config = model.config
    refuse_special(config, depth)
    weights = {n: w for n, w in model.state_dict().items() if n in ("embed.weight", "norm.weight", "head.weight")}
    sliding = []
    for number, (layer, block, recursion) in enumerate(applications(model, depth)):
        sliding += [number] if layer in config.model.sliding_layers else []
        weights |= {f"prelude.{number}.{name}": value for name, value in merged(block, recursion)}
    layers = len({name.split(".")[1] for name in weights if name.startswith("prelude.")})
    dense = replace(config, model=replace(config.model, num_layers=layers, sliding_layers=tuple(sliding)))
    dense = replace(dense, recursion=RecursionConfig(), router=FixedDepthConfig())
    if dense.model.sandwich_norms:  # Gemma's norms multiply by 1 + weight
        weights = {name: value - 1 if "norm" in name else value for name, value in weights.items()}
    return dense_settings(dense), {theirs: weights[ours] for ours, theirs in weight_names(dense.model).items()}


def refuse_special(config: Config, depth: int | None) -> None:
    """Raise ConfigError, naming all that a dense model can't express."""
    model, found = config.model, []
    for stage in stages(config):
        recursion, router, most = stage.config.recursion, stage.config.router, len(stage.schedule)
        # Tokens that skip/forward/recurse sends equally deep have no other weight than 1.
        if not isinstance(router, FixedDepthConfig | (SkipForwardRecurseConfig if depth else FixedDepthConfig)):
            found.append(f"router.kind = {getattr(router, 'kind', 'custom')}, which decides or weighs token by token")
        found += [
            f"recursion.{name}" for name in ("recursion_embedding", "input_injection") if getattr(recursion, name)
        ]
        if recursion.kv_policy == "share_first" and most > 1:
            found.append("recursion.kv_policy = share_first, where recursions attend to keys of the first")
        if depth is not None and depth > most:
            found.append(f"--fixed-depth {depth}, with {most} recursions")
    if model.attention != "full":
        found.append(f"model.attention = {model.attention}")
    some = [name for name in GEMMA[1:] if getattr(model, name)]
    if some and not all(getattr(model, name) for name in GEMMA):
        found.append(f"model.{some[0]} without the others of Gemma 3 ({', '.join(GEMMA)})")
    elif model.sliding_layers and not some:
        found.append("model.sliding_layers outside of Gemma 3")
    if found:
        reasons = "\n  ".join(dict.fromkeys(found))
        raise ConfigError(f"a plain export can't express\n  {reasons}\nleave out --plain")


def applications(model: Transformer, depth: int | None) -> Iterator[tuple[int, Block, int]]:
    """Each application of a block at `depth`: the layer of which its settings are, the block, and the recursion."""
    layer = unique = 0
    several = bool(model.config.recursion.stages or model.config.recursion.router_layers)
    for segment in model.segments:
        module: Any = model.get_submodule(segment.name)
        blocks = [*(module.blocks if segment.schedule else module)]
        runs = min(depth or len(segment.schedule), module.router.num_recursions) if segment.schedule else 1
        first: dict[int, int] = {}
        for recursion, row in enumerate(segment.schedule or (tuple(range(len(blocks))),)):
            for index in row:
                first.setdefault(index, unique + index if several else layer)
                layer += 1
                if recursion < runs:
                    yield first[index], blocks[index], recursion
        unique += len(blocks)


def merged(block: Block, recursion: int) -> Iterator[tuple[str, Tensor]]:
    """The weights of a plain block that computes what `block` does in `recursion`."""
    last = ("attention_out_norm", "ffn_out_norm") if block.ffn_out_norm else ("attention.o_proj", "ffn.down_proj")
    for name, module in block.named_modules():
        if isinstance(module, RMSNorm):
            weight: Tensor = module.others[recursion - 1] if recursion and len(module.others) else module.weight
        elif isinstance(module, SharedLinear):
            weight = module.weight
            if len(module.up):
                weight = weight + module.up[recursion].weight @ module.down[recursion].weight  # type: ignore[operator]
        else:
            continue
        # A file can't hold one tensor under several names, so that repeated layers are copies.
        yield f"{name}.weight", weight.detach() * (block.branch_scale if name in last else 1.0)


def dense_settings(config: Config) -> dict[str, Any]:
    """The content of `config.json` for a vanilla model, with names that transformers 4 and 5 know."""
    model, scaling = config.model, config.model.rope_scaling
    family = "gemma3_text" if model.sandwich_norms else "qwen3" if model.qk_norm else "llama"
    rope: dict[str, Any] | None = None
    if scaling is not None:
        rope = {"rope_type": "llama3", "factor": scaling.factor, "low_freq_factor": scaling.low_freq_factor}
        rope |= {"high_freq_factor": scaling.high_freq_factor}
        rope |= {"original_max_position_embeddings": scaling.original_max_seq_len}
    activation = "silu" if model.ffn_activation == "silu" else "gelu_pytorch_tanh"
    settings: dict[str, Any] = {
        "architectures": [CLASSES[family]],
        "model_type": family,
        **model_shape(config),
        "hidden_activation" if family == "gemma3_text" else "hidden_act": activation,
        "rms_norm_eps": model.norm_eps,
        "initializer_range": model.init_std,
        "attention_bias": False,
        "tie_word_embeddings": model.tied_head,
        "rope_theta": model.rope_theta,
        "rope_scaling": rope,
    }
    if family == "gemma3_text":
        kinds = ("full_attention", "sliding_attention")
        settings |= {
            "query_pre_attn_scalar": model.head_dim,
            "rope_local_base_freq": model.sliding_rope_theta or model.rope_theta,
            "sliding_window": model.sliding_window or model.max_seq_len,
            "layer_types": [kinds[layer in model.sliding_layers] for layer in range(model.num_layers)],
        }
    return settings
