from __future__ import annotations

import base64
import dataclasses
import io
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmefficient.evaluation import Record, Task, run_eval
from mmefficient.evaluation.answers import Answer
from mmefficient.evaluation.plots import pareto
from mmefficient.evaluation.regressions import SHOWN, worst
from mmefficient.evaluation.report import PlanRun, build
from mmefficient.vlm import VLM

PLAN = "fastv(layer=1,keep=4)"
VOID = {"meta", "img"}


class Checker(HTMLParser):
    """Fails on elements that are not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def records_of(task: Task, vlm: VLM) -> Task:
    """The task with the model's own answers as the truth, so that a plan can lose some; questions need escaping."""
    asked = [dataclasses.replace(record, question="Is <b>it</b> & big?") for record in task.records(["colour"], None)]
    found = run_eval(dataclasses.replace(task, records=lambda *_: asked), [], vlm, resamples=5)
    assert found["plans"][0]["questions"] == len(asked)
    pictures = [Image.fromarray(np.asarray(p).transpose(1, 2, 0)) for p in task.pictures(asked, "cpu")]  # type: ignore[arg-type]
    texts = [vlm.ask(picture, asked[0].question, max_new_tokens=3).text for picture in pictures]
    truth = [dataclasses.replace(record, truth=(text,)) for record, text in zip(asked, texts, strict=True)]
    return dataclasses.replace(task, records=lambda *_: truth, groups={})


def test_the_page_is_whole_and_shows_what_was_lost(task: Task, vlm: VLM, tmp_path: Path) -> None:
    asked = records_of(task, vlm)
    report = run_eval(asked, [PLAN], vlm, out=tmp_path, resamples=20)
    page = (tmp_path / "report.html").read_text()
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert checker.seen.count("figure") == 4
    assert not re.search(r'(?:src|href)="(?!data:|#)', page), "everything is inside"
    lost = report["plans"][1]["regressions"]
    assert lost, "this plan keeps four tokens and answers as well as without it"
    assert checker.seen.count("img") == len(lost)
    assert "Is &lt;b&gt;it&lt;/b&gt; &amp; big?" in page
    pictures = re.findall(r'base64,([^"]+)"', page)
    assert all(Image.open(io.BytesIO(base64.b64decode(data))).width > 100 for data in pictures)
    assert 'class="chip ' in page
    silent = dataclasses.replace(asked, pictures=lambda *_: pytest.fail("asked again"))
    run_eval(silent, [PLAN], vlm, out=tmp_path, resamples=20)
    assert (tmp_path / "report.html").read_text() == page


def test_without_matplotlib_the_other_reports_are_written_and_it_says_so(
    task: Task, vlm: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmefficient.evaluation.runner.find_spec", lambda name: None)
    with pytest.warns(UserWarning, match=r"report.html was not written: its plots need matplotlib"):
        run_eval(task, [PLAN], vlm, limit=3, out=tmp_path, resamples=5, baselines=False)
    assert {path.name for path in tmp_path.glob("report.*")} == {"report.json", "report.md"}


def test_a_report_with_undefined_numbers_and_no_baselines_is_drawn(task: Task, vlm: VLM, tmp_path: Path) -> None:
    run_eval(task, [PLAN], vlm, kinds=["existence"], limit=1, out=tmp_path, resamples=5, baselines=False)
    assert "<svg" in (tmp_path / "report.html").read_text()


def test_the_front_holds_what_nothing_beats() -> None:
    points = [(4.0, 9.0), (1.0, 2.0), (1.0, 3.0), (2.0, 2.5), (3.0, 8.0), (5.0, 8.5)]
    assert pareto(points, lower=False) == [(1.0, 3.0), (3.0, 8.0), (4.0, 9.0)]
    assert pareto(points, lower=True) == [(1.0, 2.0)]


def answers(records: Sequence[Record], wrong: set[str]) -> list[Answer]:
    return [
        Answer(record.id, "?" if record.id in wrong else record.truth[0], False, [4], 16, 1, 1, {"prefill": 1})
        for record in records
    ]


def test_the_worst_regressions_come_from_all_kinds_the_worst_first(task: Task) -> None:
    records = task.records(["existence", "colour"], None)
    before, after = answers(records, {"c0"}), answers(records, {"c1", "c2", "c3", "c4", "c5", "e0", "e2"})
    found = worst(task, records, before, after)
    assert [lost["id"] for lost in found] == ["c1", "e0", "c2", "e2", "c3", "c4"]
    assert len(found) == SHOWN
    assert found[0] == {
        "id": "c1",
        "kind": "colour",
        "question": "Which colour?",
        "truth": ["red", "dark red"],
        "before": "red",
        "after": "?",
    }
    runs = [PlanRun("none", before), PlanRun("p", after), PlanRun("r", after)]
    report = build(task, records, runs, settings={"digest": "d"}, environment={}, resamples=5, seed=0, tested=2)
    assert [len(plan["regressions"]) for plan in report["plans"]] == [0, 6, 0]
