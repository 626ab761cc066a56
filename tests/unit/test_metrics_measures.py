"""Throughput, MFU, memory and the table of GPU peaks."""

from __future__ import annotations

import contextlib
import os

import numpy as np
import pytest
import torch

from megamor.metrics import Throughput, peak_flops, peak_memory, reset_peak_memory


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def make_throughput(peak: float | None, **options: int) -> tuple[Throughput, Clock]:
    clock = Clock()
    return Throughput(peak_flops=peak, world_size=2, clock=clock, **options), clock


def test_rates_and_utilisation() -> None:
    throughput, clock = make_throughput(1000.0, window=2)
    clock.now += 50  # before the loop, so start() discards it
    throughput.start()
    for seconds in (10.0, 1.0, 3.0):
        clock.now += seconds
        throughput.add(seconds=throughput.lap(), tokens=100, model_flops=2000.0, hardware_flops=3000.0)
    metrics = throughput.metrics()
    assert metrics == pytest.approx(
        {
            "throughput/tokens_per_second": 200 / 4,
            "throughput/tokens_per_second_mean": 300 / 14,
            "throughput/step_seconds": 2.0,
            "throughput/flops_per_second": 1000.0,
            "throughput/mfu": 4000 / (4 * 2 * 1000),
            "throughput/hfu": 6000 / (4 * 2 * 1000),
        }
    )


def test_evaluation_and_saving_do_not_count() -> None:
    throughput, clock = make_throughput(None)
    throughput.start()
    for _ in range(2):
        clock.now += 1
        throughput.add(seconds=throughput.lap(), tokens=10, model_flops=1.0, hardware_flops=1.0)
        with throughput.excluded():
            clock.now += 1000
    with contextlib.suppress(KeyError), throughput.excluded():
        clock.now += 1000
        raise KeyError("an evaluation that fails")
    clock.now += 1
    throughput.add(seconds=throughput.lap(), tokens=10, model_flops=1.0, hardware_flops=1.0)
    metrics = throughput.metrics()
    assert metrics["throughput/tokens_per_second"] == metrics["throughput/tokens_per_second_mean"] == 10
    assert metrics["throughput/mfu"] is metrics["throughput/hfu"] is None


def test_nothing_measured_is_none() -> None:
    throughput, _ = make_throughput(1000.0)
    assert throughput.metrics()["throughput/tokens_per_second"] is None
    assert throughput.metrics()["throughput/mfu"] is None


TFLOPS = {
    312.0: ("NVIDIA A100-SXM4-80GB", "NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB", "NVIDIA A100 80GB PCIe"),
    989.4: ("NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA GH200 480GB"),
    125.0: ("NVIDIA A10",),
    756.0: ("NVIDIA H100 PCIe",),
    835.5: ("NVIDIA H100 NVL",),
    362.05: ("NVIDIA L40S",),
    121.0: ("NVIDIA L4",),
    165.2: ("NVIDIA GeForce RTX 4090",),
    71.0: ("NVIDIA GeForce RTX 3090",),
    2250.0: ("NVIDIA B200",),
    1307.4: ("AMD Instinct MI300X",),
}
UNKNOWN = [
    *(None, "", "Tesla V100-SXM2-16GB", "Tesla T4", "NVIDIA A10G", "NVIDIA A100-SXM-64GB", "Some other GPU"),
    *("NVIDIA A100-SXM4-80GB MIG 1g.10gb", "NVIDIA H100 Future Edition"),
    *("NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D"),
]


@pytest.mark.parametrize(("name", "tflops"), [(name, peak) for peak, names in TFLOPS.items() for name in names])
def test_known_devices(name: str, tflops: float) -> None:
    assert peak_flops(name) == tflops * 1e12


@pytest.mark.parametrize("name", UNKNOWN)
def test_other_devices_have_no_peak_rather_than_a_guess(name: str | None) -> None:
    assert peak_flops(name) is None


def test_only_bf16_has_a_table() -> None:
    assert peak_flops("NVIDIA H200", "fp32") is None


def gib(device: torch.device) -> float:
    peak = peak_memory(device)["memory/peak_gib"]
    assert peak is not None
    return peak


def test_peak_of_a_process_rises_and_can_be_reset() -> None:
    device = torch.device("cpu")
    could_reset = reset_peak_memory(device)
    before = gib(device)
    size = 256 * 2**20
    block = np.ones(size, dtype=np.uint8)
    after = gib(device)
    assert after - before > 0.9 * size / 2**30
    del block
    if could_reset:
        reset_peak_memory(device)
        assert gib(device) < after - 0.9 * size / 2**30
    else:
        assert not os.access("/proc/self/clear_refs", os.W_OK)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_of_a_gpu() -> None:
    device = torch.device("cuda")
    assert reset_peak_memory(device)
    before = gib(device)
    block = torch.ones(2**28, dtype=torch.uint8, device=device)
    assert gib(device) - before == pytest.approx(0.25)
    del block
    reset_peak_memory(device)
    assert gib(device) == pytest.approx(before, abs=0.01)
    reserved = peak_memory(device)["memory/peak_reserved_gib"]
    assert reserved is not None
    assert reserved >= 0.25
