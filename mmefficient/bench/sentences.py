"""What checking sentences does to hallucination, in training (`sentinel`) and while decoding (`verify_sentences`).

    python -m mmefficient.bench sentences --out DIR

The probe's margin is the one that hallucinates least in counterfactual validation captions, among those that lose at
most one point of recall and repeat nothing more; what is left out makes captions shorter, so length is no part of the
rule. Existence questions and captions of the test split are then answered by the model, with verified phrases, and by
the tuned model. Only captions name objects, so verification leaves answers to questions as they are.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmefficient.bench.hallucination import CAPTION, EXISTENCE, table, value
from mmefficient.environment import collect, command
from mmefficient.evaluation.answers import Answer
from mmefficient.evaluation.generation import Asker, batches, fingerprint
from mmefficient.evaluation.metrics.chair import Lexicon
from mmefficient.evaluation.report import PlanRun, build
from mmefficient.evaluation.task import Record, Task, digest, hashes
from mmefficient.evaluation.tasks.hallucination import task as hallucination
from mmefficient.loading import load
from mmefficient.models.reference.scenes.catalogue import OBJECTS
from mmefficient.plan import Plan
from mmefficient.sentences import verify_sentences
from mmefficient.verifiers import Probe

MARGINS = (0.0, 1.0, 2.0, 3.0, 4.0)
KINDS = (EXISTENCE, "existence-adversarial", CAPTION, "caption")
_INDEFINITE = {cls.name: cls.indefinite for cls in OBJECTS}


def question(name: str) -> str:
    """What the probe asks about an object of the scenes."""
    return f"Is there {_INDEFINITE[name]} in the image?"


def greedy(asker: Asker, records: Sequence[Record], size: int) -> list[Answer]:
    """The model's answers, in the order of `records`."""
    found: dict[str, Answer] = {}
    with asker.under(Plan()) as run:
        for batch in batches(records, size, asker.task):
            found |= {answer.id: answer for answer in asker.ask(batch, run)}
    return [found[record.id] for record in records]


def verified(
    asker: Asker, records: Sequence[Record], before: Sequence[Answer], margin: float, width: int, size: int
) -> list[Answer]:
    """Answers in which captions are decoded by `verify_sentences`, with the wall time per caption."""
    found = {answer.id: answer for answer in before}
    probe = Probe(asker.processor, question, margin)
    lexicon = Lexicon({kind.name: (kind.plural,) for kind in OBJECTS})
    captions = [record for record in records if record.kind.startswith("caption")]
    for batch in batches(captions, size, asker.task):
        began = time.perf_counter()
        told = verify_sentences(asker.model, asker.processor, asker.inputs(batch), objects=lexicon.mentions,
                                verify=probe, width=width,
                                max_new_tokens=asker.task.kinds[batch[0].kind].max_new_tokens)  # fmt: skip
        wall = round(1e3 * (time.perf_counter() - began) / len(batch), 4)
        texts = asker.processor.tokenizer.batch_decode([each.ids for each in told], skip_special_tokens=True)
        for record, each, text in zip(batch, told, texts, strict=True):
            told_so = {"text": text.strip(), "truncated": not each.finished, "ms": {}, "wall_ms": wall}
            found[record.id] = replace(found[record.id], **told_so)
    return [found[record.id] for record in records]


def report(task: Task, records: Sequence[Record], runs: Sequence[PlanRun], **settings: Any) -> dict[str, Any]:
    """The first run against the others, with paired intervals; see `evaluation.report.build`."""
    facts = {"task": task.name, "questions": len(records), "digest": digest(records), "hashes": hashes(task, records)}
    facts |= {**settings, "command": command()}
    return build(task, records, runs, settings=facts, environment=collect(), resamples=2000, seed=0)


def choose_margin(asker: Asker, trial: int, width: int, size: int) -> tuple[float, bool, dict[str, Any]]:
    """The margin to report, whether it keeps recall and repetition, and the validation report."""
    records = asker.task.records([EXISTENCE, CAPTION], trial)
    base = greedy(asker, records, size)
    runs = {_name(each, width): verified(asker, records, base, each, width, size) for each in MARGINS}
    found = report(
        asker.task, records, [PlanRun("none", base), *(PlanRun(*each) for each in runs.items())], split="val"
    )
    entries = {entry["plan"]: entry["metrics"] for entry in found["plans"]}
    base_metrics = entries.pop("none")

    def loses(name: str) -> tuple[bool, float]:
        recall, repeats = (value(base_metrics, m) - value(entries[name], m) for m in ("recall", "repeated_8gram"))
        return recall > 0.01 or repeats < 0, recall

    kept = [name for name in entries if not loses(name)[0]]
    best = min(kept, key=lambda name: value(entries[name], "chair_s")) if kept else min(entries, key=loses)
    return MARGINS[list(runs).index(best)], bool(kept), found


def run(
    model: str,
    tuned: str | None,
    *,
    margin: float | None = None,
    trial: int = 200,
    limit: int = 1000,
    width: int = 4,
    batch_size: int = 256,
    device: str,
    dtype: str,
) -> dict[str, Any]:
    """Choose the margin and measure.

    Args:
        model: names the model; tuned: the same after preference tuning, or None to leave it out.
        margin: of the probe; None: the best of `MARGINS` on validation.
        trial: validation questions per kind; limit: test questions per kind. width: see `verify_sentences`.

    Returns:
        {"margin", "feasible", "validation", "test", "ms_per_caption"}: two reports (None, None where the margin was
        given), and wall times in batches.
    """
    loaded = load(model, device=device, dtype=dtype, attn_implementation=None)
    validation, feasible = None, None
    if margin is None:
        margin, feasible, validation = choose_margin(Asker(*loaded, hallucination("val")), trial, width, batch_size)
    best = _name(margin, width)
    last = hallucination("test")
    asker = Asker(*loaded, last)
    records = last.records(KINDS, limit)
    base = greedy(asker, records, batch_size)
    runs = [PlanRun("none", base), PlanRun(best, verified(asker, records, base, margin, width, batch_size))]
    models = {"none": fingerprint(asker.model, asker.processor)}
    if tuned is not None:
        other = Asker(*load(tuned, device=device, dtype=dtype, attn_implementation=None), last)
        answers = greedy(other, records, batch_size)
        both = verified(other, records, answers, margin, width, batch_size)
        runs += [PlanRun("sentinel", answers), PlanRun(f"sentinel+{best}", both)]
        models["sentinel"] = fingerprint(other.model, other.processor)
    captions = {record.id for record in records if record.kind.startswith("caption")}
    test = report(last, records, runs, split="test", model=model, tuned=tuned, models=models, dtype=dtype)
    times = {each.plan: sum(a.wall_ms for a in each.answers if a.id in captions) / len(captions) for each in runs}
    return {
        "margin": margin,
        "feasible": feasible,
        "validation": validation,
        "test": test,
        "ms_per_caption": times,
    }


def _name(margin: float, width: int) -> str:
    return f"verify_sentences(margin={margin},width={width})"


def write(result: dict[str, Any], out: Path) -> None:
    """`sentences.json` and `sentences.md` in the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "sentences.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (out / "sentences.md").write_text(f"{page(result)}\n", encoding="utf-8")


def page(result: dict[str, Any]) -> str:
    """Test scores, and what a caption takes, as Markdown."""
    times = [f"{name}: {ms:.1f} ms" for name, ms in result["ms_per_caption"].items()]
    return table({"chosen": {}, "feasible": {}, "test": result["test"]}) + "\n\nPer caption: " + "; ".join(times)
