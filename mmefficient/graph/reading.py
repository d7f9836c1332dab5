"""Reading a prompt: one program per bucket of lengths, plan and layout of the images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from mmefficient.attention import row_scores
from mmefficient.graph.block import attention, block, product
from mmefficient.graph.capture import Inputs
from mmefficient.graph.decoding import Session, one_row
from mmefficient.graph.prompt import CHANGING, Prompt
from mmefficient.graph.rows import Score, row_block
from mmefficient.graph.some_rows import last_block, leaves_within, leaving_block
from mmefficient.graph.steered import BlindBlocks, Kept, tensors
from mmefficient.masks import Segment, prefill_mask
from mmefficient.offer import LAST, Parts
from mmefficient.points import Reducer
from mmefficient.prompt import PromptState
from mmefficient.reduction import Prefill, gather_rows
from mmefficient.steering import Reading
from mmefficient.vision import Tower

if TYPE_CHECKING:
    from mmefficient.blind import Blind
    from mmefficient.executor import Executor
    from mmefficient.graph.engine import Engine
    from mmefficient.modulation import Modulation

TOWER = "tower "


def read(
    engine: Engine, executor: Executor, prompt: Prompt, features: Sequence[torch.Tensor], tower: Tower | None, new: int
) -> tuple[torch.Tensor, PromptState, Session]:
    """Read a prompt.

    Args:
        features: [T, C] of each image, in the order of `prompt.where`.
        tower: facts for the methods that want them.
        new: tokens that may follow.

    Returns:
        logits [B, V] of the next token, borrowed until the next prompt; the state to report on; a session.
    """
    acts = prompt.visual and executor.acting
    if acts:
        executor.look(prompt.tokens)
    packed = prompt.packed(acts)
    # a copy from ordinary memory would wait for the encoder that is still running
    inputs = {"prompt": packed.pin_memory() if engine.device.type == "cuda" else packed}
    if features:
        found = [each.to(engine.device) for each in features]
        more = len(prompt.where) - sum(map(len, found))
        inputs["features"] = torch.cat([*found, found[0].new_zeros(more, found[0].shape[1])])
    if tower is not None and acts:
        inputs |= {TOWER + name: tensor for name, tensor in tower.tensors().items()}
    shape = tuple(prompt.position.shape)
    key = (("read", executor.run.plan), shape, prompt.layout() if acts else None)
    known = engine.captures.peek(key, inputs)
    for layer, slots in enumerate(known["slots"] if known else ()):
        engine.store.reserve(layer, shape[1], engine.room(slots + new))
    out = engine.captures.run(key, lambda given: _read(engine, executor, acts, prompt, tower, given, new), inputs)
    tokens = prompt.tokens  # where no method acts it is made here, while the device is busy
    if acts:
        tokens = tokens.replace(**{name: out[name].clone() for name in CHANGING})
    else:
        executor.look(tokens)
    executor.run.acted |= out["acted"]
    works = {index: plan.work for index, plan in executor.planned.items()}
    state = PromptState(executor.run.plan, executor.run.mode, tokens, works=works)
    return out["logits"], state, _session(engine, executor.run.plan, out, prompt, new)


def _session(engine: Engine, plan: str, out: Mapping[str, Any], prompt: Prompt, new: int) -> Session:
    slots, group = tuple(out["group_slots"]), tuple(out["group"])
    room = tuple(engine.room(each + new) for each in slots)
    kept = Kept(plan, out["steered"], [room[each] for each in group]) if out["steered"] else None
    return Session(group, slots, tuple(prompt.fill), tuple(out["starts"]), out["state"].clone(), room, kept)


def _read(
    engine: Engine,
    executor: Executor,
    acts: bool,
    prompt: Prompt,
    tower: Tower | None,
    inputs: Inputs,
    new: int,
) -> dict[str, Any]:
    given = prompt.unpacked(inputs["prompt"].to(engine.device), acts)
    hidden = engine.embed(given.ids)
    if "features" in inputs:
        features = inputs["features"].to(hidden)
        hidden = hidden.flatten(0, 1).index_copy_(0, given.where, features).view_as(hidden)
    rope = engine.rotary(hidden, given.position)
    prefill = None
    if acts:
        tokens = given.tokens(len(engine.adapter.layers))
        state = PromptState(executor.run.plan, executor.run.mode, tokens)
        if tower is not None:
            tower = tower.like({name[len(TOWER) :]: x for name, x in inputs.items() if name.startswith(TOWER)})
        facts = given.facts(prompt.facts, tokens)
        prefill = Prefill(state, facts, tower, simulate=False)
        prefill.enter(rope, None)
    batch, whole = given.ids.shape
    zero = torch.zeros_like(given.fill)
    groups: list[Segment | None] = []
    group, masks, acted = [], list[torch.Tensor | None](), False
    left = -1  # the latest site whose rows have left
    for index, layer in enumerate(engine.adapter.layers):
        parts = executor.parts(layer, None)
        if prefill is not None and index == 0 and executor.blind_until >= 0:
            prefill.blind = BlindBlocks(prefill, hidden, None, parts, engine.adapter.mrope, flash=False)
        here, coming = ([each for each in executor.reducers if each.site == site] for site in (index, index + 1))
        if prefill is not None and here and left < index and prefill.has_visual:
            hidden, acted = _reduce(prefill, here, parts, hidden), True
        segment = None if prefill is None else prefill.segment
        if not groups or segment is not groups[-1]:
            groups.append(segment)
            masks.append(None if segment is None else prefill_mask(None, segment, segment.slots, False))
        group.append(len(groups) - 1)
        slots, mask = hidden.shape[1], masks[-1]
        engine.store.reserve(index, batch, engine.room(slots + new))
        asked = prefill is not None and prefill.last is not None and executor.asked.get(index)
        score = partial(_score, prefill, mask) if prefill is not None and asked else None
        attend = partial(_attend, index, executor, prefill, mask, score)
        held = rope
        if prefill is not None:
            prefill.hidden, held = hidden, prefill.rope or rope
        room = engine.store.rows(index, batch, slots)
        plan = executor.planned.get(index)
        untouched = not any(_steering(index, executor, prefill))
        if plan is not None and prefill is not None and prefill.has_visual:
            hidden, acted = row_block(layer, plan, prefill, hidden, *room, zero, attend, score), True
        elif prefill is not None and prefill.has_visual and untouched and leaves_within(coming):
            reduce = partial(_reduce, prefill, coming, parts)
            hidden = leaving_block(layer, hidden, prefill, *room, zero, score is not None, reduce)
            left, acted = index + 1, True
        elif index == len(engine.adapter.layers) - 1 and untouched:
            first = None if segment is None or segment.valid is None else (~segment.valid).sum(1)
            ends = slots - given.fill
            alone = one_row(engine.captures.recorder is not None, ends, first, slots, ragged=True)
            hidden = last_block(layer, hidden, held, *room, zero, alone, ends[:, None] - 1)
        else:
            hidden = block(layer, hidden, held, *room, zero, attend)
    if hidden.shape[1] > 1:
        hidden = gather_rows(hidden, (hidden.shape[1] - 1 - given.fill)[:, None])
    (logits,) = product(hidden, (engine.head,), engine.adapter.decoder.norm)
    out = _after(prefill, groups, given.fill, given.position, whole)
    steered = {} if prefill is None else prefill.state.steered
    # a recorder does not look into a part of a change
    out |= {"logits": logits[:, 0], "acted": acted or bool(steered), "steered": steered, "tensors": tensors(steered)}
    return out | {"group": group, "slots": [out["group_slots"][each] for each in group]}


def _reduce(prefill: Prefill, reducers: Sequence[Reducer], parts: Parts, hidden: torch.Tensor) -> torch.Tensor:
    """The rows of `hidden` that remain after the reducers of one site."""
    for reducer in reducers:
        if prefill.has_visual:
            hidden = prefill.reduce(reducer, reducer.site, hidden, parts)
    return hidden


def _attend(
    index: int,
    executor: Executor,
    prefill: Prefill | None,
    mask: torch.Tensor | None,
    score: Score | None,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Attention of layer `index`, [B, Hq, N, D]."""
    if score is not None:
        score(query, keys, scale)
    methods, blind = _steering(index, executor, prefill)
    if prefill is None or (blind is None and not methods):
        return attention(query, keys, values, mask, mask is None, scale)

    def stock() -> torch.Tensor:
        return attention(query, keys, values, mask, mask is None, scale).transpose(1, 2)

    beside = None if blind is None else partial(blind.advance, executor.adapter.layers, index)
    return Reading(index, query, keys, values, prefill, scale).attend(methods, stock, beside).transpose(1, 2)


