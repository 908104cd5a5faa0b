"""How a perturbed weight takes the place of the model's own while one module runs, and how reads that this misses are seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Factored = Callable[[str, Tensor], "tuple[Tensor, Tensor] | None"]


def substitute(
    module: nn.Module,
    swaps: list[tuple[str, str]],
    copy_of: Callable[[str], Tensor],
    parameters: dict[str, nn.Parameter],
    factored: Factored | None,
    scale: float,
    observer: Observer | None = None,
) -> Callable[[], None]:
    """Give the module a forward that runs on the copies; returns what takes it away again.

    An instance's own ``forward`` costs a third of a pair of forward hooks, and it also works where a forward is called directly.
    """
    own, held = module.__dict__, cast(dict[str, Any], module._parameters)
    before, forward = own.get("forward"), module.forward  # someone else (accelerate) may have put one there
    weight = next((n for a, n in swaps if a == "weight"), None) if _linear(module) else None

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        low = None
        if factored is not None and weight is not None and _few(args, kwargs, module, parameters[weight]):
            low = factored(weight, parameters[weight])
        try:
            for attribute, name in swaps:
                if low is None or name != weight:
                    # nn.Module's own setter refuses a plain tensor here, its attribute lookup does not
                    held[attribute] = copy_of(name)
                elif observer is not None and torch.is_grad_enabled():
                    # the backward pass reads what stands here too, and the observer cannot know for whom
                    held[attribute] = observer.unseen(lambda n, p: p.clone(), name, parameters[name])
            if observer is not None:
                observer.granted = weight if low is not None else None
            out = forward(*args, **kwargs)
            return out if low is None else _add(out, args[0], low, scale, module)
        finally:
            if observer is not None:
                observer.granted = None
            for attribute, name in swaps:
                held[attribute] = parameters[name]

    def remove() -> None:
        if before is None:
            del own["forward"]
        else:
            own["forward"] = before

    own["forward"] = wrapped
    return remove


def _linear(module: nn.Module) -> bool:
    """Is the module's output linear in its weight in the way that `_add` knows? Subclasses may do anything, so exactly these."""
    return type(module) is nn.Linear or (type(module) is nn.Embedding and module.max_norm is None)


def _few(args: Any, kwargs: Any, module: nn.Module, w: Tensor) -> bool:
    """Is w + scale A Bᵀ dearer than A Bᵀ applied to the input? (Sizes of what is written: the matrix, or input and output.)"""
    if kwargs or len(args) != 1:
        return False
    tokens = args[0].numel() // (args[0].shape[-1] if isinstance(module, nn.Linear) else 1)
    return tokens * (w.shape[0] + w.shape[1]) < w.numel()


def _add(out: Tensor, x: Tensor, low: tuple[Tensor, Tensor], scale: float, module: nn.Module) -> Tensor:
    """What the module gives with weight + scale A Bᵀ, from what it gives without."""
    a, b = low
    if isinstance(module, nn.Embedding):
        left, right = a[x.reshape(-1)], b
    else:
        left, right = x.reshape(-1, x.shape[-1]) @ b, a
    if torch.is_grad_enabled():
        return out + scale * (left @ right.T).view(out.shape)
    out.view(-1, out.shape[-1]).addmm_(left, right.T, alpha=scale)
    return out


class Observer(TorchDispatchMode):
    """Sees which of the block's storages are operands of an operation while we have not replaced them."""

    def __init__(self, parameters: dict[str, nn.Parameter], known: set[str]) -> None:
        super().__init__()
        self.names: dict[int, list[str]] = {}
        for name, parameter in parameters.items():
            if name not in known and parameter.numel():
                self.names.setdefault(parameter.untyped_storage().data_ptr(), []).append(name)
        self.raw: set[str] = set()
        self.uses: dict[str, int] = {}
        self.forwards = 0
        self.muted = False
        self.granted: str | None = None  # a weight that its own module may read as it is

    def count(self) -> None:
        self.forwards += 1

    def unseen(self, make: Callable[[str, Tensor], Tensor], name: str, w: Tensor) -> Tensor:
        """Our own reading of a weight does not count."""
        self.muted = True
        try:
            return make(name, w)
        finally:
            self.muted = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.muted:
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor) and not leaf._is_zerotensor():  # forward mode's zeros own no storage
                    names = self.names.get(leaf.untyped_storage().data_ptr(), ())
                    self.raw.update(n for n in names if n != self.granted)
        return func(*args, **(kwargs or {}))
