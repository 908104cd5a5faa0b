"""First-order special cases against PEPit's exact worst cases: a bound of ours may be loose, it must not be wrong.

PEPit solves for the worst function of a class (Taylor, Hendrickx & Glineur); agreement is to the accuracy of its solver, 1e-5.
"""

import math

import pytest

from hybridtheory.theory import convergence as cv
from hybridtheory.theory import references as rf

PEPit = pytest.importorskip("PEPit")
functions = pytest.importorskip("PEPit.functions")
L = 2.0


def descend(problem, kind, eta, T):
    """T steps of gradient descent: the function, first point, all gradients, last point."""
    f = problem.declare_function(kind, L=L)
    start = x = problem.set_initial_point()
    gradients = []
    for _ in range(T):
        gradients.append(f.gradient(x))
        x = x - eta * gradients[-1]
    return f, start, gradients, x


@pytest.mark.parametrize("share", [0.3, 1.0, 1.5])
@pytest.mark.parametrize("T", [1, 3])
def test_theorem_a0_is_the_exact_worst_case_of_gradient_descent(share, T):
    """max of the mean ‖g‖² given f(w_0) - f(w_T) <= 1: A0 with the ZO block frozen, without slack."""
    problem, eta = PEPit.PEP(), share / L
    f, start, gradients, end = descend(problem, functions.SmoothFunction, eta, T)
    problem.set_initial_condition(f(start) - f(end) <= 1)
    problem.set_performance_metric(sum(g**2 for g in gradients) / T)
    worst = problem.solve(verbose=0)
    bound = cv.theorem_a0(0.0, eta, 1.0, L, 0.0, 1.0, T)
    ours = bound.value / bound.weights[1]
    if share <= 1:
        assert worst == pytest.approx(ours, rel=1e-4)
    else:  # beyond 1/L the worst functions of successive steps do not fit together
        assert worst <= ours * (1 + 1e-4)
        assert worst >= (1 if T == 1 else 0.3) * ours * (1 - 1e-4)
    if share == 1.0:
        for other in (rf.sgd(eta, L, 1.0, T), rf.li_nonconvex(lambda u: L, eta, 1.0, T).bound):
            assert worst == pytest.approx(other.value, rel=1e-4)


def test_gradient_radius_is_the_exact_worst_case():
    problem = PEPit.PEP()
    f, start, gradients, end = descend(problem, functions.SmoothFunction, 1 / L, 1)
    # f(w_1) stands for inf f: the class holds functions whose infimum is reached there.
    problem.set_initial_condition(f(start) - f(end) <= 0.7)
    problem.set_performance_metric(gradients[0] ** 2)
    assert cv.gradient_radius(lambda u: L, 0.7) == pytest.approx(math.sqrt(problem.solve(verbose=0)), rel=1e-4)


@pytest.mark.parametrize("T", [1, 4])
def test_li_convex_rate_is_twice_the_exact_worst_case_for_long_runs(T):
    problem, eta = PEPit.PEP(), 1 / (2 * L)
    f = problem.declare_function(functions.SmoothConvexFunction, L=L)
    best, x = f.stationary_point(), problem.set_initial_point()
    problem.set_initial_condition((x - best) ** 2 <= 1)
    for _ in range(T):
        x = x - eta * f.gradient(x)
    problem.set_performance_metric(f(x) - f(best))
    worst = problem.solve(verbose=0)
    bound = rf.li_convex(lambda u: L, 1.0, eta, 1.0, T).value
    # Exact: 1/(4 eta T + 2/L) for steps up to 1/L.
    assert bound / worst == pytest.approx(2 + 1 / (eta * L * T), rel=1e-3)
