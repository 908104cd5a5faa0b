"""Every method is a torch.optim.Optimizer whose step(closure) drives its own evaluations; one file each."""

from hybridtheory.optimizers.first_order import lora_plus
from hybridtheory.optimizers.hybrid import Hybrid
from hybridtheory.optimizers.mezo import MeZO

__all__ = ["Hybrid", "MeZO", "lora_plus"]
