"""Images of single sources in the pixels of every observation, and what the data show of them."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import equinox as eqx
import numpy as np

from scenefit.arrays.box import Box
from scenefit.arrays.progress import with_progress
from scenefit.data.observation import Observation
from scenefit.infer.fit import FitResult
from scenefit.infer.footprints import covered_pixels, disjoint_colors
from scenefit.model.scene import Scene
from scenefit.sky.frame import Frame


class Cutout(eqx.Module):
    """The image of a source in an observation, where it isn't zero.

    Attributes
    ----------
    box : Box
        Which pixels of the observation; empty if the source is elsewhere.
    image : array, shape (channel, h, w)
        In the units of the data, without background.
    """

    box: Box
    image: np.ndarray


class Deblended(eqx.Module):
    """The sources of a scene apart from one another, in every observation.

    Attributes
    ----------
    observations : dict of Observation
        By name; matched to the scene's frame.
    cutouts : dict of dict of Cutout
        By name of the observation, then by name of the source.
    residuals : dict of array, shape (channel, y, x)
        Data minus the whole model, background included; NaN on pixels without information and off the frame.
    """

    observations: dict[str, Observation]
    cutouts: dict[str, dict[str, Cutout]]
    residuals: dict[str, np.ndarray]

    def image(self, source: str, observation: str) -> np.ndarray:
        """Return the model of one source alone, as the observation sees it.

        Returns
        -------
        array, shape (channel, y, x)
            In the units of the data; PSF, offsets and flux scale of the observation included, no background.

        Raises
        ------
        KeyError
            If there is no such source or observation.
        """
        cutout = self._cutout(source, observation)
        image = np.zeros(self.residuals[observation].shape)
        image[(slice(None), *cutout.box.slices)] = cutout.image
        return image

    def without_others(self, source: str, observation: str) -> np.ndarray:
        """Return the data minus all other sources and the background.

        Returns
        -------
        array, shape (channel, y, x)
            In the units of the data, with their noise; NaN on pixels without information and off the frame.

        Raises
        ------
        KeyError
            If there is no such source or observation.
        """
        return self.image(source, observation) + self.residuals[observation]

    def images(self, observation: str) -> Iterator[tuple[str, np.ndarray]]:
        """Yield the name of every source and its `image`, one at a time: all together may be large.

        Raises
        ------
        KeyError
            If there is no such observation.
        """
        for name in self._of(observation):
            yield name, self.image(name, observation)

    def _of(self, observation: str) -> dict[str, Cutout]:
        """Return the cutouts of an observation."""
        if observation not in self.cutouts:
            raise KeyError(f"There is no observation {observation!r}; there are {list(self.cutouts)}.")
        return self.cutouts[observation]

    def _cutout(self, source: str, observation: str) -> Cutout:
        """Return the cutout of a source in an observation."""
        known = self._of(observation)
        if source not in known:
            raise KeyError(f"The deblended sources are {list(known)}; {source!r} isn't among them.")
        return known[source]


def deblend(
    fitted: FitResult | Scene,
    observations: Sequence[Observation] | Observation | None = None,
    names: Sequence[str] | None = None,
    *,
    progress: bool = True,
) -> Deblended:
    """Return the image of every source of a fit in every observation, and the data minus all other sources.

    Sources that are apart in an observation are rendered together, so that the time depends on how crowded a field is rather than
    on how many sources it has. The images of all sources and the background add up to `Observation.render` of the scene.

    Parameters
    ----------
    fitted : FitResult or Scene
    observations : Observation or sequence of Observation, optional
        Those of the fit by default; needed with a scene.
    names : sequence of str, optional
        Names of sources; all of them by default.
    progress : bool
        Whether to show a progress bar on standard error if it takes more than two seconds.

    Returns
    -------
    Deblended

    Raises
    ------
    KeyError
        If the scene has no source of a name.
    TypeError
        If `fitted` is neither a fit nor a scene.
    ValueError
        If a scene is given without observations, or names of observations repeat.
    """
    if not isinstance(fitted, FitResult | Scene):
        raise TypeError(f"deblend wants a FitResult, or a Scene and observations; got a {type(fitted).__name__}.")
    scene = fitted.scene if isinstance(fitted, FitResult) else fitted
    if observations is None:
        if isinstance(fitted, Scene):
            raise ValueError("deblend(scene) wants observations, too: deblend(scene, observations).")
        observations = fitted.observations
    observations = [observations] if isinstance(observations, Observation) else list(observations)
    names = list(scene.sources) if names is None else list(names)
    if unknown := [name for name in names if name not in scene.sources]:
        raise KeyError(f"The scene has no source {unknown}; it has {list(scene.sources)}.")
    seen = [obs.name for obs in observations]
    if repeated := sorted({name for name in seen if seen.count(name) > 1}):
        raise ValueError(f"Observation names must be distinct; {', '.join(map(repr, repeated))} repeat(s).")
    matched = {obs.name: obs.match(scene.frame) if obs.renderer is None else obs for obs in observations}
    images = unit_images(scene, list(scene.sources), scene.stamps())
    model = total_image(scene.frame, [(each.box, each.light) for each in images.values()])
    chosen = {name: images[name] for name in names}
    cutouts = {name: source_cutouts(scene, obs, chosen, progress) for name, obs in matched.items()}
    residuals = {name: np.where(obs.compared, obs.data - obs.render(model), np.nan) for name, obs in matched.items()}
    return Deblended(matched, cutouts, residuals)


class UnitImage(eqx.Module):
    """A source on the model frame, every channel in units of its own.

    Attributes
    ----------
    box : Box
    image : array, shape (channel, h, w)
        Convolved with the model PSF; the largest component of the source has a sum of about 1 in it, whatever its flux.
    unit : array, shape (channel,)
        What the image is to be multiplied with.
    """

    box: Box
    image: np.ndarray
    unit: np.ndarray

    @property
    def light(self) -> np.ndarray:
        """Flux per pixel, shape (channel, h, w)."""
        return self.image * self.unit[:, None, None]


def unit_images(
    scene: Scene, names: Sequence[str], stamps: Mapping[str, tuple[Box, np.ndarray]]
) -> dict[str, UnitImage]:
    """Return sources on the model frame, by name; `stamps` are `Scene.stamps`."""
    channels, found = scene.frame.channels, {}
    for name in names:
        components = dict(scene.sources[name].components(f"sources.{name}"))
        fluxes = {path: np.asarray(each.spectrum.evaluate(channels), float) for path, each in components.items()}
        unit = np.max(np.abs(list(fluxes.values())), axis=0)
        unit = np.where(unit > 0, unit, 1.0) if len(fluxes) > 1 else next(iter(fluxes.values()))
        box = functools.reduce(Box.union, (stamps[path][0] for path in components))
        image = np.zeros((len(channels), *box.shape))
        for path, flux in fluxes.items():
            own, stamp = stamps[path]
            share = flux / unit if len(fluxes) > 1 else np.ones(len(channels))
            place = own.shift((-box.origin[0], -box.origin[1]))
            image[(slice(None), *place.slices)] += share[:, None, None] * stamp
        found[name] = UnitImage(box, image, unit)
    return found


def total_image(frame: Frame, images: Iterable[tuple[Box, np.ndarray]]) -> np.ndarray:
    """Return the sum of images, shape (channel, h, w), of boxes on a frame and its margin."""
    total = np.zeros((len(frame.channels), *frame.outer_box.shape))
    for box, image in images:
        total[(slice(None), *box.shift(frame.inner_box.origin).slices)] += image
    return total


def source_cutouts(
    scene: Scene,
    obs: Observation,
    images: Mapping[str, UnitImage],
    progress: bool = False,
    *,
    in_units: bool = False,
) -> dict[str, Cutout]:
    """Return the images of sources in a matched observation, by name.

    Parameters
    ----------
    scene : Scene
    obs : Observation
    images : dict of UnitImage
        `unit_images` of the sources.
    progress : bool
        Whether to show a progress bar if it takes more than two seconds.
    in_units : bool
        Whether images are left in units of `UnitImage.unit`, so that those of sources without flux have a shape, too.
    """
    if not images:
        return {}
    names, renderer, frame = list(images), obs.matched_renderer, scene.frame
    windows = covered_pixels([images[name].box for name in names], frame, obs)
    colors = disjoint_colors(windows)
    background, cutouts = obs.background_image(), {}
    channels, first = np.array(renderer.channels), renderer.window.origin
    for color in with_progress(list(np.unique(colors)), f"sources in {obs.name}", progress):
        members = np.nonzero(colors == color)[0]
        model = total_image(frame, [(images[names[n]].box, images[names[n]].image) for n in members])
        rendered = obs.render(model) - background
        for n in members:
            y0, y1, x0, x1 = (int(end) for end in windows[n])
            box = Box((y1 - y0, x1 - x0), (y0 + first[0], x0 + first[1]))
            unit = np.ones(len(channels)) if in_units else images[names[n]].unit[channels]
            cutouts[names[n]] = Cutout(box, rendered[(slice(None), *box.slices)] * unit[:, None, None])
    return {name: cutouts[name] for name in names}
