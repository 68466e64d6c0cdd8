"""Attaching to stock diffusers pipelines: `attach`, `detach`, and the open table of families."""

from dittools.patches import families as _package  # noqa: F401 - bound before the function is
from dittools.patches.adapters import Family, Layout, families, register_family
from dittools.patches.attach import Attachment, attach, detach
from dittools.patches.recorder import Incident, Recorder
from dittools.patches.report import LayerReport, Report

__all__ = [
    "Attachment",
    "Family",
    "Incident",
    "LayerReport",
    "Layout",
    "Recorder",
    "Report",
    "attach",
    "detach",
    "families",
    "register_family",
]
