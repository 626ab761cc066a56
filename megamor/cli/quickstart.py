"""The main job from end to end on two processes: real text in, a trained checkpoint out, resumed, evaluated, sampled.

Run it with `make quickstart`. Everything it makes is under runs/quickstart; steps that are finished are recognised, so
that running it again is quick, and an interrupted one goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.rule import Rule

from megamor.bench.origin import describe_origin
from megamor.checkpoint import open_checkpoint
from megamor.cli.quickstart_data import standard_library, train_tokenizer, write_corpus
from megamor.cli.quickstart_report import make_report, show_report
from megamor.config import Config, load_config
from megamor.config.derive import total_steps
from megamor.errors import CheckpointError, MegamorError, TrainingError, user_errors
from megamor.files import replace_file

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = REPOSITORY / "configs" / "quickstart.yaml"
PROCESSES = 2
SCHEMA = "megamor-quickstart/1"
SHORT_OVERRIDES = ("train.max_steps=8", "train.eval_every=4", "optim.warmup_steps=2", "checkpoint.every_steps=4")
SHORT_CORPUS_BYTES = 1_500_000

console = Console(highlight=False)


@dataclass
class Quickstart:
    """The seven steps. `short` takes a slice of the corpus and a handful of training steps, for the test suite."""

    root: Path
    short: bool
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self) -> None:
        """All steps in order; prints where the time went."""
        self.root.mkdir(parents=True, exist_ok=True)
        self.step("1 corpus", self.corpus)
        self.step("2 tokenizer", self.tokenizer)
        self.step("3 shards", self.shards)
        half = total_steps(self.config) // 2
        self.step("4 train to the middle", lambda: self.train(half))
        self.step("5 resume and finish", lambda: self.train(total_steps(self.config)))
        self.step("6 evaluate", self.evaluate)
        self.step("7 generate", self.generate)
        total = sum(self.seconds.values())
        console.print(Rule(f"done in {total:.0f} s", style="green"))
        console.print(", ".join(f"{name} {seconds:.0f} s" for name, seconds in self.seconds.items()))
        report = json.loads((self.root / "report.json").read_text())
        report = {"seconds": self.seconds, **report}  # those of the launch that made it
        report |= {"schema": SCHEMA, "command": "make quickstart", **describe_origin(torch.device("cpu"))}
        (self.root / "report.json").write_text(json.dumps(report, indent=1) + "\n")
        if report["beats_bigram_by"] <= 0 and not self.short:
            raise TrainingError("the network has not learned more than a bigram knows; this should not happen")

    def step(self, name: str, action: Callable[[], None]) -> None:
        """Announce, do and time a step."""
        console.print(Rule(name, align="left"))
        started = time.perf_counter()
        action()
        self.seconds[name] = time.perf_counter() - started

    @property
    def overrides(self) -> list[str]:
        """What differs from configs/quickstart.yaml."""
        moved = [
            f"run.dir={self.root.parent}",
            f"run.name={self.root.name}",
            f"data.train=[{self.root}/data/stdlib_train]",
            f"data.validation={{stdlib: {self.root}/data/stdlib_val}}",
            f"data.tokenizer={self.root}/tokenizer.json",
        ]
        return [*moved, *(SHORT_OVERRIDES if self.short else ())]

    @property
    def config(self) -> Config:
        """The configuration of the run."""
        return load_config(CONFIG, self.overrides)

    @property
    def checkpoints(self) -> Path:
        """Where the run saves."""
        return self.root / "checkpoints"

    def corpus(self) -> None:
        """The standard library's source files, one document each."""
        key = f"{sys.version} {standard_library()} {self.short}"
        if self.is_done("corpus", key, self.root / "corpus.jsonl"):
            return
        found = write_corpus(self.root / "corpus.jsonl", SHORT_CORPUS_BYTES if self.short else None)
        console.print(f"{found['documents']:,} files, {found['characters'] / 1e6:.1f} million characters of Python")
        self.mark_done("corpus", key)

    def tokenizer(self) -> None:
        """A byte-level BPE tokenizer of the corpus."""
        key = f"{self.stamps()['corpus']} {self.config.model.vocab_size}"
        if self.is_done("tokenizer", key, self.root / "tokenizer.json"):
            return
        train_tokenizer(self.root / "corpus.jsonl", self.root / "tokenizer.json", self.config.model.vocab_size)
        console.print(f"{self.config.model.vocab_size:,} entries: {self.root / 'tokenizer.json'}")
        self.mark_done("tokenizer", key)

    def shards(self) -> None:
        """Training and validation shards."""
        key = self.stamps()["tokenizer"]
        index = self.root / "data" / "stdlib_train.idx"
        if self.is_done("shards", key, index):
            return
        # A run on other data can't be continued on these.
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        command = [sys.executable, "-m", "megamor.cli.preprocess", "--input", str(self.root / "corpus.jsonl")]
        command += [
            "--tokenizer",
            str(self.root / "tokenizer.json"),
            "--append-eod",
            "--split",
            "0.9,0.1" if self.short else "0.97,0.03",
        ]
        self.call([*command, "--output-prefix", str(self.root / "data" / "stdlib"), "--workers", str(PROCESSES)])
        self.mark_done("shards", key)

    def train(self, until_step: int) -> None:
        """Train to `until_step` from wherever the run is."""
        if self.finished_steps() >= until_step:
            console.print(f"already done: {self.finished_steps()} steps")
            return
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
        script = [str(REPOSITORY / "pretrain.py"), "--config", str(CONFIG), *self.overrides]
        self.call([*launcher, *script, f"train.stop_at_step={until_step}"])

    def finished_steps(self) -> int:
        """Optimizer steps in the newest checkpoint."""
        try:
            return open_checkpoint(self.checkpoints / "latest").step
        except CheckpointError:
            return 0

    def evaluate(self) -> None:
        """Loss under both ways of routing, beside count-based models."""
        latest, evaluation, report = (
            self.checkpoints / "latest",
            self.root / "evaluation.json",
            self.root / "report.json",
        )
        key = hashlib.sha256((latest / "manifest.json").read_bytes()).hexdigest()
        if not self.is_done("report", key, report):
            sequences = str(self.config.train.eval_sequences)
            module = [sys.executable, "-m", "megamor.evaluate", "--checkpoint", str(latest), "--json", str(evaluation)]
            self.call([*module, "--data", f"{self.root}/data/stdlib_val", "--sequences", sequences], threads=PROCESSES)
            console.print("counting n-grams of the tokens that the network has seen ...")
            figures = make_report(latest, evaluation, "stdlib", self.config.train.eval_sequences)
            report.write_text(json.dumps(figures, indent=1) + "\n")
            self.mark_done("report", key)
        show_report(json.loads(report.read_text()), console)

    def generate(self) -> None:
        """A continuation, with the depth of every token."""
        picture = self.root / "depth.png"
        module = [sys.executable, "-m", "megamor.cli.generate", "--checkpoint", str(self.checkpoints / "latest")]
        prompt = 'def read_lines(path):\n    """Return'
        options = ["--prompt", prompt, "--max-tokens", "96", "--show-depth", "--depth-png", str(picture)]
        self.call([*module, *options], threads=PROCESSES)

    def call(self, command: Sequence[str], threads: int = 1) -> None:
        """Run a command of this project, its output live.

        Raises:
            TrainingError: it failed, and has said why.
        """
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        status = subprocess.run(command, cwd=REPOSITORY, env=environment, check=False).returncode
        if status:
            raise TrainingError(f"this step ended with status {status}; its message is above. Run the command again")

    def stamps(self) -> dict[str, str]:
        """Keys of the finished steps."""
        path = self.root / "finished.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def is_done(self, name: str, key: str, product: Path) -> bool:
        """Whether a step was finished with these inputs and its product is still there."""
        done = self.stamps().get(name) == hashed(key) and product.exists()
        if done:
            console.print(f"already done: {product}")
        return done

    def mark_done(self, name: str, key: str) -> None:
        """Remember a finished step."""
        replace_file(self.root / "finished.json", json.dumps({**self.stamps(), name: hashed(key)}, indent=1))


def hashed(key: str) -> str:
    """A short name of a step's inputs."""
    return hashlib.sha256(key.encode()).hexdigest()[:16]


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="megamor.cli.quickstart",
        description="Train, interrupt, resume, evaluate and sample a small Mixture-of-Recursions model.",
        epilog="example:\n  python -m megamor.cli.quickstart            # minutes on two cores, under runs/quickstart",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--root", type=Path, default=Path("runs/quickstart"), help="where everything goes")
    parser.add_argument("--short", action="store_true", help="a few training steps on little data, to try the path")
    arguments = parser.parse_args(argv)
    try:
        Quickstart(arguments.root.resolve(), arguments.short).run()
    except OSError as error:
        raise MegamorError(f"can't write to {arguments.root}: {error}; give another --root") from error


if __name__ == "__main__":
    main()
