"""One running demo for all tests of the folder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from mmefficient.demo.app import Demo

pytest.importorskip("gradio", reason="the demo needs the extra 'demo'")


@pytest.fixture(scope="session")
def demo() -> Iterator[Demo]:
    from mmefficient.demo.app import serve

    running = serve(("reference",), device="cpu")
    yield running
    running.close()
