"""Import of dense models in Hugging Face format, without transformers: `config.json` is read, and the weights renamed.

What decides a model's function is in `FAMILIES`. A setting of `config.json` that is neither there nor in `HARMLESS` may
change the function in ways that this version doesn't know: it is refused, unless its value is null, false, 0 or empty,
which is how settings say that something is switched off.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from megamor.checkpoint.layout import CHAT_TEMPLATE_FILE, END_OF_TEXT_FILE, TOKENIZER_FILE
from megamor.codec import EndOfText, read_tokenizer
from megamor.config import Config, config_from_dict
from megamor.config.schema import ModelConfig
from megamor.config.validate import validate
from megamor.errors import CheckpointError, ConfigError
from megamor.files import read_json
from megamor.interop.export import CONFIG_FILE
from megamor.interop.weights import (
    BLOCK_WEIGHTS,
    EMBEDDING,
    HEAD,
    NORM,
    Imported,
    check_names,
    fp32,
    read_state_dict,
    weights_sha256,
)
from megamor.model import build_model

if TYPE_CHECKING:
    from tokenizers import Tokenizer

HUB = "hf:"

_LLAMA: dict[str, Any] = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": None, "head_dim": None, "hidden_act": "silu",
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "rope_theta": 1e4, "rope_scaling": None, "rope_parameters": None,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA | {
        "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096,
    },
    "qwen3": _LLAMA | {
        "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "head_dim": 128,
        "max_position_embeddings": 32768, "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28,
        "layer_types": None,
    },
    "gemma3_text": _LLAMA | {
        "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 131072, "tie_word_embeddings": True, "query_pre_attn_scalar": 256,
        "sliding_window": 4096, "sliding_window_pattern": 6, "layer_types": None,
        "rope_theta": 1e6, "rope_local_base_freq": 1e4,
    },
}  # fmt: skip
"""`model_type` → the settings that are translated, with the values of transformers' class where a file lacks them."""

NULLABLE = {
    "num_key_value_heads": int, "head_dim": int, "sliding_window": int, "layer_types": list, "rope_scaling": dict,
    "rope_parameters": dict,
}  # fmt: skip
HARMLESS = frozenset({
    "model_type", "architectures", "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id", "dtype",
    "torch_dtype", "use_cache", "initializer_range", "pretraining_tp", "transformers_version", "cache_implementation",
    "return_dict", "id2label", "label2id", "is_llama_config", "tokenizer_class", "max_length", "transformers.js_config",
    "unk_token_id", "attn_implementation", "do_sample", "temperature", "top_k", "top_p", "typical_p", "min_length",
    "num_beams", "num_beam_groups", "num_return_sequences", "length_penalty", "repetition_penalty", "sep_token_id",
    "decoder_start_token_id", "problem_type",
})  # fmt: skip
"""Settings of any family that don't change logits; so are names that begin with `_` or `unsloth_`."""
VISION = (
    "text_config", "vision_config", "mm_tokens_per_image", "boi_token_index", "eoi_token_index", "image_token_index",
)  # fmt: skip
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
ROPE_SETTINGS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
QK_NORMS = {"attention.q_norm": "self_attn.q_norm", "attention.k_norm": "self_attn.k_norm"}
SANDWICH = {
    "attention_out_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_out_norm": "post_feedforward_layernorm",
}


def is_dense(path: str | Path) -> bool:
    """Whether `path` names a model on the hub (`hf:`), or is a directory with the `config.json` of another program."""
    if str(path).startswith(HUB):
        return True
    config = Path(path) / CONFIG_FILE
    return config.is_file() and read_json(config).get("model_type") != "megamor"


