"""Attention read off a normal run equals that of an eager run with its matrices."""

from __future__ import annotations

import torch

import mmefficient as mm
from mmefficient.images import load_image
from mmefficient.models import reference
from mmefficient.watch import attention_received

QUESTION = "Is there a frog in the image?"


def test_it_is_the_last_row_of_the_eager_attention_matrices() -> None:
    vlm = mm.VLM.from_pretrained("reference", device="cpu", attn_implementation="eager")
    found = attention_received(vlm, reference.sample_picture(), QUESTION)
    prompt = vlm.processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}],
        add_generation_prompt=True,
    )
    inputs = vlm.processor(
        images=[load_image(reference.sample_picture())], text=[prompt], return_tensors="pt", add_special_tokens=False
    )
    with torch.no_grad():
        eager = vlm.model(**inputs, output_attentions=True).attentions
    visual = inputs["input_ids"][0] == vlm.model.config.image_token_id
    expected = torch.stack([layer[0, :, -1, visual].mean(0) for layer in eager])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)
