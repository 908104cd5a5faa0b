"""MeZO (Malladi et al. 2023, arXiv 2305.17333): zeroth-order SGD with two-sided differences along Gaussian directions."""

from __future__ import annotations

from hybridtheory.optimizers.base import ZeroOrder


class MeZO(ZeroOrder):
    """w <- w - η (1/q) Σₖ (f(w + μuₖ) - f(w - μuₖ))/2μ uₖ. Any direction law and any block: base, PEFT or both.

    The published code adds and subtracts μu in place, so that its weights drift; here they do not.
    """

    sharded = True
