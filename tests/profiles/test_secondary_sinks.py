"""The detector of secondary sinks, on states made for it and on a model's own."""

from __future__ import annotations

import pytest
import torch

from mmefficient.profiles.secondary_sinks import detect, label, measure, states
from tests import tiny

L = 32


def made() -> torch.Tensor:
    """Token 1 is large after layers 2 to 29; tokens 5 and 7 point along it for 20 and 8 layers, 9 for 3."""
    torch.manual_seed(0)
    found = torch.randn(L, 12, 64)
    axis = torch.nn.functional.normalize(torch.randn(64), dim=0)
    found[2:30, 1] += 200 * axis
    found[3:23, 5] += 60 * axis
    found[12:20, 7] -= 60 * axis
    found[14:17, 9] += 60 * axis
    found[30:, 4] = found[30:, 1]  # alike after the primary sink is gone: none
    return found


def test_detection() -> None:
    sinks = detect(made())
    assert sinks.primary == 1
    assert sinks.window == (2, 29)
    assert sinks.flags[:, 5].nonzero()[:, 0].tolist() == list(range(3, 23))
    assert sinks.lifetime.nonzero()[:, 0].tolist() == [5, 7, 9]
    assert [sinks.label(token) for token in (5, 7, 9, 4, 1)] == ["primary", "secondary", "noise", None, None]


@pytest.mark.parametrize(
    ("lifetime", "layers", "kind"),
    [(4, 32, "noise"), (5, 32, "secondary"), (16, 32, "secondary"), (17, 32, "primary"), (24, 40, "secondary"),
     (25, 40, "primary"), (0, 32, None), (1, 12, "noise"), (2, 12, "secondary"), (7, 12, "primary")],
)  # fmt: skip
def test_labels(lifetime: int, layers: int, kind: str | None) -> None:
    assert label(lifetime, layers) == kind


def test_states_are_the_residual_stream() -> None:
    model, batch = tiny.build("llava"), tiny.collate("llava", [tiny.prompt("llava", 1, 3, 6)])
    found = states(model, batch)
    hidden = model(**batch, output_hidden_states=True).hidden_states
    assert torch.equal(found[:-1], torch.cat(hidden[1:-1]).float())
    facts = measure(model, [batch], tiny.IMAGE)
    assert facts["per_prompt"].keys() == {"before", "image", "after"}
    assert len(facts["windows"]) == 1
