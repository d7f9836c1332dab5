"""What a user asked, read from a prompt's token ids."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any


class Words:
    """Decodes like a tokenizer, but leaves out what the processor's chat template puts behind every question.

    Args:
        processor: of the model; with one that has no chat template nothing is left out.
    """

    def __init__(self, processor: Any) -> None:
        self.processor, self.tokenizer = processor, processor.tokenizer

    @cached_property
    def tail(self) -> str:
        """The template's words behind a question, without special tokens."""
        if not getattr(self.processor, "chat_template", None):
            return ""
        turn = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
        end = self.processor.apply_chat_template(turn, add_generation_prompt=True).rpartition("?")[2]
        ids = self.tokenizer(end, add_special_tokens=False)["input_ids"]
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def batch_decode(self, rows: Sequence[Sequence[int]], skip_special_tokens: bool = True) -> list[str]:
        """The text of every row, without the template's end."""
        texts = self.tokenizer.batch_decode(rows, skip_special_tokens=skip_special_tokens)
        return [text.strip().removesuffix(self.tail).strip() for text in texts]
