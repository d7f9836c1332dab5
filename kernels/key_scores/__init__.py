"""Attention mass each key receives from chosen query rows, without an N-by-N map."""

from mmefficient.kernels.key_scores.reference import key_scores

__all__ = ["key_scores"]
