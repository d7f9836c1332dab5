"""The command line. Heavy imports stay inside the commands, so that help and typing mistakes answer at once."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmefficient import __version__
from mmefficient.bench.cli import app as bench
from mmefficient.errors import InputError, MMEfficientError

if TYPE_CHECKING:
    from mmefficient.vlm import Answer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Vision-language models with fewer visual tokens: ask, compare, evaluate.",
)

Model = Annotated[str, typer.Option(help="Folder in Hugging Face format, hub id, or 'reference' (embedded).")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16; auto is float32 on the CPU.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def main() -> None:
    """Entry point: what a user can put right is one sentence on stderr and exit code 2."""
    # OpenMP threads that wait busily make a CPU that is shared with anything else several times slower; read by torch
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app(prog_name="mmefficient")
    except MMEfficientError as error:
        print(f"mmefficient: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"mmefficient {__version__}")
        raise typer.Exit


app.add_typer(bench, name="bench")


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command(
    epilog="Examples:\n\nmmefficient ask sample 'Describe the image.'\n\n"
    "mmefficient ask sample 'Describe the image.' --plan 'fastv(layer=2,keep=0.25)' --compare\n\n"
    "mmefficient ask kitchen.png 'How many cups are there?' --model llava-hf/llava-1.5-7b-hf --json"
)
def ask(
    image: Annotated[str, typer.Argument(help="Path of a picture, or 'sample' for the bundled one.")],
    question: Annotated[str, typer.Argument(help="What to ask about it.")],
    model: Model = "reference",
    plan: Annotated[str, typer.Option(help="Methods to apply, such as 'fastv(layer=2,keep=0.25)+exit(layer=8)'.")] = "",
    compare: Annotated[bool, typer.Option("--compare", help="Answer without the plan too, and show both.")] = False,
    as_json: AsJson = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after this many tokens.")] = 128,
) -> None:
    """Ask a question about a picture; with --plan, also show what the plan kept and where the time went."""
    from mmefficient.images import load_image

    quiet()
    picture = load_image(_picture(image))  # before the model: a mistyped path should answer at once
    from mmefficient.vlm import VLM

    vlm = VLM.from_pretrained(model, plan=plan, device=device, dtype=dtype)
    if compare and not vlm.plan:
        raise InputError("--compare needs a --plan to compare with, such as 'fastv(layer=2,keep=0.25)'.")
    if compare:  # the first call pays for lazy initialisation, which would be held against whatever runs first
        vlm.ask(picture, question, plan="none", max_new_tokens=2)
    plain = vlm.ask(picture, question, plan="none", max_new_tokens=max_new_tokens) if compare else None
    answer = vlm.ask(picture, question, max_new_tokens=max_new_tokens)
    if as_json:
        found = {"model": model, "device": str(vlm.model.device), "dtype": _dtype_name(vlm), **_as_dict(answer)}
        if plain is not None:
            found["without_plan"] = _as_dict(plain)
        print(json.dumps(found))
    else:
        from mmefficient.console import print_answers

        print_answers(answer, plain)


@app.command(
    epilog="Example:\n\nmmefficient show sample 'Is there a frog?' --plan 'fastv(layer=2,keep=0.25)' -o kept.png"
)
def show(
    image: Annotated[str, typer.Argument(help="Path of a picture, or 'sample' for the bundled one.")],
    question: Annotated[str, typer.Argument(help="What to ask about it.")],
    plan: Annotated[list[str], typer.Option(help="Methods to apply; repeat for one row of pictures per plan.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The PNG to write.")],
    model: Model = "reference",
    device: Device = "auto",
    dtype: Dtype = "auto",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after this many tokens.")] = 128,
) -> None:
    """Draw which visual tokens a plan keeps: one picture per change, what has left is dimmed."""
    from mmefficient.images import load_image

    quiet()
    picture = load_image(_picture(image))
    _drawable(out)
    from mmefficient.draw import kept_tokens
    from mmefficient.plan import Plan
    from mmefficient.vlm import VLM

    plans = [Plan(each) for each in plan]
    vlm = VLM.from_pretrained(model, device=device, dtype=dtype)
    answers = [vlm.ask(picture, question, plan=each, max_new_tokens=max_new_tokens) for each in plans]
    drawn = kept_tokens(picture, [(answer.report, answer.text) for answer in answers])
    _draw(drawn, out)


@app.command(epilog="Examples:\n\nmmefficient methods\n\nmmefficient methods --json")
def methods(as_json: AsJson = False) -> None:
    """List the methods a plan can name, with their fields and papers."""
    from mmefficient.console import describe_methods, print_methods

    found = describe_methods()
    if as_json:
        print(json.dumps({"methods": found}))
    else:
        print_methods(found)


@app.command(
    name="eval",
    epilog="Examples:\n\nmmefficient eval --task scenes --plan 'fastv(layer=2,keep=0.25)' --limit 120\n\n"
    "mmefficient eval --task scenes --plan 'random(keep=0.25,seed=0)' --plan 'grid(keep=0.25)' --out results/\n\n"
    "mmefficient eval --task pope --data ~/data/pope --variant vcd --model llava-hf/llava-1.5-7b-hf",
)
def evaluate(
    task: Annotated[str, typer.Option(help="What to evaluate on; docs/evaluation.md lists the tasks.")] = "scenes",
    plan: Annotated[list[str] | None, typer.Option(help="A plan to measure; repeat the option for more.")] = None,
    model: Model = "reference",
    limit: Annotated[int | None, typer.Option(min=1, help="Questions in all, spread over the kinds.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Folder with the task's official files, or a hub id; see docs/evaluation.md.")
    ] = None,
    variant: Annotated[str | None, typer.Option(help="The task's prompt and settings; its first by default.")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out and list unusable records.")] = False,
    kind: Annotated[list[str] | None, typer.Option(help="Only this kind of question; repeat for more.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the reports and the answers so far.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Questions per batch; 16 on a CPU, else 128.")] = None,
    no_baselines: Annotated[
        bool, typer.Option("--no-baselines", help="Leave out random, grid and pool at the budget of every plan.")
    ] = False,
    check_flips: Annotated[int, typer.Option(min=0, help="Ask this many again alone, to count changed answers.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Measure plans on a task: every metric with its 95 % interval, paired differences to no plan and to baselines.

    For several processes: accelerate launch --multi_gpu --num_processes 2 -m mmefficient.cli eval ...
    """
    from mmefficient.evaluation import run_eval
    from mmefficient.evaluation.markdown import markdown
    from mmefficient.evaluation.processes import Processes

    quiet()
    report = run_eval(
        task,
        plan or [],
        model,
        limit=limit,
        kinds=kind,
        out=out,
        data=data,
        variant=variant,
        skip_bad=skip_bad,
        batch_size=batch_size,
        baselines=not no_baselines,
        check_flips=check_flips,
        device=device,
        dtype=dtype,
    )
    if Processes.current().rank == 0:
        print(markdown(report))


