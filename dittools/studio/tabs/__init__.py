"""The tabs, in order. A tab is a module with `build(context)`, called inside its gr.Tab."""

from collections.abc import Callable

from dittools.studio.context import Context
from dittools.studio.tabs import generate, history

TABS: tuple[tuple[str, Callable[[Context], None]], ...] = (
    ("Generate", generate.build),
    ("History", history.build),
)
