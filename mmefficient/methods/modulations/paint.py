"""PAINT (Arif et al., 2025): of the visual tokens, only the locally informative and the summarising ones are raised."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from mmefficient.errors import PlanError
from mmefficient.methods.modulations.pai import maps
from mmefficient.modulation import Change, LayerPrompt, Modulation, Rows
from mmefficient.points import TowerLayer, about

SHALLOW, DEEP = TowerLayer(0), TowerLayer()
OTHER, LOCAL, SUMMARY = range(3)


@dataclass(frozen=True)
class PAINT(Modulation):
    """PAI with two factors: `alpha` for tokens the tower's first layer attends to, `beta` for outliers of its last."""

    name: ClassVar[str] = "paint"
    paper: ClassVar[str] = "https://arxiv.org/abs/2501.12206"
    summary: ClassVar[str] = "raise the logits of local and of summary tokens, as the vision tower finds them"
    changes: ClassVar[frozenset[str]] = frozenset({"map"})
    rows: ClassVar[Rows] = "last"
    needs: ClassVar[frozenset[str]] = frozenset({"tower"})
    tower_layers: ClassVar[tuple[TowerLayer, ...]] = (SHALLOW,)
    groups: ClassVar[int] = 3

    alpha: float = field(default=0.7, metadata=about("share of a logit's magnitude added to it for local tokens"))
    beta: float = field(default=0.4, metadata=about("the same for summary tokens"))
    local: float = field(default=0.25, metadata=about("share of a crop's tokens that count as local"))
    first: int = field(default=2, metadata=about("first decoder layer that is changed"))
    last: int = field(
        default=-1, metadata=about("last decoder layer that is changed; -1 = the model's last", quiet=True)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.local <= 1:
            raise PlanError(f"paint: local={self.local} is outside [0, 1]; it is a share of a crop's tokens.")

    def group(self, prompt: LayerPrompt) -> torch.Tensor:
        assert prompt.tower is not None
        tokens, found = prompt.tokens, torch.zeros_like(prompt.tokens.role)
        source = tokens.source.clamp(min=0)
        shallow, deep = (prompt.tower.layers[each].attention.to(found.device)[source] for each in (SHALLOW, DEEP))
        row = torch.arange(len(source), device=source.device)[:, None].expand_as(source)
        crops = torch.stack([row, tokens.image, tokens.tile], -1)[tokens.visual]
        for crop in crops.unique(dim=0):
            mine = tokens.visual & (row == crop[0]) & (tokens.image == crop[1]) & (tokens.tile == crop[2])
            found[mine] = sets(shallow[mine], deep[mine], self.local)
        return found

    def change(self, prompt: LayerPrompt) -> Change:
        return Change(logit_map=maps(prompt, (1.0, 0.0), (1.0, self.alpha), (1.0, self.beta)))


def sets(shallow: torch.Tensor, deep: torch.Tensor, share: float) -> torch.Tensor:
    """The group of every token of one crop, from the attention [N] it receives in a shallow and a deep layer.

    Summary: above the third quartile by more than 1.5 times the distance of the quartiles. Local: the top `share` by
    shallow attention, less the summary tokens.
    """
    group = torch.full_like(shallow, OTHER, dtype=torch.long)
    group[shallow.topk(int(share * len(shallow))).indices] = LOCAL
    low, high = deep.float().quantile(torch.tensor([0.25, 0.75], device=deep.device))
    group[deep > high + 1.5 * (high - low)] = SUMMARY
    return group