@app.command(epilog="Examples:\n\nmmefficient demo\n\nmmefficient demo --model llava-hf/llava-1.5-7b-hf --port 8080")
def demo(
    model: Annotated[list[str] | None, typer.Option(help="A model to serve; repeat for a choice.")] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 opens the demo to the network.")
    ] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="Default: the first free one from 7860 on.")] = None,
    share: Annotated[bool, typer.Option("--share/--no-share", help="Also open a public link.")] = False,
    auth: Annotated[str | None, typer.Option(help="USER:PASSWORD that the page asks for.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Open a page to see what plans keep, change and save (extra `demo`)."""
    from importlib.util import find_spec

    if find_spec("gradio") is None:
        raise InputError("The demo needs Gradio: pip install 'mmefficient[demo]'.")
    user, _, password = (auth or "").partition(":")
    if auth is not None and not (user and password):
        raise InputError("--auth is USER:PASSWORD.")
    from mmefficient.demo.app import serve

    quiet()
    running = serve(
        tuple(model or ["reference"]),
        host=host,
        port=port,
        share=share,
        auth=(user, password) if auth else None,
        device=device,
        dtype=dtype,
    )
    print(f"listening on {running.address}", flush=True)
    running.wait()


@app.command(
    epilog="Examples:\n\nmmefficient heads --model reference -o heads.png\n\nmmefficient heads cat.jpg --model DIR"
)
def heads(
    image: Annotated[str | None, typer.Argument(help="A picture; scenes of the embedded set by default.")] = None,
    question: Annotated[str, typer.Option(help="What is asked about it.")] = "Describe the image.",
    model: Model = "reference",
    scenes: Annotated[int, typer.Option(min=1, help="How many scenes, without a picture.")] = 16,
    out: Annotated[Path, typer.Option("--out", "-o", help="The PNG to write.")] = Path("heads.png"),
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Draw what every head does with the image: how much it depends on it, how much it attends to it, VHR's gains."""
    from mmefficient.models.reference.scenes import splits
    from mmefficient.profiles.heads import draw, measure
    from mmefficient.vlm import VLM

    quiet()
    _drawable(out)
    vlm = VLM.from_pretrained(model, device=device, dtype=dtype)
    asked: list[tuple[Any, str]] = [(_picture(image), question)] if image else []
    if not asked:
        found = splits.load("val", ["caption-counterfactual"], scenes)
        asked = [(each.image(), question) for each in found]
    _draw(draw(measure(vlm, asked), f"{model}: means over {len(asked)} prompt(s), {question!r}"), out)


@app.command(epilog="Examples:\n\nmmefficient env\n\nmmefficient env --json")
def env(as_json: AsJson = False) -> None:
    """Show versions and hardware, for bug reports."""
    from mmefficient.environment import collect

    facts = collect()
    if as_json:
        print(json.dumps(facts))
    else:
        from mmefficient.console import print_environment

        print_environment(facts)


def quiet() -> None:
    """Keep stderr for our own sentences."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    hub_logging.set_verbosity_error()
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _picture(image: str) -> str:
    if image != "sample":
        return image
    from mmefficient.models import reference

    return str(reference.sample_picture())


def _drawable(out: Path) -> None:
    """Refuse a place where nothing can be written before a model has worked for it."""
    if not out.parent.is_dir() or out.is_dir():
        raise InputError(f"{out} cannot be written: there is no such folder, or it is one; choose another --out.")


def _draw(drawing: Any, out: Path) -> None:
    try:
        drawing.save(out, format="PNG")
    except OSError as error:
        raise InputError(f"{out} cannot be written ({error.strerror}); choose another --out.") from error
    print(f"wrote {out}")


def _dtype_name(vlm: Any) -> str:
    return str(vlm.model.dtype).removeprefix("torch.")


def _as_dict(answer: Answer) -> dict[str, Any]:
    report = answer.report
    row = report.rows[0]
    return {
        "plan": report.plan,
        "answer": answer.text,
        "visual_tokens": {"total": row.visual_total, "kept_per_layer": list(row.kept_per_layer)},
        "stages_ms": {name: round(ms, 3) for name, ms in report.stages_ms.items()},
        "generated_tokens": report.generated_tokens,
        "prefill_flops": report.prefill_flops,
        "prefill_flops_without_plan": report.prefill_flops_without_plan,
    }


if __name__ == "__main__":
    main()
