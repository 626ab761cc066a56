"""The checks of `megamor gpu-check`: what training and serving need of a GPU, each in processes of its own.

A check is a function of the device that returns what it found, in a few words, and raises what is wrong. To add one,
add it to `CHECKS`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from megamor.config import ParallelConfig
from megamor.devices import driver_version
from megamor.errors import EXIT_LOST_RANK
from megamor.model.attention import Segments, packed_attention
from megamor.model.loss import choose_loss, linear_cross_entropy
from megamor.parallel import World, joined_world
from megamor.ranks import gather

FOUND = "found: "
"""What a check's process prints before its result."""
HEADS, KV_HEADS, HEAD_DIM = 15, 5, 64  # of the published 360M shape
SECONDS = 90.0
SECONDS_AFTER_FAILURE = 15.0
"""Ranks that don't notice the failure of another one so long are killed, as launchers do it."""


def driver(device: torch.device) -> str:
    """What is installed; `usable_device` has checked that it fits."""
    nccl: Any = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return (
        f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(device)}; driver {driver_version()}, torch "
        f"{torch.__version__}, cuDNN {cudnn}, NCCL {'.'.join(map(str, nccl))}"
    )


def sdpa(device: torch.device) -> str:
    """Causal attention of one sequence."""
    return attend(device, causal)


def varlen(device: torch.device) -> str:
    """Causal attention inside packed documents."""
    bounds = (0, 100, 164, 420, 512)
    segments = Segments(torch.tensor(bounds, dtype=torch.int32, device=device), longest=256)
    return attend(device, lambda q, k, v: packed_attention(q, k, v, segments), bounds)


def attend(
    device: torch.device, attention: Callable[[Tensor, Tensor, Tensor], Tensor], bounds: tuple[int, ...] = (0, 512)
) -> str:
    """Compare `attention` in bf16, forward and backward, with SDPA of one document after another in fp64."""
    low, high = operands(device, *((512, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)))
    wanted = torch.cat([causal(*(x[first:end] for x in high)) for first, end in pairwise(bounds)])
    with profile(activities=[ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU]) as recorded:
        found = attention(low[0], low[1], low[2])
        grads = torch.autograd.grad(found.float().square().sum(), low)
    error = compare([found, *grads], [wanted, *torch.autograd.grad(wanted.square().sum(), high)])
    names = " ".join(event.key.lower() for event in recorded.key_averages())
    kernels = [word for word in ("flash", "fmha", "cudnn", "efficient", "softmax") if word in names]
    return f"kernels: {', '.join(kernels) or names[:100]}; {error}"


def operands(device: torch.device, *shapes: tuple[int, ...], scale: float = 1.0) -> tuple[list[Tensor], list[Tensor]]:
    """Normal numbers times `scale` of these shapes in bf16, and the same in fp64."""
    generator = torch.Generator(device).manual_seed(0)
    normal = (torch.randn(shape, generator=generator, device=device) for shape in shapes)
    low = [(scale * x).bfloat16().requires_grad_() for x in normal]
    return low, [x.detach().double().requires_grad_() for x in low]


