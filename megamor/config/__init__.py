"""Settings of a run: dataclasses, YAML overlays, dotted overrides, validation."""

from megamor.config.load import config_from_dict, config_to_dict, config_to_yaml, load_config
from megamor.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    ExpertChoiceConfig,
    FixedDepthConfig,
    MetricsConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RecursionConfig,
    RouterConfig,
    RunConfig,
    SourceConfig,
    TokenChoiceConfig,
    TrainConfig,
)

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "ExpertChoiceConfig",
    "FixedDepthConfig",
    "MetricsConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "RecursionConfig",
    "RouterConfig",
    "RunConfig",
    "SourceConfig",
    "TokenChoiceConfig",
    "TrainConfig",
    "config_from_dict",
    "config_to_dict",
    "config_to_yaml",
    "load_config",
]
