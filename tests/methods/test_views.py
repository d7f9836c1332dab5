"""Views against two stock models, each reading everything again at every step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from mmefficient.errors import InputError, ModelError, PlanError
from mmefficient.matchers import Matcher, Seen, register
from mmefficient.methods.views.agla import AGLA
from mmefficient.methods.views.vcd import VCD
from mmefficient.plan import Plan
from mmefficient.view import repeated
from tests import tiny
from tests.executor.oracle import GREEDY, decoder_inputs, image_columns, logits

STEPS = 9


def noisy(pixels: torch.Tensor, step: int) -> torch.Tensor:
    """VCD's picture, as the paper and its released schedule have it."""
    betas = torch.sigmoid(torch.linspace(-6, 6, 1000)) * (0.5e-2 - 1e-5) + 1e-5
    kept = torch.cumprod(1 - betas, 0)[step]
    noise = torch.randn(pixels.shape[1:], generator=torch.Generator().manual_seed(0))
    return kept.sqrt() * pixels + (1 - kept).sqrt() * noise


@torch.no_grad()
def reading_again(model: Any, batch: dict[str, Any], new: torch.Tensor) -> torch.Tensor:
    """Stock logits of every step, without a cache; [steps, B, V]."""
    steps = []
    for step in range(new.shape[1]):
        ids = torch.cat([batch["input_ids"], new[:, :step]], 1)
        mask = torch.cat([batch["attention_mask"], torch.ones_like(new[:, :step])], 1)
        position = (mask.cumsum(1) - 1).clamp(min=0)
        out = model(**{**batch, "input_ids": ids, "attention_mask": mask}, position_ids=position, use_cache=False)
        steps.append(out.logits[:, -1])
    return torch.stack(steps)


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_vcd_equals_two_streams_read_again(family: str) -> None:
    model, batch = tiny.build(family), tiny.ragged_batch(family)
    with Plan("vcd(alpha=0.8,beta=0.2,step=700)").apply(model):
        out = model.generate(**batch, **{**GREEDY, "max_new_tokens": STEPS})
    new = out.sequences[:, batch["input_ids"].shape[1] :]
    own = reading_again(model, batch, new)
    other = reading_again(model, {**batch, "pixel_values": noisy(batch["pixel_values"], 700)}, new)
    expected = (1 + 0.8) * own - 0.8 * other
    expected[own < own.amax(-1, keepdim=True) + math.log(0.2)] = -math.inf
    torch.testing.assert_close(torch.stack(out.logits), expected, rtol=0, atol=1e-5)


class Letters:
    """A tokenizer of one token per letter."""

    bos_token_id = None

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [20 + ord(letter) % 30 for letter in text]}


@pytest.mark.parametrize("bos", [False, True])
def test_icd_equals_two_streams_read_again(bos: bool) -> None:
    model, batch, tokenizer = tiny.build("llava"), tiny.ragged_batch("llava"), Letters()
    start = batch["attention_mask"].argmax(1)
    if bos:
        tokenizer.bos_token_id = 9
        batch["input_ids"][torch.arange(len(start)), start] = 9
    with Plan("icd(alpha=0.8,beta=0.2,role='fuzzy')").apply(model, tokenizer=tokenizer):
        out = model.generate(**batch, **{**GREEDY, "max_new_tokens": STEPS})
    new = out.sequences[:, batch["input_ids"].shape[1] :]
    front = torch.tensor(tokenizer("fuzzy", add_special_tokens=False)["input_ids"])
    longer, rows, masks = dict(batch), [], []
    for ids, mask, at in zip(batch["input_ids"], batch["attention_mask"], start, strict=True):
        place = int(at) + bos
        rows.append(torch.cat([ids[:place], front, ids[place:]]))
        masks.append(torch.cat([mask[:place], torch.ones_like(front), mask[place:]]))
    longer["input_ids"], longer["attention_mask"] = torch.stack(rows), torch.stack(masks)
    own, other = reading_again(model, batch, new), reading_again(model, longer, new)
    expected = (1 + 0.8) * own - 0.8 * other
    expected[own < own.amax(-1, keepdim=True) + math.log(0.2)] = -math.inf
    torch.testing.assert_close(torch.stack(out.logits), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("early", "layers"), [("low", [0]), ("high", [2]), ("(1,2,3)", [1, 2, 3])])
