"""A model out of a directory that carries everything needed: config, weights, tokenizer.

That is a checkpoint of training, by whichever backend, or what `megamor export-hf` has written.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from megamor.checkpoint import check_same_model, open_checkpoint, stored_file
from megamor.checkpoint.layout import TOKENIZER_FILE
from megamor.config import Config, config_from_yaml
from megamor.interop import is_export, read_export
from megamor.model import Transformer, build_model


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode with its config and origin. `step` is None where that isn't known (an export)."""

    model: Transformer
    config: Config
    directory: Path
    step: int | None
    device: torch.device

    @property
    def name(self) -> str:
        """The run's name; of an export, its directory's."""
        return self.directory.name if self.step is None else self.config.run.name

    @property
    def origin(self) -> str:
        """Directory and step, for a person to read."""
        return str(self.directory) if self.step is None else f"{self.directory} (step {self.step})"

    @property
    def tokenizer_path(self) -> Path:
        """`tokenizer.json` of the tokenizer that the model was trained with.

        Raises:
            CheckpointError: it was saved without one.
        """
        return stored_file(self.directory, TOKENIZER_FILE)

    def tokenizer(self) -> Tokenizer:
        """That tokenizer; raises as `tokenizer_path`."""
        return Tokenizer.from_file(str(self.tokenizer_path))


def load_model(path: str | Path, device: str | None = None, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """Load the model of a checkpoint, of a run's `latest` or of an export onto `device` (default: the GPU if there is
    one).

    Raises:
        CheckpointError: nothing there is whole, or its weights are not of the model its config describes.
    """
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if is_export(Path(path)):
        directory, step = Path(path).resolve(), None
        config, weights = read_export(directory)
    else:
        checkpoint = open_checkpoint(path)
        directory, step = checkpoint.directory, checkpoint.step
        config, weights = config_from_yaml(checkpoint.config_yaml, str(checkpoint.directory)), checkpoint.weights()
    model = cast(build_model(config, device="meta"), dtype)
    stored, expected = ({name: value.shape for name, value in group.items()} for group in (weights, model.state_dict()))
    check_same_model(directory, stored, expected)
    model.to_empty(device=target)
    model.load_state_dict(weights)
    return LoadedModel(model.eval(), config, directory, step, target)


def cast(model: Transformer, dtype: torch.dtype) -> Transformer:
    """`model` with weights of type `dtype`; its router's stay in fp32 at least, since near ties would flip."""
    model.to(dtype)
    if model.stage is not None and dtype.itemsize < torch.float32.itemsize:
        model.stage.router.float()
    return model
