"""What methods do to hallucination: strengths are chosen on validation, everything is reported on another split.

    python -m mmefficient.bench hallucination --model reference-biased --out DIR

Of every method that strength is taken which hallucinates least in counterfactual validation captions, among those that
lose at most 0.8 points of recall, change the length by at most 4 % and repeat no more than the model alone. That is a
fifth less than is allowed on test, since another sample differs by chance. If none does, the one that loses the least
recall stands in the table anyway, marked. A strength whose captions come apart (over five points of recall, or five
more in a hundred that repeat an 8-gram) is taken only if the method has no other.

Under `accelerate launch` (or torchrun) processes share the work, on one GPU or more.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmefficient.bench.hallucination_clock import added, measure, timed
from mmefficient.environment import command
from mmefficient.errors import MMEfficientError
from mmefficient.evaluation.metrics.pope import COUNTS
from mmefficient.evaluation.processes import Processes
from mmefficient.evaluation.runner import run_eval
from mmefficient.evaluation.tasks.hallucination import task
from mmefficient.modulation import Modulation
from mmefficient.plan import Plan
from mmefficient.vlm import VLM

STRENGTHS: dict[str, tuple[str, ...]] = {
    "lift": tuple(f"lift(gain={g})" for g in (1.1, 1.2, 1.3, 1.5, 1.75, 2.0)),
    "vhr": (
        *(f"vhr(alpha={a},only={layers})" for layers in ("(0,)", "(0,1)") for a in (1.1, 1.25, 1.4)),
        "vhr(alpha=1.5)",
        "vhr(alpha=2.0)",
    ),
    "pai": tuple(f"pai(alpha={a})" for a in (0.02, 0.1)),
    "vaf": tuple(f"vaf(enhance={e},first=3,last=8)" for e in (1.02, 1.05)),
    "var": tuple(f"var(p={p},tau={t},first=1)" for p, t in ((0.3, 4.0), (0.6, 8.0))),
    "act": tuple(f"act(beta={b},theta={t})" for b, t in ((0.4, 0.1), (0.7, 0.02))),
    "adhh": tuple(f"adhh(theta={t})" for t in (0.05, 0.2)),
    "paint": tuple(f"paint(alpha={a},beta={a})" for a in (0.05, 0.2)),
    "spin": tuple(f"spin(keep={k},factor={f})" for k, f in ((0.75, 0.5), (0.88, 0.08), (0.88, 0.5))),
    "vcd": tuple(f"vcd(alpha={a})" for a in (0.5, 1.0)),
    "icd": tuple(f"icd(alpha={a})" for a in (0.5, 1.0)),
    "agla": tuple(f"agla(alpha={a},keep={k})" for a, k in ((2.0, 0.6), (1.0, 0.8))),
    "dola": ("dola(early=low)", "dola(early=high)"),
}
"""Plans tried of every method. Layers are shares of this model's twelve, as the papers' are of their models' 32."""
REDUCERS = ("fastv(layer=2,keep=0.5)", "grid(keep=0.5)", "visionzip(dominant=260,contextual=28,positions=keep)")
CAPTION, EXISTENCE = "caption-counterfactual", "existence-counterfactual"
COLUMNS = (
    (f"{CAPTION}/chair_s", "CHAIR_s"),
    (f"{CAPTION}/chair_i", "CHAIR_i"),
    (f"{CAPTION}/recall", "recall"),
    (f"{CAPTION}/length", "words"),
    (f"{CAPTION}/repeated_8gram", "repeats"),
    (f"{EXISTENCE}/accuracy", "POPE accuracy"),
    (f"{EXISTENCE}/f1", "F1"),
    (f"{EXISTENCE}/yes_rate", "yes-rate"),
    (f"{EXISTENCE}/mcc", "MCC"),
)
ALLOWED = {"recall": 0.01, "length": 0.05}  # what a method may lose of recall, and change of the length, on test
MARGIN = 0.8  # share of that on validation
BROKEN = 0.05  # recall lost, or repeating captions more, from which on captions have come apart
Entry = Mapping[str, Any]


