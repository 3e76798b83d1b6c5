"""Sources: spectrum times morphology at a position, or several of them together."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping

import equinox as eqx
import numpy as np
from astropy.coordinates import SkyCoord
from jaxtyping import Array

from scenefit.model.morphology import AbstractMorphology
from scenefit.model.spectrum import AbstractSpectrum, ArraySpectrum
from scenefit.sky import units
from scenefit.sky.frame import Frame


class AbstractSource(eqx.Module):
    """Something that shines: one component or several."""

    @abstractmethod
    def components(self, path: str) -> Iterator[tuple[str, Source]]:
        """Yield the single components with their paths, starting from `path`."""

    @abstractmethod
    def placed(self, frame: Frame) -> AbstractSource:
        """Return the source with sky coordinates turned into positions on the frame."""


class Source(AbstractSource):
    """One component: a spectrum times a morphology.

    Parameters
    ----------
    center : array, shape (2,), or SkyCoord
        Position (y, x) on the model frame, pixels; `Scene` turns a SkyCoord into it.
    spectrum : AbstractSpectrum, array or Quantity, shape (channel,)
        Total flux per channel; an array stands for `ArraySpectrum`.
    morphology : AbstractMorphology
        Normalised to unit total flux.

    Raises
    ------
    ValueError
        If the center isn't one finite position.
    TypeError
        If the morphology isn't one.
    """

    center: np.ndarray | Array | SkyCoord
    spectrum: AbstractSpectrum
    morphology: AbstractMorphology

    def __init__(self, center, spectrum, morphology: AbstractMorphology):
        if isinstance(center, SkyCoord):
            is_position = center.isscalar
        else:
            center = center if isinstance(center, Array) else units.to_pixels(center, "A source's center")
            is_position = center.shape == (2,) and (isinstance(center, Array) or bool(np.isfinite(center).all()))
        if not is_position:
            raise ValueError(f"A source's center is finite (y, x) in model pixels or one SkyCoord; got {center}.")
        if not isinstance(morphology, AbstractMorphology):
            raise TypeError(f"A source wants a morphology such as PointMorphology(); got {morphology!r}.")
        self.center = center
        self.spectrum = spectrum if isinstance(spectrum, AbstractSpectrum) else ArraySpectrum(spectrum)
        self.morphology = morphology

    def components(self, path: str) -> Iterator[tuple[str, Source]]:  # noqa: D102
        yield path, self

    def placed(self, frame):  # noqa: D102
        if not isinstance(self.center, SkyCoord):
            return self
        return Source(frame.to_pixel(self.center), self.spectrum, self.morphology)


class CompositeSource(AbstractSource):
    """A sum of named parts: bulge and disk, host and nucleus.

    Parameters
    ----------
    parts : mapping of str to Source
        At least one. Tie their centers with `Parameters.tie` to move them together.

    Raises
    ------
    ValueError
        If there is no part, or a name isn't one that paths can hold.
    TypeError
        If a part isn't a source.
    """

    parts: dict[str, AbstractSource]

    def __init__(self, parts: Mapping[str, AbstractSource]):
        if not parts:
            raise ValueError("A CompositeSource wants at least one part; got none.")
        self.parts = check_sources(parts)

    def components(self, path: str) -> Iterator[tuple[str, Source]]:  # noqa: D102
        for name, part in self.parts.items():
            yield from part.components(f"{path}.parts.{name}")

    def placed(self, frame):  # noqa: D102
        return CompositeSource({name: part.placed(frame) for name, part in self.parts.items()})


def check_sources(sources: Mapping[str, AbstractSource]) -> dict[str, AbstractSource]:
    """Return named sources as a dict.

    Raises
    ------
    ValueError
        If a name isn't one that paths can hold.
    TypeError
        If they aren't a mapping of names to sources.
    """
    kinds = (
        {n: type(s).__name__ for n, s in sources.items()} if isinstance(sources, Mapping) else type(sources).__name__
    )
    if isinstance(kinds, str) or not all(isinstance(source, AbstractSource) for source in sources.values()):
        raise TypeError(f"Sources are a mapping of names to Source or CompositeSource; got {kinds}.")
    if wrong := [name for name in sources if not isinstance(name, str) or not name or "." in name or "*" in name]:
        raise ValueError(f"Source names are strings without '.' and '*'; got {wrong}.")
    return dict(sources)
