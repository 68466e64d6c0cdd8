"""Errors that say what was expected, what was given and what to do about it."""

LONGEST = 400  # characters of what was given; files can hold any amount
LONGEST_PART = 2000  # of the rest, which may quote names from files


class DitToolsError(ValueError):
    """Base of every error dittools raises on purpose; its text is one readable line."""

    def __init__(
        self, problem: str, *, expected: str = "", got: str = "", remedy: str = ""
    ) -> None:
        """Join the four parts into one line; empty parts are left out."""
        self.problem, self.expected, self.got, self.remedy = problem, expected, got, remedy
        parts = [problem]
        parts += [f"expected {expected}"] if expected else []
        parts += [f"got {_cut(got)}"] if got else []
        parts += [f"try: {remedy}"] if remedy else []
        super().__init__("; ".join(_one_line(_cut(part, LONGEST_PART)) for part in parts))

    def __reduce__(self) -> tuple[object, ...]:
        """Rebuild with the keyword parts, so that the error crosses process boundaries whole."""
        return _rebuild, (type(self), self.problem, self.expected, self.got, self.remedy)


def _cut(text: str, most: int = LONGEST) -> str:
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"


def _one_line(text: str) -> str:
    """Return text without what a terminal would obey or cannot show."""
    line = " ".join(text.split())
    return line if line.isprintable() else "".join(c if c.isprintable() else "?" for c in line)


def _rebuild(
    kind: type[DitToolsError], problem: str, expected: str, got: str, remedy: str
) -> DitToolsError:
    return kind(problem, expected=expected, got=got, remedy=remedy)


class UnsupportedCall(DitToolsError):
    """A backend or method cannot run this call; the text says why."""


class PlanError(DitToolsError):
    """A plan is malformed, damaged, or made for another model."""


class UnknownMethod(DitToolsError):
    """No method has this name, or it does not take these parameters."""


class AttachError(DitToolsError):
    """Nothing in this pipeline can be accelerated, or attaching failed half-way and was undone."""


class InputError(DitToolsError):
    """A size, prompt, path or option given by the user cannot be used."""
