"""Downstream tasks of a few short documents, of every kind of request, with a tokenizer of bytes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer

from megamor.codec import TextCodec, find_end_of_text
from megamor.config import Config, RouterConfig
from megamor.model import Transformer
from tests.combinations import lively_model, tiny_config
from tests.serve.fake import byte_tokenizer

CONTEXT = 48
QUESTIONS = [
    {"question": "Which animal barks?", "choices": ["the cat", "a dog", "fish"], "gold": 1},
    {"question": "Two and two are", "choices": ["five", "three", "four"], "gold": 2},
    {"question": "The sky on a day without any clouds at all, they say, is", "choices": ["a", "b"], "gold": 0},
]
TEXTS = [
    {"text": "one two", "last": " three"},
    {"text": "the quick brown fox jumps over a dog", "last": " again"},
    {"text": "a long text, longer than the context of the model, " * 3, "last": " ends"},
]
KINDS: dict[str, dict[str, Any]] = {
    "choose": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "last_word": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{last}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "unprompted": {
        "output_type": "loglikelihood",
        "doc_to_text": "",
        "doc_to_target": "{{last}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "perplexity"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}{{last}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "write": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{last}}",
        "generation_kwargs": {"until": ["e", "W"], "max_gen_toks": 9, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def write_tasks(directory: Path) -> Path:
    """A directory with a YAML file for each of `KINDS`, and their documents."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, rows in (("questions", QUESTIONS), ("texts", TEXTS)):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, kind in KINDS.items():
        file = directory / f"{'questions' if name == 'choose' else 'texts'}.jsonl"
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}}, "test_split": "test"}
        task = {"task": name, **data, "fewshot_split": "test", **kind, "metadata": {"version": 1}}
        (directory / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return directory


def task_tokenizer() -> Tokenizer:
    """One token per byte, and <|endoftext|>."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


def task_codec() -> TextCodec:
    """The codec of `task_tokenizer`."""
    tokenizer = task_tokenizer()
    return TextCodec(tokenizer, "test", find_end_of_text(tokenizer, "test"))


def task_config(router: RouterConfig, **options: Any) -> Config:
    """A tiny model for the tasks' tokens, whose context is shorter than some texts."""
    config = tiny_config(router, **options)
    return replace(config, model=replace(config.model, vocab_size=257, max_seq_len=CONTEXT))


def task_model(router: RouterConfig, dtype: torch.dtype = torch.float64, **options: Any) -> Transformer:
    """A lively model of `task_config`."""
    return lively_model(task_config(router, **options), dtype=dtype).eval()
