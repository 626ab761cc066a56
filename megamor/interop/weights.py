"""What all importers share: reading the weights of other programs, and writing an imported model as a checkpoint."""

from __future__ import annotations

import pickle
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from megamor.checkpoint import CheckpointManager, TrainerState, code_revision, layout, library_versions
from megamor.checkpoint.layout import CONFIG_FILE, TRAINER_FILE
from megamor.checkpoint.state import MODEL_PREFIX, write_state
from megamor.config import Config, config_to_yaml
from megamor.errors import CheckpointError, ConfigError
from megamor.files import read_json, sha256_of_files
from megamor.lock import WriteLock

BLOCK_WEIGHTS = {
    "attention_norm": "input_layernorm",
    "attention.q_proj": "self_attn.q_proj",
    "attention.k_proj": "self_attn.k_proj",
    "attention.v_proj": "self_attn.v_proj",
    "attention.o_proj": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn.gate_proj": "mlp.gate_proj",
    "ffn.up_proj": "mlp.up_proj",
    "ffn.down_proj": "mlp.down_proj",
}
"""Weights of a Llama block: megamor's name → transformers'."""

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
INDEX_SUFFIX = ".index.json"
FILES = tuple(name + suffix for name in ("model.safetensors", "pytorch_model.bin") for suffix in ("", INDEX_SUFFIX))


@dataclass(frozen=True)
class Imported:
    """A model of another program.

    `weights` are fp32 and named as in `Transformer.state_dict()`; `untied` names those whose copies differed and were
    reduced to one. `files` are further files of a checkpoint (tokenizer, end of text, chat template) by their names
    there, and `origin` are the `source` and `sha256` of `TrainerState.started_from`. `notes` tell the user what the
    checkpoint doesn't express.
    """

    config: Config
    weights: dict[str, Tensor]
    untied: tuple[str, ...] = ()
    files: Mapping[str, str | Path] = field(default_factory=dict)
    origin: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def weight_files(path: Path) -> list[Path]:
    """The files that hold the weights: `path` itself, or those of a directory with one of `FILES`, sorted.

    Raises:
        CheckpointError: there is no such file, or the list of shards is damaged.
    """
    if not path.is_dir():
        return [path]
    found = [path / name for name in FILES if (path / name).is_file()]
    if not found:
        raise CheckpointError(f"{path} contains none of {', '.join(FILES)}: give the directory or file of the weights")
    if not found[0].name.endswith(INDEX_SUFFIX):
        return found[:1]
    shards = read_json(found[0]).get("weight_map")
    names = {*shards.values()} if isinstance(shards, dict) else set()
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise CheckpointError(f"{found[0]} doesn't name the files beside it that hold the weights: copy it again")
    return [path / name for name in sorted(names)]


def weights_sha256(path: Path) -> str:
    """SHA-256 of the files that hold the weights; see `sha256_of_files`."""
    return sha256_of_files(weight_files(path))


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Weights of a `.safetensors` or PyTorch file, or of a directory with one of `FILES`, in the stored types.

    Raises:
        CheckpointError: there is no such file, or it contains something else.
    """
    state: dict[str, Tensor] = {}
    for file in weight_files(path):
        state |= _read_file(file)
    return state


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's message is long, and advises to switch the check off
        raise CheckpointError(f"{path} holds something else than tensors, which was not run") from error
    except (OSError, RuntimeError, ValueError, TypeError, LookupError, EOFError, SafetensorError) as error:
        raise CheckpointError(f"can't read the weights in {path}: {error}") from error
    named = isinstance(state, Mapping) and all(isinstance(name, str) for name in state)
    if not named or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} is not a state dict (a mapping from names to tensors)")
    return dict(state)


def check_names(state: Mapping[str, Tensor], wanted: Collection[str]) -> None:
    """Refuse a state dict that lacks a wanted weight, has anything else, or a head that a tied model doesn't have."""
    missing = sorted({*wanted} - state.keys())
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise CheckpointError(f"{missing[0]} is missing{more}: the weights are of another model than the config")
    extra = [key for key in state if key not in {*wanted, HEAD} and not key.endswith("rotary_emb.inv_freq")]
    if extra:
        more = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
        raise CheckpointError(f"{extra[0]}{more} is not in the model that the config describes")
    if HEAD in state and HEAD not in wanted and not torch.equal(state[HEAD], state[EMBEDDING]):
        raise CheckpointError(f"{HEAD} differs from {EMBEDDING}, although the config ties them: correct the config")


def fp32(state: Mapping[str, Tensor], key: str, shape: torch.Size) -> Tensor:
    """The weight `key` in fp32, which shares no memory with `state`.

    Raises:
        CheckpointError: it has another shape, or a type of quantized weights.
    """
    value = state[key]
    if value.shape != shape:
        raise CheckpointError(f"{key} has shape {tuple(value.shape)} instead of {tuple(shape)}")
    if not value.is_floating_point() or value.dtype.itemsize < 2:
        raise CheckpointError(f"{key} has type {value.dtype}: give weights in fp32, fp16 or bf16, not quantized ones")
    return value.to(torch.float32, copy=True).contiguous()


def save_imported(imported: Imported, directory: Path, tokenizer: Path | None = None) -> Path:
    """Write the checkpoint, with `tokenizer` in place of the model's own. Raises as `save_weights`."""
    if tokenizer is not None and not tokenizer.is_file():
        raise ConfigError(f"{tokenizer} is not a file: give a tokenizer.json")
    files: dict[str, str | bytes | Path] = {**imported.files, CONFIG_FILE: config_to_yaml(imported.config)}
    if tokenizer is not None:
        files[layout.TOKENIZER_FILE] = tokenizer
    record = {"started_from": {"kind": "import", **imported.origin}} if imported.origin else {}
    weights = {MODEL_PREFIX + name: weight for name, weight in imported.weights.items()}
    return save_weights(directory, weights, files, **record)


def refuse_occupied(directory: Path) -> None:
    """Raise ConfigError unless `directory` is new or empty, and can be made."""
    found = next(path for path in (directory, *directory.parents) if path.exists())
    if not found.is_dir() or (found == directory and any(found.iterdir())):
        raise ConfigError(f"{found} exists and is not an empty directory: give another output")


def save_weights(
    directory: Path, weights: Mapping[str, Tensor], files: Mapping[str, str | bytes | Path], **record: Any
) -> Path:
    """Write a checkpoint for evaluation, generation, serving and export: weights without optimizer state.

    The new or empty `directory` will contain the checkpoint `step_00000000` and `latest`. `weights` have stored names,
    `files` are configuration and tokenizer, and `record` are further fields of `TrainerState`.

    Raises:
        ConfigError: `directory` is in use.
        CheckpointError: it can't be written.
    """
    refuse_occupied(directory)
    trainer = TrainerState(
        step=0,
        tokens_seen=0,
        data={},
        world_size=1,
        backend="single",
        **record,
        code_revision=code_revision(),
        versions=library_versions(),
    )
    directory.parent.mkdir(parents=True, exist_ok=True)
    with WriteLock(directory, str(directory), "give another output"):
        if layout.published_steps(directory):
            raise ConfigError(f"another process has just written a checkpoint to {directory}: give another output")
        writers = [partial(write_state, tensors=weights)]
        return CheckpointManager(directory, keep_last=1).save(0, writers, {**files, TRAINER_FILE: trainer.to_json()})
