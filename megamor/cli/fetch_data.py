"""Download a public corpus as files for megamor preprocess, and record where they came from.

examples:
  megamor fetch-data --list
  megamor fetch-data wikitext-103                     # writes data/raw/wikitext-103/train.jsonl.zst …
  megamor fetch-data tinystories --splits validation --output-dir /corpora
  megamor fetch-data ptb --from /corpora/ptb          # use a local copy, no network
  megamor preprocess --input data/raw/wikitext-103/train.jsonl.zst --tokenizer tok.json --output-prefix data/wt

Files appear under their names only when complete. source.json beside them, written last, holds location, revision,
licence and SHA-256. If a corpus can't be downloaded, the command fails and names its location.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megamor.cli import command_parser, counted
from megamor.corpus.corpora import CORPORA, HubDataset
from megamor.errors import ConfigError, user_errors


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of `megamor fetch-data`."""
    parser = command_parser("fetch-data", __doc__)
    parser.add_argument("name", nargs="?", metavar="NAME", help=f"one of {', '.join(CORPORA)}")
    parser.add_argument("--list", action="store_true", help="show location, licence and size of each corpus and exit")
    parser.add_argument("--splits", nargs="+", metavar="SPLIT", help="only these, such as validation (default: all)")
    parser.add_argument(
        "--from",
        dest="local",
        metavar="PATH",
        help="local copy: the publisher's files, or a file or directory of parquet, JSON lines or text (docs/data.md)",
    )
    parser.add_argument(
        "--allow-mismatch",
        action="store_true",
        help="take a copy that differs from what was published; source.json says how",
    )
    parser.add_argument("--revision", metavar="X", help="another commit or branch of the Hugging Face dataset")
    parser.add_argument("--output-dir", default="data/raw", metavar="DIR", help="writes DIR/NAME (default: data/raw)")
    return parser.parse_args(argv)


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Fetch a corpus, or list all of them. Exits with status 2 and one message after an error the user can fix."""
    args = parse_arguments(argv)
    if args.list:
        for name, corpus in CORPORA.items():
            print(f"{name}: {corpus.title} ({corpus.size}; {', '.join(corpus.source.splits)})")
            print(f"  {corpus.source.location}\n  licence: {corpus.licence}\n  {corpus.note}")
        return
    if args.name not in CORPORA:
        what = f"unknown corpus {args.name!r}" if args.name else "no corpus named"
        raise ConfigError(f"{what}; known are {', '.join(CORPORA)} (see --list)")
    corpus = CORPORA[args.name]
    known = corpus.source.splits
    if unknown := [split for split in args.splits or () if split not in known]:
        raise ConfigError(f"--splits {' '.join(unknown)}: {args.name} has {', '.join(known)}")

    from megamor.corpus.fetch import fetch
    from megamor.progress import ProgressDisplay

    directory = Path(args.output_dir) / args.name
    # For files of the hub, its client draws bars of its own.
    drawn = isinstance(corpus.source, HubDataset) and corpus.source.column is None
    with ProgressDisplay(f"fetching {args.name}", enabled=not drawn) as progress:
        splits = args.splits or list(known)
        options = {"local": args.local, "revision": args.revision, "allow_mismatch": args.allow_mismatch}
        record = fetch(args.name, directory, splits, advance=progress.advance, **options)
    print(f"{directory}: {corpus.title}; licence: {corpus.licence}; from {record['location']}")
    for file in record["files"]:
        count = f"{counted(file['documents'], 'document')}, " if "documents" in file else ""
        differs = f"; not as published: {file['differs']}" if "differs" in file else ""
        print(f"  {file['file']}: {count}{file['bytes'] / 1e6:,.1f} MB{differs}")
