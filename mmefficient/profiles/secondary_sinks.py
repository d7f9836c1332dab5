"""Secondary attention sinks of a checkpoint: ``python -m mmefficient.profiles.secondary_sinks --out PROFILE.json``.

The detector of "On the Existence and Behaviour of Secondary Attention Sinks" (arXiv 2512.22213), which needs no
attention maps: between the layer in which the first token's norm jumps up and the one in which it falls, a token is a
sink where its hidden state points along the first token's. How many layers it does so tells the kinds apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from torch import nn
from torch.nn import functional as F

from mmefficient.profiles import Checkpoint, Profile

COSINE, FIRST = 0.9, 3  # least cosine of a sink; positions among which the primary sink is
DEEP, BRIEF = 32, 4  # layers of the models that the lifetimes were found on; the longest that counts as noise
Label = Literal["primary", "secondary", "noise"]


@dataclass(frozen=True)
class Sinks:
    """What one prompt's hidden states say.

    Attributes:
        primary: position of the primary sink; window: the layers after which it is active, (first, last).
        flags: bool [L, n], tokens that are sinks after each layer; the primary one is not flagged.
    """

    primary: int
    window: tuple[int, int]
    flags: torch.Tensor

    @property
    def lifetime(self) -> torch.Tensor:
        """int64 [n], layers after which each token is a sink."""
        return self.flags.sum(0)

    def label(self, token: int) -> Label | None:
        """What kind of sink a token is: one that lives as long as the primary one, a secondary one, or noise."""
        return label(int(self.lifetime[token]), len(self.flags))


def label(lifetime: int, layers: int) -> Label | None:
    """The kind of a sink that lives for some of the `layers`: secondary from 5 to layers - 16 of 32 or more.

    Shallower models, which the paper does not have, get the same shares of their depth.
    """
    share = min(1.0, layers / DEEP)
    if not lifetime:
        return None
    if lifetime >= layers - (DEEP // 2 - 1) * share:
        return "primary"
    return "secondary" if lifetime > BRIEF * share else "noise"


def detect(states: torch.Tensor, cosine: float = COSINE) -> Sinks:
    """Sinks of one prompt without padding, from the residual stream after every decoder layer, [L, n, D]."""
    states = states.float()
    norms = states.norm(dim=-1)  # [L, n]
    primary = int(norms[:, :FIRST].mean(0).argmax())
    steps = norms[1:, primary] - norms[:-1, primary]
    start = int(steps.argmax()) + 1
    end = start + int(steps[start:].argmin()) if start < len(steps) else len(states) - 1
    flags = F.cosine_similarity(states, states[:, primary, None], dim=-1).abs() > cosine
    layer = torch.arange(len(states), device=states.device)[:, None]
    place = torch.arange(states.shape[1], device=states.device)
    return Sinks(primary, (start, end), flags & (layer >= start) & (layer <= end) & (place > primary))


@torch.no_grad()
def states(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """The residual stream after every decoder layer of a prompt, float32 [L, n, D]."""
    found: list[torch.Tensor] = []
    layers = model.get_decoder().layers  # type: ignore[operator]
    handles = [
        layer.register_forward_hook(
            lambda module, args, out: found.append((out if torch.is_tensor(out) else out[0])[0].float())
        )
        for layer in layers
    ]
    try:
        model(**inputs, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(found)


def measure(model: nn.Module, prompts: list[dict[str, Any]], image: int) -> dict[str, Any]:
    """Facts for a profile: mean sinks per prompt by kind and by where they are, and the primary sink's windows.

    Args:
        prompts: inputs of the model, one row each, unpadded; image: the id of a placeholder of the image.
    """
    counts: dict[str, dict[str, float]] = {
        where: dict.fromkeys(("primary", "secondary", "noise"), 0.0) for where in ("before", "image", "after")
    }
    windows, births, lives = [], [], []
    for inputs in prompts:
        found = detect(states(model, inputs))
        windows.append(list(found.window))
        visual = (inputs["input_ids"][0] == image).nonzero()[:, 0]
        first, last = (int(visual[0]), int(visual[-1])) if len(visual) else (0, -1)
        for token in found.flags.any(0).nonzero()[:, 0].tolist():
            kind = found.label(token)
            assert kind is not None
            where = "before" if token < first else "image" if token <= last else "after"
            counts[where][kind] += 1 / len(prompts)
            if kind == "secondary":
                births.append(int(found.flags[:, token].float().argmax()))
                lives.append(int(found.lifetime[token]))
    return {"per_prompt": counts, "windows": windows, "secondary": {"created": births, "lifetime": lives}}


def main(
    out: Annotated[Path, typer.Option(help="Where the profile goes: secondary_sinks-NAME.json.")],
    model: Annotated[str, typer.Option(help="reference, reference-biased, a folder or a hub id.")] = "reference",
    pictures: Annotated[int, typer.Option(min=1, help="Validation pictures, each with a question for a caption.")] = 20,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Find the secondary sinks of a checkpoint."""
    from mmefficient.evaluation.tasks.hallucination import task
    from mmefficient.profiles.heads import chat_inputs
    from mmefficient.vlm import VLM

    vlm = VLM.from_pretrained(model, device=device)
    records = task("val").records(["caption"], pictures)
    prompts = [chat_inputs(vlm, task("val").pictures([each], vlm.model.device), each.question) for each in records]
    facts = measure(vlm.model, prompts, vlm.model.config.image_token_id)
    checkpoint = Checkpoint(vlm.model, len(vlm.model.get_decoder().layers))
    Profile.make(
        "secondary_sinks", checkpoint, {"pictures": pictures, **facts}, "mmefficient.profiles.secondary_sinks"
    ).write(out)
    print(facts["per_prompt"])


if __name__ == "__main__":
    typer.run(main)
