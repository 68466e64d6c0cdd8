"""Ready pipelines by name, and running them."""

from dittools.pipelines.freeswim import freeswim
from dittools.pipelines.load import load, names

__all__ = ["freeswim", "load", "names"]
