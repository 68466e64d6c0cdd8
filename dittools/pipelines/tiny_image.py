"""Toy image pipelines, one builder per family."""

from collections.abc import Callable
from typing import Any

BUILDERS: dict[str, Callable[[], Any]] = {}
CALLS: dict[str, dict[str, Any]] = {}
