"""What deltas of the reference model are trained on: answers alone, under a plan or none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from mmefficient.errors import PlanError
from mmefficient.kernels.grouped_attention import causal, make_layout, no_visual_self_attention
from mmefficient.rows import LayerPlan
from mmefficient.tokens import Role

from .build import IMAGE_SIZE, PATCH, PATCHES
from .data import Batches
from .objective import Objective, layout_mask
from .scenes.render import Atlas


class PlannedObjective(Objective):
    """The loss of the answers where layers do less for visual rows; tower and projector stand still.

    Args:
        plans: by decoder layer, what it leaves out; none = the whole model.

    Raises:
        PlanError: a plan cuts the FFN of rows that attend, or does more than leave out pairs.
    """

    def __init__(
        self,
        model: LlavaForConditionalGeneration,
        processor: LlavaProcessor,
        batches: Batches,
        atlas: Atlas,
        dtype: torch.dtype = torch.bfloat16,
        plans: Mapping[int, LayerPlan] | None = None,
    ) -> None:
        super().__init__(model, processor, batches, atlas, dtype)
        self.plans, self.single = plans or {}, batches.single
        # layers that do the same share one mask, which compiles once
        kinds = {(plan.work, plan.pairs): plan for plan in self.plans.values()}
        made = {kind: self._planned_mask(plan) for kind, plan in kinds.items()}
        self.planned_masks = {index: made[plan.work, plan.pairs] for index, plan in self.plans.items()}

    def _planned_mask(self, plan: LayerPlan) -> Any:
        """The slot layout's pairs that `plan` leaves; with one question per picture a tensor, else as `self.mask`."""
        if plan.work.attention != "nothing" and plan.work.ffn < 1:
            raise PlanError("an FFN that visual rows of full attention skip or narrow cannot be trained here.")
        if plan.limits or plan.own is not None or not plan.work.values:
            raise PlanError("attention that no set of pairs describes cannot be trained here.")
        pairs = plan.pairs or causal()
        if plan.work.attention != "full":
            pairs = pairs & no_visual_self_attention()
        length, end = self.layout.length, self.image_start + PATCHES
        role = torch.full((1, length), int(Role.QUESTION))
        role[:, : self.image_start], role[:, self.image_start : end] = int(Role.SYSTEM), int(Role.IMAGE)
        side = IMAGE_SIZE // PATCH
        place = torch.full((2, 1, length), -1)
        place[:, 0, self.image_start : end] = torch.stack([torch.arange(PATCHES) // side, torch.arange(PATCHES) % side])
        seen = make_layout(
            role, pairs, page=(role == Role.IMAGE).int() - 1, row=place[0], col=place[1], impl="reference"
        ).visible()[0, 0]
        slot = self.layout.slot
        shared = (slot == 0) | (slot == slot[:, None])
        return seen if self.single else layout_mask(seen & shared, self.mean.device)

    def _allowed(self, index: int, batch: dict[str, Tensor]) -> Any:
        """The mask of a layer; visual rows that see later text see the question, which ends at the first answer row."""
        mask = self.planned_masks.get(index, self.mask)
        if not self.single or index not in self.planned_masks:
            return mask
        at = torch.arange(self.layout.length, device=batch["rows"].device)
        read = (at[None] <= at[:, None]) | (at <= batch["rows"][:, :1])[:, None]
        return (read & mask.to(at.device))[:, None]

    def layer(
        self, index: int, hidden: Tensor, rope: tuple[Tensor, Tensor], features: Tensor, batch: dict[str, Tensor]
    ) -> Tensor:
        """One decoder layer under its plan, by computing every row."""
        layer, plan = self.model.model.language_model.layers[index], self.plans.get(index)
        start, end = self.image_start, self.image_start + PATCHES
        if plan is not None and plan.source is not None:
            rows = plan.source(features).to(hidden.dtype)
            hidden = torch.cat([hidden[:, :start], rows, hidden[:, end:]], 1)
        mask = self._allowed(index, batch)
        out = layer(hidden, attention_mask=None, position_embeddings=rope, layout_mask=mask)
        if plan is None or plan.work.attention != "nothing":
            return out
        rows = hidden[:, start:end]
        if plan.work.ffn:
            rows = rows + layer.mlp(layer.post_attention_layernorm(rows))
        return torch.cat([out[:, :start], rows, out[:, end:]], 1)

    def planned_logits(self, batch: dict[str, Tensor]) -> Tensor:
        """Logits fp32 [B, A, vocabulary] at ``batch["rows"]`` under the plans; tower and projector stand still."""
        with self.autocast():
            with torch.no_grad():
                features, _ = self.see(self.pixels(batch))
                visual = self.model.model.multi_modal_projector(features)
            hidden = self._embed(batch, visual)
            lm = self.model.model.language_model
            rope = lm.rotary_emb(hidden, self.positions)
            for index in range(len(lm.layers)):
                hidden = self.layer(index, hidden, rope, features, batch)
            return self._logits_at(hidden, batch)

    def answer_loss(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The loss of the answers under the plans, and how many are right."""
        logits = self.planned_logits(batch)
        return {"answer": self._answer_loss(logits, batch)} | self._scores(logits, batch)
