from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from mmefficient import __version__, cli
from tests.tiny_checkpoint import LAYERS, VISUAL_TOKENS

PLAN = "fastv(layer=1,keep=4)"
ROOT = Path(__file__).parent.parent


class Result:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the command line in this process, as the console script does."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["mmefficient", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return call


@pytest.fixture
def ask(run: Any, checkpoint: Path, picture: Path) -> Any:
    def call(*options: object, image: object = picture, model: object = checkpoint) -> Result:
        result: Result = run("ask", image, "what is it?", "--model", model, "--max-new-tokens", 3, *options)
        return result

    return call


def test_a_plain_answer_is_the_answer_alone(ask: Any) -> None:
    result = ask()
    assert result.code == 0
    assert result.err == ""
    assert len(result.out.strip().splitlines()) == 1


def test_with_a_plan_the_kept_tokens_and_the_stages_are_shown(ask: Any) -> None:
    result = ask("--plan", PLAN)
    assert result.code == 0
    assert result.err == ""
    assert f"{PLAN}: {VISUAL_TOKENS} visual tokens; 16 in layer 0, 4 in layers 1-3" in result.out
    for stage in ("preprocess", "vision tower", "prefill", "decode", "total"):
        assert stage in result.out
    assert "no plan" not in result.out


def test_compare_shows_both(ask: Any) -> None:
    result = ask("--plan", PLAN, "--compare")
    assert result.code == 0
    assert "no plan: " in result.out
    assert "16 in layers 0-3; 100% of the prefill FLOPs" in result.out


def test_json_is_one_object(ask: Any, checkpoint: Path) -> None:
    plain = json.loads(ask("--json").out)
    assert plain["plan"] == "none"
    assert plain["model"] == str(checkpoint)
    assert plain["dtype"] == "float32"
    result = ask("--json", "--plan", PLAN, "--compare")
    found = json.loads(result.out)
    assert found["plan"] == PLAN
    assert found["visual_tokens"] == {"total": VISUAL_TOKENS, "kept_per_layer": [VISUAL_TOKENS] + [4] * (LAYERS - 1)}
    assert set(found["stages_ms"]) == {"preprocess", "vision", "prefill", "decode"}
    assert isinstance(found["answer"], str)
    assert found["generated_tokens"] == 3
    assert found["without_plan"]["answer"] == plain["answer"]
    assert result.err == ""


def test_the_bundled_picture(ask: Any) -> None:
    assert ask(image="sample").code == 0


BAD_PLANS = {
    "fastw(layer=1,keep=4)": "did you mean 'fastv'",
    "fastv(layer=1,kep=4)": "keep",
    "fastv(layer=1": "cannot read",
    "fastv(1,4)": "needs its name",
    "random(keep=0.0)": "keep=0.0",
    "random(keep=0)": "keep",
    "random(keep=1.5)": "keep=1.5",
    "random(keep=-1)": "keep",
    "random(keep=17)": "16 visual tokens",
    "exit(layer=4)": "out of range",
    "exit(layer=-1)": "layer",
    "fastv(layer=1,keep=__import__('os'))": "plain value",
}


@pytest.mark.parametrize("plan", BAD_PLANS)
def test_bad_plans(ask: Any, plan: str) -> None:
    refused(ask("--plan", plan), BAD_PLANS[plan])


def refused(result: Result, sentence: str) -> None:
    """Exit code 2, nothing on stdout, one line on stderr that says `sentence`."""
    assert result.code == 2, result.err
    assert result.out == ""
    assert len(result.err.strip().splitlines()) == 1
    assert result.err.startswith("mmefficient: ")
    assert sentence in result.err
    assert "Traceback" not in result.err


def test_bad_images(ask: Any, tmp_path: Path) -> None:
    refused(ask(image="nowhere.png"), "no image at 'nowhere.png'")
    refused(ask(image=""), "''")
    refused(ask(image=tmp_path), "is a folder")
    (tmp_path / "notes.txt").write_text("not a picture")
    refused(ask(image=tmp_path / "notes.txt"), "not an image")


def test_a_decompression_bomb(ask: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, picture: Path) -> None:
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 40 * 30 - 1)
    refused(ask(), "safety limit")
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 40 * 30 // 3)
    refused(ask(), "safety limit")


def test_bad_models(ask: Any, tmp_path: Path, picture: Path) -> None:
    refused(ask(model=tmp_path / "nowhere"), "no model at")
    refused(ask(model=picture), "is a file")
    refused(ask(model=tmp_path), "no config.json")
    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    refused(ask(model=tmp_path), "without a vision tower")


def test_other_bad_options(ask: Any, run: Any, picture: Path, checkpoint: Path) -> None:
    refused(ask("--device", "gpu"), "no device 'gpu'")
    refused(ask("--dtype", "int8"), "not a dtype")
    refused(ask("--compare"), "--plan")
    refused(run("ask", picture, "<image> what?", "--model", checkpoint), "Row 0")
    for usage in (("ask",), ("ask", picture), ("ask", picture, "a?", "--max-new-tokens", "0"), ("nonsense",)):
        result = run(*usage)
        assert result.code == 2
        assert "Traceback" not in result.err


