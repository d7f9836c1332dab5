"""Evaluation: tasks, metrics with confidence intervals, and a resumable runner for several plans on one model."""

from __future__ import annotations

from mmefficient.evaluation.runner import run_eval
from mmefficient.evaluation.task import Kind, Output, Ratio, Record, Scorer, Task, ratio

__all__ = ["Kind", "Output", "Ratio", "Record", "Scorer", "Task", "ratio", "run_eval"]
