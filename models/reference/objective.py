"""What the reference model is trained on: answers, and auxiliary targets that only training uses.

Seeing is learnt from dense patch labels. What forms late without help is the look-up from a word of the question to the
patches that match it, so two auxiliary losses aim at it: the visual token of an object patch is pulled towards the
(tied) embedding of the object's name, and in two layers two heads are told where the name of an object should look.
Both fade out during training.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import AttentionInterface, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from .build import IMAGE_SIZE, PATCH, PATCHES
from .data import DENSE_LABELS, IGNORE, MAX_LAYERS, Batches
from .scenes.catalogue import OBJECTS
from .scenes.render import Atlas, label_map, render
from .scenes.splits import KINDS

POINT_LAYERS, POINT_HEADS = (2, 5), 2
ATTENTION = "mmefficient_slots"


def slot_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention under the slot layout: a block mask (FlexAttention, GPU) or a boolean mask [S, S] (SDPA, CPU)."""
    mask = kwargs["layout_mask"]
    if isinstance(mask, Tensor):
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    else:
        out = flex_attention(query, key, value, block_mask=mask, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


class Objective(nn.Module):
    """Losses of one batch. Auxiliary heads live here and are thrown away with it."""

    mean: Tensor
    std: Tensor
    names: Tensor
    patch_centre: Tensor
    positions: Tensor

    def __init__(
        self,
        model: LlavaForConditionalGeneration,
        processor: LlavaProcessor,
        batches: Batches,
        atlas: Atlas,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__()
        self.dtype = dtype
        AttentionInterface.register(ATTENTION, slot_attention)
        model.model.language_model.config._attn_implementation = ATTENTION
        self.model, self.atlas, self.layout = model, atlas, batches.layout
        self.image_start = batches.prefix.index(model.config.image_token_id)
        width = model.config.vision_config.hidden_size
        self.dense = nn.Linear(width, DENSE_LABELS)
        self.offset = nn.Linear(width, 2)
        self.presence = nn.Linear(width, len(OBJECTS))
        device = model.device
        image = processor.image_processor
        for name, values in (("mean", image.image_mean), ("std", image.image_std)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1) * 255)
        names = torch.zeros(2, len(OBJECTS), 4, dtype=torch.long)
        for index, cls in enumerate(OBJECTS):
            for form, text in enumerate((cls.name, cls.plural)):
                ids = processor.tokenizer(f" {text}", add_special_tokens=False).input_ids[:4]
                names[form, index, : len(ids)] = torch.tensor(ids)
        self.register_buffer("names", names)  # token ids of names and plurals, 0 = none
        grid = torch.arange(IMAGE_SIZE // PATCH) * PATCH + PATCH / 2
        x, y = torch.meshgrid(grid, grid, indexing="xy")
        self.register_buffer("patch_centre", torch.stack([x, y], -1).view(PATCHES, 2))
        self.register_buffer("positions", self.layout.positions[None])
        self.to(device)
        self.mask = layout_mask(self.layout.visible(), device)

    @property
    def layers(self) -> list[Any]:
        """Layers of the tower and of the decoder."""
        tower = self.model.model.vision_tower
        return [*getattr(tower, "vision_model", tower).encoder.layers, *self.model.model.language_model.layers]

    def truth(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Per patch: dense label and class [B, P] and offset to the object's centre in units of 4 patches [B, P, 2]."""
        index = torch.arange(MAX_LAYERS, device=batch["layers"].device, dtype=torch.int32)
        instance = label_map(batch["layers"], index.expand(len(batch["layers"]), -1), self.atlas)
        patches = instance.unflatten(2, (-1, PATCH)).unflatten(1, (-1, PATCH)).transpose(2, 3).flatten(3)
        counts = torch.stack([(patches == k).sum(-1) for k in range(MAX_LAYERS)], -1).flatten(1, 2)
        best, winner = counts.max(-1)
        seen = best >= PATCH * PATCH // 5
        cls = torch.where(seen, batch["cls"].gather(1, winner), IGNORE)
        centre = batch["centre"].gather(1, winner[..., None].expand(-1, -1, 2))
        return {
            "dense": torch.where(seen, batch["dense"].gather(1, winner), 0),
            "cls": cls,
            "offset": (centre - self.patch_centre) / (4 * PATCH),
        }

    def pixels(self, batch: dict[str, Tensor]) -> Tensor:
        raw = render(batch["layers"], batch["background"], self.atlas)
        return ((raw.float() - self.mean) / self.std).to(self.dtype)

    def see(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Tower features of the patches (hidden state -2) [B, P, D] and the final CLS state [B, D]."""
        tower = self.model.model.vision_tower
        tower = getattr(tower, "vision_model", tower)
        hidden = features = tower.pre_layrnorm(tower.embeddings(pixels)).to(self.dtype)
        for layer in tower.encoder.layers:
            features, hidden = hidden, layer(hidden, attention_mask=None)
        return features[:, 1:], tower.post_layernorm(hidden[:, 0])

    def tower_losses(
        self, features: Tensor, summary: Tensor, truth: dict[str, Tensor], present: Tensor
    ) -> dict[str, Tensor]:
        features = F.layer_norm(features, features.shape[-1:])
        logits = self.dense(features).float()
        weight = torch.where(truth["dense"] > 0, 1.0, 0.1)
        dense = F.cross_entropy(logits.flatten(0, 1), truth["dense"].flatten(), reduction="none")
        known = (truth["cls"] >= 0).float()
        offset = self.offset(features).float()
        distance = F.smooth_l1_loss(offset, truth["offset"], reduction="none", beta=0.25).sum(-1)
        return {
            "dense": (dense * weight.flatten()).sum() / weight.sum(),
            "offset": (distance * known).sum() / known.sum(),
            "presence": F.binary_cross_entropy_with_logits(self.presence(summary).float(), present) * 10,
            "patch_accuracy": ((logits.argmax(-1) == truth["dense"]) * known).sum() / known.sum(),
        }

    def look(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Losses of the tower alone."""
        truth = self.truth(batch)
        with self.autocast():
            features, summary = self.see(self.pixels(batch))
            return self.tower_losses(features, summary, truth, batch["present"])

    def align_loss(self, visual: Tensor, cls: Tensor) -> Tensor:
        """Cross-entropy of an object patch's visual token against the embeddings of all names, and of all plurals."""
        table = self.model.get_input_embeddings().weight
        used = self.names.gt(0).float()[..., None]
        names = (F.embedding(self.names, table) * used).sum(2) / used.sum(2)
        visual, names = F.normalize(visual.float(), dim=-1), F.normalize(names.float(), dim=-1)
        similarity = torch.einsum("bpd,fcd->bfpc", visual, names) * 15
        target = cls[:, None].expand(-1, 2, -1)
        return F.cross_entropy(similarity.flatten(0, 2), target.flatten(), ignore_index=IGNORE)

    def point_loss(self, layer: Any, hidden: Tensor, cos: Tensor, sin: Tensor, target: Tensor, rows: Tensor) -> Tensor:
        """-log of what name rows [B, R] give their targets [B, R, 1+P] of their attention to BOS and patches."""
        attention, dim = layer.self_attn, layer.self_attn.head_dim
        image = slice(self.image_start, self.image_start + PATCHES)
        pick = rows[..., None].expand(-1, -1, hidden.shape[-1])
        keys = torch.cat([hidden[:, :1], hidden[:, image]], 1)

        def project(x: Tensor, weight: Tensor) -> Tensor:
            heads = F.linear(layer.input_layernorm(x), weight[: POINT_HEADS * dim])
            return heads.unflatten(-1, (POINT_HEADS, dim)).transpose(1, 2)

        def at(table: Tensor, index: Tensor) -> Tensor:
            return table[0].expand(len(rows), -1, -1).gather(1, index[..., None].expand(-1, -1, table.shape[-1]))

        query, key = project(hidden.gather(1, pick), attention.q_proj.weight), project(keys, attention.k_proj.weight)
        query = apply_rotary_pos_emb(query, query, at(cos, rows), at(sin, rows))[0]
        k_cos, k_sin = (torch.cat([t[:, :1], t[:, image]], 1) for t in (cos, sin))
        key = apply_rotary_pos_emb(key, key, k_cos, k_sin)[0]
        logp = (query @ key.transpose(2, 3) * attention.scaling).float().log_softmax(-1)
        mass = logp.masked_fill(~target[:, None], -1e4).logsumexp(-1)  # [B, heads, R]
        known = target.any(-1)[:, None].expand_as(mass)
        return -(mass * known).sum() / known.sum().clamp(min=1)

    def point_targets(self, batch: dict[str, Tensor], cls: Tensor) -> Tensor:
        """[B, R, 1+P]: patches of the named class, or the first token when the picture does not hold it."""
        named = batch["point_classes"]
        match = named[..., None] == cls[:, None]
        present = batch["present"].gather(1, named.clamp(min=0)) > 0
        absent = (~present & (named >= 0))[..., None]
        return torch.cat([absent, match & (named >= 0)[..., None]], -1)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.mean.device.type, torch.bfloat16, enabled=self.dtype != torch.float32)

    def logits(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits fp32 [B, A, vocabulary] at ``batch["rows"]``, and the auxiliary losses."""
        truth = self.truth(batch)
        with self.autocast():
            features, summary = self.see(self.pixels(batch))
            out = self.tower_losses(features, summary, truth, batch["present"])
            visual = self.model.model.multi_modal_projector(features)
            out["align"] = self.align_loss(visual, truth["cls"])
            hidden = self._embed(batch, visual)
            lm = self.model.model.language_model
            cos, sin = lm.rotary_emb(hidden, self.positions)
            targets = self.point_targets(batch, truth["cls"])
            point = hidden.new_zeros((), dtype=torch.float32)
            for index, layer in enumerate(lm.layers):
                if index in POINT_LAYERS:
                    point = point + self.point_loss(layer, hidden, cos, sin, targets, batch["points"])
                hidden = layer(hidden, attention_mask=None, position_embeddings=(cos, sin), layout_mask=self.mask)
            out["point"] = point / len(POINT_LAYERS)
            return self._logits_at(hidden, batch), out

    def _logits_at(self, hidden: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Logits fp32 [B, A, vocabulary] at ``batch["rows"]`` of what the last layer gives."""
        rows = batch["rows"][..., None].expand(-1, -1, hidden.shape[-1])
        normed = self.model.model.language_model.norm(hidden.gather(1, rows))
        return self.model.lm_head(normed).float()

    def _embed(self, batch: dict[str, Tensor], visual: Tensor) -> Tensor:
        """Text embeddings with the visual tokens in their place, [B, S, D]."""
        text = self.model.get_input_embeddings()(batch["tokens"])
        end = self.image_start + PATCHES
        parts = (text[:, : self.image_start], visual, text[:, end:])
        return torch.cat([part.to(self.dtype) for part in parts], 1)

    def forward(self, batch: dict[str, Tensor], weights: Tensor) -> dict[str, Tensor]:
        """All losses. ``weights``: fp32 [3], of the align, point and tower losses."""
        logits, out = self.logits(batch)
        out["answer"] = self._answer_loss(logits, batch)
        tower = out["dense"] + out["offset"] + out["presence"]
        out["total"] = out["answer"] + weights[0] * out["align"] + weights[1] * out["point"] + weights[2] * tower
        return out | self._scores(logits, batch)

    def _answer_loss(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Cross-entropy of the answers; captions and ends of sequence weigh less."""
        labels = batch["labels"]
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none")
        known = (labels != IGNORE).float()
        is_caption = batch["kinds"] == 1 + KINDS.index("caption")
        ends = labels == self.model.config.text_config.eos_token_id
        weight = known * torch.where(is_caption, 0.35, 1.0) * torch.where(ends, 0.1, 1.0)
        return (loss.view_as(labels) * weight).sum() / weight.sum()

    def _scores(self, logits: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        right = (logits.detach().argmax(-1) == batch["labels"]) | (batch["labels"] == IGNORE)
        return _score(right, batch["kinds"], batch["turn"])


def _score(right: Tensor, kinds: Tensor, turn: Tensor) -> dict[str, Tensor]:
    """Questions answered exactly (every token, teacher-forced) and asked, per kind: fp32 [kinds]."""
    turns = turn.shape[1]  # no more turns than answer tokens
    key = torch.where(kinds > 0, turn, turns)
    exact = torch.ones(len(turn), turns + 1, device=turn.device).scatter_reduce(1, key, right.float(), "amin")
    kind = torch.zeros_like(key[:, :1]).expand(-1, turns + 1).scatter_reduce(1, key, kinds, "amax")
    one_hot = F.one_hot(kind[:, :turns], len(KINDS) + 1)[..., 1:].float()
    return {"correct": (one_hot * exact[:, :turns, None]).sum((0, 1)), "asked": one_hot.sum((0, 1))}


def layout_mask(allowed: Tensor, device: torch.device) -> Any:
    """bool [S, S] as `slot_attention` takes it."""
    allowed = allowed.to(device)
    if device.type == "cuda":
        length = len(allowed)
        return create_block_mask(lambda b, h, q, k: allowed[q, k], None, None, length, length, device=device)
    return allowed
