"""Slow, independent computations that the executor is compared with."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from tests import tiny

GREEDY: dict[str, Any] = {
    "max_new_tokens": 5,
    "do_sample": False,
    "output_logits": True,
    "return_dict_in_generate": True,
}


def logits(model: PreTrainedModel, inputs: dict[str, Any], **changes: Any) -> torch.Tensor:
    """Greedy decoding's logits, [steps, B, V]."""
    return torch.stack(model.generate(**inputs, **{**GREEDY, **changes}).logits)


def decoder_inputs(model: PreTrainedModel, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """What the stock prefill gives the decoder: embeddings [B, S, D] and position ids."""
    seen: dict[str, Any] = {}

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.update({name: kwargs[name] for name in ("inputs_embeds", "position_ids")})

    handle = model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    try:
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
    finally:
        handle.remove()
    return seen["inputs_embeds"], seen["position_ids"]


@torch.no_grad()
def shorter_sequence(
    model: PreTrainedModel, embeds: torch.Tensor, position: torch.Tensor, columns: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    """The stock text model on the prompt's `columns` alone, then fed `tokens` [steps]; logits [steps, V] of one row."""
    decoder, cache = model.get_decoder(), DynamicCache(config=model.get_decoder().config)
    hidden, at, steps = embeds[:, columns], position[..., columns], []
    for step in range(len(tokens)):
        out = decoder(inputs_embeds=hidden, position_ids=at, past_key_values=cache, use_cache=True)
        steps.append(model.lm_head(out.last_hidden_state[:, -1])[0])
        hidden = model.get_input_embeddings()(tokens[step])[None, None]
        at = position[..., -1:] + 1 + step
    return torch.stack(steps)


@torch.no_grad()
def without_cache(
    model: PreTrainedModel,
    embeds: torch.Tensor,
    position: torch.Tensor,
    columns: list[torch.Tensor],
    tokens: torch.Tensor,
) -> torch.Tensor:
    """Every step from scratch, layer l on the prompt's `columns[l]` and all later tokens; logits [steps, V]."""
    decoder, steps = model.get_decoder(), []
    for step in range(len(tokens)):
        new = model.get_input_embeddings()(tokens[:step])[None]
        hidden = torch.cat([embeds, new], 1)
        later = position[..., -1:] + 1 + torch.arange(step)
        at = torch.cat([position, later], -1)
        cos, sin = decoder.rotary_emb(hidden, at[1:] if at.ndim == 3 and len(at) == 4 else at)
        here = torch.arange(hidden.shape[1])
        for layer, kept in zip(decoder.layers, columns, strict=True):
            stay = torch.cat([kept, torch.arange(embeds.shape[1], embeds.shape[1] + step)])
            hidden = hidden[:, torch.isin(here, stay)]
            here = stay
            mask = torch.ones(len(stay), len(stay)).tril().bool()[None, None]
            rope = (cos[:, stay], sin[:, stay])
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rope, use_cache=False)
        steps.append(model.lm_head(decoder.norm(hidden)[:, -1])[0])
    return torch.stack(steps)


def image_columns(ids: torch.Tensor) -> list[torch.Tensor]:
    """Positions of each image's placeholders in one row: runs of the placeholder id."""
    at = (ids == tiny.IMAGE).nonzero()[:, 0]
    return list(torch.tensor_split(at, (at.diff() > 1).nonzero()[:, 0] + 1)) if len(at) else []


def breaks(model: PreTrainedModel, embeds: torch.Tensor) -> torch.Tensor:
    """bool [S]: where one row's embeddings [S, D] are the learned line break."""
    newline = getattr(model.model, "image_newline", None)
    return torch.zeros(len(embeds), dtype=torch.bool) if newline is None else (embeds == newline).all(-1)


def held_columns(model: PreTrainedModel, ids: torch.Tensor, embeds: torch.Tensor, kept: list[int]) -> torch.Tensor:
    """Positions of one row [S] that stay when its visual tokens `kept` do; a line break stays with its line."""
    is_break, stay, number = breaks(model, embeds), torch.ones(len(ids), dtype=torch.bool), 0
    for columns in image_columns(ids):
        ends = columns[is_break[columns]]
        for column in columns.tolist():
            if not is_break[column]:
                stay[column] = number in kept
                number += 1
        first = columns[0]
        if len(ends) > 1:  # an overview without breaks comes first
            first = columns[16]
        for end in ends:
            stay[end] = bool(stay[first:end].any())
            first = end + 1
    return stay.nonzero()[:, 0]
