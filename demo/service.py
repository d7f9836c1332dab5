"""What the demo computes, without any interface: answers with measured times, presets, plans made of fields."""

from __future__ import annotations

import dataclasses
import json
import statistics
import typing
from collections.abc import Iterator, Mapping, Sequence
from shlex import quote
from typing import Any

from PIL import Image
from torch import Tensor

from mmefficient.bench.timers import STAGES
from mmefficient.errors import InputError, MMEfficientError, PlanError
from mmefficient.executor import Executor
from mmefficient.flops import kv_bytes
from mmefficient.matchers import OWN, WORDS
from mmefficient.matchers.words import Words
from mmefficient.methods import method, methods
from mmefficient.models import adapter_for
from mmefficient.plan import Plan
from mmefficient.profiles.heads import measure as measure_heads
from mmefficient.report import Report
from mmefficient.run import Run
from mmefficient.vlm import VLM
from mmefficient.watch import attention_received

REPEATS = 3  # timed runs behind every median
MAX_QUESTION = 2000  # characters
INSIDE = OWN | {"auto", "none"}  # texts in a method's fields that lead to nothing outside the package


@dataclasses.dataclass(frozen=True)
class Measured:
    """One answer and what it cost.

    Attributes:
        text: the answer; plan: as text.
        stages_ms: median milliseconds per stage over `repeats` warm runs.
        kv_bytes: keys and values of the prompt that the cache holds after the prefill.
        realised: time saved in the prefill over the time that the saved FLOPs are worth; None where none are saved.
    """

    plan: str
    text: str
    report: Report
    stages_ms: dict[str, float]
    repeats: int
    kv_bytes: int
    realised: float | None = None

    @property
    def total_ms(self) -> float:
        """All stages together."""
        return sum(self.stages_ms.values())


