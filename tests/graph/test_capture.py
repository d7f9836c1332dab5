"""What recording does with tensors that are made on the host; `meta` stands for a GPU."""

from __future__ import annotations

import pytest
import torch

from mmefficient.graph.capture import Constants, OneDevice
from tests import tiny

META = torch.device("meta")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_encoders_run_with_sizes_on_the_host(family: str) -> None:
    model = tiny.build(family).to(META)
    batch = tiny.collate(family, tiny.ragged_prompts(family))
    names = ("pixel_values", "image_sizes", "image_grid_thw")
    given = {name: x.to(META) if x.is_floating_point() else x for name, x in batch.items() if name in names}
    constants = Constants()

    def body() -> list[tuple[int, ...]]:
        with torch.no_grad(), OneDevice(META):
            features = model.base_model.get_image_features(**given).pooler_output
        assert {each.device for each in features} == {META}
        return [tuple(each.shape) for each in features]

    with constants:
        shapes = body()
    made = len(constants.kept)
    with constants.again():
        assert body() == shapes
    assert len(constants.kept) == made


def test_host_tensors_are_brought_to_the_others_once() -> None:
    index, rows = torch.tensor([2, 0]), torch.empty(3, 4, device=META)
    with pytest.raises(RuntimeError):
        index.float()[:, None] * rows[:2]
    constants = Constants()

    def body() -> torch.Tensor:
        with OneDevice(META):
            return rows[index] + index.float()[:, None]

    with constants:
        assert body().device == META
    kept = list(constants.kept)
    assert len(kept) == 2
    with constants.again():
        body()
    assert all(a is b for a, b in zip(constants.kept, kept, strict=True))
