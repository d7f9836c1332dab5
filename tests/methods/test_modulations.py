"""Modulations against their published algorithms on explicit attention matrices (fp32, prefill and 9 more tokens)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from mmefficient import steered, steering
from mmefficient.call import Call
from mmefficient.errors import PlanError, SilentPlanError
from mmefficient.methods.modulations.pai import PAI
from mmefficient.methods.modulations.paint import LOCAL, SUMMARY, sets
from mmefficient.methods.modulations.vaf import VAF
from mmefficient.methods.modulations.vhr import VHR
from mmefficient.modulation import LayerPrompt
from mmefficient.plan import Plan
from tests import tiny
from tests.executor.oracle import GREEDY, decoder_inputs, image_columns, logits
from tests.methods.modulation_oracle import Edit, Layer, edited, in_rows, plain

STEPS = 9


def pai(layer: Layer) -> torch.Tensor:
    """PAI, attention part: S += alpha |S| on image keys, last row, layers 2 and up."""
    if layer.index < 2:
        return plain(layer)
    raised = torch.where(layer.image[:, None, None], layer.logits + 0.4 * layer.logits.abs(), layer.logits)
    raised = torch.where(layer.logits.isinf(), layer.logits, raised)
    return layer.out(torch.where(in_rows(layer, "last"), raised, layer.logits).softmax(-1))


def vaf(layer: Layer) -> torch.Tensor:
    """VAF: S *= 1.15 on image keys and 0.95 on the system prompt, rows after the image, layers 1 and 2."""
    if layer.index not in (1, 2):
        return plain(layer)
    factor = torch.where(layer.image, 1.15, torch.where(layer.system, 0.95, 1.0))[:, None, None]
    return layer.out(torch.where(in_rows(layer, "answer"), layer.logits * factor, layer.logits).softmax(-1))


def var(layer: Layer) -> torch.Tensor:
    """VAR: sinks keep p = 0.3 of their weight in chosen heads, visual non-sinks get the rest; layers 2 and up."""
    weights = layer.logits.softmax(-1)
    if layer.index < 2:
        return layer.out(weights)
    if layer.prefill:
        x = layer.hidden / (layer.hidden.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
        first = layer.real.long().argmax(1)
        phi = torch.stack([x[b].abs()[:, x[b, at].abs().topk(2).indices].amax(-1) for b, at in enumerate(first)])
        layer.memory[layer.index] = (phi > 1.6) & layer.real
    sink = layer.memory[layer.index]
    sink = torch.cat([sink, sink.new_zeros(len(sink), layer.image.shape[1] - sink.shape[1])], 1)
    changed = weights.clone()
    for b in range(len(weights)):
        visual, both = layer.image[b] & ~sink[b], layer.image[b] & sink[b]
        for h in range(weights.shape[1]):
            for i in range(weights.shape[2]):
                row = weights[b, h, i]
                portion = row[both].sum() / row[layer.image[b]].sum()
                if not both.any() or not layer.rows[b, i] or portion > 1 - 0.4 or row[layer.image[b]].sum() < 0.2:
                    continue
                changed[b, h, i, sink[b]] = 0.3 * row[sink[b]]
                changed[b, h, i, visual] += 0.7 * row[sink[b]].sum() * row[visual] / row[visual].sum()
                torch.testing.assert_close(changed[b, h, i].sum(), torch.tensor(1.0))
    return layer.out(changed)


def spin(layer: Layer) -> torch.Tensor:
    """SPIN: the 2 of 4 heads with the largest sum of logits on the image stay, the others times 0.3; last row."""
    out = plain(layer)
    score = torch.where(layer.image[:, None, None], layer.logits, 0.0).sum(-1)[..., -1]
    factor = torch.full_like(score, 0.3).scatter(1, score.topk(2).indices, 1.0)
    factor = torch.where(layer.image.any(1)[:, None], factor, 1.0)
    out[:, :, -1] *= factor[..., None]
    return out


def act(layer: Layer) -> torch.Tensor:
    """ACT: in layers 2 and up but the last, sinks of a head keep 0.3 of their weight, all others get the rest."""
    weights = layer.logits.softmax(-1)
    if layer.index != 2:
        return layer.out(weights)
    if layer.prefill:
        found = torch.zeros(weights.shape[:2] + weights.shape[-1:], dtype=torch.bool)
        for b, h in np.ndindex(*weights.shape[:2]):
            rows = layer.real[b].nonzero()[:, 0].tolist()
            received = {j: float(np.mean([float(weights[b, h, i, j]) for i in rows if i >= j])) for j in rows}
            found[b, h, [j for j in rows if received[j] > 0.08][1:]] = True
        layer.memory[layer.index] = found & layer.image.any(1)[:, None, None]
    sink = layer.memory[layer.index]
    assert sink.any(-1).any(-1).tolist() == [True, False, True]
    assert (sink[0] != sink[0, :1]).any()  # heads differ
    sink = torch.cat([sink, sink.new_zeros(*sink.shape[:2], weights.shape[-1] - sink.shape[-1])], -1)[:, :, None]
    mass = (weights * sink).sum(-1, keepdim=True)
    changed = torch.where(sink, 0.3 * weights, weights * (1 + 0.7 * mass / (1 - mass)))
    sums = changed.sum(-1)
    torch.testing.assert_close(sums[sums.isfinite()], torch.ones(int(sums.isfinite().sum())))
    return layer.out(changed)


def lift(layer: Layer) -> torch.Tensor:
    """Lift: every head's output times 1.7 in rows after the image, from layer 1 on."""
    out = plain(layer)
    return torch.where(in_rows(layer, "answer"), 1.7 * out, out) if layer.index >= 1 else out


