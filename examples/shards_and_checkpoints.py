"""Shards made by `megamor preprocess`, trained on from Python, saved, loaded again, and looked at."""

import sys
import tempfile
from pathlib import Path

import megamor

if len(sys.argv) != 2:
    sys.exit("usage: python examples/shards_and_checkpoints.py PREFIX   (of a pair PREFIX.bin, PREFIX.idx)")
config = megamor.make_config(
    data={"train": [sys.argv[1]], "seq_len": 64, "document_mask": False},
    model={"vocab_size": 4096, "dim": 64, "num_layers": 8, "num_heads": 4, "num_kv_heads": 2, "ffn_dim": 128},
    recursion={"num_recursions": 3, "sharing": "middle_cycle"},
    router={"kind": "expert_choice", "alpha": 1.0},
    train={"global_batch_size": 8, "micro_batch_size": 8, "max_steps": 40, "precision": "fp32"},
    optim={"lr": 5e-3, "warmup_steps": 5},
)
session = megamor.Session(config)
for batch in session.batches():
    losses = session.training_step(batch.inputs, batch.labels)
    print(f"step {session.step}: loss {losses.language_model:.3f}", end="\n" if session.step % 10 == 0 else "\r")
    if session.step == 40:
        break
print(session.routing_stats()["stage"])
with tempfile.TemporaryDirectory() as directory:
    print("saved", session.save(directory).name)
    again = megamor.Session.load(directory)
    print(f"loaded at step {again.step}; {again.model.num_parameters():,} parameters")
    loaded = megamor.load_model(Path(directory))
    print("depths of eight tokens:", megamor.generate(loaded.model, [*range(100, 108)], 1).depths)
