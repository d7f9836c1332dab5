"""BLIP as a looker, against gradients of its own attention output; agla through it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import BatchEncoding, BlipConfig, BlipForImageTextRetrieval

from mmefficient.errors import ModelError
from mmefficient.matchers import Looker, load, register
from mmefficient.matchers.blip import BlipItm
from mmefficient.methods.views.agla import AGLA
from mmefficient.plan import Plan
from tests import tiny

SIDE, LAYER = 32, 1


class Letters:
    """One token per letter, between two special ones, padded on the right."""

    def __call__(self, texts: list[str], **_: Any) -> BatchEncoding:
        longest = max(map(len, texts)) + 2
        ids = [[1, *(3 + ord(x) % 50 for x in text), 2] for text in texts]
        rows = {"input_ids": [row + [0] * (longest - len(row)) for row in ids]}
        rows["attention_mask"] = [[1] * len(row) + [0] * (longest - len(row)) for row in ids]
        return BatchEncoding(rows, tensor_type="pt")

    def batch_decode(self, rows: Sequence[Sequence[int]], skip_special_tokens: bool = True) -> list[str]:
        return ["".join(chr(97 + each % 26) for each in row) for row in rows]


def build() -> Any:
    """A random model whose weights are large enough for attention to matter."""
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    text = {**size, "vocab_size": 60, "encoder_hidden_size": 16, "num_hidden_layers": 3, "projection_dim": 8}
    vision = {**size, "num_hidden_layers": 2, "image_size": SIDE, "patch_size": 8}
    config = BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=8)
    model = BlipForImageTextRetrieval(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.3)
    return model


def test_the_map_is_grad_cam_of_the_matching_head() -> None:
    blip, questions = build(), ["a dog", "two cats?"]
    pixels = torch.randn(2, 3, SIDE, SIDE)
    maps, cosine = BlipItm(blip, Letters(), (0.0,) * 3, (1.0,) * 3, LAYER).look(
        pixels, (0.0,) * 3, (1.0,) * 3, questions
    )
    for row, question in enumerate(questions):  # alone, so without padding
        text = Letters()([question])
        image = blip.vision_model(pixels[row : row + 1]).last_hidden_state.detach().requires_grad_()
        out = blip.text_encoder(
            text["input_ids"], attention_mask=text["attention_mask"], encoder_hidden_states=image,
            output_attentions=True, return_dict=True,
        )  # fmt: skip
        attention = out.cross_attentions[LAYER]
        attention.retain_grad()
        blip.itm_head(out.last_hidden_state[:, 0])[0, 1].backward()
        cam = (attention * attention.grad.clamp(min=0))[0].mean(0)[1:-1, 1:].mean(0)
        torch.testing.assert_close(maps[row], cam, rtol=0, atol=1e-6)
        assert cam.abs().max() > 1e-5
        alone = blip(**text, pixel_values=pixels[row : row + 1], use_itm_head=False).itm_score
        torch.testing.assert_close(cosine[row], alone[0, 0], rtol=0, atol=1e-5)


class Corner(Looker):
    """Everybody looks at the first patch most, and later questions fit better."""

    def look(self, pixels: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        maps = torch.linspace(1, 0, 16).square().expand(len(pixels), -1)
        return maps, torch.linspace(0.2, 1.0, len(pixels))


def test_agla_keeps_less_where_the_question_fits_better(monkeypatch: pytest.MonkeyPatch) -> None:
    register("blip:corner", Corner())
    given: list[torch.Tensor] = []
    stock = AGLA.pictures
    monkeypatch.setattr(AGLA, "pictures", lambda self, sight: given.append(stock(self, sight)) or given[-1])
    model, batch = tiny.build("llava"), tiny.ragged_batch("llava")
    with Plan("agla(matcher='blip:corner')").apply(model, tokenizer=Letters()):
        model.generate(**batch, max_new_tokens=2, do_sample=False)
    same = (given[0] == batch["pixel_values"]).all(1).float()
    expected = 1 - torch.linspace(0.2, 1.0, len(same)) / 2
    torch.testing.assert_close(same.mean((1, 2)), expected, rtol=0, atol=0.02)
    with pytest.raises(ModelError, match="only agla"):
        load("blip:corner")


def test_real_looks_reach_the_model() -> None:
    register("blip:tiny", BlipItm(build(), Letters(), (0.5,) * 3, (0.5,) * 3, LAYER))
    model, batch = tiny.build("llava"), tiny.ragged_batch("llava")
    found = []
    for keep in (0.3, 0.9):
        with Plan(f"agla(matcher='blip:tiny',keep={keep},beta=1e-9)").apply(model, tokenizer=Letters()):
            found.append(model.generate(**batch, max_new_tokens=3, do_sample=False, return_dict_in_generate=True,
                                        output_logits=True).logits)  # fmt: skip
    assert all((one[:1] - other[:1]).abs().max() > 1e-4 for one, other in zip(*found, strict=True))
