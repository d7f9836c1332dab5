from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mmefficient.errors import InputError, ModelError, PlanError
from mmefficient.loading import load, resolve_device, resolve_dtype


def refused(name: str | Path) -> str:
    with pytest.raises(ModelError) as caught:
        load(name, device="cpu", dtype="auto", attn_implementation=None)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_checkpoint_loads_in_evaluation_mode_and_pads_on_the_left(checkpoint: Path) -> None:
    model, found = load(checkpoint, device="cpu", dtype="auto", attn_implementation="eager")
    assert not model.training
    assert model.device.type == "cpu"
    assert model.dtype == torch.float32
    assert model.config._attn_implementation == "eager"
    assert found.tokenizer.padding_side == "left"


def test_dtypes(checkpoint: Path) -> None:
    model, _ = load(checkpoint, device="cpu", dtype="bfloat16", attn_implementation=None)
    assert model.dtype == torch.bfloat16
    assert resolve_dtype(torch.float16, torch.device("cpu")) == torch.float16
    assert resolve_dtype("auto", torch.device("cuda"), model.config) == torch.bfloat16
    assert resolve_dtype("auto", torch.device("cpu"), model.config) == torch.float32
    for wrong in ("int8", "float33", "nn", torch.int64):
        with pytest.raises(InputError, match="not a dtype for weights"):
            resolve_dtype(wrong, torch.device("cpu"))


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    for wrong in ("gpu", "cuda", "cuda:1", "mps"):
        with pytest.raises(InputError, match="use"):
            resolve_device(wrong)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == torch.device("cuda")
    assert resolve_device("cuda:1") == torch.device("cuda:1")


def test_paths_that_are_not_models(tmp_path: Path, picture: Path) -> None:
    assert "There is no model at" in refused(tmp_path / "nowhere")
    assert "There is no model at" in refused("./nowhere")
    assert "There is no model at" in refused("nowhere")
    assert "is a file" in refused(picture)
    assert "no config.json" in refused(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "cannot be loaded" in refused(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "nothing-we-know"}')
    assert "cannot be loaded" in refused(tmp_path)


def test_a_language_model_has_no_vision_tower(tmp_path: Path) -> None:
    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    assert "without a vision tower" in refused(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "processor_config.json", "tokenizer.json"])
def test_incomplete_or_damaged_checkpoints(checkpoint: Path, tmp_path: Path, name: str) -> None:
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    (copy / name).write_bytes(b"\0" * 64)
    assert "cannot be loaded" in refused(copy)
    (copy / name).unlink()
    assert "copy" in refused(copy)


def test_a_checkpoint_without_its_processor_or_template(checkpoint: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    (copy / "chat_template.jinja").unlink()
    assert "no chat template" in refused(copy)
    for file in copy.glob("*processor_config.json"):
        file.unlink()
    assert "no image processor" in refused(copy) or "cannot be loaded" in refused(copy)


def test_the_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise OSError("We couldn't connect to 'https://huggingface.co'.\nSecond line.")

    monkeypatch.setattr("mmefficient.loading.AutoConfig.from_pretrained", offline)
    assert "couldn't connect" in refused("some/model")


def test_code_from_the_hub_is_never_run(checkpoint: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "evil.py").write_text("raise SystemExit('ran')\n")
    assert "cannot be loaded" in refused(copy)


def test_a_typo_does_not_wait_for_the_model() -> None:
    from mmefficient import VLM

    with pytest.raises(PlanError):
        VLM.from_pretrained("nowhere", plan="fastvv(keep=0.5)")
    with pytest.raises(PlanError, match="engine='grpah' is none of 'auto', 'graph', 'eager'"):
        VLM.from_pretrained("nowhere", engine="grpah")  # type: ignore[arg-type]


def test_the_reference_name_is_the_embedded_model(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    monkeypatch.setattr("mmefficient.models.reference.path", lambda: checkpoint)
    model, _ = load("reference", device="cpu", dtype="auto", attn_implementation=None)
    assert model.config.model_type == "llava"
