"""The tabs, in order. A tab is a module with `build(context)`, called inside its gr.Tab."""

from collections.abc import Callable

from dittools.studio.context import Context
from dittools.studio.tabs import atlas, bench, generate, history, search, vote

TABS: tuple[tuple[str, Callable[[Context], None]], ...] = (
    ("Generate", generate.build),
    ("Atlas", atlas.build),
    ("Search", search.build),
    ("Compare", vote.build),
    ("Benchmark", bench.build),
    ("History", history.build),
)
