"""Scenes: sources on a frame."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import equinox as eqx
import numpy as np

from scenefit.arrays.box import Box
from scenefit.arrays.compilation import as_floats, compiled
from scenefit.model.packing import Stack, evaluate_stacks, member_stamps, model_psf_sigma, pack
from scenefit.model.source import AbstractSource, Source, check_sources
from scenefit.sky.frame import Frame


class Scene(eqx.Module):
    """Named sources on a model frame. Knows how to evaluate itself, nothing about data or fitting.

    Parameters
    ----------
    frame : Frame
    sources : mapping of name to source, or sequence of sources
        A sequence is named "0", "1", ... Names must not contain a dot or a star. Centers given as SkyCoord are
        turned into positions on the frame.

    Raises
    ------
    ValueError
        If a name isn't one that paths can hold, or a center is a SkyCoord and the frame has no WCS.
    TypeError
        If a source or the frame isn't one.
    """

    frame: Frame
    sources: dict[str, AbstractSource]

    def __init__(self, frame: Frame, sources: Mapping[str, AbstractSource] | Sequence[AbstractSource]):
        if not isinstance(frame, Frame):
            raise TypeError(f"A Scene lies on a Frame; got a {type(frame).__name__}.")
        self.frame = frame
        if isinstance(sources, Sequence):
            sources = {str(n): source for n, source in enumerate(sources)}
        self.sources = {name: source.placed(frame) for name, source in check_sources(sources).items()}

    def components(self) -> Iterator[tuple[str, Source]]:
        """Yield every component with its path, in order."""
        for name, source in self.sources.items():
            yield from source.components(f"sources.{name}")

    def ties(self) -> Iterator[tuple[str, str]]:
        """Yield pairs of paths of parameters that belong together: the second always equals the first."""
        for name, source in self.sources.items():
            yield from source.ties(f"sources.{name}")

    def evaluate(self, names: Sequence[str] | None = None, *, outer: bool = False) -> np.ndarray:
        """Evaluate the scene, or only the sources named, on the frame, or on it and its margin (`outer`: `Frame.outer_box`).

        Returns
        -------
        array, shape (channel, y, x)
            Flux per model pixel, convolved with the model PSF.
        """
        sources = self.sources if names is None else {name: self.sources[name] for name in names}
        components = [c for name, source in sources.items() for c in source.components(f"sources.{name}")]
        box = self.frame.outer_box if outer else self.frame.box
        if not components:
            return np.zeros((len(self.frame.channels), *box.shape))
        fluxes = [np.abs(np.asarray(c.spectrum.evaluate(self.frame.channels), float)) for _, c in components]
        unit = np.max(fluxes, axis=0)
        unit = np.where(unit > 0, unit, 1.0)
        stacks, _ = pack(self.frame, components, unit)
        psf_sigma = as_floats(model_psf_sigma(self.frame))
        canvas = _evaluate(stacks, psf_sigma, (len(self.frame.channels), *self.frame.fft_shape))
        seen = box.shift(self.frame.inner_box.origin)
        return np.asarray(canvas)[(slice(None), *seen.slices)].astype(float) * unit[:, None, None]

    def stamps(self) -> dict[str, tuple[Box, np.ndarray]]:
        """Evaluate the morphology of every component on its own stamp, by path.

        Returns
        -------
        dict of (Box, array of shape (plane, h, w))
            The stamp on the frame and its margin, and the flux per pixel, convolved with the model PSF, of a component of unit
            flux: in one plane for all channels, or in one for each.
        """
        stacks, members = pack(self.frame, list(self.components()))
        psf_sigma = as_floats(model_psf_sigma(self.frame))
        return member_stamps(members, [_stamps(stack, psf_sigma) for stack in stacks])

    def with_sources(self, **sources: AbstractSource) -> Scene:
        """Return a scene with sources added or replaced."""
        return Scene(self.frame, {**self.sources, **sources})

    def without(self, *names: str) -> Scene:
        """Return a scene without the sources named."""
        unknown = [name for name in names if name not in self.sources]
        if unknown:
            raise KeyError(f"The scene has no source {unknown}; it has {list(self.sources)}.")
        return Scene(self.frame, {name: s for name, s in self.sources.items() if name not in names})


_evaluate = compiled(evaluate_stacks)
_stamps = compiled(Stack.stamps)
