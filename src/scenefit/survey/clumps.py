"""Unresolved clumps of galaxies: peaks in what smooth profiles leave of an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from scenefit.arrays.box import Box
from scenefit.arrays.peaks import find_peaks, refine_peak
from scenefit.arrays.profiles import sersic_b
from scenefit.infer.fit import FitResult
from scenefit.model.morphology import SersicMorphology, parameter_values
from scenefit.model.scene import Scene
from scenefit.model.source import Source
from scenefit.sky.frame import pixel_map
from scenefit.survey.deblend import deblend
from scenefit.survey.envelopes import channel_shares, columns, psf_image, solve_nonnegative

CLUMP_ROUNDS, CLUMP_SIGNIFICANCE = 4, 4.0
"""How often clumps are looked for, and the least significance of their peaks."""
CLUMP_REACH, CLUMP_GAP = 5.0, 1.5
"""Half-light radii of its host up to which a clump belongs to it, and widths of the PSF that it is away from all centers."""
CLUMP_SHARE = 0.02, 0.7
"""Share of a clump in the light of its host: median, and width in the logarithm."""
MAX_CLUMPS, SOLVE_STEPS, SHARING_STEPS = 24, 200, 50
"""Clumps of a source at most; accelerated gradient steps for their light where there are many; steps for their hosts."""


def find_clumps(result: FitResult, sigma: float) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Find unresolved peaks in what single profiles leave of an image, and solve for their light.

    Returns
    -------
    dict of (array of shape (clump, 2), array of shape (clump,))
        By source: offsets (y, x) from its center in model pixels, and shares in its light.
    """
    (obs,), scene = result.observations, result.scene
    view = _SharpView(result)
    core = float(obs.psf.effective_sigma.min())
    sources = single_sources(scene)
    hosts = {name: source for name, source in sources.items() if isinstance(source.morphology, SersicMorphology)}
    centers = np.array([source.center for source in sources.values()])
    clumps = _Clumps(np.zeros((0, 2)), np.zeros((0, 2)), np.zeros(0), np.ones(len(hosts)))
    for _ in range(CLUMP_ROUNDS if hosts else 0):
        smooth, threshold = _smoothed(view.rest(hosts, clumps), core)
        peaks = np.array([refine_peak(smooth, (y, x)) for y, x in find_peaks(smooth, threshold).tolist()])
        if not len(peaks):
            break
        places = pixel_map(obs.wcs, scene.frame.wcs, peaks[:, 0], peaks[:, 1])
        known = len(clumps.light)
        for pixel, place in zip(peaks, places, strict=True):
            away = np.hypot(*(np.concatenate([centers, clumps.places]) - place).T).min()
            within = min(_radii_away(source, place[None])[0] for source in hosts.values())
            if away > CLUMP_GAP * sigma and within < CLUMP_REACH:
                clumps = clumps.added(pixel, place)
        if len(clumps.light) == known:
            break
        clumps = view.solved(hosts, clumps)
    host = clump_hosts(list(hosts.values()), clumps.places, clumps.light)
    return {name: _of_source(name, scene, hosts, clumps, host) for name in scene.sources}


def clump_hosts(sources: Sequence[Source], places: np.ndarray, light: np.ndarray) -> np.ndarray:
    """Return which source each clump belongs to, shape (clump,).

    Clumps are taken to be strewn over their host as the light of an exponential disk is, each with a few percent of its light,
    and some galaxies to have many, others none: how many each has and whose a clump is are found in turns, by expectation and
    maximisation (Dempster, Laird & Rubin 1977, J. R. Stat. Soc. B 39, 1).

    Parameters
    ----------
    sources : sequence of Source
        With Sersic profiles, of one channel or more.
    places : array, shape (clump, 2)
        (y, x) on the frame.
    light : array, shape (clump,)
        Mean flux over the channels.
    """
    if not len(light):
        return np.zeros(0, int)
    away = np.stack([_radii_away(source, places) for source in sources], axis=-1)
    areas = np.array([float(parameter_values(source.morphology)["half_light_radius"]) ** 2 for source in sources])
    # A source may have faded to nothing.
    fluxes = np.maximum([float(np.mean(source.spectrum.flux)) for source in sources], 1e-6 * light.min())
    shares = np.log(light[:, None] / fluxes / CLUMP_SHARE[0]) / CLUMP_SHARE[1]
    density = np.where(away < CLUMP_REACH, np.exp(-sersic_b(1.0) * away - 0.5 * shares**2), 0.0) / areas
    counts, chance = np.ones(len(sources)), density
    for _ in range(SHARING_STEPS):
        chance = counts * density
        chance /= np.maximum(chance.sum(axis=1, keepdims=True), 1e-300)
        counts = chance.sum(axis=0)
    return np.argmax(chance, axis=1)


def single_sources(scene: Scene) -> dict[str, Source]:
    """Return the sources of a scene of which each is one component."""
    return {name: source for name, source in scene.sources.items() if isinstance(source, Source)}


