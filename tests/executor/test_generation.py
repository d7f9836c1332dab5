"""Everything around the prefill: beams, assisted decoding, second turns, static caches, threads, bad input."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    CompileConfig,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mmefficient.errors import BudgetError, InputError, ModelError, PlanError, SilentPlanError
from mmefficient.plan import Plan
from tests import tiny
from tests.executor.oracle import GREEDY, decoder_inputs, held_columns, logits, shorter_sequence

PLANS = ["random(keep=0.5)", "fastv(layer=1,keep=0.5)+exit(layer=3)", "random(keep=0.5,positions=compact)"]
PLANS += ["vhr(deep=0.5)+fastv(layer=1,keep=0.5)+vaf(first=1,last=2)"]
LAST_ROWS = "random(keep=0.5)+pai(alpha=0.4,first=0)"


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_beams_score_what_greedy_teacher_forcing_scores(family: str) -> None:
    model, batch = tiny.build(family), tiny.collate(family, [tiny.prompt(family, 1, 3, 4)])
    embeds, position = decoder_inputs(model, batch)
    with Plan("random(keep=0.4)").apply(model) as run:
        out = model.generate(
            **batch, max_new_tokens=5, num_beams=3, output_scores=True, return_dict_in_generate=True, length_penalty=0.0
        )
    ids = batch["input_ids"][0]
    columns = held_columns(model, ids, embeds[0], run.report().kept(0, 0).tolist())
    new = out.sequences[0, len(ids) :]
    steps = shorter_sequence(model, embeds, position, columns, new).log_softmax(-1)
    score = steps.gather(1, new[:, None]).sum()
    torch.testing.assert_close(out.sequences_scores[0], score, rtol=0, atol=1e-5)


@pytest.mark.parametrize("plan", [*PLANS, LAST_ROWS])
def test_ragged_beams_equal_batch_one(plan: str) -> None:
    # one image at most: transformers < 5.19 mixes up the images of beams
    model, prompts = (
        tiny.build("llava_next"),
        [tiny.prompt("llava_next", n, 3, 4, first=i) for n, i in ((1, 0), (0, 0), (1, 2))],
    )
    beams: dict[str, Any] = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False}
    with Plan(plan).apply(model):
        together = model.generate(**tiny.collate("llava_next", prompts), **beams)
        for row, each in enumerate(prompts):
            alone = model.generate(**tiny.collate("llava_next", [each]), **beams)
            assert torch.equal(together[row, -5:], alone[0, -5:])


@pytest.mark.parametrize("plan", [*PLANS, LAST_ROWS])
def test_prompt_lookup_equals_greedy(plan: str) -> None:
    model = tiny.build("llava")
    ids, pixels = tiny.prompt("llava", 1, 3, 0)
    batch = tiny.collate("llava", [([*ids, 5, 6, 7, 5, 6, 7, 5, 6], pixels)])
    with Plan(plan).apply(model):
        greedy = model.generate(**batch, max_new_tokens=12, do_sample=False)
        lookup = model.generate(**batch, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(greedy, lookup)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_second_turn_equals_reading_everything_at_once(family: str, plan: str) -> None:
    if family == "qwen2_5_vl" and "compact" in plan:
        pytest.skip("M-RoPE")
    model = tiny.build(family)
    ids, pixels = tiny.prompt(family, 1, 3, 4)
    batch = tiny.collate(family, [(ids, pixels)])
    question = torch.tensor([[11, 12, 13]])
    with Plan(plan).apply(model):
        cache = DynamicCache(config=model.get_decoder().config)
        first = model.generate(**batch, past_key_values=cache, max_new_tokens=4, do_sample=False)
        longer = torch.cat([first, question], 1)
        text = {"input_ids": longer, "attention_mask": torch.ones_like(longer)}
        if family == "qwen2_5_vl":
            text["mm_token_type_ids"] = (longer == tiny.IMAGE).int()
        second = logits(model, text, past_key_values=cache)
        assert cache.get_seq_length() == longer.shape[1] + 4
        # the same tokens one at a time, through plain forward calls on a fresh cache
        fresh = DynamicCache(config=model.get_decoder().config)
        model.generate(**batch, past_key_values=fresh, max_new_tokens=1, do_sample=False)
        with torch.no_grad():
            for place in range(len(ids), longer.shape[1]):
                out = step(model, longer[:, place : place + 1], fresh)
    torch.testing.assert_close(second[0, 0], out[0, -1], rtol=0, atol=1e-5)


def step(model: Any, ids: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
    """One token through a loop that leaves positions to the model."""
    return model(input_ids=ids, past_key_values=cache, use_cache=True).logits


@pytest.mark.parametrize("mode", ["apply", "simulate"])
@pytest.mark.parametrize("plan", ["random(keep=0.5)", "fastv(layer=2,keep=0.5)+exit(layer=3)", *PLANS[3:], LAST_ROWS])
@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_static_cache_equals_dynamic(family: str, plan: str, mode: str) -> None:
    model, batch = tiny.build(family), tiny.ragged_batch(family)
    with Plan(plan).apply(model, mode=mode):  # type: ignore[arg-type]
        dynamic = logits(model, batch)
        static = logits(model, batch, cache_implementation="static", disable_compile=True)
    torch.testing.assert_close(dynamic, static, rtol=0, atol=1e-5)


def test_reused_cache_starts_a_new_prompt() -> None:
    model = tiny.build("llava")
    first, second = (tiny.collate("llava", [tiny.prompt("llava", 1, 3, after)]) for after in (4, 6))
    with Plan("random(keep=0.5)").apply(model):
        expected = logits(model, second)
        cache = DynamicCache(config=model.get_decoder().config)
        logits(model, first, past_key_values=cache)
        cache.reset()
        if cache.get_seq_length():
            pytest.skip("transformers < 5.18 does not empty a cache on reset")
        assert torch.equal(expected, logits(model, second, past_key_values=cache))
    cache.reset()
    plain = logits(model, second)
    with Plan().apply(model):
        assert torch.equal(plain, logits(model, second, past_key_values=cache))


def test_flash_style_implementation() -> None:
    """Flash kernels take two-dimensional masks and look at their own name in the config; a stand-in does the same."""

    def stand_in(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
        assert module.config._attn_implementation == "flash_stand_in"
        assert module.layer_idx is not None
        if attention_mask is not None:
            assert attention_mask.ndim == 2
            queries, keys = query.shape[2], key.shape[2]
            late = torch.arange(keys)[None] <= torch.arange(queries)[:, None] + keys - queries
            full = late & attention_mask[:, None, None].bool()
            attention_mask = full | torch.eye(keys, dtype=torch.bool)[None, None, -queries:]
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("flash_stand_in", stand_in)
    AttentionMaskInterface.register("flash_stand_in", ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"])
    for plan in ("random(keep=0.5)", "fastv(layer=1,keep=0.5)+exit(layer=3)"):
        model, batch = tiny.build("llava"), tiny.ragged_batch("llava")
        with Plan(plan).apply(model):
            expected = logits(model, batch)
        for config in (model.get_decoder().config, model.config.text_config):
            config._attn_implementation_internal = "flash_stand_in"
        with Plan(plan).apply(model):
            torch.testing.assert_close(expected, logits(model, batch), rtol=0, atol=1e-5)
        assert model.get_decoder().config._attn_implementation == "flash_stand_in"


def test_two_threads_on_one_model() -> None:
    model = tiny.build("llava_next")
    batches = [tiny.collate("llava_next", [tiny.prompt("llava_next", images, 3, 4)]) for images in (1, 2)]
    failures: list[str] = []
    with Plan("visionzip(dominant=0.4,contextual=0.2)+fastv(layer=1,keep=0.5)").apply(model) as run:
        expected = [logits(model, batch) for batch in batches]

        def work(which: int) -> None:
            for _ in range(8):
                if not torch.equal(expected[which], logits(model, batches[which])):
                    failures.append("logits")
                if run.report().rows[0].visual_total != [64, 128][which] and which == 0:
                    failures.append("report")

        threads = [threading.Thread(target=work, args=(which,)) for which in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


def test_images_encoded_by_hand_are_forgotten() -> None:
    model, batch = tiny.build("llava"), tiny.collate("llava", [tiny.prompt("llava", 0, 2, 5)])
    with Plan("random(keep=0.5)").apply(model):
        model.model.get_image_features(torch.randn(1, 3, 16, 16), return_dict=True)
        logits(model, batch)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("call", ["generate", "forward"])
def test_wrong_image_counts_name_the_row(family: str, call: str) -> None:
    model = tiny.build(family)
    right = tiny.ragged_prompts(family)
    for give, row in (((1, 0, 1), 2), ((0, 0, 0), 0), ((1, 0, 3), 2)):
        pixels = [(tiny.prompt(family, count, 1, 1)[1], ids) for count, (ids, _) in zip(give, right, strict=True)]
        batch = tiny.collate(family, [(ids, images) for images, ids in pixels])
        run = model.generate if call == "generate" else model
        options: dict[str, Any] = {"max_new_tokens": 2} if call == "generate" else {}
        if family == "qwen2_5_vl" and "image_grid_thw" in batch:
            batch["position_ids"] = torch.arange(batch["input_ids"].shape[1]).expand(3, 3, -1)
        with Plan("fastv(layer=2)").apply(model), pytest.raises(InputError, match=f"row {row}"):
            run(**batch, **options)


def test_placeholders_among_drafts_are_refused_and_nothing_else_is_said(recwarn: pytest.WarningsRecorder) -> None:
    model = tiny.build("llava")
    visual, pixels = tiny.visual_ids("llava", (16, 16))
    batch = tiny.collate("llava", [([5, *visual, 5], [pixels])])  # what followed a 5 before was the picture
    with Plan().apply(model), pytest.raises(InputError, match="row 0 has 18"):
        model.generate(**batch, prompt_lookup_num_tokens=2, max_new_tokens=3, do_sample=False)
    assert not [each for each in recwarn if "hook" in str(each.message)]


def test_more_tokens_than_exist_names_the_row() -> None:
    model, batch = tiny.build("qwen2_5_vl"), tiny.ragged_batch("qwen2_5_vl")
    with Plan("random(keep=10)").apply(model), pytest.raises(BudgetError, match="row 2 has 4 visual tokens in image 0"):
        logits(model, batch)


def test_layer_out_of_range() -> None:
    context = Plan("exit(layer=4)").apply(tiny.build("llava"))
    with pytest.raises(PlanError, match="layers 0 to 3"):
        context.__enter__()


def test_other_inputs_are_refused() -> None:
    model, batch = tiny.build("llava"), tiny.collate("llava", [tiny.prompt("llava", 1, 3, 4)])
    with Plan("random(keep=0.5)").apply(model):
        embeds = model.get_input_embeddings()(batch["input_ids"])
        with pytest.raises(InputError, match="input_ids"):
            model(inputs_embeds=embeds)
        cache = DynamicCache(config=model.get_decoder().config)
        logits(model, tiny.collate("llava", [tiny.prompt("llava", 0, 3, 4)]), past_key_values=cache)
        longer = torch.cat([torch.full((1, 12), 5), batch["input_ids"]], 1)
        with pytest.raises(InputError, match="cache already in use"):
            model.generate(
                input_ids=longer, pixel_values=batch["pixel_values"], past_key_values=cache, max_new_tokens=1
            )
        with pytest.raises(ModelError, match="cannot hold fewer"):
            model(**batch, past_key_values=DynamicSliding())


class DynamicSliding(DynamicCache):
    """A cache whose layers forget."""

    def __init__(self) -> None:
        from transformers.cache_utils import DynamicSlidingWindowLayer

        super().__init__()
        self.layers = [DynamicSlidingWindowLayer(sliding_window=64) for _ in range(tiny.LAYERS)]
        self.layer_class_to_replicate = None


def test_models_that_cannot_carry_a_plan() -> None:
    text = LlamaForCausalLM(LlamaConfig(**tiny.TEXT))
    refusals = [(text, "no vision tower")]
    refusals.append((tiny.build("llava").model, "no language model head"))
    flex = tiny.build("llava")
    for config in (flex.get_decoder().config, flex.config.text_config):
        config._attn_implementation_internal = "flex_attention"
    refusals.append((flex, "flex_attention"))
    sliding = tiny.build("llava_onevision")
    sliding.get_decoder().config.layer_types = ["sliding_attention"] * tiny.LAYERS
    refusals.append((sliding, "sliding_attention"))
    parallel = tiny.build("llava")
    parallel._tp_size = 2
    refusals.append((parallel, "tensor-parallel"))
    for model, reason in refusals:
        context = Plan("fastv(layer=2)").apply(model)
        with pytest.raises(ModelError, match=reason):
            context.__enter__()


def test_silent_plan_is_an_error() -> None:
    model, batch = tiny.build("llava"), tiny.collate("llava", [tiny.prompt("llava", 1, 3, 4)])

    def skip(layer: Any, args: Any, kwargs: Any) -> Any:
        return args, {name: value for name, value in kwargs.items() if name != "mmefficient"}

    context = Plan("exit(layer=2)").apply(model)
    handle = model.get_decoder().layers[2].register_forward_pre_hook(skip, with_kwargs=True)
    context.__enter__()
    logits(model, batch)
    with pytest.raises(SilentPlanError, match="never acted"):
        context.__exit__(None, None, None)
    handle.remove()
    with pytest.raises(KeyError), Plan("exit(layer=2)").apply(model):
        raise KeyError


def test_report() -> None:
    model, batch = tiny.build("llava"), tiny.ragged_batch("llava")
    with Plan("fastv(layer=1,keep=0.25)").apply(model) as run:
        with pytest.raises(PlanError, match="nothing to report"):
            run.report()
        model.generate(**batch, **GREEDY)
        report = run.report()
    data = report.to_dict()
    assert data["plan"] == "fastv(layer=1,keep=0.25)"
    assert data["rows"][2] == {"visual_total": 32, "kept_per_layer": [32, 8, 8, 8]}
    assert 0 < data["prefill_flops"] < data["prefill_flops_without_plan"]
    # one row of r tokens: 2 * r * (4.. matrices) + 4 * r^2 * width, see flops.py
    matrices = 32 * 8 * (2 * 4 + 2 * 2) + 3 * 32 * 48
    rows = [(26, 14), (7, 7), (41, 17)]
    full = sum(4 * (2 * n * matrices + 4 * n * n * 32) for n, _ in rows)
    assert data["prefill_flops_without_plan"] == full
    cut = sum(2 * n * matrices + 4 * n * n * 32 for before, after in rows for n in (before, after, after, after))
    assert data["prefill_flops"] == cut


@pytest.mark.parametrize(
    "plan", ["fastv(layer=2,keep=0.5)+exit(layer=3)", "random(keep=0.5,positions=compact)", "composite"]
)
def test_decoding_compiles_to_one_graph(plan: str) -> None:
    model, batch = tiny.build("llava"), tiny.ragged_batch("llava")
    config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    config._compile_all_devices = True
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    with Plan(plan).apply(model):
        dynamic, before = logits(model, batch), graphs["unique_graphs"]
        for _ in range(2):
            static = logits(model, batch, cache_implementation="static", compile_config=config)
            torch.testing.assert_close(dynamic, static, rtol=0, atol=1e-5)
    assert graphs["unique_graphs"] == before + 1
    torch._dynamo.reset()


def test_offloaded_weights() -> None:
    """accelerate brings weights in around each module's forward; everything that computes has to go through modules."""
    plan = Plan("visionzip(dominant=0.4,contextual=0.2)+fastv(layer=1,keep=0.5)")
    model, batch = tiny.build("llava"), tiny.ragged_batch("llava")
    with plan.apply(model):
        expected = logits(model, batch)
    cpu_offload(model, execution_device=torch.device("cpu"))
    with plan.apply(model):
        assert torch.equal(expected, logits(model, batch))


@pytest.mark.parametrize("later", ["none", "exit(layer=3)"])
def test_a_later_turn_under_another_plan(later: str) -> None:
    """The prompt stays as the first plan left it."""
    model, batch = tiny.build("llava"), tiny.collate("llava", [tiny.prompt("llava", 1, 3, 4)])
    results = []
    for second in ("fastv(layer=1,keep=0.5)", later):
        cache = DynamicCache(config=model.get_decoder().config)
        with Plan("fastv(layer=1,keep=0.5)").apply(model):
            first = model.generate(**batch, past_key_values=cache, max_new_tokens=4, do_sample=False)
        longer = torch.cat([first, torch.tensor([[11, 12, 13]])], 1)
        with Plan(second).apply(model) as run:
            results.append(logits(model, {"input_ids": longer}, past_key_values=cache))
        report = run.report()
        assert report.plan == "fastv(layer=1,keep=0.5)"
        assert report.rows[0].kept_per_layer == [16, 8, 8, 8]
    assert torch.equal(*results)
