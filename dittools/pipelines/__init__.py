"""Ready pipelines by name, and running them."""

from dittools.pipelines.load import load, names

__all__ = ["load", "names"]
