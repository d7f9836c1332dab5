"""From what the package knows about a prompt to the layout that the kernels share."""

from __future__ import annotations

from typing import Any

import torch

from mmefficient.kernels.grouped_attention.layout import Layout, make_layout
from mmefficient.kernels.grouped_attention.pattern import Pattern
from mmefficient.tokens import TokenMap

VIEWS = 1 << 16  # more than any image or video has


def layout_of(tokens: TokenMap, pattern: Pattern | None = None, **options: Any) -> Layout:
    """The layout of a prompt: roles and places from `tokens`, a page per view of an image.

    Args:
        tokens: the map of the prompt, on the device of q, k and v.
        options: as for `make_layout`. Key groups default to 0 = everything else, 1 = visual tokens.
    """
    given: dict[str, Any] = {
        "page": torch.where(tokens.visual, tokens.image * VIEWS + tokens.view, -1),
        "row": tokens.row,
        "col": tokens.col,
        "group": tokens.visual,
        "groups": 2,
    }
    return make_layout(tokens.role, pattern, **(given | options))
