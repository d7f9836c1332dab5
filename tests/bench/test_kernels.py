from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mmefficient.bench.__main__ import app
from mmefficient.bench.kernels import lines
from mmefficient.errors import InputError


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs a CUDA GPU"):
        CliRunner().invoke(app, ["kernels", "--out", str(tmp_path)], catch_exceptions=False)
    assert not list(tmp_path.iterdir())


def test_a_failed_check_has_no_time() -> None:
    row = {"table": "pattern", "name": "a", "what": "ours", "floor_ms": 0.01}
    good, bad = lines([row | {"ms": 0.2, "graph_ms": 0.02}, row | {"failed": "AssertionError: wrong"}])
    assert good.split()[3:] == ["0.2000", "0.0200", "2.0x", "floor"]
    assert bad.split()[3:] == ["failed", "AssertionError:", "wrong"]
