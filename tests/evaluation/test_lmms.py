"""lmms-eval's plug-in, on a local task with local pictures. Needs the extra `lmms`."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import textwrap
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmefficient.errors import InputError
from mmefficient.vlm import VLM
from tests.evaluation.test_processes import LAUNCH

pytest.importorskip("lmms_eval")
PLAN = "random(keep=0.5,seed=3)"
ENTRY = EntryPoint("mmefficient", "mmefficient.evaluation.lmms:manifest", "lmms_eval.models")
QUESTIONS = ["is there a dog", "what is left", "are there an cat", "how many cats", "is it right"]


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A task of five questions, one without a picture, in lmms-eval's own format."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = []
    for i, question in enumerate(QUESTIONS):
        Image.new("RGB", (20 + i, 24), (40 * i, 90, 250 - 50 * i)).save(folder / f"{i}.png")
        rows.append({"question": question, "picture": "" if i == 4 else str(folder / f"{i}.png"), "answer": "yes"})
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "utils.py").write_text(
        textwrap.dedent(
            """
            from PIL import Image

            def to_visual(doc):
                return [Image.open(doc["picture"]).convert("RGB")] if doc["picture"] else []

            def to_text(doc, lmms_eval_specific_kwargs=None):
                return doc["question"]

            def process(doc, results):
                return {"exact": float(results[0].strip() == doc["answer"])}
            """
        )
    )
    (folder / "local.yaml").write_text(
        textwrap.dedent(
            f"""
            task: local
            dataset_path: json
            dataset_kwargs:
              data_files: {{test: {folder / "data.jsonl"}}}
            test_split: test
            output_type: generate_until
            doc_to_visual: !function utils.to_visual
            doc_to_text: !function utils.to_text
            doc_to_target: answer
            generation_kwargs: {{max_new_tokens: 5, temperature: 0, do_sample: false, until: ["w99"]}}
            process_results: !function utils.process
            metric_list: [{{metric: exact, aggregation: mean, higher_is_better: true}}]
            """
        )
    )
    return folder


def test_the_package_declares_the_plug_in() -> None:
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    declared = [entry for entry in entry_points(group="lmms_eval.models") if entry.name == ENTRY.name]
    assert {entry.value for entry in declared} <= {ENTRY.value}
    registry = ModelRegistryV2()
    registry.register_manifest(ENTRY.load()())
    assert registry.get_model_class("mmefficient").__name__ == "MMEfficient"


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_local_task_runs_under_a_plan(
    batch_size: int, tasks: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmms_eval import evaluator, models
    from lmms_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    models.MODEL_REGISTRY_V2.register_manifest(ENTRY.load()(), overwrite=True)
    log = tmp_path / "log.jsonl"
    results = evaluator.simple_evaluate(
        model="mmefficient",
        model_args=f"pretrained={checkpoint},plan='{PLAN}',log={log},dtype=float32",
        tasks=["local"],
        batch_size=batch_size,
        device="cpu",
        task_manager=TaskManager("ERROR", include_path=str(tasks), model_name="mmefficient"),
        log_samples=True,
        bootstrap_iters=0,
    )
    assert "exact,none" in results["results"]["local"]
    samples = sorted(results["samples"]["local"], key=lambda sample: sample["doc_id"])
    vlm = VLM.from_pretrained(checkpoint, device="cpu", dtype="float32")
    for i, (sample, question) in enumerate(zip(samples, QUESTIONS, strict=True)):
        image = None if i == 4 else Image.open(tasks / f"{i}.png")
        expected = vlm.ask(image, question, plan="none" if image is None else PLAN, max_new_tokens=5).text
        assert sample["filtered_resps"][0] == expected
    lines = {line["doc_id"]: line for line in map(json.loads, log.read_text().splitlines())}
    assert [lines[i]["plan"] for i in range(5)] == [*[PLAN] * 4, "none"]
    assert set(lines[0]["kept_per_layer"]) == {lines[0]["visual_total"] // 2}
    assert lines[0]["stages_ms"].keys() == {"preprocess", "vision", "prefill", "decode"}
    assert lines[0]["prefill_flops"] < lines[0]["prefill_flops_without_plan"]


@pytest.mark.timeout(600)
@pytest.mark.skipif(ENTRY not in entry_points(group="lmms_eval.models"), reason="an older installation is in the way")
def test_two_processes_answer_like_one(tasks: Path, checkpoint: Path, tmp_path: Path) -> None:
    def answers(name: str, *launch: str) -> dict[int, Any]:
        arguments = f"pretrained={checkpoint},plan='{PLAN}',dtype=float32"
        command = [sys.executable, *launch, "-m", "lmms_eval", "--model", "mmefficient", "--model_args", arguments]
        command += ["--tasks", "local", "--include_path", str(tasks), "--device", "cpu", "--log_samples"]
        quiet = {
            "HF_HOME": str(tmp_path / "hub"),
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        }
        command += ["--batch_size", "1", "--output_path", str(tmp_path / name)]
        subprocess.run(command, env=os.environ | quiet, check=True, capture_output=True, timeout=280)
        (samples,) = (tmp_path / name).rglob("*_samples_local.jsonl")
        lines = [json.loads(line) for line in samples.read_text().splitlines()]
        assert sorted(line["doc_id"] for line in lines) == list(range(len(QUESTIONS)))
        return {line["doc_id"]: line["filtered_resps"] for line in lines}

    assert answers("two", *LAUNCH, "--main_process_port", str(random.randint(20000, 60000))) == answers("one")


@pytest.mark.parametrize(
    ("settings", "options", "stops"),
    [
        ({}, {"max_new_tokens": 1024, "do_sample": False}, []),
        ({"temperature": 0, "until": "\n"}, {"max_new_tokens": 1024, "do_sample": False}, ["\n"]),
        (
            {"temperature": 0.2, "max_new_tokens": 3, "image_aspect_ratio": "pad"},
            {"temperature": 0.2, "max_new_tokens": 3, "do_sample": True},
            [],
        ),
    ],
)
def test_settings_of_a_task(settings: dict[str, Any], options: dict[str, Any], stops: list[str]) -> None:
    from mmefficient.evaluation.lmms import _options

    found, until = _options(settings)
    assert ({name: found.get(name) for name in options}, until) == (options, stops)
    assert "image_aspect_ratio" not in found


def test_text_ends_at_the_first_stop_string() -> None:
    from mmefficient.evaluation.lmms import _until

    assert _until("one\ntwo;three", [";", "\n", "", "four"]) == "one"


def test_a_mistyped_argument_is_refused(checkpoint: Path) -> None:
    from mmefficient.evaluation.lmms import MMEfficient

    with pytest.raises(InputError, match="no argument 'plam'"):
        MMEfficient(pretrained=str(checkpoint), plam="x")