HEADS = ((1, 0), (1, 3), (3, 2))


def adhh(layer: Layer) -> torch.Tensor:
    """AD-HH: listed heads drop what they spend on text after the image, if it is 0.2 or more; last row."""
    weights = layer.logits.softmax(-1)
    for at, head in HEADS:
        if at == layer.index:
            row = weights[:, head, -1]
            mass = (row * layer.after).sum(-1)
            cut = (mass >= 0.2) & layer.image.any(1)
            weights[:, head, -1] = torch.where(cut[:, None] & layer.after, 0.0, row)
            kept = weights[:, head, -1].sum(-1)
            torch.testing.assert_close(kept, torch.where(cut, 1 - mass, 1.0))
    return layer.out(weights)


def tower_attention(model: PreTrainedModel, pixels: torch.Tensor) -> list[torch.Tensor]:
    """CLS attention over patches, sum over heads, of the tower's first layer and of the one the projector reads."""
    seen: dict[str, torch.Tensor] = {}
    tower = model.model.vision_tower
    layers = getattr(tower, "vision_model", tower).encoder.layers
    chosen = [layers[0].self_attn, layers[-2].self_attn]
    handles = [
        part.register_forward_hook(lambda module, args, out, name=name: seen.update({name: out}))
        for at, attention in enumerate(chosen)
        for name, part in ((f"q{at}", attention.q_proj), (f"k{at}", attention.k_proj))
    ]
    with torch.no_grad():
        tower(pixels)
    for handle in handles:
        handle.remove()
    found = []
    for at in range(2):
        q, k = (seen[f"{name}{at}"].unflatten(-1, (2, -1)).transpose(1, 2) for name in "qk")
        found.append(((q[:, :, :1] @ k.transpose(2, 3)) * k.shape[-1] ** -0.5).softmax(-1).sum(1)[:, 0, 1:])
    return found


