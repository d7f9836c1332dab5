"""The grammar of plans, what is refused, and the registry of methods."""

from __future__ import annotations

import json
import math
from dataclasses import MISSING, dataclass, fields
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mmefficient as mm
from mmefficient import methods as registry
from mmefficient.errors import BudgetError, PlanError, UnknownMethodError
from mmefficient.methods.reducers.exit import Exit
from mmefficient.methods.reducers.fastv import FastV
from mmefficient.methods.reducers.random import Random
from mmefficient.plan import Plan
from mmefficient.points import Reducer


def test_text_is_read_and_written() -> None:
    text = "fastv(layer=2,keep=0.25)+exit(layer=8)"
    plan = Plan(text)
    assert plan.methods == (FastV(layer=2, keep=0.25), Exit(layer=8))
    assert str(plan) == text
    assert repr(plan) == f"Plan({text!r})"
    assert Plan("  fastv ( keep = 0.25 , layer = 2 ) + exit(layer=8) ") == plan
    assert Plan(list(plan.methods)) == plan == Plan(plan)
    assert Plan("grid") == Plan("grid()")
    assert Plan("random(positions=compact)") == Plan("random(positions='compact')") != Plan("random")
    assert hash(Plan(text)) == hash(plan)
    assert Plan("grid(keep=1)") != Plan("grid(keep=1.0)")


@pytest.mark.parametrize("empty", ["", " ", "none", None, []])
def test_empty_plans(empty: Any) -> None:
    assert not Plan(empty)
    assert str(Plan(empty)) == "none"
    assert Plan(empty) == Plan()


budgets = st.one_of(st.integers(1, 5000), st.floats(0, 1, exclude_min=True))
early = st.one_of(
    st.builds(Random, keep=budgets, seed=st.integers(-9, 9), positions=st.sampled_from(["keep", "compact"])),
    st.builds(lambda keep: registry.method("grid")(keep=keep), budgets),  # type: ignore[call-arg]
)


@given(st.one_of(st.none(), early), st.lists(st.builds(FastV, layer=st.integers(1, 40), keep=budgets), max_size=3))
def test_round_trips(first: Reducer | None, later: list[FastV]) -> None:
    methods = [*([first] if first else []), *sorted(later, key=lambda method: method.layer)]
    plan = Plan(methods)
    assert Plan(str(plan)) == plan
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("fastw(layer=2)", UnknownMethodError, "did you mean 'fastv'"),
        ("zzz", UnknownMethodError, "known are: .*exit, .*fastv"),
        ("fastv(laier=2)", UnknownMethodError, "did you mean 'layer'"),
        ("fastv(2)", PlanError, "every value needs its name"),
        ("fastv(**{})", PlanError, "every value needs its name"),
        ("fastv(layer=2", PlanError, "cannot read the plan"),
        ("fastv(layer=2)-exit(layer=3)", PlanError, "join methods with"),
        ("1+2", PlanError, "join methods with"),
        ("fastv(layer=1+1j)", PlanError, "not a whole number"),
        ("fastv(layer=f())", PlanError, "not a plain value"),
        ("fastv(layer=2.0)", PlanError, "not a whole number"),
        ("fastv(layer=True)", PlanError, "not a whole number"),
        ("fastv(layer=-1)", PlanError, "count from 0"),
        ("fastv(layer=0)", PlanError, "no layer before it"),
        ("exit", PlanError, "needs a value for layer"),
        ("exit(layer=late)", PlanError, "neither a whole number nor 'auto'"),
        ("grid(keep=0.5,keep=0.25)", PlanError, "gives keep twice"),
        ("grid(keep={[]: 1})", PlanError, "not a plain value"),
        ("grid\0", PlanError, "cannot read the plan"),
        ("(" * 999 + "grid" + ")" * 999, PlanError, "cannot read the plan"),
        ("pai(alpha=strong)", PlanError, "not a number"),
        ("pai(alpha=1e999)", PlanError, "not a number"),
        ("vhr(second=1)", PlanError, "not True or False"),
        ("act(sinks=some)", PlanError, "none of 'all', 'visual', 'text'"),
        ("random(keep=0)", BudgetError, "keeps too little"),
        ("random(keep=0.0)", BudgetError, "outside"),
        ("random(keep=-0.5)", BudgetError, "outside"),
        ("random(keep=1.5)", BudgetError, "outside"),
        ("random(keep=-3)", BudgetError, "keeps too little"),
        ("random(keep=many)", BudgetError, "not a number"),
        ("random(seed=a)", PlanError, "not a whole number"),
        ("random(positions=close)", PlanError, "neither 'keep' nor 'compact'"),
        ("visionzip(dominant=0)", BudgetError, "dominant=0"),
        ("visionzip(contextual=-1)", BudgetError, "contextual=-1"),
        ("exit(layer=2)+fastv(layer=3)", PlanError, "put the exit last"),
        ("fastv(layer=3)+random()", PlanError, "in the order of their layers"),
        ("random()+grid()", PlanError, "complete patch grids"),
        ("pool()+visionzip()", PlanError, "vision tower features"),
    ],
)
def test_bad_plans(text: str, error: type[PlanError], says: str) -> None:
    with pytest.raises(PlanError, match=says) as caught:
        Plan(text)
    assert type(caught.value) is error


