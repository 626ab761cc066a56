"""Continue a prompt: `python -m megamor.cli.generate --checkpoint runs/x/checkpoints/latest --prompt 'def '`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from tokenizers import Tokenizer

from megamor.errors import ConfigError, user_errors
from megamor.evaluate.depth_map import render_terminal, save_png
from megamor.evaluate.sampling import Continuation, generate
from megamor.load import load_model

EXAMPLE = """\
example:
  python -m megamor.cli.generate --checkpoint runs/quickstart/checkpoints/latest \\
      --prompt 'def main():' --max-tokens 64 --show-depth --depth-png depth.png

Tokens are routed by the inference rule, which never looks ahead. --show-depth colours every token by the number of
recursions that the model spent on reading it.
"""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="megamor.cli.generate",
        description="Continue a prompt with a trained model.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", required=True, help="a checkpoint, `latest`, a run's or an export's directory")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--max-tokens", type=int, default=64, help="how many tokens to add (default: 64)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: 0.8)")
    parser.add_argument("--top-p", type=float, default=0.95, help="nucleus of the distribution (default: 0.95)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling noise (default: 0)")
    parser.add_argument("--show-depth", action="store_true", help="colour every token by its depth")
    parser.add_argument("--depth-png", type=Path, metavar="FILE", help="also save the depth map as a picture")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 … (default: the GPU if there is one)")
    arguments = parser.parse_args(argv)
    for option, low in (("max_tokens", 1), ("temperature", 0)):
        if getattr(arguments, option) < low:
            parser.error(f"--{option.replace('_', '-')} must be at least {low}")
    if not 0 < arguments.top_p <= 1:
        parser.error("--top-p must be above 0 and at most 1")
    return arguments


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    arguments = parse_arguments(argv)
    loaded = load_model(arguments.checkpoint, arguments.device)
    tokenizer = loaded.tokenizer()
    prompt = tokenizer.encode(arguments.prompt).ids
    if not prompt:
        raise ConfigError("--prompt is empty: give at least one character to continue")
    result = generate(
        loaded.model,
        prompt,
        arguments.max_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
        stop_id=tokenizer.token_to_id("<|endoftext|>"),
    )
    console = Console()
    num_recursions = loaded.config.recursion.num_recursions
    pieces = token_texts(tokenizer, result)
    if arguments.show_depth:
        render_terminal(pieces, result.depths, num_recursions, console)
    else:
        console.print(tokenizer.decode(result.ids), markup=False, highlight=False)
    if arguments.depth_png:
        title = f"recursions per token, {loaded.origin}"
        save_png(pieces, result.depths, num_recursions, arguments.depth_png, title)
        console.print(f"depth map: {arguments.depth_png}")


def token_texts(tokenizer: Tokenizer, result: Continuation) -> list[str]:
    """Text of every token whose depth is known."""
    return [tokenizer.decode([token]) for token in result.ids[: len(result.depths)]]


if __name__ == "__main__":
    main()
