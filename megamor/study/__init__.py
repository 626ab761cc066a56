"""Matched comparisons of models: arms, budgets, tuned learning rates, paired seeds, results with intervals."""

from megamor.study.spec import Arm, Study, load_study

__all__ = ["Arm", "Study", "load_study"]
