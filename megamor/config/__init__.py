"""Settings of a run: frozen dataclasses, read from YAML files with overlays and dotted overrides, and validated."""

from megamor.config.convert import config_from_dict, config_to_dict
from megamor.config.load import config_from_yaml, config_to_yaml, load_config, override, read_mapping
from megamor.config.paths import expand_paths, literal
from megamor.config.routers import (
    CapacityConfig,
    CustomRouterConfig,
    EmaThresholdConfig,
    ExpertChoiceConfig,
    FixedDepthConfig,
    HaltingConfig,
    LearnedThresholdConfig,
    MonotoneConfig,
    PonderNetConfig,
    RandomConfig,
    RouterConfig,
    ScoredConfig,
    SkipForwardRecurseConfig,
    TargetConfig,
    TokenChoiceConfig,
)
from megamor.config.schema import (
    Alarm,
    CheckpointConfig,
    Config,
    DataConfig,
    DepthStep,
    DiagnosisConfig,
    GuardConfig,
    MetricsConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RampConfig,
    RecursionConfig,
    RunConfig,
    SourceConfig,
    StageConfig,
    TrainConfig,
)

__all__ = [
    "Alarm", "CapacityConfig", "CheckpointConfig", "Config", "CustomRouterConfig", "DataConfig", "DepthStep",
    "DiagnosisConfig", "EmaThresholdConfig", "ExpertChoiceConfig", "FixedDepthConfig", "GuardConfig", "HaltingConfig",
    "LearnedThresholdConfig", "MetricsConfig", "ModelConfig", "MonotoneConfig", "OptimConfig", "ParallelConfig",
    "PonderNetConfig", "RampConfig", "RandomConfig", "RecursionConfig", "RouterConfig", "RunConfig", "ScoredConfig",
    "SkipForwardRecurseConfig", "SourceConfig", "StageConfig", "TargetConfig", "TokenChoiceConfig", "TrainConfig",
    "config_from_dict", "config_from_yaml", "config_to_dict", "config_to_yaml", "expand_paths", "literal",
    "load_config", "override", "read_mapping",
]  # fmt: skip
