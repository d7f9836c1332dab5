"""What a pruned model computes, against slow and independent ways to compute it."""

from __future__ import annotations

import pytest
import torch

from mmefficient.plan import Plan
from tests import tiny
from tests.executor.oracle import (
    GREEDY,
    breaks,
    decoder_inputs,
    held_columns,
    image_columns,
    logits,
    shorter_sequence,
    without_cache,
)

BOTH = [(family, implementation) for family in tiny.FAMILIES for implementation in ("sdpa", "eager")]


@pytest.mark.parametrize(("family", "implementation"), BOTH)
def test_dropping_at_the_input_equals_a_shorter_prompt(family: str, implementation: str) -> None:
    model, batch = tiny.build(family, implementation), tiny.collate(family, [tiny.prompt(family, 1, 3, 4)])
    embeds, position = decoder_inputs(model, batch)
    with Plan("random(keep=0.4,seed=3)").apply(model) as run:
        out = model.generate(**batch, **GREEDY)
    columns = held_columns(model, batch["input_ids"][0], embeds[0], run.report().kept(0, 0).tolist())
    assert len(columns) < embeds.shape[1]
    new = out.sequences[0, embeds.shape[1] :]
    expected = shorter_sequence(model, embeds, position, columns, new)
    assert torch.equal(torch.stack(out.logits)[:, 0], expected)


@pytest.mark.parametrize("plan", ["random(keep=0.4)", "fastv(layer=1,keep=0.4)", "fastv(layer=2,keep=3)+exit(layer=3)"])
@pytest.mark.parametrize(("family", "implementation"), BOTH)
def test_decoding_equals_recomputation_without_a_cache(family: str, implementation: str, plan: str) -> None:
    model, batch = tiny.build(family, implementation), tiny.collate(family, [tiny.prompt(family, 1, 3, 4)])
    embeds, position = decoder_inputs(model, batch)
    with Plan(plan).apply(model) as run:
        out = model.generate(**batch, **GREEDY)
    ids = batch["input_ids"][0]
    report = run.report()
    columns = [held_columns(model, ids, embeds[0], report.kept(0, layer).tolist()) for layer in range(tiny.LAYERS)]
    # the oracle passes bool masks, which eager attention does not take
    expected = without_cache(tiny.build(family), embeds, position, columns, out.sequences[0, len(ids) :])
    torch.testing.assert_close(torch.stack(out.logits)[:, 0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layer", [1, 3])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_fastv_keeps_what_eager_attention_ranks_first(family: str, layer: int) -> None:
    batch = tiny.ragged_batch(family)
    eager = tiny.build(family, "eager")
    with torch.no_grad():
        attention = eager(**batch, output_attentions=True).attentions[layer - 1]
    scores = attention[:, :, -1].mean(1)
    model = tiny.build(family)
    embeds, _ = decoder_inputs(model, batch)
    with Plan(f"fastv(layer={layer},keep=3)").apply(model) as run, torch.no_grad():
        model(**batch)
    report = run.report()
    for row, ids in enumerate(batch["input_ids"]):
        expected, start, is_break = [], 0, breaks(model, embeds[row])
        for columns in image_columns(ids):
            columns = columns[~is_break[columns]]
            expected += sorted(start + i for i in scores[row, columns].topk(3).indices.tolist())
            start += len(columns)
        assert report.kept(row, layer).tolist() == expected
        assert len(report.kept(row, layer - 1)) == start


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_plain_forward_returns_the_rows_that_are_left(implementation: str) -> None:
    model, batch = tiny.build("llava", implementation), tiny.collate("llava", [tiny.prompt("llava", 1, 3, 4)])
    length = batch["input_ids"].shape[1]
    with Plan("fastv(layer=2,keep=4)").apply(model), torch.no_grad():
        cached = model(**batch).logits
        uncached = model(**batch, use_cache=False).logits
    assert cached.shape[1] == length - 12
    assert torch.equal(cached, uncached)


@pytest.mark.parametrize("plan", ["random(keep=0.5,positions=compact)", "visionzip(dominant=5,contextual=2)"])
def test_compact_positions_equal_a_prompt_that_was_always_short(plan: str) -> None:
    model, batch = tiny.build("llava"), tiny.collate("llava", [tiny.prompt("llava", 1, 3, 4)])
    kept: dict[str, torch.Tensor] = {}

    def note(module: torch.nn.Module, args: tuple[torch.Tensor, ...], kwargs: object) -> None:
        kept.setdefault("hidden", args[0])

    with Plan(plan).apply(model):
        handle = model.get_decoder().layers[0].register_forward_pre_hook(note, with_kwargs=True)
        out = model.generate(**batch, **GREEDY)
        handle.remove()
    hidden = kept["hidden"]
    everything = torch.arange(hidden.shape[1])
    new = out.sequences[0, batch["input_ids"].shape[1] :]
    expected = shorter_sequence(model, hidden, everything[None], everything, new)
    torch.testing.assert_close(torch.stack(out.logits)[:, 0], expected, rtol=0, atol=1e-6)
    assert not torch.allclose(expected, logits(model, batch)[:, 0])
