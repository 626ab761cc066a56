"""Continue a prompt with a trained model, and show how many recursions each token took.

example:
  megamor generate --checkpoint runs/quickstart/checkpoints/latest \\
      --prompt 'def main():' --max-tokens 64 --show-depth --depth-image depth.svg

Tokens are routed by the inference rule, which never looks ahead. --show-depth colours each token by the number of
recursions that the model spent on reading it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from megamor.cli import add_cache_options, add_exit_options, cache_options, chosen_exit, command_parser, positive
from megamor.errors import ConfigError, user_errors


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the options and check their values."""
    parser = command_parser("generate", __doc__)
    checkpoint = "a checkpoint, `latest`, or the directory of a run or an export"
    parser.add_argument("--checkpoint", required=True, help=checkpoint)
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--max-tokens", type=int, default=64, help="how many tokens to add (default: %(default)s)")
    greedy = "0 always takes the likeliest token (default: %(default)s)"
    parser.add_argument("--temperature", type=float, default=0.8, help=greedy)
    nucleus = "sample only from the likeliest tokens that have this probability together (default: %(default)s)"
    parser.add_argument("--top-p", type=float, default=0.95, help=nucleus)
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (default: %(default)s)")
    budget = "most keys and values that the cache holds for each layer in each recursion (default: all)"
    parser.add_argument("--kv-budget", type=positive, metavar="N", help=budget)
    add_cache_options(parser)
    add_exit_options(parser)
    parser.add_argument("--show-depth", action="store_true", help="colour each token by its depth")
    parser.add_argument("--depth-image", type=Path, metavar="FILE.svg", help="also save the depth map as a picture")
    parser.add_argument("--depth-png", dest="depth_image", type=Path, help=argparse.SUPPRESS)  # its former name
    parser.add_argument("--device", help="cpu, cuda, cuda:1 … (default: the GPU if there is one)")
    arguments = parser.parse_args(argv)
    for option, low in (("max_tokens", 1), ("temperature", 0)):
        if not low <= getattr(arguments, option) < math.inf:
            parser.error(f"--{option.replace('_', '-')} must be a number of at least {low}")
    if not 0 < arguments.top_p <= 1:
        parser.error("--top-p must be above 0 and at most 1")
    if not -(2**63) <= arguments.seed < 2**64:
        parser.error("--seed must fit into 64 bits")
    if arguments.depth_image and arguments.depth_image.suffix != ".svg":
        parser.error(f"the depth map is an SVG file: give --depth-image {arguments.depth_image.with_suffix('.svg')}")
    return arguments


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Print the prompt and its continuation, or their depth map."""
    arguments = parse_arguments(argv)
    rule, bounds = chosen_exit(arguments), cache_options(arguments, arguments.kv_budget)

    from megamor.codec import Detokenizer, texts_of_tokens
    from megamor.config.segments import max_depth
    from megamor.evaluate.depth_map import DepthMap
    from megamor.evaluate.sampling import generate
    from megamor.load import load_model
    from megamor.model import CacheBound
    from megamor.progress import plain_console

    bound = CacheBound(arguments.kv_budget, **bounds) if arguments.kv_budget else None
    loaded = load_model(arguments.checkpoint, arguments.device)
    loaded.model.set_exit(rule)
    codec = loaded.codec()
    prompt = codec.encode(arguments.prompt, "--prompt")
    if not prompt:
        raise ConfigError("--prompt is empty: give at least one character to continue")
    result = generate(
        loaded.model,
        prompt,
        arguments.max_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
        bound=bound,
        stop_id=codec.end_of_text.id if codec.end_of_text else None,
    )
    # The last token was sampled but never read, so it has no depth.
    texts = texts_of_tokens(codec, result.ids)[: len(result.depths)]
    depth_map = DepthMap(texts, result.depths, max_depth(loaded.config), result.prompt_length)
    if arguments.show_depth:
        depth_map.print(plain_console())
    else:
        continuation = Detokenizer(codec, prompt)
        print(arguments.prompt + continuation.push(result.ids[len(prompt) :]) + continuation.finish())
    if arguments.depth_image:
        depth_map.save_svg(arguments.depth_image, f"Recursions per token: {loaded.name}")
        print(f"depth map: {arguments.depth_image}")
