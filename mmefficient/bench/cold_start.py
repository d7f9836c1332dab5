"""What one `mmefficient ask` costs from an empty process: seconds and memory, start-up and loading included.

    python -m mmefficient.bench.cold_start
    python -m mmefficient.bench.cold_start --repeats 5 -- picture.png "What is it?" --model llava-hf/llava-1.5-7b-hf

The process is confined to two CPU cores and sees no GPU. Each repeat is a new process; the first one also pays for
files that are not yet in the page cache. Memory is the peak resident set of the process (Linux).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from typing import Any

from mmefficient.environment import collect

CORES = 2
DEFAULT = ("sample", "Describe the image.", "--plan", "fastv(layer=2,keep=0.25)")


def measure(arguments: tuple[str, ...]) -> dict[str, float]:
    """Run `mmefficient ask` once; wall seconds and peak resident GiB.

    Raises:
        subprocess.CalledProcessError: the command failed.
    """
    command = [sys.executable, "-m", "mmefficient.cli", "ask", *arguments]
    start = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(CORES)},
        preexec_fn=lambda: os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES]),
    )
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return {"seconds": round(seconds, 2), "peak_gib": round(usage.ru_maxrss / 2**20, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("arguments", nargs="*", help="for `mmefficient ask`; the bundled picture if nothing is given")
    options = parser.parse_args()
    arguments = tuple(options.arguments) or DEFAULT
    runs = [measure(arguments) for _ in range(options.repeats)]
    found: dict[str, Any] = {"command": ["mmefficient", "ask", *arguments], "cores": CORES, "runs": runs}
    print(json.dumps({**found, "environment": collect()}, indent=1))


if __name__ == "__main__":
    main()
