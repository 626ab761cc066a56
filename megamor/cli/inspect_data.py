"""Show what is in a token shard and whether it is intact. Exit status 2 if it is damaged.

examples:
  megamor inspect-data data/x_train
  megamor inspect-data data/x_train --tokenizer tok.json --documents 5
  megamor inspect-data data/pile --verify          # also read all of a large .bin
  megamor inspect-data data/x_train --json | jq .tokens

Sizes and the whole index are always checked. The tokens (hashes and range of ids) are checked if there is up to 1 GiB
of them, or with --verify. Every fault is listed. Documents are shown as text with --tokenizer, or if the tokenizer is
in the same directory as the data or the one above.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Any

from megamor.cli import command_parser, counted
from megamor.errors import DataError, user_errors

if TYPE_CHECKING:
    from megamor.data.meta import ShardMeta
    from megamor.data.shard import TokenShard

_READ_BY_DEFAULT_BYTES = 2**30
_DOCUMENT_TOKENS_SHOWN = 64


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of `megamor inspect-data`."""
    parser = command_parser("inspect-data", __doc__)
    parser.add_argument("prefix", help="data set: PREFIX.bin and PREFIX.idx")
    parser.add_argument("--tokenizer", metavar="FILE", help="tokenizer.json, to show documents as text")
    parser.add_argument("--documents", type=int, default=3, metavar="N", help="how many to show (default: 3)")
    parser.add_argument("--verify", action="store_true", help="read all tokens even of a large data set")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return parser.parse_args(argv)


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Check and describe a data set. Exits with status 2 and one message if it is damaged or can't be read."""
    args = parse_arguments(argv)
    from megamor.corpus.verify import index_faults, token_faults
    from megamor.data.meta import read_meta
    from megamor.data.shard import TokenShard
    from megamor.progress import ProgressDisplay

    shard, meta = TokenShard.open(args.prefix), read_meta(args.prefix)
    read_tokens = args.verify or shard.tokens.nbytes <= _READ_BY_DEFAULT_BYTES
    faults = list(index_faults(shard, meta))
    if read_tokens:
        with ProgressDisplay("verifying", shard.tokens.nbytes) as progress:
            faults += token_faults(shard, meta, progress.advance)
    if faults:
        raise DataError(faults[0] if len(faults) == 1 else "\n  ".join([f"{len(faults)} faults:", *faults]))
    report = describe(shard, meta)
    report["contents_verified"] = read_tokens
    report["first_documents"] = first_documents(shard, meta, args.tokenizer, args.documents)
    if args.json:
        print(json.dumps(report, ensure_ascii=False, indent=2))
    else:
        print_report(report)


def describe(shard: TokenShard, meta: ShardMeta | None) -> dict[str, Any]:
    """Counts and sizes, and what the side file says."""
    import numpy as np

    lengths = shard.lengths
    return {
        "prefix": shard.prefix,
        "dtype": shard.dtype.name,
        "documents": shard.num_documents,
        "sequences": shard.num_sequences,
        "tokens": shard.num_tokens,
        "bytes": shard.tokens.nbytes + os.path.getsize(f"{shard.prefix}.idx"),
        "longest_sequence": int(lengths.max()) if len(lengths) else 0,
        "median_sequence": int(np.median(lengths)) if len(lengths) else 0,
        "empty_sequences": int((lengths == 0).sum()),
        "counted_tokens": None if shard.loss_mask is None else int(np.count_nonzero(shard.loss_mask)),
        "tokenizer": meta and {"name": meta.tokenizer_name, "sha256": meta.tokenizer_sha256},
        "vocab_size": meta and meta.vocab_size,
        "end_of_document": meta and {"token": meta.eod_token, "id": meta.eod_id, "appended": meta.eod_appended},
        "sources": meta and list(meta.sources),
    }


