"""The flags of catalogues and of forced photometry, in one place: the code raises them, the table and the guide list them."""

from __future__ import annotations

import enum
from collections.abc import Mapping

import numpy as np

from scenefit.infer.fit import FitResult
from scenefit.model.morphology import AbstractImageMorphology, parameter_values
from scenefit.model.parameters import IMAGES
from scenefit.model.source import Source
from scenefit.sky.frame import Frame

BOUND_MARGIN, SMALLEST_RADIUS = 0.01, 1e-3
"""A parameter is at the end of its range within this fraction of it; one with a lower bound alone (a radius, in pixels) within
this distance."""
MASKED_FRACTION = 0.2
"""Fraction of a source's light on pixels without information above which `Flag.MASKED` is raised."""
LIGHT_BEYOND = 0.01
"""Fraction of a source's light beyond the model frame above which `Flag.EDGE` is raised; half of it is beyond some stamps."""
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

    EDGE = (
        1,
        "More than 1 % of the light of the source's profiles lies beyond the model frame, or its stamp of pixels ends there.",
    )
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


def catalog_flags(result: FitResult, stamps, flux, error, blendedness, correlation, masked_fraction) -> np.ndarray:
    """Return the flags of every source of a matched fit.

    Parameters
    ----------
    result : FitResult
    stamps : dict of (Box, array)
        `Scene.stamps`.
    flux, error, blendedness : arrays, shape (source, channel)
    correlation, masked_fraction : arrays, shape (source,)
    """
    flags = np.zeros(len(flux), int)
    for n, (name, source) in enumerate(result.scene.sources.items()):
        components = dict(source.components(f"sources.{name}"))
        if _reaches_edge(components, stamps, result.scene.frame):
            flags[n] |= Flag.EDGE
        if any(_is_at_bound(part, path, result) for path, part in components.items()):
            flags[n] |= Flag.AT_BOUND
    flags[~np.isfinite(flux).all(axis=1)] |= Flag.NO_DATA
    flags[(np.isfinite(flux) & (flux <= 0)).any(axis=1)] |= Flag.ZERO_FLUX
    flags[~(np.nan_to_num(flux) > 0).any(axis=1)] |= Flag.VANISHED
    flags[masked_fraction > MASKED_FRACTION] |= Flag.MASKED
    flags[(flux < -SIGNIFICANT * error).any(axis=1)] |= Flag.NEGATIVE
    is_drowned = (blendedness > LARGEST_BLENDEDNESS) & (flux > SIGNIFICANT * error)
    flags[(correlation > LARGEST_CORRELATION) | is_drowned.any(axis=1)] |= Flag.BLENDED
    if not result.is_converged:
        flags |= Flag.NOT_CONVERGED
    return flags


def _is_at_bound(component, path, result: FitResult) -> bool:
    """Return whether a free shape parameter is at the end of its range, or a radius has gone to nothing."""
    for name, value in parameter_values(component.morphology).items():
        parameter = result.parameters.table[f"{path}.morphology.{name}"]
        if not parameter.free or name in (*IMAGES, "amplitudes", "fractions"):
            continue
        low = getattr(parameter.constraint, "lower_bound", -np.inf)
        high = getattr(parameter.constraint, "upper_bound", np.inf)
        margin = BOUND_MARGIN * (high - low) if np.isfinite(high - low) else SMALLEST_RADIUS
        if np.any(np.asarray(value) < low + margin) or np.any(np.asarray(value) > high - margin):
            return True
    return False


def _reaches_edge(components: Mapping[str, Source], stamps, frame: Frame) -> bool:
    """Return whether light of a source is lost beyond the frame, or may be: its free pixels end there."""
    inner, lost, total = frame.box.grow(-1), 0.0, 0.0
    for path, part in components.items():
        box, image = stamps[path]
        if isinstance(part.morphology, AbstractImageMorphology) and inner.intersection(box).shape != box.shape:
            return True
        flux = np.abs(np.asarray(part.spectrum.evaluate(frame.channels), float))
        seen = image[(slice(None), *box.intersection(frame.box).shift((-box.origin[0], -box.origin[1])).slices)]
        lost, total = lost + np.sum(flux * (1 - seen.sum(axis=(1, 2)))), total + flux.sum()
    return bool(lost > LIGHT_BEYOND * total)