def run(
    model: str,
    out: Path,
    only: Sequence[str] = (),
    *,
    trial: int = 1300,
    limit: int | None = None,
    split: str = "test",
    clock: str = "none",
    device: str,
    dtype: str,
) -> dict[str, Any]:
    """Choose strengths and measure; both runs are resumable in `out`.

    Args:
        only: the methods, without reducers; all of both by default.
        trial: validation questions, spread over both counterfactual kinds; limit: questions of all kinds together.
        split: "test", or "confirm" for what was decided after a look at that.
        clock: model to time the plans on, alone on its device, such as "llava-1.5-7b"; "none": no times.

    Returns:
        {"chosen": {method: plan}, "feasible": {method: bool}, "broken": plans whose validation captions came apart,
        "left_out": {method: why}, "validation", "test", "clock"}: reports of `run_eval`, "test" of `split`, and
        of `hallucination_clock.measure`.
    """
    world = Processes.current()
    vlm = VLM.from_pretrained(model, device=world.device or device, dtype=dtype)
    names, left_out = list(only) or list(STRENGTHS), {}
    for name in tuple(names):
        try:
            with Plan(STRENGTHS[name][0]).apply(vlm.model, tokenizer=vlm.processor.tokenizer):
                pass
        except MMEfficientError as error:  # adhh needs a profile of the checkpoint
            names.remove(name)
            left_out[name] = str(error)
    plans = [plan for name in names for plan in STRENGTHS[name]]
    options: dict[str, Any] = {"baselines": False, "batch_size": None}
    if vlm.model.device.type == "cuda" and world.size == 1:
        options["batch_size"] = 256
    first = run_eval(
        task("val"),
        plans,
        vlm,
        limit=trial,
        kinds=[EXISTENCE, CAPTION],
        out=out / "validation",
        resamples=100,
        **options,
    )
    entries = {entry["plan"]: entry["metrics"] for entry in first["plans"]}
    chosen, feasible = {}, {}
    for name in names:
        tried = {plan: entries[str(Plan(plan))] for plan in STRENGTHS[name]}
        chosen[name], feasible[name] = choose(entries["none"], tried)
    best = min(
        chosen,
        key=lambda name: (
            not feasible[name],
            not isinstance(Plan(chosen[name]).methods[0], Modulation),  # views read the picture twice
            value(entries[str(Plan(chosen[name]))], "chair_s"),
        ),
    )
    combined = [*REDUCERS, *(f"{reducer}+{chosen[best]}" for reducer in REDUCERS)]
    others = [plan for name, plan in chosen.items() if name != best]
    plans = [chosen[best], *([] if only else combined), *others]  # what matters most first, should time run out
    test = run_eval(task(split), plans, vlm, limit=limit, out=out / split, **options)
    times = None
    if clock != "none" and world.rank == 0:
        del vlm
        times = measure(plans, clock, out / "clock.json", device=world.device or device, dtype=dtype)
    return {
        "command": command(),
        "chosen": chosen,
        "feasible": feasible,
        "broken": [plan for plan, metrics in entries.items() if broken(entries["none"], metrics)],
        "left_out": left_out,
        "validation": first,
        "test": test,
        "clock": times,
    }


def value(metrics: Entry, name: str, kind: str = CAPTION) -> float:
    return float(metrics[f"{kind}/{name}"]["value"])


def broken(base: Entry, metrics: Entry) -> bool:
    """Whether captions have come apart: few mentions, or loops, lower CHAIR too."""
    lost = value(base, "recall") - value(metrics, "recall")
    return lost > BROKEN or value(metrics, "repeated_8gram") - value(base, "repeated_8gram") > BROKEN


def choose(base: Entry, tried: Mapping[str, Entry]) -> tuple[str, bool]:
    """The plan of one method to report, and whether it keeps recall, length and repetition."""

    def keeps(metrics: Entry) -> bool:
        length = value(metrics, "length") / value(base, "length")
        lost = value(base, "recall") - value(metrics, "recall")
        repeats = value(metrics, "repeated_8gram") - value(base, "repeated_8gram")
        within = lost <= MARGIN * ALLOWED["recall"] and abs(length - 1) <= MARGIN * ALLOWED["length"]
        return within and repeats <= 0

    tried = {plan: metrics for plan, metrics in tried.items() if not broken(base, metrics)} or tried
    good = {plan: metrics for plan, metrics in tried.items() if keeps(metrics)}
    if good:
        least = min(good, key=lambda p: (value(good[p], "chair_s"), -value(good[p], "accuracy", EXISTENCE)))
        return least, True
    return max(tried, key=lambda plan: value(tried[plan], "recall")), False


def table(result: Mapping[str, Any]) -> str:
    """Test scores as a Markdown table: percent, with paired 95 % intervals of the differences to no plan.

    With a clock also milliseconds per token over no plan, in a batch of one.
    """
    over = added(result["clock"]["rows"]) if result.get("clock") else {}
    titles = [*(title for _, title in COLUMNS), "TP/FP/TN/FN", *(["ms per token"] if over else [])]
    lines = [f"| plan | {' | '.join(titles)} |", "|---|" + "---:|" * len(titles)]
    loose = {str(Plan(result["chosen"][name])) for name, good in result["feasible"].items() if not good}
    for entry in result["test"]["plans"]:
        cells = []
        for metric, title in COLUMNS:
            if metric not in entry["metrics"]:
                cells.append("")
                continue
            scale, digits = (1, 2) if title == "words" else (100, 1)
            cell = f"{scale * (entry['metrics'][metric]['value'] or 0.0):.{digits}f}"
            change = entry["paired"].get(metric)
            if change and change["low"] is not None:
                cell += f" ({scale * change['low']:+.{digits}f} to {scale * change['high']:+.{digits}f})"
            cells.append(cell)
        counts = (entry["metrics"].get(f"{EXISTENCE}/{name}") for name in COUNTS)
        cells.append("/".join(f"{count['value']:.0f}" for count in counts if count))
        if over:
            cells.append(over.get(str(Plan(timed(entry["plan"]))), ""))
        mark = " *" if entry["plan"] in loose else ""
        lines.append(f"| `{entry['plan']}`{mark} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write(result: Mapping[str, Any], out: Path) -> None:
    """`hallucination.json` and `hallucination.md`."""
    (out / "hallucination.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (out / "hallucination.md").write_text(table(result) + "\n", encoding="utf-8")
