"""Routers on chosen layers, trained on tensors of your own: no files, no command line."""

import torch

import megamor

config = megamor.make_config(
    vocab_size=64, dim=64, num_layers=6, num_heads=4, num_kv_heads=2, ffn_dim=128, max_seq_len=64, seq_len=64,
    # Early layers may recurse more often. Layers 4 and 5 are ordinary ones.
    num_recursions=3,
    router_layers=[0, 1, 2, 3],
    stages=[{"first_layer": 2, "num_recursions": 2}, {"first_layer": 3, "num_recursions": 2}],
    router={"kind": "skip_forward_recurse", "hidden": 32, "target_depth": 1.5},
    optim={"lr": 3e-3, "warmup_steps": 10},
    precision="fp32",
)  # fmt: skip
session = megamor.Session(config)
generator = torch.Generator().manual_seed(0)
for step in range(60):
    # Each sequence counts up from a random number by a random stride: easy to learn, not at once.
    start, stride = torch.randint(64, (2, 16, 1), generator=generator)
    tokens = (start + (1 + stride % 5) * torch.arange(65)) % 64
    losses = session.training_step(tokens[:, :-1], tokens[:, 1:])
    if step % 20 == 19:
        print(f"step {step + 1}: loss {losses.language_model:.3f}, routers {losses.router:.4f}")
        for name, stats in session.routing_stats(reset=True).items():
            shares = " ".join(f"{share:.2f}" for share in stats.depth_shares)
            print(f"  {name}: mean depth {stats.mean_depth:.2f}, shares of depths 0, 1, … {shares}")

result = session.generate([3, 5, 7, 9], max_tokens=8, temperature=0.0)
print("3 5 7 9 continues", *result.ids[4:], "- recursions of each token read:", result.depths)
