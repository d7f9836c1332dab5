"""How long a visitor waits: ``python -m mmefficient.demo.first_answer``.

Starts the demo on two CPU cores, asks about the sample picture through the page's endpoint right after start-up,
and prints the seconds until the first piece of an answer, until both plans have answered and been measured, the same
for a second question, and what the process holds after more of them, as JSON.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

CORES, MORE, STEP = 2, 60, 10
QUESTION = "Is there a frog in the image?"


def _resident_mib() -> float:
    """Resident memory of this process (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    from gradio_client import Client, handle_file

    from mmefficient.demo.app import serve
    from mmefficient.environment import collect
    from mmefficient.models import reference

    began = time.perf_counter()
    demo = serve(("reference",), device="cpu")
    client = Client(demo.address, verbose=False)
    found: dict[str, Any] = {"start_up_s": round(time.perf_counter() - began, 2)}
    for name in ("first_question", "second_question"):
        began, first = time.perf_counter(), 0.0
        picture = handle_file(str(reference.sample_picture()))
        job = client.submit("reference", picture, QUESTION, "none", "fastv(layer=2,keep=0.25)", api_name="/ask")
        for piece in job:
            if piece[0] and not first:
                first = time.perf_counter() - began
        job.result()
        found[f"{name}_first_piece_s"] = round(first, 2)
        found[f"{name}_all_measured_s"] = round(time.perf_counter() - began, 2)
    resident = {0: round(_resident_mib())}
    for count in range(1, MORE + 1):
        client.predict("reference", picture, QUESTION, "none", "fastv(layer=2,keep=0.25)", api_name="/ask")
        if count % STEP == 0:
            resident[count] = round(_resident_mib())
    found["resident_mib_after_more_questions"] = resident
    demo.close()
    print(json.dumps({"cores": CORES, **found, "environment": collect()}, indent=1))


if __name__ == "__main__":
    main()
