"""Turn raw text into token shards for training: tokenize, split by document, write `.bin`/`.idx`.

examples:
  # one JSON object with a "text" key per line, plain or compressed; patterns in quotes
  megamor preprocess --input 'pile/*.jsonl.zst' --tokenizer tok.json --output-prefix data/pile --append-eod

  # 1 % of the documents held out: writes data/x_train and data/x_val
  megamor preprocess --input A.jsonl.zst B.txt 'dir/*.parquet' --tokenizer tok.json --output-prefix data/x \\
      --append-eod --split 0.99,0.01 --workers 8

  # a Hugging Face dataset, from the hub or a local directory, and the tokenizer of a model of the hub
  megamor preprocess --hf-dataset Skylion007/openwebtext --tokenizer openai-community/gpt2 \\
      --output-prefix data/owt --append-eod --deduplicate

  # a job of an array of 16: writes data/pile_shard_00003_of_00016; megamor merge-data joins them
  megamor preprocess --input 'pile/*.jsonl.zst' --tokenizer tok.json --output-prefix data/pile --append-eod \\
      --shard 3/16

  # characters as tokens; the vocabulary is written to data/shakespeare.tokenizer.json
  megamor preprocess --input input.txt --tokenizer char --output-prefix data/shakespeare

Interrupted at any point, the same command goes on from there. The output is the same, byte for byte, whatever the
number of workers and interruptions, and appears under its name only when complete. docs/data.md explains the options.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from megamor.cli.preprocess_display import print_summary, progress_display, tell
from megamor.corpus.accelerator import ACCELERATORS, make_encoder
from megamor.corpus.array import parse_shard, shard_prefix
from megamor.corpus.dedup import read_held_out
from megamor.corpus.documents import parse_chunk
from megamor.corpus.encode import ChunkEncoder, EncodeOptions
from megamor.corpus.preprocess import Interrupted, Plan, Run, Totals
from megamor.corpus.text import CHUNK_BYTES, Share, TextInput, find_files
from megamor.corpus.tokenizer import BUILT_IN, DEFAULT_EOD_TOKENS, TextEncoder, built_in_tokenizer, find_tokenizer
from megamor.data.meta import ShardMeta
from megamor.errors import ConfigError, user_errors

_SPLIT_NAMES = ("train", "val", "test")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="preprocess", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _add_input_arguments(parser.add_argument_group("input"))
    _add_document_arguments(parser.add_argument_group("documents"))
    output = parser.add_argument_group("output and run")
    output.add_argument("--output-prefix", required=True, metavar="PREFIX", help="writes PREFIX.bin, .idx, .meta.json")
    output.add_argument(
        "--split",
        metavar="SHARES",
        help="2 or 3 shares adding up to 1, such as 0.99,0.01: writes PREFIX_train, PREFIX_val and PREFIX_test; where "
        "a document goes depends on its text alone, so adding files moves none",
    )
    output.add_argument(
        "--shard", metavar="I/N", help="do the I-th N-th of the input only, I from 0: writes PREFIX_shard_I_of_N"
    )
    output.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="default: all cores")
    output.add_argument(
        "--accelerator",
        choices=ACCELERATORS,
        default="auto",
        help="gigatoken gives the ids of the tokenizers library much faster, and is checked against it on a sample of "
        "every file; auto uses it if it is installed and can do the tokenizer, and says so (default)",
    )
    output.add_argument("--restart", action="store_true", help="start over, also where an interrupted run could go on")
    return parser.parse_args(argv)


def _add_input_arguments(group: argparse._ArgumentGroup) -> None:
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--input",
        nargs="+",
        metavar="FILE",
        help=".jsonl, .jsonl.zst, .jsonl.gz, .txt or .parquet files, or patterns of them",
    )
    source.add_argument("--hf-dataset", metavar="NAME_OR_PATH", help="dataset of the Hugging Face hub, or a local one")
    group.add_argument("--hf-config", metavar="X", help="configuration of --hf-dataset, if it has several")
    group.add_argument("--hf-revision", metavar="X", help="branch or commit of --hf-dataset on the hub")
    group.add_argument("--hf-split", default="train", metavar="NAME", help="split of --hf-dataset (default: train)")
    group.add_argument("--hf-streaming", action="store_true", help="read --hf-dataset without downloading it first")
    group.add_argument(
        "--tokenizer",
        required=True,
        metavar="X",
        help="tokenizer.json of the tokenizers library, a directory with one, a name on the Hugging Face hub, or "
        "char or byte: made here, and written to PREFIX.tokenizer.json",
    )
    group.add_argument("--json-key", default="text", metavar="KEY", help="key or column of the text (default: text)")
    group.add_argument(
        "--on-bad-line",
        choices=("stop", "skip"),
        default="stop",
        help="a line that is not JSON, not UTF-8 or without the key: stop, naming file and line (default), or skip, "
        "count and report it",
    )


def _add_document_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--append-eod", action="store_true", help="end every document with the end-of-document token (recommended)"
    )
    group.add_argument("--eod-token", metavar="TOKEN", help="that token (default: <|endoftext|>, else </s>)")
    group.add_argument(
        "--document-separator",
        metavar="STRING",
        help="a text is several documents with this between them; without it, '<|endoftext|>' in a text is just text",
    )
    group.add_argument("--min-length", type=int, default=0, metavar="N", help="leave out documents of under N tokens")
    group.add_argument(
        "--deduplicate", action="store_true", help="keep only the first of documents with the same text (same hash)"
    )
    group.add_argument(
        "--holdout",
        metavar="FILE",
        help="leave out the documents in this file: texts in any form of --input, or one hash a line (docs/data.md)",
    )


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point. Exit status 2 and one message for whatever the user can mend, 130 after Ctrl-C."""
    args = parse_arguments(argv)
    if args.workers < 1:
        raise ConfigError(f"--workers {args.workers}: at least one is needed")
    if args.min_length < 0:
        raise ConfigError(f"--min-length {args.min_length}: a number of tokens, 0 or more")
    shares = parse_shares(args.split)
    share = Share(*parse_shard(args.shard)) if args.shard else Share()
    texts = open_input(args)
    if args.shard and not texts.size:
        raise ConfigError("--shard needs an input of known size; leave out --hf-streaming")
    tokenizer = open_tokenizer(args, texts)
    options = EncodeOptions(
        json_key=args.json_key,
        separator=args.document_separator,
        append_eod=args.append_eod,
        shares=shares,
        skip_bad=args.on_bad_line == "skip",
        min_tokens=args.min_length,
        hashes=args.deduplicate,
        **({"held_out": read_held_out(args.holdout, args.json_key)} if args.holdout else {}),
    )
    encoder, accelerator = make_encoder(args.accelerator, tokenizer.encoder)
    print(f"accelerator: {accelerator}", flush=True)
    run = Run(
        make_plan(args, texts, share, tokenizer, options, accelerator),
        ChunkEncoder(options, encoder, tokenizer.encoder),
        tell,
    )
    try:
        with progress_display(texts.size, share) as progress:
            totals = run.execute(args.workers, progress.update)
    except Interrupted as stop:
        tell(stopped_message(stop, run.totals))
        raise SystemExit(128 + stop.signum) from None
    print_summary(totals)


