"""`generate` on an engine: transformers' own loop, whose forwards are programs.

The loop, its logits processors, stopping criteria, sampling and streaming are those of the installed transformers; it
is given an object in place of the model that answers the few questions the loop asks.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from mmefficient.arguments import arguments_of
from mmefficient.errors import ModelError
from mmefficient.graph.decoding import Session, step
from mmefficient.graph.prompt import Prompt
from mmefficient.graph.reading import read

if TYPE_CHECKING:
    from mmefficient.executor import Executor
    from mmefficient.graph.engine import Engine
    from mmefficient.vision import Vision

log = logging.getLogger("mmefficient")

SEARCH = "_get_generation_parameters"
PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
SIZES = ("image_sizes", "image_grid_thw", "video_grid_thw", "mm_encoder_outputs")
"""Arguments of families whose pictures make different numbers of tokens."""
FOREIGN = ("custom_generate", "assistant_model", "past_key_values", "inputs_embeds", "synced_gpus",
           "negative_prompt_ids", "prefix_allowed_tokens_fn")  # fmt: skip
"""Arguments of a call that the programs know nothing of."""
DEFAULTS = {"num_beams": (1,), "num_return_sequences": (1,), "return_dict_in_generate": (False,), "use_cache": (True,),
            "output_attentions": (False,), "output_hidden_states": (False,), "cache_implementation": ("dynamic",),
            "prefill_chunk_size": (), "prompt_lookup_num_tokens": (), "penalty_alpha": (0.0,), "dola_layers": (),
            "assistant_early_exit": (), "guidance_scale": (1.0,), "token_healing": (False,),
            "stop_strings": ()}  # fmt: skip
"""Settings that must be unset or have one of these values."""


class GenerateTap:
    """Stands in for a model's `generate`: same arguments, same result. A deepcopy of the model has its own back."""

    def __init__(self, engine: Engine, executor: Executor, stock: Callable[..., Any], strict: bool) -> None:
        self.engine, self.executor, self.strict = engine, executor, strict
        self.__wrapped__ = stock
        self.said: set[str] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.__wrapped__, memo)

    @torch.inference_mode(False)  # buffers outlive the call, and tensors of inference mode cannot be written to outside
    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model, engine, stock = self.executor.model, self.engine, self.__wrapped__
        given = arguments_of(stock, args, kwargs)
        with engine.lock:
            reason = self.refusal(model, given)
            if reason is not None:
                self.refuse(reason)
                return stock(*args, **kwargs)
            engine.check()
            engine.busy, engine.captures.strict = True, self.strict
            try:
                steps = Steps(model, engine, self.executor)
                if not args:
                    kwargs = steps.read_ahead(kwargs)
                with self.config_known(model.config):
                    return stock(*args, **kwargs, custom_generate=Loop(steps, given.get("streamer")))
            finally:
                engine.busy = False
                engine.join()
                self.executor.watcher.take()

    @contextmanager
    def config_known(self, config: Any) -> Iterator[None]:
        """Spare `generate` its search for generation settings in the model's config, if it has found none in the same.

        It compares the config with a fresh one of its class, which takes up to 6 ms.
        """
        now = dict(vars(config))
        if now == self.engine.searched:
            vars(config)[SEARCH] = dict
        try:
            yield
            self.engine.searched = now
        finally:
            vars(config).pop(SEARCH, None)

    def refusal(self, model: Any, given: dict[str, Any]) -> str | None:
        """Why this call runs without programs; None if it does not."""
        if self.engine.busy:
            return "a call of generate inside another one"
        if model.training:
            return "the model is in training mode"
        ids = given.get("input_ids", given.get("inputs"))
        if not torch.is_tensor(ids) or ids.ndim != 2:
            return "no input_ids"
        for name in FOREIGN:
            if given.get(name) is not None:
                return name
        for name, usual in DEFAULTS.items():
            value = given.get(name)
            for config in (given.get("generation_config"), model.generation_config):
                value = getattr(config, name, None) if value is None else value
            if value is not None and value not in usual:
                return f"{name}={value!r}"
        return None

    def refuse(self, reason: str) -> None:
        """Say so once, or raise if programs were demanded."""
        if self.strict:
            raise ModelError(f"engine='graph' cannot run this call ({reason}); use engine='auto'.")
        if reason not in self.said:
            self.said.add(reason)
            log.warning("runs without the graph engine: %s", reason)
        self.executor.run.eager = reason


class Loop:
    """What `generate` calls once everything is prepared."""

    def __init__(self, steps: Steps, streamer: Any) -> None:
        self.steps, self.streamer = steps, streamer

    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        return GenerationMixin._sample(
            self.steps,
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            streamer=self.streamer,
            **model_kwargs,
        )


