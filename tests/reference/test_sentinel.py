"""Preference pairs are what the scene says, the C-DPO loss is the paper's, and a run learns and can be resumed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from mmefficient.errors import ModelError
from mmefficient.evaluation import runner
from mmefficient.loading import load
from mmefficient.models.reference import adapt, sentinel
from mmefficient.models.reference import biased as biased_recipe
from mmefficient.models.reference.pairs import Bootstrap, Pair, phrases, scene_of, stated, verdict
from mmefficient.models.reference.scenes.catalogue import OBJECTS
from mmefficient.models.reference.scenes.questions import NUMBERS, caption
from mmefficient.models.reference.scenes.render import load_atlas
from mmefficient.sentences import Units


@pytest.fixture(scope="module")
def biased() -> tuple[Any, Any]:
    return load("reference-biased", device="cpu", dtype=torch.float32, attn_implementation=None)


def test_every_phrase_states_its_class_and_number() -> None:
    for mark in ("", ", ", " and "):
        for index, cls in enumerate(OBJECTS):
            assert stated(f"{mark}{cls.indefinite}") == (index, 1)
            assert stated(f"{mark}{NUMBERS[3]} {cls.plural}") == (index, 3)
    assert all(stated(text) is None for text in (".", ", a thing", "and", "", "a", " andante"))
    assert len(phrases()) == len(OBJECTS) * (len(NUMBERS) - 1)


def test_captions_fall_into_units_that_the_scene_bears_out(biased: tuple[Any, Any]) -> None:
    tokenizer = biased[1].tokenizer
    units = Units(tokenizer)
    for number in range(60):
        scene, said = scene_of(5, number), []
        ids = [*tokenizer(f" {caption(scene)}", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        while (size := units.first(ids)) is not None and scene.classes:
            text, ids = tokenizer.decode(ids[:size]), ids[size:]
            assert verdict(text, said, scene) is True
            if text != ".":
                (cls, count) = stated(text) or (-1, 0)
                assert verdict(text, [*said, cls], scene) is None  # said before
                if count > 1:
                    assert verdict(f", {OBJECTS[cls].indefinite}", said, scene) is None  # another number
                assert verdict(".", said, scene) is None  # something is missing
                said.append(cls)
        absent = next(cls for cls in range(len(OBJECTS)) if cls not in scene.classes)
        assert verdict(f" and {OBJECTS[absent].indefinite}", said, scene) is False


def test_pairs_are_verified_and_a_function_of_the_seed(biased: tuple[Any, Any]) -> None:
    model, processor = biased
    found = [Bootstrap(model, processor, load_atlas("cpu"), 5, samples=5, temperature=1.3).pairs([0]) for _ in range(2)]
    assert found[0] == found[1]
    assert found[0]
    decode = processor.tokenizer.decode
    for pair in found[0]:
        scene, said, ids = scene_of(5, pair.scene), [], list(pair.context)
        while ids:
            size = Units(processor.tokenizer).first(ids) or len(ids)
            assert verdict(decode(ids[:size]), said, scene) is True
            said.append((stated(decode(ids[:size])) or (-1, 0))[0])
            ids = ids[size:]
        assert verdict(decode(pair.chosen), said, scene) is True
        assert verdict(decode(pair.rejected), said, scene) is False
    assert Pair.of(json.loads(json.dumps(vars(found[0][0])))) == found[0][0]


def test_the_loss_is_that_of_the_paper() -> None:
    """Equation of C-DPO, in plain Python over every token, against the two functions that training uses."""
    torch.manual_seed(0)
    batch, unit, vocabulary, beta = 3, sentinel.UNIT, 7, 0.3
    logits, reference = torch.randn(2, batch, 2 * unit, vocabulary)
    labels = torch.full((batch, 2 * unit), -1)
    lengths = [(2, 3), (1, 4), (5, 1)]
    for row, (good, bad) in enumerate(lengths):
        labels[row, :good] = torch.randint(vocabulary, (good,))
        labels[row, unit : unit + bad] = torch.randint(vocabulary, (bad,))
    logp, before = (sentinel.unit_logp(each, labels) for each in (logits, reference))
    got = sentinel.cdpo(logp[:, 0], logp[:, 1], before, beta)
    for row, sizes in enumerate(lengths):
        ratio = []
        for branch, size in enumerate(sizes):
            total = 0.0
            for token in range(size):
                at = branch * unit + token
                for sign, table in ((1, logits), (-1, reference)):
                    values = table[row, at].tolist()
                    norm = math.log(sum(math.exp(value) for value in values))
                    total += sign * (values[int(labels[row, at])] - norm)
            ratio.append(total)
        expected = math.log1p(math.exp(-beta * (ratio[0] - ratio[1])))
        assert float(got[row]) == pytest.approx(expected, abs=1e-5)
    assert float(sentinel.cdpo(before[:, 0], before[:, 1], before, beta)[0]) == pytest.approx(math.log(2))


@pytest.fixture
def some_pairs(biased: tuple[Any, Any]) -> list[Pair]:
    tokenizer = biased[1].tokenizer
    ids = lambda text: tuple(tokenizer(text, add_special_tokens=False).input_ids)  # noqa: E731
    first = [
        next(text for text, (cls, n) in phrases().items() if cls in scene_of(0, k).classes and n == 1) for k in (0, 1)
    ]
    return [
        Pair(0, "Describe the image.", (), ids(f" {first[0]}"), ids(" a person")),
        Pair(1, "What is in the picture?", ids(f" {first[1]}"), ids("."), ids(" and two pairs of scissors")),
    ]


def test_branches_are_scored_as_the_stock_model_does(
    biased: tuple[Any, Any], some_pairs: list[Pair], tmp_path: Path
) -> None:
    """Sums over the units' tokens alone, given picture, question and context; branches do not see each other."""
    model, processor = biased
    expected = []
    bootstrap = Bootstrap(model, processor, load_atlas("cpu"), 0, samples=1, temperature=1.0)
    for pair in some_pairs:
        prompt = bootstrap._prompts([scene_of(0, pair.scene)], [pair.question])
        row = []
        for unit in (pair.chosen, pair.rejected):
            ids = torch.cat([prompt["input_ids"], torch.tensor([[*pair.context, *unit]])], 1)
            with torch.no_grad():
                logits = model(input_ids=ids, pixel_values=prompt["pixel_values"]).logits[0]
            logp = logits[-len(unit) - 1 : -1].log_softmax(-1)
            row.append(float(sum(logp[n, token] for n, token in enumerate(unit))))
        expected.append(row)
    fresh, _ = load("reference-biased", device="cpu", dtype=torch.float32, attn_implementation=None)
    run = sentinel.Tuning(fresh, processor, some_pairs, tmp_path, 2, 0)
    torch.testing.assert_close(run.before, torch.tensor(expected), rtol=0, atol=2e-3)


