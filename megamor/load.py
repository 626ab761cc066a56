"""A model out of a checkpoint directory, which carries everything needed: config, weights, tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer

from megamor.checkpoint import Checkpoint, check_same_model, open_checkpoint
from megamor.config import Config, config_from_dict
from megamor.model import Transformer, build_model


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode with its config and origin."""

    model: Transformer
    config: Config
    checkpoint: Checkpoint
    device: torch.device

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the model was trained with.

        Raises:
            CheckpointError: it was saved without one.
        """
        return Tokenizer.from_file(str(self.checkpoint.tokenizer_path))


def load_model(path: str | Path, device: str | None = None, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """Load the model of a checkpoint (or of a run's `latest`) onto `device` (default: the GPU if there is one).

    Raises:
        CheckpointError: nothing there is a whole checkpoint, or its weights are not of the model its config describes.
    """
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    checkpoint = open_checkpoint(path)
    config = config_from_dict(yaml.safe_load(checkpoint.config_yaml))
    model = build_model(config, device="meta")
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    check_same_model(checkpoint.directory, expected)
    model.to_empty(device=target)
    model.load_state_dict(checkpoint.weights())
    return LoadedModel(model.to(dtype).eval(), config, checkpoint, target)
