"""DDP and FSDP2 compared with one process that sees the whole batch; what each of them saves and restores."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from megamor.config import Config, RecursionConfig, RouterConfig
from megamor.errors import CheckpointError
from megamor.model import build_model
from megamor.parallel import resolve_backend
from megamor.parallel.fsdp2 import Fsdp2Backend
from tests.distributed.harness import RankFailed, run_ranks
from tests.distributed.runs import (
    EXPERT_CHOICE,
    FIXED_DEPTH,
    LOSS_FREE,
    StepResult,
    assert_resumes_bitwise,
    digest,
    fresh_run,
    relative_differences,
    run_and_save,
    run_step,
    start,
    stored_tensors,
    tiny,
)

WORLD_SIZE = {"single": 1, "ddp": 2, "fsdp2": 2}
ROUTERS = {"fixed": FIXED_DEPTH, "expert_choice": EXPERT_CHOICE}
TOLERANCE = 1e-6


def run(config: Config, function: Callable[..., Any], *args: Any) -> list:
    return run_ranks(function, config, *args, world_size=WORLD_SIZE[config.parallel.backend])


@pytest.fixture(scope="module")
def whole_batch() -> dict[str, list[StepResult]]:
    """One process, one micro-batch."""
    single = tiny("single", micro_batch_size=4)
    return {name: run(replace(single, router=router), fresh_run)[0] for name, router in ROUTERS.items()}


@pytest.mark.promise("R7")
@pytest.mark.parametrize(
    ("config", "router"),
    [
        pytest.param(tiny("single"), "fixed", id="single, four micro-batches"),
        pytest.param(tiny("ddp"), "fixed", id="ddp, two micro-batches"),
        pytest.param(tiny("ddp", micro_batch_size=2), "expert_choice", id="ddp"),
        pytest.param(tiny("fsdp2"), "fixed", id="fsdp2, two micro-batches"),
        pytest.param(tiny("fsdp2", micro_batch_size=2), "expert_choice", id="fsdp2"),
        pytest.param(tiny("fsdp2", reshard_after_forward=False), "fixed", id="fsdp2, not resharded"),
    ],
)
def test_twenty_steps_agree_with_one_process(config: Config, router: str, whole_batch: dict) -> None:
    results = run(replace(config, router=ROUTERS[router]), fresh_run)
    assert results[0] == results[-1]
    assert whole_batch[router][-1][0] < 0.9 * whole_batch[router][0][0]  # something was learned
    assert max(relative_differences(whole_batch[router], results[0])) < TOLERANCE


def router_norms(config: Config) -> list[float]:
    """Norm of the routers' gradients in three steps, as their statistics reduce it."""
    backend, found = start(config), []
    for step in range(3):
        run_step(backend, step, config)
        square = backend.router_square.clone()
        if backend.world_size > 1:
            torch.distributed.all_reduce(square)
        found.append(square.sqrt().item())
    return found


def norms_by_hand(config: Config) -> list[float]:
    """The same from the gradients that one process's optimizer gets."""
    backend, found = start(config), []
    update = backend.optimizer.step

    def recorded() -> None:
        named = [parameter for name, parameter in backend.module.named_parameters() if "router" in name]
        found.append(math.sqrt(sum(parameter.grad.double().square().sum().item() for parameter in named)))
        update()

    backend.optimizer.step = recorded  # type: ignore[method-assign, assignment]
    for step in range(3):
        run_step(backend, step, config)
    return found


@pytest.mark.parametrize("parallel", [("ddp", None), ("fsdp2", None), ("fsdp2", 1)], ids=["ddp", "fsdp2", "hsdp"])
def test_routers_have_a_gradient_norm_of_their_own(parallel: tuple[str, int | None]) -> None:
    """Of slices, copies and groups of copies alike, and before clipping."""

    def clipped(config: Config, limit: float) -> Config:
        return replace(config, optim=replace(config.optim, grad_clip=limit))

    alone = tiny("single", micro_batch_size=4)
    expected = run_ranks(norms_by_hand, clipped(alone, 1e9), world_size=1)[0]
    assert min(expected) > 0
    assert run_ranks(router_norms, clipped(alone, 1e-4), world_size=1)[0][0] == pytest.approx(expected[0], rel=1e-6)
    shared = tiny(parallel[0], shard_degree=parallel[1], micro_batch_size=2)
    for found in run_ranks(router_norms, clipped(shared, 1e9)):
        assert found == pytest.approx(expected, rel=1e-4)


def test_bf16_backends_stay_close() -> None:
    reference = run(tiny("single", precision="bf16", router=FIXED_DEPTH, micro_batch_size=4), fresh_run)[0]
    exact = run(tiny("single", router=FIXED_DEPTH, micro_batch_size=4), fresh_run)[0]
    assert 1e-6 < relative_differences(exact, reference)[0] < 1e-3
    for backend in ("ddp", "fsdp2"):
        results = run(tiny(backend, precision="bf16", router=FIXED_DEPTH), fresh_run)[0]
        assert relative_differences(reference, results)[0] < 1e-3


