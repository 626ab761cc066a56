"""Export a checkpoint to Hugging Face format: weights, tokenizer, and the code that `trust_remote_code` loads.

example:
  megamor export-hf --checkpoint runs/quickstart/checkpoints/latest --output hf/quickstart

Then, with or without megamor installed:
  >>> from transformers import AutoModelForCausalLM, AutoTokenizer
  >>> model = AutoModelForCausalLM.from_pretrained("hf/quickstart", trust_remote_code=True)
  >>> tokenizer = AutoTokenizer.from_pretrained("hf/quickstart", trust_remote_code=True)
  >>> prompt = tokenizer("def main():", return_tensors="pt")
  >>> print(tokenizer.decode(model.generate(**prompt, max_new_tokens=32)[0]))

The exported model routes by its router's inference rule, which never looks ahead.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megamor.cli import command_parser, counted
from megamor.errors import user_errors


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Write the export and list its files."""
    parser = command_parser("export-hf", __doc__)
    parser.add_argument("--checkpoint", required=True, help="a checkpoint directory, `latest`, or a run's directory")
    parser.add_argument("--output", required=True, type=Path, help="directory to write; must be new or empty")
    dtypes = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, default="float32", help="type of the weights (default: %(default)s)")
    arguments = parser.parse_args(argv)

    import torch

    from megamor.checkpoint.layout import TOKENIZER_FILE
    from megamor.interop.export import export_huggingface
    from megamor.load import load_model

    loaded = load_model(arguments.checkpoint, "cpu")
    stored = loaded.tokenizer_path if (loaded.directory / TOKENIZER_FILE).is_file() else None
    dtype = getattr(torch, arguments.dtype)
    files = export_huggingface(
        loaded.model, arguments.output, tokenizer=stored, end_of_text=loaded.end_of_text, dtype=dtype
    )
    for file in (file for file in files if file.suffix != ".py"):
        print(f"{file}  {file.stat().st_size:,} bytes")
    modules = counted(sum(file.suffix == ".py" for file in files) - 1, "module")
    print(f"{arguments.output / 'modeling_megamor.py'} and {modules} that it imports")
    if stored is None:
        print("The checkpoint has no tokenizer; add one before using AutoTokenizer.")
