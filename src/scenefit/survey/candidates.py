"""Candidates: peaks of the significance at any scale, and which of them are sources, clumps of their hosts, or neither."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from scenefit.arrays.peaks import climb, find_peaks, keep_apart, refine_peak
from scenefit.survey.significance import Layer, Sky

HALF_LIGHT = 1.1774
"""Half-light radius of a round Gaussian in standard deviations."""
CORE = 2.5
"""PSF standard deviations from a source within which what is left of it is its own."""
CLUMP_REACH, CLUMP_FRACTION = 3.0, 0.05
"""Half-light radii from a brighter source, PSF included, within which an unresolved peak with less than this fraction of its flux
is a clump; up to twice as far with less in proportion to the distance."""
STRUCTURE_REACH, STRUCTURE_FRACTION = 1.0, 0.1
"""The same for peaks that are resolved, which are arms, asymmetries and the like."""
RESIDUE_FRACTION = 0.02
"""What counts in place of `CLUMP_FRACTION` for other resolved peaks: no profile or PSF is known better."""
UNRESOLVED = 1.0
"""Half-light radius, in standard deviations of the sharpest PSF, below which a model is that of a clump."""
LEAST_CONTRAST = 0.7
"""Part of the threshold that the contrast of a peak must reach; the rest of a point's significance is in its surroundings."""
RESOLVED = 0.85
"""A peak is resolved if its significance at some larger scale exceeds this part of that at the two smallest."""
APART = 3.0
"""Resolved sources are accepted together if they are farther apart than this, in units of the largest scale."""
SAME = 0.7
"""Two sources nearer to each other than this part of the smaller half-light radius are one."""
NEAR = 1.5
"""Model pixels within which a peak is looked for at its best scale, next to its surroundings: hosts move it elsewhere."""


class Candidate(NamedTuple):
    """A peak: where, at which scale it is most significant, how much, its size and flux, and the layer that shows it."""

    position: np.ndarray
    scale: int
    significance: float
    is_compact: bool
    is_resolved: bool
    flux: float
    layer: int = 0


class Host(NamedTuple):
    """A source that peaks may belong to: half-light radius in model pixels without PSF, flux as a candidate's in each layer."""

    position: np.ndarray
    radius: float
    flux: tuple[float, ...]

    @property
    def group(self) -> int:
        """The flux that counts: that of the sharpest observations, or of all where those have no data."""
        return 0 if self.flux[0] != 0 else -1


def first_candidates(sky: Sky, layer: Layer, numerator: np.ndarray, spread: np.ndarray, threshold: float):
    """Return the peaks of the contrast at the largest scale, where small structure is smoothed away, highest first."""
    scale = sky.num_scales - 1
    image = sky.contrast(layer, numerator, scale, spread[scale])
    return _candidates(sky, layer, numerator, spread, [(scale, image, place) for place in find_peaks(image, threshold)])


def further_candidates(
    sky: Sky, layer: Layer, numerator: np.ndarray, spread: np.ndarray, threshold: float, *, faint: bool
) -> list[Candidate]:
    """Return the peaks of the contrast at all scales, most significant first, each thing once.

    If `faint`, also those of the significance alone where the contrast is nearly as large as it must be.
    """
    peaks = []
    for scale in range(sky.num_scales):
        contrast = sky.contrast(layer, numerator, scale, spread[scale])
        alone = sky.significance(layer, numerator, scale, spread[scale])
        alone = np.where(contrast > LEAST_CONTRAST * threshold, alone, 0.0)
        for image in (contrast, alone) if faint else (contrast,):
            peaks += [(scale, image, place) for place in find_peaks(image, threshold)]
    peaks.sort(key=lambda each: -each[1][tuple(each[2])])
    if not peaks:
        return []
    places = np.array([place for _, _, place in peaks], dtype=float)
    widths = layer.psf_sigma[tuple(np.array([place for _, _, place in peaks]).T)]
    radii = np.array(
        [np.hypot(sky.sizes[scale], CORE * width) for (scale, _, _), width in zip(peaks, widths, strict=True)]
    )
    return _candidates(sky, layer, numerator, spread, [peaks[n] for n in keep_apart(places, radii)])