def _steering(index: int, executor: Executor, prefill: Prefill | None) -> tuple[Sequence[Modulation], Blind | None]:
    """What changes the attention of layer `index`: methods, and the prompt without image that is read beside it."""
    if prefill is None:
        return (), None
    methods = executor.modulated.get(index, ()) if prefill.has_visual else ()
    return methods, None if index > executor.blind_until else prefill.blind


def _score(prefill: Prefill, mask: torch.Tensor | None, query: torch.Tensor, keys: torch.Tensor, scale: float) -> None:
    """Hand the attention of each row's last token to the reducers."""
    assert prefill.last is not None
    prefill.scores[LAST] = row_scores(query, keys, mask, prefill.last[:, None], None, scale)


def _after(
    prefill: Prefill | None,
    groups: Sequence[Segment | None],
    fill: torch.Tensor,
    position: torch.Tensor,
    whole: int,
) -> dict[str, Any]:
    """What a session starts with, and what a report wants."""
    slots = [whole if segment is None else segment.slots for segment in groups]
    valid = [None if segment is None else segment.valid for segment in groups]
    first = [torch.zeros_like(fill) if used is None else (~used).sum(1) for used in valid]
    last = (whole - 1 - fill).expand(len(position), 1, -1).transpose(1, 2)
    following = position.gather(2, last)[..., 0] + 1
    found: dict[str, Any] = {}
    if prefill is not None:
        state = prefill.state
        if state.shift is not None:
            following = following - state.shift[:, 0]
        found = {name: getattr(state.tokens, name) for name in CHANGING}
    rows = [torch.zeros_like(fill), *(count - fill for count in slots), *first, *following]
    return found | {
        "state": torch.stack(rows),
        "group_slots": slots,
        "starts": [used is not None for used in valid],
    }
