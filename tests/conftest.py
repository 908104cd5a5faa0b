"""Shared by the tests of tasks: a tiny GPT-2 in a folder, ten labelled sentences in a file, and no network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--on", default="cpu", help="default device of every tensor that a test makes (make gpu-check)")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--on") != "cpu":
        torch.set_default_device(config.getoption("--on"))


@pytest.fixture(autouse=True, scope="session")
def allocator() -> Iterator[None]:
    """Commands that run in this process must not change its allocator for the tests that measure memory."""
    from hybridtheory import memory

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "keep_freed", lambda: None)
        yield


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tasks")


@pytest.fixture(scope="session")
def gpt2(root: Path) -> Path:
    from tiny_models import save

    return save("gpt2", root / "gpt2")


@pytest.fixture(scope="session")
def films(root: Path) -> Path:
    from tiny_models import FILMS, write

    return write(root / "films.jsonl", [{"text": t, "label": i % 2} for i, t in enumerate(FILMS * 2)])


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("probes.sources.hub_reachable", lambda timeout=3.0: False)
    monkeypatch.setattr("probes.models.hub_reachable", lambda timeout=3.0: False)
