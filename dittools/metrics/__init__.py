"""Measurements of clips; nothing here knows of attention."""

from dittools.metrics.fidelity import Fidelity, Frames, compare

__all__ = ["Fidelity", "Frames", "compare"]