class _Clumps(NamedTuple):
    """Clumps so far: pixels (y, x) of the image, places on the frame, light; and the scales of all hosts' profiles."""

    pixels: np.ndarray
    places: np.ndarray
    light: np.ndarray
    scales: np.ndarray

    def added(self, pixel: np.ndarray, place: np.ndarray) -> _Clumps:
        """Return one more, without light."""
        pixels, places = (np.concatenate([a, b[None]]) for a, b in ((self.pixels, pixel), (self.places, place)))
        return _Clumps(pixels, places, np.append(self.light, 0.0), self.scales)


class _SharpView:
    """An image, the mean of its channels, with what profiles and points look like on it."""

    def __init__(self, result: FitResult):
        (obs,) = result.observations
        self.name, self.share, self.deblended = obs.name, channel_shares(obs), deblend(result, progress=False)
        self.seen = obs.compared[self.share > 0].all(axis=0)
        self.psf, self.area = psf_image(obs, np.eye(2)), Box((obs.shape[1], obs.shape[2]))
        self.data = self._mean(np.where(self.seen & obs.compared, self.deblended.residuals[obs.name], 0.0))
        self.profiles: dict[str, np.ndarray] = {}

    def _mean(self, planes):
        return np.einsum("c,cyx->yx", self.share, planes)

    def profile(self, name: str) -> np.ndarray:
        """Return the image of a source's profile."""
        if name not in self.profiles:
            self.profiles[name] = self._mean(self.deblended.image(name, self.name))
        return self.profiles[name]

    def point(self, pixel: np.ndarray) -> tuple[tuple[slice, slice], np.ndarray]:
        """Return the window of a point of unit flux, and its image there."""
        half = self.psf.shape[0] // 2
        box = Box.around(tuple(pixel), half - 1).intersection(self.area)
        y, x = np.mgrid[box.slices]
        return box.slices, ndimage.map_coordinates(self.psf, [y - pixel[0] + half, x - pixel[1] + half], order=3)

    def rest(self, hosts, clumps: _Clumps) -> np.ndarray:
        """Return what profiles and clumps leave of the data; NaN where there are none."""
        rest = self.data.copy()
        for name, scale in zip(hosts, clumps.scales, strict=True):
            if scale != 1:
                rest += (1 - scale) * self.profile(name)
        for pixel, light in zip(clumps.pixels, clumps.light, strict=True):
            window, image = self.point(pixel)
            rest[window] -= light * image
        return np.where(self.seen, rest, np.nan)

    def solved(self, hosts, clumps: _Clumps) -> _Clumps:
        """Return the clumps that have light, with what fits best, and the scales of their hosts' profiles."""
        whole = slice(None), slice(None)
        profiles = [(whole, self.profile(name)) for name in hosts]
        design = columns(self.data.shape, profiles + [self.point(pixel) for pixel in clumps.pixels])
        data = np.where(self.seen, self.data + sum(image for _, image in profiles), np.nan)
        solution = solve_nonnegative(design, data, np.zeros(design.shape[1]), SOLVE_STEPS)
        scales, light = solution[: len(hosts)], solution[len(hosts) :]
        kept = light > 0
        return _Clumps(clumps.pixels[kept], clumps.places[kept], light[kept], scales)


def _of_source(name: str, scene: Scene, hosts, clumps: _Clumps, host: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the offsets of the clumps of a source, the brightest first, and their shares in its light."""
    if name not in hosts:
        return np.zeros((0, 2)), np.zeros(0)
    number, source = list(hosts).index(name), hosts[name]
    own = np.flatnonzero(host == number)
    own = own[np.argsort(-clumps.light[own])][:MAX_CLUMPS]
    total = clumps.scales[number] * float(np.mean(source.spectrum.flux)) + clumps.light[own].sum()
    return clumps.places[own] - source.center, clumps.light[own] / max(total, 1e-30)


def _radii_away(source: Source, places: np.ndarray) -> np.ndarray:
    """Return how far places (n, 2) are from a source, in half-light radii of its ellipse."""
    shape = parameter_values(source.morphology)
    (y, x), (e1, e2) = (places - source.center).T, shape["ellipticity"]
    squared = ((1 + e1) * y**2 - 2 * e2 * x * y + (1 - e1) * x**2) / np.sqrt(1 - e1**2 - e2**2)
    return np.sqrt(np.maximum(squared, 0.0)) / float(shape["half_light_radius"])


def _smoothed(image: np.ndarray, core: float) -> tuple[np.ndarray, float]:
    """Return an image smoothed with the core of the PSF, and its scatter times the significance wanted."""
    seen = np.isfinite(image).astype(float)
    norm = ndimage.gaussian_filter(seen, core, mode="constant")
    smooth = ndimage.gaussian_filter(np.nan_to_num(image), core, mode="constant") / np.maximum(norm, 0.5)
    valid = norm > 0.9
    scatter = 1.4826 * np.median(np.abs(smooth[valid] - np.median(smooth[valid])))
    return np.where(valid, smooth, 0.0), CLUMP_SIGNIFICANCE * scatter
