"""Train a byte-level BPE tokenizer on raw text, as a tokenizer.json of the tokenizers library.

examples:
  megamor tokenizer train --input 'pile/train/*.jsonl.zst' --vocab-size 49152 --output data/tokenizer.json
  megamor tokenizer train --input my.txt --vocab-size 4096 --output data/mine.tokenizer.json --sample-bytes 1e8

It reads what megamor preprocess reads. The same files and options give the same tokenizer, byte for byte. Choose the
vocabulary size of the recipe that you will train (model.vocab_size, 49152 in configs/).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megamor.cli import INPUT_KINDS, command_parser, parse_separator, positive
from megamor.corpus import DEFAULT_EOD_TOKENS
from megamor.errors import ConfigError, user_errors


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Train and write the tokenizer.

    Raises:
        SystemExit: status 2 for an error the user can fix; nothing is written then.
    """
    parser = command_parser("tokenizer", __doc__)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    train = actions.add_parser("train", help="train a tokenizer", description="Train a byte-level BPE tokenizer.")
    add = train.add_argument
    add("--input", nargs="+", required=True, metavar="FILE", help=INPUT_KINDS)
    add("--vocab-size", type=positive, required=True, metavar="N", help="entries, special tokens included")
    add("--output", type=Path, required=True, metavar="FILE", help="tokenizer.json to write")
    eod = DEFAULT_EOD_TOKENS[0]
    add("--eod-token", default=eod, metavar="TOKEN", help=f"end-of-document token, with id 0 (default: {eod})")
    add("--special-tokens", nargs="+", default=[], metavar="TOKEN", help="further special tokens, with the next ids")
    sample = "text to learn from, taken from the beginnings of all files (default: 1e9)"
    add("--sample-bytes", type=float, default=1e9, metavar="N", help=sample)
    add("--json-key", default="text", metavar="KEY", help="key or column of the text (default: text)")
    split = "split every text at this string ('\\n\\n': two line feeds), which isn't learned"
    add("--document-separator", "--separator", type=parse_separator, metavar="STRING", help=split)
    add("--on-bad-line", choices=("stop", "skip"), default="stop", help="as in megamor preprocess (default: stop)")
    args = parser.parse_args(argv)
    if args.output.exists():
        raise ConfigError(f"--output {args.output} exists, and data may depend on it: remove it, or name another file")
    if not args.sample_bytes > 0:
        raise ConfigError(f"--sample-bytes {args.sample_bytes:g}: give a positive number of bytes")
    special = [args.eod_token, *args.special_tokens]
    if len({*special}) < len(special) or not all(special):
        raise ConfigError(f"--special-tokens {' '.join(args.special_tokens)}: name each once, and none empty")

    from megamor.corpus.bpe import sample_texts, train_bpe
    from megamor.corpus.text import find_files
    from megamor.files import replace_file
    from megamor.progress import ProgressDisplay

    key, separator = args.json_key, args.document_separator
    files = find_files(args.input, key, separator)
    skip_bad = args.on_bad_line == "skip"
    with ProgressDisplay("reading text", None, unit="bytes") as progress:
        texts = sample_texts(files, args.sample_bytes, key, separator, skip_bad=skip_bad, advance=progress.advance)
        tokenizer = train_bpe(texts, args.vocab_size, special)
    entries, read = tokenizer.get_vocab_size(), progress.done
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        replace_file(args.output, tokenizer.to_str(pretty=True))
    except OSError as error:
        raise ConfigError(f"--output {args.output} can't be written: {error.strerror}") from error
    print(f"{args.output}: {entries:,} entries from {read / 1e6:,.1f} MB of text; end of document {args.eod_token}")
    if entries < args.vocab_size:
        print(f"the text has no more pairs to merge, so these are fewer than --vocab-size {args.vocab_size}")