def paint(
    layer: Layer, batch: dict[str, torch.Tensor], tower: list[torch.Tensor], by_head: bool = False
) -> torch.Tensor:
    """PAINT: S += 0.9 |S| on local and 0.5 |S| on summary tokens, last row, layers 1 and up.

    With `by_head` times the head's attention on the image in the last prompt row, over the median, at most 2.
    """
    factor, image = torch.zeros_like(layer.image, dtype=torch.float32), 0
    for row, ids in enumerate(batch["input_ids"]):
        for columns in image_columns(ids):
            local = set(tower[0][image].topk(len(columns) // 2).indices.tolist())
            quartiles = tower[1][image].quantile(torch.tensor([0.25, 0.75]))
            limit = quartiles[1] + 1.5 * (quartiles[1] - quartiles[0])
            summary = set((tower[1][image] > limit).nonzero()[:, 0].tolist())
            factor[row, columns] = torch.tensor(
                [0.5 if j in summary else 0.9 if j in local else 0.0 for j in range(len(columns))]
            )
            image += 1
    if layer.index < 1:
        return plain(layer)
    change = factor[:, None, None]
    if by_head:
        if layer.prefill:
            mass = (layer.logits.softmax(-1)[:, :, -1] * layer.image[:, None]).sum(-1)
            ordered = mass.sort(dim=1).values
            middle = (ordered[:, 1] + ordered[:, 2]) / 2  # of four heads
            layer.memory[layer.index] = (mass / middle[:, None]).clamp(max=2).nan_to_num(1.0)
        change = change * layer.memory[layer.index][:, :, None, None]
    raised = torch.where(layer.logits.isinf(), layer.logits, layer.logits + change * layer.logits.abs())
    return layer.out(torch.where(in_rows(layer, "last"), raised, layer.logits).softmax(-1))


@pytest.mark.parametrize(("implementation", "by_head"), [("sdpa", False), ("eager", False), ("sdpa", True)])
def test_paint_equals_the_published_algorithm(implementation: str, by_head: bool) -> None:
    batch, model = tiny.ragged_batch("llava"), tiny.build("llava", "eager")
    tower = tower_attention(model, batch["pixel_values"])
    with edited(
        model, batch["input_ids"], batch["attention_mask"], partial(paint, batch=batch, tower=tower, by_head=by_head)
    ):
        expected = logits(model, batch, max_new_tokens=STEPS)
    model = tiny.build("llava", implementation)
    with Plan(f"paint(alpha=0.9,beta=0.5,local=0.5,first=1,by_head={by_head})").apply(model):
        found = logits(model, batch, max_new_tokens=STEPS)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_paint_sets() -> None:
    shallow = torch.tensor([5.0, 4, 3, 2, 1, 0, 0, 0])
    deep = torch.tensor([9.0, 1, 1.1, 1.2, 0.9, 1, 1.1, 8])
    one = [SUMMARY, LOCAL, LOCAL, LOCAL, 0, 0, 0, SUMMARY]
    assert sets(shallow, deep, torch.zeros(8, dtype=torch.long), 0.5).tolist() == one
    crop = torch.tensor([7, -1] * 8)  # two crops, token by token in turn
    assert sets(shallow.repeat_interleave(2), deep.repeat_interleave(2), crop, 0.5).view(8, 2).T.tolist() == [one, one]


ORACLES: dict[str, Callable[[Layer], torch.Tensor]] = {
    "pai(alpha=0.4)": pai,
    "vaf(first=1,last=2)": vaf,
    "var(p=0.3,rho=0.4,tau=1.6)": var,
    "spin(keep=0.5,factor=0.3)": spin,
    "lift(gain=1.7,first=1)": lift,
    "act(beta=0.3,theta=0.08)": act,
    f"adhh(theta=0.2,heads={HEADS})": adhh,
}


@pytest.mark.parametrize("plan", ORACLES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_equals_the_published_algorithm(plan: str, implementation: str) -> None:
    batch = tiny.ragged_batch("llava")
    eager: Edit = ORACLES[plan]
    model = tiny.build("llava", "eager")
    with edited(model, batch["input_ids"], batch["attention_mask"], eager) as calls:
        expected = logits(model, batch, max_new_tokens=STEPS)
    assert len(calls) == STEPS * tiny.LAYERS
    model = tiny.build("llava", implementation)
    stock = logits(model, batch, max_new_tokens=STEPS)
    with Plan(plan).apply(model):
        found = logits(model, batch, max_new_tokens=STEPS)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (found - stock)[:, [0, 2]].abs().max() > 1e-3
    torch.testing.assert_close(found[:, 1], stock[:, 1], rtol=0, atol=1e-5)  # a row without image


def again(model: PreTrainedModel, batch: dict[str, torch.Tensor], new: torch.Tensor, step: int) -> torch.Tensor:
    """Logits after `step` new tokens, everything read in one forward without a cache, [B, V]."""
    ids = torch.cat([batch["input_ids"], new[:, :step]], 1)
    mask = torch.cat([batch["attention_mask"], torch.ones_like(new[:, :step])], 1)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    given = {**batch, "input_ids": ids, "attention_mask": mask, "position_ids": position}
    with torch.no_grad():
        return model(**given, use_cache=False).logits[:, -1]


@pytest.mark.parametrize("plan", ["pai(alpha=0.4)", "vaf(first=1,last=2)", "lift(gain=1.7)"])
def test_decoding_with_a_cache_is_reading_everything_again(plan: str) -> None:
    """A prompt's last row and all answer rows are changed alike, so one forward can do it; PAI's by its oracle."""
    model, batch = tiny.build("llava", "eager"), tiny.ragged_batch("llava")
    with Plan(plan).apply(model):
        out = model.generate(**batch, **{**GREEDY, "max_new_tokens": STEPS})
    length = batch["input_ids"].shape[1]
    new = out.sequences[:, length:]

    def whole(layer: Layer) -> torch.Tensor:
        if layer.index < 2:
            return plain(layer)
        rows = torch.arange(layer.logits.shape[2]) >= length - 1
        raised = torch.where(layer.image[:, None, None], layer.logits + 0.4 * layer.logits.abs(), layer.logits)
        raised = torch.where(layer.logits.isinf(), layer.logits, raised)
        return layer.out(torch.where(rows[:, None], raised, layer.logits).softmax(-1))

    under = Plan(plan).apply(model) if "pai" not in plan else edited(
        model, batch["input_ids"], batch["attention_mask"], whole
    )  # fmt: skip
    with under:
        for step in range(STEPS):
            torch.testing.assert_close(out.logits[step], again(model, batch, new, step), rtol=0, atol=1e-5)


@torch.no_grad()
def vhr_by_pairs(model: PreTrainedModel, ids: torch.Tensor, embeds: torch.Tensor, new: torch.Tensor, alpha: float,
                 layers: set[int]) -> torch.Tensor:  # fmt: skip
    """VHR of one row as the paper has it: a batch of (prompt, prompt without image), hooks on o_proj, no cache.

    Every later step reads prompt and answer again under the gates of step 0; logits [steps, V].
    """
    decoder, heads, gates = model.get_decoder(), model.config.text_config.num_attention_heads, {}
    text = embeds[ids != tiny.IMAGE]
    pad = len(embeds) - len(text)
    both = torch.stack([embeds, torch.cat([embeds[:1].expand(pad, -1), text])])
    real = torch.ones(both.shape[:2], dtype=torch.long)
    real[1, :pad] = 0
    position = torch.stack([torch.arange(len(embeds)), (torch.arange(len(embeds)) - pad).clamp(min=0)])

    def gate(layer: int, module: Any, args: Any) -> Any:
        x = args[0].unflatten(-1, (heads, -1))
        if layer not in gates:
            a, b = x[0, -1], x[1, -1]
            vhd, activity = (a - b).norm(dim=-1), b.norm(dim=-1) ** 2
            high = (vhd > vhd.mean() + vhd.std(correction=0)) & (
                activity > activity.mean() + activity.std(correction=0)
            )
            vhd = torch.where(high, 0.0, vhd)
            ordered = vhd.sort().values
            gates[layer] = torch.where(vhd > (ordered[heads // 2 - 1] + ordered[heads // 2]) / 2, alpha, 1.0)
        return ((x * gates[layer][:, None]).flatten(2),)

    handles = [
        decoder.layers[layer].self_attn.o_proj.register_forward_pre_hook(partial(gate, layer)) for layer in layers
    ]
    hidden = decoder(inputs_embeds=both, attention_mask=real, position_ids=position, use_cache=False).last_hidden_state
    steps = [model.lm_head(hidden[0, -1])]
    for step in range(1, len(new)):
        longer = torch.cat([embeds, model.get_input_embeddings()(new[:step])])[None]
        steps.append(model.lm_head(decoder(inputs_embeds=longer, use_cache=False).last_hidden_state[0, -1]))
    for handle in handles:
        handle.remove()
    assert gates.keys() == layers
    return torch.stack(steps)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_vhr_equals_the_published_algorithm(implementation: str) -> None:
    prompts = [tiny.prompt("llava", 1, 3, 6), tiny.prompt("llava", 2, 1, 4)]
    model, batch = tiny.build("llava", implementation), tiny.collate("llava", prompts)
    with Plan("vhr(alpha=1.7,deep=0.5)").apply(model):
        out = model.generate(**batch, **{**GREEDY, "max_new_tokens": STEPS})
    new = out.sequences[:, batch["input_ids"].shape[1] :]
    for row, prompt in enumerate(prompts):
        single = tiny.collate("llava", [prompt])
        embeds, _ = decoder_inputs(model, single)
        expected = vhr_by_pairs(model, single["input_ids"][0], embeds[0], new[row], 1.7, {1, 2, 3})
        torch.testing.assert_close(torch.stack(out.logits)[:, row], expected, rtol=0, atol=1e-5)


def test_act_goes_on_alike_with_drafts_and_alone() -> None:
    model = tiny.build("llava")
    prompts = [tiny.prompt("llava", 1, 3, 6), tiny.prompt("llava", 2, 1, 4)]
    with Plan("act(beta=0.2,theta=0.05)").apply(model):
        together = logits(model, tiny.collate("llava", prompts), max_new_tokens=4)
        for row, prompt in enumerate(prompts):
            alone = tiny.collate("llava", [prompt])
            torch.testing.assert_close(
                together[:, row], logits(model, alone, max_new_tokens=4)[:, 0], rtol=0, atol=1e-5
            )
            greedy = model.generate(**alone, max_new_tokens=8, do_sample=False)
            lookup = model.generate(**alone, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3)
            assert torch.equal(greedy, lookup)
    with pytest.raises(PlanError, match="none of 'all'"):
        Plan("act(sinks=none)")


def test_vhr_in_chosen_layers() -> None:
    assert list(VHR().layers(12)) == [1, 7, 8, 9, 10, 11]
    assert list(VHR(only=(3, 0)).layers(12)) == [0, 3]


def test_vhr_chooses_half_of_the_heads_and_outliers_need_both_conditions() -> None:
    torch.manual_seed(0)
    blind = torch.randn(3, 32, 8)
    seeing = blind + torch.randn(3, 32, 8)
    assert VHR().chosen(seeing, blind).sum(1).tolist() == [16] * 3
    # heads of one channel: 0 is active without the image, 1 diverges, 2 does both
    blind = torch.tensor([9.0, 1, 9, *[1] * 29])[None, :, None]
    seeing = blind + torch.tensor([2.0, 9, 9, *[1.5] * 14, *[0.5] * 15])[None, :, None]
    assert VHR().chosen(seeing, blind)[0, :3].tolist() == [True, True, False]
    assert VHR(outliers=False).chosen(seeing, blind)[0, :3].all()


NEUTRAL = [
    "pai(alpha=0.0,first=0)",
    "vaf(enhance=1.0,suppress=1.0,first=0,last=-1)",
    "vhr(alpha=1.0)",
    "var(p=1.0,tau=1.5)",
]
NEUTRAL += ["act(beta=1.0,theta=0.05)", "lift(gain=1.0)", "spin(factor=1.0)", "adhh(theta=1.1,heads=((2,1),))"]


@pytest.mark.parametrize("plan", NEUTRAL)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_neutral_settings_are_the_stock_model(family: str, implementation: str, plan: str) -> None:
    model, batch = tiny.build(family, implementation), tiny.ragged_batch(family)
    stock = logits(model, batch)
    with Plan(plan).apply(model):
        torch.testing.assert_close(logits(model, batch), stock, rtol=0, atol=1e-5)
    assert torch.equal(logits(model, batch), stock)


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        ("pai(first=9)", "layers out of range; the model has layers 0 to 3"),
        ("pai+vaf(first=2,last=3)", "both divide the keys of layer 2 into groups"),
        ("pai(first=0,last=1)+pai(first=1,last=2)", "both divide the keys of layer 1"),
        ("vhr+shortv(layers=(0,))", "attend to less in layer 0, beside which the prompt is also read"),
    ],
)
def test_refused(plan: str, says: str) -> None:
    with pytest.raises(PlanError, match=says):
        Plan(plan).apply(tiny.build("llava")).__enter__()
    with pytest.raises(PlanError, match="no range of layers"):
        Plan("pai(first=3,last=2)")


def test_sink_dimensions_that_the_model_has_not() -> None:
    model, batch = tiny.build("llava"), tiny.ragged_batch("llava")
    with pytest.raises(PlanError, match="not all below 32"), Plan("var(dims=(3,32))").apply(model):
        logits(model, batch)


@pytest.mark.parametrize("plan", ["vaf(first=0,last=1)", "var(tau=1.5)", "pai(alpha=0.4)"])
def test_a_prompt_that_ends_with_its_image(plan: str) -> None:
    """No row is after the image; the last one is the image's own."""
    model, (ids, pixels) = tiny.build("llava"), tiny.prompt("llava", 1, 3, 0)
    batch = tiny.collate("llava", [(ids[: ids.index(tiny.IMAGE) + 16], pixels)])
    with Plan(plan).apply(model):
        found = logits(model, batch)
    stock = logits(model, batch)
    assert torch.allclose(found[0], stock[0], atol=1e-5) == (plan != "pai(alpha=0.4)")
    assert (found - stock)[1:].abs().max() > 1e-4


def test_a_modulation_that_is_never_reached_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Call, "steers", lambda self, layer: False)
    model, batch = tiny.build("llava"), tiny.ragged_batch("llava")
    with pytest.raises(SilentPlanError), Plan("pai(first=2)").apply(model):
        logits(model, batch)


class NoMatrix(TorchDispatchMode):
    """Fails when an operation makes floating numbers for many rows and keys: an attention matrix."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows, self.seen = rows, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, (tuple, list)) else (out,):
            if torch.is_tensor(each) and each.is_floating_point() and each.ndim >= 3:
                self.seen += 1
                assert not (each.shape[-1] >= self.rows and each.shape[-2] >= self.rows), f"{func} made {each.shape}"
        return out


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="the interpreter is off; in float32 torch's own attention on CUDA makes a matrix"
)
@pytest.mark.parametrize(
    "plan",
    ["pai(first=3)+vhr+spin", "vaf(first=1,last=1)", "var(tau=1.5,first=3)", "paint(first=3)", "adhh(heads=((1,1),))"],
)
def test_no_attention_matrix_is_made(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stock implementation that makes none, no method does: the kernels run, under Triton's interpreter."""
    for name in ("grouped_attention", "decode_attention", "layout_of", "make_layout"):
        monkeypatch.setattr(steering, name, partial(getattr(steering, name), impl="triton"))
    monkeypatch.setattr(steered, "decode_attention", steering.decode_attention)
    monkeypatch.setattr(steered, "group_mix", partial(steered.group_mix, impl="triton"))
    batch = tiny.collate("llava", [tiny.prompt("llava", 2, 24, 8)])
    model, length = tiny.build("llava"), batch["input_ids"].shape[1]
    assert length > model.config.text_config.intermediate_size > model.config.text_config.hidden_size
    model.model.get_image_features(batch["pixel_values"])  # what is lazily made, is made
    with Plan(plan).apply(model), NoMatrix(length) as watch:
        model.generate(**batch, max_new_tokens=2, do_sample=False)
    assert watch.seen > 100


def test_a_matrix_would_be_noticed() -> None:
    batch = tiny.collate("llava", [tiny.prompt("llava", 2, 24, 8)])
    model, length = tiny.build("llava", "eager"), batch["input_ids"].shape[1]
    with pytest.raises(AssertionError, match="made"), NoMatrix(length):
        model.generate(**batch, max_new_tokens=1, do_sample=False)


@pytest.mark.parametrize("plan", ["pai(first=1)", "var(tau=1.5,first=1)", "adhh(heads=((1,1),(3,0)))"])
def test_every_layer_and_step_goes_through_the_kernels_once(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[str, int] = {}

    def counted(name: str, stock: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] = calls.get(name, 0) + 1
            return stock(*args, **kwargs)

        return call

    for name, module in (
        ("grouped_attention", steering),
        ("decode_attention", steering),
        ("decode_attention", steered),
    ):
        key = "later" if module is steered else name
        monkeypatch.setattr(module, name, counted(key, getattr(module, name)))
    model, batch = tiny.build("llava"), tiny.collate("llava", [tiny.prompt("llava", 1, 3, 6)])
    with Plan(plan).apply(model):
        model.generate(**batch, max_new_tokens=STEPS, do_sample=False)
    layers = 2 if "adhh" in plan else 3
    reading = "grouped_attention" if "var" in plan else "decode_attention"  # many rows, or the last one
    assert calls == {reading: layers, "later": layers * (STEPS - 1)}


@pytest.mark.parametrize(
    "plan", ["pai(alpha=0.4)", "vaf(first=1,last=2)", "var(p=0.3,rho=0.4,tau=1.6)", "vhr", "lift", "spin(keep=0.5)"]
)
def test_sampling_is_modulated_from_its_first_token(plan: str) -> None:
    model, batch = tiny.build("llava"), tiny.ragged_batch("llava")
    stock = logits(model, batch)
    with Plan(plan).apply(model):
        torch.manual_seed(0)
        out = model.generate(**batch, **{**GREEDY, "do_sample": True})
    assert (torch.stack(out.logits)[0] - stock[0]).abs().max() > 1e-4


def test_pai_raises_negative_logits_and_vaf_lowers_them() -> None:
    """The two methods differ in this, and are meant to."""
    prompt = LayerPrompt(0, None, torch.zeros(1, 2, 1, 4), None, None, 1.0)  # type: ignore[arg-type]
    negative = torch.tensor(-2.0)
    for method, group, moves in ((PAI(alpha=0.3), 1, 1), (VAF(), 2, -1)):
        a, b, c = method.change(prompt).logit_map[:, 0, 0, group]  # type: ignore[index]
        assert ((a * negative + b * negative.abs() + c - negative) * moves) > 0
