"""Batched greedy answers from a stock model and its processor."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mmefficient.bench.timers import StageTimer
from mmefficient.evaluation.answers import Answer
from mmefficient.evaluation.sharing import Batches, SharedPictures
from mmefficient.evaluation.task import Record, Task
from mmefficient.matchers.words import Words
from mmefficient.messages import user_message
from mmefficient.plan import Plan
from mmefficient.run import Run


def batches(records: Sequence[Record], size: int, task: Task) -> list[list[Record]]:
    """Cuts `records` into batches of at most `size` that may stop after the same number of new tokens.

    A function of its arguments alone. Questions about one picture come together, since a batch encodes it once.
    """
    groups: dict[int, dict[str, list[Record]]] = {}
    for record in records:
        same = groups.setdefault(task.kinds[record.kind].max_new_tokens, {})
        same.setdefault(record.picture, []).append(record)
    ordered = [[record for shown in same.values() for record in shown] for same in groups.values()]
    return [group[start : start + size] for group in ordered for start in range(0, len(group), size)]


class Asker:
    """Asks one loaded model the questions of one task, greedily, in left-padded batches."""

    def __init__(self, model: Any, processor: Any, task: Task) -> None:
        self.model, self.processor, self.task = model, processor, task
        self._batches = Batches()
        stop = model.generation_config.eos_token_id
        self._stop = torch.tensor([stop] if isinstance(stop, int) else list(stop or []), dtype=torch.long)

    @contextmanager
    def under(self, plan: Plan) -> Iterator[Run]:
        """Puts the plan on the model for the time of a `with` block."""
        applied = plan.apply(self.model, tokenizer=Words(self.processor))
        with SharedPictures(self.model, plan) as self._shared, applied as run:
            yield run

    def ask(self, records: Sequence[Record], run: Any, most: int | None = None) -> list[Answer]:
        """Answers to the records of one batch, from the model as `under` left it; `most` tokens if given."""
        began, ids = time.perf_counter(), [record.id for record in records]
        batch = self._batches.get(ids, [record.picture for record in records])
        self._shared.coming(batch)
        with StageTimer(self.model) as timer:
            if batch.inputs is None:
                with timer.preprocess():
                    batch.inputs = self.inputs(records)
                batch.ms["preprocess"] = timer.stages_ms["preprocess"]
            output = self.model.generate(
                **batch.inputs,
                max_new_tokens=most or self.task.kinds[records[0].kind].max_new_tokens,
                do_sample=False,
                num_beams=1,
                temperature=None,  # a checkpoint's sampling defaults would only be warned about
                top_p=None,
                top_k=None,
                pad_token_id=self.processor.tokenizer.pad_token_id,
            )
            new = output[:, batch.inputs["input_ids"].shape[1] :].cpu()
        self._batches.keep(ids, batch)
        stages = {name: ms + self._shared.saved.get(name, 0.0) for name, ms in timer.stages_ms.items()}
        answers = self._answers(records, new, stages, run.report())
        wall = round((time.perf_counter() - began) * 1e3 / len(records), 4)
        return [replace(answer, wall_ms=wall) for answer in answers]

    def inputs(self, records: Sequence[Record]) -> Any:
        """What the model is given for one batch, on its device, padded on the left."""
        pictures = self.task.pictures(records, self.model.device)
        inputs = self.processor.apply_chat_template(
            [[user_message([picture], record.question)] for picture, record in zip(pictures, records, strict=True)],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        )
        return inputs.to(self.model.device, dtype=self.model.dtype)

    def _answers(self, records: Sequence[Record], new: Tensor, stages: dict[str, float], report: Any) -> list[Answer]:
        count = len(records)
        shares = {"vision": max(1, self._shared.encoded)}
        texts = self.processor.tokenizer.batch_decode(new, skip_special_tokens=True)
        finished = torch.isin(new, self._stop).any(dim=1).tolist()
        return [
            Answer(
                id=record.id,
                text=text.strip(),
                truncated=not done,
                kept=list(row.kept_per_layer),
                visual_total=row.visual_total,
                prefill_flops=report.prefill_flops / count,
                prefill_flops_without_plan=report.prefill_flops_without_plan / count,
                ms={name: round(value / shares.get(name, count), 4) for name, value in stages.items()},
            )
            for record, text, done, row in zip(records, texts, finished, report.rows, strict=True)
        ]


def fingerprint(model: Any, processor: Any) -> str:
    """A hash of what decides a checkpoint's answers: configuration, chat template and values of every parameter.

    Of each parameter up to 4096 evenly spaced values enter, as float32, so it takes seconds for billions of parameters
    and does not depend on the directory or the shards that the weights came from.
    """
    sha = hashlib.sha256()
    sha.update(repr(_meaningful(model.config.to_dict())).encode())
    sha.update(repr(getattr(processor, "chat_template", None)).encode())
    for name, parameter in model.named_parameters():
        values = parameter.detach().flatten()
        values = values[:: max(1, values.numel() // 4096)].float().cpu()
        sha.update(f"{name} {tuple(parameter.shape)}".encode() + values.numpy().tobytes())
    return sha.hexdigest()[:16]


def _meaningful(config: Any) -> Any:
    """A configuration without what says where it came from and how it was loaded."""
    if not isinstance(config, dict):
        return config
    ignored = ("_name_or_path", "dtype", "transformers_version")
    return {name: _meaningful(value) for name, value in config.items() if name not in ignored}
