"""List the documents that a step of a run reads.

examples:
  megamor trace --run runs/quickstart --step 120
  megamor trace --run runs/quickstart --step 120 --sample 955 --json | jq .samples[0].pieces

Steps are counted from 1, as in metrics; samples from 0, over the whole run. The order of samples is computed, not
recorded, so this works while the run trains and after it ended, for steps to come as well. A piece is a range of tokens
of one document; `line` is the line of the document at which it begins.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from megamor.cli import command_parser
from megamor.errors import user_errors


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Print the samples of the step, or JSON."""
    parser = command_parser("trace", __doc__)
    parser.add_argument("--run", required=True, help="the directory of a run, or a checkpoint")
    parser.add_argument("--step", required=True, type=int, help="the optimizer step, from 1")
    parser.add_argument("--sample", type=int, help="only this sample of the step")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)

    from megamor.analysis.trace import trace

    found = trace(arguments.run, arguments.step, arguments.sample)
    if arguments.json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
        return
    print(f"{found['run']}, step {found['step']}" + ("" if found["trained"] else ", which isn't trained yet"))
    for first, end in found["left_out"]:
        print(f"samples {first} to {end - 1} were left out by a rollback")
    for sample in found["samples"]:
        print(f"sample {sample['sample']}:" + ("" if sample["pieces"] else " padding alone"))
        for piece in sample["pieces"]:
            low, high = piece["tokens"]
            where = f"{piece['source']}, document {piece['document']}"
            where += f" (number {piece['document_of_file']} here from {piece['file']})" if "file" in piece else ""
            line = "" if piece["line"] is None else f", line {piece['line']}: {piece['text']!r}"
            print(f"  {where}, tokens {low} to {high - 1} of {piece['document_tokens']}{line}")
