"""What a run measures and where it is written: sinks, throughput, memory, progress. Imports without torch."""

from megamor.metrics.gpus import peak_flops
from megamor.metrics.memory import peak_memory, reset_peak_memory
from megamor.metrics.progress import TrainingDisplay
from megamor.metrics.sinks import JsonlSink, Metrics, MetricSink, TensorBoardSink, read_jsonl
from megamor.metrics.throughput import Throughput
from megamor.metrics.trackers import TrackerSink, TrackioSink
from megamor.metrics.wandb_sink import WandbSink

__all__ = [
    "JsonlSink",
    "MetricSink",
    "Metrics",
    "TensorBoardSink",
    "Throughput",
    "TrackerSink",
    "TrackioSink",
    "TrainingDisplay",
    "WandbSink",
    "peak_flops",
    "peak_memory",
    "read_jsonl",
    "reset_peak_memory",
]
