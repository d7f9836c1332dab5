"""What shares a budget: pictures, crops, frames or the prompt, against the best of every group counted here."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch

from mmefficient.attention import KEY
from mmefficient.errors import PlanError
from mmefficient.models import adapter_for
from mmefficient.plan import Plan
from mmefficient.points import SHARED, Reducer, Scope, VisualTokens
from mmefficient.tokens import Role
from tests import tiny
from tests.executor.oracle import logits

SCOPES = ("image", "tile", "frame", "prompt")


@dataclass(frozen=True)
class First(Reducer):
    """Ranks by the first channel."""

    name: ClassVar[str] = "first"
    paper: ClassVar[str] = ""
    summary: ClassVar[str] = ""

    keep: float | int = 0.4
    scope: Scope = field(default="image", metadata=SHARED)

    def score(self, tokens: VisualTokens) -> torch.Tensor:
        return tokens.hidden[..., 0]


def video(family: str, frames: int) -> dict[str, Any]:
    """A prompt with one video; two pooled rows and columns per frame, OneVision ends it with a line break."""
    noise = torch.Generator().manual_seed(frames)
    count = 4 * frames
    if family == "llava_onevision":
        inputs = {"pixel_values_videos": torch.randn(1, frames, 3, 16, 16, generator=noise)}
        count += 1
    else:
        inputs = {
            "pixel_values_videos": torch.randn(16 * frames, 48, generator=noise),
            "video_grid_thw": torch.tensor([[frames, 4, 4]]),
        }
    ids = torch.tensor([[5, 6, *[tiny.VIDEO] * count, 7, 8, 9]])
    if family == "qwen2_5_vl":
        inputs |= {"mm_token_type_ids": 2 * (ids == tiny.VIDEO).int(), "second_per_grid_ts": torch.tensor([1.0])}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **inputs}


def kept(model: Any, inputs: dict[str, Any], plan: Plan) -> tuple[list[set[int]], list[dict[Any, list[int]]]]:
    """Positions that stay in every row, and those of every group by (scope, image, part), best first."""
    seen: dict[str, Any] = {}

    def note(layer: Any, args: Any, kwargs: Any) -> None:
        if not seen:
            seen.update(tokens=kwargs[KEY].state.tokens, hidden=args[0])

    with plan.apply(model) as run:
        handle = adapter_for(model).layers[0].register_forward_pre_hook(note, with_kwargs=True, prepend=True)
        try:
            logits(model, inputs)
        finally:
            handle.remove()
    tokens, report = seen["tokens"], run.report()
    groups = []
    for row, roles in enumerate(tokens.role.tolist()):
        found = defaultdict(list)
        for at, role in enumerate(roles):
            if role == Role.IMAGE:
                image, tile, frame = (int(x[row, at]) for x in (tokens.image, tokens.tile, tokens.frame))
                keys = [("image", image), ("tile", image, tile), ("frame", image, frame), ("prompt",)]
                for key in keys:
                    found[key].append(at)
        ranked = {k: sorted(v, key=lambda at: (-seen["hidden"][row, at, 0].item(), at)) for k, v in found.items()}
        groups.append(ranked)
    visual = [[at for at, role in enumerate(roles) if role == Role.IMAGE] for roles in tokens.role.tolist()]
    stay = [{visual[row][i] for i in report.kept(row, 0).tolist()} for row in range(len(visual))]
    return stay, groups


CASES = [*((family, "pictures") for family in tiny.FAMILIES), ("llava_onevision", "video"), ("qwen2_5_vl", "video")]


@pytest.mark.parametrize("keep", [0.4, 1])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(("family", "shown"), CASES)
def test_the_best_of_every_group_stay(family: str, shown: str, scope: str, keep: float | int) -> None:
    """Rows with one picture, none, and two of other sizes, cut into different numbers of crops; or three frames."""
    inputs = tiny.ragged_batch(family) if shown == "pictures" else video(family, 3)
    stay, groups = kept(tiny.build(family), inputs, Plan([First(keep=keep, scope=scope)]))
    sizes = set()
    for row, found in enumerate(groups):
        mine = {key: ranked for key, ranked in found.items() if key[0] == scope}
        sizes.add(len(mine))
        best = (ranked[: keep if isinstance(keep, int) else round(keep * len(ranked))] for ranked in mine.values())
        assert stay[row] == {at for group in best for at in group}
    if shown == "video":
        assert sizes == {3 if scope in ("tile", "frame") else 1}
    elif family in ("llava_next", "llava_onevision") and scope == "tile":
        assert len(sizes - {0}) == 2  # rows are cut into different numbers of crops
    else:
        assert sizes == ({0, 1} if scope == "prompt" else {0, 1, 2})


def test_a_plan_chooses_the_scope() -> None:
    plan = Plan("fastv(layer=2,keep=0.5,scope=prompt)")
    assert str(plan) == "fastv(layer=2,keep=0.5,scope=prompt)"
    assert str(Plan("fastv(layer=2,keep=0.5,scope=image)")) == "fastv(layer=2,keep=0.5)"
    with pytest.raises(PlanError, match="scope='crop' is none of 'image', 'tile', 'frame', 'prompt'"):
        Plan("fastv(layer=2,keep=0.5,scope=crop)")


@pytest.mark.parametrize(
    "plan",
    [
        "random(keep=0.4,scope=prompt)",
        "grid(keep=0.4,scope=prompt)",
        "fastv(layer=1,keep=0.5,scope=tile)",
        "fastervlm(keep=0.4,scope=image)",
        "divprune(keep=0.4,scope=tile)",
        "scope(keep=0.4,scope=image)",
        "vispruner(keep=0.4,scope=prompt)",
        "cdpruner(keep=0.4,matcher=words,scope=image)",
        "dart(layer=1,keep=0.5,scope=tile)",
        "pyramiddrop(shares=(0.6,0.4,0.2),scope=prompt)",
    ],
)
def test_every_method_with_the_field_runs_on_unequal_pictures(plan: str) -> None:
    """Rows of a batch equal the rows alone, and hiding equals removing, in another scope than the default."""
    model, prompts = tiny.build("llava_next"), tiny.ragged_prompts("llava_next")
    batch = tiny.collate("llava_next", prompts)
    with Plan(plan).apply(model) as run:
        together = logits(model, batch)
    with Plan(plan).apply(model, mode="simulate"):
        torch.testing.assert_close(together, logits(model, batch), rtol=0, atol=1e-5)
    for row, one in enumerate(prompts):
        if not one[1]:
            continue
        with Plan(plan).apply(model) as alone:
            apart = logits(model, tiny.collate("llava_next", [one]))
        torch.testing.assert_close(together[:, row], apart[:, 0], rtol=0, atol=1e-5)
        assert alone.report().rows[0].kept_per_layer == run.report().rows[row].kept_per_layer
