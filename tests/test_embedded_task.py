"""The embedded model can learn the embedded task: otherwise nothing measured along a training run would mean anything."""

import sys
from importlib import import_module
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.mark.slow
def test_lora_beats_the_majority_floor_by_five_standard_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Label word as next token, all 2,000 test rows; before training the model knows nothing (the labels were coins)."""
    monkeypatch.setattr(sys, "path", [str(SCRIPTS), *sys.path])
    script = import_module("lora_sentiment")
    before = script.LabelWords(script.DATA / "embedded", rank=8).evaluate("test")
    assert abs(before.standard_errors) < 5 or before.accuracy < before.floor
    after = script.train().evaluate("test")
    assert after.rows == 2000
    assert after.floor < 0.51
    assert after.standard_errors >= 5, after
