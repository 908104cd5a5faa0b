"""Zeroth-order gradient estimators: direction laws, exact perturbation, and gradients kept as seeds and slopes."""

from hybridtheory.estimators.catalogue import LAWS, parse
from hybridtheory.estimators.coordinate import Coordinate
from hybridtheory.estimators.cyclic import BlockCyclic
from hybridtheory.estimators.diagonal import Preconditioned
from hybridtheory.estimators.gaussian import Gaussian
from hybridtheory.estimators.law import Kept, Law, merged
from hybridtheory.estimators.lozo import LOZO
from hybridtheory.estimators.masks import MagnitudeMask, RandomMask
from hybridtheory.estimators.orthonormal import Orthonormal
from hybridtheory.estimators.perturb import Perturbation, UncoveredRead, perturbed
from hybridtheory.estimators.rademacher import Rademacher
from hybridtheory.estimators.sphere import Sphere
from hybridtheory.estimators.srgf import SRGF
from hybridtheory.estimators.streams import Key, generator
from hybridtheory.estimators.subzero import SubZero
from hybridtheory.estimators.tezo import TeZO
from hybridtheory.estimators.zo_gradient import NonFiniteLoss, ZOGradient, absorbed_fraction, evaluate, inner

__all__ = [
    "LAWS", "LOZO", "SRGF", "BlockCyclic", "Coordinate", "Gaussian", "Kept", "Key", "Law", "MagnitudeMask", "NonFiniteLoss",
    "Orthonormal", "Perturbation", "Preconditioned", "Rademacher", "RandomMask", "Sphere", "SubZero", "TeZO", "UncoveredRead",
    "ZOGradient", "absorbed_fraction", "evaluate", "generator", "inner", "merged", "parse", "perturbed",
]  # fmt: skip