def in_bf16(config: Config) -> tuple[list[StepResult], dict[str, set[torch.dtype]]]:
    """Results of some steps, and the types of weights, moments, gradients, and gradients between micro-batches."""
    backend, types = start(config), {"accumulated": set[torch.dtype](), "gradients": set[torch.dtype]()}
    update, backward = backend.optimizer.step, backend.backward

    def recorded() -> None:
        types["gradients"] |= {p.grad.dtype for p in backend.module.parameters() if p.grad is not None}
        update()

    def watched(loss: Tensor, *, last_micro_batch: bool) -> None:
        backward(loss, last_micro_batch=last_micro_batch)
        if not last_micro_batch:
            gradients = [parameter.grad for parameter in backend.module.parameters()]
            if isinstance(backend, Fsdp2Backend):
                units: list[Any] = [module for module in backend.module.modules() if isinstance(module, FSDPModule)]
                held = [param for unit in units for param in unit._get_fsdp_state()._fsdp_param_group.fsdp_params]
                gradients = [param.unsharded_accumulated_grad for param in held]
            types["accumulated"] |= {gradient.dtype for gradient in gradients if gradient is not None}

    backend.optimizer.step, backend.backward = recorded, watched  # type: ignore[method-assign, assignment]
    results = [run_step(backend, step, config) for step in range(12)]
    types["weights"] = {parameter.dtype for parameter in backend.module.parameters()}
    types["moments"] = {value.dtype for state in backend.optimizer.state.values() for value in state.values()}
    return results, types


def test_one_process_in_bf16_trains_as_fsdp2_does() -> None:
    """`auto` is FSDP2 on one GPU. Two micro-batches; routers choose alike, or the losses would jump."""
    single, fsdp2 = (tiny(name, precision="bf16", micro_batch_size=2) for name in ("single", "fsdp2"))
    expected, types = run_ranks(in_bf16, single, world_size=1)[0]
    alone, sharded = run_ranks(in_bf16, fsdp2, world_size=1)[0]
    assert types == sharded == {name: {torch.float32} for name in types}
    # Autocast and FSDP2 round the same weights and products to 8 bits, but autocast keeps the stream in fp32. So they
    # differ no more than either does from fp32 (`test_bf16_backends_stay_close`).
    assert relative_differences(expected, alone)[0] < 1e-3
    assert expected[-1][0] < 0.95 * expected[0][0]  # something was learned
    # Two ranks reduce the same gradients that one adds up, in another order of one fp32 sum.
    assert relative_differences(alone, run_ranks(in_bf16, fsdp2)[0][0])[0] < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("backend", WORLD_SIZE)
def test_compiled_blocks_agree(backend: str, whole_batch: dict) -> None:
    config = tiny(backend)
    results = run_ranks(
        fresh_run,
        replace(config, train=replace(config.train, compile=True)),
        5,
        world_size=WORLD_SIZE[backend],
        timeout=300.0,
    )
    assert max(relative_differences(whole_batch["expert_choice"][:5], results[0])) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["recursion", "block", "selective"])
def test_compiled_blocks_agree_under_recomputation(policy: str, whole_batch: dict) -> None:
    config = tiny("fsdp2", micro_batch_size=2)
    train = replace(config.train, compile=True, activation_checkpointing=policy)  # type: ignore[arg-type]
    results = run_ranks(fresh_run, replace(config, train=train), 5, timeout=300.0)
    assert max(relative_differences(whole_batch["expert_choice"][:5], results[0])) < 1e-6


def test_rotary_angles_stay_fp32_in_bf16() -> None:
    assert run(tiny("fsdp2", precision="bf16"), _types_in_a_block) == [(torch.bfloat16, torch.float32)] * 2


def _types_in_a_block(config: Config) -> tuple[torch.dtype, torch.dtype]:
    """Types of the hidden states and of the rotary angles that the first block gets."""
    backend = start(config)
    seen = []
    backend.module.prelude[0].register_forward_pre_hook(lambda _, args: seen.append((args[0].dtype, args[1].cos.dtype)))
    run_step(backend, 0, config)
    return seen[0]


@pytest.mark.promise("R1", "R9")
@pytest.mark.parametrize(("precision", "router"), [("fp32", EXPERT_CHOICE), ("bf16", LOSS_FREE)])
@pytest.mark.parametrize("backend", WORLD_SIZE)
def test_resume_is_bitwise(backend: str, precision: str, router: RouterConfig, tmp_path: Path) -> None:
    assert_resumes_bitwise(tiny(backend, precision=precision, router=router), tmp_path, WORLD_SIZE[backend])