def one_at_a_time(sky: Sky, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates without resolved ones next to more significant resolved ones, of which they may be a part."""
    resolved = [candidate for candidate in candidates if candidate.is_resolved]
    places = np.array([candidate.position for candidate in resolved]).reshape(-1, 2)
    kept = keep_apart(places, np.full(len(places), APART * sky.sizes[sky.num_scales - 1]))
    return [resolved[number] for number in kept] + [each for each in candidates if not each.is_resolved]


def candidate_at(sky: Sky, layer: Layer, numerator: np.ndarray, position: np.ndarray) -> Candidate:
    """Return what is seen at a given position as a candidate."""
    place = np.clip(np.rint(position).astype(int), 0, np.array(sky.shape) - 1)
    at = tuple(place)
    profile = np.array([sky.significance(layer, numerator, s)[at] for s in range(sky.num_scales)])
    fluxes = np.array([sky.flux(layer, numerator, s)[at] for s in range(sky.num_scales)])
    return _described(sky, np.asarray(position, dtype=float), profile, fluxes, -np.inf)


def _described(sky: Sky, position: np.ndarray, profile: np.ndarray, fluxes: np.ndarray, height: float) -> Candidate:
    """Return a candidate from its significance and flux at all scales, and how much its peak stands out."""
    best = int(np.argmax(profile))
    small, large = profile[:2].max(), profile[2:].max(initial=-np.inf)
    return Candidate(
        position=position,
        scale=best,
        significance=max(height, float(profile[best])),
        is_compact=best == 0 and sky.sizes[0] < 0.5 * sky.widths[0],
        is_resolved=bool(large > RESOLVED * small),
        flux=float(fluxes[best]),
    )


def _candidates(sky: Sky, layer: Layer, numerator: np.ndarray, spread: np.ndarray, peaks) -> list[Candidate]:
    """Return the peaks with what is known of them."""
    if not peaks:
        return []
    scales = range(sky.num_scales)
    planes = np.stack([sky.significance(layer, numerator, s, spread[s]) for s in scales])
    bare = np.stack([sky.significance(layer, numerator, s) for s in scales])
    contrasts = np.stack([sky.contrast(layer, numerator, s, spread[s]) for s in scales])
    fluxes = np.stack([sky.flux(layer, numerator, s) for s in scales])
    result = []
    for current, image, found in peaks:
        place = int(found[0]), int(found[1])
        height = float(image[place])
        while current > 0:
            finer = climb(planes[current - 1], place, 0.5 * float(sky.sizes[current]))
            if planes[(current - 1, *finer)] < planes[(current, *place)]:
                break
            current, place = current - 1, finer
        best = int(np.argmax(bare[(slice(None), *place)]))
        place = climb(contrasts[best], place, NEAR)
        at = (slice(None), *place)
        result.append(_described(sky, refine_peak(contrasts[best], place), bare[at], fluxes[at], height))
    return result


class Sorted(NamedTuple):
    """Candidates that are sources, that may be, and that are clumps, with the numbers of their hosts."""

    sources: list[Candidate]
    doubtful: list[Candidate]
    clumps: list[tuple[Candidate, int]]


def sort_out(candidates: Sequence[Candidate], hosts: Sequence[Host], psf_sigma: float, number: int = 0) -> Sorted:
    """Return what candidates are.

    Resolved ones that look like a part of a host are doubtful: what its model took of their light has to be known to tell
    (`host_of`).

    Parameters
    ----------
    candidates : sequence of Candidate
    hosts : sequence of Host
    psf_sigma : float
        Standard deviation in model pixels of the broadest PSF that the candidates may have been seen with.
    number : int
        Of the layer they were found in. In any but the first, sizes say too little to tell structure of a host from sources.
    """
    if not hosts:
        return Sorted(list(candidates), [], [])
    fluxes = np.maximum([host.flux[min(number, len(host.flux) - 1)] for host in hosts], 1e-30)
    sources, doubtful, clumps = [], [], []
    for candidate in candidates:
        distance, radii = _away(candidate.position, hosts, psf_sigma)
        reach, fraction = distance / radii, candidate.flux / fluxes
        if (distance < CORE * psf_sigma).any():
            continue
        is_clump = _is_clump(reach, fraction)
        if number > 0:
            if is_clump.any():
                continue
        elif candidate.is_resolved:
            if _is_structure(reach, fraction).any():
                doubtful.append(candidate)
                continue
        elif is_clump.any():
            clumps.append((candidate, int(np.argmin(np.where(is_clump, reach, np.inf)))))
            continue
        sources.append(candidate)
    return Sorted(sources, doubtful, clumps)


def host_of(number: int, hosts: Sequence[Host], psf_sigma: float) -> int | None:
    """Return of which host another one of them is a part, by what one model of all has of its light; None if of none."""
    part = hosts[number]
    distance, radii = _away(part.position, hosts, psf_sigma)
    reach = distance / radii
    fraction = part.flux[part.group] / np.maximum([host.flux[part.group] for host in hosts], 1e-30)
    is_part = _is_clump(reach, fraction) if part.radius < UNRESOLVED * psf_sigma else _is_structure(reach, fraction)
    is_part[number] = False
    return int(np.argmin(np.where(is_part, reach, np.inf))) if is_part.any() else None


def nearest_radius(position: np.ndarray, hosts: Sequence[Host], psf_sigma: float) -> float:
    """Return the half-light radius, PSF included, of the host that a position is the fewest of them away from."""
    distance, radii = _away(position, hosts, psf_sigma)
    return float(radii[np.argmin(distance / radii)])


def _away(position: np.ndarray, hosts: Sequence[Host], psf_sigma: float) -> tuple[np.ndarray, np.ndarray]:
    """Return how far hosts are, and their half-light radii, PSF included."""
    distance = np.hypot(*(np.array([host.position for host in hosts]) - position).T)
    return distance, np.hypot([host.radius for host in hosts], HALF_LIGHT * psf_sigma)


def _is_clump(reach: np.ndarray, fraction: np.ndarray) -> np.ndarray:
    """Return of which hosts something unresolved is a part."""
    return (reach < 2 * CLUMP_REACH) & (fraction * np.maximum(reach / CLUMP_REACH, 1.0) < CLUMP_FRACTION)


def _is_structure(reach: np.ndarray, fraction: np.ndarray) -> np.ndarray:
    """Return of which hosts something resolved is a part."""
    is_inside = (reach < STRUCTURE_REACH) & (fraction < STRUCTURE_FRACTION)
    return is_inside | ((reach < CLUMP_REACH) & (fraction < RESIDUE_FRACTION))


def is_doubled(positions: np.ndarray, radii: np.ndarray, significance: np.ndarray) -> np.ndarray:
    """Return which sources are well inside a more significant one that is as wide: parts of one thing."""
    distance = np.hypot(*(positions[:, None] - positions).transpose(2, 0, 1))
    is_inside = distance < SAME * np.minimum(radii[:, None], radii)
    return (is_inside & (significance > significance[:, None])).any(axis=1)
