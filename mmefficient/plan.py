"""Plan: methods composed, read from text, applied to a model."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, fields
from itertools import pairwise
from typing import Any, Literal

from torch import nn

from mmefficient.errors import ModelError, PlanError, SilentPlanError, UnknownMethodError
from mmefficient.executor import Executor
from mmefficient.graph import EngineName
from mmefficient.graph import attach as attach_engine
from mmefficient.methods import method, suggest
from mmefficient.models import adapter_for
from mmefficient.points import Method, Reducer, RowPolicy
from mmefficient.run import Run
from mmefficient.view import View

Mode = Literal["apply", "simulate"]
ATTACHED = "_mmefficient_executor"


class Plan:
    """Methods that act one after the other. Immutable; equal plans compare and hash equal.

    Args:
        methods: text such as "fastv(layer=2,keep=0.25)+exit(layer=8)", method instances, or another plan.
            "", "none" and nothing at all are the empty plan.

    Raises:
        UnknownMethodError: a method or a field does not exist.
        BudgetError: a budget is outside its range.
        PlanError: the text cannot be read, or the methods cannot be composed.
    """

    def __init__(self, methods: str | Plan | Iterable[Method] | None = None) -> None:
        if isinstance(methods, str):
            self.methods = tuple(_parse(methods))
        elif isinstance(methods, Plan):
            self.methods = methods.methods
        elif methods is None or isinstance(methods, Iterable):
            self.methods = tuple(methods or ())
        else:
            raise PlanError(f"{methods!r} is not a plan; give its text, or a list of method instances.")
        _compose(self.methods)

    def __str__(self) -> str:
        return "+".join(str(each) for each in self.methods) or "none"

    def __repr__(self) -> str:
        return f"Plan({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        # in Python 1 == 1.0, but keep=1 is one token and keep=1.0 all of them
        return isinstance(other, Plan) and self.methods == other.methods and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(self.methods)

    def __bool__(self) -> bool:
        return bool(self.methods)

    @property
    def reusable(self) -> bool:
        """Whether a picture that was read under the plan can serve any question (`VLM.encode`).

        False where methods score visual tokens by the question, show it to visual rows, or change attention.
        """
        return all(each.many_turns for each in self.methods)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "methods": [
                {"name": each.name, **{f.name: getattr(each, f.name) for f in fields(each)}} for each in self.methods
            ]
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """The inverse of `to_dict`.

        Raises:
            PlanError: the data does not describe a plan.
        """
        try:
            entries = [dict(entry) for entry in data["methods"]]
            named = [(str(entry.pop("name")), entry) for entry in entries]
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError('a plan as data is {"methods": [{"name": ..., fields}, ...]}.') from error
        return cls([_make(*each) for each in named])

    @contextmanager
    def apply(
        self, model: nn.Module, mode: Mode = "apply", tokenizer: Any = None, engine: EngineName = "eager"
    ) -> Iterator[Run]:
        """Put the plan on `model` for the time of a `with` block; afterwards the model is as it was.

        Inside, `model.generate` and `model(...)` work as usual. A plain forward returns logits for the rows that are
        left: visual tokens that leave take theirs with them, and shorter rows of a batch are padded on the left.

        Args:
            model: a ForConditionalGeneration model of a supported family.
            mode: "apply" removes tokens; "simulate" decides the same but only hides them, which saves nothing.
            tokenizer: the model's, for methods that read the words of the question (`matchers.words.Words` leaves the
                chat template's out); others need none.
            engine: "eager": `generate` runs as it is; "graph": it runs as recorded programs (CUDA graphs), or raises;
                "auto": as recorded programs where that works. Without a GPU "auto" runs the programs unrecorded.

        Raises:
            ModelError: the model cannot carry the plan, or carries one already; engine="graph" cannot run it.
            PlanError: a layer is out of range for this model.
            SilentPlanError: on leaving, if prompts with images were run and no method acted on them.
        """
        if mode not in ("apply", "simulate"):
            raise PlanError(f"mode={mode!r} is neither 'apply' nor 'simulate'.")
        adapter = adapter_for(model)
        if ATTACHED in adapter.base.__dict__:
            raise ModelError("this model already carries a plan; leave it first, or add the methods to it with '+'.")
        run = Run(str(self), mode, adapter)
        executor = Executor(model, adapter, self.methods, run, tokenizer)
        undo: list[Callable[[], Any]] = []
        try:
            executor.attach(undo)
            undo += attach_engine(executor, engine)
        except BaseException:
            for step in reversed(undo):
                step()
            raise
        adapter.base.__dict__[ATTACHED] = executor
        model.__dict__.pop("_compiled_call", None)  # a compiled decode step does not notice new hooks
        try:
            yield run
        finally:
            for step in reversed(undo):
                step()
            del adapter.base.__dict__[ATTACHED]
            model.__dict__.pop("_compiled_call", None)
        if self.methods and run.saw_images and not run.acted:
            raise SilentPlanError(f"the plan {self} saw images but never acted; check that its layers are reached.")


def _parse(text: str) -> Iterator[Method]:
    if text.strip() in ("", "none"):
        return
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError) as error:  # ValueError: null bytes
        example = "fastv(layer=2,keep=0.25)+exit(layer=8)"
        raise PlanError(f"cannot read the plan {text!r}; write it like {example!r}.") from error
    for call in _terms(tree, text):
        if call.args or any(keyword.arg is None for keyword in call.keywords):
            raise PlanError(f"in {ast.unparse(call)!r} every value needs its name, as in 'fastv(layer=2,keep=0.25)'.")
        values: dict[str, Any] = {}
        for keyword in call.keywords:
            if keyword.arg in values:
                raise PlanError(f"{ast.unparse(call)!r} gives {keyword.arg} twice; leave one of the two out.")
            values[str(keyword.arg)] = _value(keyword, text)
        yield _make(call.func.id, values)  # type: ignore[attr-defined]


def _terms(tree: ast.expr, text: str) -> Iterator[ast.Call]:
    if isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Add):
        yield from _terms(tree.left, text)
        yield from _terms(tree.right, text)
    elif isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name):
        yield tree
    elif isinstance(tree, ast.Name):
        yield ast.Call(tree, [], [])
    else:
        raise PlanError(f"cannot read {ast.unparse(tree)!r} in the plan {text!r}; join methods with '+'.")


def _value(keyword: ast.keyword, text: str) -> Any:
    if isinstance(keyword.value, ast.Name):  # positions=keep needs no quotes
        return keyword.value.id
    try:
        return ast.literal_eval(keyword.value)
    except (ValueError, TypeError) as error:  # TypeError: a list as a key
        raise PlanError(f"{ast.unparse(keyword)!r} in the plan {text!r} is not a plain value.") from error


def _make(name: str, values: Mapping[str, Any]) -> Method:
    kind = method(name)
    known = {f.name: f for f in fields(kind)}
    for given in values:
        if given not in known:
            raise UnknownMethodError(f"{name} has no field {given!r}; {suggest(given, known)}")
    missing = [f.name for f in known.values() if f.default is MISSING and f.name not in values]
    if missing:
        raise PlanError(f"{name} needs a value for {', '.join(missing)}.")
    return kind(**values)


def _compose(methods: tuple[Method, ...]) -> None:
    """Refuse what has no meaning, with a sentence that says why."""
    for each in methods:
        if not isinstance(each, Method):
            raise PlanError(f"{each!r} is not a method; give method instances or text.")
    if len(views := [each for each in methods if isinstance(each, View)]) > 1:
        raise PlanError(f"{views[0]} and {views[1]} both run a second stream; a plan takes one.")
    if len(anew := [each for each in methods if isinstance(each, RowPolicy) and each.sources]) > 1:
        raise PlanError(f"{anew[0]} and {anew[1]} both say where visual rows come from; use one of them.")
    reducers = [each for each in methods if isinstance(each, Reducer)]
    for each in reducers:
        if each.position_policy == "compact" and each.site > 0:
            raise PlanError(f"{each}: position ids can only close up at the language model's input (layer 0).")
    for thin in (each for each in reducers if each.thins):
        for other in methods:
            if other is not thin and other.watches:
                raise PlanError(f"{other} asks the vision tower, which {thin} has changed; use one of them.")
        if thin is not reducers[0]:
            raise PlanError(f"{thin} acts inside the vision tower, before {reducers[0]}; put it first.")
    for before, after in pairwise(reducers):
        if before.name == "exit":
            raise PlanError(f"{after} follows {before}, after which no visual token is left; put the exit last.")
        if after.site < before.site and not (after.staged or before.staged):
            raise PlanError(f"{after} acts before {before}; write methods in the order of their layers.")
        if "full_grid" in after.needs:
            raise PlanError(f"{after} needs complete patch grids, which {before} breaks up; put it first.")
        if after.space == "tower" and before.space != "tower":
            raise PlanError(f"{after} mixes vision tower features, which {before} has already changed; put it first.")
