"""Random layouts: any roles, places, groups, rows and pattern."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmefficient.kernels.grouped_attention import Pattern, grouped_attention, make_layout, mix
from mmefficient.kernels.grouped_attention.layout import Layout
from tests.kernels.prompts import options, qkv

sets = st.lists(st.integers(0, 15).map(lambda bits: 2 * bits), min_size=5, max_size=5).map(tuple)
patterns = st.builds(Pattern, earlier=sets, anywhere=sets, near=sets, radius=st.sampled_from([-1, 0, 1, 1 << 30]))


@st.composite
def layouts(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of make_layout, for 2 heads."""
    batch, length = draw(st.integers(1, 2)), draw(st.integers(1, 40))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def facts(low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high, (batch, length), generator=random)

    made: dict[str, Any] = {"role": facts(0, 5), "page": facts(-1, 2), "row": facts(0, 4), "col": facts(0, 4)}
    made |= {"group": facts(0, 3), "groups": 3, "pattern": draw(patterns)}
    if draw(st.booleans()):
        made |= {"pattern": [made["pattern"], draw(patterns)], "head_pattern": torch.tensor([1, 0])}
    if draw(st.booleans()):
        made["queries"] = facts(-1, length).sort(1).values[:, : draw(st.integers(1, length))]
    if draw(st.booleans()):
        rows = made["queries"].shape[1] if "queries" in made else length
        made["mask"] = torch.rand(batch, rows, length, generator=random) < 0.7
    return made


def on(device: torch.device, made: dict[str, Any], impl: Any) -> Layout:
    moved = {name: value.to(device) if torch.is_tensor(value) else value for name, value in made.items()}
    return make_layout(**moved, blocks=(16, 16), impl=impl)


@settings(max_examples=60, deadline=None)
@given(made=layouts())
def test_partials_are_a_split_of_plain_attention(device: torch.device, made: dict[str, Any]) -> None:
    layout = on(device, made, "reference")
    tensors = qkv(layout, 2, 1, 16, torch.float32)
    given_too = options(layout, 2)
    plain, lse = grouped_attention(*tensors, layout, **given_too, lse=True, impl="reference")
    parts = grouped_attention(*tensors, layout, **given_too, partials=True, impl="reference")
    torch.testing.assert_close(mix(*parts), plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(parts[1].logsumexp(0), lse, atol=1e-5, rtol=1e-5)
    assert (plain[~lse.isfinite()] == 0).all()


@settings(max_examples=8, deadline=None)
@given(made=layouts())
def test_kernel(device: torch.device, made: dict[str, Any]) -> None:
    layout = on(device, made, "triton")
    tensors = qkv(layout, 2, 1, 16, torch.float32)
    found = grouped_attention(*tensors, layout, lse=True, impl="triton")
    wanted = grouped_attention(*tensors, layout, lse=True, impl="reference")
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    whole = on(device, made, "reference").visible()
    assert torch.equal(layout.visible(), whole)
