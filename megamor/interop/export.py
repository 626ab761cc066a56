"""Export to a directory that Hugging Face's `from_pretrained(..., trust_remote_code=True)` loads, and reading it back.

config.json              shapes under their usual names; under `megamor` the run's sections model, recursion and router,
                         and the two settings of `data` that evaluation depends on
generation_config.json
model.safetensors        each weight once: shared blocks and the tied head are not repeated
modeling_megamor.py      transformers' interface to the model, and beside it a copy of every module that the model needs
tokenizer.json           and tokenizer_config.json, if the checkpoint has a tokenizer; transformers encodes with them as
                         megamor does
original_tokenizer.json  the tokenizer as the data was written with it, if that adds a beginning of text
end_of_text.json         the token that ends a text, if there is one
chat_template.jinja      if the checkpoint has one
README.md                the model card
"""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megamor import __version__
from megamor.checkpoint.layout import CHAT_TEMPLATE_FILE, END_OF_TEXT_FILE, TOKENIZER_FILE
from megamor.codec import EndOfText, TextCodec
from megamor.config import Config, CustomRouterConfig, config_from_dict, config_to_dict
from megamor.config.segments import stages
from megamor.errors import CheckpointError, ConfigError
from megamor.files import parse_json
from megamor.interop.weights import read_state_dict, refuse_occupied
from megamor.lock import WriteLock
from megamor.model import Transformer

PACKAGE = Path(__file__).parents[1]
CODE_MODULE = "megamor.interop.modeling_megamor"
WEIGHTS_FILE, CONFIG_FILE, CARD_FILE = "model.safetensors", "config.json", "README.md"
SECTIONS, DATA_SETTINGS = ("model", "recursion", "router"), ("seq_len", "document_mask")
WEIGHTS_PREFIX = "model."  # the attribute of `MegamorForCausalLM` that is the `Transformer`
ORIGINAL_TOKENIZER_FILE = "original_tokenizer.json"


def export_huggingface(
    model: Transformer,
    directory: Path,
    *,
    tokenizer: Path | None = None,
    end_of_text: EndOfText | None = None,
    dtype: torch.dtype = torch.float32,
    plain: tuple[dict[str, Any], dict[str, Tensor]] | None = None,
    card: str | None = None,
    chat_template: Path | None = None,
) -> list[Path]:
    """Write `model` as a Hugging Face directory; returns its files.

    Args:
        directory: must be new or empty.
        tokenizer: a `tokenizer.json`.
        end_of_text: the record of the training data; None: see `megamor.codec`.
        dtype: type in which weights are stored and loaded; routers stay in fp32.
        plain: what `megamor.interop.plain.plain_export` returns, to be written in place of the model and its code.
        card: the text of README.md.

    Raises:
        ConfigError: `directory` isn't empty, or the router is custom: its code is not part of megamor.
        CheckpointError: a file can't be written; then `directory` is empty again.
        DataError: the tokenizer is damaged, or doesn't have the end of text.
        InUseError: another process is writing to `directory`.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    with WriteLock(directory, str(directory), "give another output"):
        refuse_occupied(directory)
        # Before anything is written: this finds what is wrong with the tokenizer.
        codec = None if tokenizer is None else TextCodec.load(tokenizer, record=end_of_text)
        end_of_text = codec.end_of_text if codec else end_of_text
        settings, state = plain or _with_code(model, end_of_text)
        directory.mkdir(parents=True, exist_ok=True)
        with _removed_after_errors(directory):
            if tokenizer is not None and codec is not None:
                _write_tokenizer(model.config, directory, tokenizer, codec, chat_template)
            for name, source in ({} if plain else code_files()).items():
                (directory / name).write_text(source, encoding="utf-8")
            if end_of_text is not None:
                (directory / END_OF_TEXT_FILE).write_text(end_of_text.to_json(), encoding="utf-8")
            if card is not None:
                (directory / CARD_FILE).write_text(card, encoding="utf-8")
            _write_json(directory / "generation_config.json", {"use_cache": True, **_special_ids(end_of_text)})
            settings = {**settings, "dtype": str(dtype).removeprefix("torch."), **_special_ids(end_of_text)}
            _write_json(directory / CONFIG_FILE, settings)
            stored = {
                name: value.detach().to("cpu", torch.float32 if ".router." in name else dtype).contiguous()
                for name, value in state.items()
            }
            weights = directory / WEIGHTS_FILE
            save_file(stored, weights, metadata={"format": "pt"})
            weights.chmod((directory / CONFIG_FILE).stat().st_mode)  # safetensors makes it readable by its owner alone
        return sorted(directory.iterdir())


@contextmanager
def _removed_after_errors(directory: Path) -> Iterator[None]:
    """Empty `directory` after an error or an interruption: half an export would be in the way of the next try."""
    try:
        yield
    except BaseException as error:
        for path in directory.iterdir():
            path.unlink()
        if isinstance(error, OSError | SafetensorError):
            raise CheckpointError(f"{directory} can't be written: {error}") from error
        raise


def _with_code(model: Transformer, end_of_text: EndOfText | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Content of `config.json`, and weights, of a model that brings its code."""
    config = model.config
    for router in (stage.config.router for stage in stages(config)):
        if isinstance(router, CustomRouterConfig):
            raise ConfigError(
                f"router.target = {router.target} can't be exported: an export contains megamor's own routers only"
            )
    return model_settings(config, torch.float32, end_of_text), {
        WEIGHTS_PREFIX + name: value for name, value in model.state_dict().items()
    }


