"""Show what is in a token shard and whether it is intact. Exit status 2 if it is damaged.

examples:
  megamor inspect-data data/x_train
  megamor inspect-data data/x_train --tokenizer tok.json --documents 5
  megamor inspect-data data/pile --verify          # also read all of a large .bin
  megamor inspect-data data/x_train --json | jq .tokens

Sizes and the whole index are always checked; the tokens (hashes and range of ids) too, if there is up to 1 GiB of
them or with --verify. Every fault is listed. Documents are shown as text with --tokenizer, or if the tokenizer lies
beside the data or one directory up.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megamor.corpus.encode import TextEncoder
from megamor.corpus.verify import index_faults, token_faults
from megamor.data.meta import ShardMeta, read_meta
from megamor.data.shard import TokenShard
from megamor.errors import DataError, user_errors
from megamor.metrics.byte_progress import byte_progress

_READ_UNASKED_BYTES = 2**30
_DOCUMENT_TOKENS_SHOWN = 64


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="inspect_data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prefix", help="data set: PREFIX.bin and PREFIX.idx")
    parser.add_argument("--tokenizer", metavar="FILE", help="tokenizer.json, to show documents as text")
    parser.add_argument("--documents", type=int, default=3, metavar="N", help="how many to show (default: 3)")
    parser.add_argument("--verify", action="store_true", help="read all tokens even of a large data set")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return parser.parse_args(argv)


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    args = parse_arguments(argv)
    shard, meta = TokenShard.open(args.prefix), read_meta(args.prefix)
    read_tokens = args.verify or shard.tokens.nbytes <= _READ_UNASKED_BYTES
    report_faults(faults_of(shard, meta, read_tokens=read_tokens))
    report = describe(shard, meta)
    report["contents_verified"] = read_tokens
    report["first_documents"] = first_documents(shard, meta, args.tokenizer, args.documents)
    if args.json:
        print(json.dumps(report, ensure_ascii=False, indent=2))
    else:
        print_report(report)


def faults_of(shard: TokenShard, meta: ShardMeta | None, *, read_tokens: bool) -> list[str]:
    """Everything that is wrong with a data set whose sizes are right."""
    found = list(index_faults(shard, meta))
    if read_tokens:
        with byte_progress("verifying", shard.tokens.nbytes) as advance:
            found += token_faults(shard, meta, advance)
    return found


def report_faults(faults: Sequence[str]) -> None:
    """Raise DataError listing `faults`, if there are any."""
    if len(faults) == 1:
        raise DataError(faults[0])
    if faults:
        raise DataError("\n  ".join([f"{len(faults)} faults:", *faults]))


def describe(shard: TokenShard, meta: ShardMeta | None) -> dict[str, Any]:
    """Counts and sizes, and what the side file says."""
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
    if tokenizer and not written_with(tokenizer, meta):
        raise DataError(f"{tokenizer} is not the tokenizer that wrote {shard.prefix}; give that one")
    if not tokenizer and meta and meta.tokenizer_name:
        directory = Path(shard.prefix).resolve().parent
        near = [str(place / meta.tokenizer_name) for place in (directory, directory.parent)]
        tokenizer = next((path for path in near if Path(path).is_file() and written_with(path, meta)), None)
    decode = TextEncoder.load(tokenizer).tokenizer.decode if tokenizer else None
    documents = []
    for number in range(min(count, shard.num_documents)):
        ids = shard.document(number)
        shown = ids[:_DOCUMENT_TOKENS_SHOWN].tolist()
        text = decode(shown, skip_special_tokens=False) if decode else None
        documents.append({"tokens": len(ids), "ids": shown, "text": text})
    return documents


def written_with(tokenizer: str, meta: ShardMeta | None) -> bool:
    """Whether the file `tokenizer` wrote the data, as far as the side file knows."""
    return not meta or meta.written_with(tokenizer)


def print_report(report: dict[str, Any]) -> None:
    """The report for people."""
    print(f"{report['prefix']}: {report['documents']:,} documents, {report['tokens']:,} tokens, {report['dtype']}")
    print(
        f"  sequences {report['sequences']:,} (median {report['median_sequence']:,} tokens, longest "
        f"{report['longest_sequence']:,}, empty {report['empty_sequences']:,}); {report['bytes'] / 1e6:,.1f} MB"
    )
    if report["tokenizer"] is None:
        print("  no side file: tokenizer, vocabulary and hashes unknown (data of Megatron-LM or GPT-NeoX)")
    else:
        tokenizer, eod = report["tokenizer"], report["end_of_document"]
        ending = f"{eod['token']} ({eod['id']}) {'appended' if eod['appended'] else 'not appended'}"
        known = f"{tokenizer['name']}, vocabulary {report['vocab_size']}, end of document {ending}"
        print(f"  tokenizer {known if tokenizer['sha256'] else 'unknown'}")
        for source in report["sources"]:
            print(f"  from {source['name']}: {source['documents']:,} documents, {source['tokens']:,} tokens")
    for number, document in enumerate(report["first_documents"]):
        start = document["ids"] if document["text"] is None else repr(document["text"])
        print(f"  document {number} ({document['tokens']:,} tokens): {start}")
    read = "tokens" if report["contents_verified"] else "not the tokens (large; --verify reads them)"
    print(f"  intact: sizes, index, {read}")


if __name__ == "__main__":
    main()
