"""Optimizer, parameter groups and learning-rate schedules."""

from megamor.optim.adamw import ParamGroup, build_adamw, build_param_groups, is_matrix
from megamor.optim.muon import Muon, build_optimizer, moments_of, orthogonalise
from megamor.optim.schedule import lr_multiplier, lr_multiplier_of_budget

__all__ = [
    "Muon",
    "ParamGroup",
    "build_adamw",
    "build_optimizer",
    "build_param_groups",
    "is_matrix",
    "lr_multiplier",
    "lr_multiplier_of_budget",
    "moments_of",
    "orthogonalise",
]
