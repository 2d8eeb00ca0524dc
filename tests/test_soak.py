"""A sample of the soak: some seconds of what `scripts/soak.py` runs for a minute, and what it must notice."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "scripts" / "soak.py"


def test_threads_and_processes_serve_good_and_bad_requests_without_a_wrong_answer_or_growth(
    built_artifact: Path,
) -> None:
    options = ["--processes", "2", "--threads", "8", "--seconds", "4", "--largest", "400"]
    options += ["--growth", "0.1"]  # in seconds, the allocator has hardly seen every size
    child = subprocess.run(
        [sys.executable, SCRIPT, built_artifact, *options], capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stdout + child.stderr
    summary = json.loads(child.stdout)
    assert summary["wrong"] == []
    assert summary["good"] > 100
    assert summary["bad"] > 100


@pytest.mark.parametrize("wrong", ["answer", "accepted", "error"])
def test_a_wrong_outcome_is_noticed(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    from soak import Trial, try_out

    from runtime_py import InvalidInputError

    def refuse() -> torch.Tensor:
        raise InvalidInputError("feature 'a' …")

    trial, text = {
        "answer": (Trial(lambda: torch.ones(1), -torch.ones(1)), "another answer than the reference's"),
        "accepted": (Trial(lambda: torch.ones(1), "feature 'b' "), "accepted, expected: feature 'b' "),
        "error": (Trial(refuse, "feature 'b' "), "unexpected error: feature 'a' …"),
    }[wrong]
    assert try_out(trial) == text
    assert try_out(Trial(refuse, "feature 'a' ")) is None
    assert try_out(Trial(lambda: torch.ones(1), torch.ones(1))) is None
