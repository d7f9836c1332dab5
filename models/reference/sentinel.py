"""Preference tuning on sentences: ``python -m mmefficient.models.reference.sentinel --out DIR``.

SENTINEL (Peng et al., ICCV 2025, arXiv 2507.12455) for the reference model: pairs of a factual and a hallucinated way
to go on from one context (`pairs`), sampled from `reference-biased` on training scenes, and the context-aware DPO loss
(`cdpo`) on a low-rank delta, of which the best multiple is kept (`choose`). The delta is DIR/delta.safetensors and
DIR/delta.json, and loads as a model by its folder.

DIR/pairs.json and DIR/state.pt let a stopped run go on; DIR/log.jsonl has what was measured. It takes minutes, so
nothing is compiled.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor
from transformers import LlavaProcessor

from . import adapt
from .biased import validate
from .data import Batches, Layout
from .pairs import Bootstrap, Pair, scene_of
from .planned import PlannedObjective
from .record import keep, note, stream
from .scenes.render import load_atlas
from .scenes.sample import Dice, scene_tensors

BASE = "reference+biased"
RANK = 16
BRANCH = 80  # tokens per branch: question, context and one more unit
UNIT = 16  # tokens of one unit
SCENES = 128  # sampled from together
LOG_EVERY = 10
MULTIPLES = (0.1, 0.2, 0.3, 0.4, 0.5, 1.0)


def cdpo(chosen: Tensor, rejected: Tensor, before: Tensor, beta: float) -> Tensor:
    """-log sigmoid(beta ((log p(y+) - log p_ref(y+)) - (log p(y-) - log p_ref(y-)))) of pairs, float [B]: C-DPO.

    Args:
        chosen, rejected: log-probabilities [B] of the two units given picture, question and context: sums over the
            units' tokens alone. before: the same two of the reference policy, [B, 2].
    """
    return -F.logsigmoid(beta * ((chosen - before[:, 0]) - (rejected - before[:, 1])))


def unit_logp(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each branch's unit [B, 2], from logits [B, 2 UNIT, V] and labels [B, 2 UNIT]; -1 is none."""
    logp = logits.log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
    return (logp * (labels >= 0)).view(len(labels), 2, -1).sum(2)


@lru_cache
def order(seed: int, epoch: int, count: int) -> list[int]:
    """In which order the pairs of an epoch are seen."""
    return Dice(f"pairs/{seed}/{epoch}").shuffled(range(count))


