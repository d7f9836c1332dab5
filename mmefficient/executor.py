"""Attaches a plan to a stock transformers model: hooks, and one attention function if a method needs scores.

No class is replaced and no forward copied. What one call needs rides in a private keyword argument, what a prompt needs
rides on its cache; the executor itself holds nothing but configuration, so threads and deep copies do not meet.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from mmefficient.asking import question_at
from mmefficient.attention import KEY, scoring
from mmefficient.blind import Blind
from mmefficient.cache import fit_layer, stored_rows
from mmefficient.call import Call
from mmefficient.errors import InputError, ModelError
from mmefficient.masks import decode_mask, prefill_mask
from mmefficient.matchers import OWN, WORDS, load_looker
from mmefficient.placement import Placement
from mmefficient.prompt import HostFacts, PromptState
from mmefficient.reduction import Prefill
from mmefficient.rows import RowLayer
from mmefficient.tokens import TokenMap, build
from mmefficient.view import Sight, matches, repeated, rows_of
from mmefficient.vision import SEEN, Vision

STATE = "_mmefficient_state"
PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
Hooked = tuple[tuple[Any, ...], dict[str, Any]]


class Executor(Placement):
    """A plan on one model, by hooks."""

    def attach(self, undo: list[Callable[[], Any]]) -> None:
        """Put the plan on the model; adds to `undo` what takes it off, to be called in reverse, also if this raises."""
        adapter = self.adapter
        undo += self.watcher.attach()
        for reducer in self.reducers:
            undo += reducer.attach(adapter)
        handles = [
            self.model.register_forward_pre_hook(self.on_model, with_kwargs=True),
            *([self.model.register_forward_hook(self.after_model, with_kwargs=True)] if self.stream else []),
            adapter.base.register_forward_pre_hook(self.on_base, with_kwargs=True),
            adapter.base.register_forward_hook(self.after_base, with_kwargs=True, always_call=True),
            adapter.decoder.register_forward_pre_hook(self.on_decoder, with_kwargs=True),
        ]
        # every layer, also with no methods: a cache may hold a prompt that another plan has read
        handles += [layer.register_forward_pre_hook(self.on_layer, with_kwargs=True) for layer in adapter.layers]
        undo += [handle.remove for handle in handles]
        for index, plan in self.planned.items():
            layer = adapter.layers[index]
            name = "_old_forward" if "_old_forward" in layer.__dict__ else "forward"  # inside accelerate's moves
            stock = layer.__dict__.get(name)
            restore = partial(layer.__dict__.pop, name) if stock is None else partial(setattr, layer, name, stock)
            undo.append(restore)
            layer.__dict__[name] = RowLayer(layer, plan, self.run.mode == "simulate", getattr(layer, name))
        if self.attending:
            name = scoring(self.implementation)
            for config in self.configs:
                undo.append(partial(_set_attention, config, config._attn_implementation))
                _set_attention(config, name)

    def on_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hooked | None:
        """Notice drafts: assisted decoding reads its first proposals together with the prompt.

        It asks for the logits of the proposals and of the prompt's last token; nothing else tells them apart.
        """
        wanted = kwargs.get("logits_to_keep")
        if not isinstance(wanted, int) or wanted < 2 or kwargs.get("past_key_values") is None:
            return None
        return args, {**kwargs, KEY: wanted - 1}

    def after_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        """Let the second stream answer too."""
        assert self.stream is not None
        if self.stream.inside:
            return out
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        given = {**dict(zip(names, args, strict=False)), **{k: v for k, v in kwargs.items() if k != KEY}}
        cache = out.past_key_values
        state: PromptState | None = getattr(cache, STATE, None)
        pictures: Mapping[str, Any] = {}
        if state is not None:
            pictures, state.pictures = state.pictures, {}
            self.run.acted |= bool(pictures)
        elif cache is None:
            raise ModelError("a view needs a cache; leave use_cache on.")
        try:
            return self.stream.after(module, given, out, state, pictures)
        finally:
            if state is not None:
                self.run.add(state)

    def on_base(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hooked:
        """Recognise a new prompt, and find its placeholders."""
        kwargs = dict(kwargs)
        drafts = kwargs.pop(KEY, 0)
        ids = kwargs.get("input_ids", args[0] if args else None)
        if kwargs.get("cache") is not None and self.methods:
            raise ModelError("continuous batching (generate_batch) is not supported; use generate.")
        cache = kwargs.get("past_key_values")
        if cache is None:
            use_cache = kwargs.get("use_cache")
            if self.adapter.decoder.config.use_cache if use_cache is None else use_cache:
                cache = kwargs["past_key_values"] = DynamicCache(config=self.adapter.decoder.config)
        call = Call(self.asked, drafts, strict=bool(self.methods))
        call.cache, call.layers = cache, self.adapter.layers
        call.state = getattr(cache, STATE, None)
        arriving = (ids if ids is not None else kwargs["inputs_embeds"]).shape[1]
        empty = cache is None or ((arriving > 1 or call.state is None) and int(cache.get_seq_length()) == 0)
        if ids is None and empty:
            if self.methods:
                raise InputError("inputs_embeds hide where the image tokens are; pass input_ids instead.")
            return args, kwargs
        call.new = empty
        if empty or (call.state is not None and call.state.plan == self.run.plan):
            call.modulated = self.modulated
        pixels = any(kwargs.get(name) is not None for name in PIXELS.values())
        if not empty and self.methods and (pixels or any((kwargs.get("mm_encoder_outputs") or {}).values())):
            raise InputError("an image arrives on a cache already in use; start a new cache for a new image.")
        if call.new:
            assert ids is not None
            call.ids = ids.cpu()
            call.kinds = {kind: call.ids == token for kind, token in self.adapter.placeholders.items()}
            self._open(call, kwargs)
        elif call.state is None:
            return args, kwargs  # continues a prompt that was read without the plan
        elif arriving > 1:
            self.run.add(call.state)  # a later turn may be the first thing this run sees of the prompt
        kwargs[KEY] = call
        return args, kwargs

    def _open(self, call: Call, kwargs: dict[str, Any]) -> None:
        """Match images to placeholders, now or when the model encodes them."""
        given = self.watcher.take()
        encoded = kwargs.get("mm_encoder_outputs") or {}
        for kind in call.kinds:
            if kwargs.get(PIXELS[kind]) is not None:
                continue
            output, vision = encoded.get(kind), Vision([], [])
            if output is not None:
                known = given.get(kind) or getattr(output, SEEN, None)
                if known is None:
                    raise InputError(f"the {kind}s were encoded outside the plan; pass pixel values instead.")
                vision = known
                call.repeats[kind] = max(1, len(output.pooler_output) // max(1, len(vision.layouts)))
            call.receive(kind, vision)
        self.watcher.expect(call.receive)

    def after_base(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """The call is over, well or badly."""
        call = kwargs.get(KEY)
        if not isinstance(call, Call):  # `on_base` has raised, or the call continues a prompt without the plan
            call = None
        if call is None or call.new:  # decoding steps encode nothing, and may be compiled
            self.watcher.settle()
            self.watcher.take()
            self.run.acted |= call is not None and call.state is not None and bool(call.state.steered)

    def on_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hooked | None:
        """Build the token map of a new prompt; move the positions of later tokens."""
        call: Call | None = kwargs.get(KEY)
        if call is None:
            return None
        if call.new:
            self._prepare(call, kwargs)
            return None
        if call.state is None or call.state.shift is None:
            return None
        position = kwargs.get("position_ids")
        if position is None:
            embeds = kwargs["inputs_embeds"]
            start = kwargs["past_key_values"].get_seq_length()
            position = torch.arange(embeds.shape[1], device=embeds.device)[None] + start
        return args, dict(kwargs, position_ids=position - call.state.shift.to(position.device))

    def _prepare(self, call: Call, kwargs: dict[str, Any]) -> None:
        embeds = kwargs["inputs_embeds"]
        batch, length = embeds.shape[:2]
        position = kwargs.get("position_ids")
        if position is None:
            position = torch.arange(length)[None]
        position = position.cpu()
        if position.ndim == 2:
            position = position[None]
        elif position.shape[0] == 4:  # text positions, then the triplet
            position = position[1:]
        tokens = build(
            call.kinds,
            {kind: vision.layouts for kind, vision in call.vision.items()},
            _padding(kwargs.get("attention_mask"), batch, length),
            position.expand(-1, batch, -1),
            len(self.adapter.layers),
            {kind: vision.strides for kind, vision in call.vision.items()},
            call.repeats,
        )
        self.look(tokens)
        if self.reads_words:
            assert call.ids is not None
            at = question_at(tokens, call.drafts)
            rows = [row[asks].tolist() for row, asks in zip(call.ids, at, strict=True)]
            call.words = [text.strip() for text in self.tokenizer.batch_decode(rows, skip_special_tokens=True)]
        facts = HostFacts.of(tokens, self.scopes, call.drafts, embeds.device)
        works = {index: plan.work for index, plan in self.planned.items()}
        state = call.state = PromptState(self.run.plan, self.run.mode, tokens.to(embeds.device), works=works)
        cache = kwargs.get("past_key_values")
        if cache is not None:
            setattr(cache, STATE, state)
        if self.stream is not None and not self.stream.inside and "image" in call.vision:
            state.pictures = self._varied(call, tokens, embeds)
        tower = call.vision["image"].tower if "image" in call.vision else None
        call.prefill = Prefill(state, facts, tower, simulate=self.run.mode == "simulate")
        self.run.add(state)

    def _varied(self, call: Call, tokens: TokenMap, embeds: torch.Tensor) -> dict[str, Any]:
        """The pictures that the second stream reads, one per row of the batch."""
        assert self.stream is not None
        view, vision, repeats = self.stream.view, call.vision["image"], call.repeats.get("image", 1)
        name: str = getattr(view, "matcher", WORDS)
        pixels, facts = vision.given["pixel_values"], dict[str, Any]()
        if view.needs & {"match", "look"}:
            mean, std = self.adapter.pixel_statistics()
            facts["black"] = tuple(-m / s for m, s in zip(mean, std, strict=True))
        if "look" in view.needs:
            asked = [call.words[row] for row in rows_of(tokens, repeats)]
            facts["look"] = load_looker(name).look(pixels, mean, std, asked)
        if "match" in view.needs:
            found = None
            if name not in OWN:
                assert vision.tower is not None
                patches = vision.tower.matched[name]
                found = patches, self._texts(call, name, patches.device), self.watcher.matchers[name].inverted
            facts["match"] = matches(tokens, embeds, question_at(tokens, call.drafts), repeats, name, found)
        varied = {**vision.given, "pixel_values": view.pictures(Sight(pixels, **facts))}
        return repeated(varied, len(embeds), repeats)

    def on_layer(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hooked | None:
        """Let reducers act, and fit rope, positions, mask and cache to the rows the layer holds."""
        call: Call | None = kwargs.get(KEY)
        if call is None or call.state is None:
            return None
        index: int = layer.self_attn.layer_idx
        if self.stream is not None:
            self.stream.passing(index, args[0])
        hidden, cache, mask = args[0], kwargs.get("past_key_values"), kwargs.get("attention_mask")
        if call.prefill is None:
            held = call.state.segments.get(index)
            if held is None or (mask is None and held.valid is None):
                return None
            keys = stored_rows(cache, index, hidden.shape[1])
            new = call.mask(mask, held, lambda: decode_mask(mask, held, hidden.shape[1], keys, self.flash))
            return args, dict(kwargs, attention_mask=new)
        prefill = call.prefill
        prefill.enter(kwargs["position_embeddings"], kwargs.get("position_ids"))
        for reducer in self.rated if index == 0 and prefill.has_visual else ():
            prefill.choose_raters(reducer, hidden)
        parts = self.parts(layer, call)
        if index == 0 and self.blind_until >= 0 and prefill.has_visual:
            prefill.blind = Blind(prefill, hidden, mask, parts, self.adapter.mrope, self.flash)
        if index == self.blind_until + 1:
            prefill.blind = None
        for reducer in self.reducers:
            if reducer.site == index and prefill.has_visual:
                self.run.acted = True
                hidden = prefill.reduce(reducer, index, hidden, parts)
        self.run.acted |= index in self.planned and prefill.has_visual
        segment, prefill.hidden = prefill.segment, hidden
        if cache is not None:
            fit_layer(cache, index, 0 if segment is None else segment.length - segment.slots)
        if segment is None:
            return None
        assert prefill.stored is not None
        call.state.segments[index] = prefill.stored
        keys = stored_rows(cache, index, segment.slots)
        new = call.mask(mask, segment, lambda: prefill_mask(mask, segment, keys, self.flash))
        # gapped position ids make flash kernels believe that several sequences are packed into one
        position = None if self.flash else prefill.position
        fitted = dict(kwargs, position_embeddings=prefill.rope, position_ids=position, attention_mask=new)
        return (hidden, *args[1:]), fitted


def _set_attention(config: Any, implementation: str) -> None:
    # the public setter would also reach sub-models and check the name against the model class
    config._attn_implementation_internal = implementation


def _padding(mask: Any, batch: int, length: int) -> torch.Tensor | None:
    """Two-dimensional padding mask [B, S] on the CPU, from whatever mask the decoder was given."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
    if not torch.is_tensor(mask):
        return None
    if mask.ndim == 4:  # already expanded: the last query sees all tokens, and no padding
        mask = mask[:, 0, -1, :length]
        mask = mask if mask.dtype == torch.bool else mask == 0
    return mask[:, :length].expand(batch, -1).cpu()
