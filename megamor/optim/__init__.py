"""Optimizer, parameter groups, learning-rate schedules and the non-finite guard."""

from megamor.optim.adamw import build_adamw
from megamor.optim.groups import ParamGroup, build_param_groups
from megamor.optim.guard import Guard, Verdict
from megamor.optim.schedule import lr_multiplier

__all__ = ["Guard", "ParamGroup", "Verdict", "build_adamw", "build_param_groups", "lr_multiplier"]
