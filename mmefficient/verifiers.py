"""Who says whether a picture holds an object: asked by `sentences.verify_sentences`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mmefficient.errors import ModelError
from mmefficient.forks import Stored, padded


@dataclass(frozen=True)
class Prompts:
    """What a verifier may use: the prompts as they were read.

    Attributes:
        stored: after the prompts. picture: bool [B, n], the columns up to the last image token, padding excluded.
    """

    stored: Stored
    picture: Tensor


class Verifier(Protocol):
    """Says whether objects are there."""

    def __call__(self, prompts: Prompts, asked: Sequence[tuple[int, str]]) -> Sequence[bool]:
        """For each (row, object name) whether the pictures of that row hold it."""
        ...


class Probe:
    """Asks the same model a yes/no question, on the keys and values of the picture alone.

    What was said so far is not seen, and the picture is not read again: the question goes to a fork of the prompt's
    keys and values, cut behind the picture.

    Args:
        question: of an object name, e.g. ``"Is there a {} in the image?".format``.
        margin: what log p(yes) - log p(no) must exceed, in nats.
    """

    def __init__(self, processor: Any, question: Callable[[str], str], margin: float = 0.0) -> None:
        self.processor, self.question, self.margin = processor, question, margin
        first = {word: {ids[0] for ids in self._ids([word, f" {word}"])} for word in ("yes", "Yes", "no", "No")}
        yes, no = first["yes"] | first["Yes"], first["no"] | first["No"]
        self.yes, self.no = sorted(yes - no), sorted(no - yes)
        if not (self.yes and self.no):
            raise ModelError('this tokenizer begins "yes" and "no" with the same token; verify in another way.')

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        return list(self.processor.tokenizer(list(texts), add_special_tokens=False)["input_ids"])

    def tails(self, names: Sequence[str]) -> list[list[int]]:
        """Token ids of everything behind the picture when it is asked about an object."""
        image = self.processor.image_token
        turns = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": self.question(name)}]}]
            for name in names
        ]
        texts = self.processor.apply_chat_template(turns, add_generation_prompt=True)
        return [ids[1:] for ids in self._ids([image + text.rpartition(image)[2] for text in texts])]

    def margins(self, prompts: Prompts, asked: Sequence[tuple[int, str]]) -> Tensor:
        """log p(yes) - log p(no), float32 [len(asked)] on the CPU."""
        device = prompts.picture.device
        tails = self.tails([name for _, name in asked])
        ids, used = padded(tails, device)
        rows = torch.tensor([row for row, _ in asked], device=device)
        logits = prompts.stored.fork(rows, prompts.picture[rows]).read(ids, used)
        last = logits[torch.arange(len(asked), device=device), used.sum(1) - 1]
        return (last[:, self.yes].logsumexp(1) - last[:, self.no].logsumexp(1)).cpu()

    def __call__(self, prompts: Prompts, asked: Sequence[tuple[int, str]]) -> list[bool]:
        return (self.margins(prompts, asked) > self.margin).tolist() if asked else []
