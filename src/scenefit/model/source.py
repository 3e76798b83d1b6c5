"""Sources: spectrum times morphology at a position, or several of them together."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping

import equinox as eqx
import numpy as np
from jaxtyping import Array

from scenefit.model.morphology import AbstractMorphology
from scenefit.model.spectrum import AbstractSpectrum, ArraySpectrum


class AbstractSource(eqx.Module):
    """Something that shines: one component or several."""

    @abstractmethod
    def components(self, path: str) -> Iterator[tuple[str, Source]]:
        """Yield the single components with their paths, starting from `path`."""


class Source(AbstractSource):
    """One component: a spectrum times a morphology.

    Parameters
    ----------
    center : array, shape (2,)
        Position (y, x) on the model frame, pixels. (`Scene.from_sources` and `sf.initialize` also take SkyCoord.)
    spectrum : AbstractSpectrum or array, shape (channel,)
        Total flux per channel; an array stands for `ArraySpectrum`.
    morphology : AbstractMorphology
        Normalised to unit total flux.
    """

    center: np.ndarray | Array
    spectrum: AbstractSpectrum
    morphology: AbstractMorphology

    def __init__(self, center, spectrum, morphology: AbstractMorphology):
        if not isinstance(center, Array):
            center = np.asarray(center, dtype=float)
        if center.shape != (2,):
            raise ValueError(
                f"A source's center is (y, x) in model pixels; got shape {center.shape}. Convert sky coordinates with "
                "frame.to_pixel(SkyCoord)."
            )
        self.center = center
        self.spectrum = spectrum if isinstance(spectrum, AbstractSpectrum) else ArraySpectrum(spectrum)
        self.morphology = morphology

    def components(self, path: str) -> Iterator[tuple[str, Source]]:  # noqa: D102
        yield path, self


class CompositeSource(AbstractSource):
    """A sum of named parts: bulge and disk, host and nucleus.

    Parameters
    ----------
    parts : mapping of str to Source
        At least one. Tie their centers with `Parameters.tie` to move them together.
    """

    parts: dict[str, AbstractSource]

    def __init__(self, parts: Mapping[str, AbstractSource]):
        if not parts:
            raise ValueError("A CompositeSource wants at least one part; got none.")
        self.parts = dict(parts)

    def components(self, path: str) -> Iterator[tuple[str, Source]]:  # noqa: D102
        for name, part in self.parts.items():
            yield from part.components(f"{path}.parts.{name}")
