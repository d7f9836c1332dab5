"""Matchers on small models that are initialised here; nothing is downloaded."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from mmefficient import matchers
from mmefficient.errors import ModelError, PlanError
from mmefficient.matchers.base import Seen, pieces
from mmefficient.matchers.pair import ClipPair
from mmefficient.methods.reducers.cdpruner import CDPruner
from mmefficient.models.base import PIXELS
from mmefficient.models.reference.scenes import splits
from mmefficient.plan import Plan
from mmefficient.points import MatchTokens
from mmefficient.vlm import VLM
from tests import tiny
from tests.executor.oracle import logits
from tests.tiny_checkpoint import processor

LENGTH = 10


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registered matchers are forgotten afterwards."""
    monkeypatch.setattr(matchers, "_registered", {})


def clip_of(model: Any) -> CLIPModel:
    """A CLIP model with the vision tower of `model`."""
    torch.manual_seed(1)
    text = CLIPTextConfig(
        hidden_size=12, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=100,
        max_position_embeddings=LENGTH, bos_token_id=1, eos_token_id=3, projection_dim=9,
    )  # fmt: skip
    vision = CLIPVisionConfig(**tiny.TOWER, projection_dim=9)
    clip = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=9)).eval()
    clip.vision_model.load_state_dict(model.model.vision_tower.state_dict())
    return clip


def seen(model: Any) -> Seen:
    crops = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        states = model.model.vision_tower(crops, output_hidden_states=True).hidden_states[-2]
    return Seen(model.model.vision_tower, crops, *PIXELS["clip"], states[:, 1:])


def test_pieces() -> None:
    ids, used = pieces([[5, 6, 7, 8, 9], [], [5, 6]], 4, 1, 2)
    assert ids.tolist() == [
        [[1, 5, 6, 2], [1, 7, 8, 2], [1, 9, 2, 0]],
        [[1, 2, 0, 0], [0] * 4, [0] * 4],
        [[1, 5, 6, 2], [0] * 4, [0] * 4],
    ]
    assert used.sum(1).tolist() == [3, 1, 1]


def test_the_pair_equals_clip() -> None:
    model = tiny.build("llava")
    clip, tokenizer = clip_of(model), processor().tokenizer
    pair, given = ClipPair(clip, tokenizer), seen(model)
    with torch.no_grad():
        states = clip.vision_model(given.pixels, output_hidden_states=True).hidden_states[-2]
        wanted = clip.visual_projection(clip.vision_model.post_layernorm(states))[:, 1:]
        torch.testing.assert_close(pair.patches(given), wanted)
        words = "what is in the picture are there how many dogs cat"
        texts, used = pair.texts([words, "what"], torch.device("cpu"))
        assert used.tolist() == [[True, True], [True, False]]
        ids = tokenizer(words, add_special_tokens=False)["input_ids"]
        for piece, cut in enumerate((ids[:8], ids[8:])):
            one = torch.tensor([[1, *cut, 3]])
            torch.testing.assert_close(texts[0, piece], clip.get_text_features(one, return_dict=True).pooler_output[0])


def test_the_pair_knows_its_tower() -> None:
    model = tiny.build("llava")
    pair, given = ClipPair(clip_of(model), None), seen(model)
    pair.patches(replace(given, tower=tiny.build("llava").model.vision_tower))  # a copy
    for family, seed in (("llava", 1), ("llava_onevision", 0)):
        with pytest.raises(ModelError, match="not the vision tower"):
            pair.patches(replace(given, tower=tiny.build(family, seed=seed).model.vision_tower))


def small_open_clip(mean: float = 0.5) -> Any:
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(2)
    vision = open_clip.CLIPVisionCfg(layers=3, width=16, head_width=8, patch_size=8, image_size=24)
    text = open_clip.CLIPTextCfg(context_length=LENGTH, width=16, heads=2, layers=2)
    clip = open_clip.CLIP(embed_dim=7, vision_cfg=vision, text_cfg=text).eval()
    clip.visual.preprocess_cfg = {"mean": (mean,) * 3, "std": (0.5,) * 3}
    from mmefficient.matchers.open_clip import OpenClip

    return OpenClip(clip, open_clip.SimpleTokenizer(context_length=LENGTH))


def test_open_clip_equals_its_own_model() -> None:
    matcher, given = small_open_clip(), seen(tiny.build("llava"))
    given = replace(given, mean=(0.25, 0.5, 0.5), std=(1.0, 0.5, 0.5), features=torch.zeros(3, 9, 16))
    pixels = given.pixels.clone()
    pixels[:, 0] = (pixels[:, 0] + 0.25 - 0.5) / 0.5  # the only channel that is normalised differently
    pixels = F.interpolate(pixels, size=(24, 24), mode="bicubic", antialias=True)
    visual = matcher.clip.visual
    with torch.no_grad():
        states = visual._embeds(pixels)
        for block in visual.transformer.resblocks[:-1]:
            states = block(states)
        wanted = visual.ln_post(states)[:, 1:] @ visual.proj
        torch.testing.assert_close(matcher.patches(given), wanted)
        texts, used = matcher.texts(["a cat", "what is in the picture, are there many dogs?"], torch.device("cpu"))
        assert used.tolist() == [[True, False], [True, True]]
        ids = matcher.tokenizer(["a cat"])
        torch.testing.assert_close(texts[0, 0], matcher.clip.encode_text(ids)[0])