def test_dola_equals_the_published_algorithm(early: str, layers: list[int]) -> None:
    model, batch = tiny.build("llava"), tiny.ragged_batch("llava")
    with Plan(f"dola(early={early},beta=0.2)").apply(model):
        out = model.generate(**batch, **{**GREEDY, "max_new_tokens": STEPS})
    new = out.sequences[:, batch["input_ids"].shape[1] :]
    chosen = set()
    for step in range(STEPS):
        ids = torch.cat([batch["input_ids"], new[:, :step]], 1)
        mask = torch.cat([batch["attention_mask"], torch.ones_like(new[:, :step])], 1)
        given = {**batch, "input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        with torch.no_grad():
            full = model(**given, use_cache=False, output_hidden_states=True)
            final = full.logits[:, -1].softmax(-1)
            shallow = [
                model.lm_head(model.get_decoder().norm(full.hidden_states[j][:, -1])).softmax(-1) for j in layers
            ]
        for row, p in enumerate(final):
            apart = []
            for q in (each[row] for each in shallow):
                m = (p + q) / 2
                apart.append(float(((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2))
            best = max(range(len(layers)), key=apart.__getitem__)
            chosen.add(best)
            expected = (p / shallow[best][row]).log()
            expected[p < 0.2 * p.max()] = -math.inf
            torch.testing.assert_close(out.logits[step][row], expected, rtol=0, atol=1e-5)
    assert len(layers) == 1 or len(chosen) > 1


def blackened(pixels: torch.Tensor, patches: torch.Tensor, words: list[torch.Tensor], keep: float) -> torch.Tensor:
    """AGLA's picture, pixel by pixel: the share `keep` that the smooth map of cosines ranks highest."""
    found = pixels.clone()
    black = torch.tensor([-m / s for m, s in zip(OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, strict=True)])
    for picture, states in enumerate(patches):
        cosine = torch.stack([torch.cosine_similarity(states, word[None], dim=-1) for word in words[picture]]).amax(0)
        side, size = math.isqrt(len(cosine)), pixels.shape[-1]
        map_ = ((cosine - cosine.min()) / (cosine.max() - cosine.min())).reshape(1, 1, side, side)
        map_ = torch.nn.functional.interpolate(map_, (size, size), mode="bicubic")[0, 0]
        sigma, reach = 0.02 * size, math.ceil(3 * 0.02 * size)
        near = range(-reach, reach + 1)
        weights = [[math.exp(-(x * x + y * y) / (2 * sigma**2)) for x in near] for y in near]
        total, smooth = sum(map(sum, weights)), torch.zeros_like(map_)
        for y in range(size):
            for x in range(size):
                for dy in near:
                    for dx in near:
                        at = min(max(y + dy, 0), size - 1), min(max(x + dx, 0), size - 1)
                        smooth[y, x] += weights[dy + reach][dx + reach] / total * map_[at]
        kept = smooth.flatten().argsort(descending=True)[: round(keep * size * size)]
        away = torch.ones(size * size, dtype=torch.bool)
        away[kept] = False
        found[picture, :, away.reshape(size, size)] = black[:, None]
    return found


def test_agla_equals_two_streams_read_again() -> None:
    model, batch = tiny.build("llava"), tiny.ragged_batch("llava")
    with Plan("agla(alpha=0.8,beta=0.2,keep=0.4)").apply(model):
        out = model.generate(**batch, **{**GREEDY, "max_new_tokens": STEPS})
    new = out.sequences[:, batch["input_ids"].shape[1] :]
    embeds, _ = decoder_inputs(model, batch)
    patches, words = [], []
    for ids, row in zip(batch["input_ids"], embeds, strict=True):
        for columns in image_columns(ids):
            patches.append(row[columns])
            words.append(list(row[int((ids == tiny.IMAGE).nonzero().max()) + 1 :]))
    masked = blackened(batch["pixel_values"], torch.stack(patches), words, 0.4)
    assert 0.5 < (masked != batch["pixel_values"]).any(1).float().mean() < 0.65
    own, other = reading_again(model, batch, new), reading_again(model, {**batch, "pixel_values": masked}, new)
    expected = own + 0.8 * other
    expected[own < own.amax(-1, keepdim=True) + math.log(0.2)] = -math.inf
    torch.testing.assert_close(torch.stack(out.logits), expected, rtol=0, atol=1e-5)


def test_agla_asks_the_matcher_it_names() -> None:
    """One that finds the first patch alone relevant leaves that corner."""

    class First(Matcher):
        inverted = False

        def patches(self, seen: Seen) -> torch.Tensor:
            found = torch.zeros(*seen.features.shape[:2], 2)
            found[:, 0, 0], found[:, 1:, 1] = 1.0, 1.0
            return found

        def texts(self, questions: Sequence[str], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.tensor([[[1.0, 0.0]]] * len(questions)), torch.ones(len(questions), 1, dtype=torch.bool)

    class Decoding(Letters):
        def batch_decode(self, rows: list[list[int]], skip_special_tokens: bool) -> list[str]:
            return ["?" for _ in rows]

    register("first", First())
    model, batch = tiny.build("llava"), tiny.ragged_batch("llava")
    given = []
    stock = AGLA.pictures
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AGLA, "pictures", lambda self, sight: given.append(stock(self, sight)) or given[-1])
        with Plan("agla(keep=0.1,matcher=first)").apply(model, tokenizer=Decoding()):
            model.generate(**batch, max_new_tokens=2, do_sample=False)
    same = (given[0] == batch["pixel_values"]).all(1)
    side = same.shape[-1]
    assert same[:, : side // 4, : side // 4].float().mean() > 0.9
    assert not same[:, side // 2 :, side // 2 :].any()


def test_without_weight_views_are_the_stock_model() -> None:
    model, batch = tiny.build("llava"), tiny.ragged_batch("llava")
    stock = logits(model, batch)
    for plan in ("icd(alpha=0.0,beta=1e-30)", "agla(alpha=0.0,beta=1e-30)"):
        with Plan(plan).apply(model, tokenizer=Letters()):
            torch.testing.assert_close(logits(model, batch), stock, rtol=0, atol=1e-5)
    with Plan("agla(alpha=2.0,beta=1e-30,keep=1.0)").apply(model):  # the same picture twice is a temperature of 1/3
        torch.testing.assert_close(logits(model, batch)[0], 3 * stock[0], rtol=0, atol=1e-4)


def test_the_second_stream_has_a_cache_of_its_own() -> None:
    """Other noise changes what is said from the second token on, too."""
    model, batch = tiny.build("llava"), tiny.collate("llava", [tiny.prompt("llava", 1, 3, 4)])
    found = []
    for seed in (0, 1):
        with Plan(f"vcd(alpha=0.05,beta=0.0001,seed={seed})").apply(model):
            found.append(logits(model, batch, max_new_tokens=4))
    assert torch.equal(found[0].argmax(-1)[:1], found[1].argmax(-1)[:1])
    assert (found[0] - found[1])[1].nan_to_num(0.0, 0.0, 0.0).abs().max() > 1e-3


def test_without_contrast_only_the_cut_is_left() -> None:
    model, batch = tiny.build("llava"), tiny.ragged_batch("llava")
    stock = logits(model, batch)
    with Plan("vcd(alpha=0.0)").apply(model) as run:
        found = logits(model, batch)
    left = found.isfinite()
    assert torch.equal(found[left], stock[left])
    assert (~left).any()
    assert run.report().rows[0].visual_total == 16
    assert torch.equal(logits(model, batch), stock)


@pytest.mark.parametrize("plan", ["vcd", "fastv(layer=1,keep=0.5)+vcd+pai(first=1)", "icd(role='so')", "dola", "agla"])
def test_rows_beams_and_drafts(plan: str) -> None:
    model, prompts = tiny.build("llava"), [tiny.prompt("llava", 1, 3, 6), tiny.prompt("llava", 1, 2, 3)]
    batch = tiny.collate("llava", prompts)
    with Plan(plan).apply(model, tokenizer=Letters()):
        together = logits(model, batch)
        beams = model.generate(**batch, max_new_tokens=5, num_beams=3, do_sample=False)
        greedy = model.generate(**tiny.collate("llava", prompts[:1]), max_new_tokens=8, do_sample=False)
        lookup = model.generate(
            **tiny.collate("llava", prompts[:1]), max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3
        )
        assert torch.equal(greedy, lookup)
        for row, each in enumerate(prompts):
            alone = tiny.collate("llava", [each])
            torch.testing.assert_close(together[:, row], logits(model, alone)[:, 0], rtol=0, atol=1e-5)
            best = model.generate(**alone, max_new_tokens=5, num_beams=3, do_sample=False)
            assert torch.equal(beams[row, -5:], best[0, -5:])


@pytest.mark.parametrize("plan", ["vcd", "dola", "agla"])
def test_the_graph_engine_hands_back_what_it_cannot_run(plan: str) -> None:
    model, batch = tiny.build("llava"), tiny.ragged_batch("llava")
    found = []
    for engine in ("eager", "auto"):
        with Plan(plan).apply(model, engine=engine) as run:  # type: ignore[arg-type]
            found.append(model.generate(**batch, max_new_tokens=5, do_sample=False))
    assert torch.equal(*found)
    assert run.engine["name"] == "eager"  # type: ignore[index]


def test_beams_repeat_pictures_only_where_rows_have_one_each() -> None:
    """Releases of transformers differ in whether `generate` repeats pictures before they are encoded."""
    pixels = torch.arange(2.0)[:, None, None, None].expand(2, 3, 4, 4)
    assert torch.equal(repeated({"pixel_values": pixels}, 4, 2)["pixel_values"], pixels[[0, 0, 1, 1]])
    with pytest.raises(InputError, match="exactly one picture"):
        repeated({"pixel_values": pixels}, 2, 2)


def test_refused() -> None:
    with pytest.raises(PlanError, match="a plan takes one"):
        Plan("vcd+vcd(seed=1)")
    with pytest.raises(PlanError, match="outside 0 to 999"):
        VCD(step=1000)
    with pytest.raises(PlanError, match="share of the largest"):
        VCD(beta=0.0)
    model = tiny.build("llava")
    one = tiny.collate("llava", [tiny.prompt("llava", 1, 3, 4)])
    with Plan("vcd").apply(model):
        with pytest.raises(ModelError, match="needs the default cache"):
            model.generate(**one, max_new_tokens=2, cache_implementation="static", disable_compile=True)
        model.generate(**one, max_new_tokens=2, do_sample=False)
