"""A small sample of scripts/bench/build_memory.py, which measures 256 MiB and 2 GiB."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench" / "build_memory.py"


def run(folder, *arguments):
    command = [sys.executable, "-W", "ignore", SCRIPT, "--folder", folder, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()][1:]


@pytest.mark.slow
def test_memory_of_a_build_does_not_grow_with_the_table(tmp_path):
    small, large = run(tmp_path, "--mib", "32", "384", "--kinds", "dcp")
    print(small, large)
    assert large["anonymous_mib"] < 128
    assert large["anonymous_mib"] - small["anonymous_mib"] < 48
    assert large["vmhwm_mib"] < 300


@pytest.mark.slow
def test_a_table_five_times_as_large_as_the_private_memory_that_the_kernel_allows_is_built(tmp_path):
    [result] = run(tmp_path, "--mib", "768", "--kinds", "sparse", "--limit-mib", "150")
    assert result["anonymous_mib"] < 150


@pytest.mark.slow
def test_the_limit_is_one_that_bites(tmp_path):
    with pytest.raises(subprocess.CalledProcessError) as failed:
        run(tmp_path, "--mib", "32", "--kinds", "sparse", "--limit-mib", "1")
    assert "the build from sparse of 32 MiB failed" in failed.value.stderr
