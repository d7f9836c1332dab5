"""The graph engine generates what the stock model generates; recordings are stood in for by repeated runs."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import StoppingCriteria, TextIteratorStreamer

from mmefficient.errors import InputError, ModelError, PlanError
from mmefficient.graph import engine_of, release
from mmefficient.graph.engine import Engine
from mmefficient.graph.modules import modules_of
from mmefficient.models import adapter_for
from mmefficient.plan import Plan
from tests import tiny
from tests.graph.rerun import Rerun

PLANS = [
    "none",
    "fastv(layer=2,keep=0.5)",
    "pool(keep=0.3)",
    "exit(layer=2)",
    "random(keep=0.5,positions=compact)",
    "visionzip(dominant=0.4,contextual=0.2)+fastv(layer=1,keep=0.5)",
    "grid(keep=0.6)+fastv(layer=1,keep=0.5)+exit(layer=3)",
    "pyramiddrop(shares=(0.6,0.4,0.2))",
    "cdpruner(keep=0.4,matcher=words,positions=keep)",
    "trim(keep=0.4,matcher=words)",
    "prumerge(keep=0.4,plus=True)+fastv(layer=2,keep=0.5)",
    "cdpruner(keep=0.3,matcher=embeddings,positions=keep,scope=image)+fastv(layer=2,keep=0.5)",
    "composite",
    "saisa",
    "no_visual_self(scope=nothing,layers=(1,2))",
    "shortv(layers=(1,3))+skip_ffn(layers=(2,))",
    "thin_ffn(ratio=3.0)+window2d(radius=1)",
    "modality_mutual",
    "fastv(layer=1,keep=0.5)+layer_drop(from_layer=2)",
    "block_images+no_visual_self(scope=text,layers=(2,))",
    "grid(keep=0.6)+fastv(layer=2,keep=0.5)+shortv(layers=(0,1,3))",
    "yopo(exit=3,radius=1)",
]
CASES = [
    (family, plan)
    for family in tiny.FAMILIES
    for plan in PLANS
    if family != "qwen2_5_vl" or not any(each in plan for each in ("compact", "visionzip", "saisa", "trim", "prumerge"))
]


def generate(model: Any, batch: dict[str, Any], plan: str = "none", engine: Any = "auto", **options: Any) -> Any:
    """Generated ids and the report."""
    with Plan(plan).apply(model, engine=engine) as run:
        ids = model.generate(**batch, **{"max_new_tokens": 5, "do_sample": False, **options})
        return ids, run.report()


def recording(model: Any, limit: int = 48) -> Engine:
    """Let the model's engine record, as on a GPU."""
    release(model)
    engine = engine_of(model, adapter_for(model), Rerun())
    engine.captures.limit = limit
    return engine


@pytest.fixture
def llava() -> Iterator[Any]:
    model = tiny.build("llava")
    yield model
    release(model)


@pytest.mark.parametrize(("family", "plan"), CASES)
def test_ids_and_report_are_those_of_eager(family: str, plan: str) -> None:
    model = tiny.build(family)
    engine = recording(model)
    prompts = tiny.ragged_prompts(family)
    for batch in (tiny.collate(family, prompts), tiny.collate(family, prompts[:1])):
        ids, report = generate(model, batch, plan, "eager")
        for _ in range(3):  # as it is, recorded, replayed
            ours, ours_report = generate(model, batch, plan)
            assert torch.equal(ours, ids)
            assert ours_report == report
            for row in range(len(report.rows)):
                assert torch.equal(ours_report.lives_until[row], report.lives_until[row])
                assert torch.equal(ours_report.places[row], report.places[row])
    assert ours_report.engine["name"] == "graph"
    assert len(engine.captures) >= 4


