"""Typed errors. Each says what was wrong and what to do about it; the command line prints it and exits with 2."""

from __future__ import annotations


class MMEfficientError(Exception):
    """Base class of every error this package raises on purpose."""


class PlanError(MMEfficientError, ValueError):
    """A plan cannot be parsed, or its methods cannot be composed."""


class UnknownMethodError(PlanError):
    """A plan names a method or a field that does not exist."""


class BudgetError(PlanError):
    """A budget is outside its range, or asks for more visual tokens than a row holds."""


class ModelError(MMEfficientError):
    """A path is not a model, or the model's architecture cannot carry the plan."""


class InputError(MMEfficientError, ValueError):
    """An image or a prompt cannot be used, or the two do not fit together."""


class SilentPlanError(MMEfficientError, RuntimeError):
    """A plan was left after it had seen images without having acted on any of them."""
