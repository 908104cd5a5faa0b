"""What an optimizer's checkpoint leaves out and how it is put back: blocks and laws are code, made by whoever resumes, and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hybridtheory.errors import UserError

_CODE = ("block", "law")


def pack(state: dict[str, Any], groups: Sequence[Mapping[str, Any]], run: dict[str, Any]) -> dict[str, Any]:
    """torch's own state dict with names in the place of code, and the run's counters."""
    for packed, group in zip(state["param_groups"], groups, strict=True):
        for name in _CODE:
            packed.pop(name, None)
        packed["tensors"] = group["block"].names
        packed["law_name"] = repr(group.get("law"))
        packed["law_state"] = group["law"].state() if "law" in group else None
    state["state"]["run"] = run
    return state


def check(state: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], method: str) -> None:
    """UserError where the checkpoint is of another method, model or law. Nothing has been loaded by then."""
    saved_method = state["state"].get("run", {}).get("method", "another optimizer")
    if saved_method != method:
        raise UserError(f"this is a checkpoint of {saved_method}, not of {method}: nothing was loaded")
    for i, (saved, group) in enumerate(zip(state["param_groups"], groups, strict=False)):
        if saved["tensors"] != group["block"].names or saved["law_name"] != repr(group.get("law")):
            raise UserError(
                f"group {i} of the checkpoint holds {len(saved['tensors'])} tensors under the law {saved['law_name']}, this run's holds "
                f"{len(group['block'].names)} under {group.get('law')!r}: it is a checkpoint of another model or method; nothing was loaded"
            )


def unpack(groups: Sequence[dict[str, Any]], code: Sequence[Mapping[str, Any]]) -> None:
    """Give the loaded groups the blocks and laws of the groups that they replaced."""
    for group, own in zip(groups, code, strict=True):
        kept = group.pop("law_state")
        del group["tensors"], group["law_name"]
        group.update({name: own[name] for name in _CODE if name in own})
        if kept is not None:
            group["law"] = own["law"].restored(kept)
