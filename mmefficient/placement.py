"""Where the methods of a plan act on one model, whether the model can carry them, and what they may use of it.

What both engines read: the hooks of `executor` and the programs of `graph`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mmefficient.attention import KEY, Probe, scoring
from mmefficient.call import Call
from mmefficient.errors import ModelError, PlanError
from mmefficient.modulation import Modulation, by_layer
from mmefficient.offer import Parts, Rope
from mmefficient.points import LayerMethod, Method, Reducer, Scope
from mmefficient.profiles import Checkpoint
from mmefficient.row_checks import check_layer
from mmefficient.rows import LayerPlan
from mmefficient.run import Run
from mmefficient.tokens import TokenMap
from mmefficient.view import Stream, View
from mmefficient.vision import Watcher

if TYPE_CHECKING:
    from mmefficient.models.base import Adapter

FROM_LAYER_BEFORE = frozenset({"last_row_attention", "question_attention", "key_norm"})
FROM_OWN_LAYER = frozenset({"own_row_attention", "own_heads"})


class Placement:
    """The methods of a plan, by where they act on one model; holds nothing of a call.

    Raises:
        PlanError, ModelError: this model cannot carry the plan.
    """

    def __init__(
        self, model: nn.Module, adapter: Adapter, methods: Sequence[Method], run: Run, tokenizer: Any = None
    ) -> None:
        self.model, self.adapter, self.methods, self.run = model, adapter, tuple(methods), run
        self.tokenizer = tokenizer
        checkpoint = Checkpoint(model, len(adapter.layers))
        stages = [stage for method in methods for stage in method.stages(checkpoint)]
        # stable: a plan's order within a layer
        self.reducers = sorted((each for each in stages if isinstance(each, Reducer)), key=lambda each: each.site)
        self.modulated = by_layer([each for each in stages if isinstance(each, Modulation)], len(adapter.layers))
        blinding = [layer for layer, each in self.modulated.items() if any("blind" in m.needs for m in each)]
        self.blind_until = max(blinding, default=-1)
        self.layered = [each for each in stages if isinstance(each, LayerMethod)]
        views = [each for each in stages if isinstance(each, View)]
        self.stream = Stream(views[0], adapter, tokenizer) if views else None
        self.watcher = Watcher(adapter, stages)
        self.reads_words = bool(self.watcher.matchers) or any("look" in each.needs for each in stages)
        self.configs = self._text_configs()
        self.implementation: str = adapter.decoder.config._attn_implementation
        self.flash = "flash" in self.implementation
        self.asked = {
            layer: [r for r in self.reducers if r.site == layer + 1 and r.needs & FROM_LAYER_BEFORE]
            for layer in range(len(adapter.layers))
        }
        self.attending = any(r.weighted or r.needs & (FROM_LAYER_BEFORE | FROM_OWN_LAYER) for r in self.reducers)
        self.attending |= bool(self.modulated)
        self.rated = [r for r in self.reducers if "question_attention" in r.needs]
        whole: set[Scope] = {"prompt"} if self.rated or self.modulated else set()
        self.scopes: set[Scope] = {r.scope for r in self.reducers} | whole
        if self.methods:
            self._check()
        self.planned = self._planned()
        if self.planned:  # they ask how many visual tokens are left
            self.scopes.add("prompt")

    @property
    def acting(self) -> bool:
        """Whether anything acts on a prompt with images while the language model reads it."""
        return bool(self.reducers or self.modulated or self.planned)

    def _text_configs(self) -> list[Any]:
        found = [self.adapter.decoder.config, self.adapter.config.get_text_config(decoder=True)]
        found += [getattr(getattr(layer, "self_attn", None), "config", None) for layer in self.adapter.layers]
        return list({id(config): config for config in found if config is not None}.values())

    def _check(self) -> None:
        """Raises PlanError or ModelError if this model cannot carry the plan."""
        layers = self.adapter.layers
        for reducer in self.reducers:
            if reducer.site >= len(layers):
                last = len(layers) - 1
                raise PlanError(f"{reducer}: layer {reducer.site} is out of range; the model has layers 0 to {last}.")
            if reducer.site == 0 and reducer.needs & FROM_LAYER_BEFORE:
                raise PlanError(f"{reducer}: layer 0 has no layer before it to learn from; use layer >= 1.")
            if reducer.position_policy == "compact" and self.adapter.mrope:
                raise PlanError(f"{reducer}: positions here are (time, height, width) triplets; use positions='keep'.")
        name = type(self.adapter.decoder).__name__
        if any(not hasattr(getattr(layer, "self_attn", None), "layer_idx") for layer in layers):
            raise ModelError(f"{name} mixes attention with other sequence layers, whose state cannot drop tokens.")
        if any(hasattr(layer.self_attn, "kv_lora_rank") for layer in layers):
            raise ModelError(f"{name} uses latent attention (MLA), whose cache layout is not supported.")
        kinds = set(getattr(self.adapter.decoder.config, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"}:
            raise ModelError(f"{name} has {', '.join(sorted(kinds))} layers; only full attention can drop tokens.")
        if self.reads_words and self.tokenizer is None:
            raise PlanError(
                f"{self.run.plan} compares patches with the words of the question; ask through VLM, or pass "
                "tokenizer=processor.tokenizer to Plan.apply."
            )
        scoring(self.implementation)
        if self.attending and (getattr(self.model, "tp_size", None) or 1) > 1:
            raise ModelError(
                "tensor-parallel ranks see their own heads alone and would decide differently; use one device."
            )

    def _planned(self) -> dict[int, LayerPlan]:
        """What patterns and row policies come to, by layer."""
        found: dict[int, LayerPlan] = {}
        if not self.layered:
            return found
        for method in self.layered:
            if method.last >= len(self.adapter.layers):
                last = len(self.adapter.layers) - 1
                raise PlanError(f"{method}: layer {method.last} is out of range; the model has layers 0 to {last}.")
        if any(reducer.weighted for reducer in self.reducers):
            raise PlanError(f"{self.layered[0]} does not know keys that count by size; leave one of the two out.")
        if (getattr(self.model, "tp_size", None) or 1) > 1:
            raise ModelError("tensor-parallel layers cannot be run apart for visual rows; use one device.")
        if self.flash and self.run.mode == "simulate":
            raise ModelError(
                "hiding pairs needs an explicit mask; load with attn_implementation='sdpa' or use 'apply'."
            )
        for index, layer in enumerate(self.adapter.layers):
            plan = LayerPlan.of(self.layered, index, self.adapter)
            if plan is not None and self.modulated.get(index):
                raise PlanError(
                    f"{self.modulated[index][0]} changes attention in layer {index}, in which {self.run.plan} has "
                    "visual rows do less; give them different layers."
                )
            apart = plan is not None and (plan.work.attention != "full" or plan.pairs is not None)
            if apart and index < self.blind_until:
                raise PlanError(
                    f"{self.run.plan} has visual rows attend to less in layer {index}, beside which the prompt is also "
                    "read without its image; give them later layers."
                )
            if plan is not None:
                check_layer(layer, plan, self.adapter, self.flash)
                found[index] = plan
        return found

    def look(self, tokens: TokenMap) -> None:
        """Note whether a new prompt has images; raises ModelError if their tower facts are wanted and do not exist."""
        seen = tokens.visual
        self.run.saw_images |= bool(seen.any())
        if self.watcher.watching and bool((tokens.source[seen] < 0).any()):
            raise ModelError(
                "some visual tokens are resampled after the vision tower (videos and very large images are); "
                "use a method that works inside the language model, such as fastv."
            )

    def parts(self, layer: Any, call: Call | None) -> Parts:
        """What reductions at the input of `layer` may use; without a call there are no texts."""
        return Parts(self._project, self._rotary, partial(self._heads, layer), partial(self._texts, call), self._norm)

    def _project(self, features: torch.Tensor) -> torch.Tensor:
        projector = self.adapter.tower_parts()[0]
        return projector(features)

    def _norm(self, hidden: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = self.adapter.decoder.norm(hidden)
        return normed

    def _texts(self, call: Call | None, matcher: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        assert call is not None
        return self.watcher.matchers[matcher].texts(call.words, device)

    def _rotary(self, hidden: torch.Tensor, position: torch.Tensor) -> Rope:
        return self.adapter.decoder.rotary_emb(hidden, position)

    def _heads(self, layer: Any, hidden: torch.Tensor, rope: Rope) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Query, key and scale of a layer: its attention module is run, and stopped where attention would begin."""
        probe = Probe()
        layer.self_attn(
            hidden_states=layer.input_layernorm(hidden),
            position_embeddings=rope,
            attention_mask=None,
            past_key_values=None,
            **{KEY: probe},
        )
        return probe.query, probe.key, probe.scale