def test_what_is_not_a_method_is_refused() -> None:
    with pytest.raises(PlanError, match="not a method"):
        Plan([FastV, FastV()])  # type: ignore[list-item]
    with pytest.raises(PlanError, match="not a plan"):
        Plan(FastV())  # type: ignore[arg-type]


@pytest.mark.parametrize("data", [{}, [], None, {"methods": 3}, {"methods": [{}]}, {"methods": ["grid"]}])
def test_data_that_describes_no_plan(data: Any) -> None:
    with pytest.raises(PlanError, match="a plan as data is"):
        Plan.from_dict(data)


NEEDED = {"layer": 2, "layers": (1,), "from_layer": 2, "exit": 3, "mask": ((0, 0),)}
STRANGE = ["strange", "None", "it's", None, True, 2.5, 10**30, math.inf, math.nan, 1j, b"", {}, {1}]
STRANGE += [(), (1,), ("a",), ((0,),), ((0, 0),)]


@pytest.mark.parametrize("method", mm.methods(), ids=lambda method: method.name)
def test_fields_take_a_value_of_their_type_or_raise(method: Any) -> None:
    """What is taken can be hashed, written, read and compared; nothing else passes, on a model or before."""
    needed = {each.name: NEEDED[each.name] for each in fields(method) if each.default is MISSING}
    for field in fields(method):
        refused = 0
        for value in STRANGE:
            try:
                plan = Plan([method(**{**needed, field.name: value})])
            except PlanError:
                refused += 1
            else:
                assert Plan(str(plan)) == plan == Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
                assert hash(Plan(str(plan))) == hash(plan)
        assert refused >= len(STRANGE) - 5


def test_mode_is_checked() -> None:
    with pytest.raises(PlanError, match="neither 'apply' nor 'simulate'"):
        Plan().apply(None, mode="mask").__enter__()  # type: ignore[arg-type]


def test_methods_are_listed_and_documented() -> None:
    found = mm.methods()
    pages = sorted(page.stem for page in (Path(__file__).parent.parent / "docs" / "methods").glob("*.md"))
    assert [method.name for method in found] == pages
    assert registry.methods() == found
    for method in found:
        assert method.point in ("reducer", "modulation", "rows", "pattern", "view")
        assert method.summary
        assert method.paper.startswith("https://")
        assert all(field.metadata["help"] for field in fields(method))
        assert method.__doc__


@dataclass(frozen=True)
class First(Reducer):
    """Keeps the first tokens."""

    name: ClassVar[str] = "first"
    paper: ClassVar[str] = "https://example.org"
    summary: ClassVar[str] = "keep the first tokens"

    keep: float | int = 0.5


@dataclass(frozen=True)
class Impostor(First):
    """Wants a built-in name."""

    name: ClassVar[str] = "fastv"


@pytest.mark.parametrize(("target", "says"), [("First", ""), ("Impostor", "in use"), ("pytest", "not a method class")])
def test_third_party_methods(target: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint(name="ours", value=f"ours:{target}", group="mmefficient.methods")
    monkeypatch.setattr(EntryPoint, "load", lambda self: globals()[target])
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry] if group == "mmefficient.methods" else [])
    registry._registry.cache_clear()
    try:
        if says:
            with pytest.raises(PlanError, match=says):
                Plan("grid")
        else:
            assert Plan("first(keep=0.25)").methods == (First(keep=0.25),)
            assert First in mm.methods()
    finally:
        registry._registry.cache_clear()
