"""What every tab is given."""

from dataclasses import dataclass
from typing import Any

from dittools.studio.engine import Engine
from dittools.studio.runs import RunStore
from dittools.studio.settings import StudioSettings


@dataclass(frozen=True)
class Context:
    """The studio's parts, and the few components that tabs share.

    Attributes:
        engine: runs jobs on the one model in memory.
        runs: the history on disk.
        settings: how the studio was started.
        model: the model field above the tabs, a component; an input of every handler that runs.
        plan: gr.State of one page: path of the plan file that a tab offers to the next generation,
            "" for none. Set it from any handler; the Generate tab follows.
    """

    engine: Engine
    runs: RunStore
    settings: StudioSettings
    model: Any
    plan: Any