def _write_tokenizer(
    config: Config, directory: Path, tokenizer: Path, codec: TextCodec, chat_template: Path | None
) -> None:
    # transformers applies the template of a tokenizer.json whenever there is one.
    plain = not codec.adds_tokens
    shutil.copyfile(tokenizer, directory / (TOKENIZER_FILE if plain else ORIGINAL_TOKENIZER_FILE))
    if not plain:
        codec.tokenizer.save(str(directory / TOKENIZER_FILE))
    if chat_template is not None:
        shutil.copyfile(chat_template, directory / CHAT_TEMPLATE_FILE)
    _write_json(directory / "tokenizer_config.json", tokenizer_settings(config, codec.end_of_text))


def is_export(directory: Path) -> bool:
    """Whether `directory` has a Hugging Face `config.json`; the rest may be missing or damaged."""
    return (directory / CONFIG_FILE).is_file()


def read_export(directory: Path) -> tuple[Config, dict[str, Tensor]]:
    """Config and weights of an exported directory, without transformers.

    Sections that an export doesn't contain have their defaults. Weights are on the CPU in the stored type, by
    parameter name.

    Raises:
        CheckpointError: the directory contains another kind of model, or can't be read.
    """
    try:
        settings = parse_json((directory / CONFIG_FILE).read_text(encoding="utf-8"))
        if settings["model_type"] != "megamor":
            raise CheckpointError(
                f"{directory / CONFIG_FILE} describes a model of type {settings['model_type']!r}, not 'megamor': "
                "import it first (megamor import --from), or give a directory written by `megamor export-hf`"
            )
        sections = {name: settings["megamor"][name] for name in (*SECTIONS, "data")}
        sections["model"] = {**sections["model"], "vocab_size": settings["vocab_size"]}
        stored = read_state_dict(directory)
    except (OSError, ValueError, KeyError, TypeError) as error:
        cause = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{directory} can't be read as an exported model: {cause}; export it again") from error
    config = config_from_dict(sections, str(directory / CONFIG_FILE))
    tokenizer = directory / TOKENIZER_FILE
    if tokenizer.is_file():
        config = replace(config, data=replace(config.data, tokenizer=str(tokenizer)))
    return config, {name.removeprefix(WEIGHTS_PREFIX): tensor for name, tensor in stored.items()}


def model_settings(config: Config, dtype: torch.dtype, end_of_text: EndOfText | None) -> dict[str, Any]:
    """Content of `config.json`. Tools that show a model's shape read the keys beside `megamor`."""
    module, values = _flat_name(CODE_MODULE), config_to_dict(config)
    return {
        "architectures": ["MegamorForCausalLM"],
        "model_type": "megamor",
        "auto_map": {"AutoConfig": f"{module}.MegamorConfig", "AutoModelForCausalLM": f"{module}.MegamorForCausalLM"},
        "dtype": str(dtype).removeprefix("torch."),
        **model_shape(config),
        "use_cache": True,
        "tie_word_embeddings": config.model.tied_head,
        **_special_ids(end_of_text),
        "megamor": {
            # Without the size of the vocabulary: transformers changes the one beside `megamor`.
            **{name: {key: value for key, value in values[name].items() if key != "vocab_size"} for name in SECTIONS},
            "data": {name: values["data"][name] for name in DATA_SETTINGS},
        },
    }