def first_documents(
    shard: TokenShard, meta: ShardMeta | None, tokenizer: str | None, count: int
) -> list[dict[str, Any]]:
    """The beginnings of the first documents: ids, and the text if there is a tokenizer.

    Raises DataError if `tokenizer` is not the one that wrote the data.
    """
    import numpy as np

    if tokenizer and meta and not meta.written_with(tokenizer):
        raise DataError(f"{tokenizer} is not the tokenizer that wrote {shard.prefix}; give that one")
    if not tokenizer and meta and meta.tokenizer_name:
        directory = Path(shard.prefix).resolve().parent
        candidates = [near / meta.tokenizer_name for near in (directory, directory.parent)]
        tokenizer = next((str(path) for path in candidates if path.is_file() and meta.written_with(path)), None)
    decode = None
    if tokenizer:
        from megamor.corpus.tokenizer import TextEncoder

        decode = TextEncoder.load(tokenizer).tokenizer.decode
    documents: list[dict[str, Any]] = []
    for number in range(min(count, shard.num_documents)):
        ids = shard.document(number)
        shown = ids[:_DOCUMENT_TOKENS_SHOWN].tolist()
        text = decode(shown, skip_special_tokens=False) if decode else None
        documents.append({"tokens": len(ids), "ids": shown, "text": text})
        if shard.loss_mask is not None:
            start = int(shard.starts_of(np.array([number]))[0])
            counted_ids = ids[shard.loss_mask[start : start + len(ids)] != 0][:_DOCUMENT_TOKENS_SHOWN].tolist()
            documents[-1]["counted"] = decode(counted_ids, skip_special_tokens=False) if decode else counted_ids
    return documents


def print_report(report: dict[str, Any]) -> None:
    """Print the report for people: name and value, folded at the width of the terminal."""
    lengths = f"median {report['median_sequence']:,} tokens, longest {report['longest_sequence']:,}"
    empty = f", {report['empty_sequences']:,} empty" if report["empty_sequences"] else ""
    rows = [
        ("data set", report["prefix"]),
        ("documents", f"{report['documents']:,}"),
        ("tokens", f"{report['tokens']:,} ({report['dtype']}; {report['bytes'] / 1e6:,.1f} MB with the index)"),
        ("sequences", f"{report['sequences']:,}: {lengths}{empty}"),
    ]
    if (labels := report["counted_tokens"]) is not None:
        rows.append(("loss mask", f"{labels:,} of {report['tokens']:,} tokens count in the loss"))
    tokenizer, eod = report["tokenizer"], report["end_of_document"]
    if tokenizer is None:
        rows.append(("tokenizer", "unknown: no side file (data of Megatron-LM or GPT-NeoX)"))
    else:
        known = f"{tokenizer['name']}, vocabulary of {report['vocab_size']:,}" if tokenizer["sha256"] else "unknown"
        rows.append(("tokenizer", known))
        if eod["token"] is not None:
            appended = "appended" if eod["appended"] else "not appended"
            rows.append(("end of document", f"{eod['token']} (id {eod['id']}), {appended}"))
        for source in report["sources"]:
            size = f"{counted(source['documents'], 'document')}, {counted(source['tokens'], 'token')}"
            rows.append(("source", f"{source['name']}: {size}"))
    for number, document in enumerate(report["first_documents"]):
        start = str(document["ids"]) if document["text"] is None else repr(document["text"])
        marked = f"; counted: {document['counted']!r}" if "counted" in document else ""
        rows.append((f"document {number}", f"{counted(document['tokens'], 'token')}: {start}{marked}"))
    read = "and tokens" if report["contents_verified"] else "not the tokens (large; --verify reads them)"
    rows.append(("intact", f"sizes, index {read}"))
    # A pipe into grep gets whole lines.
    width = get_terminal_size().columns if sys.stdout.isatty() else 10_000
    for name, value in rows:
        print(textwrap.fill(f"{name:<17}{value}", width, subsequent_indent=17 * " "))
