"""Times of the kernels beside their peers and the hardware's floors, one row per case; needs a CUDA GPU.

    python -m mmefficient.bench kernels --out benchmarks/results --graph
    python -m mmefficient.bench kernels --out benchmarks/results --graph --tune --seconds 300

Every output is checked before it is timed; a case that fails its check prints the failure instead of a time. Times are
medians in milliseconds: of `triton.testing.do_bench` (events on the device, L2 cache cleared before every run, the
launches of the host included where they are slower than the device), and with --graph also of `do_bench_cudagraph`
(replayed CUDA graphs: no launches, but whatever fits the L2 cache is found there). Floors are what the bytes and
operations that a case cannot avoid take at rates measured in the same run. The JSON holds every number, versions and
the commit.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mmefficient.bench import floors
from mmefficient.bench import kernel_cases as cases
from mmefficient.bench.kernel_problem import Case
from mmefficient.environment import collect, command

Row = dict[str, Any]


def median_ms(run: Callable[[], Any]) -> float:
    """Median milliseconds of `run` on the device."""
    from triton.testing import do_bench

    return float(do_bench(run, warmup=15, rep=60, return_mode="median"))


def graph_ms(run: Callable[[], Any]) -> float:
    """Median milliseconds of `run` inside a replayed CUDA graph."""
    from triton.testing import do_bench_cudagraph

    return float(do_bench_cudagraph(run, rep=40, return_mode="median"))


def measure(case: Case, graph: bool = False) -> Row:
    """Check one case and time it; the row tells what failed, if anything did."""
    row: Row = {"table": case.table, "name": case.name, "what": case.what, **case.facts}
    try:
        if case.check is not None:
            row["error"] = case.check()
        row["ms"] = median_ms(case.run) if case.timer is None else case.timer(case.run)
        if graph and case.timer is None:
            row["graph_ms"] = graph_ms(case.run)
    except Exception as failure:
        row["failed"] = f"{type(failure).__name__}: {str(failure).strip()[:300]}"
        traceback.print_exc(limit=3)
        torch.cuda.synchronize()
    return row


def lines(rows: list[Row]) -> Iterator[str]:
    """The table as text, one line per row."""
    for row in rows:
        shown = f"{row['ms']:.4f}" if "ms" in row else "failed"
        graph = f"{row['graph_ms']:.4f}" if "graph_ms" in row else ""
        best = row.get("graph_ms", row.get("ms"))
        factor = f"{best / row['floor_ms']:6.1f}x floor" if best and row["floor_ms"] else ""
        reach = f"reach {row['reach']}" if "reach" in row else ""
        case = f"{row['table']:8} {row['name']:16} {row['what']:36}"
        yield f"{case} {shown:>8} {graph:>8} {factor} {reach} {row.get('failed', '')[:80]}"


def run(
    out: Path, only: list[str] | None = None, tune: bool = False, graph: bool = False, seconds: float = 1e9
) -> bool:
    """Make the table; writes `out`/kernels.json after every row, prints all rows last.

    Args:
        only: names of tables; None = all. tune: also other block sizes, warps, stages and schedules.
        graph: also time replayed CUDA graphs, as a second column.
        seconds: start no further case after this long.

    Returns:
        whether every case of ours was right and ran.
    """
    out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    rows: list[Row] = []
    ceiling = floors.measure(torch.device("cuda"), torch.bfloat16)
    report: Row = {"command": command(), "ceilings": asdict(ceiling), "environment": collect(), "rows": rows}
    for case in cases.every(only, tune):
        if time.monotonic() - start > seconds:
            report["stopped_before"] = f"{case.table} {case.name} {case.what}"
            (out / "kernels.json").write_text(json.dumps(report, indent=1) + "\n")
            break
        row = measure(case, graph)
        row["floor_ms"] = ceiling.floor_ms(row.get("flops", 0), row.get("bytes", 0))
        rows.append(row)
        (out / "kernels.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"{torch.cuda.get_device_name()}: {ceiling.bandwidth / 1e12:.2f} TB/s, {ceiling.flops / 1e12:.0f} TFLOP/s")
    print("\n".join(lines(rows)))
    return not any("failed" in row for row in rows if row["what"].startswith("ours"))