def model_shape(config: Config) -> dict[str, int]:
    """The sizes of a model under the names that Hugging Face configurations use."""
    return {
        "vocab_size": config.model.vocab_size,
        "hidden_size": config.model.dim,
        "intermediate_size": config.model.ffn_dim,
        "num_hidden_layers": config.model.num_layers,
        "num_attention_heads": config.model.num_heads,
        "num_key_value_heads": config.model.num_kv_heads,
        "head_dim": config.model.head_dim,
        "max_position_embeddings": config.model.max_seq_len,
    }


def tokenizer_settings(config: Config, end_of_text: EndOfText | None) -> dict[str, Any]:
    """Content of `tokenizer_config.json`: special tokens in a text are text, and nothing is cleaned up in decoding."""
    special = dict.fromkeys(("eos_token", "pad_token"), end_of_text.token) if end_of_text else {}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.model.max_seq_len,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        "padding_side": "left",  # what generation needs; the model takes both sides
        "model_input_names": ["input_ids", "attention_mask"],
        **special,
    }


def code_files() -> dict[str, str]:
    """Source of `modeling_megamor.py` and of every module it needs, by file name.

    transformers follows relative imports only within one directory, so `megamor.model.blocks` becomes
    `model_blocks.py` and its imports from megamor become relative ones.
    """
    note = f"# Copied by megamor {__version__} from %s. Change it there and export again.\n"
    files: dict[str, str] = {}
    waiting = [CODE_MODULE]
    while waiting:
        module = waiting.pop()
        path = _source_path(module)
        lines = path.read_text(encoding="utf-8").splitlines()
        for node in reversed(_own_imports(module)):  # the last first, so that earlier line numbers stay right
            # A package's `__init__` would draw in modules that the model never uses (reading YAML, for one), so each
            # name is imported from the module that defines it.
            homes: dict[str, list[str]] = {}
            for alias in node.names:
                homes.setdefault(_defining_module(node.module or "", alias.name), []).append(ast.unparse(alias))
            lines[node.lineno - 1 : node.end_lineno] = [
                f"{' ' * node.col_offset}from .{_flat_name(home)} import {', '.join(names)}"
                for home, names in homes.items()
            ]
            waiting += [home for home in homes if f"{_flat_name(home)}.py" not in files]
        origin = path.relative_to(PACKAGE.parent).as_posix()
        files[f"{_flat_name(module)}.py"] = "\n".join([note % origin + lines[0], *lines[1:]]) + "\n"
    return files


def _flat_name(module: str) -> str:
    # The code module keeps its short name, under which `config.json` refers to it.
    return "modeling_megamor" if module == CODE_MODULE else module.partition(".")[2].replace(".", "_")


def _source_path(module: str) -> Path:
    stem = PACKAGE.parent.joinpath(*module.split("."))
    return stem / "__init__.py" if stem.is_dir() else stem.with_suffix(".py")


@cache
def _own_imports(module: str) -> list[ast.ImportFrom]:
    """The statements `from megamor.… import …` of a module, nested ones included, in the order of their lines."""
    tree = ast.parse(_source_path(module).read_text(encoding="utf-8"))
    found = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom))
    own = (node for node in found if (node.module or "").split(".")[0] == PACKAGE.name)
    return sorted(own, key=lambda node: node.lineno)


def _defining_module(module: str, name: str) -> str:
    """The module that defines `name`, which `module` defines or imports from there."""
    for node in _own_imports(module):
        if any(alias.name == name for alias in node.names):
            return _defining_module(node.module or "", name)
    return module


def _special_ids(end_of_text: EndOfText | None) -> dict[str, int]:
    """The end of text also pads finished sequences of a batch while others are still generated."""
    return {} if end_of_text is None else {"eos_token_id": end_of_text.id, "pad_token_id": end_of_text.id}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