class Service:
    """The models given at start, by name; nothing else can be asked for."""

    def __init__(self, models: Mapping[str, VLM]) -> None:
        self.models = dict(models)
        self._presets: dict[str, list[str]] = {}

    def model(self, name: str) -> VLM:
        """Raises InputError for a name that was not given at start."""
        if name not in self.models:
            raise InputError(f"This demo serves {', '.join(self.models)}; choose one of these models.")
        return self.models[name]

    def layers(self, name: str) -> int:
        """Decoder layers of a model."""
        return len(adapter_for(self.model(name).model).layers)

    def presets(self, name: str) -> list[str]:
        """No plan, then every method the model can carry with its defaults; a layer it asks for is half the depth."""
        if name not in self._presets:
            model, found = self.model(name), ["none"]
            for kind in methods():
                fields = {f.name: f.default for f in dataclasses.fields(kind)}
                required = [field for field, default in fields.items() if default is dataclasses.MISSING]
                given: dict[str, Any] = dict.fromkeys(required, self.layers(name) // 2)
                given |= {"matcher": WORDS} if "matcher" in fields else {}  # the default is a model of its own
                if set(required) <= {"layer"} and explain(plan := str(Plan([kind(**given)])), model) is None:
                    found.append(plan)
            self._presets[name] = found
        return self._presets[name]

    def stream(self, name: str, picture: Image.Image | None, question: str, plan: str) -> Iterator[str]:
        """The answer so far, growing."""
        picture, question = check_input(picture, question)
        text = ""
        for piece in self.model(name).stream(picture, question, plan=served(plan)):
            text += piece
            yield text.strip()

    def attention(self, name: str, picture: Image.Image, question: str) -> Tensor:
        """Float32 [layers, N], what visual tokens receive from the last prompt row, without a plan."""
        return attention_received(self.model(name), picture, question)

    def heads(self, name: str, picture: Image.Image | None, question: str) -> Tensor:
        """Float32 [3, layers, heads], the maps of `mmefficient.profiles.heads.MAPS` for one prompt without a plan."""
        picture, question = check_input(picture, question)
        return measure_heads(self.model(name), [(picture, question)])

    def measure(
        self,
        name: str,
        picture: Image.Image | None,
        question: str,
        plans: Sequence[str],
        repeats: int = REPEATS,
        warm: bool = False,
    ) -> list[Measured]:
        """Answer under every plan, in `repeats` rounds in which the plans take turns.

        Args:
            warm: whether each has just been asked this; if not, it is, once, before the rounds.
        """
        picture, question = check_input(picture, question)
        vlm, parsed = self.model(name), [served(plan) for plan in plans]
        rounds = repeats if warm else repeats + 1
        runs = [[vlm.ask(picture, question, plan=plan) for plan in parsed] for _ in range(rounds)][-repeats:]
        found = []
        for index, plan in enumerate(parsed):
            answers = [answers[index] for answers in runs]
            stages = {stage: statistics.median(a.report.stages_ms[stage] for a in answers) for stage in STAGES}
            report = answers[-1].report
            found.append(
                Measured(str(plan), answers[-1].text, report, stages, repeats, stored_bytes(vlm.model, report))
            )
        return [dataclasses.replace(one, realised=_realised(found[0], one)) for one in found]


def stored_bytes(model: Any, report: Report) -> int:
    """Bytes of keys and values that the cache holds of the prompt in `report`."""
    return kv_bytes(adapter_for(model).decoder.config, report.stored_tokens, model.dtype.itemsize)


def check_input(picture: Image.Image | None, question: str) -> tuple[Image.Image, str]:
    """Raises InputError where the picture or the question is missing, or the question is far too long."""
    if picture is None:
        raise InputError("Give a picture first: upload, paste or pick one.")
    if not question.strip():
        raise InputError("Write a question about the picture.")
    if len(question) > MAX_QUESTION:
        raise InputError(f"The question has {len(question)} characters; {MAX_QUESTION} are allowed.")
    return picture, question.strip()


def _realised(base: Measured, other: Measured) -> float | None:
    saved = 1 - other.report.prefill_flops / other.report.prefill_flops_without_plan
    if not saved or not base.stages_ms["prefill"]:
        return None
    return (1 - other.stages_ms["prefill"] / base.stages_ms["prefill"]) / saved


def served(text: str) -> Plan:
    """The plan in `text`.

    Raises:
        PlanError: it cannot be read; or it names a file or a model, which only whoever starts the demo may choose.
    """
    if len(text) > MAX_QUESTION:
        raise PlanError(f"The plan has {len(text)} characters; {MAX_QUESTION} are allowed.")
    plan = Plan(text)
    for each in plan.methods:
        hints = typing.get_type_hints(type(each))
        for field in dataclasses.fields(each):
            value, names = getattr(each, field.name), hints[field.name] is str and not field.metadata.get("prose")
            if names and value not in INSIDE:
                raise PlanError(
                    f"{each.name}: {field.name}={value!r} is a file or a model that this demo does not serve; "
                    f"choose from: {', '.join(sorted(INSIDE))}."
                )
    return plan


def explain(text: str, vlm: VLM) -> str | None:
    """Why the plan in `text` cannot be used on a model, as a sentence; None = it can."""
    try:
        plan, adapter = served(text), adapter_for(vlm.model)
        run = Run(str(plan), "apply", adapter)
        Executor(vlm.model, adapter, plan.methods, run, Words(vlm.processor))  # checks, and attaches nothing
    except MMEfficientError as error:
        return str(error)
    return None


def add_method(text: str, name: str, values: Mapping[str, str]) -> str:
    """The plan in `text` with one more method, whose fields are given as they are typed; empty = the default.

    Raises:
        PlanError: the method, a field, or the whole plan makes no sense.
    """
    given = ",".join(f"{field}={value.strip()}" for field, value in values.items() if value.strip())
    method(name)  # an unknown name is said before anything else
    added = Plan(f"{name}({given})")
    return str(Plan([*Plan(text).methods, *added.methods]))


def policy(text: str) -> str:
    """The plan as the JSON text of a policy file."""
    return json.dumps(Plan(text).to_dict(), indent=1) + "\n"


def read_policy(data: bytes) -> str:
    """The plan in a policy file, as text.

    Raises:
        PlanError: no policy, or one with methods that cannot be composed.
    """
    try:
        found = json.loads(data.decode())
    except ValueError as error:
        raise PlanError("This is no policy file: it is no JSON.") from error
    return str(Plan.from_dict(found))


def snippets(text: str, model: str) -> tuple[str, str]:
    """The plan as a Python snippet and as a command line."""
    plan = str(Plan(text))
    python = (
        "import mmefficient as mm\n\n"
        f"vlm = mm.VLM.from_pretrained({model!r}, plan={plan!r})\n"
        'print(vlm.ask("picture.png", "What is in the picture?").text)\n'
    )
    line = f"mmefficient ask picture.png 'What is in the picture?' --model {quote(model)} --plan {quote(plan)}"
    return python, line
