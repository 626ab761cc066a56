"""The `megamor` command. Each subcommand is one module here, imported only when it runs."""

from __future__ import annotations

import argparse
import os
import re
import select
import sys
from collections.abc import Sequence
from importlib import import_module
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from megamor import __version__
from megamor.errors import EXIT_USER_ERROR, ConfigError

if TYPE_CHECKING:
    from megamor.config.exits import ExitRule

EXIT_BROKEN_PIPE = 141
"""What a shell reports for a command that SIGPIPE ended."""

COMMANDS: dict[str, str] = {
    "quickstart": "train, interrupt, resume, evaluate and sample a small model in minutes",
    "fetch-data": "download a public corpus",
    "tokenizer": "train a tokenizer",
    "preprocess": "tokenize text into memory-mapped shards",
    "merge-data": "merge shards into one data set",
    "inspect-data": "show and check a shard",
    "plan": "estimate memory, traffic and time of a run on given GPUs",
    "study": "compare models: arms, tuned learning rates, paired seeds, intervals",
    "compare": "put runs into one table: matched by what, different by how much",
    "report": "write an HTML page about a study or runs",
    "dashboard": "show runs in a browser while they train",
    "pretrain": "train a model, or resume training",
    "launch": "start the training processes of one machine",
    "evaluate": "measure the loss of a checkpoint on data, or downstream tasks",
    "sweep-depth": "measure a checkpoint at other depths and thresholds: loss against FLOPs",
    "generate": "continue a prompt and show how deep each token went",
    "serve": "serve a checkpoint over HTTP (OpenAI completions API)",
    "analyze": "show what a trained router has learned",
    "trace": "list the documents that a step of a run reads",
    "export-hf": "export a checkpoint to Hugging Face format",
    "merge": "merge checkpoints into one with averaged weights",
    "import": "import a checkpoint of the paper's authors",
    "convert-depth": "make a dense model recursive, to train it further",
    "convert-checkpoint": "convert a checkpoint to one safetensors file",
    "verify-checkpoint": "check that a checkpoint is intact and loads",
    "verify-resume": "check that a run resumes bitwise on this machine",
    "gpu-check": "check in a minute whether this machine's GPUs can train and serve",
    "bench": "measure training, loading, preprocessing, saving and serving",
}
"""Each subcommand, and a line about it for `megamor --help`."""


def use_utf8() -> None:
    """Start this command again in Python's UTF-8 mode if the locale has another encoding.

    Otherwise the same path or prompt would be other text than on a machine with UTF-8, and other in settings, logs and
    checkpoints than on disk.
    """
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, "PYTHONUTF8": "1"})
    for stream in (sys.stdout, sys.stderr):  # whose encoding the user may have chosen
        if isinstance(stream, TextIOWrapper) and stream.encoding.lower() not in ("utf-8", "utf8"):
            stream.reconfigure(errors="backslashreplace")


INPUT_KINDS = (
    ".jsonl, .ndjson, .json or .txt files, also as .zst, .gz, .bz2 or .xz, .parquet files, or patterns of them, whose "
    "files are sorted by name"
)
"""What commands that read raw text accept, for their help."""


class CommandParser(argparse.ArgumentParser):
    """A parser that says how a setting is written, instead of `--optim.lr=1e-3` or `optim.lr 1e-3`."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Parse arguments; those of the command line as UTF-8, whatever the locale."""
        if args is None:
            use_utf8()
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Print usage and `message`, and exit with status 2."""
        unknown = message.partition("unrecognized arguments: ")[2]
        if setting := re.search(r"(?<!\S)-*(\w+(?:\.[\w-]+)+)(?:[= ]+(\S+))?", unknown):
            message += f"; write {setting[1]}={setting[2] or 'VALUE'}, without dashes and spaces"
        super().error(message)


def command_parser(name: str, text: str | None) -> CommandParser:
    """A parser for `megamor <name>` whose help shows `text` (a module's docstring, examples included) as written."""
    return CommandParser(prog=f"megamor {name}", description=text, formatter_class=argparse.RawDescriptionHelpFormatter)


def parse_separator(text: str) -> str:
    """Decode a separator's escape sequences, such as `\\n`. Raises ArgumentTypeError for an empty or a wrong one."""
    try:
        # Latin-1 is what `unicode_escape` reads; characters that it lacks travel as escape sequences.
        separator = text.encode("latin-1", "backslashreplace").decode("unicode_escape")
    except UnicodeDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error.reason}; write a backslash as \\\\") from error
    if not separator:
        raise argparse.ArgumentTypeError("the separator is empty; leave the option out for one document a text")
    return separator


