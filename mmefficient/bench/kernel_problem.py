"""What a case of the kernel table is, and the prompts that most of them share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from mmefficient.kernels.accuracy import require
from mmefficient.kernels.grouped_attention import Layout, Pattern, make_layout, mix, reference

SYSTEM, QUESTION, D = 35, 64, 128


@dataclass
class Case:
    """One timed call. `check` raises AssertionError or returns the error; `facts` go into the row as they are."""

    table: str
    name: str
    what: str
    run: Callable[[], Any]
    check: Callable[[], float] | None = None
    timer: Callable[[Callable[[], Any]], float] | None = None
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class Problem:
    """A prompt of system text, N visual tokens and a question, with random q, k and v in bf16."""

    batch: int
    heads: int
    kv_heads: int
    visual: int
    width: int = 24

    def __post_init__(self) -> None:
        generator = torch.Generator("cuda").manual_seed(0)
        self.keys = SYSTEM + self.visual + QUESTION
        role = torch.full((self.batch, self.keys), 4, device="cuda", dtype=torch.int32)
        role[:, :SYSTEM], role[:, SYSTEM : SYSTEM + self.visual] = 1, 2
        place = torch.arange(self.keys, device="cuda", dtype=torch.int32) - SYSTEM
        place = place.where((place >= 0) & (place < self.visual), -1).expand(self.batch, -1)
        self.facts: dict[str, Any] = {
            "role": role,
            "page": torch.where(role == 2, 0, -1).int(),
            "row": place // self.width,
            "col": place % self.width,
            "group": (role == 2).int(),
        }

        def random(heads: int) -> torch.Tensor:
            shape = (self.batch, heads, self.keys, D)
            return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)

        self.q, self.k, self.v = random(self.heads), random(self.kv_heads), random(self.kv_heads)

    def layout(self, pattern: Pattern, **options: Any) -> Layout:
        return make_layout(**self.facts, groups=2, pattern=pattern, **options)

    def bytes(self) -> int:
        """Each of q, k, v read once and the output written once."""
        return 2 * self.q.nbytes + self.k.nbytes + self.v.nbytes

    def check(self, pattern: Pattern, run: Callable[[], Any], **options: torch.Tensor | bool) -> float:
        """Compare some rows of every kind, in every batch row and head of the last key head, with the definition.

        `options` are those of the call; partial results are mixed, a log-sum-exp is left out.
        """
        out = run()
        out = mix(*out) if "partials" in options else out[0] if "lse" in options else out
        if not out.isfinite().all():
            raise AssertionError("the output holds NaN or infinity.")
        some = torch.cat([torch.arange(0, SYSTEM), SYSTEM + torch.arange(0, self.visual, max(self.visual // 60, 1))])
        some = torch.cat([some, torch.arange(self.keys - QUESTION, self.keys)]).to("cuda")
        rows = self.layout(pattern, queries=some.expand(self.batch, -1), impl="reference")
        repeat = self.heads // self.kv_heads
        q, k, v, mine = self.q[:, -repeat:, some], self.k[:, -1:], self.v[:, -1:], out[:, -repeat:, some]
        bias, maps = options.get("bias"), options.get("logit_map")
        bias = bias[:, -repeat:] if torch.is_tensor(bias) else None
        maps = maps[:, :, -repeat:] if torch.is_tensor(maps) else None
        eager, _ = reference.grouped_attention(q, k, v, rows, bias, maps, None, D**-0.5, False)
        exact, _ = reference.grouped_attention(
            q.double(), k.double(), v.double(), rows, bias, maps, None, D**-0.5, False
        )
        return require(mine, eager, exact)

    def check_gradients(self, pattern: Pattern, found: tuple[torch.Tensor, ...], sent: torch.Tensor) -> float:
        """Compare gradients of q, k and v, in the last head, with those of the definition; every head has its key head.

        `sent`: the gradient that arrived at the output.
        """
        layout = self.layout(pattern, impl="reference")

        def gradients(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
            q, k, v = (t[:, -1:].detach().to(dtype).requires_grad_() for t in (self.q, self.k, self.v))
            out, _ = reference.grouped_attention(q, k, v, layout, None, None, None, D**-0.5, False)
            return torch.autograd.grad(out, (q, k, v), sent[:, -1:].to(dtype))

        both = zip(found, gradients(self.q.dtype), gradients(torch.float64), strict=True)
        return max(require(mine[:, -1:], eager, exact, "gradient") for mine, eager, exact in both)
