"""Patterns and row policies against their definitions, written as loops over pairs and rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from mmefficient.plan import Plan
from mmefficient.report import Report
from tests import tiny
from tests.executor.oracle import breaks, decoder_inputs, image_columns

Rule = Callable[[int, int], bool]


def visual_columns(model: Any, ids: torch.Tensor, embeds: torch.Tensor) -> list[list[int]]:
    """Positions of the visual tokens of each image in one row, line breaks excluded."""
    is_break = breaks(model, embeds)
    return [[int(c) for c in columns if not is_break[c]] for columns in image_columns(ids)]


@torch.no_grad()
def recompute(
    model: Any,
    embeds: torch.Tensor,
    position: torch.Tensor,
    sees: Rule,
    layers: set[int],
    step: Callable[[int, nn.Module, torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Last logits [V] of one row: in `layers`, query i sees key j if sees(i, j); elsewhere it is causal.

    Args:
        step: given a layer's number, the layer, what enters and what leaves it, says what leaves instead.
    """
    decoder, n = model.get_decoder(), embeds.shape[1]
    rope = decoder.rotary_emb(embeds, position[1:] if position.ndim == 3 and len(position) == 4 else position)
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    chosen = torch.tensor([[sees(i, j) for j in range(n)] for i in range(n)])
    hidden = embeds
    for number, layer in enumerate(decoder.layers):
        mask = (chosen if number in layers else causal)[None, None]
        out = layer(hidden, attention_mask=mask, position_embeddings=rope, use_cache=False)
        hidden = out if step is None else step(number, layer, hidden, out)
    return model.lm_head(decoder.norm(hidden)[:, -1])[0]


def applied(model: Any, inputs: dict[str, Any], plan: str) -> tuple[torch.Tensor, Report]:
    """Last logits [V] of one row under a plan, and the report."""
    with Plan(plan).apply(model) as run, torch.no_grad():
        return model(**inputs).logits[0, -1], run.report()


@pytest.fixture(params=tiny.FAMILIES)
def case(request: pytest.FixtureRequest) -> dict[str, Any]:
    """A prompt of text, two images and text, as the decoder gets it."""
    model = tiny.build(request.param)
    ids, pixels = tiny.prompt(request.param, 2, 3, 5)
    inputs = tiny.collate(request.param, [(ids, pixels)])
    embeds, position = decoder_inputs(model, inputs)
    images = visual_columns(model, inputs["input_ids"][0], embeds[0])
    visual = {c for image in images for c in image}
    return {
        "model": model,
        "inputs": inputs,
        "embeds": embeds,
        "position": position,
        "images": images,
        "visual": visual,
    }


ALL = set(range(tiny.LAYERS))


@pytest.mark.parametrize("plan", ["composite", "no_visual_self(scope=self)", "composite(layers=(1, 2))"])
def test_composite_is_attention_to_oneself_with_weight_one(case: dict[str, Any], plan: str) -> None:
    visual = case["visual"]
    layers = {1, 2} if "layers" in plan else ALL
    expected = recompute(
        case["model"], case["embeds"], case["position"], lambda i, j: i == j if i in visual else j <= i, layers
    )
    torch.testing.assert_close(applied(case["model"], case["inputs"], plan)[0], expected, rtol=0, atol=1e-5)


