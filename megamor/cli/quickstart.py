"""Train a small Mixture-of-Recursions model from end to end: data, training, interruption, resume, evaluation, text.

example:
  megamor quickstart            # some minutes on two cores; writes to runs/quickstart

It trains in two processes on the Python standard library, stops halfway, resumes, and compares the result with n-gram
models. Finished steps are recognised when you run it again, and an interrupted training run resumes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from megamor.cli import command_parser
from megamor.corpus import DEFAULT_EOD_TOKENS
from megamor.corpus.stdlib import STANDARD_LIBRARY, source_files
from megamor.errors import CheckpointError, MegamorError, TrainingError, user_errors
from megamor.files import replace_file

# In a checkout this is a link to configs/quickstart.yaml; a wheel contains the file itself.
CONFIG = Path(__file__).with_name("quickstart.yaml")
PROCESSES = 2
SCHEMA = "megamor-quickstart/1"
SHORT_OVERRIDES = ("train.max_steps=8", "train.eval_every=4", "optim.warmup_steps=2", "checkpoint.every_steps=4")
SHORT_CORPUS_CHARACTERS = 1_500_000
TOKENIZER_SAMPLE_CHARACTERS = 12_000_000
PROMPT = 'def read_lines(path):\n    """Return'


class Quickstart:
    """The seven steps, below `root`. `short` takes a slice of the corpus and 8 training steps, to try the path."""

    def __init__(self, root: Path, *, short: bool) -> None:
        from megamor.config import literal, load_config, override

        self.root, self.short, self.latest = root, short, root / "checkpoints" / "latest"
        self.overrides = [
            override("run.dir", literal(root.parent)),
            override("run.name", root.name),
            override("data.train", [literal(root / "data/stdlib_train")]),
            override("data.validation", {"stdlib": literal(root / "data/stdlib_val")}),
            override("data.tokenizer", literal(root / "tokenizer.json")),
            *(SHORT_OVERRIDES if short else ()),
        ]
        self.config = load_config(CONFIG, self.overrides)
        self._finished = root / "finished.json"
        self._stamps: dict[str, str] = (
            json.loads(self._finished.read_text(encoding="utf-8")) if self._finished.exists() else {}
        )
        """For each finished step, the hash of its inputs."""

    def run(self) -> None:
        """Run all steps in order and print where the time went.

        Raises:
            TrainingError: a step failed, or the trained model is no better than a bigram model.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        steps = self.config.train.max_steps
        assert steps is not None, "the quickstart's configuration says max_steps"
        actions = {
            "1 corpus": self.corpus,
            "2 tokenizer": self.tokenizer,
            "3 shards": self.shards,
            "4 train to the middle": lambda: self.train(steps // 2),
            "5 resume and finish": lambda: self.train(steps),
            "6 evaluate": self.evaluate,
            "7 generate": self.generate,
        }
        seconds = {}
        for name, action in actions.items():
            print(f"── {name} ".ljust(80, "─"), flush=True)  # before what the step's processes print
            started = time.perf_counter()
            action()
            seconds[name] = time.perf_counter() - started
        took = ", ".join(f"{name} {duration:.0f} s" for name, duration in seconds.items())
        print(f"── done in {sum(seconds.values()):.0f} s: {took}")
        self.finish_report(seconds)

    def corpus(self) -> None:
        """Write the standard library's source files as JSON lines, one document per file."""
        corpus = self.root / "corpus.jsonl"

        def write() -> None:
            documents = [*source_files(SHORT_CORPUS_CHARACTERS if self.short else None)]
            lines = [json.dumps({"text": text, "meta": {"path": name}}) + "\n" for name, text in documents]
            replace_file(corpus, "".join(lines))
            characters = sum(len(text) for _, text in documents)
            print(f"{len(documents):,} files, {characters / 1e6:.1f} million characters of Python")

        self.once("corpus", f"{sys.version} {STANDARD_LIBRARY} {self.short}", corpus, write)

    def tokenizer(self) -> None:
        """Train a byte-level BPE tokenizer on documents spread evenly over the corpus."""
        path, vocab_size = self.root / "tokenizer.json", self.config.model.vocab_size

        def train() -> None:
            from megamor.corpus.bpe import train_bpe

            tokenizer = train_bpe(sample_documents(self.root / "corpus.jsonl"), vocab_size, DEFAULT_EOD_TOKENS[:1])
            replace_file(path, tokenizer.to_str(pretty=True))
            print(f"{vocab_size:,} entries: {path}")

        self.once("tokenizer", f"{self._stamps['corpus']} {vocab_size}", path, train)

    def shards(self) -> None:
        """Tokenize the corpus into training and validation shards."""

        def preprocess() -> None:
            # A run that was trained on other shards can't resume on these.
            shutil.rmtree(self.latest.parent, ignore_errors=True)
            options = ["--input", f"{self.root}/corpus.jsonl", "--tokenizer", f"{self.root}/tokenizer.json"]
            options += ["--append-eod", "--split", "0.9,0.1" if self.short else "0.97,0.03"]
            options += ["--output-prefix", f"{self.root}/data/stdlib", "--workers", str(PROCESSES)]
            call(["megamor", "preprocess", *options])

        self.once("shards", self._stamps["tokenizer"], self.root / "data" / "stdlib_train.idx", preprocess)

    def train(self, until_step: int) -> None:
        """Train from the newest checkpoint, if any, to `until_step`."""
        from megamor.checkpoint import open_checkpoint

        with suppress(CheckpointError):  # there is none yet
            if (done := open_checkpoint(self.latest).step) >= until_step:
                print(f"already done: {done} steps")
                return
        # Two processes whatever the machine has, so that the result is the same everywhere.
        launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}", "-m"]
        command = ["megamor", "pretrain", "--config", str(CONFIG), *self.overrides]
        call([*launcher, *command, f"train.stop_at_step={until_step}"])

    def evaluate(self) -> None:
        """Measure loss in both routing modes, n-gram models to compare with, and what routing saves."""
        from megamor.cli.quickstart_report import make_report, show_report

        losses, report = self.root / "evaluation.json", self.root / "report.json"

        def measure() -> None:
            sequences = self.config.train.eval_sequences
            options = ["--checkpoint", str(self.latest), "--json", str(losses), "--sequences", str(sequences)]
            call(["megamor", "evaluate", *options, "--data", f"{self.root}/data/stdlib_val"], threads=PROCESSES)
            print("counting the n-grams that the network has seen ...", flush=True)
            (network,) = json.loads(losses.read_text(encoding="utf-8"))["sets"].values()
            figures = make_report(self.latest, network, "stdlib", sequences)
            replace_file(report, json.dumps(figures, indent=1) + "\n")

        # The format is an input too: a report that an older version made lacks figures.
        self.once("report", f"{SCHEMA} {(self.latest / 'manifest.json').read_text(encoding='utf-8')}", report, measure)
        show_report(json.loads(report.read_text(encoding="utf-8")))
        if self.short:
            print("this was a short run, which only tries the path: without --short the network passes the bigram")

    def generate(self) -> None:
        """Continue a prompt and show the depth of each token."""
        options = ["--checkpoint", str(self.latest), "--prompt", PROMPT, "--max-tokens", "96"]
        options += ["--show-depth", "--depth-image", str(self.root / "depth.svg")]
        call(["megamor", "generate", *options], threads=PROCESSES)

    def finish_report(self, seconds: Mapping[str, float]) -> None:
        """Add times, machine and versions to report.json, and check that the model has learned something."""
        import torch

        from megamor.origin import describe_origin

        path = self.root / "report.json"
        # A repeated quickstart finds all steps done: the times of the one that made the report stay.
        report = {"seconds": seconds, **json.loads(path.read_text(encoding="utf-8"))}
        report |= {"schema": SCHEMA, "command": "make quickstart", **describe_origin(torch.device("cpu"))}
        replace_file(path, json.dumps(report, indent=1) + "\n")
        if report["beats_bigram_by"] <= 0 and not self.short:
            raise TrainingError("the network has not learned more than a bigram model; this should not happen")

    def once(self, name: str, inputs: str, product: Path, make: Callable[[], None]) -> None:
        """Call `make` unless an earlier quickstart made `product` from the same `inputs`."""
        stamp = hashlib.sha256(inputs.encode()).hexdigest()[:16]
        if self._stamps.get(name) == stamp and product.exists():
            print(f"already done: {product}")
            return
        make()
        self._stamps[name] = stamp
        replace_file(self._finished, json.dumps(self._stamps, indent=1))


def call(module: Sequence[str], threads: int = 1) -> None:
    """Run `python -m <module>` with its output shown.

    Raises:
        TrainingError: it failed, and has printed why.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    status = subprocess.run([sys.executable, "-m", *module], env=environment, check=False).returncode
    if status:
        raise TrainingError(
            f"this step exited with status {status}; its message is above. Rerun the same command to resume"
        )


def sample_documents(corpus: Path) -> Iterator[str]:
    """Yield every n-th document, with n such that about `TOKENIZER_SAMPLE_CHARACTERS` are taken."""
    stride = max(1, corpus.stat().st_size // TOKENIZER_SAMPLE_CHARACTERS)
    with corpus.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            if number % stride == 0:
                yield json.loads(line)["text"]


@user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Run the quickstart."""
    parser = command_parser("quickstart", __doc__)
    parser.add_argument("--root", type=Path, default="runs/quickstart", help="where to write (default: %(default)s)")
    parser.add_argument("--short", action="store_true", help="8 training steps on little data, to try the path")
    arguments = parser.parse_args(argv)
    try:
        Quickstart(arguments.root.resolve(), short=arguments.short).run()
    except OSError as error:
        raise MegamorError(f"can't write to {arguments.root}: {error}; give another --root") from error
