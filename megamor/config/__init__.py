"""Settings of a run: frozen dataclasses, read from YAML files with overlays and dotted overrides, and validated."""

from megamor.config.convert import config_from_dict as config_from_dict
from megamor.config.convert import config_to_dict as config_to_dict
from megamor.config.load import config_from_yaml as config_from_yaml
from megamor.config.load import config_to_yaml as config_to_yaml
from megamor.config.load import load_config as load_config
from megamor.config.routers import (
    CustomRouterConfig as CustomRouterConfig,
)
from megamor.config.routers import (
    EmaThresholdConfig as EmaThresholdConfig,
)
from megamor.config.routers import (
    ExpertChoiceConfig as ExpertChoiceConfig,
)
from megamor.config.routers import (
    FixedDepthConfig as FixedDepthConfig,
)
from megamor.config.routers import (
    HaltingConfig as HaltingConfig,
)
from megamor.config.routers import (
    RandomConfig as RandomConfig,
)
from megamor.config.routers import (
    RouterConfig as RouterConfig,
)
from megamor.config.routers import (
    ScoredConfig as ScoredConfig,
)
from megamor.config.routers import (
    SkipForwardRecurseConfig as SkipForwardRecurseConfig,
)
from megamor.config.routers import (
    TokenChoiceConfig as TokenChoiceConfig,
)
from megamor.config.schema import (
    Alarm as Alarm,
)
from megamor.config.schema import (
    CheckpointConfig as CheckpointConfig,
)
from megamor.config.schema import (
    Config as Config,
)
from megamor.config.schema import (
    DataConfig as DataConfig,
)
from megamor.config.schema import (
    DiagnosisConfig as DiagnosisConfig,
)
from megamor.config.schema import (
    GuardConfig as GuardConfig,
)
from megamor.config.schema import (
    MetricsConfig as MetricsConfig,
)
from megamor.config.schema import (
    ModelConfig as ModelConfig,
)
from megamor.config.schema import (
    OptimConfig as OptimConfig,
)
from megamor.config.schema import (
    ParallelConfig as ParallelConfig,
)
from megamor.config.schema import (
    RampConfig as RampConfig,
)
from megamor.config.schema import (
    RecursionConfig as RecursionConfig,
)
from megamor.config.schema import (
    RunConfig as RunConfig,
)
from megamor.config.schema import (
    SourceConfig as SourceConfig,
)
from megamor.config.schema import (
    TrainConfig as TrainConfig,
)
