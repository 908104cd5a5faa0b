"""Cost formulas on small lists that can be added up by hand."""

import pytest

from hybridtheory.errors import UserError
from hybridtheory.theory import cost

LAYERS = cost.Layers(base=[10.0, 40.0, 20.0], peft=[1.0, 2.0, 9.0], activations=[30.0, 5.0, 7.0])


def test_memory_of_every_method():
    assert cost.first_order_memory(LAYERS) == 70 + (30 + 40 + 20)
    assert cost.zeroth_order_memory(LAYERS) == 70 + 40
    assert cost.zeroth_order_memory(LAYERS, replayed=False) == 140
    assert cost.peft_memory(LAYERS) == 70 + 12 + (30 + 5 + 9)
    assert cost.hybrid_memory(LAYERS) == 70 + 12 + 44
    # Where one layer outweighs all activations the direction's buffer sets the peak.
    assert cost.hybrid_memory(cost.Layers([10.0, 90.0], [1.0, 1.0], [5.0, 5.0])) == 102 + 90
    assert cost.gigabytes(2.5e9, 2) == pytest.approx(5.0)


def test_state_of_optimizers_and_low_rank_laws():
    assert [cost.optimizer_state(m, 7.0) for m in ("sgd", "momentum", "adam", "zo-sgd", "zo-momentum", "zo-adam", "hizoo")] == [
        0, 7, 14, 0, 7, 14, 7,
    ]  # fmt: skip
    shapes = [(4, 6), (3, 5)]
    assert cost.low_rank_state(shapes, 2, "subzero") == cost.low_rank_state(shapes, 2, "tezo") == 2 * (10 + 8)
    assert cost.low_rank_state(shapes, 2, "lozo") == 2 * (6 + 5)


def test_passes_of_one_step():
    assert cost.passes("fo").time() == 3
    assert [cost.passes("zo", q).time() for q in (1, 4)] == [2, 8]
    assert [cost.passes("zo", q, one_sided=True).time() for q in (1, 4)] == [2, 5]
    assert cost.passes("hybrid").time() == 5
    assert cost.passes("hybrid", one_sided=True).time() == 4
    assert cost.passes("hybrid", one_sided=True, joint=False).time() == 5
    assert cost.passes("hybrid", 3).time(1.5) == 6 + 1 + 1.5
    assert cost.passes("zo-conservative").time() == 5
    assert cost.passes("hizoo").time() == 3
    assert cost.passes("forward-gradient", 4).time() == 4
    # 3 inner gradients, 2 for p, 1 value at s, Φ = 3 losses at w and at w + μu
    assert cost.passes("bilevel", inner_steps=3) == cost.Passes(3 + 2 + 1 + 6, 5)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: cost.Layers([1.0], [1.0, 2.0], [1.0]), "one length"),
        (lambda: cost.Layers([], [], []), "one length"),
        (lambda: cost.Layers([-1.0], [0.0], [0.0]), "base_0"),
        (lambda: cost.optimizer_state("lion", 1.0), "lion"),
        (lambda: cost.low_rank_state([(2, 2)], 1, "svd"), "svd"),
        (lambda: cost.passes("hizoo", q=2), "q = 2"),
        (lambda: cost.passes("zo", q=0), "q >= 1"),
        (lambda: cost.passes("fo").time(0.0), "backward > 0"),
        (lambda: cost.gigabytes(-1.0, 2), "elements"),
    ],
)
def test_bad_input_is_refused(call, says):
    with pytest.raises(UserError, match=says):
        call()