def read_dense(source: str | Path, tokenizer: Path | None = None) -> Imported:
    """The dense model in a directory, or `hf:` and a directory or the name of a model on the Hugging Face hub.

    `tokenizer` replaces its `tokenizer.json`.

    Raises:
        ConfigError: there is no such model, or its `config.json` has a setting without counterpart, which is named.
        CheckpointError: a file can't be read; or a weight is missing, unknown, quantized or of another shape.
        DataError: `tokenizer.json` is damaged.
    """
    directory = _directory_of(str(source))
    settings = read_json(directory / CONFIG_FILE)
    family, known = known_settings(settings, str(directory / CONFIG_FILE))
    config = config_of(family, known, str(directory / CONFIG_FILE))
    state = read_state_dict(directory)
    if "text_config" in settings:
        state = _text_weights(state, directory)
    sources = weight_names(config.model)
    check_names(state, sources.values())
    shapes = {name: value.shape for name, value in build_model(config, device="meta").state_dict().items()}
    weights = {name: fp32(state, sources[name], shape) for name, shape in shapes.items()}
    if family == "gemma3_text":
        _translate_gemma(weights, config.model.head_dim / known["query_pre_attn_scalar"])
    try:
        files, notes = _text_files(directory, settings, tokenizer)
    except (TypeError, LookupError, AttributeError, OverflowError) as error:
        reason = f"eos_token_id, eos_token or chat_template has a value that no model has: {error}"
        raise CheckpointError(f"{directory}: {reason.splitlines()[0]}; correct the file") from error
    origin = {"source": str(source), "sha256": weights_sha256(directory)}
    name = Path(str(source).removeprefix(HUB)).resolve().name  # what a server calls the model
    config = replace(config, run=replace(config.run, name=name))
    return Imported(config, weights, files=files, origin=origin, notes=notes)


def _directory_of(source: str) -> Path:
    """The local directory of a source; files of a model on the hub are downloaded as far as they are needed."""
    name = source.removeprefix(HUB)
    if Path(name).is_dir():
        if not (Path(name) / CONFIG_FILE).is_file():
            raise ConfigError(f"{name} has no {CONFIG_FILE}: give the directory of a Hugging Face model")
        return Path(name)
    if name == source or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ConfigError(f"{source} is not a directory: give one, or {HUB}OWNER/NAME for a model on the hub")
    from huggingface_hub import snapshot_download

    try:
        for weights in ("model*.safetensors", "pytorch_model*.bin"):
            wanted = ["*.json", "*.jinja", weights]
            path = Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns="*/*"))
            if any(path.glob(weights)):
                break
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"{source} can't be downloaded: {reason}; check the name, the network and, for a model with terms, "
            "the login (hf auth login), or give a directory"
        ) from error
    return path


def known_settings(given: Mapping[str, Any], source: str) -> tuple[str, dict[str, Any]]:
    """The family of a `config.json` and its settings of `FAMILIES`.

    Raises:
        ConfigError: naming a family, or a setting with its value, that isn't supported.
    """
    if isinstance(given.get("text_config"), dict):
        outer = {name: value for name, value in given.items() if name not in {*VISION, "model_type"}}
        given = {**outer, "model_type": "gemma3_text", **given["text_config"]}
    family = given.get("model_type")
    if family == "megamor":
        raise _refusal(source, "model_type", family, "it is an export, which commands and init.from read as it is")
    if family not in FAMILIES:
        raise _refusal(source, "model_type", family, f"supported are {', '.join(sorted(FAMILIES))}")
    refuse_unknown(given, {*FAMILIES[family], *HARMLESS}, source)
    known = {}
    for name, default in FAMILIES[family].items():
        value = given.get(name, default)
        if value is None and name not in NULLABLE:
            value = default
        kind = NULLABLE.get(name, type(default))
        fits = value is None or isinstance(value, int | float if kind is float else kind)
        least = name == "query_pre_attn_scalar"  # by whose square root queries are divided
        if not fits or (isinstance(value, int | float) and value < least):
            raise _refusal(source, name, value, f"expected something like {default}")
        known[name] = value
    return family, known


def refuse_unknown(given: Mapping[str, Any], known: Collection[str], source: str) -> None:
    """Raise ConfigError for the first setting that isn't known and isn't switched off; see the module docstring."""
    for name, value in given.items():
        if name not in known and not name.startswith(("_", "unsloth_")) and value:
            reason = "it may change what the model computes; if it doesn't, remove it from a copy of the file"
            raise _refusal(source, name, value, reason)


def _refusal(source: str, name: str, value: Any, reason: str) -> ConfigError:
    return ConfigError(f"{source}: {name} = {value!r} can't be imported: {reason}")


def config_of(family: str, known: Mapping[str, Any], source: str) -> Config:
    """The configuration of the settings that `known_settings` returns; raises ConfigError as `model_section`."""
    sections = {
        "model": model_section(family, known, source),
        "data": {"seq_len": min(2048, known["max_position_embeddings"])},
        "train": {"max_steps": 1},
        "optim": {"warmup_steps": 0},
    }
    config = config_from_dict(sections, source)
    validate(config)
    return config


