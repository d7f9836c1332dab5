from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from PIL import Image

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # must be set when Triton is first imported, which transformers does

from tests.tiny_checkpoint import save

torch.set_num_threads(1)  # tests run side by side


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random LLaVA with its processor, saved as a user's checkpoint would be."""
    return save(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PNG of 40 x 30 pixels."""
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    Image.linear_gradient("L").resize((40, 30)).convert("RGB").save(path)
    return path