def positive(text: str) -> int:
    """An integer of at least 1, as an argument's type."""
    value = int(text) if text.strip().isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return value


def output_file(text: str) -> Path:
    """A file that a command writes at its end, as an argument's type. Its directory is made now, at the start, where
    whatever is wrong with it is said."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a directory: give a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text} can't be written ({error}): give another file") from error
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text} can't be written: give another file")
    return path


def words(text: str) -> list[str]:
    """Words with commas between them, as an argument's type."""
    return [word for part in text.split(",") if (word := part.strip())]


def integers(text: str) -> list[int]:
    """Positive integers with commas between them, as an argument's type."""
    return [positive(number) for number in text.split(",")]


def add_exit_options(parser: argparse.ArgumentParser) -> None:
    """Add `--exit` and `--exit-threshold`, for `chosen_exit`."""
    from megamor.config.exits import EXITS

    add = parser.add_argument
    add("--exit", choices=EXITS, help="stop a token's recursions once the model is confident; see docs/routers.md")
    text = "stop at a probability of at least, or an entropy, KL (both in nats) or acceleration of at most NUMBER"
    add("--exit-threshold", type=float, metavar="NUMBER", help=text)


def chosen_exit(arguments: argparse.Namespace) -> ExitRule | None:
    """The rule that the options give; ConfigError if one is missing or out of range."""
    from megamor.config.exits import ExitRule

    if (arguments.exit is None) != (arguments.exit_threshold is None):
        raise ConfigError("--exit and --exit-threshold belong together: give both, or neither")
    return None if arguments.exit is None else ExitRule(arguments.exit, arguments.exit_threshold)


def add_cache_options(parser: argparse.ArgumentParser) -> None:
    """The options of a bounded cache but for its budget; their names are those of `CacheBound`'s fields."""
    keep = "which of the other entries stay: those that received the most attention (`score`), those of the deepest "
    keep += "tokens (`depth`), or the newest (default: score)"
    parser.add_argument("--kv-keep", choices=("score", "depth", "recent"), help=keep)
    first = "how many of the first entries always stay (default: 4)"
    parser.add_argument("--kv-sinks", type=int, metavar="N", help=first)
    newest = "how many of the newest entries always stay (default: half of the budget)"
    parser.add_argument("--kv-recent", type=int, metavar="N", help=newest)


def cache_options(arguments: argparse.Namespace, budget: object) -> dict[str, Any]:
    """Those of `add_cache_options` that were given; ConfigError if there is no `budget` for them."""
    names = [name for name in ("keep", "sinks", "recent") if getattr(arguments, f"kv_{name}") is not None]
    if names and not budget:
        raise ConfigError(f"--kv-{names[0]} has no effect without a budget of keys and values: give --kv-budget, too")
    return {name: getattr(arguments, f"kv_{name}") for name in names}


def counted(count: int, noun: str) -> str:
    """`1 document`, `1,204 documents`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def usage() -> str:
    """The text of `megamor --help`."""
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items())
    return f"""usage: megamor <command> [options]

Pretrain, study and serve Mixture-of-Recursions language models.

commands:
{rows}

`megamor <command> --help` explains a command. Start with `megamor quickstart`."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the subcommand that the first argument names.

    Raises:
        SystemExit: status 2 for an unknown command; otherwise whatever the command exits with.
    """
    if argv is None:
        use_utf8()
    words = sys.argv[1:] if argv is None else list(argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return
    if words[0] == "--version":
        print(f"megamor {__version__}")
        return
    if words[0] not in COMMANDS:
        from difflib import get_close_matches

        near = get_close_matches(words[0], COMMANDS, n=1)
        hint = f"did you mean `megamor {near[0]}`?" if near else "`megamor --help` lists the commands"
        print(f"megamor: unknown command {words[0]!r}; {hint}", file=sys.stderr)
        raise SystemExit(EXIT_USER_ERROR)
    module = "import_weights" if words[0] == "import" else words[0].replace("-", "_")
    try:
        import_module(f"megamor.cli.{module}").main(words[1:])
        sys.stdout.flush()
    except BrokenPipeError:
        if not _output_is_closed():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at exit
        raise SystemExit(EXIT_BROKEN_PIPE) from None


def _output_is_closed() -> bool:
    """Whether the reader of stdout, such as `head`, has left."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
