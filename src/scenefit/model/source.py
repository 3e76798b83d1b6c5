"""Sources: spectrum times morphology at a position, or several of them together."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping

import equinox as eqx
import numpy as np
import numpyro.distributions as dist
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
    def ties(self, path: str) -> Iterator[tuple[str, str]]:
        """Yield pairs of paths of parameters, starting from `path`: the second always equals the first."""

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
    priors : mapping of str to numpyro distribution, optional
        What is known of its parameters beforehand, by path within the source, such as "morphology.sersic_index" or
        "spectrum.flux": of each element, in the parameter's unit. `Parameters.default` begins with them.

    Raises
    ------
    ValueError
        If the center isn't one finite position, or there is no parameter that a prior could be of.
    TypeError
        If the morphology isn't one, or a prior isn't a distribution.
    """

    center: np.ndarray | Array | SkyCoord
    spectrum: AbstractSpectrum
    morphology: AbstractMorphology
    priors: dict[str, dist.Distribution]

    def __init__(
        self,
        center,
        spectrum,
        morphology: AbstractMorphology,
        priors: Mapping[str, dist.Distribution] | None = None,
    ):
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
        self.priors = dict(priors or {})
        known = ["center", "spectrum.flux", *(f"morphology.{name}" for name in morphology.constraints)]
        if unknown := sorted(set(self.priors) - set(known)):
            raise ValueError(f"Priors of a source are of {', '.join(known)}; got {', '.join(map(repr, unknown))}.")
        for path, prior in self.priors.items():
            if not isinstance(prior, dist.Distribution):
                raise TypeError(f"The prior of {path} is a distribution from numpyro.distributions; got {prior!r}.")

    def replace(self, **changes) -> Source:
        """Return a copy with some attributes changed."""
        fields = {name: getattr(self, name) for name in ("center", "spectrum", "morphology", "priors")}
        return Source(**{**fields, **changes})

    def components(self, path: str) -> Iterator[tuple[str, Source]]:  # noqa: D102
        yield path, self

    def ties(self, path: str) -> Iterator[tuple[str, str]]:  # noqa: D102
        yield from ()

    def placed(self, frame):  # noqa: D102
        if not isinstance(self.center, SkyCoord):
            return self
        return self.replace(center=frame.to_pixel(self.center))


class CompositeSource(AbstractSource):
    """A sum of named parts: bulge and disk, host and nucleus.

    Parameters
    ----------
    parts : mapping of str to Source
        At least one.
    concentric : bool
        Whether all parts share the center of the first. (Other parameters are tied with `Parameters.tie`.)

    Raises
    ------
    ValueError
        If there is no part, or a name isn't one that paths can hold.
    TypeError
        If a part isn't a source.
    """

    parts: dict[str, AbstractSource]
    concentric: bool = eqx.field(static=True)

    def __init__(self, parts: Mapping[str, AbstractSource], *, concentric: bool = False):
        if not parts:
            raise ValueError("A CompositeSource wants at least one part; got none.")
        self.parts = check_sources(parts)
        self.concentric = bool(concentric)

    def with_parts(self, parts: Mapping[str, AbstractSource]) -> CompositeSource:
        """Return a source of other parts that belong together in the same way."""
        return CompositeSource(parts, concentric=self.concentric)

    def components(self, path: str) -> Iterator[tuple[str, Source]]:  # noqa: D102
        for name, part in self.parts.items():
            yield from part.components(f"{path}.parts.{name}")

    def ties(self, path: str) -> Iterator[tuple[str, str]]:  # noqa: D102
        for name, part in self.parts.items():
            yield from part.ties(f"{path}.parts.{name}")
        if self.concentric:
            first, *others = (name for name, _ in self.components(path))
            yield from ((f"{first}.center", f"{other}.center") for other in others)

    def placed(self, frame):  # noqa: D102
        return self.with_parts({name: part.placed(frame) for name, part in self.parts.items()})


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
