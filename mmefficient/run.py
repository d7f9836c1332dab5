"""The handle that `Plan.apply` gives: what was run, and the report on it."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mmefficient.errors import PlanError
from mmefficient.prompt import PromptState
from mmefficient.report import Report

if TYPE_CHECKING:
    from mmefficient.graph.engine import Engine
    from mmefficient.models.base import Adapter


class Run:
    """One use of a plan on a model, between entering and leaving `Plan.apply`.

    Attributes:
        saw_images: a prompt held visual tokens; acted: a reducer decided about some.
        graph: the engine that runs `generate`, if one does; eager: why it did not run the latest call.
    """

    def __init__(self, plan: str, mode: str, adapter: Adapter) -> None:
        self.plan, self.mode = plan, mode
        self.layers = len(adapter.layers)
        self.config = adapter.decoder.config
        self.saw_images = self.acted = False
        self.graph: Engine | None = None
        self.eager: str | None = None
        self._prompts: dict[int, PromptState] = {}

    def add(self, state: PromptState) -> None:
        """Note a prompt; it becomes this thread's latest."""
        self._prompts.pop(threading.get_ident(), None)
        self._prompts[threading.get_ident()] = state

    def report(self) -> Report:
        """What happened to the latest prompt of this thread (or, if it ran none, of any thread).

        Raises:
            PlanError: nothing has been run yet.
        """
        prompts = dict(self._prompts)
        if not prompts:
            raise PlanError("there is nothing to report yet; call model.generate or the model inside the plan first.")
        state = prompts.get(threading.get_ident(), next(reversed(prompts.values())))
        report = Report.of(state.plan, state.mode, state.tokens, self.layers, self.config, state.works)
        return replace(report, engine=self.engine)

    @property
    def engine(self) -> dict[str, Any]:
        """What ran the latest `generate`: "name" ("graph" or "eager"), "why" it is eager where another was wanted, and
        the "recordings", "recorded_bytes" and "cache_bytes" that the graph engine holds for this model."""
        if self.graph is None or self.eager is not None:
            return {"name": "eager", "why": self.eager}
        return {"name": "graph", **self.graph.held()}
