"""Plant a factor 2, up or down, in every constant and every term of the theory, and see which plants no test notices.

    python tests/mutate_theory.py [--every K] [MODULE ...]

Tests are collected once; every mutant lives in a forked child whose functions get the mutated code in place (so names that other
modules imported change too) and which runs the tests, fastest first, until one fails. Survivors are printed; exit code 1.
Not mutated: zeros (2 · 0 = 0), indices and axes, tolerances (below 1e-5 or above 1e20), text, and what `SPARED` names.
"""

from __future__ import annotations

import ast
import functools
import gc
import importlib
import os
import signal
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# Module -> the test file that must notice (a survivor there is one, whatever other files would say).
MODULES = {
    **dict.fromkeys(("step_sizes", "stability", "generalized", "finite_scale", "recommend"), "step_sizes"),
    **dict.fromkeys(("moments", "moments_error", "moments_subspace"), "moments"),
    "one_step": "identities",
    **dict.fromkeys(("convergence", "references"), "convergence"),
    "cost": "cost",
}
# Constants that are no mathematics, by the text of the expression that holds them: (function, text) -> reason.
SPARED = {
    ("sign_mean", "-1"): "guard against rounding beyond the domain of arcsin",
    ("sign_mean", "np.clip(v / norm, -1, 1)"): "the same",
    ("stability_bracket", "1 + 1e-09"): "room for rounding",
    ("", "brentq(lambda v: v - math.exp(-v), 0.5, 0.6, xtol=1e-15)"): "ends of a root search",
    ("_least", "np.where(root != 0, root, 1.0)"): "stands in for a divisor whose quotient is not used",
    ("gradient_radius", "top / 2"): "how fast the search comes in, and its first guess of an end that brentq refines",
}
KEYWORDS = {"axis", "ddof", "rtol", "xtol", "size", "n_boot", "seed", "confidence", "keepdims"}


@dataclass(frozen=True)
class Mutant:
    """Site `number` of a module's constants and terms, times `factor`."""

    module: str
    number: int
    line: int
    text: str
    factor: float

    def __str__(self) -> str:
        return f"{self.module}.py:{self.line}: {self.text}  (x {self.factor:g})"


class Sites(ast.NodeVisitor):
    """Collects (parent, field, index, node) of every constant and every operand of + and - in functions and class bodies."""

    def __init__(self) -> None:
        self.found: list[tuple[ast.AST, str, int | None, ast.expr]] = []
        self.function = ""

    def generic_visit(self, node: ast.AST) -> None:
        if isinstance(node, ast.FunctionDef):
            outer, self.function = self.function, node.name
            for child in node.body:
                self.visit(child)
            self.function = outer
            return
        if isinstance(node, ast.JoinedStr | ast.Subscript | ast.Slice | ast.Raise | ast.AnnAssign):
            if isinstance(node, ast.AnnAssign) and node.value is not None and self.function:
                self._field(node, "value", None, node.value)
                self.visit(node.value)
            elif isinstance(node, ast.Subscript):
                self.visit(node.value)
            return
        if isinstance(node, ast.keyword) and node.arg in KEYWORDS:
            return
        for name, value in ast.iter_fields(node):
            for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if isinstance(child, ast.expr):
                    self._field(node, name, index, child)
                if isinstance(child, ast.AST):
                    self.visit(child)

    def _field(self, parent: ast.AST, name: str, index: int | None, child: ast.expr) -> None:
        if not self.function and isinstance(parent, ast.arguments | ast.ClassDef):
            return
        number = (
            isinstance(child, ast.Constant) and type(child.value) in (int, float) and 1e-5 < abs(child.value) < 1e20
        )
        term = isinstance(parent, ast.BinOp) and isinstance(parent.op, ast.Add | ast.Sub)
        if term and any(isinstance(n, ast.JoinedStr) for n in (parent.left, parent.right)):  # text
            return
        text = ast.unparse(parent) if isinstance(parent, ast.expr) else ast.unparse(child)
        if (number or (term and not isinstance(child, ast.Constant))) and (self.function, text) not in SPARED:
            self.found.append((parent, name, index, child))


@functools.cache
def source(module: str) -> str:
    """The module's text, read once: an edit while the hunt runs must not shift the sites."""
    return Path(importlib.import_module(f"hybridtheory.theory.{module}").__file__ or "").read_text()


def parse(module: str) -> tuple[ast.Module, Sites]:
    """The module's tree and its sites, in reading order."""
    tree = ast.parse(source(module))
    sites = Sites()
    sites.visit(tree)
    return tree, sites


def mutants(module: str) -> list[Mutant]:
    """Every mutant of one theory module."""
    return [
        Mutant(module, number, child.lineno, f"{ast.unparse(child)}  in  {ast.unparse(parent)[:90]}", factor)
        for number, (parent, _, _, child) in enumerate(parse(module)[1].found)
        for factor in (2.0, 0.5)
    ]


