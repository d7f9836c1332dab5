from __future__ import annotations

import torch

from mmefficient.bench import reuse
from mmefficient.bench.visual_rows import geometry


def test_the_table_on_a_small_geometry() -> None:
    config = geometry(layers=2, width=64, inner=96, heads=4)
    config.vision_config.num_hidden_layers = 2
    config.vision_config.image_size, config.image_seq_length = 56, 16
    plans = ["none", "composite", "saisa"]
    result = reuse.run(plans, [1, 2], repeats=1, batch=2, config=config, device="cpu", dtype=torch.float32)
    assert [(row["visual"], row["plan"], row["way"]) for row in result["rows"]] == [
        (visual, plan, way)
        for visual in (16, 32)
        for plan, way in (("none", "default"), *((plan, "reused") for plan in plans))
    ]
    assert all(row["gap"] < 1e-4 for row in result["rows"] if row["way"] == "reused")
    assert reuse.table(result).count("\n") == 9
