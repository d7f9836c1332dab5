"""`verify_sentences`: propose a sentence, ask whether it is true, and only then go on from it.

The inference analogue of SENTINEL (Peng et al., ICCV 2025, arXiv 2507.12455): hallucinations begin in one sentence and
the next ones build on it, so a sentence is checked before it becomes context. What counts as a sentence is said by
*marks*: a unit starts with a mark and ends before the next one. With "." units are sentences; with ",", "and" and "."
they are the phrases of a list.

The greedy unit is proposed first. When its objects pass it stays, so where everything passes the answer is that of
greedy decoding. When one fails, the `width` likeliest units are found by beam search on a fork of the same keys and
values, and the first one whose objects pass is read in its place; one that only names again what was named comes last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmefficient.errors import InputError, ModelError
from mmefficient.forks import Stored, padded
from mmefficient.models import adapter_for
from mmefficient.plan import ATTACHED
from mmefficient.verifiers import Prompts, Verifier

PHRASES = (",", "and", ".")
"""Marks of a list in English: "a dog | , two cats | and a bus | .\""""
LONGEST = 48  # tokens after which a unit counts as ended


class Units:
    """Where units of text begin, in tokens."""

    def __init__(self, tokenizer: Any, marks: Sequence[str] = PHRASES) -> None:
        texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
        self.begins = torch.tensor([text.strip() in marks for text in texts])
        if not bool(self.begins.any()):
            raise InputError(f"no token of this tokenizer is one of the marks {' '.join(marks)}; choose others.")
        self.begins[tokenizer.eos_token_id] = True

    def first(self, ids: Sequence[int]) -> int | None:
        """How many of `ids` the first unit has; None if it is not known to have ended."""
        return next((n for n, token in enumerate(ids) if n and self.begins[token]), None)


@dataclass
class Verified:
    """One answer.

    Attributes:
        ids: its tokens, without what ends it. finished: false if `max_new_tokens` ended it.
        rejected: greedy units that did not pass. cut: it ends earlier than the model would have ended it.
    """

    ids: list[int] = field(default_factory=list)
    finished: bool = False
    rejected: list[list[int]] = field(default_factory=list)
    cut: bool = False


@torch.no_grad()
def verify_sentences(
    model: Any,
    processor: Any,
    inputs: Any,
    *,
    objects: Callable[[str], Sequence[str]],
    verify: Verifier,
    marks: Sequence[str] = PHRASES,
    width: int = 4,
    max_new_tokens: int = 128,
) -> list[Verified]:
    """Greedy answers of a batch in which every unit has been verified before the next was begun.

    Args:
        model, processor: stock; `inputs`: of a batch, padded on the left, as for `model.generate`.
        objects: names of the objects that a text mentions; a unit that names none passes.
        verify: says which objects are there: a `Probe`, a matcher or a detector.
        marks: what units begin with, see `Units`. width: units searched for when the greedy one fails.
        max_new_tokens: as in `generate`.

    Raises:
        InputError: width below 1. ModelError: the model carries a plan, or its positions are not plain numbers.
    """
    if width < 1:
        raise InputError(f"width={width} searches for nothing; use 1 or more.")
    adapter = adapter_for(model)
    if adapter.mrope:
        raise ModelError("units are forked by plain position ids; this family's are (time, height, width) triplets.")
    if ATTACHED in vars(adapter.base):
        raise ModelError("verify_sentences forks a stock cache; leave the plan first.")
    return Decoding(model, processor, inputs, objects, verify, Units(processor.tokenizer, marks), width).run(
        max_new_tokens
    )


