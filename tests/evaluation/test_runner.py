from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from mmefficient.errors import BudgetError, InputError, PlanError, UnknownMethodError
from mmefficient.evaluation import Record, Task, run_eval
from mmefficient.evaluation.answers import Answer, AnswerLog
from mmefficient.evaluation.generation import Asker, batches, fingerprint
from mmefficient.plan import Plan
from mmefficient.vlm import VLM

PLAN = "grid(keep=0.25)"


@pytest.fixture(autouse=True)
def _no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots have tests of their own and would take most of the time here."""
    monkeypatch.setattr("mmefficient.evaluation.runner._write_page", lambda *_: None)


def numbers(report: dict[str, Any]) -> str:
    """What must not depend on kills and batch sizes."""
    kept = ("plan", "metrics", "paired", "visual_tokens", "questions")
    return json.dumps([{key: plan[key] for key in kept} for plan in report["plans"]])


def texts(folder: Path) -> dict[str, list[str | None]]:
    return {
        path.name: [json.loads(line).get("text") for line in path.read_text().splitlines()]
        for path in folder.glob("*.jsonl")
    }


def evaluate(task: Task, vlm: VLM, out: Path | None = None, **options: Any) -> dict[str, Any]:
    defaults: dict[str, Any] = {"batch_size": 3, "baselines": False}
    return run_eval(task, [PLAN], vlm, out=out, resamples=50, **{**defaults, **options})


def test_report_has_every_kind_for_every_plan(task: Task, vlm: VLM, tmp_path: Path) -> None:
    report = evaluate(task, vlm, tmp_path, check_flips=5)
    assert report == json.loads((tmp_path / "report.json").read_text())
    assert [plan["plan"] for plan in report["plans"]] == ["none", PLAN]
    none, grid = report["plans"]
    assert none["questions_per_s"] > 0
    assert none["metrics"].keys() == grid["metrics"].keys() == grid["paired"].keys()
    assert {"existence/f1", "colour/accuracy", "caption/chair_i", "mean/accuracy"} <= none["metrics"].keys()
    assert none["paired"] == {}
    assert all(entry.keys() == {"value", "low", "high", "n"} for entry in grid["metrics"].values())
    assert none["metrics"]["mean/accuracy"]["n"] == 14
    assert none["visual_tokens"] == none["visual_tokens_without_plan"] == 16 > grid["visual_tokens"]
    assert none["prefill_flops_ratio"] == 1 > grid["prefill_flops_ratio"]
    assert none["flips"] == {"checked": 5, "flipped": 0, "ids": []}
    assert none["ms_per_question"].keys() == {"preprocess", "vision", "prefill", "decode"}
    page = (tmp_path / "report.md").read_text()
    assert "| mean/accuracy | 14 |" in page
    assert f"`{PLAN}`" in page


def test_batch_size_does_not_change_answers(task: Task, vlm: VLM) -> None:
    assert numbers(evaluate(task, vlm, batch_size=1)) == numbers(evaluate(task, vlm, batch_size=5))


def test_answers_are_those_of_the_stock_model(task: Task, vlm: VLM) -> None:
    record = task.records(["caption"], 1)[0]
    image = task.pictures([record], torch.device("cpu"))[0]
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": record.question}]}]
    prompt = vlm.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    inputs = vlm.processor(images=[image], text=[prompt], return_tensors="pt")
    output = vlm.model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    expected = vlm.processor.tokenizer.decode(output, skip_special_tokens=True).strip()

    asker = Asker(vlm.model, vlm.processor, task)
    with asker.under(Plan()) as run:
        answer = asker.ask([record], run)[0]
    assert answer.text == expected
    assert answer.truncated == (vlm.processor.tokenizer.eos_token_id not in output)


def test_images_may_be_pil(task: Task, vlm: VLM) -> None:
    from PIL import Image

    def pictures(records: Any, device: torch.device) -> list[Image.Image]:
        return [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in torch.as_tensor(task.pictures(records, device))]

    assert numbers(evaluate(dataclasses.replace(task, pictures=pictures), vlm)) == numbers(evaluate(task, vlm))


def before_every_batch(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    ask = Asker.ask

    def asked(*args: Any, **options: Any) -> list[Answer]:
        act()
        return ask(*args, **options)

    monkeypatch.setattr(Asker, "ask", asked)


@pytest.mark.parametrize("kill", [1, 3, 5, 7, 8, 11, 15, 16])
def test_a_killed_run_goes_on_to_the_same_numbers(
    task: Task, vlm: VLM, tmp_path: Path, kill: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    appended: list[str] = []
    append = AnswerLog.append

    def counted(self: AnswerLog, answers: Sequence[Answer]) -> None:
        appended.extend(answer.id for answer in answers)
        append(self, answers)

    def killed() -> None:
        nonlocal calls
        calls += 1
        if calls == kill:
            raise KeyboardInterrupt

    whole = evaluate(task, vlm, tmp_path / "whole")
    monkeypatch.setattr(AnswerLog, "append", counted)
    before_every_batch(monkeypatch, killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate(task, vlm, tmp_path / "killed")
    assert not (tmp_path / "killed" / "report.json").exists()
    resumed = evaluate(task, vlm, tmp_path / "killed")
    assert numbers(resumed) == numbers(whole)
    assert sorted(appended) == sorted(2 * [record.id for record in task.records(None, None)])
    assert texts(tmp_path / "killed") == texts(tmp_path / "whole")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_sigkill_at_random_moments_loses_and_repeats_nothing(
    task: Task, vlm: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, kills = random.Random(0), 0
    with monkeypatch.context() as slow:
        before_every_batch(slow, lambda: time.sleep(0.1))
        while kills < 10:
            child = multiprocessing.get_context("fork").Process(target=evaluate, args=(task, vlm, tmp_path / "killed"))
            child.start()
            child.join(rng.uniform(0.1, 0.35))
            child.kill()
            child.join()
            if child.exitcode == 0:  # it was through before it was killed: from the beginning again
                shutil.rmtree(tmp_path / "killed")
            else:
                assert child.exitcode == -signal.SIGKILL
                kills += 1
    assert numbers(evaluate(task, vlm, tmp_path / "killed")) == numbers(evaluate(task, vlm, tmp_path / "whole"))
    assert texts(tmp_path / "killed") == texts(tmp_path / "whole")


@pytest.mark.parametrize("cut", [1, 40, 700, 1500, 2500, -1, -30])
def test_a_file_cut_anywhere_goes_on_to_the_same_numbers(task: Task, vlm: VLM, tmp_path: Path, cut: int) -> None:
    whole = numbers(evaluate(task, vlm, tmp_path))
    for path in tmp_path.glob("*.jsonl"):
        path.write_bytes(path.read_bytes()[:cut])
    assert numbers(evaluate(task, vlm, tmp_path, batch_size=4)) == whole


def test_a_finished_run_asks_nothing_again(task: Task, vlm: VLM, tmp_path: Path) -> None:
    whole = evaluate(task, vlm, tmp_path)
    silent = dataclasses.replace(task, pictures=lambda *_: pytest.fail("asked again"))
    again = evaluate(silent, vlm, tmp_path)
    assert again["plans"] == whole["plans"]


def test_other_settings_do_not_mix(task: Task, vlm: VLM, tmp_path: Path) -> None:
    evaluate(task, vlm, tmp_path)
    with pytest.raises(InputError, match=r"questions was 21, now 2.*output directory"):
        evaluate(task, vlm, tmp_path, limit=2)


def damage(lines: list[str], how: str) -> list[str]:
    if how == "not json":
        return [*lines[:3], "{]", *lines[3:]]
    if how == "not utf-8":
        return [*lines[:3], "\udcff", *lines[3:]]
    if how == "no object":
        return [*lines[:3], "[1]", *lines[4:]]
    if how == "twice":
        return [*lines[:3], lines[2], *lines[3:]]
    if how == "too many":
        return [*lines, lines[-1]]
    if how == "field":
        return [*lines[:3], lines[3].replace('"text"', '"words"'), *lines[4:]]
    if how == "type":
        return [*lines[:3], lines[3].replace('"visual_total":16', '"visual_total":"16"'), *lines[4:]]
    assert how == "header"
    return lines[1:]


DAMAGES = ["not json", "not utf-8", "no object", "twice", "too many", "field", "type", "header"]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_file_is_refused_by_name_and_line(task: Task, vlm: VLM, tmp_path: Path, how: str) -> None:
    evaluate(task, vlm, tmp_path)
    path = next(tmp_path.glob("*.jsonl"))
    lines = damage(path.read_text().splitlines(), how)
    path.write_text("\n".join(lines) + "\n", errors="surrogateescape")
    with pytest.raises(InputError, match=path.name):
        evaluate(task, vlm, tmp_path)


def test_a_line_that_is_missing_is_answered_again(task: Task, vlm: VLM, tmp_path: Path) -> None:
    whole = evaluate(task, vlm, tmp_path)
    path = next(tmp_path.glob("*.jsonl"))
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], *lines[4:]]) + "\n")
    assert numbers(evaluate(task, vlm, tmp_path)) == numbers(whole)
    assert [json.loads(line).get("text") for line in (*lines[:3], *lines[4:], lines[3])] == texts(tmp_path)[path.name]


def test_flips_are_counted(task: Task, vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = Asker.ask

    def fickle(self: Asker, records: list[Record], run: Any, most: int | None = None) -> Any:
        answers = ask(self, records, run, most)
        alone = len(records) == 1 and records[0].kind == "colour"
        return [dataclasses.replace(answer, text=answer.text + "!") if alone else answer for answer in answers]

    monkeypatch.setattr(Asker, "ask", fickle)
    flips = evaluate(task, vlm, batch_size=7, check_flips=1000)["plans"][0]["flips"]
    assert flips == {"checked": 21, "flipped": 7, "ids": [f"c{i}" for i in range(7)]}


def test_batches_hold_questions_on_one_picture_together_and_never_mix_limits(task: Task) -> None:
    records = task.records(None, None)
    cut = batches(records, 3, task)
    assert sorted(record.id for batch in cut for record in batch) == sorted(record.id for record in records)
    assert [len(batch) for batch in cut] == [3, 3, 1] * 3
    assert all(len({task.kinds[record.kind].max_new_tokens for record in batch}) == 1 for batch in cut)
    shuffled = [records[i] for i in (6, 0, 3, 1)]
    assert [record.picture for record in batches(shuffled, 4, task)[0]] == ["p3", "p0", "p0", "p1"]


def test_a_limit_is_spread_over_the_kinds(task: Task, vlm: VLM) -> None:
    report = evaluate(task, vlm, limit=5)
    sizes = {name: metric["n"] for name, metric in report["plans"][0]["metrics"].items() if "/accuracy" in name}
    assert report["settings"]["questions"] == 5
    assert max(sizes[f"{kind}/accuracy"] for kind in task.kinds if f"{kind}/accuracy" in sizes) <= 2


def test_groups_need_all_their_kinds(task: Task, vlm: VLM) -> None:
    report = evaluate(task, vlm, kinds=["colour"], limit=2)
    assert report["plans"][0]["metrics"].keys() == {"colour/accuracy"}


def test_fingerprint_sees_the_weights_and_not_where_they_lie(vlm: VLM, tmp_path: Path) -> None:
    vlm.model.save_pretrained(tmp_path)
    vlm.processor.save_pretrained(tmp_path)
    copy = VLM.from_pretrained(tmp_path, device="cpu", dtype="float32")
    assert fingerprint(copy.model, copy.processor) == fingerprint(vlm.model, vlm.processor)
    before = fingerprint(vlm.model, vlm.processor)
    bias = vlm.model.model.multi_modal_projector.linear_1.bias
    with torch.no_grad():
        bias += 1
        after = fingerprint(vlm.model, vlm.processor)
        bias -= 1
    assert before != after
    assert before == fingerprint(vlm.model, vlm.processor)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "limit must be at least 1, not 0"),
        ({"limit": -3}, "limit must be at least 1, not -3"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"check_flips": -1}, "check_flips must be at least 0"),
        ({"kinds": ["color"]}, 'has no kind "color"'),
    ],
)
def test_bad_settings_are_refused(task: Task, vlm: VLM, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run_eval(task, [], vlm, **options)


@pytest.mark.parametrize(
    ("plan", "error"),
    [("grid(keep=17)", BudgetError), ("exit(layer=9)", PlanError), ("gird(keep=1)", UnknownMethodError)],
)
def test_a_plan_that_does_not_fit_is_refused_before_the_baseline_runs(
    task: Task, vlm: VLM, tmp_path: Path, plan: str, error: type[Exception]
) -> None:
    with pytest.raises(error):
        run_eval(task, [plan], vlm, out=tmp_path)
    assert all(len(path.read_text().splitlines()) == 1 for path in tmp_path.glob("*.jsonl"))


PLANS = ["random(keep=0.5,seed=1)", "grid(keep=4)", "pool(keep=4)", "visionzip(dominant=3,contextual=2)"]
PLANS += ["fastv(layer=2,keep=0.25)", "exit(layer=2)"]


def test_every_kind_of_plan_gives_the_same_answers_in_any_batch(task: Task, vlm: VLM) -> None:
    report = run_eval(task, PLANS, vlm, batch_size=7, check_flips=21, resamples=10, baselines=False)
    assert [plan["plan"] for plan in report["plans"]] == ["none", *(str(Plan(plan)) for plan in PLANS)]
    assert {plan["plan"]: plan["flips"]["ids"] for plan in report["plans"] if plan["flips"]["ids"]} == {}
    assert all(plan["visual_tokens"] < 16 and plan["prefill_flops_ratio"] < 1 for plan in report["plans"][1:])


def test_an_output_that_is_a_file_is_refused(task: Task, vlm: VLM, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be the output directory"):
        run_eval(task, [], vlm, out=tmp_path / "file")


def test_repeated_ids_are_refused(task: Task, vlm: VLM) -> None:
    twice = dataclasses.replace(task, records=lambda *_: task.records(["colour"], 1) * 2)
    with pytest.raises(InputError, match='two questions with the id "c0"'):
        run_eval(twice, [], vlm)


def test_an_unknown_task_gets_a_suggestion(vlm: VLM) -> None:
    with pytest.raises(InputError, match='no task "scene"; did you mean "scenes"'):
        run_eval("scene", [], vlm)
    with pytest.raises(InputError, match="choose one of"):
        run_eval("zzz", [], vlm)
