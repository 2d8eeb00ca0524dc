"""A small sample of scripts/bench/build_memory.py, which measures 256 MiB and 2 GiB."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench" / "build_memory.py"


@pytest.mark.slow
def test_memory_of_a_build_does_not_grow_with_the_table(tmp_path):
    command = [sys.executable, "-W", "ignore", SCRIPT, "--mib", "32", "384", "--kinds", "dcp", "--folder", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    small, large = [json.loads(line) for line in done.stdout.splitlines()][1:]
    print(small, large)
    assert large["anonymous_mib"] < 128
    assert large["anonymous_mib"] - small["anonymous_mib"] < 48
    assert large["vmhwm_mib"] < 300
