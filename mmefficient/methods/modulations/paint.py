"""PAINT (Arif et al., 2025): of the visual tokens, only the locally informative and the summarising ones are raised."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from mmefficient.errors import PlanError
from mmefficient.kernels.key_scores import key_scores
from mmefficient.methods.modulations.pai import maps
from mmefficient.modulation import Change, LayerPrompt, Modulation, Rows
from mmefficient.points import TowerLayer, about
from mmefficient.tokens import Role

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

    by_head: bool = field(
        default=False, metadata=about("ours: in proportion to the attention a head has on the image", quiet=True)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.local <= 1:
            raise PlanError(f"paint: local={self.local} is outside [0, 1]; it is a share of a crop's tokens.")

    def group(self, prompt: LayerPrompt) -> torch.Tensor:
        assert prompt.tower is not None
        tokens = prompt.tokens
        source = tokens.source.clamp(min=0)
        shallow, deep = (prompt.tower.layers[each].attention.to(source.device)[source] for each in (SHALLOW, DEEP))
        row = torch.arange(len(source), device=source.device)[:, None]
        crop = (row << 40 | tokens.image.long() << 20 | tokens.tile.clamp(min=0)).masked_fill(~tokens.visual, -1)
        group = sets(shallow.flatten(), deep.flatten(), crop.flatten(), self.local).view_as(source)
        return group.masked_fill(~tokens.visual, OTHER)

    def change(self, prompt: LayerPrompt) -> Change:
        map_ = maps(prompt, (1.0, 0.0), (1.0, self.alpha), (1.0, self.beta))
        if not self.by_head:
            return Change(logit_map=map_)
        share = looking(prompt)
        factor = torch.stack([torch.ones_like(share), share, torch.ones_like(share)])[..., None]
        return Change(logit_map=map_ * factor)


def looking(prompt: LayerPrompt) -> torch.Tensor:
    """Attention of the last prompt row on the image, over its median over heads, at most 2; float32 [B, Hq]."""
    seen = prompt.tokens.role != Role.PAD
    seen = seen if prompt.tail is None else seen & ~prompt.tail
    last = (seen * torch.arange(1, seen.shape[1] + 1, device=seen.device)).argmax(1)
    query = prompt.query.gather(
        2, last[:, None, None, None].expand(-1, prompt.query.shape[1], 1, prompt.query.shape[3])
    )
    mass = key_scores(query, prompt.key, scale=prompt.scale, mask=seen[:, None, None])
    mass = (mass * prompt.tokens.visual[:, None]).sum(-1)
    share = (mass / mass.quantile(0.5, dim=1, keepdim=True).clamp(min=1e-12)).clamp(max=2.0)
    return torch.where(prompt.has_image[:, None], share, 1.0)


def sets(shallow: torch.Tensor, deep: torch.Tensor, crop: torch.Tensor, share: float) -> torch.Tensor:
    """The group of every token, from the attention [N] it receives in a shallow and a deep layer, crop by crop.

    Summary: above the third quartile by more than 1.5 times the distance of the quartiles. Local: the top `share` by
    shallow attention, less the summary tokens.

    Args:
        crop: int64 [N], any number per crop.
    """
    by_crop = crop.argsort(stable=True)
    changes = crop[by_crop].diff(prepend=crop[by_crop[:1]]) != 0
    crop = torch.empty_like(crop).scatter(0, by_crop, changes.cumsum(0))  # from 0 on
    count = torch.zeros_like(crop).scatter_add(0, crop, torch.ones_like(crop))
    start, count = (count.cumsum(0) - count)[crop], count[crop]

    def ordered(values: torch.Tensor, descending: bool) -> torch.Tensor:
        order = values.argsort(stable=True, descending=descending)
        return order[crop[order].argsort(stable=True)]

    first = ordered(shallow, descending=True)
    place = torch.empty_like(crop).scatter(0, first, torch.arange(len(crop), device=crop.device)) - start
    group = torch.where(place < (share * count.double()).long(), LOCAL, OTHER)
    sorted_deep = deep.float()[ordered(deep, descending=False)]

    def quartile(at: float) -> torch.Tensor:
        rank = at * (count - 1).float()
        below, above = (sorted_deep[start + part.long()] for part in (rank.floor(), rank.ceil()))
        return torch.lerp(below, above, rank.frac())

    low, high = quartile(0.25), quartile(0.75)
    return group.masked_fill(deep > high + 1.5 * (high - low), SUMMARY)