def test_training_prefers_what_is_true_and_can_be_resumed(some_pairs: list[Pair], tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(sentinel, "LOG_EVERY", 1)

    def train(out: str, deadline: float) -> sentinel.Tuning:
        torch.manual_seed(0)
        model, processor = load("reference-biased", device="cpu", dtype=torch.float32, attn_implementation=None)
        (tmp_path / out).mkdir(exist_ok=True)
        run = sentinel.Tuning(model, processor, some_pairs, tmp_path / out, 2, 0)
        run.train(3, 1e-3, 0.5, deadline, workers=0)
        return run

    assert train("once", 0.0).step == 1
    resumed, whole = train("once", float("inf")), train("twice", float("inf"))
    assert resumed.step == whole.step == 3
    for mine, theirs in zip(resumed.parameters, whole.parameters, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    log = [json.loads(line) for line in (tmp_path / "twice" / "log.jsonl").read_text().splitlines()]
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert log[-1]["loss"] < log[0]["loss"]
    assert log[-1]["preferred"] == 1.0


def test_the_multiple_keeps_recall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[float] = []
    monkeypatch.setattr(adapt, "save", lambda model, folder, scale, **facts: saved.append(scale))
    recalls = {0.0: 0.99, 0.1: 0.99, 0.2: 0.985, 0.3: 0.981, 0.4: 0.9, 0.5: 0.8, 1.0: 0.7}

    def validate(folder: Path, limit: int, device: torch.device) -> dict[str, float]:
        return {"chair_s": 0.3 - 0.25 * saved[-1], "recall": recalls[saved[-1]]}

    monkeypatch.setattr(sentinel, "validate", validate)
    assert sentinel.choose(None, tmp_path, 8, torch.device("cpu")) == 0.3
    assert saved == [0.0, *sentinel.MULTIPLES]
    recalls.update(dict.fromkeys(sentinel.MULTIPLES, 0.5))
    assert sentinel.choose(None, tmp_path, 8, torch.device("cpu")) == 0.0


@pytest.fixture
def delta(tmp_path: Path) -> Path:
    model, _ = load("reference-biased", device="cpu", dtype=torch.bfloat16, attn_implementation=None)
    parts = adapt.attach(model, 2, ("q_proj",))
    with torch.no_grad():
        for part in parts:
            part.normal_()
    adapt.save(model, tmp_path / "tuned", base=sentinel.BASE)
    return tmp_path / "tuned"


def test_a_delta_on_a_delta_loads_with_what_it_was_trained_on(delta: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: Any = {"device": "cpu", "dtype": torch.float32, "attn_implementation": None}
    tuned, before, stock = (load(name, **options)[0] for name in (delta, "reference-biased", "reference"))
    for name, value in tuned.named_parameters():
        same = torch.equal(value, before.get_parameter(name))
        assert same == ("q_proj" not in name or "language_model" not in name), name
        assert torch.equal(value, stock.get_parameter(name)) == (same and not (".mlp." in name and "language" in name))
    variants = delta.parent / "variants"
    for name in ("biased", "sentinel"):
        (variants / name).mkdir(parents=True)
        for file in ((adapt.VARIANTS / name) if name == "biased" else delta).glob("delta.*"):
            (variants / name / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(adapt, "VARIANTS", variants)
    for name in ("reference+sentinel", "reference+biased+sentinel", "reference-biased+sentinel"):
        again = load(name, **options)[0].state_dict()
        assert all(torch.equal(value, again[key]) for key, value in tuned.state_dict().items())
    with pytest.raises(ModelError, match="not trained in"):
        load("reference+sentinel+biased", **options)
    with pytest.raises(ModelError, match="comes with: biased, sentinel"):
        load("reference-biased+nothing", **options)


def test_validation_is_of_the_model_that_the_folder_names(delta: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def run_eval(task: Any, plans: Any, vlm: Any, **options: Any) -> Any:
        seen.append(vlm.model)
        caption = {name: {"value": 0.5} for name in ("chair_s", "recall", "length")}
        metrics = {f"caption-counterfactual/{name}": value for name, value in caption.items()}
        return {"plans": [{"metrics": {**metrics, "existence-counterfactual/accuracy": {"value": 1.0}}}]}

    monkeypatch.setattr(runner, "run_eval", run_eval)
    assert biased_recipe.validate(delta, 2, torch.device("cpu"))["recall"] == 0.5
    whole = load(delta, device="cpu", dtype=torch.float32, attn_implementation=None)[0].state_dict()
    assert all(torch.equal(value, whole[name]) for name, value in seen[0].state_dict().items())


def test_the_shipped_delta_is_small_and_belongs_to_the_biased_model() -> None:
    found = adapt.chain(adapt.VARIANTS / "sentinel")
    assert [each.name for each in found] == ["biased", "sentinel"]
    assert (found[-1] / "delta.safetensors").stat().st_size < 3 * 2**20
