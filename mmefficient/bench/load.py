"""One process under load: mixed requests at a fixed concurrency, answers compared with those given alone.

    mmefficient bench load --model reference --plan "fastv(layer=2,keep=0.25)" --requests 1000 --concurrency 8

Requests differ in question length, picture size and plan, and one in fifty carries a damaged picture. First every kind
of request is answered alone; these answers, once the engine has settled, are what the answers under load must equal. A
damaged picture must be refused with the sentence for it. Memory is looked at ten times and must not grow after the
first fifth of the requests.
"""

from __future__ import annotations

import gc
import io
import itertools
import random
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmefficient.bench.measure import Row, spread
from mmefficient.bench.preprocess import photo
from mmefficient.bench.result import Target, header, note
from mmefficient.bench.tables import cell, markdown
from mmefficient.errors import InputError
from mmefficient.plan import Plan
from mmefficient.vlm import VLM

SIZES = ((336, 336), (320, 240), (640, 480), (480, 800), (1280, 960))
QUESTION = "what is in the picture how many are there left right above below a and colour of it where"
CORRUPT = 50
"""One request in so many has a damaged picture."""
ALONE = 3
"""Times a kind of request is asked alone; the last answer counts. An engine may capture in the second."""
GROWTH = {"host": 64 * 2**20, "device": 16 * 2**20}
"""Bytes that memory may grow by after the warm-up: what allocators keep, not what a leak adds up to."""


@dataclass(frozen=True)
class Request:
    """A picture as JPEG, a question, a plan, and whether the picture is damaged."""

    picture: bytes
    question: str
    plan: str
    corrupt: bool = False


def catalogue(plans: Sequence[str], kinds: int, seed: int = 0) -> list[Request]:
    """`kinds` different good requests; plans and sizes come in turn, the length of the question is random."""
    draw = random.Random(seed)
    found = []
    for number in range(kinds):
        file = io.BytesIO()
        photo(SIZES[number % len(SIZES)], seed=number).save(file, format="JPEG")
        question = " ".join(draw.choices(QUESTION.split(), k=draw.randint(1, 60)))
        found.append(Request(file.getvalue(), question, plans[number % len(plans)]))
    return found


def run(
    target: Target,
    plans: Sequence[str] = (),
    *,
    requests: int = 1000,
    concurrency: int = 8,
    kinds: int = 30,
    new_tokens: int = 8,
) -> dict[str, Any]:
    """Send `requests` from `concurrency` threads, each waiting for its answer before it sends the next."""
    every = ["none", *(str(Plan(text)) for text in plans)]
    vlm = VLM(target.model, target.processor)
    good = catalogue(every, kinds)
    options: dict[str, Any] = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}

    def ask(request: Request) -> str:
        return vlm.ask(request.picture, request.question, plan=request.plan, **options).text

    alone = {request: [ask(request) for _ in range(ALONE)][-1] for request in good}
    note(f"asked {len(good)} kinds of request alone")
    draw = random.Random(1)
    queue = []
    for number in range(requests):
        request = draw.choice(good)
        broken = number % CORRUPT == CORRUPT // 2
        queue.append(
            Request(request.picture[: len(request.picture) // 3], *_rest(request), True) if broken else request
        )
    seen: list[tuple[Request, str, float]] = []
    memory = [_memory(target.model)]
    counter, lock = itertools.count(), threading.Lock()

    def serve() -> None:
        while (number := next(counter)) < requests:
            start = time.perf_counter()
            outcome = _outcome(ask, queue[number], alone)
            with lock:
                seen.append((queue[number], outcome, (time.perf_counter() - start) * 1e3))
                if len(seen) % max(1, requests // 10) == 0:
                    memory.append(_memory(target.model))

    start = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as pool:
        for worker in [pool.submit(serve) for _ in range(concurrency)]:
            worker.result()
    seconds = time.perf_counter() - start
    outcomes = {
        kind: sum(found == kind for _, found, _ in seen) for kind in dict.fromkeys(found for _, found, _ in seen)
    }
    settled = memory[len(memory) // 5 :]
    growth = {name: settled[-1][name] - settled[0][name] for name in GROWTH}
    rows: list[Row] = [
        {"plan": plan, "requests": len(ms), "ms": spread(ms) | {"p99": sorted(ms)[int(0.99 * len(ms))]}}
        for plan in ["all", *every]
        if (ms := [m for request, _, m in seen if plan == "all" or (request.plan == plan and not request.corrupt)])
    ]
    problems = [f"{count} requests: {kind}" for kind, count in outcomes.items() if kind not in ("as alone", "refused")]
    problems += [
        f"{name} memory grew by {growth[name] / 2**20:.0f} MiB" for name in GROWTH if growth[name] > GROWTH[name]
    ]
    if problems:
        rows[0]["failed"] = "; ".join(problems)
    shown: dict[str, Any] = {"requests": requests, "concurrency": concurrency, "kinds": kinds, "new_tokens": new_tokens}
    shown |= {"seconds": seconds, "outcomes": outcomes, "memory": memory, "growth_bytes": growth}
    return {**header("load", target), **shown, "rows": rows}


def _rest(request: Request) -> tuple[str, str]:
    return request.question, request.plan


def _outcome(ask: Any, request: Request, alone: dict[Request, str]) -> str:
    """What became of a request, in a word; everything but "as alone" and "refused" is wrong."""
    try:
        text = ask(request)
    except InputError as error:
        return "refused" if request.corrupt else f"refused although it is good ({error})"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if request.corrupt:
        return "answered although its picture is damaged"
    return "as alone" if text == alone[request] else "answered differently from alone"


def _memory(model: Any) -> dict[str, int]:
    """Bytes: resident set of this process (0 where the system does not say), and allocated on the model's device."""
    gc.collect()
    status = Path("/proc/self/statm")
    host = int(status.read_text().split()[1]) * 4096 if status.exists() else 0
    device = torch.cuda.memory_allocated(model.device) if model.device.type == "cuda" else 0
    return {"host": host, "device": device}


def tables(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = [
        [f"`{row['plan']}`", row["requests"], *(cell(row["ms"][name]) for name in ("median", "p90", "p99"))]
        for row in result["rows"]
    ]
    outcomes = ", ".join(f"{count} {kind}" for kind, count in result["outcomes"].items())
    growth = ", ".join(f"{name} {value / 2**20:+.1f} MiB" for name, value in result["growth_bytes"].items())
    rate = result["requests"] / result["seconds"]
    facts = f"{result['requests']} requests, {result['concurrency']} at a time: {outcomes}; {rate:.1f} requests/s; "
    titles = ["plan", "requests", "p50 ms", "p90 ms", "p99 ms"]
    return f"{facts}memory after warm-up: {growth}.\n\n{markdown(titles, lines)}"