class PairBatches(Batches):
    """Batches of pairs: the picture once, and behind it two branches that do not see each other."""

    def __init__(self, processor: LlavaProcessor, pairs: Sequence[Pair], batch_size: int, seed: int) -> None:
        super().__init__(processor, batch_size, seed, single=True)
        self.layout, self.pairs = Layout(len(self.prefix), (BRANCH, BRANCH)), pairs

    def numbers(self, step: int) -> list[int]:
        """Which pairs make up a step's batch: every pair once, in an order of its own in every epoch."""
        first = step * self.batch_size
        epochs = [divmod(n, len(self.pairs)) for n in range(first, first + self.batch_size)]
        return [order(self.seed, epoch, len(self.pairs))[place] for epoch, place in epochs]

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        return self.batch(self.numbers(step))

    def batch(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Scenes, tokens [B, S], rows and labels [B, 2 UNIT] of the units, and the numbers [B] of these pairs."""
        pairs = [self.pairs[number] for number in numbers]
        layers, background = scene_tensors([scene_of(self.seed, pair.scene) for pair in pairs], 14)
        tokens = torch.full((len(pairs), self.layout.length), self.tokenizer.pad_token_id)
        tokens[:, : len(self.prefix)] = torch.tensor(self.prefix)
        rows = torch.zeros(len(pairs), 2 * UNIT, dtype=torch.long)
        labels = torch.full((len(pairs), 2 * UNIT), -1)
        for row, pair in enumerate(pairs):
            asked = [*self._ids(f"{pair.question} ASSISTANT:"), *pair.context]
            for branch, unit in enumerate((pair.chosen, pair.rejected)):
                start, at = self.layout.starts[branch], branch * UNIT
                ids = [*asked, *unit]
                tokens[row, start : start + len(ids)] = torch.tensor(ids)
                labels[row, at : at + len(unit)] = torch.tensor(unit)
                rows[row, at : at + len(unit)] = start + len(asked) - 1 + torch.arange(len(unit))
        return {
            "layers": layers,
            "background": background,
            "tokens": tokens,
            "rows": rows,
            "labels": labels,
            "numbers": torch.tensor(numbers),
        }


def collect(model: Any, processor: LlavaProcessor, out: Path, scenes: int, seed: int, **sampling: Any) -> list[Pair]:
    """Pairs from `scenes` training scenes; goes on from DIR/pairs.json, and leaves them there."""
    file, found, done = out / "pairs.json", [], 0
    wanted = {"seed": seed, **sampling}
    if file.exists():
        kept = json.loads(file.read_text())
        if kept["sampling"] == wanted:
            found, done = [Pair.of(entry) for entry in kept["pairs"]], kept["scenes"]
    bootstrap = Bootstrap(model, processor, load_atlas(str(model.device)), seed, **sampling)
    while done < scenes:
        found += bootstrap.pairs(range(done, min(done + SCENES, scenes)))
        done = min(done + SCENES, scenes)
        state = {"sampling": wanted, "scenes": done, "pairs": [asdict(pair) for pair in found]}
        file.with_suffix(".tmp").write_text(json.dumps(state))
        os.replace(file.with_suffix(".tmp"), file)
    return [pair for pair in found if pair.scene < scenes]


class Tuning:
    """The state of a run: the delta, its optimiser and how many steps it has taken."""

    def __init__(
        self, model: Any, processor: LlavaProcessor, pairs: Sequence[Pair], out: Path, batch_size: int, seed: int
    ) -> None:
        self.model, self.out, self.device = model, out, model.device
        self.parameters = adapt.attach(model, RANK)
        self.batches = PairBatches(processor, pairs, min(batch_size, len(pairs)), seed)
        kind = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.objective = PlannedObjective(model, processor, self.batches, load_atlas(str(self.device)), kind)
        self.objective.mask = self.batches.layout.visible().to(self.device)  # as a plain mask: no compiler, no blocks
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0)
        self.step = 0
        self.before = self._before()
        if (out / "state.pt").exists():
            state = torch.load(out / "state.pt", map_location=self.device, weights_only=True)
            self.step = state["step"]
            self.optimizer.load_state_dict(state["optimizer"])
            with torch.no_grad():
                for own, saved in zip(self.parameters, state["delta"], strict=True):
                    own.copy_(saved)

    def logp(self, batch: dict[str, Tensor]) -> Tensor:
        """Log-probabilities of both units, [B, 2]."""
        return unit_logp(self.objective.planned_logits(batch), batch["labels"])

    @torch.no_grad()
    def _before(self) -> Tensor:
        """The reference policy's log-probabilities of all pairs [pairs, 2]: the updates are still zero."""
        size, count = self.batches.batch_size, len(self.batches.pairs)
        parts = [self.batches.batch(range(at, min(at + size, count))) for at in range(0, count, size)]
        return torch.cat([self.logp({name: x.to(self.device) for name, x in part.items()}) for part in parts])

    def train(self, steps: int, lr: float, beta: float, deadline: float, workers: int) -> None:
        """Advance to `steps`, or to the deadline (of `time.monotonic`); the rate warms up and falls as a cosine."""
        sums, began = torch.zeros(3, device=self.device), time.monotonic()
        for batch in stream(self.batches, self.step, steps, workers, self.device):
            done = torch.tensor(self.step / steps)
            rate = lr * min((self.step + 1) / max(1, steps // 20), float(0.5 + 0.5 * torch.cos(torch.pi * done)))
            self.optimizer.param_groups[0]["lr"] = rate
            logp, before = self.logp(batch), self.before[batch["numbers"]]
            loss = cdpo(logp[:, 0], logp[:, 1], before, beta).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            gained = (logp - before).detach()
            preferred = (gained[:, 0] > gained[:, 1]).float().mean()
            sums += torch.stack([loss.detach(), preferred, gained[:, 0].mean()])
            self.step += 1
            if self.step % LOG_EVERY == 0 or self.step == steps:
                means = (sums / (self.step % LOG_EVERY or LOG_EVERY)).tolist()
                figures = dict(zip(("loss", "preferred", "chosen_gain"), (round(x, 4) for x in means), strict=True))
                note(self.out, {"step": self.step, **figures, "seconds": round(time.monotonic() - began, 1)})
                sums.zero_()
                if time.monotonic() > deadline:
                    break
        state = {"step": self.step, "optimizer": self.optimizer.state_dict(), "delta": self.parameters}
        keep(self.out, state)


def choose(model: Any, out: Path, limit: int, device: torch.device) -> float:
    """The multiple of the delta whose validation captions hallucinate least, of those that lose at most 1 % of recall.

    Preference training goes on to lower the likelihood of both units of a pair, so more of it is not always better.
    """
    tried = {}
    for multiple in (0.0, *MULTIPLES):
        adapt.save(model, out / "trial", multiple, base=BASE)
        tried[multiple] = validate(out / "trial", limit, device)
        note(out, {"multiple": multiple, **tried[multiple]})
    least = tried[0.0]["recall"] - 0.01
    return min((each for each in tried if tried[each]["recall"] >= least), key=lambda each: tried[each]["chair_s"])


def main(
    out: Annotated[Path, typer.Option(help="Where pairs, state, log and delta go; an existing state is resumed.")],
    scenes: Annotated[int, typer.Option(help="Training scenes to sample captions of.")] = 2048,
    samples: Annotated[int, typer.Option(help="Units sampled per context.")] = 10,
    temperature: Annotated[float, typer.Option(help="They are sampled at.")] = 0.7,
    epochs: Annotated[int, typer.Option(help="Times that every pair is seen; 0: only collect pairs.")] = 3,
    batch_size: Annotated[int, typer.Option(help="Pairs per step.")] = 32,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-4,
    beta: Annotated[float, typer.Option(help="Of C-DPO.")] = 0.1,
    limit: Annotated[int, typer.Option(help="Validation questions per kind while the multiple is chosen.")] = 200,
    minutes: Annotated[float, typer.Option(help="Stop training (resumably) after this many minutes.")] = 1e6,
    seed: Annotated[int, typer.Option(help="Seed of scenes, samples and order.")] = 11,
    workers: Annotated[int, typer.Option(help="Processes that make batches.")] = 0,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda" if torch.cuda.is_available() else "cpu",
) -> None:
    """Collect pairs, train the delta, and write DIR/delta.safetensors."""
    from ...loading import load

    torch.set_float32_matmul_precision("high")
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    sampler, processor = load(BASE, device=device, dtype="auto", attn_implementation=None)
    pairs = collect(sampler, processor, out, scenes, seed, samples=samples, temperature=temperature)
    note(out, {"scenes": scenes, "pairs": len(pairs), "seconds": round(time.monotonic() - began, 1)})
    if not epochs:
        return
    model, _ = load(BASE, device=device, dtype=torch.float32, attn_implementation=None)
    torch.manual_seed(seed)
    run = Tuning(model, processor, pairs, out, batch_size, seed)
    steps = -(-epochs * len(pairs) // run.batches.batch_size)
    run.train(steps, lr, beta, began + 60 * minutes, workers)
    multiple = choose(run.model, out, limit, torch.device(device))
    facts = {
        "multiple": multiple,
        "pairs": len(pairs),
        "scenes": scenes,
        "steps": run.step,
        "batch": batch_size,
        "lr": lr,
        "beta": beta,
    }
    adapt.save(run.model, out, multiple, base=BASE, **facts)
    note(out, facts)


if __name__ == "__main__":
    typer.run(main)
