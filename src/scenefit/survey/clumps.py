"""Unresolved clumps of galaxies: peaks in what smooth profiles leave of an image."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import ndimage

from scenefit.arrays.box import Box
from scenefit.arrays.peaks import find_peaks, refine_peak
from scenefit.data.observation import Observation
from scenefit.infer.fit import FitResult
from scenefit.model.morphology import SersicMorphology, parameter_values
from scenefit.model.scene import Scene
from scenefit.model.source import Source
from scenefit.sky.frame import pixel_map
from scenefit.survey.envelopes import columns, psf_image, solve_nonnegative

CLUMP_ROUNDS, CLUMP_SIGNIFICANCE = 3, 4.0
"""How often clumps are looked for, and the least significance of their peaks."""
CLUMP_REACH, CLUMP_GAP = 4.0, 1.5
"""Half-light radii of its host up to which a clump belongs to it, and widths of the PSF that it is away from all centers."""
MAX_CLUMPS, SOLVE_STEPS = 8, 200
"""Clumps of a source at most; accelerated gradient steps for their light where there are many."""


def find_clumps(result: FitResult, sigma: float) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Find unresolved peaks in what single profiles leave of an image, and solve for their light.

    Returns
    -------
    dict of (array of shape (clump, 2), array of shape (clump,))
        By source: offsets (y, x) from its center in model pixels, and shares in its light.
    """
    (obs,), scene = result.observations, result.scene
    view = _SharpView(obs, scene)
    core = float(obs.psf.effective_sigma.min())
    sources = single_sources(scene)
    hosts = {name: source for name, source in sources.items() if isinstance(source.morphology, SersicMorphology)}
    centers = np.array([source.center for source in sources.values()])
    clumps = _Clumps([], np.zeros((0, 2)), np.zeros((0, 2)), np.zeros(0), np.ones(len(hosts)))
    for _ in range(CLUMP_ROUNDS if hosts else 0):
        smooth, threshold = _smoothed(view.rest(hosts, clumps), core)
        peaks = np.array([refine_peak(smooth, (y, x)) for y, x in find_peaks(smooth, threshold).tolist()])
        if not len(peaks):
            break
        places = pixel_map(obs.wcs, scene.frame.wcs, peaks[:, 0], peaks[:, 1])
        before = len(clumps.hosts)
        for pixel, place in zip(peaks, places, strict=True):
            away = np.hypot(*(centers - place).T).min()
            apart = np.hypot(*(clumps.places - place).T).min(initial=np.inf)
            if away < CLUMP_GAP * sigma or apart < CLUMP_GAP * sigma:
                continue
            reach = {name: _radii_away(source, place) for name, source in hosts.items()}
            host = min(reach, key=reach.__getitem__)
            if reach[host] < CLUMP_REACH and clumps.hosts.count(host) < MAX_CLUMPS:
                clumps = clumps.added(host, pixel, place)
        if len(clumps.hosts) == before:
            break
        clumps = view.solved(hosts, clumps)
    return {name: _of_source(name, scene, hosts, clumps) for name in scene.sources}


def single_sources(scene: Scene) -> dict[str, Source]:
    """Return the sources of a scene of which each is one component."""
    return {name: source for name, source in scene.sources.items() if isinstance(source, Source)}


class _Clumps(NamedTuple):
    """Clumps so far: hosts, pixels (y, x) of the image, places on the frame, light; and the scales of all hosts' profiles."""

    hosts: list[str]
    pixels: np.ndarray
    places: np.ndarray
    light: np.ndarray
    scales: np.ndarray

    def added(self, host: str, pixel: np.ndarray, place: np.ndarray) -> _Clumps:
        """Return one more, without light."""
        pixels, places = (np.concatenate([a, b[None]]) for a, b in ((self.pixels, pixel), (self.places, place)))
        return _Clumps([*self.hosts, host], pixels, places, np.append(self.light, 0.0), self.scales)


class _SharpView:
    """An image, the mean of its channels, with what profiles and points look like on it."""

    def __init__(self, obs: Observation, scene: Scene):
        weight = 1 / obs.noise.level() ** 2
        self.obs, self.scene, self.share = obs, scene, weight / weight.sum()
        self.seen = obs.compared.all(axis=0)
        self.psf, self.area = psf_image(obs, np.eye(2)), Box((obs.shape[1], obs.shape[2]))
        self.data = self._mean(np.where(self.seen, obs.data - obs.render(scene), 0.0))
        self.profiles: dict[str, np.ndarray] = {}

    def _mean(self, planes):
        return np.einsum("c,cyx->yx", self.share, planes)

    def profile(self, name: str) -> np.ndarray:
        """Return the image of a source's profile."""
        if name not in self.profiles:
            alone = self.obs.render(self.scene.evaluate([name])) - self.obs.background_image()
            self.profiles[name] = self._mean(alone)
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
        names = list(hosts)
        used = [n for n, name in enumerate(names) if name in clumps.hosts]
        whole = slice(None), slice(None)
        profiles = [(whole, self.profile(names[n])) for n in used]
        design = columns(self.data.shape, profiles + [self.point(pixel) for pixel in clumps.pixels])
        data = np.where(self.seen, self.data + sum(image for _, image in profiles), np.nan)
        solution = solve_nonnegative(design, data, np.zeros(design.shape[1]), SOLVE_STEPS)
        scales, light = np.ones(len(names)), solution[len(used) :]
        scales[used] = solution[: len(used)]
        kept = light > 0
        left = [host for host, keep in zip(clumps.hosts, kept, strict=True) if keep]
        return _Clumps(left, clumps.pixels[kept], clumps.places[kept], light[kept], scales)


def _of_source(name: str, scene: Scene, hosts, clumps: _Clumps) -> tuple[np.ndarray, np.ndarray]:
    """Return the offsets of the clumps of a source, and their shares in its light."""
    own = np.array([host == name for host in clumps.hosts], bool)
    if not own.any():
        return np.zeros((0, 2)), np.zeros(0)
    source = single_sources(scene)[name]
    smooth = clumps.scales[list(hosts).index(name)] * float(np.mean(source.spectrum.flux))
    return clumps.places[own] - source.center, clumps.light[own] / (smooth + clumps.light[own].sum())


def _radii_away(source: Source, place: np.ndarray) -> float:
    """Return how far a place is from a source, in half-light radii of its ellipse."""
    shape = parameter_values(source.morphology)
    (y, x), (e1, e2) = place - source.center, shape["ellipticity"]
    squared = ((1 + e1) * y**2 - 2 * e2 * x * y + (1 - e1) * x**2) / np.sqrt(1 - e1**2 - e2**2)
    return float(np.sqrt(max(squared, 0.0)) / shape["half_light_radius"])


def _smoothed(image: np.ndarray, core: float) -> tuple[np.ndarray, float]:
    """Return an image smoothed with the core of the PSF, and its scatter times the significance wanted."""
    seen = np.isfinite(image).astype(float)
    norm = ndimage.gaussian_filter(seen, core, mode="constant")
    smooth = ndimage.gaussian_filter(np.nan_to_num(image), core, mode="constant") / np.maximum(norm, 0.5)
    valid = norm > 0.9
    scatter = 1.4826 * np.median(np.abs(smooth[valid] - np.median(smooth[valid])))
    return np.where(valid, smooth, 0.0), CLUMP_SIGNIFICANCE * scatter
