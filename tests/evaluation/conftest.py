"""A small task of three kinds and a tiny random checkpoint to ask it of."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from mmefficient.evaluation.metrics.accuracy import accuracy
from mmefficient.evaluation.metrics.chair import Lexicon, chair
from mmefficient.evaluation.metrics.pope import pope
from mmefficient.evaluation.task import Kind, Record, Task
from mmefficient.vlm import VLM
from tests.tiny_checkpoint import save

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> VLM:
    """A random LLaVA with weights large enough for answers that depend on the picture and the question."""
    vlm = VLM.from_pretrained(save(tmp_path_factory.mktemp("checkpoint")), device="cpu", dtype="float32")
    with torch.no_grad():
        for parameter in vlm.model.parameters():
            if parameter.ndim > 1:
                parameter *= 12
    return vlm


def _records(kinds: Sequence[str] | None, limit: int | None) -> list[Record]:
    records = []
    for i in range(7):
        question = "Is there a dog?" if i % 2 else "Is there a very big hot dog in this picture?"
        records.append(Record(f"e{i}", "existence", question, f"p{i // 2}", ("yes" if i % 2 else "no",)))
        records.append(Record(f"c{i}", "colour", "Which colour?", f"p{i}", ("red", "dark red")))
        records.append(Record(f"d{i}", "caption", "Describe the image.", f"p{i}", ("dog", "hot dog")))
    return [
        record
        for kind in kinds or ("existence", "colour", "caption")
        for record in [record for record in records if record.kind == kind][:limit]
    ]


def _pictures(records: Sequence[Record], device: torch.device) -> torch.Tensor:
    def one(record: Record) -> torch.Tensor:
        seed = torch.Generator().manual_seed(int(record.picture[1:]))
        return torch.randint(0, 256, (3, 28, 28), generator=seed, dtype=torch.uint8)

    return torch.stack([one(record) for record in records]).to(device)


@pytest.fixture
def task() -> Task:
    """Seven questions of each kind; the existence questions share pictures."""
    return Task(
        name="fake",
        kinds={
            "existence": Kind(2, pope),
            "colour": Kind(3, accuracy),
            "caption": Kind(12, chair(Lexicon({"dog": ("dogs",), "hot dog": ("hot dogs",)}))),
        },
        records=_records,
        pictures=_pictures,
        groups={"mean": ("existence", "colour")},
    )
