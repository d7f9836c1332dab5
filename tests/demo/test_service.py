"""What the demo computes."""

from __future__ import annotations

import io
import itertools
import shlex

import pytest
from PIL import Image

import mmefficient as mm
from mmefficient.bench.timers import STAGES
from mmefficient.demo import service as demo_service
from mmefficient.demo import uploads, views
from mmefficient.errors import InputError, PlanError
from mmefficient.models import reference


@pytest.fixture(scope="module")
def service() -> demo_service.Service:
    return demo_service.Service({"reference": mm.VLM.from_pretrained("reference", device="cpu")})


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.open(reference.sample_picture()).convert("RGB")


def test_measured_answers_are_those_of_ask(service: demo_service.Service, picture: Image.Image) -> None:
    plan = "fastv(layer=2,keep=0.25)"
    none, pruned = service.measure("reference", picture, "How many eggs are there?", ["none", plan])
    vlm = service.model("reference")
    assert none.text == vlm.ask(picture, "How many eggs are there?").text
    assert pruned.text == vlm.ask(picture, "How many eggs are there?", plan=plan).text
    assert set(pruned.stages_ms) == set(STAGES)
    assert pruned.repeats == demo_service.REPEATS
    assert none.realised is None
    assert pruned.realised is not None
    # 12 layers x 2 x 8 heads x 32 x 4 bytes for every prompt token; FastV drops 432 of them from layer 2 on
    per_token = 2 * 8 * 32 * 4
    assert none.kv_bytes - pruned.kv_bytes == 10 * 432 * per_token
    assert none.kv_bytes % (12 * per_token) == 0


def test_the_answer_grows(service: demo_service.Service, picture: Image.Image) -> None:
    pieces = list(service.stream("reference", picture, "Describe the image.", "none"))
    assert len(pieces) > 2
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(pieces))
    assert pieces[-1] == service.model("reference").ask(picture, "Describe the image.").text


def test_only_given_models_and_whole_inputs_are_taken(service: demo_service.Service, picture: Image.Image) -> None:
    with pytest.raises(InputError, match="serves reference"):
        service.model("../../etc")
    with pytest.raises(InputError, match="picture"):
        service.measure("reference", None, "What?", ["none"])
    with pytest.raises(InputError, match="question"):
        service.measure("reference", picture, "  ", ["none"])
    with pytest.raises(InputError, match="characters"):
        service.measure("reference", picture, "a" * 3000, ["none"])


def test_every_preset_answers(service: demo_service.Service) -> None:
    presets = service.presets("reference")
    assert presets[0] == "none"
    names = {each.partition("(")[0] for each in presets[1:]}
    assert {"fastv", "visionzip", "exit", "random"} <= names
    picture = Image.open(reference.sample_picture())
    for plan in presets:
        assert list(service.stream("reference", picture, "Is there a frog?", plan))[-1], plan


def test_plans_are_put_together_and_explained(service: demo_service.Service) -> None:
    model = service.model("reference")
    plan = demo_service.add_method("none", "fastv", {"layer": "2", "keep": "0.25"})
    assert plan == "fastv(layer=2,keep=0.25)"
    assert demo_service.add_method(plan, "exit", {"layer": "8"}) == plan + "+exit(layer=8)"
    assert demo_service.add_method("none", "fastv", {"layer": "", "keep": ""}) == str(mm.Plan("fastv()"))
    with pytest.raises(PlanError, match="outside"):
        demo_service.add_method("none", "fastv", {"keep": "1.5"})
    assert demo_service.explain(plan, model) is None
    assert "layers 0 to 11" in str(demo_service.explain("exit(layer=40)", model))
    assert "did you mean 'fastv'" in str(demo_service.explain("fastvv(layer=2)", model))
    assert demo_service.explain("icd(role='You are blind.')", model) is None
    assert "are allowed" in str(demo_service.explain(f"icd(role={'a' * 5000})", model))
    assert any(preset.startswith("icd(") for preset in service.presets("reference"))


