"""In which order layers may stop updating visual rows: ``python -m mmefficient.profiles.freeze_order --out FOLDER``.

ShortV's calibration (arXiv 2504.00502): for each decoder layer alone, freeze the visual rows there and measure the KL
divergence of the next token's distribution from the stock model's. Layers with the smallest come first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from mmefficient.errors import InputError
from mmefficient.models import adapter_for
from mmefficient.plan import Plan
from mmefficient.profiles import Checkpoint, Profile


@torch.no_grad()
def divergences(model: Any, prompts: Iterable[Mapping[str, torch.Tensor]]) -> list[float]:
    """KL(frozen || stock) in nats per decoder layer, mean over the rows of `prompts`.

    Args:
        prompts: model inputs with images, padded on the left, on the model's device.

    Raises:
        InputError: there are no prompts.
    """
    layers = len(adapter_for(model).layers)
    sums, rows = torch.zeros(layers, dtype=torch.float64), 0
    for inputs in prompts:
        stock = _next(model, inputs)
        rows += len(stock)
        for layer in range(layers):
            with Plan(f"shortv(layers=({layer},))").apply(model):
                frozen = _next(model, inputs)
            sums[layer] += (frozen.exp() * (frozen - stock)).sum()
    if not rows:
        raise InputError("measuring layers needs at least one prompt with an image.")
    return (sums / rows).tolist()


def _next(model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Log-probabilities of the next token, float64 [B, V] on the CPU."""
    logits: torch.Tensor = model(**inputs, logits_to_keep=1).logits[:, -1]
    return logits.double().log_softmax(-1).cpu()


def order(found: Sequence[float]) -> list[int]:
    """Layers by rising divergence."""
    return sorted(range(len(found)), key=lambda layer: found[layer])


def main(
    out: Annotated[Path, typer.Option(help="Folder for shortv-NAME.json.")],
    model: Annotated[str, typer.Option(help="Folder in Hugging Face format, hub id, or 'reference'.")] = "reference",
    questions: Annotated[int, typer.Option(min=1, help="Questions of each kind, scenes' val split.")] = 8,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Measure a checkpoint on the scenes and write its profile; for other pictures call `divergences`."""
    from mmefficient.messages import user_message
    from mmefficient.models.reference.scenes import splits
    from mmefficient.vlm import VLM

    vlm = VLM.from_pretrained(model, device=device)
    asked = splits.load("val", limit=questions)
    batches = (
        vlm._encode([[user_message([one.image()], one.text)] for one in asked[i : i + 16]], Plan())
        for i in range(0, len(asked), 16)
    )
    found = divergences(vlm.model, batches)
    ranked = order(found)
    facts = {"order": ranked, "divergence": found, "prompts": len(asked), "data": "scenes, val"}
    checkpoint = Checkpoint(vlm.model, len(found))
    path = out / f"shortv-{Path(model).name}.json"
    Profile.make("shortv", checkpoint, facts).write(path)
    print(f"{path}: {', '.join(map(str, ranked))}")


if __name__ == "__main__":
    typer.run(main)
