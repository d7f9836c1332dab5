"""The main job on the embedded model: `make run`, as a user meets it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

import mmefficient as mm
from mmefficient.models import reference

ROOT = Path(__file__).parent.parent
PLAN = "fastv(layer=2,keep=0.25)"


@pytest.fixture(scope="module")
def vlm() -> mm.VLM:
    return mm.VLM.from_pretrained("reference", device="cpu")


def test_it_is_a_stock_llava_with_576_visual_tokens(vlm: mm.VLM) -> None:
    assert type(AutoModelForImageTextToText.from_pretrained(reference.path())) is LlavaForConditionalGeneration
    assert type(AutoProcessor.from_pretrained(reference.path())) is LlavaProcessor
    text = vlm.model.config.get_text_config()
    assert text.num_hidden_layers >= 12
    assert text.num_attention_heads >= 8
    assert vlm.model.dtype == torch.float32
    assert vlm.ask(reference.sample_picture(), "Describe the image.").report.rows[0].visual_total == 576


def test_the_weights_stay_small() -> None:
    shards = [path.stat().st_size for path in reference.path().glob("*.safetensors")]
    assert max(shards) <= 15e6
    assert sum(shards) <= 30e6


@pytest.mark.parametrize("plan", ["none", PLAN])
def test_it_sees_the_bundled_picture(vlm: mm.VLM, plan: str) -> None:
    caption = vlm.ask(reference.sample_picture(), "Describe the image.", plan=plan).text
    for name in ("rabbit", "frog", "broccoli"):
        assert name in caption
    questions = {"How many rabbits are there?": "4", "Is there a frog in the image?": "yes", "Is there a bus?": "no"}
    answers = vlm.ask_batch([(reference.sample_picture(), question) for question in questions], plan=plan)
    assert [answer.text for answer in answers] == list(questions.values())


def test_the_plan_keeps_a_quarter_from_layer_two_on(vlm: mm.VLM) -> None:
    report = vlm.ask(reference.sample_picture(), "Describe the image.", plan=PLAN).report
    assert report.rows[0].kept_per_layer == [576] * 2 + [144] * (len(report.rows[0].kept_per_layer) - 2)


def test_ask_prints_one_json_object(tmp_path: Path) -> None:
    command = [Path(sys.executable).parent / "mmefficient", "ask", "sample", "Describe the image.", "--json"]
    done = subprocess.run([*command, "--plan", PLAN], cwd=tmp_path, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert {"answer", "visual_tokens", "stages_ms"} <= set(found)
    assert done.stderr == ""


def test_make_run_shows_both_answers_and_the_stages() -> None:
    planned = subprocess.run(["make", "-n", "run"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (line,) = [line for line in planned.splitlines() if " ask " in line]
    command = f"{Path(sys.executable).parent / 'mmefficient'} ask {line.split(' ask ', 1)[1]}"
    out = subprocess.run(command, shell=True, capture_output=True, text=True, check=True).stdout
    for part in ("no plan: four rabbits", f"{PLAN}: 576 visual tokens; 576 in layers 0-1, 144 in", "vision tower"):
        assert part in out