def test_open_clip_comes_to_the_grid_of_the_model() -> None:
    matcher, given = small_open_clip(), seen(tiny.build("llava"))
    assert matcher.patches(given).shape == (3, 16, 7)


def test_open_clip_without_a_vision_transformer() -> None:
    from mmefficient.matchers.open_clip import OpenClip

    with pytest.raises(ModelError, match="vision transformer"):
        OpenClip(torch.nn.Linear(1, 1), None)
    pytest.importorskip("open_clip")
    with pytest.raises(ModelError, match="open_clip cannot load 'no-such-model'"):
        matchers.load("open_clip:no-such-model")


@pytest.mark.usefixtures("names")
@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision"])
@pytest.mark.parametrize("plan", ["cdpruner(keep=5,matcher=mine)", "trim(keep=5,matcher=mine)"])
def test_rows_with_words_equal_batch_one(family: str, plan: str) -> None:
    model = tiny.build(family)
    if family == "llava":
        matchers.register("mine", ClipPair(clip_of(model), processor().tokenizer))
    else:
        matchers.register("mine", small_open_clip())
    prompts, tokenizer = tiny.ragged_prompts(family), processor(family).tokenizer
    with Plan(plan).apply(model, tokenizer=tokenizer):
        together = logits(model, tiny.collate(family, prompts))
    for row, each in enumerate(prompts):
        with Plan(plan).apply(model, tokenizer=tokenizer):
            alone = logits(model, tiny.collate(family, [each]))[:, 0]
        torch.testing.assert_close(together[:, row], alone, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("names")
def test_the_question_is_what_is_asked() -> None:
    """The words after the picture, for every row of a batch; other words keep other patches."""
    model, asked = tiny.build("llava"), []
    pair = ClipPair(clip_of(model), processor().tokenizer)

    class Listening(ClipPair):
        def texts(self, questions: Any, device: torch.device) -> Any:
            asked.extend(questions)
            return super().texts(questions, device)

    matchers.register("mine", Listening(pair.clip, pair.tokenizer))
    from PIL import Image

    picture = Image.linear_gradient("L").resize((40, 30)).convert("RGB")
    vlm = VLM(model, processor(), plan="cdpruner(keep=4,matcher=mine)")
    vlm.ask_batch([(picture, "how many dogs"), (picture, "what is it")], max_new_tokens=1)
    assert asked == ["how many dogs", "what is it"]


@pytest.mark.usefixtures("names")
def test_words_are_needed() -> None:
    model = tiny.build("llava")
    matchers.register("mine", ClipPair(clip_of(model), processor().tokenizer))
    with pytest.raises(PlanError, match="pass tokenizer="):
        Plan("cdpruner(keep=4,matcher=mine)").apply(model).__enter__()
    Plan("cdpruner(keep=4,matcher=embeddings)").apply(model).__enter__()


def test_a_saved_pair_is_found(tmp_path: Path) -> None:
    clip_of(tiny.build("llava")).save_pretrained(tmp_path)
    processor().tokenizer.save_pretrained(tmp_path)
    assert isinstance(matchers.load(str(tmp_path)), ClipPair)
    with pytest.raises(ModelError, match="no CLIP checkpoint"):
        matchers.load(str(tmp_path / "nowhere"))


def test_what_a_question_names_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patches of the object that a question names come first; over the whole question some do, with the sign turned."""
    given: list[MatchTokens] = []
    stock = CDPruner.reduce
    monkeypatch.setattr(CDPruner, "reduce", lambda self, seen, n: given.append(seen.match) or stock(self, seen, n))
    vlm = VLM.from_pretrained("reference", device="cpu")
    shares = dict.fromkeys(matchers.OWN, 0.0)
    for question in splits.load("val", kinds=["position"], limit=6):
        [thing] = [thing for thing in question.scene.things if f"the {thing.name}?" in question.text]
        for name in shares:
            plan = f"cdpruner(keep=64,matcher={name})"
            vlm.ask(question.image(), question.text, plan=plan, max_new_tokens=1)
            relevance = given[-1].relevance()[0]
            assert given[-1].inverted == (name == matchers.EMBEDDINGS)
            side = math.isqrt(len(relevance))
            centre = (torch.arange(side) + 0.5) * 336 / side
            inside = ((centre - thing.y - thing.h / 2).abs() < thing.h / 2)[:, None]
            inside = (inside & ((centre - thing.x - thing.w / 2).abs() < thing.w / 2)).flatten()
            shares[name] += float(inside[relevance.topk(64).indices].sum() / inside.sum()) / 6
    assert shares[matchers.WORDS] > 0.7
    assert 0.15 < shares[matchers.EMBEDDINGS] < 0.7  # a ninth of the patches is 0.11 of the object's, were they drawn
