"""Rows of a batch do not notice each other, and hiding tokens equals removing them."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmefficient.errors import MMEfficientError
from mmefficient.plan import Plan
from tests import tiny
from tests.executor.oracle import logits

PLANS = [
    "random(keep=0.5)",
    "random(keep=0.5,seed=1,positions=compact)",
    "grid(keep=0.4)",
    "pool(keep=0.3)",
    "fastv(layer=2,keep=0.5)",
    "exit(layer=0)",
    "exit(layer=2)",
    "visionzip(dominant=0.4,contextual=0.2)",
    "visionzip(dominant=0.4,contextual=0.2,positions=keep)+fastv(layer=1,keep=0.5)",
    "fastervlm(keep=0.4)",
    "vispruner(keep=0.4,important=0.5)",
    "scope(keep=0.4)",
    "divprune(keep=0.4,positions=keep)",
    "dart(layer=1,keep=0.5)",
    "random(keep=0.8)+dart(layer=2,keep=0.4,image_pivots=2,text_pivots=1)",
    "downsample(keep=0.3)",
    "tome(keep=0.5)",
    "tome(keep=0.3,where=output,positions=keep)",
    "prumerge()",
    "prumerge(keep=0.5,plus=True,positions=keep)",
    "hiprune(keep=0.6,alpha=0.8)",
    "cdpruner(keep=0.4,matcher=words,positions=keep)",
    "trim(keep=0.3,matcher=embeddings)",
    "trim(matcher=embeddings,positions=keep)+fastv(layer=1,keep=0.5)",
    "pyramiddrop(shares=(0.6,0.4,0.2))",
    "sparsevlm(shares=(0.7,0.5,0.3),recycle=0.6,layers=(1,2,3))",
    "random(keep=0.8)+sparsevlm(shares=(0.6,0.5,0.2),recycle=0)+exit(layer=3)",
    "urag(keep=1,layer=2)+pyramiddrop",
    "pact(layer=1,keep=0.8,cutoff=0.4,reach=1.5)",
    "pact(layer=1,keep=0.9,cutoff=0.3,reach=1.2)+fastv(layer=3,keep=0.5)",
    f"dyvte(gates='{tiny.GATES}')",
    f"urag(keep=1,head='{tiny.HEAD}')+dyvte(gates='{tiny.GATES}')+fastv(layer=2,keep=0.5)",
    "pool(keep=0.5)+random(keep=0.7)+fastv(layer=1,keep=0.5)+fastv(layer=2,keep=1)+exit(layer=3)",
    "vaf(first=1,last=2)+fastv(layer=1,keep=0.5)",
    "random(keep=0.5,positions=compact)+pai(alpha=0.4,first=1)",
    "fastv(layer=1,keep=0.5)+var(p=0.3,tau=1.5,first=1)+spin(keep=0.5)",
    "random(keep=0.6)+adhh(theta=0.1,heads=((1,0),(2,3)))",
    "vhr(deep=0.5)+fastv(layer=2,keep=0.5)+pai(alpha=0.4)",
    "fastv(layer=2,keep=0.5)+act(beta=0.2,theta=0.05)+lift",
]


def supported(family: str, plan: str) -> bool:
    """M-RoPE cannot close up ids, and merged patches have no tower facts."""
    methods = Plan(plan).methods
    refused = any(each.needs & {"tower", "mark"} or getattr(each, "positions", "keep") == "compact" for each in methods)
    return family != "qwen2_5_vl" or not refused


CASES = [(family, plan) for family in tiny.FAMILIES for plan in PLANS if supported(family, plan)]


# names without the temporary folder of some plans, which differs between the processes of a run
@pytest.mark.parametrize(("family", "plan"), CASES, ids=[f"{f}-{re.sub('/.*/', '', p)}" for f, p in CASES])
def test_rows_equal_batch_one_and_hiding_equals_removing(family: str, plan: str) -> None:
    model, prompts = tiny.build(family), tiny.ragged_prompts(family)
    batch = tiny.collate(family, prompts)
    with Plan(plan).apply(model) as run:
        together = logits(model, batch)
    report = run.report()
    with Plan(plan).apply(model, mode="simulate") as simulated:
        torch.testing.assert_close(together, logits(model, batch), rtol=0, atol=1e-5)
    hidden = simulated.report()
    assert [row.kept_per_layer for row in hidden.rows] == [row.kept_per_layer for row in report.rows]
    assert hidden.prefill_flops == hidden.prefill_flops_without_plan
    for row, each in enumerate(prompts):
        with Plan(plan).apply(model) as run:
            torch.testing.assert_close(
                together[:, row], logits(model, tiny.collate(family, [each]))[:, 0], rtol=0, atol=1e-5
            )
        alone = run.report()
        for layer in range(tiny.LAYERS):
            assert torch.equal(alone.kept(0, layer), report.kept(row, layer))
            assert torch.equal(alone.kept(0, layer), hidden.kept(row, layer))


@pytest.mark.parametrize("plan", ["random(keep=0.5)", "fastv(layer=1,keep=0.5)+exit(layer=3)"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_eager_masks(family: str, plan: str) -> None:
    batch = tiny.ragged_batch(family)
    results = []
    for implementation in ("sdpa", "eager"):
        model = tiny.build(family, implementation)
        with Plan(plan).apply(model):
            results.append(logits(model, batch))
    torch.testing.assert_close(*results, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["apply", "simulate"])
def test_equal_rows_stay_without_a_mask(mode: str) -> None:
    """The same counts in every row: no padding appears, so the fast causal path must stay open."""
    model = tiny.build("llava")
    batch = tiny.collate("llava", [tiny.prompt("llava", 1, 3, 4), tiny.prompt("llava", 1, 2, 5)])
    masks = []

    def note(module: torch.nn.Module, args: object, kwargs: dict[str, object]) -> None:
        masks.append(kwargs["attention_mask"])

    handle = model.get_decoder().layers[3].self_attn.register_forward_pre_hook(note, with_kwargs=True)
    with Plan("fastv(layer=2,keep=0.5)").apply(model, mode=mode):
        logits(model, batch)
    handle.remove()
    assert all(mask is None for mask in masks) == (mode == "apply")


def test_rows_without_images_alone() -> None:
    model, batch = tiny.build("llava"), tiny.collate("llava", [tiny.prompt("llava", 0, 2, 5)])
    plain = logits(model, batch)
    with Plan("fastv(layer=2,keep=0.5)").apply(model) as run:
        assert torch.equal(plain, logits(model, batch))
    assert run.report().rows[0].visual_total == 0


def test_right_padding_in_plain_forward() -> None:
    """The last prompt token is not in the last column; the rows that are left come out padded on the left."""
    model = tiny.build("llava")
    prompts = [tiny.prompt("llava", 1, 3, 6), tiny.prompt("llava", 1, 2, 4)]
    left = tiny.collate("llava", prompts)
    right = dict(left)
    right["input_ids"] = torch.stack([left["input_ids"][0], left["input_ids"][1].roll(-3)])
    right["attention_mask"] = torch.stack([left["attention_mask"][0], left["attention_mask"][1].flip(0)])
    for plan in ("fastv(layer=1,keep=0.5)", "fastv(layer=1,keep=0.5)+fastv(layer=2,keep=3)"):
        with Plan(plan).apply(model) as run, torch.no_grad():
            expected = [model(**tiny.collate("llava", [each])).logits[0] for each in prompts]
            got = model(**right).logits
        assert [row.kept_per_layer[-1] for row in run.report().rows] == [8, 8] if "3" not in plan else [3, 3]
        for row, alone in enumerate(expected):
            torch.testing.assert_close(got[row, -len(alone) :], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("plan", ["visionzip(dominant=2,contextual=1)", "random(keep=0.5,positions=compact)"])
def test_refused_on_qwen(plan: str) -> None:
    context = Plan(plan).apply(tiny.build("qwen2_5_vl"))
    with pytest.raises(MMEfficientError):
        context.__enter__()


RANDOM_SHAPES = ("llava_next", "qwen2_5_vl")
rows = st.tuples(st.integers(0, 2), st.integers(1, 6), st.integers(1, 6), st.integers(0, 2))


@settings(max_examples=12, deadline=None)
@given(st.sampled_from([case for case in CASES if case[0] in RANDOM_SHAPES]), st.lists(rows, min_size=2, max_size=4))
def test_any_batch(case: tuple[str, str], shapes: list[tuple[int, int, int, int]]) -> None:
    family, plan = case
    model, prompts = tiny.build(family), [tiny.prompt(family, *shape) for shape in shapes]
    with Plan(plan).apply(model):
        together = logits(model, tiny.collate(family, prompts), max_new_tokens=3)
        for row, each in enumerate(prompts):
            single = logits(model, tiny.collate(family, [each]), max_new_tokens=3)[:, 0]
            torch.testing.assert_close(together[:, row], single, rtol=0, atol=1e-5)
