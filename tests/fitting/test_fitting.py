"""Measuring and training profiles: a few steps on a tiny model, and what the results are used for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from typer.testing import CliRunner

from mmefficient import environment, profiles
from mmefficient.fitting.__main__ import app
from mmefficient.fitting.dyvte import Gates, label
from mmefficient.fitting.exit import divergences
from mmefficient.fitting.scenes import ASKED, IGNORE, Prompts, batches, model_inputs
from mmefficient.fitting.urag import Head
from mmefficient.loading import load
from mmefficient.models import reference
from mmefficient.models.reference.scenes.catalogue import OBJECTS
from mmefficient.plan import Plan
from mmefficient.profiles import Checkpoint, Profile
from tests import tiny

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> tuple[Any, Any]:
    return load(str(checkpoint), device="cpu", dtype="float32", attn_implementation=None)


def test_prompts_are_what_the_chat_template_writes() -> None:
    """Ids of a prompt without its answer, for the embedded model."""
    from transformers import AutoProcessor

    from mmefficient.messages import user_message

    processor = AutoProcessor.from_pretrained(reference.path())
    prompts = Prompts(processor, 3, "here")
    batch = prompts[0]
    picture = reference.sample_picture()
    for row in range(3):
        ids = batch.ids[row][batch.mask[row].bool()]
        end = len(ids) - int(batch.answered[row])
        text = processor.tokenizer.decode(ids[ids != processor.image_token_id])
        question = text.split("\n")[1].split(" ASSISTANT:")[0]
        answer = processor.tokenizer.decode(batch.labels[row][batch.labels[row] != IGNORE], skip_special_tokens=True)
        assert text.endswith(answer)
        stock = processor.apply_chat_template(
            [user_message([str(picture)], question)],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        assert stock["input_ids"][0].tolist() == ids[:end].tolist()
        index, used = batch.question(processor.image_token_id)
        asked = batch.ids[row][index[row][used[row]]]
        assert processor.tokenizer.decode(asked) == f"\n{question} ASSISTANT:"
        assert ASKED[int(batch.kinds[row])]
    again = prompts[0]
    assert torch.equal(again.ids, batch.ids)
    assert not torch.equal(Prompts(processor, 3, "there")[0].ids, batch.ids)


def test_pages_hold_what_is_asked_about_once(loaded: tuple[Any, Any]) -> None:
    prompts = Prompts(loaded[1], 1, "pages", pages=4)
    from mmefficient.models.reference.scenes.sample import Dice

    for seed in range(5):
        scenes, page, kind, question, _ = prompts._draw(Dice(f"seed/{seed}"))
        named = {c for c in range(len(OBJECTS)) if OBJECTS[c].name in question or OBJECTS[c].plural in question}
        on = [i for i, scene in enumerate(scenes) if named & set(scenes[page].classes) & set(scene.classes)]
        assert on == [page], (kind, question)


def test_labels() -> None:
    labels = torch.tensor([[IGNORE, 1, 2]] * 4)
    full = torch.zeros(4, 3, 5)
    full[:, 1, 1] = full[:, 2, 2] = 9.0
    short = full.clone()
    short[1, 0, 3] = 50.0  # nothing is answered there
    short[2, 2, 4] = 50.0  # another token
    short[3, 2] /= 3  # the same tokens, less sure
    assert label(full, short, labels).tolist() == [True, True, False, False]


@torch.no_grad()
def test_gates_see_and_learn_what_the_plan_does(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    gates = Gates(model, processor)
    [batch] = batches(Prompts(processor, 4, "gates"), 0, 1, 0, CPU)
    z, may = gates.examine(batch)
    assert z.shape == (tiny.LAYERS - 1, 4, 64)
    logits = gates.logits(z)
    for row in range(4):  # one prompt, without its answer
        start, end = int((batch.mask[row] == 0).sum()), batch.ids.shape[1] - int(batch.answered[row])
        inputs = model_inputs(model, processor, batch)
        alone = {
            "input_ids": batch.ids[row : row + 1, start:end],
            "pixel_values": inputs["pixel_values"][row : row + 1],
        }
        _, used = batch.question(tiny.IMAGE)
        states: list[torch.Tensor] = []
        for layer in range(1, tiny.LAYERS):
            handle = (
                model.get_decoder()
                .layers[layer]
                .register_forward_pre_hook(lambda _, args, states=states: states.append(args[0]))
            )
            model(**alone)
            handle.remove()
        count = int(used[row].sum())
        for layer, state in enumerate(states):
            asked = state[0, -count:]
            expected = torch.cat([asked[:-1].mean(0), asked[-1]])
            torch.testing.assert_close(z[layer, row], expected, rtol=0, atol=1e-5)
    full = model(**inputs, logits_to_keep=batch.labels.shape[1]).logits
    with Plan("exit(layer=2)").apply(model):
        short = model(**inputs, logits_to_keep=batch.labels.shape[1]).logits
    assert torch.equal(may[1], label(full, short, batch.labels))
    found = gates.calibrate(Prompts(processor, 4, "gates"), 2, target=0.0)
    assert found["questions"] == 8
    assert found["chosen"]["changed"] == 0 or found["chosen"]["bias"] == -10
    assert logits.shape == may.shape


def run(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(each) for each in arguments], catch_exceptions=False)
    assert done.exit_code == 0
    return done.output


def test_training_goes_on_where_it_stopped_and_makes_a_profile(checkpoint: Path, tmp_path: Path) -> None:
    common = ("--model", checkpoint, "--device", "cpu", "--rows", 3, "--checks", 1, "--workers", 0)
    for method, more in (("dyvte", ()), ("urag", ("--pages", 2, "--layer", 2))):
        whole, parts = tmp_path / f"{method}-whole", tmp_path / f"{method}-parts"
        assert "wrote" in run(method, "--out", whole, "--steps", 4, *common, *more)
        assert "time is up" in run(method, "--out", parts, "--steps", 4, "--minutes", 0, *common, *more)
        assert "wrote" in run(method, "--out", parts, "--steps", 4, *common, *more)
        one, two = (Profile.read(folder / f"{method}-fitted.json") for folder in (whole, parts))
        assert one.facts == two.facts
        for name, values in one.tensors(CPU, torch.float32).items():
            assert torch.equal(values, two.tensors(CPU, torch.float32)[name])
        assert one.made["command"] == environment.command()
        assert [json.loads(line)["step"] for line in (whole / "log.jsonl").read_text().splitlines()] == [4]
        field = "gates" if method == "dyvte" else "head"
        model = tiny.build("llava")
        with Plan(f"{method}({field}='{one.path}')").apply(model), torch.no_grad():
            model(**tiny.ragged_batch("llava"))


@torch.no_grad()
def test_head_scores_are_those_of_the_plan(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = loaded
    head = Head(model, processor, layer=2)
    [batch] = batches(Prompts(processor, 3, "head", pages=3), 0, 1, 0, CPU)
    scores = head.scores(batch)
    tensors = {name: x.detach() for name, x in head.parameters.items()}
    Profile("urag", "any", {"layer": 2}, {}).write(tmp_path / "urag-x.json", tensors)
    for row in range(3):
        start, end = int((batch.mask[row] == 0).sum()), batch.ids.shape[1] - int(batch.answered[row])
        pixels = model_inputs(model, processor, batch)["pixel_values"][row * 3 : row * 3 + 3]
        with Plan(f"urag(keep=1,head='{tmp_path}/urag-x.json')").apply(model) as run_:
            model(input_ids=batch.ids[row : row + 1, start:end], pixel_values=pixels)
        kept = run_.report().kept(0, 2)
        assert kept.tolist() == list(range(16 * int(scores[row].argmax()), 16 * int(scores[row].argmax()) + 16))


@torch.no_grad()
def test_divergences_equal_the_slow_rule(loaded: tuple[Any, Any], checkpoint: Path, tmp_path: Path) -> None:
    model, processor = loaded
    prompts = Prompts(processor, 3, "exit")
    found, batch = divergences(model, processor, prompts, 1), prompts[0]
    expected = [0.0] * (tiny.LAYERS - 1)
    for row in range(3):
        start, end = int((batch.mask[row] == 0).sum()), batch.ids.shape[1] - int(batch.answered[row])
        pixels = model_inputs(model, processor, batch)["pixel_values"][row : row + 1]
        alone = {"input_ids": batch.ids[row : row + 1, start:end], "pixel_values": pixels}
        stock = model(**alone).logits[0, -1].log_softmax(-1)
        for layer in range(1, tiny.LAYERS):
            with Plan(f"exit(layer={layer})").apply(model):
                short = model(**alone).logits[0, -1].log_softmax(-1)
            expected[layer - 1] += float(F.kl_div(short, stock, log_target=True, reduction="sum")) / 3
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-6)
    run("exit", "--model", checkpoint, "--device", "cpu", "--samples", 3, "--rows", 3, "--out", tmp_path)
    facts = Profile.read(tmp_path / "exit-fitted.json").facts
    above = [int(layer) for layer, value in facts["kl"].items() if value > facts["threshold"]]
    assert facts["layer"] == (max(above) + 1 if above else 1)


def test_shipped_profiles_are_those_of_the_embedded_model() -> None:
    model, _ = load("reference", device="cpu", dtype="float32", attn_implementation=None)
    own = Checkpoint(model, len(model.get_decoder().layers))
    shipped = [Profile.read(path) for path in sorted(Path(profiles.__file__).parent.glob("*-reference.json"))]
    assert shipped
    for profile in shipped:
        assert profile.weights == own.weights
        assert own.profile(profile.kind) == profile
        assert profile.made["commit"]
    with Plan("urag(keep=1,head=auto)").apply(model):
        pass
