"""lmms-eval's model `mmefficient`: any of its tasks, under a plan. Found through its entry points `lmms_eval.models`.

python -m lmms_eval --model mmefficient --model_args "pretrained=reference,plan='fastv(layer=2,keep=0.25)'" --tasks pope
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm
from transformers import GenerationConfig

from mmefficient.errors import InputError
from mmefficient.evaluation.processes import Processes
from mmefficient.vlm import VLM, Answer

MAX_NEW_TOKENS = 1024  # where a task sets no limit
SAMPLING = ("temperature", "top_p", "top_k")


def manifest() -> ModelManifest:
    """What lmms-eval registers."""
    return ModelManifest("mmefficient", chat_class_path=f"{__name__}.MMEfficient")


class MMEfficient(lmms):
    """A model under a plan.

    Args:
        pretrained: "reference", a folder in Hugging Face format or a hub id.
        plan: in quotes where it holds a comma; documents without a picture are answered without it.
        batch_size: documents answered together.
        log: file for one JSON line per document: plan, visual tokens kept per layer, FLOPs, and the stage times of its
            batch divided by the documents in it. Processes after the first add their rank to the name.
        device, dtype: as for `VLM.from_pretrained`.

    Raises:
        InputError: an unknown argument, or a document with anything but pictures and text.
        PlanError, ModelError: as `VLM.from_pretrained`.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = "reference",
        plan: str = "none",
        batch_size: int | str = 1,
        log: str = "",
        device: str | None = None,
        dtype: str = "auto",
        max_batch_size: int | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise InputError(f"The model has no argument {next(iter(unknown))!r}; it has pretrained, plan, log, dtype.")
        world = Processes.current()
        self._rank, self._world_size = world.rank, world.size
        self.vlm = VLM.from_pretrained(
            pretrained, plan=plan.strip("'\""), device=world.device or device or "auto", dtype=dtype
        )
        self.batch_size = int(batch_size)
        path = Path(log) if log else None
        self._log = path.with_stem(f"{path.stem}-{world.rank}") if path and world.rank else path

    @property
    def device(self) -> Any:
        """Of the model's parameters."""
        return self.vlm.model.device

    def generate_until(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """Answers in the order of the requests, batched with those of the same generation settings."""
        results: dict[int, GenerationResult] = {}
        tokens, start = 0, time.perf_counter()
        with tqdm(total=len(requests), disable=self.rank != 0, desc=str(self.vlm.plan)) as bar:
            for settings, pictured, batch in self._batches(requests):
                options, stops = _options(settings)
                plan = self.vlm.plan if pictured else "none"
                answers = self.vlm.converse([messages for _, messages in batch], plan=plan, **options)
                for (place, _), answer in zip(batch, answers, strict=True):
                    text = _until(answer.text, stops)
                    count = answer.report.generated_tokens or 0
                    results[place] = GenerationResult(text=text, token_counts=TokenCounts(output_tokens=count))
                    self.cache_hook.add_partial("generate_until", (requests[place].args[0], settings), text)
                    tokens += count
                self._write([(requests[place], answer) for (place, _), answer in zip(batch, answers, strict=True)])
                bar.update(len(batch))
        seconds = time.perf_counter() - start
        log_metrics(
            total_gen_tokens=tokens,
            total_elapsed_time=seconds,
            avg_speed=tokens / seconds,
            additional_metrics={"rank": self.rank, "plan": str(self.vlm.plan)},
        )
        return [results[place] for place in range(len(requests))]

    def _batches(self, requests: Sequence[Any]) -> Iterator[tuple[dict[str, Any], bool, list[tuple[int, Any]]]]:
        """(settings, whether there are pictures, [(place, messages)]) of every batch."""
        groups: dict[tuple[str, bool], list[tuple[int, Any]]] = {}
        settings: dict[str, dict[str, Any]] = {}
        for place, request in enumerate(requests):
            _, to_messages, given, document, task, split = request.args
            chat = ChatMessages(messages=to_messages(self.task_dict[task][split][document]))
            images, *others = chat.extract_media()
            if any(others):
                raise InputError(f"Document {document} of {task} holds video or sound; only pictures are supported.")
            key = json.dumps(given, sort_keys=True, default=str)
            settings[key] = given
            groups.setdefault((key, bool(images)), []).append((place, chat.to_hf_messages()))
        for (key, pictured), group in groups.items():
            for start in range(0, len(group), self.batch_size):
                yield settings[key], pictured, group[start : start + self.batch_size]

    def _write(self, batch: Sequence[tuple[Any, Answer]]) -> None:
        if self._log is None:
            return
        with self._log.open("a", encoding="utf-8") as file:
            for request, answer in batch:
                _, _, _, document, task, split = request.args
                report = answer.report
                line = {
                    "task": task,
                    "split": split,
                    "doc_id": document,
                    "plan": report.plan,
                    "visual_total": report.rows[0].visual_total,
                    "kept_per_layer": report.rows[0].kept_per_layer,
                    "prefill_flops": report.prefill_flops / len(batch),
                    "prefill_flops_without_plan": report.prefill_flops_without_plan / len(batch),
                    "generated_tokens": report.generated_tokens,
                    "stages_ms": {name: ms / len(batch) for name, ms in report.stages_ms.items()},
                }
                file.write(json.dumps(line) + "\n")

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not offered.

        Raises:
            InputError: always.
        """
        raise InputError("Plans are evaluated by what they generate; choose a task whose output is generate_until.")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not offered.

        Raises:
            InputError: always.
        """
        raise InputError("Tasks of several rounds are not supported; choose one whose output is generate_until.")


def _options(settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Keywords for `generate`, and stop strings, from a task's `generation_kwargs`, some of which are for other models.

    Sampling is on if the task says so, or, where it says nothing, if it sets a temperature above zero.
    """
    known = GenerationConfig()
    options = {name: value for name, value in settings.items() if hasattr(known, name) and value is not None}
    options.setdefault("max_new_tokens", MAX_NEW_TOKENS)
    options.setdefault("do_sample", (settings.get("temperature") or 0) > 0)
    if not options["do_sample"]:
        options = {name: value for name, value in options.items() if name not in SAMPLING}
    until = settings.get("until") or []
    return options, [until] if isinstance(until, str) else list(until)


def _until(text: str, stops: Sequence[str]) -> str:
    """`text` up to the first stop string."""
    ends = [text.index(stop) for stop in stops if stop and stop in text]
    return text[: min(ends)] if ends else text