def test_nothing_is_fetched_for_the_choice_of_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmefficient.matchers._load", lambda name: pytest.fail(f"asked for {name}"))
    service = demo_service.Service({"reference": mm.VLM.from_pretrained("reference", device="cpu")})
    assert any("matcher=words" in plan for plan in service.presets("reference"))


@pytest.mark.parametrize(
    "plan",
    ["dyvte(gates='/etc/passwd')", "urag(head='/etc/hostname')", "trim(matcher='someone/model')", "cdpruner(keep=0.5)"],
)
def test_a_plan_leads_to_no_file_and_no_model(
    service: demo_service.Service, picture: Image.Image, plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmefficient.matchers._load", lambda name: pytest.fail(f"asked for {name}"))
    with pytest.raises(PlanError, match="does not serve"):
        service.measure("reference", picture, "What?", ["none", plan])
    with pytest.raises(PlanError, match="does not serve"):
        next(service.stream("reference", picture, "What?", plan))
    assert "does not serve" in str(demo_service.explain(plan, service.model("reference")))


def test_a_warm_measurement_asks_no_more_than_it_reports(
    service: demo_service.Service, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm, asked = service.model("reference"), []
    ask = vlm.ask
    monkeypatch.setattr(vlm, "ask", lambda *args, **options: asked.append(options["plan"]) or ask(*args, **options))
    service.measure("reference", picture, "Is there a frog?", ["none", "exit(layer=6)"], repeats=2, warm=True)
    assert [str(plan) for plan in asked] == 2 * ["none", "exit(layer=6)"]
    service.measure("reference", picture, "Is there a frog?", ["none"], repeats=1)
    assert len(asked) == 6


def test_policy_files_come_back_as_the_plan() -> None:
    plan = "fastv(layer=2,keep=0.25)+exit(layer=8)"
    assert demo_service.read_policy(demo_service.policy(plan).encode()) == plan
    for broken in (b"", b"\xff", b"[]", b"{}", b'{"methods": [3]}', b'{"methods": [{"name": "nothing"}]}'):
        with pytest.raises(PlanError):
            demo_service.read_policy(broken)


def test_snippets_hold_what_needs_quotes() -> None:
    plan = str(mm.Plan("icd(role='You are blind.')"))
    _, line = demo_service.snippets(plan, "a folder/model")
    assert shlex.split(line)[-4:] == ["--model", "a folder/model", "--plan", plan]


def test_snippets_run_as_they_stand() -> None:
    python, line = demo_service.snippets("fastv(layer=2,keep=0.25)", "reference")
    compile(python, "snippet", "exec")
    assert "plan='fastv(layer=2,keep=0.25)'" in python
    assert line.endswith("--plan 'fastv(layer=2,keep=0.25)'")


def encoded(picture: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return buffer.getvalue()


def test_uploads_are_read_by_content() -> None:
    wide = Image.new("RGB", (3000, 1000), "red")
    for kind in ("PNG", "JPEG", "WEBP"):
        assert uploads.read_picture(encoded(wide, kind)).size == (uploads.SIDE, uploads.SIDE // 3)
    bomb = encoded(Image.new("1", (9000, 9000)), "PNG")
    assert len(bomb) < 2**20
    refused = {
        b"": "not a picture",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>": "not a picture",
        encoded(wide, "PDF"): "not a picture",
        encoded(wide, "PNG")[:200]: "image",
        bomb: "million pixels",
        b"x" * (uploads.MAX_BYTES + 1): "MiB",
    }
    for data, why in refused.items():
        with pytest.raises(InputError, match=why):
            uploads.read_picture(data)


def test_what_is_shown_is_escaped(service: demo_service.Service, picture: Image.Image) -> None:
    (one,) = service.measure("reference", picture, "Is there a frog?", ["none"])
    evil = demo_service.dataclasses.replace(one, text="<script>alert(1)</script>")
    for shown in (views.comparison([evil]), views.scatter([evil])):
        assert "<script" not in shown
    assert "visual tokens" in views.cost(one, one.total_ms)
