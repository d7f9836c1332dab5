"""What every head of a checkpoint does with images: divergence, image mass, gains; and which heads hallucinate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
import typer
from PIL import Image

from mmefficient.kernels.key_scores import key_scores
from mmefficient.methods.modulations.vhr import VHR, divergence_of
from mmefficient.modulation import Change, LayerPrompt, Modulation, Rows
from mmefficient.plan import Plan
from mmefficient.profiles import Checkpoint, Profile
from mmefficient.tokens import Role

MAPS = ("divergence", "image mass", "gain")


@dataclass(frozen=True)
class Listening(Modulation):
    """Changes nothing, and adds up what it sees in `found`: by layer, [3, Hq] in the order of `MAPS`, over prompts."""

    name: ClassVar[str] = "listening"
    paper: ClassVar[str] = "https://arxiv.org/abs/2412.13949"
    summary: ClassVar[str] = "measures heads"
    changes: ClassVar[frozenset[str]] = frozenset({"gain"})
    rows: ClassVar[Rows] = "all"
    needs: ClassVar[frozenset[str]] = frozenset({"blind"})
    recordable: ClassVar[bool] = False

    found: dict[int, list[torch.Tensor]] = field(default_factory=dict, compare=False)

    def change(self, prompt: LayerPrompt) -> Change:
        assert prompt.heads is not None
        assert prompt.blind is not None
        mask = (prompt.tokens.role != Role.PAD)[:, None, None]
        mass = key_scores(prompt.query[:, :, -1:], prompt.key, scale=prompt.scale, mask=mask)
        seen = (mass * prompt.tokens.visual[:, None]).sum(-1)
        gain = torch.where(VHR().chosen(prompt.heads, prompt.blind), VHR().alpha, 1.0)
        maps = torch.stack([divergence_of(prompt.heads, prompt.blind), seen, gain])
        self.found.setdefault(prompt.layer, []).append(maps.mean(1).float().cpu())
        return Change()


def measure(vlm: Any, questions: Sequence[tuple[Any, str]]) -> torch.Tensor:
    """Means over prompts, float32 [3, layers, Hq]: divergence, attention of the last prompt row on the image, and the
    gain VHR would give if it acted in this layer alone.

    Args:
        vlm: a `VLM`; questions: pictures with the text to ask about each.
    """
    listening = Listening()
    plan = Plan([listening])
    for picture, question in questions:
        vlm.ask(picture, question, plan=plan, max_new_tokens=1)
    return torch.stack([torch.stack(maps).mean(0) for _, maps in sorted(listening.found.items())], 1)


def draw(maps: torch.Tensor, title: str) -> Image.Image:
    """One heat map per entry of `MAPS`, layers downwards and heads to the right, each from its least to its most."""
    from PIL import ImageDraw, ImageFont

    _, layers, heads = maps.shape
    cell, margin, top = max(8, min(28, 640 // max(layers, heads))), 46, 64
    width = margin + heads * cell
    canvas = Image.new("RGB", (len(maps) * width + margin, top + layers * cell + 40), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    pen.text((margin, 10), title, "black", font)
    for number, (name, values) in enumerate(zip(MAPS, maps, strict=True)):
        left, low, high = margin + number * width, float(values.min()), float(values.max())
        pen.text((left, 36), f"{name}: {low:.2g} to {high:.2g}", "black", font)
        for layer in range(layers):
            if layers <= 16 or layer % 4 == 0:
                pen.text((left - 22, top + layer * cell + cell // 2 - 7), str(layer), "black", font)
            for head in range(heads):
                share = (float(values[layer, head]) - low) / (high - low) if high > low else 0.0
                at = (left + head * cell, top + layer * cell)
                pen.rectangle((*at, at[0] + cell - 2, at[1] + cell - 2), _colour(share))
        for head in range(0, heads, 1 if heads <= 16 else 4):
            pen.text((left + head * cell + cell // 2 - 4, top + layers * cell + 4), str(head), "black", font)
        pen.text((left, top + layers * cell + 20), "head (rows: layers)", "black", font)
    return canvas


def _colour(share: float) -> tuple[int, int, int]:
    """From pale to dark blue."""
    light, dark = (240, 244, 250), (12, 44, 110)
    return tuple(round(a + (b - a) * share) for a, b in zip(light, dark, strict=True))  # type: ignore[return-value]


@torch.no_grad()
def attribute(vlm: Any, pictures: int, top: int) -> tuple[list[tuple[int, int]], dict[str, int]]:
    """Hallucination heads by zero-ablation, on greedy captions of counterfactual validation scenes (AD-HH, section 3).

    A head's influence on a named object is the fall of its first token's probability when the head's output is zero
    at all positions; its score is the mean influence on objects that are not there less that on objects that are.

    Returns:
        the `top` (layer, head) pairs, highest first, and how many mentions of either kind there were.
    """
    from mmefficient.evaluation.tasks.hallucination import task

    model, processor = vlm.model, vlm.processor
    kind, layers = "caption-counterfactual", vlm.model.get_decoder().layers
    heads = model.config.get_text_config().num_attention_heads
    score, mentions = torch.zeros(len(layers), heads), {True: 0, False: 0}
    sums = {there: torch.zeros(len(layers), heads) for there in mentions}
    for record in task("val").records([kind], pictures):
        inputs = chat_inputs(vlm, task("val").pictures([record], model.device), record.question)
        start = inputs["input_ids"].shape[1]
        whole = model.generate(**inputs, max_new_tokens=64, do_sample=False)
        inputs |= {"input_ids": whole, "attention_mask": torch.ones_like(whole)}
        named = _mentions(processor.tokenizer, whole[0, start:].tolist(), set(record.truth))
        if not named:
            continue
        at = torch.tensor([start + place - 1 for place, _ in named], device=model.device)
        token = whole[0, at + 1]
        plain = _chances(model, inputs, at, token)
        for layer, module in enumerate(layers):
            for head in range(heads):
                handle = module.self_attn.o_proj.register_forward_pre_hook(partial(_silenced, heads, head))
                fall = (plain - _chances(model, inputs, at, token)).cpu()
                handle.remove()
                for (_, there), value in zip(named, fall.tolist(), strict=True):
                    sums[there][layer, head] += value
        for _, there in named:
            mentions[there] += 1
    score = sums[False] / max(1, mentions[False]) - sums[True] / max(1, mentions[True])
    order = score.flatten().argsort(descending=True)[:top].tolist()
    return [(place // heads, place % heads) for place in order], {
        "hallucinated": mentions[False],
        "correct": mentions[True],
    }


def chat_inputs(vlm: Any, picture: Any, question: str) -> dict[str, Any]:
    """What the model is given for one question about a picture, which comes in a list of one."""
    from mmefficient.messages import user_message

    made = vlm.processor.apply_chat_template(
        [[user_message([picture[0]], question)]],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    return dict(made.to(vlm.model.device, dtype=vlm.model.dtype))


def _mentions(tokenizer: Any, ids: list[int], truth: set[str]) -> list[tuple[int, bool]]:
    """(place of its first token, whether the picture holds it) of every object named in generated ids."""
    from mmefficient.models.reference.scenes.catalogue import OBJECTS

    names = {
        tuple(tokenizer(f" {form}", add_special_tokens=False).input_ids): cls.name
        for cls in OBJECTS
        for form in (cls.name, cls.plural)
    }
    found, place = [], 0
    while place < len(ids):
        length = next((n for n in (3, 2, 1) if tuple(ids[place : place + n]) in names), 0)
        if length:
            found.append((place, names[tuple(ids[place : place + length])] in truth))
        place += max(1, length)
    return found


def _chances(model: Any, inputs: Mapping[str, Any], at: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """Probability of `token` [M] after the positions `at` [M]."""
    logits = model(**inputs, use_cache=False).logits[0, at].float()
    return logits.softmax(-1).gather(1, token[:, None])[:, 0]


def _silenced(heads: int, head: int, module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    x = args[0].unflatten(-1, (heads, -1)).clone()
    x[..., head, :] = 0
    return (x.flatten(-2),)


def main(
    out: Annotated[Path, typer.Option(help="Where the profile goes: adhh-NAME.json.")],
    model: Annotated[str, typer.Option(help="reference, reference-biased, a folder or a hub id.")] = "reference-biased",
    pictures: Annotated[int, typer.Option(min=1, help="Validation pictures.")] = 100,
    top: Annotated[int, typer.Option(min=1, help="Heads to list.")] = 4,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Find the hallucination heads of a checkpoint, for `adhh(heads=auto)`."""
    from mmefficient.vlm import VLM

    vlm = VLM.from_pretrained(model, device=device)
    heads, mentions = attribute(vlm, pictures, top)
    checkpoint = Checkpoint(vlm.model, len(vlm.model.get_decoder().layers))
    Profile.make(
        "adhh", checkpoint, {"heads": heads, "pictures": pictures, **mentions}, "mmefficient.profiles.heads"
    ).write(out)
    print(heads, mentions)


if __name__ == "__main__":
    typer.run(main)
