"""One optimizer: Muon for the projections of attention and SwiGLU, AdamW for everything else.

Muon (kellerjordan.github.io/posts/muon) replaces the momentum of a matrix by roughly the nearest orthogonal matrix:
five Newton-Schulz steps push its singular values towards 1. The update is scaled by 0.2 sqrt(max(rows, columns)), which
gives it the size of AdamW's, so both use one learning rate and weight decay (arXiv 2502.16982, section 2.2).

A sharded matrix can't be orthogonalised slice by slice. Each matrix has an owner rank: the others send it their slices,
it orthogonalises the whole matrix, and sends every rank its slice of the result. Two collectives carry all matrices of
the model. Under DDP every rank holds the whole gradient, so nothing is sent to the owners: one collective is enough.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megamor.config import Config, OptimConfig
from megamor.optim.adamw import build_adamw, build_param_groups, is_matrix

# Newton-Schulz: x <- A x + B (x x') x + C (x x')^2 x. These coefficients bring singular values near 1 in the fewest
# steps; they end between about 0.7 and 1.2, which training doesn't notice.
A, B, C = 3.4445, -4.7750, 2.0315
BATCH_ELEMENTS = 2**25
"""Elements of the matrices that are orthogonalised at once."""


class Muon(torch.optim.AdamW):
    """AdamW, except for parameter groups with `muon`, whose state is `momentum_buffer` and the count of steps.

    `step` is collective. Every parameter needs a gradient. Newton-Schulz computes in `dtype`; slices are sent in it.
    """

    def __init__(self, groups: Sequence[Any], config: OptimConfig, dtype: torch.dtype, **settings: Any) -> None:
        super().__init__(groups, lr=config.lr, **settings)
        self.config, self.dtype = config, dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["muon"]]
        super().step(closure)
        self.param_groups = groups
        for group in groups:
            if group["muon"]:
                self._update(group)

    def _update(self, group: dict[str, Any]) -> None:
        parameters: list[nn.Parameter] = group["params"]
        for parameter in parameters:
            if not self.state[parameter]:
                step = torch.zeros((), device=parameter.device)
                self.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter), "step": step}
        # As in AdamW's kernel, 1 if the step is to be skipped: nothing changes then, and the host needn't know.
        found = getattr(self, "found_inf", None)
        taken = torch.ones((), device=parameters[0].device) if found is None else 1 - found
        # Lists of it, because the host would read the value of a single tensor.
        count = len(parameters)
        torch._foreach_add_([self.state[parameter]["step"] for parameter in parameters], [taken] * count)
        momenta = [_local(self.state[parameter]["momentum_buffer"]) for parameter in parameters]
        gradients = [_local(parameter.grad) for parameter in parameters if parameter.grad is not None]
        momentum, lr = self.config.muon_momentum, group["lr"]
        if found is not None:
            gradients = [gradient.where(taken > 0, 0.0) for gradient in gradients]
        torch._foreach_mul_(momenta, [torch.where(taken > 0, momentum, 1.0).to(taken)] * count)
        torch._foreach_add_(momenta, gradients)
        ahead = torch._foreach_add(gradients, momenta, alpha=momentum) if self.config.muon_nesterov else momenta
        updates = self._orthogonalised([update.to(self.dtype) for update in ahead], parameters)
        weights = [_local(parameter) for parameter in parameters]
        torch._foreach_mul_(weights, [torch.where(taken > 0, 1 - lr * group["weight_decay"], 1.0).to(taken)] * count)
        for weight, update, parameter in zip(weights, updates, parameters, strict=True):
            weight.add_(update * taken, alpha=-lr * 0.2 * max(parameter.shape) ** 0.5)

    def _orthogonalised(self, updates: list[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
        """This rank's rows of the orthogonalised `updates`, of which it has the same rows."""
        world, steps = dist.get_world_size() if dist.is_initialized() else 1, self.config.muon_steps
        if world == 1:
            return orthogonalise(updates, steps)
        rank, shards = dist.get_rank(), 1
        if isinstance(parameters[0], DTensor):
            shards = parameters[0].device_mesh.size(-1)  # the first dimension of HSDP's mesh is that of the replicas
        owned = owned_matrices([parameter.shape for parameter in parameters], world)

        def rows(number: int, of: int) -> slice:
            """Rows of a matrix that rank `of` holds: FSDP2 gives all but the last ones equally many."""
            count = len(parameters[number])
            size = -(-count // shards)
            return slice(min(count, of % shards * size), min(count, (of % shards + 1) * size))

        def shape(number: int, of: int) -> tuple[int, int]:
            held = rows(number, of)
            return held.stop - held.start, parameters[number].shape[1]

        mine = owned[rank]
        # The owners in this replica get their slices from this replica alone: the others hold the same ones.
        whole, replica = [updates[number] for number in mine], rank // shards
        if shards > 1:
            near = [other // shards == replica for other in range(world)]
            sent = [[updates[number] for number in owned[to]] if near[to] else [] for to in range(world)]
            expected = [[shape(number, of) for number in mine] if near[of] else [] for of in range(world)]
            received = _exchange(sent, expected, updates[0])
            whole = [torch.cat([*slices]) for slices in zip(*filter(None, received), strict=True)]
        finished = [*zip(mine, orthogonalise(whole, steps), strict=True)]
        sent = [[matrix[rows(number, to)] for number, matrix in finished] for to in range(world)]
        expected = [[shape(number, rank) for number in owned[of]] for of in range(world)]
        received = _exchange(sent, expected, updates[0])
        for numbers, slices in zip(owned, received, strict=True):
            for number, result in zip(numbers, slices, strict=True):
                updates[number] = result
        return updates


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """The optimizer of `optim.kind` over the parameters of `model`, which must be on its final device."""
    optim = config.optim
    if optim.kind == "adamw":
        return build_adamw(model, optim)
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    settings = {"betas": (optim.beta1, optim.beta2), "eps": optim.eps, "fused": True}
    return Muon(build_param_groups(model, optim), optim, dtype, **settings)


def moments_of(name: str, shape: Sequence[int], config: OptimConfig) -> tuple[str, ...]:
    """The state that the optimizer keeps of a parameter."""
    if config.kind == "muon" and is_matrix(name, len(shape)):
        return ("momentum_buffer", "step")
    return ("exp_avg", "exp_avg_sq", "step")


def orthogonalise(matrices: Sequence[Tensor], steps: int) -> list[Tensor]:
    """Newton-Schulz of each matrix [rows, columns]: singular values near 1, the same singular vectors."""
    found: list[Tensor] = [*matrices]
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for number, matrix in enumerate(matrices):
        by_shape.setdefault(tuple(sorted(matrix.shape)), []).append(number)
    for shape, numbers in by_shape.items():
        size = max(1, BATCH_ELEMENTS // (shape[0] * shape[1]))
        for batch in (numbers[first : first + size] for first in range(0, len(numbers), size)):
            wide = torch.stack([found[n] if found[n].shape == shape else found[n].mT for n in batch])
            wide /= wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # the largest singular value is below this norm
            for _ in range(steps):
                gram = wide @ wide.mT
                wide = torch.baddbmm(wide, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), wide, beta=A)
            for n, result in zip(batch, wide, strict=True):
                found[n] = result if found[n].shape == shape else result.mT
    return found


def owned_matrices(shapes: Sequence[Sequence[int]], world_size: int) -> list[list[int]]:
    """The matrices that each rank orthogonalises: the costliest first, each to the rank with the least to do so far."""
    costs = [min(shape) ** 2 * (2 * max(shape) + min(shape)) for shape in shapes]
    owned, load = [[] for _ in range(world_size)], [0] * world_size  # type: list[list[int]], list[int]
    for number in sorted(range(len(shapes)), key=lambda n: -costs[n]):
        owner = load.index(min(load))
        owned[owner].append(number)
        load[owner] += costs[number]
    return owned


def _exchange(
    sent: Sequence[Sequence[Tensor]], expected: Sequence[Sequence[tuple[int, int]]], like: Tensor
) -> list[list[Tensor]]:
    """Send each rank its tensors, of the type of `like`; get each rank's, of the `expected` shapes. One collective."""
    lengths = [[rows * columns for rows, columns in shapes] for shapes in expected]
    flat = [tensor.flatten() for tensors in sent for tensor in tensors]
    outgoing = torch.cat([like.new_empty(0), *flat])
    incoming = like.new_empty(sum(map(sum, lengths)))
    dist.all_to_all_single(incoming, outgoing, [*map(sum, lengths)], [sum(t.numel() for t in to) for to in sent])
    parts = iter(torch.split(incoming, [length for of in lengths for length in of]))
    return [[next(parts).view(shape) for shape in shapes] for shapes in expected]


def _local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, sharing memory with it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
