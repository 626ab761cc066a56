"""Export a checkpoint to Hugging Face format: weights, tokenizer, and the code that `trust_remote_code` loads.

example:
  megamor export-hf --checkpoint runs/quickstart/checkpoints/latest --output hf/quickstart

Then, with or without megamor installed:
  >>> from transformers import AutoModelForCausalLM, AutoTokenizer
  >>> model = AutoModelForCausalLM.from_pretrained("hf/quickstart", trust_remote_code=True)
  >>> tokenizer = AutoTokenizer.from_pretrained("hf/quickstart", trust_remote_code=True)
  >>> prompt = tokenizer("def main():", return_tensors="pt")
  >>> print(tokenizer.decode(model.generate(**prompt, max_new_tokens=32)[0]))

The exported model routes by its router's inference rule, which never looks ahead. With --plain, a model of fixed depth
is written with its shared layers repeated, so that the Llama, Qwen3 or Gemma 3 class loads it without code of megamor.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megamor.cli import command_parser, counted, positive
from megamor.errors import ConfigError, user_errors


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Write the export and list its files."""
    parser = command_parser("export-hf", __doc__)
    parser.add_argument("--checkpoint", required=True, help="a checkpoint directory, `latest`, or a run's directory")
    parser.add_argument("--output", required=True, type=Path, help="directory to write; must be new or empty")
    dtypes = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, default="float32", help="type of the weights (default: %(default)s)")
    parser.add_argument("--plain", action="store_true", help="write a dense model that needs no code of megamor")
    text = "with --plain: so many recursions of each stage (default: all)"
    parser.add_argument("--fixed-depth", type=positive, metavar="N", help=text)
    text = "files of `megamor evaluate --json`, whose figures the model card shows"
    parser.add_argument("--evaluation", type=Path, nargs="+", default=[], metavar="FILE", help=text)
    parser.add_argument("--license", help="license of the model for its card, such as apache-2.0")
    arguments = parser.parse_args(argv)
    if arguments.fixed_depth and not arguments.plain:
        raise ConfigError("--fixed-depth needs --plain: add it")

    import torch

    from megamor.checkpoint.layout import CHAT_TEMPLATE_FILE, TOKENIZER_FILE
    from megamor.interop.export import export_huggingface
    from megamor.interop.model_card import model_card
    from megamor.interop.plain import plain_export
    from megamor.load import load_model

    loaded = load_model(arguments.checkpoint, "cpu")
    stored = loaded.tokenizer_path if (loaded.directory / TOKENIZER_FILE).is_file() else None
    card = model_card(
        loaded.model,
        loaded.name,
        loaded.directory,
        plain=arguments.plain,
        license=arguments.license,
        evaluations=arguments.evaluation,
    )
    template = loaded.directory / CHAT_TEMPLATE_FILE
    files = export_huggingface(
        loaded.model,
        arguments.output,
        tokenizer=stored,
        end_of_text=loaded.end_of_text,
        dtype=getattr(torch, arguments.dtype),
        plain=plain_export(loaded.model, arguments.fixed_depth) if arguments.plain else None,
        card=card,
        chat_template=template if template.is_file() else None,
    )
    for file in (file for file in files if file.suffix != ".py"):
        print(f"{file}  {file.stat().st_size:,} bytes")
    if not arguments.plain:
        modules = counted(sum(file.suffix == ".py" for file in files) - 1, "module")
        print(f"{arguments.output / 'modeling_megamor.py'} and {modules} that it imports")
    if stored is None:
        print("The checkpoint has no tokenizer; add one before using AutoTokenizer.")