def test_a_plan_that_cannot_be_read_is_refused_before_a_model_is_loaded(run: Any, picture: Path) -> None:
    plans = ("--plan", PLAN, "--plan", "fastw(keep=4)")
    refused(run("show", picture, "what?", *plans, "--model", "never loaded", "-o", "kept.png"), "did you mean 'fastv'")


@pytest.mark.parametrize("command", [("show", "what?", "--plan", PLAN), ("heads",)])
def test_a_place_that_cannot_be_drawn_to(run: Any, picture: Path, tmp_path: Path, command: tuple[str, ...]) -> None:
    name, *rest = command
    for out in (tmp_path / "nowhere" / "a.png", tmp_path):
        refused(run(name, picture, *rest, "--model", "never loaded", "-o", out), "cannot be written")


def test_unexpected_errors_keep_their_traceback(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a bug of ours")

    monkeypatch.setattr("mmefficient.vlm.VLM.ask", broken)
    with pytest.raises(ZeroDivisionError):
        ask()


def test_methods(run: Any) -> None:
    result = run("methods")
    assert result.code == 0
    for name in ("random", "grid", "pool", "fastv", "visionzip", "exit"):
        assert f"{name} (reducer): " in result.out
    found = {method["name"]: method for method in json.loads(run("methods", "--json").out)["methods"]}
    fields = {field["name"]: field for field in found["fastv"]["fields"]}
    assert fields["layer"] == {"name": "layer", "type": "int", "default": 2, "help": fields["layer"]["help"]}
    for method in found.values():
        assert method["paper"].startswith("https://")
        assert all(field["help"] for field in method["fields"])


def test_env(run: Any) -> None:
    shown = run("env")
    assert shown.code == 0
    assert "transformers" in shown.out
    assert json.loads(run("env", "--json").out)["mmefficient"] == __version__


def test_version_and_help(run: Any) -> None:
    assert run("--version").out == f"mmefficient {__version__}\n"
    for command in ((), ("ask",), ("methods",), ("eval",), ("env",), ("bench", "load")):
        result = run(*command, "--help")
        assert result.code == 0
        assert "Usage: mmefficient" in result.out


def test_the_examples_in_help_and_documentation_are_valid_commands(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every example parses and reaches its work; models and evaluation are replaced by stand-ins."""
    documents = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    seen: list[str] = []

    def stand_in(*arguments: object, **_: object) -> None:
        seen.append(str(arguments))
        raise cli.InputError("reached")

    monkeypatch.setattr("mmefficient.vlm.VLM.from_pretrained", stand_in)
    monkeypatch.setattr("mmefficient.evaluation.run_eval", stand_in)
    monkeypatch.setattr("mmefficient.bench.result.Target.open", stand_in)
    monkeypatch.setattr("mmefficient.bench.cli.need_gpu", stand_in)
    monkeypatch.setattr("mmefficient.images.load_image", lambda path: path)
    texts = [command.epilog or "" for command in cli.app.registered_commands]
    texts += [document.read_text() for document in documents]
    lines = [line for text in texts for line in text.replace("\\\n", " ").splitlines()]
    examples = [line for line in lines if line.startswith("mmefficient ") and line.split()[1] != "demo"]  # a server
    assert len(examples) >= 12
    for example in examples:
        result = run(*shlex.split(example, comments=True)[1:])
        assert result.code == 0 or result.err == "mmefficient: reached\n", example
    assert len(seen) >= 8


def test_eval_hands_everything_on(run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def record(*arguments: Any, **keywords: Any) -> dict[str, Any]:
        calls.append((arguments, keywords))
        return {"task": "scenes"}

    monkeypatch.setattr("mmefficient.evaluation.run_eval", record)
    monkeypatch.setattr("mmefficient.evaluation.markdown.markdown", lambda report: f"# {report['task']}")
    options = ("--limit", 3, "--kind", "count", "--out", tmp_path, "--batch-size", 4, "--check-flips", 2)
    options += ("--no-baselines", "--data", "somewhere", "--variant", "plain", "--skip-bad")
    result = run("eval", "--task", "scenes", "--plan", PLAN, "--plan", "exit(layer=2)", *options, "--dtype", "float32")
    assert result.out == "# scenes\n"
    (arguments, keywords) = calls[0]
    assert arguments == ("scenes", [PLAN, "exit(layer=2)"], "reference")
    assert keywords == {
        "limit": 3,
        "kinds": ["count"],
        "out": tmp_path,
        "data": "somewhere",
        "variant": "plain",
        "skip_bad": True,
        "batch_size": 4,
        "baselines": False,
        "check_flips": 2,
        "device": "auto",
        "dtype": "float32",
    }
    assert run("eval").code == 0
    assert calls[1][0] == ("scenes", [], "reference")


def test_the_console_script_never_shows_a_traceback(tmp_path: Path) -> None:
    command = [Path(sys.executable).parent / "mmefficient", "ask", "nowhere.png", "what?"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
    assert done.returncode == 2
    assert done.stderr == "mmefficient: There is no image at 'nowhere.png'; check the path.\n"
    assert done.stdout == ""
