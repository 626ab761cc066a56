"""What a training step of the 360M shape asks of a GPU: waits, dispatched operations and bytes, on fake CUDA tensors.

Run `python -m tests.step_counters`: it writes benchmarks/results/step_counters.json under the name given by --as.
"""

from __future__ import annotations

import argparse
import inspect
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from megamor.config import Config, ParallelConfig, load_config
from megamor.model import Transformer
from megamor.optim import build_optimizer
from megamor.parallel import World
from megamor.parallel.backend import Backend
from megamor.train.trainer import StepBatch, Trainer
from tests.fake_cuda import CUDA, fake_cuda

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "step_counters.json"
CASES = {
    "vanilla": ("vanilla_360m.yaml", False),
    "vanilla, documents": ("vanilla_360m.yaml", True),
    "MoR-3 expert": ("mor_360m.yaml", False),
    "MoR-3 token": ("mor_360m_token.yaml", False),
}
ROWS, LENGTH, ACCUMULATED = 16, 2048, 4
TOKENS = ROWS * LENGTH


class Batch:
    """A micro-batch that is on the device already."""

    num_tokens = TOKENS
    inputs = torch.zeros(ROWS, LENGTH, dtype=torch.int64)

    def __init__(self, documents: bool) -> None:
        self.documents = documents

    def arguments(self, device: torch.device) -> dict[str, Any]:
        ids = torch.zeros(ROWS, LENGTH, dtype=torch.int64, device=device)
        given = {"inputs": ids, "labels": ids, "documents": ids if self.documents else None, "lengths": None}
        counts = "num_documents" in inspect.signature(Transformer.forward).parameters and self.documents
        return given | ({"num_documents": 50} if counts else {})


def measure(config: Config, documents: bool) -> dict[str, Any]:
    """Counters of one optimizer step on one GPU, with autocast, and of the first case's pointwise bytes in a block."""
    config = replace(config, parallel=ParallelConfig(backend="single"))
    sizes: dict[tuple[int, ...], list[Any]] = {(3, 2): [[TOKENS // n, LENGTH // n] for n in (1, 2, 4)]}
    Transformer.to = lambda model, *_: model  # type: ignore[method-assign]
    with fake_cuda(sizes, lenient=True) as device:
        with CUDA:
            model = Transformer(config)
        world = World(0, 1, 0, CUDA)
        backend = Backend(model, model.parallel_plan(), config, world, lambda module: build_optimizer(module, config))
        trainer: Any = object.__new__(Trainer)
        parts = {"config": config, "backend": backend, "distillation": None, "progress": SimpleNamespace(step=50)}
        trainer.__dict__.update(parts, diagnosis=SimpleNamespace(gradient=None))
        for counter in (device.operations, device.waits, device.bytes):
            counter.clear()
        batch: Any = Batch(documents)
        labels = ACCUMULATED * TOKENS
        figures = trainer.run_micro_batches(StepBatch([batch] * ACCUMULATED, labels, labels), 1e-3)
        model.update_routers(figures.totals)
        figures._arrived.synchronize()
    return {
        "waits": dict(device.waits),
        "operations": sum(device.operations.values()),
        "gigabytes": {kind: round(count / 1e9, 1) for kind, count in sorted(device.bytes.items())},
    }


def main() -> None:
    """Measure all cases and add them to the results under a name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--as", dest="name", default="after")
    parser.add_argument("--to", type=Path, default=RESULTS)
    args = parser.parse_args()
    found = {}
    for case, (recipe, documents) in CASES.items():
        config = load_config(ROOT / "configs" / recipe)
        found[case] = measure(config, documents)
        print(case, found[case], flush=True)
    before = json.loads(args.to.read_text()) if args.to.exists() else {}
    args.to.write_text(json.dumps(before | {args.name: found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