@pytest.mark.promise("R7", backend=("single", "ddp", "fsdp2"))
@pytest.mark.promise("R1")
def test_ddp_resumes_bitwise_on_three_ranks(tmp_path: Path) -> None:
    """With three ranks the result depends on the order of sums, which changes if DDP rebuilds its buckets."""
    config = tiny("ddp")
    assert_resumes_bitwise(replace(config, train=replace(config.train, global_batch_size=6)), tmp_path, world_size=3)


@pytest.mark.promise("R9", "R10", backend="fsdp2")
def test_state_holds_each_unique_parameter_once(tmp_path: Path) -> None:
    config = tiny("fsdp2")
    run(config, run_and_save, tmp_path / "first", tmp_path / "final")
    tensors = stored_tensors(tmp_path / "final")
    weights = {key: tensor for key, tensor in tensors.items() if key.startswith("model.")}
    assert weights.keys() == {f"model.{name}" for name in build_model(config).state_dict()}
    assert sum(tensor.numel() for tensor in weights.values()) == build_model(config).num_parameters()
    moments = {key.rsplit(".", 1)[1] for key in tensors if key.startswith("optimizer.")}
    assert moments == {"step", "exp_avg", "exp_avg_sq"}


def test_a_checkpoint_of_step_zero_changes_nothing(tmp_path: Path) -> None:
    config = tiny("fsdp2")
    run(config, _save_at_start, tmp_path)
    resumed = run(config, _load_and_train, tmp_path)
    assert resumed == run(config, fresh_run, 3)


def _save_at_start(config: Config, directory: Path) -> None:
    start(config).save(directory)


def _load_and_train(config: Config, directory: Path) -> list[StepResult]:
    backend = start(config)
    backend.load(directory)
    return [run_step(backend, step, config) for step in range(3)]


def test_another_model_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    run(tiny("single"), _save_at_start, tmp_path)
    wider = tiny("single")
    wider = replace(wider, model=replace(wider.model, ffn_dim=96))
    vanilla = replace(tiny("single", router=FIXED_DEPTH), recursion=RecursionConfig())
    for config, named in (
        (wider, "instead of"),
        (vanilla, "prelude.1"),
        (tiny("single", router=FIXED_DEPTH), "router"),
    ):
        with pytest.raises(RankFailed, match=rf"CheckpointError: .*{named}"):
            run(config, _load_and_train, tmp_path)
    with pytest.raises(RankFailed, match=r"CheckpointError: .*no readable state"):
        run(tiny("single"), _load_and_train, tmp_path / "nowhere")


@pytest.mark.promise("R8")
@pytest.mark.parametrize("backend", WORLD_SIZE)
def test_a_step_that_is_not_finite_changes_nothing(backend: str, tmp_path: Path) -> None:
    for norm, before, after in run(tiny(backend), _spoiled_step, tmp_path):
        assert not torch.isfinite(torch.tensor(norm))
        assert before == after


def _spoiled_step(config: Config, directory: Path) -> tuple[float, str, str]:
    """Gradient norm of a step with a bad loss on the last rank, and the state before and after it."""
    backend = start(config)
    run_step(backend, 1, config)
    (directory / "before").mkdir(exist_ok=True)
    (directory / "after").mkdir(exist_ok=True)
    backend.save(directory / "before")
    _, norm = run_step(backend, 2, config, spoil=float("nan") if backend.rank == backend.world_size - 1 else 1.0)
    backend.save(directory / "after")
    assert run_step(backend, 2, config)[1] < float("inf")  # the spoiled gradients are gone
    return norm, digest(stored_tensors(directory / "before")), digest(stored_tensors(directory / "after"))


def test_auto_chooses_by_the_number_of_processes() -> None:
    assert resolve_backend(tiny("auto").parallel, 1) == "single"
    assert resolve_backend(tiny("auto").parallel, 2) == "fsdp2"
    assert resolve_backend(tiny("auto").parallel, 1, on_gpu=True) == "fsdp2", "bf16 as on several"


def test_harness_reports_a_failing_rank() -> None:
    with pytest.raises(RankFailed, match=r"rank 1 raised:(.|\n)*the second one"):
        run_ranks(_fail_on_second)
    with pytest.raises(RankFailed, match=r"no answer in time from ranks \[1\]"):
        run_ranks(_hang_on_second, timeout=2.0)
    with pytest.raises(RankFailed, match="rank 1 died"):
        run_ranks(_die_on_second)


def _fail_on_second() -> None:
    if os.environ["RANK"] == "1":
        raise CheckpointError("the second one")


def _hang_on_second() -> None:
    if os.environ["RANK"] == "1":
        time.sleep(60)


def _die_on_second() -> None:
    if os.environ["RANK"] == "1":
        os._exit(3)