def test_scope_text(case: dict[str, Any]) -> None:
    visual = case["visual"]
    expected = recompute(
        case["model"],
        case["embeds"],
        case["position"],
        lambda i, j: j <= i and not (i in visual and j in visual - {i}),
        ALL,
    )
    found = applied(case["model"], case["inputs"], "no_visual_self(scope=text)")[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_scope_nothing(case: dict[str, Any]) -> None:
    """The attention of visual rows adds nothing, their FFN acts."""
    at = torch.tensor(sorted(case["visual"]))

    def step(number: int, layer: Any, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        rows = before[:, at]
        return after.index_copy(1, at, rows + layer.mlp(layer.post_attention_layernorm(rows)))

    expected = recompute(case["model"], case["embeds"], case["position"], lambda i, j: j <= i, ALL, step)
    found = applied(case["model"], case["inputs"], "no_visual_self(scope=nothing)")[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_modality_mutual(case: dict[str, Any]) -> None:
    visual, first = case["visual"], min(case["visual"])
    words = {j for j in range(first, case["embeds"].shape[1]) if case["inputs"]["input_ids"][0, j] < tiny.IMAGE}
    if tiny.START in case["inputs"]["input_ids"]:  # markers of later images are text that follows, too
        words |= {j for j, t in enumerate(case["inputs"]["input_ids"][0].tolist()) if j > first and t in (92, 93)}
    expected = recompute(
        case["model"], case["embeds"], case["position"], lambda i, j: j <= i or (i in visual and j in words), ALL
    )
    found = applied(case["model"], case["inputs"], "modality_mutual")[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


Place = tuple[int, ...]


def places(case: dict[str, Any]) -> dict[int, Place]:
    """Image, view, row and column of every visual token, by its position in the prompt."""
    report = applied(case["model"], case["inputs"], "composite")[1]
    return dict(zip(sorted(case["visual"]), map(tuple, report.places[0].tolist()), strict=True))


def near(place: dict[int, Place], both: bool, close: Callable[[Place, Place], bool]) -> Rule:
    """Visual tokens of one view see each other if `close`; of other views, or later unless `both`, they see none."""

    def sees(i: int, j: int) -> bool:
        if i not in place or j not in place:
            return j <= i
        return place[i][:2] == place[j][:2] and (both or j <= i) and close(place[i], place[j])

    return sees


@pytest.mark.parametrize("both", [True, False])
def test_window(case: dict[str, Any], both: bool) -> None:
    sees = near(places(case), both, lambda a, b: max(abs(a[2] - b[2]), abs(a[3] - b[3])) <= 1)
    expected = recompute(case["model"], case["embeds"], case["position"], sees, ALL)
    found = applied(case["model"], case["inputs"], f"window2d(radius=1,bidirectional={both})")[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("width", "stride", "both"), [(3, 1, False), (3, 1, True), (2, 2, False), (4, 2, True)])
def test_gna(case: dict[str, Any], width: int, stride: int, both: bool) -> None:
    """Along each axis, a window around the leader of the token's group, shifted to stay inside the view's grid."""
    place = places(case)

    def within(axis: int, a: Place, b: Place) -> bool:
        length = 1 + max(other[axis] for other in place.values() if other[:2] == a[:2])
        leader = min(a[axis] // stride * stride + stride // 2, length - 1)
        first = max(0, min(leader - width // 2, length - width))
        return first <= b[axis] < first + width

    sees = near(place, both, lambda a, b: within(2, a, b) and within(3, a, b))
    expected = recompute(case["model"], case["embeds"], case["position"], sees, ALL)
    plan = f"gna(window={width},stride={stride},bidirectional={both})"
    for mode in ("apply", "simulate"):
        with Plan(plan).apply(case["model"], mode=mode), torch.no_grad():  # type: ignore[arg-type]
            found = case["model"](**case["inputs"]).logits[0, -1]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_block_images(case: dict[str, Any]) -> None:
    sees = near(places(case), False, lambda a, b: True)
    expected = recompute(case["model"], case["embeds"], case["position"], sees, ALL)
    torch.testing.assert_close(applied(case["model"], case["inputs"], "block_images")[0], expected, rtol=0, atol=1e-5)


def test_shortv_freezes_rows(case: dict[str, Any]) -> None:
    at = torch.tensor(sorted(case["visual"]))

    def step(number: int, layer: Any, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        return after.index_copy(1, at, before[:, at]) if number in (0, 2) else after

    expected = recompute(case["model"], case["embeds"], case["position"], lambda i, j: j <= i, ALL, step)
    found = applied(case["model"], case["inputs"], "shortv(layers=(0, 2))")[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_layer_drop_reads_nothing_but_counts(case: dict[str, Any]) -> None:
    """From layer 2 on the masked re-computation has values of zero for visual tokens, whose rows stand still."""
    at = torch.tensor(sorted(case["visual"]))

    def step(number: int, layer: Any, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        return after.index_copy(1, at, before[:, at]) if number >= 2 else after

    def empty(module: nn.Module, args: Any, values: torch.Tensor) -> torch.Tensor:
        return values.index_fill(1, at, 0.0)

    hooks = [layer.self_attn.v_proj.register_forward_hook(empty) for layer in case["model"].get_decoder().layers[2:]]
    expected = recompute(case["model"], case["embeds"], case["position"], lambda i, j: j <= i, ALL, step)
    for hook in hooks:
        hook.remove()
    for mode in ("apply", "simulate"):
        with Plan("layer_drop(from_layer=2)").apply(case["model"], mode=mode), torch.no_grad():  # type: ignore[arg-type]
            found = case["model"](**case["inputs"]).logits[0, -1]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("trained", [False, True])
def test_saisa_overwrites_rows_in_every_layer(trained: bool) -> None:
    model: Any = tiny.build("llava")
    inputs = tiny.collate("llava", [tiny.prompt("llava", 1, 3, 5)])
    embeds, position = decoder_inputs(model, inputs)
    at = torch.arange(3, 19)
    seen: list[torch.Tensor] = []
    handle = model.model.multi_modal_projector.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    model(**inputs)
    handle.remove()
    projectors = [model.model.multi_modal_projector] * tiny.LAYERS
    if trained:
        torch.manual_seed(3)
        projectors = [nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 32)) for _ in range(tiny.LAYERS)]
        model.model.layer_projectors = nn.ModuleList(projectors)
    rows = [projector(seen[0]) for projector in projectors]

    def step(number: int, layer: Any, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        return after.index_copy(1, at, rows[number + 1]) if number + 1 < tiny.LAYERS else after

    with torch.no_grad():
        start = embeds.index_copy(1, at, rows[0])
    expected = recompute(model, start, position, lambda i, j: j <= i, ALL, step)
    torch.testing.assert_close(applied(model, inputs, "saisa")[0], expected, rtol=0, atol=1e-5)


def test_skipped_and_thin_ffns(case: dict[str, Any]) -> None:
    at = torch.tensor(sorted(case["visual"]))
    causal = torch.ones(1, 1, *[case["embeds"].shape[1]] * 2, dtype=torch.bool).tril()
    position = case["position"]
    rope = (
        case["model"]
        .get_decoder()
        .rotary_emb(case["embeds"], position[1:] if position.ndim == 3 and len(position) == 4 else position)
    )
    for share in (0, 12):  # of an inner width of 48

        def step(
            number: int, layer: Any, before: torch.Tensor, after: torch.Tensor, share: int = share
        ) -> torch.Tensor:
            rows = layer.self_attn(layer.input_layernorm(before), attention_mask=causal, position_embeddings=rope)[0]
            rows = (before + rows)[:, at]
            normed, mlp = layer.post_attention_layernorm(rows), layer.mlp
            inner = mlp.act_fn(mlp.gate_proj(normed)) * mlp.up_proj(normed)
            inner[..., share:] = 0
            return after.index_copy(1, at, rows + mlp.down_proj(inner))

        expected = recompute(case["model"], case["embeds"], position, lambda i, j: j <= i, ALL, step)
        plan = "thin_ffn(ratio=4.0)" if share else "skip_ffn(layers=all)"
        torch.testing.assert_close(applied(case["model"], case["inputs"], plan)[0], expected, rtol=0, atol=1e-5)


def test_flops_by_hand() -> None:
    """One image of 16 tokens and 8 of text; D = 32, I = 48, 4 query and 2 key heads of 8, 4 layers."""
    model = tiny.build("llava")
    inputs = tiny.collate("llava", [tiny.prompt("llava", 1, 3, 5)])
    text, visual = 9, 16  # `prompt` puts a word after the image
    rows = text + visual
    q = o = 32 * 32
    kv, ffn, pair = 2 * 32 * 16, 3 * 32 * 48, 2 * 32
    full = rows * (q + kv + o + ffn) + rows * rows * pair

    def layer(queries: int, outs: int, ffns: float) -> float:
        return queries * q + rows * kv + outs * o + ffns * ffn + queries * rows * pair

    projector = 16 * 32 + 32 * 32
    cases = {
        "composite": 4 * layer(text, rows, rows),
        "no_visual_self(scope=nothing)": 4 * layer(text, text, rows),
        "shortv(layers=(1, 2))": 2 * full + 2 * layer(text, text, text),
        "skip_ffn(layers=(0,))": 3 * full + layer(rows, rows, text),
        "thin_ffn(ratio=2.0)": 4 * layer(rows, rows, text + visual / 2),
        "layer_drop(from_layer=3)": 3 * full + layer(text, text, text) - visual * kv // 2,
        "saisa": 4 * (layer(text, text, text) + visual * projector),
        "window2d": 4 * full,
    }
    for plan, macs in cases.items():
        report = applied(model, inputs, plan)[1]
        assert report.prefill_flops_without_plan == 2 * 4 * full
        assert report.prefill_flops == 2 * macs, plan


def test_saisa_saves_two_thirds_of_the_prefill_of_a_7b() -> None:
    """576 visual and 64 text tokens, projectors of 1024 -> 4096 -> 4096 included."""
    from transformers import LlamaConfig

    from mmefficient.flops import layer_flops, visual_savings
    from mmefficient.points import VisualWork

    config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_key_value_heads=32)
    work = VisualWork("nothing", 0.0, extra=1024 * 4096 + 4096**2)
    saved = visual_savings(config, 640, 576, work) / layer_flops(config, 640)
    assert 0.66 < saved < 0.67


@pytest.mark.parametrize("plan", ["composite", "saisa", "no_visual_self(scope=nothing)", "window2d"])
def test_gradients(plan: str) -> None:
    """Those of computing less are those of masking."""
    found = []
    batch = tiny.collate("llava", [tiny.prompt("llava", 1, 3, 5), tiny.prompt("llava", 1, 2, 4)])
    for way in ("apply", "simulate"):
        model: Any = tiny.build("llava")
        with Plan(plan).apply(model, mode=way):  # type: ignore[arg-type]
            model(**batch, use_cache=False).logits[:, -1].square().sum().backward()
        found.append({name: p.grad for name, p in model.model.language_model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        largest = float(gradient.abs().max())
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-3, atol=1e-5 * max(1.0, largest))
