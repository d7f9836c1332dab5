from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from mmefficient.kernels.compact import reference as compact_reference
from mmefficient.kernels.decode_attention import reference as decode_reference
from mmefficient.kernels.decode_linear import reference as linear_reference
from mmefficient.kernels.drop_alike import reference as drop_reference
from mmefficient.kernels.greedy_select import reference as greedy_reference
from mmefficient.kernels.group_mix import reference as mix_reference
from mmefficient.kernels.grouped_attention import reference as grouped_reference
from mmefficient.kernels.key_scores import reference as scores_reference
from mmefficient.kernels.least_heads import reference as least_reference
from mmefficient.kernels.rms_norm import reference as norm_reference
from mmefficient.kernels.rope_store import reference as rope_reference
from mmefficient.kernels.swiglu import reference as swiglu_reference

REFERENCES = {
    grouped_reference: "grouped_attention",
    decode_reference: "decode_attention",
    scores_reference: "key_scores",
    compact_reference: "gather_rows",
    greedy_reference: "greedy_select",
    drop_reference: "drop_alike",
    linear_reference: "decode_linear",
    norm_reference: "rms_norm",
    rope_reference: "rope_store",
    swiglu_reference: "swiglu",
    mix_reference: "group_mix",
    least_reference: "least_heads",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Call an operation with impl="triton" where the references raise and fresh memory is full of NaN."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the reference ran")

    def poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def wrapped(*args: Any, **kwargs: Any) -> torch.Tensor:
            found = make(*args, **kwargs)
            return found.fill_(float("nan")) if found.is_floating_point() else found

        return wrapped

    def call(operation: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with monkeypatch.context() as patch:
            for module, name in REFERENCES.items():
                patch.setattr(module, name, refuse)
            for name in ("empty", "empty_like"):
                patch.setattr(torch, name, poisoned(getattr(torch, name)))
            return operation(*args, **kwargs, impl="triton")

    return call
