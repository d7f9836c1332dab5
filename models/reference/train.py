"""Train the reference model: ``python -m mmefficient.models.reference.train --out DIR``.

Two phases, both resumable from ``DIR/state.pt``: the tower alone on dense labels, then the whole model on questions.
The learning rate warms up, stays, and falls linearly over the last part of each phase. Every batch is a function of the
seed and the step, so a resumed run sees what an uninterrupted one would have seen.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from .build import build_config, build_model, build_processor
from .data import Batches
from .objective import Objective
from .record import LOG_EVERY, keep, note, scored, stream
from .scenes.render import load_atlas
from .scenes.splits import KINDS


@dataclass(frozen=True)
class Phase:
    """One training phase; ``fade`` is the share of steps after which the auxiliary look-up losses are gone."""

    name: str
    steps: int
    lr: float
    decay: float
    fade: float = 0.6

    def rate(self, step: int) -> float:
        """Learning rate: linear warm-up over 2 % (at most 200 steps), constant, then linear to zero."""
        warm = min(200, max(1, self.steps // 50))
        tail = max(1, round(self.steps * self.decay))
        return self.lr * min((step + 1) / warm, 1.0, (self.steps - step) / tail)

    def weights(self, step: int) -> list[float]:
        """Weights of the align, point and tower losses."""
        left = max(0.0, 1 - step / max(1, self.fade * self.steps))
        return [0.3 * left, 0.5 * left, 0.05 + 0.15 * left]


def optimizers(objective: nn.Module, decay: float = 0.05) -> list[torch.optim.Optimizer]:
    """Muon (arXiv 2502.16982, update scaled to AdamW's) for the matrices inside layers, AdamW for everything else."""
    matrices = [p for n, p in objective.named_parameters() if p.ndim == 2 and ".layers." in n]
    chosen = {id(p) for p in matrices}
    rest = [p for p in objective.parameters() if id(p) not in chosen]
    plain = [p for p in rest if p.ndim < 2]
    decayed = [p for p in rest if p.ndim >= 2]
    return [
        torch.optim.Muon(matrices, lr=0.0, weight_decay=decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [{"params": decayed, "weight_decay": decay}, {"params": plain, "weight_decay": 0.0}],
            lr=0.0,
            betas=(0.9, 0.95),
            fused=next(objective.parameters()).is_cuda,
        ),
    ]


class Run:
    """The state of a training run and its log."""

    def __init__(self, out: Path, seed: int, batch_size: int, device: torch.device, compile_model: bool) -> None:
        self.out, self.seed, self.batch_size, self.device = out, seed, batch_size, device
        out.mkdir(parents=True, exist_ok=True)
        self.processor = build_processor()
        model = build_model(build_config(self.processor.tokenizer), seed).to(device)
        batches = Batches(self.processor, batch_size, seed)
        self.objective = Objective(model, self.processor, batches, load_atlas(str(device)))
        self.phase, self.step, self.opts = "tower", 0, optimizers(self.objective)
        self.look, self.answer = self.objective.look, self.objective.forward
        if compile_model:
            self.look, self.answer = torch.compile(self.look), torch.compile(self.answer)

    def save(self) -> None:
        state = {
            "phase": self.phase,
            "step": self.step,
            "objective": self.objective.state_dict(),
            "optimizers": [opt.state_dict() for opt in self.opts],
        }
        keep(self.out, state)

    def load(self) -> None:
        state = torch.load(self.out / "state.pt", map_location=self.device, weights_only=True)
        self.phase, self.step = state["phase"], state["step"]
        self.objective.load_state_dict(state["objective"])
        for opt, saved in zip(self.opts, state["optimizers"], strict=True):
            opt.load_state_dict(saved)

    def batches(self, stop: int, workers: int) -> Iterator[dict[str, Tensor]]:
        """Device batches of steps ``self.step`` to ``stop``; the two phases draw different scenes."""
        text = self.phase == "answers"
        data = Batches(self.processor, self.batch_size, self.seed + (0 if text else 1_000_003), text=text)
        return stream(data, self.step, stop, workers, self.device)

    def train(self, phase: Phase, deadline: float, workers: int) -> bool:
        """Advance to the end of ``phase`` or to the deadline (of `time.monotonic`); True when the phase is done."""
        clip = [p for p in self.objective.parameters() if p.requires_grad]
        sums: dict[str, Tensor] = {}
        began, first = time.monotonic(), self.step
        for batch in self.batches(phase.steps, workers):
            rate = phase.rate(self.step)
            for opt in self.opts:
                for group in opt.param_groups:
                    group["lr"] = rate
            if phase.name == "tower":
                losses = self.look(batch)
                loss = losses["dense"] + losses["offset"] + losses["presence"]
            else:
                losses = self.answer(batch, torch.tensor(phase.weights(self.step), device=self.device))
                loss = losses["total"]
            loss.backward()
            losses["gradient"] = nn.utils.clip_grad_norm_(clip, 1.0)
            for opt in self.opts:
                opt.step()
                opt.zero_grad(set_to_none=True)
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach()
            self.step += 1
            if self.step % LOG_EVERY == 0 or self.step == phase.steps:
                speed = (self.step - first) * self.batch_size / (time.monotonic() - began)
                self.log(phase.name, sums, rate, speed)
                sums = {}
                if time.monotonic() > deadline:
                    return False
        return True

    def log(self, phase: str, sums: dict[str, Tensor], rate: float, speed: float) -> None:
        record: dict[str, Any] = {"phase": phase, "step": self.step, "lr": rate, "pictures_per_s": round(speed, 1)}
        n = self.step % LOG_EVERY or LOG_EVERY
        record |= {name: round(float(value) / n, 4) for name, value in sums.items() if value.ndim == 0}
        if "asked" in sums:
            record["exact"] = scored(sums, KINDS)
        note(self.out, record)

    def export(self) -> None:
        """Write ``checkpoint/`` in the Hugging Face format: bf16, shards below 15 MB."""
        target = self.out / "checkpoint"
        model = self.objective.model
        model.model.language_model.config._attn_implementation = "sdpa"
        half = build_model(model.config, self.seed).to(torch.bfloat16)
        half.load_state_dict(model.state_dict())
        half.save_pretrained(target, max_shard_size="14MB")
        self.processor.save_pretrained(target)


def main(
    out: Annotated[Path, typer.Option(help="Where state, log and checkpoint go; an existing state is resumed.")],
    tower_steps: Annotated[int, typer.Option(help="Steps of the tower phase.")] = 1500,
    steps: Annotated[int, typer.Option(help="Steps of the question phase.")] = 4000,
    batch_size: Annotated[int, typer.Option(help="Pictures per step.")] = 256,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-3,
    decay: Annotated[float, typer.Option(help="Share of each phase over which the learning rate falls to zero.")] = 0.3,
    minutes: Annotated[float, typer.Option(help="Stop (resumably) after this many minutes.")] = 1e6,
    seed: Annotated[int, typer.Option(help="Seed of weights and data.")] = 0,
    workers: Annotated[int, typer.Option(help="Processes that make batches.")] = max(0, (os.cpu_count() or 1) - 2),
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda" if torch.cuda.is_available() else "cpu",
    compile_model: Annotated[bool, typer.Option("--compile/--no-compile", help="Use torch.compile.")] = True,
    plan: Annotated[
        str | None, typer.Option(help="Train a small delta of the shipped model under this plan instead.")
    ] = None,
    single: Annotated[bool, typer.Option("--single", help="With --plan: one question per picture.")] = False,
) -> None:
    """Train the reference model from scratch, or go on from DIR/state.pt; or, with --plan, adapt the shipped one."""
    deadline = time.monotonic() + 60 * minutes
    torch.set_float32_matmul_precision("high")
    if plan is not None:
        from mmefficient.plan import Plan

        from . import finetune

        finetune.run(
            Plan(plan),
            out,
            steps=steps,
            batch_size=batch_size,
            lr=lr,
            decay=decay,
            minutes=minutes,
            seed=seed,
            workers=workers,
            device=device,
            compile_model=compile_model,
            single=single,
        )
        return
    run = Run(out, seed, batch_size, torch.device(device), compile_model)
    if (out / "state.pt").exists():
        run.load()
    phases = [Phase("tower", tower_steps, lr, decay), Phase("answers", steps, lr, decay)]
    for phase in phases:
        if phase.name != run.phase:
            continue
        done = run.train(phase, deadline, workers)
        if done and phase.name == "tower":
            run.phase, run.step, run.opts = "answers", 0, optimizers(run.objective)
        run.save()
        if not done:
            break
    run.export()


if __name__ == "__main__":
    typer.run(main)