class Steps:
    """The model, as the sampling loop sees it."""

    def __init__(self, model: Any, engine: Engine, executor: Executor) -> None:
        self.model, self.engine, self.executor = model, engine, executor
        self.session: Session | None = None
        self.first: torch.Tensor | None = None
        self.room = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["model"], name)

    def _valid_auto_compile_criteria(self, *_: Any) -> bool:
        return False

    def _update_model_kwargs_for_generation(self, outputs: Any, model_kwargs: Any, **_: Any) -> Any:
        return model_kwargs

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **_: Any) -> dict[str, Any]:
        return {"tokens": input_ids[:, -1:]}

    def __call__(self, tokens: torch.Tensor, **_: Any) -> CausalLMOutputWithPast:
        assert self.session is not None
        return CausalLMOutputWithPast(logits=step(self.engine, self.session, tokens)[:, None])

    def _prefill(self, input_ids: torch.Tensor, generation_config: Any, model_kwargs: Any, **_: Any) -> Any:
        # through the model's own call, so that hooks on it see the forward
        own = self.model.__dict__.get("forward")
        self.model.__dict__["forward"] = self.forward
        try:
            return self.model(
                input_ids=input_ids, new=generation_config.max_length - input_ids.shape[1], **model_kwargs
            )
        finally:
            if own is None:
                del self.model.__dict__["forward"]
            else:
                self.model.__dict__["forward"] = own

    def forward(self, input_ids: torch.Tensor, new: int, **kwargs: Any) -> CausalLMOutputWithPast:
        """The prefill; arguments as `generate` prepared them."""
        if self.first is None:
            self.read(input_ids, new, kwargs)
        elif new > self.room:
            raise ModelError("generate makes more tokens than its arguments say; pass max_new_tokens.")
        self.engine.join()
        assert self.first is not None
        return CausalLMOutputWithPast(logits=self.first[:, None])

    def read_ahead(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Start the prefill before `generate` prepares its own part, which takes the host several milliseconds.

        Returns:
            the arguments that `generate` still needs; all of them if the prompt has to wait for its preparations.
        """
        ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        here = all(isinstance(x, torch.Tensor) and x.device == self.engine.device for x in (ids, mask))
        if ids is None or not here or "position_ids" in kwargs or self.executor.adapter.mrope:
            return kwargs
        with self.engine.aside():
            used = self.read(ids, _new_tokens(self.model, kwargs, ids.shape[1]), kwargs)
        return {name: value for name, value in kwargs.items() if name not in used}

    def read(self, input_ids: torch.Tensor, new: int, kwargs: Mapping[str, Any]) -> set[str]:
        """Read the prompt; returns the names of the arguments that only encoders want."""
        executor, adapter, engine = self.executor, self.executor.adapter, self.engine
        # the host reads what it wants before the encoder is started, for which it would wait afterwards
        ids, mask = input_ids.cpu(), kwargs.get("attention_mask")
        mask = None if mask is None else mask.cpu()
        position = _positions(kwargs.get("position_ids"), mask, ids, adapter.mrope)
        encoded, used = self._encode(kwargs)
        seen: dict[str, Vision] = executor.watcher.take()
        prompt = Prompt.of(
            ids,
            mask,
            position,
            adapter.placeholders,
            {kind: seen[kind] for kind in encoded},
            len(adapter.layers),
            executor.scopes,
            engine.captures.recorder is not None,
            # methods count visual tokens; and where all pictures make as many, their number is not worth hiding
            visual=not executor.acting and any(key in kwargs for key in SIZES),
        )
        features = [each for output in encoded.values() for each in output.pooler_output]
        tower = seen["image"].tower if "image" in encoded else None
        self.first, state, self.session = read(engine, executor, prompt, features, tower, new)
        self.room = new
        executor.run.add(state)
        executor.run.eager = None
        return used

    def _encode(self, kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], set[str]]:
        """Encoder outputs by kind, made by `generate` (transformers >= 5.18) or here; and the arguments used for it."""
        encoded, used = dict(kwargs.get("mm_encoder_outputs") or {}), set()
        base: Any = type(self.executor.adapter.base)
        for kind, name in PIXELS.items():
            if encoded.get(kind) is None and kwargs.get(name) is not None:
                encoder = getattr(self.executor.adapter.base, f"get_{kind}_features")
                wanted = {key: _on_host(kwargs[key]) for key in _parameters(base, kind) if key in kwargs}
                encoded[kind] = encoder(**wanted, return_dict=True)
                used |= set(wanted)
        return {
            kind: encoded[kind] for kind in self.executor.adapter.placeholders if encoded.get(kind) is not None
        }, used


def _on_host(value: Any) -> Any:
    """Whole numbers, such as sizes of images, are for the host to read."""
    return value.cpu() if isinstance(value, torch.Tensor) and not value.is_floating_point() else value


@cache
def _parameters(base: Any, kind: str) -> tuple[str, ...]:
    """Names of the arguments of a model class's encoder."""
    return tuple(inspect.signature(getattr(base, f"get_{kind}_features")).parameters)


def _new_tokens(model: Any, given: Mapping[str, Any], length: int) -> int:
    """How many tokens `generate` will make at most."""
    own = given.get("generation_config")
    for source in (given, {} if own is None else vars(own), vars(model.generation_config)):
        if source.get("max_new_tokens") is not None:
            return int(source["max_new_tokens"])
        if source.get("max_length") is not None:
            return int(source["max_length"]) - length
    return 20


def _positions(
    position: torch.Tensor | None, mask: torch.Tensor | None, ids: torch.Tensor, mrope: bool
) -> torch.Tensor:
    """Position ids int64 [P, B, S] on the CPU, where mask and ids are; P is 3 with M-RoPE, else 1."""
    if position is None:
        real = torch.ones_like(ids) if mask is None else mask.long()
        position = (real.cumsum(1) - 1).clamp(min=0)
    position = position.cpu()
    if position.ndim == 2:
        position = position[None].expand(3 if mrope else 1, *position.shape)
    elif position.shape[0] == 4:  # text positions, then the triplet
        position = position[1:]
    return position.expand(-1, len(ids), -1)
