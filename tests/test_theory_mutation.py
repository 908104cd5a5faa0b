"""A factor 2 planted in any constant or term of the theory makes a test fail: `tests/mutate_theory.py`, run whole under slow."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import mutate_theory as mt
import pytest

from hybridtheory.theory import convergence, step_sizes


def test_every_module_has_mutants_and_they_differ_from_the_original():
    for module in mt.MODULES:
        found = list(mt.mutants(module))
        assert len(found) >= 2
        assert {m.factor for m in found} == {0.5, 2.0}
        assert importlib.import_module(f"hybridtheory.theory.{module}")


def test_planting_changes_what_importers_see():
    """The hunt is only worth something if a plant reaches callers that imported the name before."""
    [mutant] = [m for m in mt.mutants("step_sizes") if m.text.startswith("d + q  in  d + q + 1") and m.factor == 2.0]
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        mt.plant(mutant)
        bound = convergence.theorem_a0(
            0.01, 0.1, 1.0, 1.0, 3, 1.0, 5
        )  # it imported curvature_per_gradient at its start
        os.write(write, f"{step_sizes.curvature_per_gradient(3)} {bound.weights[0]}".encode())
        os._exit(0)
    os.waitpid(pid, 0)
    factor, weight = map(float, os.read(read, 100).split())
    assert factor == 2 * 4 + 1
    assert weight == pytest.approx(0.01 * (2 - 0.01 * 9))
    assert step_sizes.curvature_per_gradient(3) == 5


@pytest.mark.slow
def test_no_planted_factor_two_survives():
    script = Path(__file__).with_name("mutate_theory.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=script.parent.parent)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
