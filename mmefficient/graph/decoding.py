"""Decoding: one program per layout of the stored keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from mmefficient.graph.block import Attend, attention, block, product
from mmefficient.graph.capture import Inputs
from mmefficient.graph.steered import Kept
from mmefficient.kernels.decode_attention import decode_attention
from mmefficient.steered import new_rows

if TYPE_CHECKING:
    from mmefficient.graph.engine import Engine


@dataclass
class Session:
    """Decoding after one prompt.

    Attributes:
        group: by layer, the index of what it holds; slots: by group, places the prompt takes there.
        fill: see `Prompt`; these places are written over.
        starts: by group, whether some rows start behind place 0.
        state: int64 [1 + 2G + P, B]: steps done; by group the next place and the first real one; the next position.
        room: by group, places that programs may look at; done: steps done.
        kept: what modulations do to later rows, if any.
    """

    group: tuple[int, ...]
    slots: tuple[int, ...]
    fill: tuple[int, ...]
    starts: tuple[bool, ...]
    state: torch.Tensor
    room: tuple[int, ...]
    kept: Kept | None = None
    done: int = 0


def step(engine: Engine, session: Session, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [B, V] after `tokens` [B, 1], borrowed until the next step."""
    kept = session.kept
    program = ("step",) if kept is None else ("step", kept.plan, kept.key)
    key = (program, session.group, session.room, session.starts, len(session.state))
    out: torch.Tensor = engine.captures.run(
        key,
        lambda given: _step(engine, session, given),
        {"tokens": tokens, "state": session.state},
        lasting={} if kept is None else {"facts": kept.facts},
    )
    session.state[0] += 1
    session.done += 1
    return out


def _step(engine: Engine, session: Session, inputs: Inputs) -> torch.Tensor:
    tokens, state = inputs["tokens"].to(engine.device), inputs["state"]
    batch, groups = len(tokens), len(session.slots)
    done = state[0]
    slots = state[1 : 1 + groups] + done
    lengths, starts = slots + 1, state[1 + groups : 1 + 2 * groups]
    hidden = engine.embed(tokens)
    rope = engine.rotary(hidden, (state[1 + 2 * groups :] + done)[..., None])
    attends = [_attend(engine, session, index, lengths[index], starts[index]) for index in range(groups)]
    steered = {} if session.kept is None else session.kept.at(inputs["facts"])
    for index, layer in enumerate(engine.adapter.layers):
        kind = session.group[index]
        room = engine.store.rows(index, batch, session.room[kind])
        attend = attends[kind]
        if index in steered:
            first = starts[kind] if session.starts[kind] else None
            attend = partial(new_rows, steered[index], lengths=lengths[kind], starts=first)
        hidden = block(layer, hidden, rope, *room, slots[kind], attend)
    (logits,) = product(hidden, (engine.head,), engine.adapter.decoder.norm)
    return logits[:, 0]


def _attend(engine: Engine, session: Session, group: int, lengths: torch.Tensor, starts: torch.Tensor) -> Attend:
    """Attention of the new token in the layers of `group`."""
    first = starts if session.starts[group] else None
    longest = session.slots[group] - min(session.fill) + session.done + 1
    ragged = first is not None or len(set(session.fill)) > 1
    return one_row(engine.captures.recorder is not None, lengths, first, longest, ragged)


def one_row(recorded: bool, lengths: torch.Tensor, starts: torch.Tensor | None, longest: int, ragged: bool) -> Attend:
    """Attention of one row of each prompt, to keys in front of place `lengths` [B], from `starts` [B] on if given.

    Args:
        longest: no length is larger; ragged: they differ, or there are starts. Recorded programs need neither.
    """
    if recorded:
        return lambda q, k, v, scale: decode_attention(q, k, v, lengths, starts=starts, scale=scale)  # type: ignore[return-value]
    mask = None
    if ragged:
        place = torch.arange(longest, device=lengths.device)
        seen = place < lengths[:, None]
        mask = (seen if starts is None else seen & (place >= starts[:, None]))[:, None, None]
    return lambda q, k, v, scale: attention(q, k[:, :, :longest], v[:, :, :longest], mask, False, scale)