def stopped_message(stop: Interrupted, totals: Totals) -> str:
    """One line on how to go on."""
    if not stop.kept:
        return f"stopped by {stop} before anything was done; the same command starts again"
    return f"stopped by {stop} after {totals.text_bytes / 1e6:,.1f} MB of text; the same command goes on from there"


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
        return find_files(args.input, args.json_key, args.document_separator)
    from megamor.corpus.hub import DatasetInput

    return DatasetInput(
        args.hf_dataset, args.hf_config, args.hf_split, args.json_key, args.hf_revision, args.hf_streaming
    )


@dataclass(frozen=True)
class OpenTokenizer:
    """A tokenizer in use, its JSON, and the file to write it to if it isn't a file of the user's."""

    encoder: TextEncoder
    name: str
    content: bytes
    path: Path | None


def open_tokenizer(args: argparse.Namespace, texts: TextInput) -> OpenTokenizer:
    """The tokenizer that the command line names, or one made for `texts`."""
    eod = {"eod_token": args.eod_token, "need_eod": args.append_eod}
    own = Path(f"{args.output_prefix}.tokenizer.json")
    if args.tokenizer in BUILT_IN:
        special = [args.eod_token or DEFAULT_EOD_TOKENS[0]] if args.append_eod or args.eod_token else []
        made = built_in_tokenizer(args.tokenizer, lambda: _all_texts(args, texts), special)
        content = made.to_str(pretty=True).encode()
        return OpenTokenizer(TextEncoder.of(made, args.tokenizer, **eod), own.name, content, own)
    path = find_tokenizer(args.tokenizer)
    encoder = TextEncoder.load(path, **eod)
    content, fetched = Path(path).read_bytes(), not Path(args.tokenizer).exists()
    return OpenTokenizer(encoder, own.name if fetched else Path(path).name, content, own if fetched else None)


def _all_texts(args: argparse.Namespace, texts: TextInput) -> Any:
    tell("reading all of the input for its characters")
    for chunk in texts.chunks():
        yield from parse_chunk(chunk, args.json_key, args.document_separator, skip_bad=args.on_bad_line == "skip").texts


def make_plan(
    args: argparse.Namespace,
    texts: TextInput,
    share: Share,
    tokenizer: OpenTokenizer,
    options: EncodeOptions,
    accelerator: str,
) -> Plan:
    """Names of the output, what goes into the side file, and what a run must have in common with one it continues."""
    names = [f"{args.output_prefix}_{name}" for name in _SPLIT_NAMES[: len(options.shares)]]
    bases = [*(names if args.split else [args.output_prefix]), args.output_prefix]
    *prefixes, journal = [shard_prefix(base, share.index, share.count) if args.shard else base for base in bases]
    encoder, digest = tokenizer.encoder, sha256(tokenizer.content).hexdigest()
    # A bad line that stops a run comes before any that it skipped, so this may be changed for going on.
    ignored = {"workers", "restart", "on_bad_line", "holdout", "accelerator", "tokenizer", "input"}
    identity: Mapping[str, Any] = {
        **{f"--{name.replace('_', '-')}": value for name, value in vars(args).items() if name not in ignored},
        "--tokenizer": digest,
        "--accelerator": accelerator.split()[0],
        "--holdout": sha256(options.held_out.tobytes()).hexdigest(),
        "the input": [list(texts.identity), CHUNK_BYTES],
    }
    meta = ShardMeta(
        tokenizer_name=tokenizer.name,
        tokenizer_sha256=digest,
        vocab_size=encoder.vocab_size,
        eod_token=encoder.eod_token,
        eod_id=encoder.eod_id,
        eod_appended=args.append_eod,
    )
    return Plan(
        texts,
        share,
        prefixes,
        journal,
        encoder.dtype,
        meta,
        tokenizer.content,
        tokenizer.path,
        identity,
        skip_bad=options.skip_bad,
        deduplicate=args.deduplicate,
        allow_empty=bool(args.shard),
        restart=args.restart,
    )


if __name__ == "__main__":
    main()
