"""The heap: large blocks are mappings of their own, whatever was freed before."""

import subprocess
import sys

import pytest

PROGRAM = """
import sys, torch
from export.heap import fix_mapping_threshold

if sys.argv[1] == "fixed":
    assert fix_mapping_threshold()

def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) >> 10

for _ in range(3):
    torch.ones(4 << 20)  # 16 MiB: once freed, it is the limit where that may move
blocks, kept = [], []
for _ in range(100):
    blocks.append(torch.ones(1 << 18))  # 1 MiB
    kept.append(bytearray(2000))
before = resident()
blocks.clear()
print(before - resident())
"""


@pytest.mark.parametrize(("mode", "returned"), [("fixed", True), ("as it is", False)])
def test_blocks_that_are_freed_go_back_to_the_kernel(mode, returned):
    done = subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=True)
    assert (int(done.stdout) > 90) == returned