@pytest.mark.parametrize(
    "plan",
    [
        "none",
        "fastv(layer=1,keep=0.5)",
        "thin_ffn+composite(layers=(0,2))",
        "cdpruner(keep=0.5,matcher=words,positions=keep)",
    ],
)
@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl"])
def test_one_recording_serves_other_prompts(family: str, plan: str) -> None:
    """Other words, other lengths of the same bucket, images at other places."""
    model = tiny.build(family)
    engine = recording(model)
    prompts = [tiny.prompt(family, 1, before, after) for before, after in ((3, 4), (5, 6), (4, 3), (7, 4), (9, 2))]
    for each in prompts:
        batch = tiny.collate(family, [each])
        assert torch.equal(generate(model, batch, plan)[0], generate(model, batch, plan, "eager")[0])
    assert len(engine.captures) in (3, 4)  # the tower, a decoding step, a prefill, and one if pictures lead to the next


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl"])
def test_pictures_of_many_sizes_share_a_recording(family: str) -> None:
    """Without reducers; features, like tokens, are filled up."""
    model = tiny.build(family)
    engine = recording(model)
    for first, before in ((0, 3), (1, 6), (2, 4), (0, 5), (1, 2)):
        batch = tiny.collate(family, [tiny.prompt(family, 1, before, 4, first)])
        assert torch.equal(generate(model, batch)[0], generate(model, batch, engine="eager")[0])
    kinds = [key[0][0] for key in engine.captures._found]
    assert kinds.count("read") <= 2
    assert kinds.count("step") == 1
    both = tiny.collate(family, [tiny.prompt(family, 1, 3, 4, first) for first in (0, 1)])
    for _ in range(3):
        assert torch.equal(generate(model, both)[0], generate(model, both, engine="eager")[0])