def compare(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> str:
    """The largest difference between tensors of a list, relative to the largest value of each; AssertionError if it is
    more than rounding to bf16 explains."""
    pairs = zip(found, wanted, strict=True)
    error = max(float((ours - theirs).detach().abs().max() / theirs.detach().abs().max()) for ours, theirs in pairs)
    assert error < 0.02, f"the results differ from fp64's by {error:.3f} of the largest value"
    return f"error {error:.4f}"


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SDPA of one sequence: [rows, heads, head_dim] each."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.squeeze(0).transpose(0, 1)


def graph(device: torch.device) -> str:
    """Record a CUDA graph as serving does, and replay it on other values."""
    from megamor.serve.engine.graphs import cuda_recorder

    x, weight = (torch.ones(64, 64, device=device) for _ in range(2))
    (out,), replay = cuda_recorder(device)(lambda: (x @ weight,))
    x.fill_(2.0)
    replay()
    assert float(out[0, 0]) == 128.0, f"the replay computed {float(out[0, 0])} instead of 128"
    return "recorded and replayed"


def compiled(device: torch.device) -> str:
    """Compile a function, which takes Triton, a C compiler and Python's headers."""
    x = torch.randn(256, 256, device=device)
    torch.testing.assert_close(torch.compile(lambda x: F.silu(x) * x + 1.0)(x), F.silu(x) * x + 1.0)
    return "compiled and run"


def pinned(device: torch.device) -> str:
    """Copy to the device and back through pinned memory, as reading data and saving in the background do."""
    ids = torch.arange(2**24).pin_memory()
    begun = time.perf_counter()
    back = ids.to(device, non_blocking=True).to("cpu")
    seconds = time.perf_counter() - begun
    assert torch.equal(ids, back), "what came back differs"
    return f"128 MiB there and back in {seconds * 1e3:.0f} ms"


def loss(device: torch.device) -> str:
    """The fused cross-entropy and its gradients."""
    low, high = operands(device, (512, 64), (4096, 64), scale=0.25)
    labels, kernel = torch.arange(512, device=device), choose_loss(device.type)
    results = []
    for pair, name in ((low, kernel), (high, "reference")):
        total = linear_cross_entropy(pair[0], pair[1], labels, kernel=name)[0]
        results.append([total.detach(), *torch.autograd.grad(total, pair)])
    return f"{kernel}; {compare(*results)}"


def paged(device: torch.device) -> str:
    """The kernel of serving against plain attention, row by row."""
    from megamor.serve.engine.paged_kernel import paged_attention

    low, high = operands(device, (5, HEADS, HEAD_DIM), *[(10, 16, KV_HEADS, HEAD_DIM)] * 2)
    tables = torch.tensor([[3, 0, 0], [5, 1, 7], [0, 9, 4]], dtype=torch.int32, device=device)
    owners, ends = [0, 1, 1, 1, 2], [2, 9, 20, 41, 33]
    q, k, v = (x.detach() for x in low)
    found = paged_attention(q, k, v, tables, torch.tensor(owners, device=device), torch.tensor(ends, device=device))
    wanted = []
    for query, owner, end in zip(high[0], owners, ends, strict=True):
        keys, values = (x[tables[owner].long()].flatten(0, 1)[:end].transpose(0, 1) for x in high[1:])
        wanted.append(F.scaled_dot_product_attention(query.unsqueeze(1), keys, values, enable_gqa=True).squeeze(1))
    return compare([found], [torch.stack(wanted)])


def joined(device: torch.device) -> AbstractContextManager[World]:
    """The process group of this check's ranks."""
    return joined_world(ParallelConfig(backend="ddp"), device.type)


def all_reduce(device: torch.device) -> str:
    """A sum over all ranks between the GPUs (NCCL), and a message between the hosts (gloo)."""
    with joined(device) as world:
        x = torch.full((2**22,), float(world.rank), device=world.device)
        dist.all_reduce(x)
        assert float(x[-1]) == sum(range(world.size)), f"the sum is {float(x[-1])} instead of {sum(range(world.size))}"
        assert gather(world.rank) == [*range(world.size)], "gloo gathers something else"
        return f"{world.size} ranks, {dist.get_backend_config()}"


def hsdp(device: torch.device) -> str:
    """Gradients of FSDP2 in two groups of ranks against one process."""
    with joined(device) as world:
        shape = (2, world.size // 2) if world.size % 2 == 0 else (1, world.size)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
        torch.manual_seed(0)
        model = nn.Linear(64, 64).to(world.device)
        alone, x = deepcopy(model), torch.randn(8, 64).to(world.device)
        fully_shard(model, mesh=mesh)
        for module in (model, alone):
            module(x).square().sum().backward()
        grad: Any = model.weight.grad
        torch.testing.assert_close(grad.full_tensor(), alone.weight.grad)
        return f"{shape[0]} groups of {shape[1]} ranks"


def failure(device: torch.device) -> str:
    """Rank 1 runs out of memory while the others wait for it; `run_check` looks at statuses and time."""
    with joined(device) as world:
        x = torch.ones(1, device=world.device)
        dist.all_reduce(x)
        if world.rank == 1:
            raise torch.OutOfMemoryError("injected")
        dist.all_reduce(x)
        return f"{float(x)}: nobody has failed"


class Check(NamedTuple):
    """`run` in one process or, with `ranks`, in one for each GPU (two or more on a CPU); `on_cpu`: there too."""

    run: Callable[[torch.device], str]
    what: str
    ranks: bool = False
    on_cpu: bool = False


CHECKS = {
    "driver": Check(driver, "driver, torch, GPUs"),
    "pinned": Check(pinned, "copies through pinned memory"),
    "sdpa": Check(sdpa, "the kernels that SDPA chooses, against fp64", on_cpu=True),
    "varlen": Check(varlen, "the kernels for packed documents, against fp64"),
    "loss": Check(loss, "the fused loss and its gradients, against fp64", on_cpu=True),
    "graph": Check(graph, "a CUDA graph recorded and replayed"),
    "compile": Check(compiled, "torch.compile"),
    "paged": Check(paged, "the paged kernel of serving against plain attention"),
    "all-reduce": Check(all_reduce, "a sum over all ranks, NCCL and gloo", ranks=True, on_cpu=True),
    "hsdp": Check(hsdp, "FSDP2 in two groups of ranks", ranks=True, on_cpu=True),
    "failure": Check(failure, "rank 1 fails: its status, and how soon the others end", ranks=True, on_cpu=True),
}


class Outcome(NamedTuple):
    """What a check found or what was wrong, and how long it took."""

    good: bool
    text: str
    seconds: float


def run_check(name: str, device: str, gpus: int, port: int) -> Outcome:
    """Run a check in processes of its own, which are killed when its time is over: one that hangs ends no other."""
    if name == "failure" and gpus < 2:
        device = "cpu"  # NCCL wants a GPU for each rank
    size = (max(2, gpus) if device == "cpu" else gpus) if CHECKS[name].ranks else 1
    command = [sys.executable, "-m", "megamor", "gpu-check", "--run", "--only", name, "--device", device]
    world = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        outputs = [Path(directory, str(rank)) for rank in range(size)]
        ranks = []
        for rank, output in enumerate(outputs):
            variables = {**world, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": 1}
            env = {**os.environ, **{name: str(value) for name, value in variables.items()}}
            with output.open("wb") as file:
                ranks.append(subprocess.Popen(command, env=env, stdout=file, stderr=file))
        ends = wait_for(ranks, begun + SECONDS)
        texts = [output.read_text(encoding="utf-8", errors="replace") for output in outputs]
    codes, seconds = [rank.returncode for rank in ranks], time.monotonic() - begun
    cause = next((rank for rank, code in enumerate(codes) if code not in (0, EXIT_LOST_RANK, -9)), 0)
    results = [line.removeprefix(FOUND) for line in texts[0].splitlines() if line.startswith(FOUND)]
    if name == "failure":
        # NCCL's own watchdog ends its process with SIGABRT (-6).
        good = codes[1] == 1 and "injected" in texts[1] and {*codes[:1], *codes[2:]} <= {EXIT_LOST_RANK, -6, -9}
        ended = "had to be killed" if -9 in codes else "ended"
        results = [f"rank 1 had status 1, the others {ended} {max(ends) - ends[1]:.1f} s later ({device})"]
    else:
        good = bool(results) and not any(codes)
    last = " / ".join(texts[cause].strip().splitlines()[-2:])
    late = f", {SECONDS:.0f} s are over" if seconds > SECONDS else ""
    return Outcome(good, results[0] if good else f"statuses {codes}{late}; rank {cause}: {last[-400:]}", seconds)


def wait_for(ranks: list[subprocess.Popen[bytes]], deadline: float) -> list[float]:
    """Wait until all processes have ended, kill those that don't; when each of them ended."""
    ends: dict[int, float] = {}
    while len(ends) < len(ranks):
        now = time.monotonic()
        ends |= {rank: now for rank, process in enumerate(ranks) if rank not in ends and process.poll() is not None}
        if any(process.returncode for process in ranks):
            deadline = min(deadline, now + SECONDS_AFTER_FAILURE)
        for process in ranks if now > deadline else ():
            process.kill()
        time.sleep(0.05)
    return [ends[rank] for rank in range(len(ranks))]
