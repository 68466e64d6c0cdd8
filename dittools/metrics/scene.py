"""The words, colours and caption grammar of the demo model's small world.

One scene is a coloured shape that moves in a straight line over a plain or striped background.
The drawing code, the tokenizer and the checker all read the tables here, so they cannot disagree.
"""

import re
from dataclasses import dataclass

Colour = tuple[float, float, float]

# RGB in 0..1. Objects are bright and backgrounds dark, so a red circle shows on a red background.
OBJECT_COLOURS: dict[str, Colour] = {
    "red": (0.93, 0.16, 0.16),
    "green": (0.20, 0.82, 0.28),
    "blue": (0.22, 0.44, 1.00),
    "yellow": (1.00, 0.87, 0.16),
}
BACKGROUND_COLOURS: dict[str, Colour] = {
    "red": (0.40, 0.10, 0.13),
    "green": (0.08, 0.33, 0.16),
    "blue": (0.08, 0.14, 0.42),
    "yellow": (0.46, 0.38, 0.08),
    "grey": (0.42, 0.42, 0.44),
}
STRIPE_GAINS = (0.70, 1.30)  # the two stripe shades, as multiples of the background colour
SHAPES = ("circle", "square", "triangle")
MOTIONS: dict[str, tuple[int, int]] = {  # (dx, dy); y points down
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
}
TEXTURES = ("plain", "striped")

GENERIC_SHAPE = "shape"  # "a red shape": the shape is left open
ALIASES = {"gray": "grey"}
WORDS: tuple[str, ...] = tuple(
    sorted(
        {"a", "moving", "over", "background", GENERIC_SHAPE, *OBJECT_COLOURS, *BACKGROUND_COLOURS}
        | {*SHAPES, *MOTIONS, *TEXTURES, *ALIASES}
    )
)


@dataclass(frozen=True)
class Scene:
    """What a prompt asks for; None where it says nothing."""

    colour: str | None = None
    shape: str | None = None
    motion: str | None = None
    background: str | None = None
    texture: str | None = None


def caption(scene: Scene) -> str:
    """Return the plainest prompt for a scene, "" when nothing is asked for.

    A background without a texture word is plain, so "plain" is never written.
    """
    words: list[str] = []
    if scene.colour or scene.shape or scene.motion:
        words += ["a", scene.colour or "", scene.shape or GENERIC_SHAPE]
    if scene.motion:
        words += ["moving", scene.motion]
    if scene.background:
        striped = "striped" if scene.texture == "striped" else ""
        words += ["over" if words else "", "a", scene.background, striped, "background"]
    return " ".join(word for word in words if word)


def split_words(prompt: str) -> list[str]:
    """Return the lower-case words of a prompt, punctuation dropped and spellings unified."""
    return [ALIASES.get(word, word) for word in re.findall(r"[^\W_]+", prompt.lower())]


def parse(prompt: str) -> Scene:
    """Read a prompt back into a scene; unknown words are skipped.

    The background phrase is what follows "over", or the whole prompt when it names no object.
    """
    words = split_words(prompt)
    cut = words.index("over") if "over" in words else len(words)
    if cut == len(words) and "background" in words and not {*SHAPES, GENERIC_SHAPE} & {*words}:
        cut = 0
    front, back = words[:cut], words[cut:]
    background = _first(back, BACKGROUND_COLOURS)
    return Scene(
        colour=_first(front, OBJECT_COLOURS),
        shape=_first(front, SHAPES),
        motion=_first(front, MOTIONS),
        background=background,
        texture=_first(back, TEXTURES) or ("plain" if background else None),
    )


def unknown_words(prompt: str) -> list[str]:
    """Return the words the demo model was never taught, in order, each once."""
    return list(dict.fromkeys(word for word in split_words(prompt) if word not in WORDS))


def _first(
    words: list[str], known: tuple[str, ...] | dict[str, Colour] | dict[str, tuple[int, int]]
) -> str | None:
    return next((word for word in words if word in known), None)
