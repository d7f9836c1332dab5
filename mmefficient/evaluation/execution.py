"""Asks the questions under every plan: what an earlier run answered is read, the rest is divided over the processes."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mmefficient.errors import MMEfficientError
from mmefficient.evaluation.answers import AnswerLog
from mmefficient.evaluation.baselines import budget, matched
from mmefficient.evaluation.generation import Asker, batches
from mmefficient.evaluation.processes import Processes
from mmefficient.evaluation.report import PlanRun
from mmefficient.evaluation.task import Record
from mmefficient.plan import Plan


@dataclass(frozen=True)
class Job:
    """A plan and its answers so far; `rivals` are the plans it has to beat, by name of the baseline."""

    plan: Plan
    log: AnswerLog
    rivals: dict[str, list[str]] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """The plan's budget (`baselines.budget`), known once all questions are answered."""
        return budget(self.log.answers.values())


class Execution:
    """One run of `records`; `identity` says what its answers depend on besides the plan. A context manager."""

    def __init__(
        self,
        asker: Asker,
        records: Sequence[Record],
        identity: Mapping[str, Any],
        folder: Path | None,
        world: Processes,
    ) -> None:
        self.asker, self.records, self.identity, self.folder, self.world = asker, records, identity, folder, world
        self.jobs: dict[str, Job] = {}
        self.left_out: dict[str, str] = {}
        """Baselines that this model cannot carry, and why."""
        self._stack = ExitStack()
        self._shared: set[str] = set()

    def __enter__(self) -> Execution:
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the answer files."""
        self._stack.close()

    def add(self, plan: Plan, trial: bool = True) -> Job:
        """Opens a plan's answers; with a `trial`, one that does not fit the model is refused now, by a question."""
        if str(plan) in self.jobs:
            return self.jobs[str(plan)]
        name = f"answers-{hashlib.sha256(str(plan).encode()).hexdigest()[:12]}"
        header = {**self.identity, "plan": str(plan)}
        ids = [record.id for record in self.records]
        log = self._stack.enter_context(AnswerLog(self.folder, name, header, ids, self.world.rank))
        if trial and ids[0] not in log.answers:
            with self.asker.under(plan) as run:
                self.asker.ask(self.records[:1], run, most=1)
        self.jobs[str(plan)] = Job(plan, log)
        return self.jobs[str(plan)]

    def add_baselines(self, job: Job, names: Collection[str], seeds: Sequence[int], trial: bool = True) -> None:
        """Adds baselines at the budget of a plan that has been run; what the model cannot carry goes to `left_out`."""
        for name, plans in matched(job.share, seeds).items():
            if name not in names:
                continue
            try:
                found = [str(self.add(plan, trial).plan) for plan in plans]
            except MMEfficientError as error:
                self.left_out |= {str(plan): str(error) for plan in plans}
                continue
            if [method.name for method in job.plan.methods] != [name]:  # a baseline need not beat itself
                job.rivals[name] = found

    def run(self, size: int, check: int, progress: bool | None) -> list[PlanRun]:
        """Answers, in batches of `size`, what the logs lack; asks `check` questions per plan again, one by one.

        Batches are dealt out plan after plan, and processes meet at the end alone, so that none waits at every plan.
        """
        self._share()
        whole = batches(self.records, size, self.asker.task)
        todo, dealt = {}, 0
        for name, job in self.jobs.items():
            lacking = [batch for batch in whole if any(record.id not in job.log.answers for record in batch)]
            todo[name] = lacking[(self.world.rank - dealt) % self.world.size :: self.world.size]
            dealt += len(lacking)
        check = min(check, len(self.records))
        checked = [self.records[i * len(self.records) // check] for i in range(check)]
        done = sum(len(job.log.answers) for job in self.jobs.values())
        ahead = sum(len(batch) for own in todo.values() for batch in own)
        hidden = True if self.world.rank else None if progress is None else not progress
        with tqdm(total=done + ahead, initial=done, unit="question", smoothing=0.05, disable=hidden) as bar:
            alone = {name: self._ask(job, todo[name], checked, bar) for name, job in self.jobs.items()}
        return [self._collect(job, alone[name], checked) for name, job in self.jobs.items()]

    def _share(self) -> None:
        """Let every process know what all of them found on disk, before one of them writes more."""
        new = {name: job for name, job in self.jobs.items() if name not in self._shared}
        found = [(name, answer) for name, job in new.items() for answer in job.log.answers.values()]
        for name, answer in self.world.gather(found):
            new[name].log.share([answer])
        self._shared |= new.keys()

    def _ask(
        self, job: Job, todo: Sequence[Sequence[Record]], checked: Sequence[Record], bar: tqdm[Any]
    ) -> dict[str, str]:
        """This process's part of a plan; returns its answers to questions asked alone."""
        bar.set_description(str(job.plan))
        own = checked[self.world.rank :: self.world.size]
        if not todo and not own:
            return {}
        with self.asker.under(job.plan) as run:
            for batch in todo:
                job.log.append(self.asker.ask(batch, run))
                bar.update(len(batch))
            return {record.id: self.asker.ask([record], run)[0].text for record in own}

    def _collect(self, job: Job, alone: Mapping[str, str], checked: Sequence[Record]) -> PlanRun:
        """What all processes have answered."""
        job.log.share(self.world.gather(list(job.log.answers.values())))
        answers = [job.log.answers[record.id] for record in self.records]
        changed = {answer.id for answer in answers if alone.get(answer.id, answer.text) != answer.text}
        flips = set(self.world.gather(list(changed)))
        ids = [record.id for record in checked if record.id in flips]
        return PlanRun(str(job.plan), answers, len(checked), ids, job.share, job.rivals)
