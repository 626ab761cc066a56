"""Fetch a public corpus as files that megamor preprocess takes, and note where they came from.

examples:
  megamor fetch-data --list
  megamor fetch-data wikitext-103                     # writes data/raw/wikitext-103/train.jsonl.zst …
  megamor fetch-data tinystories --splits validation --output-dir /corpora
  megamor fetch-data ptb --from /corpora/ptb          # a copy that is already here, no network
  megamor preprocess --input data/raw/wikitext-103/train.jsonl.zst --tokenizer tok.json --output-prefix data/wt

Files appear under their names only when complete; source.json beside them, written last, holds location, revision,
licence and SHA-256. A corpus that can't be had is an error that names its location: nothing is put in its place.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megamor.corpus.fetch_sources import fetch
from megamor.corpus.study_data import STUDY_SETS
from megamor.errors import ConfigError, user_errors


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="fetch_data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help=f"one of {', '.join(STUDY_SETS)}")
    parser.add_argument("--list", action="store_true", help="show location, licence and size of each, fetch nothing")
    parser.add_argument("--splits", nargs="+", metavar="SPLIT", help="only these, such as validation (default: all)")
    parser.add_argument(
        "--from",
        dest="local",
        metavar="PATH",
        help="a copy on this machine: the publisher's files, or what datasets can load (save_to_disk, parquet, text)",
    )
    parser.add_argument("--revision", metavar="X", help="another commit or branch of the Hugging Face dataset")
    parser.add_argument("--output-dir", default="data/raw", metavar="DIR", help="writes DIR/NAME (default: data/raw)")
    return parser.parse_args(argv)


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point. Exit status 2 and one message for whatever the user can mend."""
    args = parse_arguments(argv)
    if args.list:
        print_list()
        return
    if args.name not in STUDY_SETS:
        what = f"unknown corpus {args.name!r}" if args.name else "no corpus named"
        raise ConfigError(f"{what}; known are {', '.join(STUDY_SETS)} (see --list)")
    chosen = STUDY_SETS[args.name]
    known = chosen.source.splits
    if unknown := [split for split in args.splits or () if split not in known]:
        raise ConfigError(f"--splits {' '.join(unknown)}: {args.name} has {', '.join(known)}")
    directory = Path(args.output_dir) / args.name
    record = fetch(args.name, chosen, directory, args.splits or list(known), local=args.local, revision=args.revision)
    print(f"{directory}: {chosen.title}; licence: {chosen.licence}; from {record['location']}")
    for file in record["files"]:
        count = f"{file['documents']:,} documents, " if file.get("documents") is not None else ""
        print(f"  {file['file']}: {count}{file['bytes'] / 1e6:,.1f} MB")


def print_list() -> None:
    """The catalogue."""
    for name, chosen in STUDY_SETS.items():
        print(f"{name}: {chosen.title} ({chosen.size}; {', '.join(chosen.source.splits)})")
        print(f"  {chosen.source.location}")
        print(f"  licence: {chosen.licence}\n  {chosen.note}")


if __name__ == "__main__":
    main()
