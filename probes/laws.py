"""The table of direction laws that probe-estimators measures: rows from text, and which of them can share their directions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from hybridtheory.blocks import Block
from hybridtheory.errors import UserError
from hybridtheory.estimators import Coordinate, Key, Law, MagnitudeMask, Orthonormal, Preconditioned, Sphere, parse
from probes import draws

# HiZOO's preconditioner costs Hessian products and S-RGF k draws a direction: on request.
DEFAULT_LAWS = (
    "gaussian", "gaussian:q=4", "gaussian:q=16", "sphere", "rademacher", "coordinate", "orthonormal:q=16", "subzero:rank=8",
    "subzero:rank=8,refresh=1", "lozo:rank=2", "magnitude-mask:keep=0.25",
)  # fmt: skip
# Entries of one tensor's directions that a batch may hold beside each other (256 MiB of float32).
HELD = 1 << 26


@dataclass(frozen=True)
class Member:
    """One row of the table: a law and the number of queries that its estimate averages. Masks and HiZOO need the block: `on`."""

    label: str
    name: str
    q: int
    law: Law | None
    options: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, text: str) -> Member:
        name, _, rest = text.strip().partition(":")
        items = [i for i in rest.split(",") if i]
        given = [i for i in items if i.startswith("q=")]
        try:
            q = int(given[-1][2:]) if given else 1
        except ValueError:
            raise UserError(f"{given[-1]!r} in {text!r} is not q=NUMBER") from None
        if not 1 <= q <= 256:
            raise UserError(f"q in {text!r} must be from 1 to 256, the directions that are held at once, got {q}")
        others = ",".join(i for i in items if i not in given)
        if name == "hizoo" and not others:
            return cls(text.strip(), name, q, None)
        if name == "magnitude-mask":
            try:
                options = {k: float(v) for k, v in (i.split("=") for i in others.split(",") if i)}
            except ValueError:
                raise UserError(f"{text!r} is not magnitude-mask:keep=SHARE") from None
            if set(options) - {"keep"} or not 0 < options.get("keep", 0.25) <= 1:
                raise UserError(f"the magnitude mask takes keep, a share in (0, 1]: got {text!r}")
            return cls(text.strip(), name, q, None, options)
        return cls(text.strip(), name, q, parse(f"{name}:{others}"))

    def on(self, block: Block, h: dict[str, Tensor] | None) -> Law:
        """The law for a block; ``h`` is HiZOO's diagonal."""
        if self.name == "hizoo":
            assert h is not None
            return Preconditioned(h)
        if self.law is None:
            return MagnitudeMask.of(block, self.options.get("keep", 0.25))
        return self.law


@dataclass(frozen=True)
class Source:
    """Members that the same directions serve, ``size`` directions a batch. kind: "gaussian", "coordinate" or "law"."""

    kind: str
    members: tuple[Member, ...]
    size: int


def sources(members: Sequence[Member], group: Block) -> list[Source]:
    """Members that share a Gaussian direction first; coordinates are looked up; every other law draws its own."""
    shared: list[Member] = []
    single: list[Member] = []
    for m in members:
        plain = m.law is None or isinstance(m.law, Sphere | Orthonormal) or draws.shares(m.law)
        (shared if plain else single).append(m)
    size = math.lcm(*(m.q for m in shared)) if shared else 1
    found = [Source("gaussian", tuple(shared), size * max(1, 16 // size))] if shared else []
    for m in single:
        kind = "coordinate" if isinstance(m.law, Coordinate) and m.q == 1 else "law"
        room = min(max(HELD // max(p.numel() for p in group.tensors), 2), 8)
        found.append(Source(kind, (m,), 1 if kind == "coordinate" else m.q * max(room // m.q, 1 if m.q > 1 else 2)))
    return found


def refuse(members: Sequence[Member], group: Block) -> None:
    """What a law cannot do on a group is said before anything is measured."""
    for m in members:
        if isinstance(m.law, Orthonormal) and m.q > group.numel:
            raise UserError(
                f"{m.q} orthonormal directions do not exist in the {group.numel} dimensions of {group.name!r}: lower q"
            )
        if m.law is not None and not isinstance(m.law, Sphere | Orthonormal):
            m.law.bind(group, [Key(0)])
