"""Zeroth-order gradient estimators: direction laws, exact perturbation, and gradients kept as seeds and slopes."""

from hybridtheory.estimators.gaussian import Gaussian
from hybridtheory.estimators.law import Kept, Law, merged
from hybridtheory.estimators.perturb import Perturbation, UncoveredRead, perturbed
from hybridtheory.estimators.rademacher import Rademacher
from hybridtheory.estimators.streams import Key, generator
from hybridtheory.estimators.zo_gradient import NonFiniteLoss, ZOGradient, absorbed_fraction, evaluate, inner

__all__ = [
    "Gaussian", "Kept", "Key", "Law", "NonFiniteLoss", "Perturbation", "Rademacher", "UncoveredRead", "ZOGradient",
    "absorbed_fraction", "evaluate", "generator", "inner", "merged", "perturbed",
]  # fmt: skip
