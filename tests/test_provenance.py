"""Reports say which token carries on the features of which, through merges and later removals."""

from __future__ import annotations

import pytest
import torch

import mmefficient as mm
from mmefficient.models import reference


@pytest.fixture(scope="module")
def vlm() -> mm.VLM:
    return mm.VLM.from_pretrained("reference", device="cpu")


def into(vlm: mm.VLM, plan: str) -> tuple[torch.Tensor, mm.Report]:
    report = vlm.ask(reference.sample_picture(), "Is there a frog?", plan=plan, max_new_tokens=1).report
    return report.merged_into[0], report


def test_nothing_is_merged_without_a_merging_method(vlm: mm.VLM) -> None:
    for plan in ("none", "fastv(layer=2,keep=0.25)", "exit(layer=4)"):
        assert torch.equal(into(vlm, plan)[0], torch.arange(576))


def test_pooling_merges_blocks_of_neighbours(vlm: mm.VLM) -> None:
    found, report = into(vlm, "pool(keep=0.25)")
    row, col = report.places[0][:, 2], report.places[0][:, 3]
    block = row // 2 * 12 + col // 2
    assert torch.equal(block[found], block)
    assert torch.equal(found.unique(), report.kept(0, 0))
    assert torch.equal(found[report.kept(0, 0)], report.kept(0, 0))


def test_merges_are_followed_through_later_removals(vlm: mm.VLM) -> None:
    alone, _ = into(vlm, "visionzip(dominant=54,contextual=10)")
    found, report = into(vlm, "visionzip(dominant=54,contextual=10)+fastv(layer=2,keep=0.5)")
    assert torch.equal(found, alone)
    survivors = report.kept(0, 0)
    assert len(survivors) == 64
    assert torch.isin(found, survivors).all()  # every patch that did not stay was merged into one that did
    assert (found != torch.arange(576)).sum() == 576 - 64