def model_section(family: str, known: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The section `model` of a configuration. Raises ConfigError for a value that has no counterpart."""
    activation = known.get("hidden_activation", known["hidden_act"])
    if activation not in ACTIVATIONS:
        raise _refusal(source, "hidden_act", activation, f"supported are {', '.join(ACTIVATIONS)}")
    heads, gemma = known["num_attention_heads"], family == "gemma3_text"
    width = known["head_dim"] or known["hidden_size"] // max(heads, 1)
    windows = _windows(family, known, source)
    return {
        "vocab_size": known["vocab_size"],
        "dim": known["hidden_size"],
        "num_layers": known["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": known["num_key_value_heads"] or heads,
        "head_width": None if width * heads == known["hidden_size"] else width,
        "ffn_dim": known["intermediate_size"],
        "ffn_activation": ACTIVATIONS[activation],
        "tied_head": known["tie_word_embeddings"],
        "max_seq_len": known["max_position_embeddings"],
        "norm_eps": known["rms_norm_eps"],
        "qk_norm": family in ("qwen3", "gemma3_text"),
        "scale_embedding": gemma,
        "sandwich_norms": gemma,
        **_rope(known, source),
        **(windows or {"sliding_rope_theta": None}),
    }


def _rope(known: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Settings of RoPE, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    parameters, older = known["rope_parameters"] or {}, known["rope_scaling"] or {}
    if "rope_local_base_freq" not in known:  # as transformers does: what an older file says wins
        return _rope_of({"rope_theta": known["rope_theta"], **(older or parameters)}, known, source)
    kinds = ("full_attention", "sliding_attention")
    refuse_unknown(parameters, kinds, f"{source}: rope_parameters")
    if not all(isinstance(parameters.get(kind) or {}, dict) for kind in kinds):
        raise _refusal(source, "rope_parameters", parameters, "expected an object for each kind of attention")
    whole = {"rope_theta": known["rope_theta"], **(parameters.get("full_attention") or {}), **older}
    local = {"rope_theta": known["rope_local_base_freq"], **(parameters.get("sliding_attention") or {})}
    found = _rope_of(local, known, source)
    if found["rope_scaling"] is not None:
        raise _refusal(source, "rope_parameters.sliding_attention", local, "only full attention can be scaled")
    return {**_rope_of(whole, known, source), "sliding_rope_theta": found["rope_theta"]}


def _rope_of(rope: Mapping[str, Any], known: Mapping[str, Any], source: str) -> dict[str, Any]:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ROPE_SETTINGS:
        raise _refusal(source, "rope_type", kind, f"supported are {', '.join(ROPE_SETTINGS)}")
    refuse_unknown(rope, {"rope_theta", "rope_type", "type", *ROPE_SETTINGS[kind]}, f"{source}: RoPE")
    scaling = None
    if kind == "linear":
        # Every frequency has less than one turn in one position, so Llama 3's rule divides all of them.
        scaling = {"factor": rope.get("factor"), "original_max_seq_len": 1}
    elif kind == "llama3":
        scaling = {name: rope.get(name) for name in ROPE_SETTINGS[kind][:3]}
        longest = rope.get("original_max_position_embeddings") or known["max_position_embeddings"]
        scaling["original_max_seq_len"] = longest
    return {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}


def _windows(family: str, known: Mapping[str, Any], source: str) -> dict[str, Any]:
    """`sliding_window` and `sliding_layers`."""
    layers, window = [*range(known["num_hidden_layers"])], known.get("sliding_window")
    types, pattern = known.get("layer_types"), known.get("sliding_window_pattern")
    if family == "qwen3" and not known["use_sliding_window"]:
        window = None
    if types is not None:
        if len(types) != len(layers) or {*types} - {"full_attention", "sliding_attention"}:
            reason = f"give full_attention or sliding_attention for each of {len(layers)} layers"
            raise _refusal(source, "layer_types", types, reason)
        found = [layer for layer, kind in enumerate(types) if kind == "sliding_attention"]
    elif pattern:
        found = [layer for layer in layers if (layer + 1) % pattern]
    else:
        found = [] if window is None else layers[known.get("max_window_layers", 0) :]
    if found and window is None:
        raise _refusal(source, "sliding_window", None, f"{len(found)} layers need one")
    return {"sliding_window": window, "sliding_layers": found} if found else {}


def weight_names(model: ModelConfig) -> dict[str, str]:
    """The weights of a dense model: megamor's name → transformers'."""
    names = {"embed.weight": EMBEDDING, "norm.weight": NORM} | ({} if model.tied_head else {"head.weight": HEAD})
    block = BLOCK_WEIGHTS | (SANDWICH if model.sandwich_norms else {}) | (QK_NORMS if model.qk_norm else {})
    for layer in range(model.num_layers):
        names |= {f"prelude.{layer}.{a}.weight": f"model.layers.{layer}.{b}.weight" for a, b in block.items()}
    return names


def _text_weights(state: Mapping[str, Tensor], directory: Path) -> dict[str, Tensor]:
    """The weights of a model with a `text_config` under the names of the text model alone."""
    if seen := next((name for name in state if "vision_tower" in name or "multi_modal_projector" in name), None):
        raise CheckpointError(
            f"{directory} also reads images ({seen}), which megamor can't: save the text model on its own, as "
            "transformers' Gemma3ForCausalLM does"
        )
    return {re.sub(r"^(model\.language_model\.|language_model\.model\.)", "model.", n): w for n, w in state.items()}


def _translate_gemma(weights: dict[str, Tensor], scale: float) -> None:
    """Gemma's norms multiply by 1 + weight, and its queries may be divided by another number than sqrt(head width)."""
    for name, weight in weights.items():
        if name.endswith("norm.weight"):
            weight += 1
        if name.endswith("q_norm.weight"):
            weight *= math.sqrt(scale)


def _text_files(
    directory: Path, settings: Mapping[str, Any], tokenizer: Path | None
) -> tuple[dict[str, str | Path], tuple[str, ...]]:
    """Tokenizer, end of text and chat template as files of a checkpoint, and what they leave out."""
    names = ("generation_config.json", "tokenizer_config.json", "chat_template.json")
    generation, own, older = (read_json(directory / n) if (directory / n).is_file() else {} for n in names)
    files: dict[str, str | Path] = {}
    template = own.get("chat_template") or older.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {str(each["name"]): each["template"] for each in template}.get("default")
    if (directory / CHAT_TEMPLATE_FILE).is_file():
        files[CHAT_TEMPLATE_FILE] = directory / CHAT_TEMPLATE_FILE
    elif template:
        files[CHAT_TEMPLATE_FILE] = str(template)
    path = tokenizer or directory / TOKENIZER_FILE
    if not path.is_file():
        return files, (f"{path} is missing, so texts can't be encoded: give one with --tokenizer",)
    files[TOKENIZER_FILE] = path
    vocabulary, notes = read_tokenizer(path), []
    if vocabulary.num_special_tokens_to_add(is_pair=False):
        notes.append("the tokenizer adds tokens to a text, such as a beginning of text, which megamor leaves out")
    given = generation.get("eos_token_id")
    given = settings.get("eos_token_id") if given is None else given  # 0 is an id
    ends = ends_of_text(vocabulary, given, own.get("eos_token"))
    if not ends:
        return files, (*notes, f"the tokenizer has no token that ends a text (eos_token_id = {given})")
    files[END_OF_TEXT_FILE] = ends[0].to_json()
    if len(ends) > 1:
        others = ", ".join(f"{end.token} ({end.id})" for end in ends[1:])
        notes.append(f"only {ends[0].token} ({ends[0].id}) ends a text, not also {others}")
    return files, tuple(notes)


def ends_of_text(tokenizer: Tokenizer, ids: int | list[int] | None, own: Any) -> list[EndOfText]:
    """The tokens that end a text, first the one to use.

    That is the tokenizer's `own` end of text if it is among `ids`, with which the model ends texts, or if those are
    unknown; otherwise the first of `ids`.
    """
    numbers = ids if isinstance(ids, list) else [] if ids is None else [ids]
    own = own.get("content") if isinstance(own, dict) else own
    own = tokenizer.token_to_id(own) if own else None
    if own is not None and (own in numbers or not numbers):
        numbers = [own, *(number for number in numbers if number != own)]
    named = ((tokenizer.id_to_token(number), number) for number in numbers)
    return [EndOfText(token, number) for token, number in named if token is not None]
