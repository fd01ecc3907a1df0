"""What a pass is applied to, got once more by a worker that does a part of it."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any


def opened(opening: Mapping[str, Any]) -> Any:
    """Return what :attr:`passes.base.PassContext.opening` describes."""
    module, _, name = opening["function"].partition(":")
    return getattr(importlib.import_module(module), name)(**opening["arguments"])
