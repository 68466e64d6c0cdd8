"""Refusals of names nobody knows: what there is instead, and what may have been meant."""

from collections.abc import Iterable
from dataclasses import MISSING, fields
from difflib import get_close_matches
from functools import wraps
from typing import Any, TypeVar, get_type_hints

from dittools.errors import UnknownMethod

Kind = TypeVar("Kind", bound=type)


def near_miss(word: str, known: Iterable[str]) -> str:
    """Return the known word that was probably meant, "" when none is near."""
    return next(iter(get_close_matches(word.lower(), list(known), n=1)), "")


def described(kind: type[Any]) -> list[str]:
    """Return one phrase per parameter of a method class: name, type and default."""
    hints = get_type_hints(kind)
    phrases = []
    for item in fields(kind):
        kind_name = getattr(hints[item.name], "__name__", str(hints[item.name]))
        default = "" if item.default is MISSING else f" = {item.default!r}"
        phrases.append(f"{item.name}: {kind_name}{default}")
    return phrases


def named(kind: Kind) -> Kind:
    """Return the method class, made to refuse parameters it does not have in one readable line."""
    plain: Any = kind.__init__  # type: ignore[misc]

    @wraps(plain)
    def checked(self: Any, *values: Any, **params: Any) -> None:
        known = [item.name for item in fields(kind)]
        unknown = sorted(set(params) - set(known))
        if unknown or len(values) > len(known):
            problem = f"does not take {', '.join(unknown)}"
            if not unknown:
                problem = f"takes at most {len(known)} values"
            raise UnknownMethod(
                f"{kind.name} {problem}",  # type: ignore[attr-defined]
                expected=", ".join(described(kind)) or "no parameters",
                got=repr(params) if unknown else str(len(values)),
                remedy=", ".join(filter(None, (near_miss(word, known) for word in unknown))),
            )
        plain(self, *values, **params)

    kind.__init__ = checked  # type: ignore[misc]
    return kind
