"""Load a trained model from a directory that holds its config, weights and tokenizer.

The directory is a checkpoint written by training with any backend, or an export written by `megamor export-hf`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer

from megamor.checkpoint import check_same_model, open_checkpoint, stored_file
from megamor.checkpoint.layout import TOKENIZER_FILE
from megamor.config import Config, RandomConfig, config_from_yaml
from megamor.errors import ConfigError
from megamor.interop.export import is_export, read_export
from megamor.model import Transformer, build_model


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
        """Directory and step, for a message."""
        return str(self.directory) if self.step is None else f"{self.directory} (step {self.step})"

    @property
    def tokenizer_path(self) -> Path:
        """`tokenizer.json` of the tokenizer that the model was trained with.

        Raises:
            CheckpointError: the model was saved without a tokenizer.
        """
        return stored_file(self.directory, TOKENIZER_FILE)

    def tokenizer(self) -> Tokenizer:
        """Load the tokenizer; raises what `tokenizer_path` raises."""
        return Tokenizer.from_file(str(self.tokenizer_path))


def usable_device(name: str | None) -> torch.device:
    """The device called `name`; None: the GPU if there is one.

    Raises:
        ConfigError: torch doesn't know the device, or doesn't see it.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ConfigError(f"device {name!r} is unknown: give cpu, cuda or cuda:1") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {name!r}: torch sees {torch.cuda.device_count()} CUDA devices; give another or cpu")
    return device


def load_model(path: str | Path, device: str | None = None, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """Load a model from a checkpoint, a run's directory, its `latest` or an export.

    Args:
        device: where to put the weights (default: the GPU if there is one).
        dtype: data type of the weights, see `cast`.

    Raises:
        CheckpointError: there is no intact checkpoint, or its weights don't fit the model that its config describes.
        ConfigError: torch doesn't know the device, or doesn't see it.
    """
    target = usable_device(device)
    if is_export(Path(path)):
        directory, step = Path(path).resolve(), None
        config, weights = read_export(directory)
    else:
        checkpoint = open_checkpoint(path)
        directory, step = checkpoint.directory, checkpoint.step
        config, weights = config_from_yaml(checkpoint.config_yaml, str(checkpoint.directory)), checkpoint.weights()
    config = as_trained(config, weights)
    # On the meta device first: shapes are compared before any memory is taken or any weight is drawn.
    model = cast(build_model(config, device="meta"), dtype)
    stored, expected = ({name: value.shape for name, value in group.items()} for group in (weights, model.state_dict()))
    check_same_model(directory, stored, expected)
    model.to_empty(device=target)
    model.load_state_dict(weights)
    return LoadedModel(model.eval(), config, directory, step, target)


def as_trained(config: Config, names: Iterable[str]) -> Config:
    """`config` of a model with weights of these `names`, also if the setting they depend on is younger than it."""
    if isinstance(config.router, RandomConfig) and any(name.startswith("stage.router.heads.") for name in names):
        return replace(config, router=replace(config.router, gates="learned"))
    return config


def cast(model: Transformer, dtype: torch.dtype) -> Transformer:
    """Convert the weights to `dtype` in place and return the model.

    The router's weights stay in fp32 or wider: rounding them would change decisions between nearly equal scores.
    """
    model.to(dtype)
    if model.stage is not None and dtype.itemsize < torch.float32.itemsize:
        model.stage.router.float()
    return model
