"""Export a checkpoint to Hugging Face format: weights, tokenizer and the code file that `trust_remote_code` loads."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from megamor.checkpoint.layout import TOKENIZER_FILE
from megamor.errors import user_errors
from megamor.interop import export_huggingface
from megamor.load import load_model

EXAMPLE = """\
example:
  megamor export-hf --checkpoint runs/quickstart/checkpoints/latest --output hf/quickstart

  and then, with or without megamor installed:
  >>> from transformers import AutoModelForCausalLM, AutoTokenizer
  >>> model = AutoModelForCausalLM.from_pretrained("hf/quickstart", trust_remote_code=True)
  >>> tokenizer = AutoTokenizer.from_pretrained("hf/quickstart", trust_remote_code=True)
  >>> prompt = tokenizer("def main():", return_tensors="pt")
  >>> print(tokenizer.decode(model.generate(**prompt, max_new_tokens=32)[0]))

The model follows its router's inference rule, which never looks ahead.
"""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="megamor export-hf",
        description="Export a checkpoint to Hugging Face format.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", required=True, help="a checkpoint directory, `latest`, or a run directory")
    parser.add_argument("--output", required=True, type=Path, help="directory to write; must be new or empty")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="type of the weights (default: float32)")
    return parser.parse_args(argv)


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    arguments = parse_arguments(argv)
    loaded = load_model(arguments.checkpoint, "cpu")
    tokenizer = loaded.directory / TOKENIZER_FILE
    has_tokenizer = tokenizer.is_file()
    files = export_huggingface(
        loaded.model,
        arguments.output,
        tokenizer=tokenizer if has_tokenizer else None,
        dtype=DTYPES[arguments.dtype],
    )
    console = Console(highlight=False)
    for file in files:
        console.print(f"{file}  {file.stat().st_size:,} bytes", markup=False, soft_wrap=True)
    if not has_tokenizer:
        console.print("The checkpoint has no tokenizer; add one before using AutoTokenizer.")


if __name__ == "__main__":
    main()
