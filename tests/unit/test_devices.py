"""GPUs that are there but can't be used are an error; where there are none, or nobody wants them, the CPU computes."""

from __future__ import annotations

import os
import resource
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megamor import devices, load
from megamor.cli import bench
from megamor.config import Config, ParallelConfig, RunConfig
from megamor.devices import usable_device
from megamor.errors import ConfigError
from megamor.parallel import device, init_world, mesh
from megamor.train import build_trainer
from tests.distributed.harness import run_ranks
from tests.resume.runs import tiny_run

DRIVER = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n"
VARIABLES = ("CUDA_VISIBLE_DEVICES", "CROSS_SIZE", *devices._COUNTS, *devices._LISTS)


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without GPUs, whatever this one has: no variables, device files, driver or nvidia-smi."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name in ("dev", "bin"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(devices, "_DEV", tmp_path / "dev")
    monkeypatch.setattr(devices, "_DRIVER", tmp_path / "version")

    def no_cuda() -> bool:
        warnings.warn("CUDA initialization: The NVIDIA driver on your system is too old", stacklevel=2)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", no_cuda)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    return tmp_path


def smi(machine: Path) -> None:
    path = machine / "bin" / "nvidia-smi"
    path.write_text('#!/bin/sh\ncase $1 in --list*) echo "GPU 0: H100 (UUID: x)";; *) echo 535.104.05;; esac\n')
    path.chmod(0o755)


@pytest.mark.promise("R24")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CUDA_VISIBLE_DEVICES", "0,1"),
        ("SLURM_GPUS_ON_NODE", "8"),
        ("SLURM_GPUS_PER_NODE", "h100:8"),
        ("SLURM_JOB_GPUS", "0"),
        ("SLURM_STEP_GPUS", "3"),
        ("CUDA_VISIBLE_DEVICES", "0,-1"),
        ("SLURM_GPUS_PER_NODE", "h100:4,a100:2"),
        ("file", "/dev"),
        ("nvidia-smi", "lists GPU 0: H100"),
    ],
)
def test_gpus_that_cannot_be_used_are_an_error(
    name: str, value: str, machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "file":
        (machine / "dev" / "nvidia0").touch()
        (machine / "dev" / "nvidiactl").touch()
        name = str(machine / "dev" / "nvidia0")
        value = "exists"
    elif name == "nvidia-smi":
        smi(machine)
    else:
        monkeypatch.setenv(name, value)
    (machine / "version").write_text(DRIVER)
    for asked in (None, "auto", "cuda"):
        with pytest.raises(ConfigError) as found:
            usable_device(asked)
        said = str(found.value)
        assert f"{name} {'' if value[:2] in ('ex', 'li') else 'is '}{value}" in said
        assert "the driver is 535.104.05, and torch" in said
        assert "built for CUDA 13.0, which needs driver 580 or newer" in said
        assert "The NVIDIA driver on your system is too old." in said
        assert "cu126" in said
        assert "run.device=cpu" in said
    assert usable_device("cpu") == torch.device("cpu")


@pytest.mark.promise("R24")
def test_the_driver_may_be_told_by_its_tool_and_a_build_may_have_no_cuda(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smi(machine)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ConfigError, match=r"is built without CUDA \(driver: 535.104.05\).*cu126"):
        usable_device()


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"SLURM_GPUS_ON_NODE": "0", "SLURM_GPUS_PER_NODE": "h100:0", "SLURM_JOB_GPUS": ""},
        *({"CUDA_VISIBLE_DEVICES": hidden, "SLURM_GPUS_ON_NODE": "8"} for hidden in ("", "-1", "-1,0", "NoDevFiles")),
        {"NVIDIA_VISIBLE_DEVICES": "all"},  # which images of CUDA set on any machine
        {"CUDA_VISIBLE_DEVICES": "0,1", "CROSS_RANK": "0", "CROSS_SIZE": "1", "LOCAL_SIZE": "2"},  # deepspeed on a CPU
    ],
)
def test_without_gpus_or_with_hidden_ones_the_cpu_computes(
    variables: dict[str, str], machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variables.get("SLURM_GPUS_ON_NODE") == "8":
        smi(machine)
        (machine / "dev" / "nvidia0").touch()
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert usable_device("auto") == torch.device("cpu")
    with pytest.raises(ConfigError, match="torch sees 0 CUDA devices"):
        usable_device("cuda")


def test_a_gpu_of_another_job_is_none(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm's cgroups leave the device files of all GPUs where they are and refuse to open them."""
    (machine / "dev" / "nvidia0").touch()

    def refused(path: object, flags: int) -> int:
        raise PermissionError(1, "Operation not permitted")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refused)
        assert devices.signs_of_gpus() == []
    assert len(devices.signs_of_gpus()) == 1


def test_a_gpu_that_fails_at_its_first_kernel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: object, **settings: object) -> None:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    monkeypatch.setattr(torch.Tensor, "__float__", failing)  # kernels fail when somebody waits for them
    with pytest.raises(ConfigError, match="no kernel image"):
        devices.check_computes(torch.device("cpu"))
    monkeypatch.setattr(torch, "ones", failing)
    with pytest.raises(ConfigError, match=r"cuda:1 can't compute with torch .*: CUDA error: no kernel image"):
        devices.check_computes(torch.device("cuda", 1))


