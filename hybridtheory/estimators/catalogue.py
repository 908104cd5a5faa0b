"""Every direction law under the name that a command line uses, and the reading of a law from text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

from hybridtheory.errors import UserError
from hybridtheory.estimators.coordinate import Coordinate
from hybridtheory.estimators.cyclic import BlockCyclic
from hybridtheory.estimators.gaussian import Gaussian
from hybridtheory.estimators.law import Law
from hybridtheory.estimators.lozo import LOZO
from hybridtheory.estimators.masks import RandomMask
from hybridtheory.estimators.orthonormal import Orthonormal
from hybridtheory.estimators.rademacher import Rademacher
from hybridtheory.estimators.sphere import Sphere
from hybridtheory.estimators.srgf import SRGF
from hybridtheory.estimators.subzero import SubZero
from hybridtheory.estimators.tezo import TeZO

# The magnitude mask and HiZOO's preconditioner need a block's weights or a run's state: `MagnitudeMask.of`, `Preconditioned`.
LAWS: dict[str, Callable[..., Law]] = {
    "gaussian": Gaussian,
    "sphere": Sphere,
    "rademacher": Rademacher,
    "coordinate": Coordinate,
    "orthonormal": Orthonormal,
    "subzero": SubZero,
    "lozo": LOZO,
    "tezo": TeZO,
    "srgf": SRGF,
    "random-mask": RandomMask,
    "cyclic": BlockCyclic,
}


def parse(text: str) -> Law:
    """ "subzero" or "subzero:rank=4,refresh=500" as a law; UserError for an unknown name or option."""
    name, _, rest = text.partition(":")
    if name not in LAWS:
        raise UserError(f"there is no direction law {name!r}: choose from {', '.join(LAWS)}")
    options: dict[str, float | int] = {}
    for item in filter(None, rest.split(",")):
        key, _, value = item.partition("=")
        try:
            options[key] = float(value) if "." in value or "e" in value else int(value)
        except ValueError:
            raise UserError(f"{item!r} in {text!r} is not name=number") from None
    whole = {f.name for f in fields(LAWS[name]) if f.type == "int"}  # type: ignore[arg-type]
    for key in whole & options.keys():
        if not isinstance(options[key], int) or options[key] < 1:
            raise UserError(f"{key} in {text!r} is a whole number of at least 1")
    try:
        return LAWS[name](**options)
    except TypeError:
        raise UserError(f"the law {name!r} does not take {', '.join(options)}") from None
