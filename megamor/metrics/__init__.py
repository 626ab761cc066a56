"""What a run measures and where it goes: sinks, throughput, memory, the progress display."""

from megamor.metrics.gpus import peak_flops
from megamor.metrics.memory import peak_memory, reset_peak_memory
from megamor.metrics.progress import TrainingProgress, make_progress
from megamor.metrics.sinks import JsonlSink, Metrics, MetricSink, MultiSink, TensorBoardSink, read_jsonl
from megamor.metrics.throughput import Throughput
from megamor.metrics.wandb_sink import WandbSink

__all__ = [
    "JsonlSink",
    "MetricSink",
    "Metrics",
    "MultiSink",
    "TensorBoardSink",
    "Throughput",
    "TrainingProgress",
    "WandbSink",
    "make_progress",
    "peak_flops",
    "peak_memory",
    "read_jsonl",
    "reset_peak_memory",
]
