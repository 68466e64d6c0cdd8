"""Ready pipelines by name, and running them."""

from dittools.pipelines.freeswim import freeswim
from dittools.pipelines.highres import highres
from dittools.pipelines.load import load, names

__all__ = ["freeswim", "highres", "load", "names"]