def test_files_that_are_no_gpu_are_no_sign(machine: Path) -> None:
    for name in ("nvidiactl", "nvidia-uvm", "nvidia-caps", "nvidia-modeset", "nvidia"):
        (machine / "dev" / name).touch()
    assert devices.signs_of_gpus() == []


@pytest.mark.parametrize(
    ("build", "needs"),
    [("11.8", ", which needs driver 450 or newer."), ("12.6", ", which needs driver 525 or newer."), ("14.0", ".")],
)
def test_each_build_needs_a_driver(build: str, needs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", build)
    monkeypatch.setenv("SLURM_JOB_GPUS", "0")
    with pytest.raises(ConfigError, match=r"the driver is unknown, and torch .* is built for CUDA") as found:
        usable_device()
    assert f"is built for CUDA {build}{needs} torch says" in str(found.value)


def test_a_file_without_permissions_and_a_driver_that_fails_are_signs(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (machine / "dev" / "nvidia0").touch()
    for number in (13, 19, 5):  # EACCES, ENODEV, EIO

        def failing(*arguments: object, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr(os, "open", failing)
            assert devices.signs_of_gpus() == [f"{machine}/dev/nvidia0 exists"]


@pytest.mark.parametrize("name", ["mps", "xpu", "meta", "CUDA", "cuda:", "cuda:-1", "cuda:x", "cuda:1000", "cpu:0", ""])
def test_other_devices_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"device '{name}' is unknown: give cpu, cuda or cuda:1"):
        usable_device(name)


def test_a_process_takes_the_gpu_of_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    used = list[torch.device]()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    monkeypatch.setattr(mesh, "check_computes", used.append)
    monkeypatch.delenv("SLURM_STEP_ID", raising=False)
    for name, rank, index in ((None, 3, 3), ("cuda", 2, 2), ("cuda:1", 0, 1)):
        assert mesh._select_device(name, rank) == torch.device("cuda", index)
        assert used == [torch.device("cuda", index)] * 2, "set, and computes"
        used.clear()
    with pytest.raises(ConfigError, match="process 4 of this machine has no GPU: there are 4"):
        mesh._select_device(None, 4)
    with pytest.raises(ConfigError, match="device 'cuda:4': torch sees 4 CUDA devices"):
        usable_device("cuda:4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="there are 1"):
        mesh._select_device(None, 3)
    monkeypatch.setenv("SLURM_STEP_ID", "0")  # --gpus-per-task shows each process its own
    assert mesh._select_device(None, 3) == torch.device("cuda", 0)


def test_a_gpu_is_prepared_for_sums_and_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    products = SimpleNamespace(allow_bf16_reduced_precision_reduction=True)
    asked = list[int]()
    monkeypatch.setattr(torch.backends.cuda, "matmul", products)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(device, "activate_newest_flash", lambda major, module: asked.append(major))
    device.prepare_device(torch.device("cpu"))
    assert products.allow_bf16_reduced_precision_reduction
    device.prepare_device(torch.device("cuda", 0))
    assert not products.allow_bf16_reduced_precision_reduction
    assert asked == [9]


def test_every_rank_checks_the_device_that_the_run_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    with pytest.raises(ConfigError, match="SLURM_GPUS_ON_NODE is 8"):
        init_world(ParallelConfig(), RunConfig().device)
    assert init_world(ParallelConfig(backend="single"), "cpu").device == torch.device("cpu")


def test_the_limit_of_open_files_is_raised_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    limits, set_to = {"now": (1024, 262_144)}, list[tuple[int, int]]()
    monkeypatch.setattr(resource, "getrlimit", lambda what: limits["now"])
    monkeypatch.setattr(resource, "setrlimit", lambda what, pair: set_to.append(pair))
    mesh._raise_open_files(512)
    assert set_to == [(65_536, 262_144)]
    for soft, hard in ((65_536, 262_144), (100_000, -1), (-1, -1)):  # enough already
        limits["now"] = (soft, hard)
        mesh._raise_open_files(512)
    assert len(set_to) == 1
    limits["now"] = (1024, 2048)
    with pytest.raises(ConfigError, match=r"may open 2048 files .* 512 ranks need up to 2560"):
        mesh._raise_open_files(512)


def flags(config: Config) -> tuple[bool, bool, bool, str | None]:
    build_trainer(config, init_world(config.parallel)).loader.close()
    cudnn = torch.backends.cudnn
    asked = torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    return asked, cudnn.deterministic, cudnn.benchmark, os.environ.get("CUBLAS_WORKSPACE_CONFIG")


def test_a_deterministic_run_sets_what_torch_needs_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    assert run_ranks(flags, tiny_run(tmp_path, deterministic=True), world_size=1) == [(True, True, False, ":4096:8")]
    assert run_ranks(flags, tiny_run(tmp_path), world_size=1) == [(False, False, False, None)]
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    assert run_ranks(flags, tiny_run(tmp_path, deterministic=True), world_size=1)[0][3] == ":16:8", "the user's stays"


def test_every_command_checks_that_its_device_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that torch sees and can't use: too old for the build, or taken."""

    def failing(*arguments: object) -> None:
        raise ConfigError("cuda can't compute")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(devices, "check_computes", failing)
    monkeypatch.setattr(load, "check_computes", failing)
    serve = ["serve", "--config", "configs/bench/serve_360m.yaml"]
    for command in (lambda: load.load_model(tmp_path), lambda: bench.main(serve), lambda: bench.main(["save"])):
        with pytest.raises((ConfigError, SystemExit)) as found:
            command()
        assert getattr(found.value, "code", 2) == 2
