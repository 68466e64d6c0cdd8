"""Offline plan search, forecast, and the head atlas."""

from dittools.searching.api import SearchResult, search
from dittools.searching.request import Budget, Constraints

__all__ = ["Budget", "Constraints", "SearchResult", "search"]
