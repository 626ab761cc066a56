"""Turn raw text into token shards for training: tokenize, split by document, write `.bin`/`.idx`.

examples:
  # one JSON object with a "text" key per line, plain or compressed; patterns in quotes
  python tools/preprocess.py --input 'pile/*.jsonl.zst' --tokenizer tok.json --output-prefix data/pile --append-eod

  # 1 % of the documents held out: writes data/x_train and data/x_val
  python tools/preprocess.py --input A.jsonl.zst B.txt 'dir/*.jsonl' --tokenizer tok.json --output-prefix data/x \\
      --append-eod --split 0.99,0.01 --workers 8

  # a Hugging Face dataset, from the hub or a local directory
  python tools/preprocess.py --hf-dataset Skylion007/openwebtext --tokenizer tok.json --output-prefix data/owt \\
      --append-eod

Every .txt file is one document. Documents that are empty or only white space are left out and counted. The output is
the same, byte for byte, whatever the number of workers, and appears under its name only when complete.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

if __package__ in (None, ""):  # run as a file: the repository, not tools/, is what imports start from
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megamor.data.encode import EncodedChunk, EncodeOptions, TextEncoder, encode_in_order
from megamor.data.indexed import dtype_for_vocab
from megamor.data.meta import ShardMeta, sha256_of_file
from megamor.data.text import TextInput, find_files
from megamor.data.writer import ShardWriter
from megamor.errors import ConfigError, DataError, user_errors

_SPLIT_NAMES = ("train", "val", "test")
_BAD_LINES_SHOWN = 10
_PLAIN_REPORT_SECONDS = 30.0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="preprocess", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--input", nargs="+", metavar="FILE", help=".jsonl, .jsonl.zst, .jsonl.gz or .txt files, or patterns of them"
    )
    source.add_argument("--hf-dataset", metavar="NAME_OR_PATH", help="dataset of the Hugging Face hub, or a local one")
    parser.add_argument("--hf-config", metavar="X", help="configuration of --hf-dataset, if it has several")
    parser.add_argument("--hf-revision", metavar="X", help="branch or commit of --hf-dataset on the hub")
    parser.add_argument("--hf-split", default="train", metavar="NAME", help="split of --hf-dataset (default: train)")
    parser.add_argument("--tokenizer", required=True, metavar="FILE", help="tokenizer.json of the tokenizers library")
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX", help="writes PREFIX.bin, .idx, .meta.json")
    parser.add_argument("--json-key", default="text", metavar="KEY", help="key or column of the text (default: text)")
    parser.add_argument(
        "--append-eod", action="store_true", help="end every document with the end-of-document token (recommended)"
    )
    parser.add_argument("--eod-token", metavar="TOKEN", help="that token (default: <|endoftext|>, else </s>)")
    parser.add_argument(
        "--split",
        metavar="SHARES",
        help="2 or 3 shares adding up to 1, such as 0.99,0.01: writes PREFIX_train, PREFIX_val and PREFIX_test; where "
        "a document goes depends on its text alone, so adding files moves none",
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="default: all cores")
    parser.add_argument(
        "--on-bad-line",
        choices=("stop", "skip"),
        default="stop",
        help="a line that is not JSON, not UTF-8 or without the key: stop, naming file and line (default), or skip, "
        "count and report it",
    )
    return parser.parse_args(argv)


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point. Exit status 2 and one message for whatever the user can mend."""
    args = parse_arguments(argv)
    if args.workers < 1:
        raise ConfigError(f"--workers {args.workers}: at least one is needed")
    shares = parse_shares(args.split)
    encoder = TextEncoder.load(args.tokenizer, eod_token=args.eod_token, need_eod=args.append_eod)
    options = EncodeOptions(
        tokenizer=args.tokenizer,
        json_key=args.json_key,
        eod_token=encoder.eod_token,
        append_eod=args.append_eod,
        shares=shares,
        skip_bad_lines=args.on_bad_line == "skip",
    )
    meta = ShardMeta(
        tokenizer_name=Path(args.tokenizer).name,
        tokenizer_sha256=sha256_of_file(args.tokenizer),
        vocab_size=encoder.vocab_size,
        eod_token=encoder.eod_token,
        eod_id=encoder.eod_id,
        eod_appended=args.append_eod,
    )
    prefixes = [f"{args.output_prefix}_{name}" for name in _SPLIT_NAMES[: len(shares)]] if args.split else []
    totals = preprocess(open_input(args), options, meta, prefixes or [args.output_prefix], workers=args.workers)
    print_summary(totals)


def parse_shares(split: str | None) -> tuple[float, ...]:
    """Shares of the splits; (1.0,) without any. Raises ConfigError unless they are 2 or 3 and add up to 1."""
    if split is None:
        return (1.0,)
    try:
        shares = tuple(float(share) for share in split.split(","))
    except ValueError:
        shares = ()
    if len(shares) not in (2, 3) or not all(0 < share < 1 for share in shares) or not math.isclose(sum(shares), 1):
        raise ConfigError(f"--split {split}: give 2 or 3 positive shares that add up to 1, such as 0.99,0.01")
    return shares


