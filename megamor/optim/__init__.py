"""Optimizer, parameter groups, learning-rate schedules and the non-finite guard."""

from megamor.optim.adamw import build_adamw
from megamor.optim.groups import ParamGroup, build_param_groups
from megamor.optim.guard import check_finite
from megamor.optim.schedule import lr_multiplier

__all__ = ["ParamGroup", "build_adamw", "build_param_groups", "check_finite", "lr_multiplier"]
