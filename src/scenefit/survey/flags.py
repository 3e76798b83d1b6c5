"""The flags of catalogues and of forced photometry, in one place: the code raises them, the table and the guide list them."""

from __future__ import annotations

import enum

MASKED_FRACTION = 0.2
"""Fraction of a source's light on pixels without information above which `Flag.MASKED` is raised."""
SIGNIFICANT = 3.0
"""Standard errors below zero beyond which `Flag.NEGATIVE` is raised, and above it that the blendedness of a flux counts from."""
LARGEST_CORRELATION, LARGEST_BLENDEDNESS = 0.95, 0.9
"""Correlation of the flux with that of another source, and blendedness, beyond which `Flag.BLENDED` is raised.

At the first the error is three times what it would be if the other flux were known. At the second, an error of 1 % in the
profiles of neighbours becomes one of 9 % in the flux.
"""


class Flag(enum.IntFlag):
    """What a user of a catalogue row should know; bits of the column `flags`. Each member's docstring says when it is raised."""

    def __new__(cls, value: int, meaning: str):  # noqa: D102
        flag = int.__new__(cls, value)
        flag._value_ = value
        flag.__doc__ = meaning
        return flag

    EDGE = 1, "The source's stamp reaches the edge of the model frame."
    NO_DATA = 2, "At least one channel has no valid pixel: its flux is NaN, its error infinite."
    NOT_CONVERGED = 4, "The fit ended before it met its tolerance."
    ZERO_FLUX = 8, "The flux is zero or less in at least one channel that has data."
    VANISHED = 16, "No light is left in any channel: shape and position mean nothing."
    AT_BOUND = 32, "A shape parameter is at the end of its range, such as the largest Sersic index: it isn't measured."
    MASKED = (
        64,
        "In some channel that has data elsewhere, more than 20 % of the light lies on pixels without information: masked, "
        "saturated (if the masks or weights handed in say so) or beyond the image. The model fills them in.",
    )
    NEGATIVE = 128, "A flux that isn't kept positive is more than 3 standard errors below zero."
    BLENDED = (
        256,
        "The division of the light rests on the model: in some channel the flux has a correlation beyond 0.95 with that of "
        "another source, or the blendedness is above 0.9 where the flux is more than 3 standard errors.",
    )


def flag_table() -> str:
    """Return the flags as a table in Markdown, as it stands in the guide."""
    rows = [f"| `{flag.name}` | {flag.value} | {flag.__doc__} |" for flag in Flag]
    return "\n".join(["| flag | bit | meaning |", "|---|---|---|", *rows])


class PhotometryFlag(enum.IntFlag):
    """What a user of a row of forced photometry should know; bits of the column `flags`."""

    PARTIAL = 1
    """Less than nine tenths of the source's flux fall on pixels with information."""
    NO_DATA = 2
    """No pixel has information about the source: its flux is NaN, its error infinite."""
    CONFUSED = 4
    """The data don't tell the source from another one at the same place: its error is infinite. Only the sum is known."""
    NOT_CONVERGED = 8
    """Noise that isn't Gaussian: the weights of the pixels were still changing."""