def mutated(mutant: Mutant) -> ast.Module:
    """The module's tree with the mutant in it."""
    tree, sites = parse(mutant.module)
    parent, name, index, child = sites.found[mutant.number]
    new: ast.expr
    if isinstance(child, ast.Constant):
        value = child.value * mutant.factor  # type: ignore[operator]
        # An int stays one where it can: q = 2.0 would be refused for its type and not for its value.
        new = ast.Constant(int(value) if value == int(value) and isinstance(child.value, int) else value)
    else:
        new = ast.BinOp(child, ast.Mult(), ast.Constant(mutant.factor))
    if index is None:
        setattr(parent, name, new)
    else:
        getattr(parent, name)[index] = new
    return ast.fix_missing_locations(tree)


def plant(mutant: Mutant) -> None:
    """Swap the code of every function and method of the module in place."""
    live = importlib.import_module(f"hybridtheory.theory.{mutant.module}")
    fresh: dict[str, object] = {"__name__": live.__name__, "__file__": live.__file__}
    # dataclasses look their module up by name; it is there, and it is the live one.
    exec(compile(mutated(mutant), live.__file__ or "", "exec"), fresh)
    for name, new in fresh.items():
        old = getattr(live, name, None)
        if (
            isinstance(new, types.FunctionType)
            and isinstance(old, types.FunctionType)
            and new.__module__ == live.__name__
        ):
            swap(old, new)
        elif isinstance(new, type) and isinstance(old, type) and new.__module__ == live.__name__:
            for key, method in vars(new).items():
                target = vars(old).get(key)
                method, target = (getattr(m, "fget", m) if isinstance(m, property) else m for m in (method, target))
                if isinstance(method, types.FunctionType) and isinstance(target, types.FunctionType):
                    swap(target, method)
        elif isinstance(new, int | float | dict) and not name.startswith("__"):
            setattr(live, name, new)


def swap(old: types.FunctionType, new: types.FunctionType) -> None:
    if old.__code__.co_freevars == new.__code__.co_freevars:
        old.__code__, old.__defaults__, old.__kwdefaults__ = new.__code__, new.__defaults__, new.__kwdefaults__


class Runner:
    """A pytest plugin: times every collected test once, then runs the mutants instead of reporting."""

    def __init__(self, modules: list[str], every: int) -> None:
        self.modules, self.every = modules, every
        self.survivors: list[Mutant] = []
        self.total = 0

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        from _pytest.runner import runtestprotocol

        timed = []
        for item in session.items:
            start = time.perf_counter()
            reports = runtestprotocol(item, log=False, nextitem=None)
            if any(r.failed for r in reports):
                raise RuntimeError(f"{item.nodeid} fails without any mutation: nothing can be learned")
            timed.append((time.perf_counter() - start, len(timed), item))
        fastest = [item for _, _, item in sorted(timed, key=lambda t: t[:2])]
        for module in self.modules:
            source(module)
        gc.freeze()  # children then share the parent's pages
        for module in self.modules:
            order = [item for item in fastest if item.path.name == f"test_theory_{MODULES[module]}.py"]
            for number, mutant in enumerate(mutants(module)):
                if number % self.every:
                    continue
                self.total += 1
                killer = self.fate(mutant, order, runtestprotocol)
                if killer is None:
                    self.survivors.append(mutant)
                    print(f"survived: {mutant}", flush=True)
                elif killer < len(order):
                    # What killed one mutant of a module kills most of its neighbours: try it first.
                    order.insert(0, order.pop(killer))
        return True

    @staticmethod
    def fate(mutant: Mutant, order: list[pytest.Item], run: Callable[..., list[pytest.TestReport]]) -> int | None:
        """Position of the first test that fails under the mutant (past the end: it broke the import or ran away), or None."""
        pid = os.fork()
        if pid == 0:
            signal.alarm(60)
            try:
                plant(mutant)
            except Exception:  # the module cannot even be imported: every test would notice
                os._exit(254)
            for number, item in enumerate(order):
                if any(r.failed for r in run(item, log=False, nextitem=None)):
                    os._exit(min(number, 253))
            os._exit(255)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return None if code == 255 else len(order) if code in (254, -signal.SIGALRM) else min(code, len(order) - 1)


def hunt(modules: list[str], every: int = 1) -> Runner:
    """Run the hunt; `every` takes one mutant in K."""
    runner = Runner(modules, every)
    files = sorted({str(HERE / f"test_theory_{MODULES[module]}.py") for module in modules})
    # No capture: children would each flush the parent's buffers.
    pytest.main(["-q", "-s", "-p", "no:cacheprovider", "-p", "no:xdist", *files], plugins=[runner])
    return runner


if __name__ == "__main__":
    every = int(sys.argv[sys.argv.index("--every") + 1]) if "--every" in sys.argv else 1
    chosen = [a for a in sys.argv[1:] if a in MODULES] or list(MODULES)
    result = hunt(chosen, every)
    print(f"{result.total} mutants, {len(result.survivors)} survived")
    sys.exit(bool(result.survivors) or not result.total)
