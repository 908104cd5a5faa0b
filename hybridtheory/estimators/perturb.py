"""Evaluate a model at w + scale·u while the parameters themselves never change, so that they are "back" bit for bit
in every dtype.

Adding scale·u in place and subtracting it again does not give the parameters back (in bf16 the drift is many times
the update). Here a tensor is perturbed *where it is used*: while a module's forward runs, w + scale·u is in the
weight's place, and the copy is dropped after it. Only one perturbed tensor is alive at a time, autograd works
inside, and each difference saves a draw.

This reaches only weights that are read by the forward of the module that owns them. Fused attention, LSTMs, ia3
vectors or prompts are read from elsewhere. Which ones is not guessed from names but observed: during the first
evaluation of a `Perturbation` every operation's operands are compared with the block's storages. A tensor whose
original is touched is from then on replaced as a whole, by its ``.data``, for as long as the perturbation lasts (one
copy of those tensors), and the evaluation is repeated. Sharded tensors are moved where they are, since what gathers them
does not look at their modules, and put back from a copy: of each process's part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from hybridtheory import shards
from hybridtheory.blocks import Block
from hybridtheory.errors import UserError
from hybridtheory.estimators.law import Law, merged
from hybridtheory.estimators.streams import Key, check_names
from hybridtheory.estimators.substitute import Factored, Observer, substitute

T = TypeVar("T")


class UncoveredRead(RuntimeError):
    """Some weights were read unperturbed; the value of that evaluation must not be used. Evaluating again is right:
    they are known now.
    """


class Perturbation:
    """What it takes to perturb one block of one model; keep it for a whole run.

    share  True keeps the perturbed copy of a tensor that several modules read (tied embeddings, ALBERT's layers)
           until its last use in a forward. False draws it again for each use, and nothing beyond the largest single
           tensor is ever allocated.
    Raises UserError for a block without parameters, or of another model.
    """

    def __init__(self, model: nn.Module, blocks: Block | Sequence[Block], share: bool = True) -> None:
        self.model = model
        self.block = merged(blocks)
        self.share = share
        if not self.block.parameters:
            raise UserError(
                f"block {self.block.name!r} holds no parameter, so there is nothing to perturb: check --blocks "
                f"and --peft"
            )
        check_names(self.block.names)
        name_of = {id(p): name for name, p in self.block.parameters.items()}
        self._sites: dict[nn.Module, list[tuple[str, str]]] = {}  # module -> (attribute, tensor's name in the block)
        for module in model.modules():
            for attribute, parameter in module._parameters.items():
                if parameter is not None and id(parameter) in name_of:
                    self._sites.setdefault(module, []).append((attribute, name_of[id(parameter)]))
        missing = set(self.block.names) - {name for site in self._sites.values() for _, name in site}
        if missing:
            raise UserError(
                f"the model does not hold {sorted(missing)[0]!r} of block {self.block.name!r}: the block "
                f"belongs to another model"
            )
        # Names that replacing a module's attribute does not reach: sharded tensors, and others as they come to light.
        self._whole = {name for name, p in self.block.parameters.items() if shards.is_sharded(p)}
        self.accepted: set[float] = set()  # values of mu that the weights were seen not to absorb
        self._inside = False
        self._derived = False  # has a forward derivative shown that it reaches every tensor?
        # (training, grad) -> how often a forward reads each tensor
        self._checked: dict[tuple[bool, bool], dict[str, int]] = {}

    def value(self, f: Callable[[], T], law: Law, key: Key, scale: float) -> T:
        """f() at w + scale·u(key). f is called once, or once more for each set of tensors found to be out of reach."""
        while True:
            try:
                with self.at(law, key, scale):
                    return f()
            except UncoveredRead:
                continue  # each time at least one more tensor is known, so this ends

    @contextmanager
    def at(self, law: Law, key: Key, scale: float) -> Iterator[None]:
        """Within, the model computes at w + scale·u(key). ``law`` must be bound to the block.

        With weights out of reach, a gradient must be taken before the end of the context (afterwards their
        ``.data`` is w again). Raises UncoveredRead at the end of the first use in a mode (training, gradients on)
        when such weights come to light.
        """
        names = [n for n in self.block.names if law.touches(key, n)]
        mode = (self.model.training, torch.is_grad_enabled())
        checked = self._checked.setdefault(mode, {})
        reached = set(names) - self._whole
        observer = None if checked.keys() >= reached else Observer(self.block.parameters, self._whole)
        originals: list[tuple[nn.Parameter, Tensor]] = []
        try:
            for name in names:
                if name in self._whole:
                    parameter = self.block.parameters[name]
                    originals.append((parameter, shards.kept(parameter)))
                    w = shards.whole(parameter.detach())
                    shards.put(parameter, shards.part(law.shift(key, name, w, scale), parameter))
            with self._wrapped(
                lambda n, p: law.shift(key, n, p, scale),
                names,
                checked,
                observer,
                lambda n, p: law.factored(key, n, p),
                scale,
            ):
                yield
        finally:
            for parameter, data in originals:
                shards.put(parameter, data)
        if observer is not None:
            raw = observer.raw.intersection(names)
            if raw:
                self._whole |= raw
                raise UncoveredRead(
                    f"{len(raw)} tensors of block {self.block.name!r} are read outside their own module's "
                    f"forward (first: {min(raw)!r}) and "
                    "were not perturbed; they are known now: evaluate again (Perturbation.value does)"
                )
            checked.update({n: -(-observer.uses.get(n, 0) // max(observer.forwards, 1)) for n in names})

    def derivative(self, f: Callable[[], Tensor], law: Law, key: Key) -> tuple[float, float]:
        """(f, D_u f) at w by forward-mode differentiation (the forward gradient of Baydin et al. 2022): no step mu,
        no truncation.

        Runs under the math attention kernel, the only one with a forward derivative. A weight out of reach
        is replaced as an attribute of its module; one that is read in yet another way (an LSTM's flat list) raises
        UserError.
        """
        if shards.any_sharded(self.block.tensors):
            raise UserError(
                'what gathers a sharded model\'s weights has no forward derivative: use difference="central"'
            )
        mode = (self.model.training, False)
        names = [n for n in self.block.names if law.touches(key, n)]
        with torch.no_grad():
            if not self._checked.get(mode, {}).keys() >= set(names):
                self.value(f, law, key, 0.0)
            first = not self._derived
            observer = Observer(self.block.parameters, set()) if first else None

            def dual(name: str, w: Tensor) -> Tensor:
                # only a copy can be told from the original by its storage
                primal = w.detach().clone() if first else w.detach()
                return forward_ad.make_dual(primal, law.fill(key, name, w).to(w.dtype))

            with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
                replaced: list[tuple[Any, str, Any]] = []
                try:
                    for module, site in self._sites.items():
                        for attribute, name in site:
                            if name in self._whole and name in names:
                                held: Any = module._parameters
                                replaced.append((held, attribute, held[attribute]))
                                held[attribute] = dual(name, self.block.parameters[name])
                    with self._wrapped(dual, names, self._checked.get(mode, {}), observer):
                        loss, tangent = forward_ad.unpack_dual(f())
                except NotImplementedError as error:
                    raise UserError(
                        f'an operation of the model has no forward derivative: use difference="central" ({error})'
                    ) from error
                finally:
                    for held, attribute, parameter in replaced:
                        held[attribute] = parameter
            if observer is not None and observer.raw.intersection(names):
                raise UserError(
                    f"the exact directional derivative cannot reach {min(observer.raw)!r}, which its module "
                    f"reads through something else than "
                    'its own attribute: use difference="central"'
                )
            if tangent is None:
                raise UserError(
                    "the loss carries no forward derivative along the direction: the closure must return the "
                    "model's own loss, not detach() "
                    'or item() of it, and it must depend on the block; or use difference="central"'
                )
            self._derived = True
            return float(loss), float(tangent)

    @contextmanager
    def _wrapped(
        self,
        make: Callable[[str, Tensor], Tensor],
        names: Sequence[str],
        uses: dict[str, int],
        observer: Observer | None,
        factored: Factored | None = None,
        scale: float = 0.0,
    ) -> Iterator[None]:
        """Forwards that put make(name, w) in w's place while the module that owns it runs, or that add scale·A Bᵀ to what it computes."""
        parameters = self.block.parameters
        covered = set(names) - self._whole
        shared: dict[str, tuple[Tensor, int]] = {}  # name -> its copy, and how many uses of it are left in this forward

        def copy_of(name: str) -> Tensor:
            if observer is not None:
                observer.uses[name] = observer.uses.get(name, 0) + 1
            copy, left = shared.pop(name, (None, uses.get(name, 1)))
            if copy is None:
                copy = (
                    make(name, parameters[name]) if observer is None else observer.unseen(make, name, parameters[name])
                )
            if self.share and left > 1:
                shared[name] = (copy, left - 1)
            return copy

        if self._inside:
            raise RuntimeError("a perturbation of this block is already in effect: leave it before the next one begins")
        self._inside = True
        undo: list[Callable[[], None]] = []
        handle = None
        try:
            for module, site in self._sites.items():
                swaps = [(a, n) for a, n in site if n in covered]
                if swaps:
                    undo.append(substitute(module, swaps, copy_of, parameters, factored, scale, observer))
            if observer is None:
                yield
            else:
                handle = self.model.register_forward_pre_hook(lambda module, args: observer.count())
                with observer:
                    yield
        finally:
            self._inside = False
            for step in undo:
                step()
            if handle is not None:
                handle.remove()


@contextmanager
def perturbed(model: nn.Module, blocks: Block | Sequence[Block], law: Law, key: Key, scale: float) -> Iterator[None]:
    """`Perturbation.at` for a single use; keep a `Perturbation` where there are many."""
    plan = Perturbation(model, blocks)
    with plan.at(law.bind(plan.block, [key]), key, scale):
        yield
