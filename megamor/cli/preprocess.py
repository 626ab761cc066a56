"""Turn raw text into token shards for training: tokenize, split by document, write `.bin`/`.idx`.

examples:
  # one JSON object with a "text" key per line, plain or compressed; patterns in quotes
  megamor preprocess --input 'pile/train/*.jsonl.zst' --tokenizer data/tokenizer.json --output-prefix data/pile_train \\
      --append-eod

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

After an interruption, rerun the same command to resume. The output is the same, byte for byte, whatever the number of
workers and interruptions, and appears under its name only when complete. docs/data.md explains the options.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from megamor.cli import INPUT_KINDS, command_parser, counted, parse_separator
from megamor.corpus import ACCELERATORS, BUILT_IN_TOKENIZERS, DEFAULT_EOD_TOKENS
from megamor.errors import ConfigError, DataError, user_errors

if TYPE_CHECKING:
    from megamor.corpus.encode import EncodeOptions
    from megamor.corpus.preprocess import PreprocessJob, Totals
    from megamor.corpus.text import InputRange, TextInput
    from megamor.corpus.tokenizer import TextEncoder

_SPLIT_NAMES = ("train", "val", "test")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of `megamor preprocess`."""
    parser = command_parser("preprocess", __doc__)
    _add_input_arguments(parser.add_argument_group("input"))
    _add_document_arguments(parser.add_argument_group("documents"))
    add = parser.add_argument_group("output and run").add_argument
    add("--output-prefix", required=True, metavar="PREFIX", help="writes PREFIX.bin, .idx, .meta.json")
    add(
        "--split",
        metavar="FRACTIONS",
        help="2 or 3 fractions adding up to 1, such as 0.99,0.01: writes PREFIX_train, PREFIX_val and PREFIX_test; the "
        "split of a document depends on its text alone, so adding files moves no document",
    )
    add(
        "--shard",
        metavar="I/N",
        help="process only the I-th of N equal ranges of the input, I from 0: writes PREFIX_shard_I_of_N",
    )
    add("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="threads (default: all cores)")
    add(
        "--accelerator",
        choices=ACCELERATORS,
        default="auto",
        help="gigatoken gives the ids of the tokenizers library much faster, and is checked against it at the start of "
        "every file; auto (default) uses it if it is installed and supports the tokenizer, and prints which is used",
    )
    add("--restart", action="store_true", help="start over, even if an interrupted run could be resumed")
    args = parser.parse_args(argv)
    if args.eod_token == "":
        parser.error("argument --eod-token: the token is empty; leave the option out for the default")
    if args.document_separator == []:  # what argparse makes of `--separator=--`
        parser.error(r"argument --document-separator: write -- as '\x2d\x2d'")
    if (args.prompt_key is None) != (args.answer_key is None):
        parser.error("--prompt-key and --answer-key go together: give both or none")
    if args.prompt_key is not None:
        if args.document_separator or args.hf_dataset:
            parser.error("--prompt-key reads JSON lines (--input), one document each: no --document-separator")
        args.json_key = args.prompt_key
    return args


def _add_input_arguments(group: argparse._ArgumentGroup) -> None:
    add, source = group.add_argument, group.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", metavar="FILE", help=INPUT_KINDS)
    source.add_argument("--hf-dataset", metavar="NAME_OR_PATH", help="dataset of the Hugging Face hub, or a local one")
    add("--hf-config", metavar="X", help="configuration of --hf-dataset, if it has several")
    add("--hf-revision", metavar="X", help="branch or commit of --hf-dataset on the hub")
    add("--hf-split", default="train", metavar="NAME", help="split of --hf-dataset (default: train)")
    add("--hf-streaming", action="store_true", help="read --hf-dataset without downloading it first")
    add(
        "--tokenizer",
        required=True,
        metavar="X",
        help="tokenizer.json of the tokenizers library, a directory with one, a name on the Hugging Face hub, or "
        f"{' or '.join(BUILT_IN_TOKENIZERS)}: built from the input, and written to PREFIX.tokenizer.json",
    )
    add(
        "--json-key", default="text", metavar="KEY", help="key or column of the text, such as meta.text (default: text)"
    )
    add(
        "--prompt-key",
        metavar="KEY",
        help="for supervised fine-tuning: key of the prompt in JSON lines. It is joined with the answer as it is, and "
        "only the answer's tokens count in the loss, which PREFIX.loss_mask says (docs/finetuning.md)",
    )
    add("--answer-key", metavar="KEY", help="key of the answer, with the space that it begins with")
    add(
        "--on-bad-line",
        choices=("stop", "skip"),
        default="stop",
        help="what to do with a line that is not JSON, not UTF-8 or lacks the key: stop and name file and line "
        "(default), or skip, count and report it",
    )


def _add_document_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--append-eod", action="store_true", help="end every document with the end-of-document token (recommended)")
    add("--eod-token", metavar="TOKEN", help=f"that token (default: the model's, {', else '.join(DEFAULT_EOD_TOKENS)})")
    add(
        "--document-separator",
        "--separator",
        type=parse_separator,
        metavar="STRING",
        help="split every text into several documents at this string ('\\n\\n': two line feeds); without it, "
        "'<|endoftext|>' in a text is text",
    )
    add("--min-length", type=int, default=0, metavar="N", help="leave out documents of fewer than N tokens")
    add("--deduplicate", action="store_true", help="keep only the first of documents with the same text (by hash)")
    add(
        "--holdout",
        metavar="FILE",
        help="leave out the documents in this file: texts in any form of --input, or one hash per line (docs/data.md)",
    )


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Preprocess. Exits with status 2 and one message after an error the user can fix, 130 after Ctrl-C."""
    args = parse_arguments(argv)
    if args.workers < 1:
        raise ConfigError(f"--workers {args.workers}: give at least 1")
    if args.min_length < 0:
        raise ConfigError(f"--min-length {args.min_length}: give a number of tokens, 0 or more")
    fractions = parse_fractions(args.split)

    # Only now, so that --help and wrong options answer at once.
    from megamor.corpus.array import parse_shard
    from megamor.corpus.dedup import read_held_out
    from megamor.corpus.encode import ChunkEncoder, EncodeOptions, choose_encoder
    from megamor.corpus.preprocess import Interrupted, PreprocessRun
    from megamor.corpus.text import WHOLE, InputRange

    within = InputRange(*parse_shard(args.shard)) if args.shard else WHOLE
    texts = open_input(args)
    if args.shard and not texts.size:
        raise ConfigError("--shard needs an input of known size; leave out --hf-streaming")
    tokenizer = open_tokenizer(args, texts)
    keys = (args.json_key, args.document_separator, args.answer_key)
    options = EncodeOptions(
        json_key=args.json_key,
        separator=args.document_separator,
        append_eod=args.append_eod,
        fractions=fractions,
        skip_bad=args.on_bad_line == "skip",
        min_tokens=args.min_length,
        hashes=args.deduplicate,
        answer_key=args.answer_key,
        **({"held_out": read_held_out(args.holdout, *keys)} if args.holdout else {}),
    )
    encode, accelerator = choose_encoder(args.accelerator, tokenizer.encoder)
    print(f"accelerator: {accelerator}", flush=True)
    job = make_job(args, texts, within, tokenizer, options, accelerator)
    run = PreprocessRun(job, ChunkEncoder(options, encode, tokenizer.encoder), tell)
    started = time.monotonic()
    try:
        totals = run.execute(args.workers, partial(show_progress, texts, within))
    except Interrupted as stop:
        when = f"after {run.totals.counts.text_bytes / 1e6:,.1f} MB of text" if stop.kept else "before the first record"
        tell(f"stopped by {stop} {when}; rerun the same command to {'resume' if stop.kept else 'start again'}")
        raise SystemExit(128 + stop.signum) from None
    print_summary(job, totals, time.monotonic() - started, totals.counts.text_bytes - run.resumed_bytes)


@contextmanager
def show_progress(texts: TextInput, within: InputRange, resumed: Totals) -> Iterator[Callable[[Totals], None]]:
    """Display the progress through a range of the input, from `resumed` on; yields a function to call with totals."""
    from megamor.progress import ProgressDisplay, format_count

    begin, length = texts.size * within.index // within.count, texts.size // within.count
    done = max(resumed.position - begin, 0)
    with ProgressDisplay("tokenizing", length or None, unit=texts.unit, start=done) as progress:
        yield lambda totals: progress.update(totals.position - begin, {"tokens": format_count(totals.tokens.total())})


def tell(message: str) -> None:
    """Print a message to stderr at once."""
    print(message, file=sys.stderr, flush=True)


def parse_fractions(split: str | None) -> tuple[float, ...]:
    """Fractions of the splits; (1.0,) without any. Raises ConfigError unless they are 2 or 3 and add up to 1."""
    if split is None:
        return (1.0,)
    try:
        fractions = tuple(float(fraction) for fraction in split.split(","))
    except ValueError:
        fractions = ()
    if len(fractions) not in (2, 3) or not all(0 < f < 1 for f in fractions) or not math.isclose(sum(fractions), 1):
        raise ConfigError(f"--split {split}: give 2 or 3 positive fractions that add up to 1, such as 0.99,0.01")
    return fractions


def open_input(args: argparse.Namespace) -> TextInput:
    """The texts that the command line names. Raises DataError if they can't be opened."""
    from megamor.corpus.text import find_files, kind_of

    if args.input:
        found = find_files(args.input, args.json_key, args.document_separator)
        wrong = [path for path in found.paths if args.prompt_key and kind_of(path) not in ("jsonl", "json")]
        if wrong:
            raise DataError(f"--input {wrong[0]}: --prompt-key and --answer-key need JSON lines; convert the file")
        return found
    from megamor.corpus.hub import DatasetInput

    name, config, split, revision = args.hf_dataset, args.hf_config, args.hf_split, args.hf_revision
    return DatasetInput(name, config, split, args.json_key, revision, streaming=args.hf_streaming)


@dataclass(frozen=True)
class OpenTokenizer:
    """A tokenizer, its JSON, its name for the side file, and where to write it unless it is the user's own file."""

    encoder: TextEncoder
    name: str
    content: bytes
    path: Path | None


def open_tokenizer(args: argparse.Namespace, texts: TextInput) -> OpenTokenizer:
    """The tokenizer that the command line names, or one built from `texts`. Raises DataError if there is none."""
    from megamor.corpus.tokenizer import TextEncoder, byte_tokenizer, char_tokenizer, find_tokenizer

    eod = {"eod_token": args.eod_token, "need_eod": args.append_eod}
    own = Path(f"{args.output_prefix}.tokenizer.json")
    if args.tokenizer in BUILT_IN_TOKENIZERS:
        special = [args.eod_token or DEFAULT_EOD_TOKENS[0]] if args.append_eod or args.eod_token else []
        made = char_tokenizer(_all_texts(args, texts), special) if args.tokenizer == "char" else byte_tokenizer(special)
        content = made.to_str(pretty=True).encode()
        return OpenTokenizer(TextEncoder.of(made, args.tokenizer, **eod), own.name, content, own)
    path = find_tokenizer(args.tokenizer)
    encoder = TextEncoder.load(path, **eod)
    content, fetched = Path(path).read_bytes(), not Path(args.tokenizer).exists()
    return OpenTokenizer(encoder, own.name if fetched else Path(path).name, content, own if fetched else None)


def _all_texts(args: argparse.Namespace, texts: TextInput) -> Iterator[str]:
    from megamor.corpus.documents import parse_chunk

    tell("reading all of the input for its characters")
    for chunk in texts.chunks():
        skip, answer_key = args.on_bad_line == "skip", args.answer_key
        found = parse_chunk(chunk, args.json_key, args.document_separator, skip_bad=skip, answer_key=answer_key)
        yield from found.texts


def make_job(
    args: argparse.Namespace,
    texts: TextInput,
    within: InputRange,
    tokenizer: OpenTokenizer,
    options: EncodeOptions,
    accelerator: str,
) -> PreprocessJob:
    """Names of the output, contents of the side file, and what must not differ from a run to resume."""
    from megamor.corpus.array import shard_prefix
    from megamor.corpus.preprocess import PreprocessJob
    from megamor.corpus.text import CHUNK_BYTES
    from megamor.data.meta import ShardMeta

    names = [f"{args.output_prefix}_{name}" for name in _SPLIT_NAMES[: len(options.fractions)]]
    bases = [*(names if args.split else [args.output_prefix]), args.output_prefix]
    *prefixes, journal = [shard_prefix(base, within.index, within.count) if args.shard else base for base in bases]
    encoder, digest = tokenizer.encoder, sha256(tokenizer.content).hexdigest()
    # on_bad_line may change for a resumed run: a bad line that stops it comes before any that would be skipped.
    ignored = {"workers", "restart", "on_bad_line", "holdout", "accelerator", "tokenizer", "input"}
    return PreprocessJob(
        texts,
        within,
        prefixes,
        journal,
        encoder.dtype,
        ShardMeta(tokenizer.name, digest, encoder.vocab_size, encoder.eod_token, encoder.eod_id, args.append_eod),
        tokenizer.content,
        tokenizer.path,
        identity={
            **{f"--{name.replace('_', '-')}": value for name, value in vars(args).items() if name not in ignored},
            "--tokenizer": digest,
            "--accelerator": accelerator.split()[0],
            "--holdout": sha256(options.held_out.tobytes()).hexdigest(),
            "the input": [list(texts.identity), CHUNK_BYTES],
        },
        options=options,
        allow_empty=bool(args.shard),
        restart=args.restart,
    )


def _is_one_document(job: PreprocessJob, totals: Totals, source: int, name: str) -> bool:
    """Whether a text file was taken for a single document, as one with another separator is."""
    from megamor.corpus.text import kind_of

    return kind_of(name) == "txt" and sum(totals.documents[split, source] for split in range(len(job.prefixes))) == 1


def print_summary(job: PreprocessJob, totals: Totals, seconds: float, new_bytes: int) -> None:
    """Print what was written and what was left out. `new_bytes` of the text were tokenized in these `seconds`."""
    for split, prefix in enumerate(job.prefixes):
        documents, tokens = totals.of_split(split)
        print(f"{prefix}: {counted(documents, 'document')}, {counted(tokens, 'token')}")
    if single := [name for source, name in enumerate(job.texts.names) if _is_one_document(job, totals, source, name)]:
        print(f"one document each: {', '.join(single[:8])}{', ...' if len(single) > 8 else ''}")
    counts, speed = totals.counts, new_bytes / 1e6 / max(seconds, 1e-9)
    text, tokens_in_all = f"{counts.text_bytes / 1e6:,.1f} MB of text", totals.tokens.total() / 1e6
    print(f"{text}, {tokens_in_all:,.2f} M tokens in {seconds:,.0f} s ({speed:,.2f} MB/s)")
    left_out = [
        (counts.empty, "document", "without text"),
        (counts.blank, "blank line", ""),
        (counts.short, "document", "below --min-length"),
        (counts.held_out, "document", "of --holdout"),
        (counts.duplicates, "duplicate", ""),
    ]
    if len(job.options.held_out) and not counts.held_out:
        print("no document of --holdout is in the input")
    if any(count for count, _, _ in left_out):
        print("left out: " + ", ".join(f"{counted(n, what)} {why}".strip() for n, what, why in left_out if n))
    if counts.bad:
        among = ", among them" if counts.bad > len(counts.bad_shown) else ""
        print(f"skipped: {counted(counts.bad, 'bad line')}{among}")
        for message in counts.bad_shown:
            print(f"  {message}")
