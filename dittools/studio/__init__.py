"""The studio: a page to generate, compare, search and measure. Needs the `app` extra."""

from dittools.studio.page import build, launch
from dittools.studio.settings import StudioSettings

__all__ = ["StudioSettings", "build", "launch"]
