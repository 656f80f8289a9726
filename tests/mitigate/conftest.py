"""Targets that promise no more than they must."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from mnemoscope.models.base import Target


@pytest.fixture
def bare():
    """``bare(target)``: the same with what every target has, and none of the optional abilities."""
    promised = {*Target.__annotations__, *(name for name in vars(Target) if not name.startswith("_"))}
    return lambda target: SimpleNamespace(**{name: getattr(target, name) for name in promised})
