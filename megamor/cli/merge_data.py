"""Merge token shards into one data set, byte for byte what one run over all of the text would have written.

examples:
  # data/pile_shard_00000_of_00016 to 00015, from megamor preprocess --shard 0/16 and so on: writes data/pile
  megamor merge-data --output-prefix data/pile

  # any data sets in the .bin/.idx format, also of Megatron-LM and GPT-NeoX, in this order
  megamor merge-data --inputs data/a data/b_text_document --output-prefix data/ab

The shards stay; memory doesn't grow with them. Damaged and missing shards, different tokenizers and different item
types are refused, and the output appears under its name only when complete.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megamor.corpus.array import find_shards
from megamor.corpus.merge import merge_shards
from megamor.errors import user_errors
from megamor.metrics.byte_progress import byte_progress


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="merge_data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--inputs", nargs="+", metavar="PREFIX", help="data sets to merge, in order (default: the shards of the output)"
    )
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX", help="writes PREFIX.bin, .idx, .meta.json")
    parser.add_argument(
        "--assume-same-tokenizer",
        action="store_true",
        help="merge data with a .meta.json and foreign data without one: you know that one tokenizer wrote both",
    )
    return parser.parse_args(argv)


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point. Exit status 2 and one message for whatever the user can mend."""
    args = parse_arguments(argv)
    prefixes = args.inputs or find_shards(args.output_prefix)
    size = sum(path.stat().st_size for path in (Path(f"{prefix}.bin") for prefix in prefixes) if path.is_file())
    with byte_progress("merging", size) as advance:
        merged = merge_shards(
            prefixes, args.output_prefix, assume_same_tokenizer=args.assume_same_tokenizer, advance=advance
        )
    print(
        f"{merged.prefix}: {merged.num_documents:,} documents, {merged.num_tokens:,} tokens from {len(prefixes)} shards"
    )


if __name__ == "__main__":
    main()
