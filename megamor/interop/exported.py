"""Reading back what `export.py` has written: a Hugging Face directory, without transformers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from megamor.checkpoint.layout import TOKENIZER_FILE
from megamor.config import Config, config_from_dict
from megamor.errors import CheckpointError
from megamor.interop.export import CONFIG_FILE, SECTIONS, WEIGHTS_FILE, WEIGHTS_PREFIX


def is_export(directory: Path) -> bool:
    """Whether this is a directory in Hugging Face's form, whole or not."""
    return (directory / CONFIG_FILE).is_file()


def read_export(directory: Path) -> tuple[Config, dict[str, Tensor]]:
    """Config (what an export doesn't have at its defaults) and weights by parameter name, on the CPU as stored.

    Raises:
        CheckpointError: the directory is of another model than megamor's, or can't be read.
    """
    try:
        settings = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
        if settings["model_type"] != "megamor":
            raise CheckpointError(
                f"{directory / CONFIG_FILE} is of a model of type {settings['model_type']!r}, not of megamor's: "
                "give what megamor export-hf has written"
            )
        sections = {name: settings["megamor"][name] for name in (*SECTIONS, "data")}
        stored = load_file(directory / WEIGHTS_FILE)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        cause = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{directory} can't be read as an exported model: {cause}; export it again") from error
    config = config_from_dict(sections, str(directory / CONFIG_FILE))
    tokenizer = directory / TOKENIZER_FILE
    if tokenizer.is_file():
        config = replace(config, data=replace(config.data, tokenizer=str(tokenizer)))
    return config, {name.removeprefix(WEIGHTS_PREFIX): tensor for name, tensor in stored.items()}
