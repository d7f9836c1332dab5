"""Load a vision-language model and its processor, with one sentence for each way that can fail."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from mmefficient.errors import InputError, ModelError

REFERENCE = "reference"
BIASED = "reference-biased"


def load(
    name: str | os.PathLike[str], *, device: str, dtype: str | torch.dtype, attn_implementation: str | None
) -> tuple[Any, Any]:
    """Return (model in evaluation mode on its device, processor that pads on the left).

    `name` is a folder in Hugging Face format, a hub id, ``reference`` for the embedded model, ``reference+NAME`` for
    one of its deltas (``reference-biased`` is the one that makes it hallucinate, ``reference-biased+NAME`` one that was
    trained on that), or the folder of a delta (`models.reference.adapt`). `device` and `dtype` are as in
    `resolve_device` and `resolve_dtype`. Code from the hub is never run.

    Raises:
        ModelError: not a model, not a vision-language model, damaged, or not reachable.
        InputError: a device or dtype that does not exist here.
    """
    target = resolve_device(device)
    deltas = _deltas(name)
    source = _source(REFERENCE if deltas else name)
    config = _guard(name, AutoConfig.from_pretrained, source, trust_remote_code=False)
    if config.model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise ModelError(
            f"{str(name)!r} is a {config.model_type!r} model without a vision tower; "
            f"give a vision-language model such as llava-hf/llava-1.5-7b-hf, or {REFERENCE!r}."
        )
    processor = _guard(name, AutoProcessor.from_pretrained, source, trust_remote_code=False)
    if not hasattr(processor, "image_processor") or not getattr(processor, "chat_template", None):
        lacks = "chat template" if hasattr(processor, "image_processor") else "image processor"
        raise ModelError(f"{str(name)!r} has no {lacks}; use a checkpoint that was saved with its complete processor.")
    processor.tokenizer.padding_side = "left"
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    kind = resolve_dtype(dtype, target, config)
    model = _guard(
        name,
        AutoModelForImageTextToText.from_pretrained,
        source,
        dtype=config.dtype if deltas else kind,  # a sum is rounded as it was measured, whatever it runs in
        trust_remote_code=False,
        **options,
    )
    if deltas:
        from mmefficient.models.reference import adapt

        for delta in deltas:
            adapt.load(model, delta)
        model = model.to(kind)
    return model.to(target).eval(), processor


def pixel_options(processor: Any, device: torch.device) -> dict[str, Any]:
    """Keywords that make an image processor work on the model's device; none where it cannot or need not.

    Processors that transformers builds on torchvision take a CUDA device. Resizing there rounds differently from the
    CPU: by at most one of 256 levels.
    """
    backend = getattr(processor.image_processor, "backend", None)
    return {"device": device} if device.type == "cuda" and backend == "torchvision" else {}


def resolve_device(device: str) -> torch.device:
    """``auto`` (the first CUDA device, else the CPU), ``cpu``, ``cuda``, ``cuda:1``, ``mps``."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError:
        raise InputError(f"There is no device {device!r}; use auto, cpu, cuda or cuda:N.") from None
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise InputError(f"Device {device!r} is not here (CUDA devices: {torch.cuda.device_count()}); use cpu or auto.")
    if target.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("Device 'mps' is not here; use cpu or auto.")
    return target


def resolve_dtype(dtype: str | torch.dtype, device: torch.device, config: Any = None) -> torch.dtype:
    """A floating dtype or its name. ``auto`` is the checkpoint's own; float32 on the CPU, where others are slow."""
    if isinstance(dtype, str) and dtype == "auto":
        own = getattr(config, "dtype", None)
        return torch.float32 if device.type == "cpu" or own is None else own
    chosen = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype, None)
    if chosen not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise InputError(f"{str(dtype)!r} is not a dtype for weights; use auto, float32, bfloat16 or float16.")
    return chosen


def _deltas(name: str | os.PathLike[str]) -> list[Path]:
    """The folders of the deltas that `name` asks for, in the order in which they are added."""
    text = os.fspath(name)
    if text == BIASED or text.startswith(f"{BIASED}+"):
        text = text.replace(BIASED, f"{REFERENCE}+biased", 1)
    folder = Path(text).expanduser()
    asked = text.split("+")[1:] if text.startswith(f"{REFERENCE}+") else []
    if not asked and not (folder / "delta.json").is_file():
        return []
    from mmefficient.models.reference import adapt

    found = adapt.chain(adapt.VARIANTS / asked[-1] if asked else folder)
    if [each.name for each in found][-len(asked) :] != asked and asked:
        needed = "+".join([REFERENCE, *(each.name for each in found)])
        raise ModelError(f"{str(name)!r} adds deltas in an order they were not trained in; use {needed!r}.")
    return found


def _source(name: str | os.PathLike[str]) -> str:
    text = os.fspath(name)
    if text == REFERENCE:
        from mmefficient.models import reference

        return os.fspath(reference.path())
    path = Path(text).expanduser()
    if path.is_file():
        raise ModelError(f"{text!r} is a file, not a model; give the folder that holds config.json.")
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{text!r} is not a model: the folder has no config.json.")
        return os.fspath(path)
    if not isinstance(name, str) or text.startswith((".", "/", "~")) or text.count("/") != 1:
        raise ModelError(f"There is no model at {text!r}; give a folder, a hub id like owner/name, or {REFERENCE!r}.")
    return text


def _guard(name: str | os.PathLike[str], load: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a transformers loader; whatever it raises on missing, foreign or damaged files becomes one ModelError."""
    try:
        return load(*args, **kwargs)
    except Exception as error:  # OSError, ValueError, KeyError, JSON, safetensors, hub and import errors alike
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"{str(name)!r} cannot be loaded as a vision-language model ({lines[0].rstrip('.:')}); "
            f"check the name, the files and the network, or use {REFERENCE!r}."
        ) from error