def open_input(args: argparse.Namespace) -> TextInput:
    """The texts that the command line names."""
    if args.input:
        return find_files(args.input)
    from megamor.data.hub import DatasetInput

    return DatasetInput(args.hf_dataset, args.hf_config, args.hf_split, args.json_key, args.hf_revision)


@dataclass
class Totals:
    """What has been done so far. `documents` and `tokens` count by (split, source)."""

    prefixes: Sequence[str]
    names: Sequence[str]
    documents: Counter[tuple[int, int]] = field(default_factory=Counter)
    tokens: Counter[tuple[int, int]] = field(default_factory=Counter)
    text_bytes: int = 0
    empty: int = 0
    blank: int = 0
    bad: int = 0
    bad_shown: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def add(self, chunk: EncodedChunk) -> None:
        """Count one chunk."""
        for split, lengths in enumerate(chunk.lengths):
            self.documents[split, chunk.source] += len(lengths)
            self.tokens[split, chunk.source] += len(chunk.tokens[split])
        self.text_bytes += chunk.text_bytes
        self.empty += chunk.empty
        self.blank += chunk.blank
        self.bad += len(chunk.bad)
        self.bad_shown += chunk.bad[: _BAD_LINES_SHOWN - len(self.bad_shown)]

    def sources_of(self, split: int) -> list[dict[str, object]]:
        """Documents and tokens of each source in one split, for the side file."""
        return [
            {"name": name, "documents": self.documents[split, source], "tokens": self.tokens[split, source]}
            for source, name in enumerate(self.names)
        ]

    def speed(self) -> str:
        """Text and tokens so far, and per second."""
        seconds = max(time.monotonic() - self.started, 1e-9)
        megabytes = self.text_bytes / 1e6
        return (
            f"{megabytes:,.1f} MB of text, {self.tokens.total() / 1e6:,.2f} M tokens in {seconds:,.0f} s "
            f"({megabytes / seconds:,.2f} MB/s)"
        )


def preprocess(
    texts: TextInput, options: EncodeOptions, meta: ShardMeta, prefixes: Sequence[str], *, workers: int
) -> Totals:
    """Tokenize `texts` into one shard for each of `prefixes`, one per share of `options`; all of them or none.

    Raises DataError for damaged input, for a split that gets no document, and if the output can't be written.
    """
    totals = Totals(prefixes, texts.names)
    dtype = dtype_for_vocab(meta.vocab_size or 0)
    with ExitStack() as stack:
        writers = [stack.enter_context(ShardWriter(prefix, dtype)) for prefix in prefixes]
        progress = stack.enter_context(progress_display(texts.size))
        for chunk in encode_in_order(texts.chunks(), options, workers):
            for writer, tokens, lengths in zip(writers, chunk.tokens, chunk.lengths, strict=True):
                writer.add_documents(tokens, lengths)
            totals.add(chunk)
            progress.update(totals, chunk.position)
        for split, writer in enumerate(writers):
            if not writer.num_documents:
                raise DataError(
                    f"{writer.prefix} would have no document ({totals.documents.total()} in all, {totals.empty} empty, "
                    f"{totals.bad} bad lines); check the input"
                    + (" or the shares of --split" if len(writers) > 1 else "")
                )
            writer.finish(replace(meta, sources=totals.sources_of(split)))
        for writer in writers:
            writer.publish()
    return totals


class PlainProgress:
    """A line now and then, where the output is not a terminal."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._next = time.monotonic() + _PLAIN_REPORT_SECONDS

    def update(self, totals: Totals, position: int) -> None:
        """Report if it is time."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _PLAIN_REPORT_SECONDS
            print(f"{position / max(self._size, 1):6.1%}  {totals.speed()}", file=sys.stderr, flush=True)


class TerminalProgress:
    """A bar with speed and remaining time, drawn from `update`: a thread of its own would not survive the fork."""

    def __init__(self, size: int, bar: Progress) -> None:
        self._bar = bar
        self._task = bar.add_task("", total=size or None, speed="")
        self._next = 0.0

    def update(self, totals: Totals, position: int) -> None:
        """Draw, ten times a second at most."""
        self._bar.update(self._task, completed=position, speed=totals.speed())
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + 0.1
            self._bar.refresh()


@contextmanager
def progress_display(size: int) -> Iterator[PlainProgress | TerminalProgress]:
    """The display that suits stderr, for an input of `size` units."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield PlainProgress(size)
        return
    columns = (
        BarColumn(),
        TextColumn("{task.percentage:3.0f}%"),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, auto_refresh=False) as bar:
        yield TerminalProgress(size, bar)


def print_summary(totals: Totals) -> None:
    """What was written, and what was left out."""
    for split, prefix in enumerate(totals.prefixes):
        documents = sum(count for (of, _), count in totals.documents.items() if of == split)
        tokens = sum(count for (of, _), count in totals.tokens.items() if of == split)
        print(f"{prefix}: {documents:,} documents, {tokens:,} tokens")
    print(totals.speed())
    if totals.empty or totals.blank:
        print(f"left out: {totals.empty:,} documents without text, {totals.blank:,} blank lines")
    if totals.bad:
        print(f"skipped: {totals.bad:,} bad lines" + (", among them" if totals.bad > len(totals.bad_shown) else ""))
        for message in totals.bad_shown:
            print(f"  {message}")


if __name__ == "__main__":
    main()
