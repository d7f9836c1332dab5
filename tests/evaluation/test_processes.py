"""Two processes under `accelerate launch`, on the command line."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

LIMIT, BATCH = 24, 5
PLAN = "fastv(layer=1,keep=0.5)"
ARGUMENTS = ["eval", "--task", "scenes", "--plan", PLAN, "--limit", str(LIMIT), "--batch-size", str(BATCH)]
ARGUMENTS += ["--check-flips", "5"]
# accelerate's --cpu starts one process unless there is MPI; --multi_gpu starts as many as are asked for, on any device
LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
LAUNCH += ["--dynamo_backend", "no", "--mixed_precision", "no"]


def start(checkpoint: Path, out: Path, processes: int) -> subprocess.Popen[str]:
    launch = [*LAUNCH, "--main_process_port", str(random.randint(20000, 60000))] if processes > 1 else []
    command = [sys.executable, *launch, "-m", "mmefficient.cli", *ARGUMENTS, "--model", str(checkpoint)]
    return subprocess.Popen(
        [*command, "--out", str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors[-2000:]
    return output


def answers(folder: Path) -> dict[str, dict[str, Any]]:
    """By plan and question; a question that is answered twice fails."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        header, *lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        for line in lines:
            same = found.setdefault(header["plan"], {})
            assert line["id"] not in same, "a question was answered twice"
            same[line["id"]] = {name: line[name] for name in ("text", "truncated", "kept", "prefill_flops")}
    return found


def numbers(folder: Path) -> str:
    report = json.loads((folder / "report.json").read_text())
    kept = ("plan", "metrics", "paired", "against", "mcnemar", "visual_tokens", "questions", "flips")
    return json.dumps([{key: plan[key] for key in kept} for plan in report["plans"]])


@pytest.mark.timeout(600)
def test_two_processes_answer_like_one_also_after_a_kill(checkpoint: Path, tmp_path: Path) -> None:
    one, two, killed = (tmp_path / name for name in ("one", "two", "killed"))
    finish(start(checkpoint, one, 1))
    output = finish(start(checkpoint, two, 2))
    assert output.count("# scenes") == 1, "one process prints"
    assert len(list(two.glob("*.jsonl"))) == 2 * len(list(one.glob("*.jsonl")))
    assert answers(two) == answers(one)
    assert all(len(same) == LIMIT for same in answers(one).values())
    assert numbers(two) == numbers(one)

    process = start(checkpoint, killed, 2)
    while process.poll() is None and sum(map(len, answers(killed).values())) < 3 * BATCH:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    done = answers(killed)
    assert sum(map(len, done.values())) > 0
    if not (killed / "report.json").exists():
        finish(start(checkpoint, killed, 2))
    assert answers(killed) == answers(one)
    assert numbers(killed) == numbers(one)
