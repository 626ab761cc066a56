"""A layer of your own, recursed token by token: here a small MLP that learns to apply a function several times."""

import torch
from torch import nn

import megamor

torch.manual_seed(0)
dim, steps = 32, 200


class Residual(nn.Module):
    """Works token by token, so it needs no mask; `padding` is for layers that mix tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(dim, 64), nn.GELU(), nn.Linear(64, dim))

    def forward(self, rows: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        change: torch.Tensor = self.mlp(rows)
        return rows + change


router = megamor.make_config(router={"kind": "token_choice"}, num_recursions=3, sharing="cycle").router
layer = megamor.RecursiveLayer(Residual(), dim, num_recursions=3, router=router)
rotation = torch.linalg.qr(torch.randn(dim, dim)).Q
optimizer = torch.optim.AdamW(layer.parameters(), lr=3e-3)
for step in range(steps):
    x = torch.randn(8, 16, dim)
    out = layer(x, step=step)
    loss = (out.stream - x @ rotation).square().mean() + sum(out.losses.values())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 50 == 49:
        print(f"step {step + 1}: loss {loss.item():.3f}, mean depth {out.depth.double().mean():.2f}")