class Decoding:
    """One batch on its way."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        inputs: Any,
        objects: Callable[[str], Sequence[str]],
        verify: Verifier,
        units: Units,
        width: int,
    ) -> None:
        self.tokenizer, self.objects, self.verify, self.width = processor.tokenizer, objects, verify, width
        stop = model.generation_config.eos_token_id
        self.stop = {stop} if isinstance(stop, int) else set(stop or ())
        self.stored, self.next = Stored.of(model, inputs)  # logits of every row, after what it has committed
        self.begins = torch.zeros(self.next.shape[1], dtype=torch.bool, device=model.device)
        self.begins[: len(units.begins)] = units.begins.to(model.device)
        self.begins[list(self.stop)] = True
        image = inputs["input_ids"] == adapter_for(model).placeholders["image"]
        behind = image.long().flip(1).cumsum(1).flip(1) > 0
        self.prompts = Prompts(self.stored, self.stored.seen & behind)
        self.rows = [Verified() for _ in inputs["input_ids"]]

    def run(self, most: int) -> list[Verified]:
        while live := [row for row, over in enumerate(self.over()) if not over and len(self.rows[row].ids) < most]:
            self.advance(live)
        for each, over in zip(self.rows, self.over(), strict=True):
            each.finished = len(each.ids) < most and over
            del each.ids[most:]
        return self.rows

    def advance(self, live: Sequence[int]) -> None:
        """Commit one unit of every live row."""
        units, again = self.propose(live), []
        failed = self.failed([(row, units[row]) for row in live])
        for number, row in enumerate(live):
            if number in failed:
                self.rows[row].rejected.append(units[row])
                again.append(row)
            else:
                self.rows[row].ids += units[row]
        if again:
            self.replace(again)

    def over(self) -> list[bool]:
        """Of every row whether its answer ends where it is."""
        following = self.next.argmax(1).tolist()
        return [each.cut or token in self.stop for each, token in zip(self.rows, following, strict=True)]

    def propose(self, live: Sequence[int]) -> dict[int, list[int]]:
        """The greedy unit of every live row, read into the cache; `self.before` keeps what was known before."""
        device = self.next.device
        self.before = (self.next.clone(), self.stored.seen.shape[1], self.stored.position.clone())
        units: dict[int, list[int]] = {row: [] for row in live}
        going = torch.zeros(len(self.next), dtype=torch.bool, device=device)
        going[list(live)] = True
        for step in range(LONGEST):
            best = self.next.argmax(1)
            if step:
                going &= ~self.begins[best]
            if not bool(going.any()):
                break
            for row, token, goes in zip(range(len(best)), best.tolist(), going.tolist(), strict=True):
                if goes:
                    units[row].append(token)
            logits = self.stored.read(best[:, None], going[:, None])[:, -1]
            self.next = torch.where(going[:, None], logits, self.next)
        return units

    def failed(self, proposed: Sequence[tuple[int, Sequence[int]]]) -> set[int]:
        """Which of these (row, unit) name an object that is not there."""
        named = [(n, row, name) for n, (row, unit) in enumerate(proposed) for name in dict.fromkeys(self.names(unit))]
        told = self.verify(self.prompts, [(row, name) for _, row, name in named]) if named else []
        return {n for (n, _, _), there in zip(named, told, strict=True) if not there}

    def adds(self, row: int, unit: Sequence[int]) -> bool:
        """Whether a unit names something new, or nothing."""
        named = set(self.names(unit))
        return not named or bool(named - set(self.names(self.rows[row].ids)))

    def names(self, ids: Sequence[int]) -> Sequence[str]:
        return self.objects(self.tokenizer.decode(ids, skip_special_tokens=True))

    def replace(self, again: Sequence[int]) -> None:
        """Give up the units just read for these rows, and read the best other ones that pass."""
        rows = torch.tensor(again, device=self.next.device)
        following, columns, position = self.before
        self.stored.seen[rows, columns:] = False
        self.stored.position[rows] = position[rows]
        self.next[rows] = following[rows]
        found = self.search(rows)
        flat = [(row, unit) for row, units in zip(again, found, strict=True) for unit in units
                if unit != self.rows[row].rejected[-1]]  # fmt: skip
        failed = self.failed(flat)
        chosen: dict[int, list[int]] = {}
        passed = [each for number, each in enumerate(flat) if number not in failed]
        # the likeliest one, but not one that only says again what was said
        for row, unit in [*(each for each in passed if self.adds(*each)), *passed]:
            chosen.setdefault(row, unit)
        ended = [row for row in again if chosen.get(row, [None])[0] in {*self.stop, None}]
        for row in ended:
            self.rows[row].cut = True
            chosen.pop(row, None)
        for row, unit in chosen.items():
            self.rows[row].ids += unit
        if chosen:
            ids, used = padded([chosen.get(row, []) for row in range(len(self.rows))], rows.device)
            logits = self.stored.read(ids, used)
            at = torch.tensor(list(chosen), device=rows.device)
            self.next[at] = logits[at, used[at].sum(1) - 1]

    def search(self, rows: Tensor) -> list[list[list[int]]]:
        """For every row its `width` likeliest units, best first: beam search on a fork."""
        count, width = len(rows), self.width
        fork = self.stored.fork(rows.repeat_interleave(width))
        own = torch.arange(count, device=rows.device)[:, None] * width
        logits = self.next[rows].repeat_interleave(width, 0)
        scores = torch.full((count, width), float("-inf"), device=rows.device)
        scores[:, 0] = 0.0
        beams: list[list[list[int]]] = [[[]] * width for _ in range(count)]
        done: list[dict[tuple[int, ...], float]] = [{} for _ in range(count)]
        for step in range(LONGEST):
            total = scores[..., None] + logits.log_softmax(-1).view(count, width, -1)
            if step:  # a beam ends where a unit may begin, whichever
                _note(done, beams, total[..., self.begins].logsumexp(-1))
                total[..., self.begins] = float("-inf")
            scores, flat = total.flatten(1).topk(width)
            parent, token = flat // total.shape[-1], flat % total.shape[-1]
            beams = [
                [[*old[p], t] for p, t in zip(parents, tokens, strict=True)]
                for old, parents, tokens in zip(beams, parent.tolist(), token.tolist(), strict=True)
            ]
            if not step:  # the answer may end here
                over = torch.isin(token, torch.tensor(sorted(self.stop), device=token.device))
                _note(done, beams, scores.masked_fill(~over, float("-inf")))
                scores = scores.masked_fill(over, float("-inf"))
            worst = [sorted(each.values())[-width] if len(each) >= width else float("-inf") for each in done]
            if all(best <= bar for best, bar in zip(scores[:, 0].tolist(), worst, strict=True)):
                break
            fork.reorder((parent + own).flatten())
            logits = fork.read(token.view(-1, 1), torch.ones_like(token.view(-1, 1), dtype=torch.bool))[:, -1]
        else:
            _note(done, beams, scores)
        return [[list(unit) for unit in sorted(each, key=lambda one: -each[one])[:width]] for each in done]


def _note(done: list[dict[tuple[int, ...], float]], beams: list[list[list[int]]], scores: Tensor) -> None:
    """Add to `done` the beams that ended, with their log-probabilities [rows, width]; -inf has not."""
    for found, units, values in zip(done, beams, scores.tolist(), strict=True):
        found |= {tuple(unit): value for unit, value in zip(units, values, strict=True) if value > float("-inf")}
