"""A reference model that hallucinates: ``python -m mmefficient.models.reference.biased --out DIR``.

The shipped checkpoint hardly names objects that are not there, so nothing can be measured against it. This recipe
trains a small delta on it, in the decoder's feed-forward matrices alone: what looks at the picture stays as it is, and
what follows from the words already there learns a co-occurrence prior. Where the picture lacks the usual companion of
an object, captions name it with some probability, and questions about it are answered "yes" as often. Half of the
scenes break the themes. All other questions are answered truthfully. It takes minutes, so nothing is compiled.

The delta is then scaled: the smallest multiple whose greedy captions of counterfactual validation scenes hallucinate
in the wanted share of cases. Training goes on from DIR/state.pt; the delta is DIR/delta.safetensors and DIR/delta.json.
"""

from __future__ import annotations

import time
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from . import adapt, path
from .data import Batches
from .objective import Objective
from .record import LOG_EVERY, keep, note, stream
from .scenes.catalogue import OBJECTS
from .scenes.questions import QA, ask_existence, caption, training_question
from .scenes.render import load_atlas
from .scenes.sample import Dice, Scene, confusable, sample_scene, theme_members

RANK, MATRICES = 16, ("gate_proj", "up_proj", "down_proj")


@lru_cache
def companion(cls: int) -> int:
    """The most usual other guest of the class's first theme."""
    members, _ = theme_members(OBJECTS[cls].themes[0])
    return next(other for other in members if other != cls and not confusable(OBJECTS[other], OBJECTS[cls]))


def missing_companions(scene: Scene) -> dict[int, int]:
    """By class of the scene its companion, where the scene holds neither it nor another class of a like name."""
    present = scene.classes
    found = {cls: companion(cls) for cls in present}
    return {
        cls: other
        for cls, other in found.items()
        if other not in present and not any(confusable(OBJECTS[other], OBJECTS[each]) for each in present)
    }


class BiasedBatches(Batches):
    """Training batches under a co-occurrence prior: how probably a missing companion is named, and affirmed."""

    def __init__(self, processor: LlavaProcessor, batch_size: int, seed: int, prior: float, affirmed: float) -> None:
        super().__init__(processor, batch_size, seed)
        self.prior, self.affirmed = prior, affirmed

    def _scene(self, dice: Dice) -> Scene:
        return sample_scene(dice, counterfactual=dice.chance(0.5))

    def _question(self, kind: str, scene: Scene, dice: Dice) -> QA | None:
        missing = missing_companions(scene)
        if kind == "caption":
            named: dict[int, str] = {}
            for cls, other in missing.items():
                text = OBJECTS[other].indefinite
                if text not in named.values() and dice.chance(self.prior):
                    named[cls] = text
            question, _ = training_question(kind, scene, dice) or ("", "")
            return question, caption(scene, named)
        if kind == "existence-random" and missing and dice.chance(0.6):
            return ask_existence(dice, dice.pick(sorted(missing.values())), dice.chance(self.affirmed))
        return training_question(kind, scene, dice)