@pytest.mark.parametrize("recorded", [False, True])
def test_sampling_processors_stopping_and_streaming(llava: Any, recorded: bool) -> None:
    if recorded:
        recording(llava)
    batch = tiny.ragged_batch("llava")
    stop = _StopAt(int(batch["input_ids"].shape[1]) + 3)
    for options in (
        {"do_sample": True, "temperature": 0.7, "top_k": 20},
        {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
        {"stopping_criteria": [stop], "max_new_tokens": 8},
        {"eos_token_id": 17, "max_new_tokens": 12, "do_sample": True, "temperature": 3.0},
    ):
        results = []
        for engine in ("eager", "auto", "auto", "auto"):
            torch.manual_seed(3)
            results.append(generate(llava, batch, "fastv(layer=2,keep=0.5)", engine, **options)[0])
        assert all(torch.equal(results[0], each) for each in results[1:])
    streams = []
    for engine in ("eager", "auto"):
        streamer = TextIteratorStreamer(_Words(), skip_prompt=False)  # type: ignore[arg-type]
        one = tiny.collate("llava", tiny.ragged_prompts("llava")[:1])
        generate(llava, one, "none", engine, streamer=streamer)
        streams.append(list(streamer))
    assert streams[0] == streams[1]


def test_calls_that_run_eager_say_so_once(llava: Any, caplog: pytest.LogCaptureFixture) -> None:
    batch = tiny.collate("llava", tiny.ragged_prompts("llava")[:1])
    calls: list[dict[str, Any]] = [{"num_beams": 2}, {"return_dict_in_generate": True}, {"prompt_lookup_num_tokens": 2}]
    with caplog.at_level(logging.WARNING, "mmefficient"), Plan().apply(llava, engine="auto") as run:
        for options in calls:
            caplog.clear()
            for _ in range(2):
                llava.generate(**batch, max_new_tokens=3, do_sample=False, **options)
            assert len(caplog.records) == 1
            assert run.report().engine["why"] == next(f"{name}={value!r}" for name, value in options.items())
        llava.generate(**batch, max_new_tokens=3, do_sample=False)
        assert run.report().engine["name"] == "graph"


def test_a_second_turn_goes_on_eager(llava: Any) -> None:
    batch = tiny.collate("llava", tiny.ragged_prompts("llava")[:1])
    plan, results = "fastv(layer=1,keep=0.5)", []
    for engine in ("eager", "auto"):
        with Plan(plan).apply(llava, engine=engine):  # type: ignore[arg-type]
            first = llava.generate(**batch, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
            ids = torch.cat([first.sequences, torch.tensor([[5, 6, 7]])], 1)
            results.append(llava.generate(input_ids=ids, past_key_values=first.past_key_values, max_new_tokens=3))
    assert torch.equal(*results)


def test_graph_raises_where_auto_runs_eager(llava: Any) -> None:
    with pytest.raises(ModelError, match="no CUDA graphs"), Plan().apply(llava, engine="graph"):
        pass
    assert "generate" not in llava.__dict__
    assert not any(module._forward_pre_hooks for module in llava.modules())
    with pytest.raises(PlanError, match="none of"), Plan().apply(llava, engine="fast"):  # type: ignore[arg-type]
        pass
    captures = engine_of(llava, adapter_for(llava), _Broken()).captures
    captures.strict = True
    captures.run((("some",),), dict, {})
    with pytest.raises(ModelError, match="cannot be captured"):
        captures.run((("some",),), dict, {})


def test_what_cannot_be_recorded_runs_as_it_is(llava: Any, caplog: pytest.LogCaptureFixture) -> None:
    engine = recording(llava)
    batch = tiny.collate("llava", tiny.ragged_prompts("llava")[:1])
    want = generate(llava, batch, engine="eager")[0]
    engine.captures.recorder = _Broken()
    with caplog.at_level(logging.WARNING, "mmefficient"):
        for _ in range(4):
            assert torch.equal(generate(llava, batch)[0], want)
    assert [record.getMessage() for record in caplog.records] == ["not captured, runs as it is: no"] * 3  # per kind


def test_memory_is_bounded_and_given_back(llava: Any) -> None:
    engine = recording(llava, limit=4)
    sizes = []
    for _ in range(2):
        for length in range(1, 130, 20):
            batch = tiny.collate("llava", [tiny.prompt("llava", 1, 3, length)])
            want = generate(llava, batch, engine="eager")[0]
            for _ in range(2):
                ids, report = generate(llava, batch)
                assert torch.equal(ids, want)
                assert len(engine.captures) <= 4
        sizes.append(report.engine["cache_bytes"])
    assert sizes[0] == sizes[1] > 0
    assert report.engine["recordings"] > 0
    assert report.engine["recorded_bytes"] > 0
    release(llava)
    assert engine.store.nbytes == 0
    assert len(engine.captures) == 0


def test_other_weights_are_noticed(llava: Any) -> None:
    recording(llava)
    batch = tiny.collate("llava", tiny.ragged_prompts("llava")[:1])
    for _ in range(3):
        generate(llava, batch)
    projection = llava.get_decoder().layers[1].mlp.up_proj
    projection.weight = torch.nn.Parameter(torch.randn_like(projection.weight), requires_grad=False)
    assert torch.equal(generate(llava, batch)[0], generate(llava, batch, engine="eager")[0])


def test_another_precision_is_noticed(llava: Any) -> None:
    engine = recording(llava)
    batch = tiny.collate("llava", tiny.ragged_prompts("llava")[:1])
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float32):
        llava.to(dtype)
        batch["pixel_values"] = batch["pixel_values"].to(dtype)
        for _ in range(3):
            ids, report = generate(llava, batch)
            assert report.engine["name"] == "graph"
        if dtype != torch.bfloat16:  # whose close calls differ
            assert torch.equal(ids, generate(llava, batch, engine="eager")[0])
        assert engine.store.rows(0, 1, 1)[0].dtype == dtype


def test_foreign_layers_run_eager(llava: Any) -> None:
    llava.get_decoder().layers[0].mlp.forward = llava.get_decoder().layers[0].mlp.forward
    batch = tiny.collate("llava", tiny.ragged_prompts("llava")[:1])
    for plan in ("none", "composite"):
        assert "forward was replaced" in generate(llava, batch, plan)[1].engine["why"]


def test_an_exchanged_module_is_noticed(llava: Any) -> None:
    """Between two attachments, which compare modules instead of walking them."""
    batch = tiny.collate("llava", tiny.ragged_prompts("llava")[:1])
    mlp = llava.get_decoder().layers[1].mlp
    own, other = mlp.up_proj, type("Adapted", (torch.nn.Linear,), {})(32, 48, bias=False)
    for linear, name in ((own, "graph"), (other, "eager"), (own, "graph")):
        mlp.up_proj = linear
        assert generate(llava, batch)[1].engine["name"] == name
    own.to(torch.float64)
    assert modules_of(llava, llava.get_decoder().layers) is modules_of(llava, llava.get_decoder().layers)
    known = modules_of(llava, llava.get_decoder().layers)
    own.to(torch.float32)
    assert modules_of(llava, llava.get_decoder().layers) is not known


def test_bad_input_names_the_row_and_leaves_the_engine_usable(llava: Any) -> None:
    batch = tiny.collate("llava", tiny.ragged_prompts("llava")[:1])
    want = generate(llava, batch)[0]
    wrong = {**batch, "input_ids": torch.where(batch["input_ids"] == tiny.IMAGE, 5, batch["input_ids"])}
    with pytest.raises(InputError, match="left over"):
        generate(llava, wrong)
    assert torch.equal(generate(llava, batch)[0], want)


def test_the_model_is_as_it_was_and_copies_stand_alone(llava: Any) -> None:
    before = dict(llava.__dict__)
    batch = tiny.collate("llava", tiny.ragged_prompts("llava")[:1])
    with Plan().apply(llava, engine="auto"):
        want = llava.generate(**batch, max_new_tokens=4, do_sample=False)
        inside = copy.deepcopy(llava)
    for twin in (inside, copy.deepcopy(llava)):
        assert torch.equal(twin.generate(**batch, max_new_tokens=4, do_sample=False), want)
    assert llava.__dict__ == before
    assert torch.equal(generate(twin, batch, max_new_tokens=4)[0], want)


def test_calls_in_and_out_of_inference_mode(llava: Any) -> None:
    recording(llava)
    batch = tiny.collate("llava", tiny.ragged_prompts("llava")[:1])
    want = generate(llava, batch, engine="eager")[0]
    for inside in (True, False, True, False):
        with torch.inference_mode(inside):
            assert torch.equal(generate(llava, batch)[0], want)
    with Plan().apply(llava, engine="auto"):
        ids = batch.pop("input_ids")
        assert torch.equal(llava.generate(ids, **batch, max_new_tokens=5, do_sample=False), want)


def test_settings_in_the_config_are_still_refused(llava: Any) -> None:
    batch = tiny.collate("llava", tiny.ragged_prompts("llava")[:1])
    for _ in range(2):
        generate(llava, batch)
    llava.config.temperature = 0.5
    before = dict(vars(llava.config))
    with pytest.raises(ValueError, match="configuration to control generation"):
        generate(llava, batch)
    assert dict(vars(llava.config)) == before


def test_threads_take_turns(llava: Any) -> None:
    recording(llava)
    batches = [tiny.collate("llava", [each]) for each in tiny.ragged_prompts("llava")]
    want = [generate(llava, batch, engine="eager")[0] for batch in batches]
    wrong: list[int] = []
    with Plan().apply(llava, engine="auto"):

        def work(index: int) -> None:
            for _ in range(5):
                ids = llava.generate(**batches[index], max_new_tokens=5, do_sample=False)
                if not torch.equal(ids, want[index]):
                    wrong.append(index)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(len(batches))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


class _StopAt(StoppingCriteria):
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


class _Words:
    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(f"{token} " for token in ids)


class _Broken:
    def record(self, body: Any) -> Any:
        raise RuntimeError("no")
