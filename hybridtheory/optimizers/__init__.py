"""Every method is a torch.optim.Optimizer whose step(closure) drives its own evaluations; one file each."""

from hybridtheory.optimizers.adam import Adam
from hybridtheory.optimizers.adamu import AdaMU
from hybridtheory.optimizers.base import ZeroOrder
from hybridtheory.optimizers.bilevel import BilevelZOFO, Minibatches
from hybridtheory.optimizers.catalogue import METHODS, build, options_of
from hybridtheory.optimizers.conservative import Conservative
from hybridtheory.optimizers.first_order import lora_plus
from hybridtheory.optimizers.hizoo import HiZOO
from hybridtheory.optimizers.hybrid import Hybrid
from hybridtheory.optimizers.mezo import MeZO
from hybridtheory.optimizers.momentum import Momentum
from hybridtheory.optimizers.sign import Sign

__all__ = [
    "METHODS", "AdaMU", "Adam", "BilevelZOFO", "Conservative", "HiZOO", "Hybrid", "MeZO", "Minibatches", "Momentum", "Sign",
    "ZeroOrder", "build", "lora_plus", "options_of",
]  # fmt: skip
