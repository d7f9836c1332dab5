"""The embedded model: a small LLaVA in Hugging Face format, its training recipe and the scenes it is measured on."""

from __future__ import annotations

from pathlib import Path


def path() -> Path:
    """Directory of the embedded checkpoint, in Hugging Face format (``LlavaForConditionalGeneration``)."""
    return Path(__file__).resolve().parent / "checkpoint"


def sample_picture() -> Path:
    """The bundled picture: scene 9 of the split ``sample``, 336x336 RGB, in no training or test split."""
    return Path(__file__).resolve().parent / "sample.png"
