"""What ``examples/run_batch.sh`` hands to vLLM: ``pytest tests/core/test_run_batch_example.py``."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "run_batch.sh"
STAND_INS = {
    "lfm2": "echo /the/demo/model",
    "vllm": 'echo "$@" > called; cat "$3" > requests; touch "$5"',
    "python": "true",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the script runs; the programs that it calls are stand-ins."""
    (tmp_path / "bin").mkdir()
    for name, code in STAND_INS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{code}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


CASES = {
    "nothing": ([], "/the/demo/model", "batch_output.jsonl", ""),
    "a model": (["a/b"], "a/b", "batch_output.jsonl", ""),
    "only an output": (["", "x.jsonl"], "/the/demo/model", "x.jsonl", ""),
    "only options": (
        ["--enforce-eager"],
        "/the/demo/model",
        "batch_output.jsonl",
        "--enforce-eager",
    ),
    "all": (["a/b", "x.jsonl", "--seed", "3"], "a/b", "x.jsonl", "--seed 3"),
}


@pytest.mark.parametrize(("arguments", "model", "output", "more"), CASES.values(), ids=CASES)
def test_what_vllm_is_told(folder: Path, arguments: list[str], model: str, output: str, more: str):
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    subprocess.run([SCRIPT, *arguments], cwd=folder, env={**os.environ, "PATH": path}, check=True)
    called = (folder / "called").read_text().strip()
    assert (
        f"-o {output} --model {model} --max-model-len 2048 --max-num-seqs 8 {more}".strip()
        in called
    )
    assert called.endswith(more)
    requests = (folder / "requests").read_text().splitlines()
    assert len(requests) == 3
    assert all(f'"model": "{model}"' in line for line in requests)
