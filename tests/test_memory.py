"""What the process holds, and what its allocator keeps for the next call."""

from __future__ import annotations

import platform
import subprocess
import sys

SCRIPT = """
import psutil, torch
from hybridtheory import memory
cpu, MB = torch.device("cpu"), 1 << 20
memory.keep_freed()
rss = lambda: psutil.Process().memory_info().rss
before, start = memory.used(cpu), rss()
held = torch.ones(100 * MB)                      # 400 MB
assert memory.used(cpu) - before > 380 * MB, "what is held is counted"
beyond = torch.ones(MB)                          # so that the freed block is not the top of the heap
del held
kept = rss() - start > 350 * MB
assert memory.used(cpu) - before < 60 * MB, "what is kept for the next call is not"
memory.give_back()
left = (rss() - start) // MB

# Scattered free blocks: given back, they are neither in the resident set nor in use, and what is held is.
blocks = [torch.ones(2 * MB) for _ in range(120)]  # 8 MB each
del blocks[::2]
among = rss()
memory.make_room(100 * MB, cpu, limit=among + 50 * MB)
assert not kept or rss() < among - 400 * MB, "no room was made"
assert memory.used(cpu) - before > 380 * MB, "what is held counts, also after freed blocks were given back"
again = rss()
memory.make_room(100 * MB, cpu, limit=again + 200 * MB)
assert rss() >= again - MB, "nothing is given back where there is room"
print(int(kept), left)
"""


def test_freed_blocks_are_kept_not_counted_and_given_back() -> None:
    """In a process of its own: the allocator's settings are the process's."""
    found = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    kept, left = map(int, found.stdout.split())
    assert left < 100
    assert kept or platform.libc_ver()[0] != "glibc"  # other C libraries keep nothing, and nothing is promised for them
