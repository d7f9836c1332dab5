"""The commands of `mmefficient bench`. Heavy imports stay inside, as in `mmefficient.cli`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmefficient.bench.giving import give, give_file, need_gpu, open_target, picture_size, readable_plans

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Benchmarks: times beside their floors, checked before they are measured. See docs/benchmarks.md.",
)

Model = Annotated[
    str,
    typer.Option(help="llava-1.5-7b, llava-1.5-13b, llava-next-7b, qwen2.5-vl-7b, reference, a folder or a hub id."),
]
Plans = Annotated[
    list[str] | None, typer.Option("--plan", help="A plan to time; repeat for more.", callback=readable_plans)
]
Engines = Annotated[list[str] | None, typer.Option("--engine", help="Only this engine; repeat for more.")]
Repeats = Annotated[int, typer.Option(min=1, help="Timed rounds.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option(help="auto is bfloat16 on CUDA and float32 on a CPU.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the result as JSON, Markdown and PNG.")]
Picture = Annotated[str, typer.Option(help="WIDTHxHEIGHT of every picture.")]


@app.command()
def latency(
    model: Model = "reference",
    plan: Plans = None,
    engine: Engines = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="A batch size; repeat for more.")] = None,
    repeats: Repeats = 20,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens generated per row.")] = 16,
    picture: Picture = "672x672",
    device: Device = "auto",
    dtype: Dtype = "auto",
    out: Out = None,
) -> None:
    """What a user waits for: preprocess, vision, scoring, prefill and decode of engines and plans."""
    from mmefficient.bench import latency as bench
    from mmefficient.bench import plots

    size = picture_size(picture)
    target = open_target(model, device, dtype)
    result = bench.run(
        target,
        plan or [],
        batch or [1],
        engines=engine,
        repeats=repeats,
        new_tokens=new_tokens,
        picture=size,
    )
    give(result, bench.tables(result), out, plots.latency)


@app.command()
def throughput(
    model: Model = "reference",
    plan: Plans = None,
    engine: Engines = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="A batch size; repeat for more. 1, 4, 8, 16, 32.")
    ] = None,
    repeats: Repeats = 5,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens generated per row.")] = 16,
    picture: Picture = "672x672",
    device: Device = "auto",
    dtype: Dtype = "auto",
    out: Out = None,
) -> None:
    """Images and tokens per second, peak memory and bytes of keys and values, by batch size."""
    from mmefficient.bench import plots
    from mmefficient.bench import throughput as bench

    size = picture_size(picture)
    target = open_target(model, device, dtype)
    result = bench.run(
        target,
        plan or [],
        batch or bench.BATCHES,
        engines=engine,
        repeats=repeats,
        new_tokens=new_tokens,
        picture=size,
    )
    give(result, bench.tables(result), out, plots.throughput)


@app.command()
def scaling(
    model: Model = "reference",
    plan: Plans = None,
    engine: Engines = None,
    tokens: Annotated[
        list[int] | None, typer.Option(min=1, help="Visual tokens; repeat for more. 64 to 32768.")
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="A batch size; repeat for more. 1 and 8.")] = None,
    repeats: Repeats = 5,
    device: Device = "auto",
    dtype: Dtype = "auto",
    out: Out = None,
) -> None:
    """How the prefill grows with visual tokens and batch: a fitted cost model, where it bends, and what binds."""
    from mmefficient.bench import plots
    from mmefficient.bench import scaling as bench

    target = open_target(model, device, dtype, small=True)
    result = bench.run(target, plan or [], tokens or bench.TOKENS, batch or [1, 8], engines=engine, repeats=repeats)
    give(result, bench.tables(result), out, plots.scaling)


@app.command()
def rows(
    plan: Plans = None,
    images: Annotated[
        list[int] | None, typer.Option(min=1, help="Pictures of 576 tokens per prompt; repeat for more. 1, 5, 14, 57.")
    ] = None,
    engine: Annotated[list[str] | None, typer.Option(help="graph, the default, or eager; repeat for both.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows of the batch.")] = 1,
    repeats: Repeats = 5,
    out: Annotated[Path | None, typer.Option(help="Also write the result here, as JSON.")] = None,
) -> None:
    """Prefill of a 7B geometry when visual rows do less, beside the stock model; needs a CUDA GPU."""
    from mmefficient.bench import visual_rows as bench

    need_gpu("the table of visual rows")
    result = bench.run(
        plan or ["composite", "saisa"],
        images or [1, 5, 14, 57],
        engines=engine or ["graph"],
        repeats=repeats,
        batch=batch,
    )
    give_file(result, bench.table(result), out)


@app.command()
def reuse(
    plan: Plans = None,
    images: Annotated[
        list[int] | None, typer.Option(min=1, help="Pictures of 576 tokens per prompt; repeat for more. 1, 5, 14.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Questions in a batch, about the same pictures.")] = 1,
    repeats: Repeats = 5,
    out: Annotated[Path | None, typer.Option(help="Also write the result here, as JSON.")] = None,
) -> None:
    """What a question costs when its picture was read before, on a 7B geometry; needs a CUDA GPU."""
    from mmefficient.bench import reuse as bench

    need_gpu("the table of kept pictures")
    result = bench.run(plan or ["none", "composite", "saisa"], images or [1, 5, 14], repeats=repeats, batch=batch)
    give_file(result, bench.table(result), out)


@app.command()
def load(
    model: Model = "reference",
    plan: Plans = None,
    requests: Annotated[int, typer.Option(min=10, help="Requests in all; one in fifty has a damaged picture.")] = 1000,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests under way at a time.")] = 8,
    kinds: Annotated[int, typer.Option(min=1, help="Different good requests.")] = 30,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens generated per answer.")] = 8,
    device: Device = "auto",
    dtype: Dtype = "auto",
    out: Out = None,
) -> None:
    """One process under mixed load: every answer as alone, no crash, no growing memory; percentiles."""
    from mmefficient.bench import load as bench
    from mmefficient.bench import plots

    target = open_target(model, device, dtype)
    result = bench.run(
        target, plan or [], requests=requests, concurrency=concurrency, kinds=kinds, new_tokens=new_tokens
    )
    give(result, bench.tables(result), out, plots.load)


@app.command()
def hallucination(
    out: Annotated[Path, typer.Option(help="Folder for the reports and the answers so far.")],
    model: Annotated[str, typer.Option(help="reference, reference-biased, a folder or a hub id.")] = "reference-biased",
    only: Annotated[list[str] | None, typer.Option(help="A method, without reducers; repeat for more.")] = None,
    trial: Annotated[int, typer.Option(min=2, help="Validation questions to choose strengths on.")] = 1300,
    limit: Annotated[int | None, typer.Option(min=6, help="Questions of all kinds together.")] = None,
    split: Annotated[str, typer.Option(help="test, or confirm: unused questions, to confirm a choice.")] = "test",
    clock: Annotated[str, typer.Option(help="Model to time them on, as llava-1.5-7b; none = no times.")] = "none",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto is the checkpoint's own, and float32 on a CPU.")] = "auto",
) -> None:
    """What methods against hallucination do, at strengths chosen on validation."""
    from mmefficient.bench.hallucination import run, table, write
    from mmefficient.evaluation.processes import Processes

    result = run(model, out, only or [], trial=trial, limit=limit, split=split, clock=clock, device=device, dtype=dtype)
    if Processes.current().rank == 0:
        write(result, out)
        print(table(result))


@app.command()
def sentences(
    out: Annotated[Path, typer.Option(help="Folder for sentences.json and sentences.md.")],
    model: Annotated[str, typer.Option(help="reference, reference-biased, a folder or a hub id.")] = "reference-biased",
    tuned: Annotated[str | None, typer.Option(help="The same model after preference tuning.")] = None,
    margin: Annotated[float | None, typer.Option(help="Of the probe; by default the best on validation.")] = None,
    trial: Annotated[int, typer.Option(min=1, help="Validation questions per kind to choose the margin on.")] = 200,
    limit: Annotated[int, typer.Option(min=1, help="Test questions per kind.")] = 1000,
    width: Annotated[int, typer.Option(min=1, help="Units searched for where the greedy one fails.")] = 4,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions decoded together.")] = 256,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto is the checkpoint's own, and float32 on a CPU.")] = "auto",
) -> None:
    """What checking sentences does to hallucination, in training and while decoding."""
    from mmefficient.bench.sentences import page, run, write

    result = run(model, tuned, margin=margin, trial=trial, limit=limit, width=width, batch_size=batch_size,
                 device=device, dtype=dtype)  # fmt: skip
    write(result, out)
    print(page(result))


@app.command()
def kernels(
    out: Annotated[Path, typer.Option(help="Folder for kernels.json.")],
    only: Annotated[list[str] | None, typer.Option(help="A table to make; repeat for more.")] = None,
    tune: Annotated[bool, typer.Option(help="Also time other block sizes, warps, stages and schedules.")] = False,
    graph: Annotated[bool, typer.Option(help="Also time replayed CUDA graphs, which have no launches.")] = False,
    seconds: Annotated[float, typer.Option(help="Start no further case after this long.")] = 3600.0,
) -> None:
    """The kernels beside their peers and floors; needs a CUDA GPU."""
    need_gpu("the kernel table")
    from mmefficient.bench.kernels import run

    raise typer.Exit(0 if run(out, only, tune, graph, seconds) else 1)


@app.command()
def selection(
    plan: Plans = None,
    device: Device = "auto",
    repeats: Repeats = 20,
    out: Annotated[Path | None, typer.Option(help="Also write the result here, as JSON.")] = None,
) -> None:
    """What choosing tokens costs: the greedy kernel beside plain loops, and whole decisions of methods."""
    from mmefficient.bench.selection import PLANS, run, table

    result = run(plan or PLANS, device=device, repeats=repeats)
    give_file(result, table(result), out)


@app.command()
def evidence(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for evidence.json, .md and .png, and the answers.")],
    clock: Annotated[str, typer.Option(help="Model to time the first token on; none = no times.")] = "llava-1.5-7b",
    limit: Annotated[int | None, typer.Option(min=1, help="Questions in all, spread over the kinds.")] = None,
    budget: Annotated[list[float] | None, typer.Option(help="Only this share of tokens; repeat for more.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Only plans with this method; repeat for more.")] = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="A batch size to time; repeat for more. 1 and 8.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Questions per batch.")] = None,
    engine: Annotated[str, typer.Option(help="What runs the timed plans; eager where it cannot.")] = "eager",
    kind: Annotated[list[str] | None, typer.Option(help="Only this kind of question; repeat for more.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Random selections that each plan is compared with.")] = 3,
    positions: Annotated[str, typer.Option(help="both, or keep: leave out plans that close up position ids.")] = "both",
    part: Annotated[str, typer.Option(help="both, accuracy, clock; table: times into a table that there is.")] = "both",
    repeats: Repeats = 7,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Every method and baseline at the same budgets on the embedded model: accuracy per kind, tokens, time.

    For several GPUs: accelerate launch --multi_gpu --num_processes 8 -m mmefficient.bench evidence --out DIR
    """
    from mmefficient.bench.evidence import command

    command(
        out,
        clock,
        limit,
        budget,
        method,
        batch,
        batch_size,
        repeats,
        engine,
        kind,
        seeds,
        positions,
        part,
        device,
        dtype,
    )
