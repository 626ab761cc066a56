"""Load a trained model from a directory that holds its config, weights and tokenizer.

The directory is a checkpoint written by training with any backend, or an export written by `megamor export-hf`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor

from megamor.checkpoint import check_same_model, open_checkpoint, origin_of, stored_file
from megamor.checkpoint.layout import TEXT_FILES, TOKENIZER_FILE
from megamor.codec import EndOfText, TextCodec, read_end_of_text
from megamor.config import Config, RandomConfig, SkipForwardRecurseConfig, config_from_yaml
from megamor.config.depth import final_recursions, grows, most_recursions, with_recursions
from megamor.devices import check_computes, usable_device
from megamor.errors import CheckpointError
from megamor.interop.dense import HUB, is_dense, read_dense
from megamor.interop.export import ORIGINAL_TOKENIZER_FILE, is_export, read_export
from megamor.model import Transformer, build_model
from megamor.routing import refuse_unknown_router


class StoredWeights(NamedTuple):
    """Full CPU tensors by name, the configuration of their model, and where they are; `step` is None for an export."""

    config: Config
    weights: dict[str, Tensor]
    directory: Path
    step: int | None


class Source(NamedTuple):
    """A model to start from or to learn from: full CPU tensors by name and their configuration.

    `files` are the texts that go with it (tokenizer, end of text, chat template) by their names in a checkpoint.
    `origin` is `TrainerState.started_from` for what starts from it, `kind` and all.
    """

    config: Config
    weights: dict[str, Tensor]
    files: Mapping[str, str | Path]
    origin: dict[str, Any]


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode with its config and the directory it came from; `step` is None for an export."""

    model: Transformer
    config: Config
    directory: Path
    step: int | None
    device: torch.device

    @property
    def name(self) -> str:
        """The run's name, or that of an export's directory."""
        return self.directory.name if self.step is None else self.config.run.name

    @property
    def origin(self) -> str:
        """Directory and step, for a message; and the depth, where training stopped on its way to the full one."""
        depth = f", {self.model.recursions} of {most_recursions(self.config)} recursions" if grows(self.config) else ""
        return f"{self.directory}{depth}" if self.step is None else f"{self.directory} (step {self.step}{depth})"

    @property
    def tokenizer_path(self) -> Path:
        """`tokenizer.json` of the tokenizer that the model was trained with.

        Raises:
            CheckpointError: the model was saved without a tokenizer.
        """
        return stored_file(self.directory, tokenizer_path(self.directory).name)

    @property
    def end_of_text(self) -> EndOfText | None:
        """What ends a text according to the record of the data that the model was trained on; None: unknown.

        Raises:
            CheckpointError: the record is damaged.
        """
        return read_end_of_text(self.directory)

    def codec(self) -> TextCodec:
        """Load the tokenizer as the model was trained with it, and the end of text.

        Raises:
            CheckpointError: the model was saved without a tokenizer, or its record of the end of text is damaged.
            DataError: the tokenizer is damaged, or doesn't have the end of text.
        """
        return TextCodec.load(self.tokenizer_path, record=self.end_of_text)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of `codec`."""
        return self.codec().tokenizer


def load_model(path: str | Path, device: str | None = None, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """Load a model from a checkpoint, a run's directory, its `latest` or an export.

    Args:
        device: where to put the weights (default: the GPU if there is one).
        dtype: data type of the weights, see `cast`.

    Raises:
        CheckpointError: there is no intact checkpoint, or its weights don't fit the model that its config describes.
        ConfigError: torch can't use the device; or the config names a custom router that the user hasn't allowed.
    """
    target = usable_device(device)
    check_computes(target)
    config, weights, directory, step = read_weights(path)
    return LoadedModel(build_loaded(config, weights, directory, target, dtype), config, directory, step, target)


def build_loaded(
    config: Config, weights: Mapping[str, Tensor], directory: Path, device: torch.device, dtype: torch.dtype
) -> Transformer:
    """The model of `config` with `weights`, which are from `directory`, in evaluation mode; as `load_model` says."""
    refuse_unknown_router(config, directory)
    # On the meta device first: shapes are compared before any memory is taken or any weight is drawn.
    try:
        model = cast(build_model(config, device="meta"), dtype)
    except RuntimeError as error:  # a tensor of more bytes than a number holds
        raise CheckpointError(f"{directory} describes a model that can't be built: {error}") from error
    stored, expected = ({name: value.shape for name, value in group.items()} for group in (weights, model.state_dict()))
    check_same_model(directory, stored, expected)
    model.to_empty(device=device)
    model.load_state_dict(weights)
    return model.eval()


def read_weights(path: str | Path) -> StoredWeights:
    """Read what `load_model` builds a model of.

    Raises:
        CheckpointError: there is no intact checkpoint.
    """
    if is_export(Path(path)):
        directory, step = Path(path).resolve(), None
        config, weights = read_export(directory)
    else:
        checkpoint = open_checkpoint(path)
        directory, step = checkpoint.directory, checkpoint.step
        config, weights = config_from_yaml(checkpoint.config_yaml, str(checkpoint.directory)), checkpoint.weights()
        if grows(config):
            # Recursions that training hasn't reached would run with parameters that have learned nothing.
            config = with_recursions(config, checkpoint.recursions or final_recursions(config))
    return StoredWeights(as_trained(config, weights), weights, directory, step)


def read_source(path: str | Path, kind: str = "init") -> Source:
    """The model of a checkpoint, a run, an export, or a dense model in Hugging Face format.

    Raises what `read_weights` and `read_dense` do.
    """
    refuse_missing(path)
    if is_dense(path):
        dense = read_dense(path)
        return Source(dense.config, dense.weights, dense.files, {"kind": kind, **dense.origin})
    config, weights, directory, _ = read_weights(path)
    files = {name: directory / name for name in TEXT_FILES if (directory / name).is_file()}
    if TOKENIZER_FILE in files:
        files[TOKENIZER_FILE] = tokenizer_path(directory)
    return Source(config, weights, files, origin_of(kind, directory))


def refuse_missing(source: str | Path) -> None:
    """Raise CheckpointError if a source is neither a path that exists nor on the hub."""
    if not str(source).startswith(HUB) and not Path(source).exists():
        raise CheckpointError(
            f"there is no checkpoint at {source}: give a run, a checkpoint or an export, the directory of a Hugging "
            f"Face model, or {HUB}OWNER/NAME for one on the hub"
        )


def tokenizer_path(directory: Path) -> Path:
    """Where a checkpoint or an export has the tokenizer that its model was trained with, if it has one."""
    original = directory / ORIGINAL_TOKENIZER_FILE
    return original if os.path.lexists(original) else directory / TOKENIZER_FILE


def as_trained(config: Config, weights: dict[str, Tensor]) -> Config:
    """`config` of the model with these `weights`, to which what an earlier version lacked is added."""
    if isinstance(config.router, RandomConfig) and any(name.startswith("stage.router.heads.") for name in weights):
        return replace(config, router=replace(config.router, gates="learned"))
    targeted = isinstance(config.router, SkipForwardRecurseConfig) and config.router.depth(1) is not None
    if targeted and any(name.startswith("stage.router.") for name in weights):
        weights.setdefault("stage.router.shifts", torch.zeros(2))
    return config


def cast(model: Transformer, dtype: torch.dtype) -> Transformer:
    """Convert the weights to `dtype` in place and return the model.

    The router's weights stay in fp32 or wider: rounding them would change decisions between nearly equal scores.
    """
    model.to(dtype)
    for stage in model.stages.values() if dtype.itemsize < torch.float32.itemsize else ():
        stage.router.float()
    return model
