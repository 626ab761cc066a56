"""Merge token shards into one data set, byte for byte what one run over all of the text would have written.

examples:
  # data/pile_shard_00000_of_00016 to 00015, from megamor preprocess --shard 0/16 and so on: writes data/pile
  megamor merge-data --output-prefix data/pile

  # any data sets in the .bin/.idx format, also of Megatron-LM and GPT-NeoX, in this order
  megamor merge-data --inputs data/a data/b_text_document --output-prefix data/ab

The shards are kept, and memory doesn't grow with them. Damaged or missing shards, different tokenizers and different
item types are errors. The output appears under its name only when complete.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megamor.cli import command_parser, counted
from megamor.errors import user_errors


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Merge. Exits with status 2 and one message after an error the user can fix."""
    parser = command_parser("merge-data", __doc__)
    inputs = "data sets to merge, in order (default: the shards of the output)"
    parser.add_argument("--inputs", nargs="+", metavar="PREFIX", help=inputs)
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX", help="writes PREFIX.bin, .idx, .meta.json")
    same = "merge data with a .meta.json and foreign data without one, which you know was written with one tokenizer"
    parser.add_argument("--assume-same-tokenizer", action="store_true", help=same)
    args = parser.parse_args(argv)

    from megamor.corpus.array import find_shards
    from megamor.corpus.merge import merge_shards
    from megamor.progress import ProgressDisplay

    prefixes = args.inputs or find_shards(args.output_prefix)
    size = sum(path.stat().st_size for path in (Path(f"{prefix}.bin") for prefix in prefixes) if path.is_file())
    same = args.assume_same_tokenizer
    with ProgressDisplay("merging", size) as progress:
        merged = merge_shards(prefixes, args.output_prefix, assume_same_tokenizer=same, advance=progress.advance)
    documents, tokens = counted(merged.num_documents, "document"), counted(merged.num_tokens, "token")
    print(f"{merged.prefix}: {documents}, {tokens} from {counted(len(prefixes), 'shard')}")
