"""Maps of heads, against eager attention and a batch of pairs; the parts of finding hallucination heads."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from mmefficient.cli import main
from mmefficient.loading import load
from mmefficient.plan import Plan
from mmefficient.profiles.heads import Listening, _mentions, _silenced, draw, measure
from mmefficient.vlm import VLM
from tests import tiny
from tests.executor.oracle import logits


def test_image_mass_equals_eager_attention() -> None:
    batch, listening = tiny.collate("llava", [tiny.prompt("llava", 1, 3, 6)]), Listening()
    model = tiny.build("llava")
    stock = logits(model, batch, max_new_tokens=2)
    with Plan([listening]).apply(model):
        assert torch.equal(logits(model, batch, max_new_tokens=2), stock)  # it only listens
    assert sorted(listening.found) == list(range(tiny.LAYERS))
    with torch.no_grad():
        attentions = tiny.build("llava", "eager")(**batch, output_attentions=True).attentions
    for layer, attention in enumerate(attentions):
        expected = attention[0, :, -1, batch["input_ids"][0] == tiny.IMAGE].sum(-1)
        (maps,) = listening.found[layer]
        torch.testing.assert_close(maps[1], expected, rtol=0, atol=1e-5)
        assert (maps[0] > 0).all()
        assert sorted(maps[2].tolist()) == [1.0, 1.0, 2.0, 2.0]


def test_drawing_from_the_command_line(
    checkpoint: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm = VLM.from_pretrained(checkpoint, device="cpu")
    maps = measure(vlm, [(picture, "what?"), (picture, "where?")])
    assert maps.shape == (3, len(vlm.model.get_decoder().layers), vlm.model.config.text_config.num_attention_heads)
    assert draw(maps, "title").width > 200
    target = tmp_path / "heads.png"
    arguments = ["heads", picture, "--model", checkpoint, "-o", target, "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["mmefficient", *map(str, arguments)])
    with pytest.raises(SystemExit) as leaving:
        main()
    assert not leaving.value.code
    assert Image.open(target).size == draw(maps, "title").size


def test_mentions_are_found_by_their_tokens() -> None:
    processor = load("reference", device="cpu", dtype="auto", attn_implementation=None)[1]
    text = " a hot dog, two dogs and a wine glass."
    ids = processor.tokenizer(text, add_special_tokens=False).input_ids
    found = _mentions(processor.tokenizer, ids, {"dog"})
    words = [processor.tokenizer.decode(ids[place]) for place, _ in found]
    assert words == [" hot", " dogs", " wine"]
    assert [there for _, there in found] == [False, True, False]


def test_a_silenced_head_is_zero_and_the_others_are_not() -> None:
    x = torch.randn(2, 3, 8)
    (out,) = partial(_silenced, 4, 1)(None, (x,))
    assert (out[..., 2:4] == 0).all()
    assert torch.equal(out[..., 4:], x[..., 4:])
    assert (x[..., 2:4] != 0).all()
