"""Make Hugging Face vision-language models cheaper to run, by changing how the language model treats image tokens.

import mmefficient as mm

with mm.Plan("fastv(layer=2,keep=0.25)").apply(model) as run:  # any supported transformers model
    model.generate(**inputs)
run.report()

vlm = mm.VLM.from_pretrained("reference", plan="fastv(layer=2,keep=0.25)")
vlm.ask("picture.png", "How many dogs are there?").text
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmefficient.chat import Chat
    from mmefficient.methods import methods
    from mmefficient.plan import Plan
    from mmefficient.report import Report
    from mmefficient.vlm import VLM, Answer

__version__ = "0.1.0"
__all__ = ["VLM", "Answer", "Chat", "Plan", "Report", "__version__", "methods"]

_HOME = {
    "Answer": "mmefficient.vlm",
    "Chat": "mmefficient.chat",
    "Plan": "mmefficient.plan",
    "Report": "mmefficient.report",
    "VLM": "mmefficient.vlm",
    "methods": "mmefficient.methods",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that neither torch nor transformers is loaded before."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