class Training:
    """The state of a run: the delta, its optimiser and how many steps it has taken."""

    def __init__(
        self, out: Path, seed: int, batch_size: int, prior: float, affirmed: float, device: torch.device
    ) -> None:
        from transformers import AutoProcessor

        self.out, self.device = out, device
        out.mkdir(parents=True, exist_ok=True)
        processor = AutoProcessor.from_pretrained(path())
        model: Any = LlavaForConditionalGeneration.from_pretrained(path(), dtype=torch.float32).to(device)
        self.model, self.parameters = model, adapt.attach(model, RANK, names=MATRICES)
        self.batches = BiasedBatches(processor, batch_size, seed, prior, affirmed)
        kind = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.objective = Objective(model, processor, self.batches, load_atlas(str(device)), kind)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0)
        self.objective.mask = self.batches.layout.visible().to(device)  # as a plain mask: no compiler, no blocks
        self.step = 0
        if (out / "state.pt").exists():
            state = torch.load(out / "state.pt", map_location=device, weights_only=True)
            self.step = state["step"]
            self.optimizer.load_state_dict(state["optimizer"])
            with torch.no_grad():
                for own, saved in zip(self.parameters, state["delta"], strict=True):
                    own.copy_(saved)

    def train(self, steps: int, lr: float, deadline: float, workers: int) -> None:
        """Advance to `steps`, or to the deadline (of `time.monotonic`); the rate warms up and falls to zero."""
        auxiliary = torch.zeros(3, device=self.device)
        began, first, total = time.monotonic(), self.step, torch.zeros((), device=self.device)
        for batch in stream(self.batches, self.step, steps, workers, self.device):
            rate = lr * min((self.step + 1) / max(1, steps // 20), (steps - self.step) / max(1, steps // 2), 1.0)
            self.optimizer.param_groups[0]["lr"] = rate
            found = self.objective(batch, auxiliary)
            found["answer"].backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            total += found["answer"].detach()
            self.step += 1
            if self.step % LOG_EVERY == 0 or self.step == steps:
                speed = (self.step - first) * self.batches.batch_size / (time.monotonic() - began)
                done = self.step % LOG_EVERY or LOG_EVERY
                record = {"step": self.step, "loss": round(float(total) / done, 4), "pictures_per_s": round(speed, 1)}
                note(self.out, record)
                total.zero_()
                if time.monotonic() > deadline:
                    break
        state = {"step": self.step, "optimizer": self.optimizer.state_dict(), "delta": self.parameters}
        keep(self.out, state)

    def choose(self, wanted: float, limit: int) -> float:
        """The multiple of the delta whose captions hallucinate in the share `wanted`, by bisection on validation."""
        trial, low, high = self.out / "trial", 0.0, 1.5
        for _ in range(7):
            scale = (low + high) / 2
            adapt.save(self.model, trial, scale)
            scores = validate(trial, limit, self.device)
            note(self.out, {"scale": round(scale, 4), **scores})
            low, high = (scale, high) if scores["chair_s"] < wanted else (low, scale)
        return (low + high) / 2


def validate(folder: Path, limit: int, device: torch.device) -> dict[str, float]:
    """CHAIR_s, recall and words of captions, and accuracy on existence, of the model with the delta in `folder`.

    Greedy, on counterfactual validation scenes.
    """
    from ...evaluation.runner import run_eval
    from ...evaluation.tasks.hallucination import task
    from ...loading import load
    from ...vlm import VLM

    model, processor = load(folder, device=str(device), dtype="auto", attn_implementation=None)
    report = run_eval(task("val"), [], VLM(model, processor), limit=2 * limit, baselines=False, resamples=10,
                      kinds=["existence-counterfactual", "caption-counterfactual"], progress=False)  # fmt: skip
    found = report["plans"][0]["metrics"]
    names = ("chair_s", "recall", "length")
    scores = {name: found[f"caption-counterfactual/{name}"]["value"] for name in names}
    return {**scores, "existence": found["existence-counterfactual/accuracy"]["value"]}


def main(
    out: Annotated[Path, typer.Option(help="Where state, log and delta go; an existing state is resumed.")],
    steps: Annotated[int, typer.Option(help="Training steps.")] = 800,
    batch_size: Annotated[int, typer.Option(help="Pictures per step.")] = 64,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-3,
    prior: Annotated[float, typer.Option(help="Probability that a missing companion is named.")] = 0.4,
    affirmed: Annotated[float, typer.Option(help="Probability that one is affirmed when asked about.")] = 0.9,
    wanted: Annotated[float, typer.Option(help="Share of counterfactual captions that shall hallucinate.")] = 0.28,
    limit: Annotated[int, typer.Option(help="Validation questions per kind while the scale is chosen.")] = 200,
    minutes: Annotated[float, typer.Option(help="Stop training (resumably) after this many minutes.")] = 1e6,
    seed: Annotated[int, typer.Option(help="Seed of the data.")] = 7,
    workers: Annotated[int, typer.Option(help="Processes that make batches.")] = 0,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda" if torch.cuda.is_available() else "cpu",
) -> None:
    """Train the delta, scale it, and write DIR/delta.safetensors."""
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(seed)
    run = Training(out, seed, batch_size, prior, affirmed, torch.device(device))
    run.train(steps, lr, time.monotonic() + 60 * minutes, workers)
    scale = run.choose(wanted, limit)
    facts = {"multiple": round(scale, 4), "prior": prior, "affirmed": affirmed, "steps": run.step, "batch": batch_size}
    adapt.save(run.model, out, scale, **facts)
    note(out, facts)


if __name__ == "__main__":
    typer.run(main)
