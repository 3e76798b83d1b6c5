"""Detection of sources in all observations together."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.sparse
from astropy.coordinates import SkyCoord
from astropy.table import QTable, Table
from jax import Array
from photutils.segmentation import detect_sources
from photutils.utils.exceptions import NoDetectionsWarning

from scenefit.arrays.peaks import keep_apart
from scenefit.arrays.progress import with_progress
from scenefit.data.observation import Observation
from scenefit.model.scene import Scene
from scenefit.sky.frame import Frame, is_same_frame
from scenefit.survey.candidates import (
    CLUMP_REACH,
    Candidate,
    Host,
    Sorted,
    candidate_at,
    first_candidates,
    further_candidates,
    host_of,
    is_doubled,
    nearest_radius,
    one_at_a_time,
    sort_out,
)
from scenefit.survey.detections import (
    Detections,
    clump_table,
    flux_columns,
    known_table,
    length_unit,
    place_columns,
)
from scenefit.survey.envelopes import psf_width
from scenefit.survey.listed import catalog_positions, usable_rows
from scenefit.survey.search import Entry, Search, flux_information, search_in
from scenefit.survey.significance import Layer
from scenefit.survey.subtraction import RingShape, fit_fluxes, fit_shapes, middles, templates

THRESHOLD = 5.0
"""Significance from which on a peak counts, if no other is asked for."""
SCALES = (0.0, 1.25, 2.5, 5.0)
"""Standard deviations of sources that are looked for, in units of that of the sharpest PSF; the last smooths clumps of galaxies
away."""
MODEL_ERROR = 0.08
"""Error of a model of detected sources, as a fraction of its light, that counts as noise in what it leaves."""
MATCH_RADIUS = 2.355
"""Distance within which a row of a catalogue is a detection, in standard deviations of the sharpest PSF."""
MAX_MOVE = 0.5
"""Model pixels along each axis by which a point is moved at once."""
SETTLED = 0.3
"""Widths of the sharpest PSF by which none may have moved for a model of all sources to hold."""
TRIALS = 2
"""Rounds of doubtful candidates near one host that are tried at a look."""
FOOTPRINT_SIGMA, FOOTPRINT_PIXELS = 2.0, 5
"""Significance (of smoothed light) and number of pixels of which footprints are made."""


def detect(
    observations: Sequence[Observation] | Observation,
    frame: Frame,
    *,
    threshold: float = THRESHOLD,
    scales: Sequence[float] = SCALES,
    catalog: SkyCoord | np.ndarray | Table | None = None,
    scene: Scene | None = None,
    iterate: int = 2,
    progress: bool = True,
) -> Detections:
    """Find the sources that observations of any pixel scale, PSF, depth and noise show together.

    Every observation is filtered with its own PSF, in its own pixels and with its own noise, whatever its correlation and mask.
    What it says of the flux of a source at each pixel of the frame is added, for points and Gaussians of some sizes. The sharpest
    observations at each place come first: peaks of the largest scale next to their surroundings are sources. These are modelled
    (see `initialize`), with the fluxes that fit all observations best, moved to their middles, and subtracted; then peaks of all
    scales are looked for in what is left, first of the sharpest observations, then of all.

    An unresolved peak within 3 half-light radii of a brighter source, with less than 5 % of its flux, is a clump of it. So are
    resolved ones within one half-light radius, with less than 10 % when both are modelled together; they aren't recorded.

    Parameters
    ----------
    observations : sequence of Observation
        Matched or not.
    frame : Frame
    threshold : float
        Significance from which on a peak counts, positive.
    scales : sequence of float
        Standard deviations of the Gaussians that are looked for, in units of that of the sharpest PSF, increasing; 0 for a point.
    catalog : SkyCoord, array of shape (n, 2) or Table, optional
        Known sources, which are listed whether they are detected or not: positions on the sky, (y, x) on the frame, or a table
        with columns RA and DEC [deg] in any case.
    scene : Scene, optional
        Sources that are subtracted first, such as the scene of a fit: what is found beside them is returned.
    iterate : int
        How often to model what was found and look at what is left.
    progress : bool
        Whether to show a progress bar on standard error if it takes more than two seconds.

    Returns
    -------
    Detections
        Without rows if there is nothing.

    Raises
    ------
    TypeError
        If something else than observations, a frame or a scene is given.
    ValueError
        If there is no observation, an option is out of range, channels are missing in the frame, the scene is on another frame,
        or rows of the catalogue have no finite position.

    Warns
    -----
    UserWarning
        Of rows of the catalogue that lie outside the frame, or within half a standard deviation of the sharpest PSF of one before
        them: they are left out.

    Notes
    -----
    Pixels of one observation that are sharper than its PSF are left out: see `survey.outliers`. Fluxes of channels are added as
    those of a source of constant flux density.
    """
    observations = _checked(observations, frame, threshold, scales, scene, iterate)
    observations = [obs.match(frame) for obs in observations]
    positions = np.zeros((0, 2)) if catalog is None else catalog_positions(frame, catalog)
    rows = usable_rows(frame, positions, min(psf_width(frame, obs) for obs in observations)).tolist()
    centers = positions[rows]
    search, outliers = search_in(frame, observations, np.asarray(scales, dtype=float), threshold, scene)
    layer = search.layers[0]
    numerator = search.sky.chosen(layer, search.planes)
    sources = [
        Entry(candidate_at(search.sky, layer, numerator, center), row, False)
        for center, row in zip(centers, rows, strict=True)
    ]
    first = first_candidates(search.sky, layer, numerator, _spread(search, layer, search.scene_planes), threshold)
    new, _, clumps = sort_out(first, [host for _, host in search.known], search.sky.widths[0])
    sources, fit = _settled(search, _with_new(search, sources, new), None)
    for turn in with_progress(range(iterate), "detect", progress):
        new, doubtful, clumps = _further(search, sources, fit, resolved_only=turn < iterate - 1)
        if doubtful:
            new += _separate(search, _with_new(search, sources, new), doubtful, fit)
        if new:
            sources, fit = _settled(search, _with_new(search, sources, new), fit)
    sources, parts = _without_parts(search, sources, fit)
    clumps = clumps + parts
    return _detections(search, sources, clumps, fit, outliers)


class Fit(NamedTuple):
    """Models of the sources: `fluxes` (source, channel) in units of the sky, `planes` of what they leave."""

    shapes: list[RingShape]
    images: scipy.sparse.csr_matrix
    fluxes: np.ndarray
    information: np.ndarray
    pulls: list[Array]
    planes: np.ndarray


def _checked(observations, frame, threshold, scales, scene, iterate) -> list[Observation]:
    """Return the observations as a list if they and the options can be used."""
    observations = [observations] if isinstance(observations, Observation) else list(observations)
    if wrong := [obs for obs in observations if not isinstance(obs, Observation)]:
        raise TypeError(f"detect wants Observations; got {wrong[0]!r}.")
    if not observations:
        raise ValueError("detect wants at least one observation; got none.")
    if not isinstance(frame, Frame):
        raise TypeError(f"detect wants a Frame; got a {type(frame).__name__}. Frame.from_observations makes one.")
    if not 0 < threshold < np.inf:
        raise ValueError(f"threshold is the positive significance of a peak that counts; got {threshold!r}.")
    values = np.asarray(scales, dtype=float)
    if (
        values.ndim != 1
        or not len(values)
        or not (np.isfinite(values).all() and values[0] >= 0)
        or (np.diff(values) <= 0).any()
    ):
        raise ValueError(
            f"scales are increasing widths in units of the sharpest PSF's, the first 0 or more; got {scales!r}."
        )
    if iterate < 0:
        raise ValueError(f"iterate is how often to look again, 0 or more; got {iterate!r}.")
    if scene is not None and not isinstance(scene, Scene):
        raise TypeError(f"scene= wants a Scene; got a {type(scene).__name__}. A FitResult has one: result.scene.")
    if scene is not None and not is_same_frame(scene.frame, frame):
        raise ValueError("scene= lies on another frame than the one given: use scene.frame.")
    return observations


def _spread(search: Search, layer: Layer, lit: np.ndarray) -> np.ndarray:
    """Return the error of the numerators of all sizes that comes from imperfect models, of which `lit` is the light."""
    return MODEL_ERROR * np.abs(search.sky.chosen(layer, lit))


def _with_new(search: Search, sources: list[Entry], new: Sequence[Candidate]) -> list[Entry]:
    """Return the sources with new ones; those at the place of a row of the catalogue stand for it."""
    sources = list(sources)
    radius = MATCH_RADIUS * search.sky.widths[0]
    for candidate in new:
        places = np.array([source.candidate.position for source in sources]).reshape(-1, 2)
        waiting = np.array([source.row >= 0 and not source.is_detected for source in sources], dtype=bool)
        distance = np.where(waiting, np.hypot(*(places - candidate.position).T), np.inf)
        if len(sources) and distance.min() < radius:
            number = int(distance.argmin())
            sources[number] = Entry(candidate, sources[number].row, True)
        else:
            sources.append(Entry(candidate, -1, True))
    return sources


def _fit(search: Search, sources: Sequence[Entry], before: Fit | None) -> Fit:
    """Return models of the sources; the fluxes of those before are where the search for new ones begins."""
    sky, frame = search.sky, search.frame
    positions = np.array([source.candidate.position for source in sources]).reshape(-1, 2)
    sizes = np.array([max(sky.sizes[source.candidate.scale], 0.5 * sky.widths[0]) for source in sources])
    is_compact = np.array([source.candidate.is_compact for source in sources], dtype=bool)
    shapes = fit_shapes(search.image, sky.widths[0], positions, sizes, is_compact)
    images = templates(frame, positions, shapes)
    known = np.zeros((len(sources), len(frame.channels)))
    nearest = np.clip(np.rint(positions).astype(int), 0, np.array(sky.shape) - 1)
    for row, place, shape in zip(known, nearest, shapes, strict=True):
        row += flux_information(sky, place, shape).sum(axis=0)
    known = np.where(known > 1e-6 * sky.depth.sum(axis=0), known, 0.0)
    start = np.zeros(known.shape)
    if before is not None:
        start[: len(before.fluxes)] = before.fluxes
    fluxes, pulls = fit_fluxes(sky, frame, images, known, search.pulls, start)
    return Fit(shapes, images, fluxes, known, pulls, sky.coadded(pulls))


def _settled(search: Search, sources: Sequence[Entry], before: Fit | None) -> tuple[list[Entry], Fit]:
    """Return the sources where a first model of all finds them to be, and a model of all there."""
    fit = _fit(search, sources, before)
    moved = _recentered(search, sources, fit)
    steps = [new.candidate.position - old.candidate.position for new, old in zip(moved, sources, strict=True)]
    if np.abs(steps).max(initial=0.0) > SETTLED * search.sky.widths[0]:
        fit = _fit(search, moved, fit)
    return moved, fit


def _recentered(search: Search, sources: Sequence[Entry], fit: Fit) -> list[Entry]:
    """Return the sources, points moved to where the gradient that their models leave is zero, others to their middles.

    For a PSF of variance v, the displacement is the slope of the numerator over that of the source itself, times 2 v. It matters
    for bright stars, whose rims are bright even if they are misplaced by little.
    """
    sky, layer = search.sky, search.layers[0]
    left = sky.chosen(layer, fit.planes)[0]
    positions = np.array([source.candidate.position for source in sources]).reshape(-1, 2)
    centers = middles(search.image, sky.widths[0], positions, fit.shapes, fit.images)
    steps, result = np.eye(2, dtype=int), []
    for source, flux, center in zip(sources, fit.fluxes, centers, strict=True):
        candidate = source.candidate
        place = np.clip(np.rint(candidate.position).astype(int), 1, np.array(sky.shape) - 2)
        own = layer.information[(0, *place)] * sky.brightness(flux)[0]
        if source.is_detected and candidate.is_compact and own > 0:
            slope = np.array([left[tuple(place + step)] - left[tuple(place - step)] for step in steps]) / 2
            move = np.clip(2 * layer.psf_sigma[tuple(place)] ** 2 * slope / own, -MAX_MOVE, MAX_MOVE)
            moved = np.clip(candidate.position + move, 0, np.array(sky.shape) - 1)
            source = source._replace(candidate=candidate._replace(position=moved))
        elif source.is_detected and not candidate.is_compact:
            source = source._replace(candidate=candidate._replace(position=center))
        result.append(source)
    return result


def _hosts(search: Search, sources: Sequence[Entry], fit: Fit) -> list[Host]:
    """Return the sources, and then those that were subtracted, as hosts."""
    hosts = [
        Host(source.candidate.position, shape.radius(0.5), search.sky.brightness(flux))
        for source, shape, flux in zip(sources, fit.shapes, fit.fluxes, strict=True)
    ]
    return hosts + [host for _, host in search.known]


def _separate(search: Search, sources: list[Entry], doubtful: Sequence[Candidate], before: Fit) -> list[Candidate]:
    """Return which doubtful candidates are sources of their own: a model of all gives them their light back to see.

    Those near the same host are tried one after another, the most significant ones first.
    """
    width, hosts = search.sky.widths[0], _hosts(search, sources[: len(before.fluxes)], before)
    waiting = sorted(doubtful, key=lambda each: -each.significance)
    places = np.array([candidate.position for candidate in waiting])
    radii = np.array([CLUMP_REACH * nearest_radius(place, hosts, width) for place in places])
    separate: list[Candidate] = []
    rest = np.arange(len(waiting))
    for _ in range(TRIALS):
        if not len(rest):
            break
        chosen = rest[keep_apart(places[rest], radii[rest])]
        rest = np.setdiff1d(rest, chosen)
        trial = _with_new(search, sources, [*separate, *(waiting[n] for n in chosen)])
        hosts = _hosts(search, trial, _fit(search, trial, before))
        numbers = {id(source.candidate): n for n, source in enumerate(trial)}
        separate += [waiting[n] for n in chosen if host_of(numbers[id(waiting[n])], hosts, width) is None]
    return separate


def _without_parts(
    search: Search, sources: Sequence[Entry], fit: Fit
) -> tuple[list[Entry], list[tuple[Candidate, int]]]:
    """Return the sources, those that turn out to be parts of others no longer detected, and which of these are clumps."""
    hosts, width = _hosts(search, sources, fit), search.sky.widths[0]
    sources, clumps = list(sources), []
    for number, source in enumerate(sources):
        host = host_of(number, hosts, width) if source.row < 0 else None
        if host is not None:
            sources[number] = source._replace(is_detected=False)
            if not source.candidate.is_resolved:
                clumps.append((source.candidate, host))
    return sources, clumps


def _further(search: Search, sources: Sequence[Entry], fit: Fit, *, resolved_only: bool) -> Sorted:
    """Return what is seen in what models leave; hosts of clumps are counted among the sources and known ones."""
    sky = search.sky
    hosts = _hosts(search, sources, fit)
    lit = search.planes - fit.planes + search.scene_planes
    new, doubtful, clumps = [], [], []
    for number, layer in enumerate(search.layers):
        width = sky.widths[0] if number == 0 else sky.widths[-1]
        found = further_candidates(
            sky,
            layer,
            sky.chosen(layer, fit.planes),
            _spread(search, layer, lit),
            search.threshold,
            faint=number == len(search.layers) - 1,
        )
        if resolved_only:
            found = [candidate for candidate in found if candidate.is_resolved]
        found = one_at_a_time(sky, found)
        others = [Host(candidate.position, 0.0, (candidate.flux,)) for candidate in new]
        its = sort_out(found, hosts + others, width, number)
        new += [candidate._replace(layer=number) for candidate in its.sources]
        doubtful += its.doubtful
        clumps += its.clumps
    return Sorted(new, doubtful, clumps)


def _detections(search: Search, sources, clumps, fit: Fit, outliers) -> Detections:
    """Return the result: what is significant by itself, and what the catalogue has."""
    sky, frame = search.sky, search.frame
    own = [_own_significance(search, *each) for each in zip(sources, fit.shapes, fit.fluxes, strict=True)]
    significance = np.array([each for each, _ in own])
    is_shown = np.array([source.is_detected for source in sources], dtype=bool)
    is_shown &= np.array([min(each) >= search.threshold for each in own], dtype=bool)
    is_listed = np.array([source.row >= 0 for source in sources], dtype=bool)
    places = np.array([source.candidate.position for source in sources]).reshape(-1, 2)
    radii = np.array([shape.radius(0.5) for shape in fit.shapes])
    is_shown &= is_listed | ~is_doubled(places, radii, np.where(is_shown, significance, -np.inf))
    order = np.flatnonzero(is_shown | is_listed)
    order = order[np.lexsort((-significance[order], ~is_shown[order]))]
    positions = places[order]
    scale = length_unit(frame)
    table = QTable({"id": np.arange(len(order)).astype(str), **place_columns(frame, positions)})
    table["significance"] = significance[order]
    known = fit.information[order]
    fluxes = np.where(known > 0, fit.fluxes[order], np.nan) * sky.unit
    errors = np.where(known > 0, 1 / np.sqrt(np.where(known > 0, known, 1.0)), np.inf) * sky.unit
    for name, column in flux_columns(frame, fluxes, errors, search.unit).items():
        table[name] = column
    table["half_light_radius"] = radii[order] * scale
    table["scale"] = np.array([sky.sizes[sources[n].candidate.scale] for n in order]) * scale
    table["is_compact"] = np.array([sources[n].candidate.is_compact for n in order], dtype=bool)
    origin = np.where(is_listed, np.where(is_shown, "both", "catalog"), "detected")
    table["origin"] = origin[order].astype("U8")
    table["catalog_row"] = np.array([sources[n].row for n in order], dtype=int)
    names = {int(n): str(rank) for rank, n in enumerate(order)}
    names |= {len(sources) + n: name for n, (name, _) in enumerate(search.known)}
    lights = np.array([host.flux[host.group] for host in _hosts(search, sources, fit)])
    layer = search.layers[-1]
    return Detections(
        frame=frame,
        positions=positions,
        table=table,
        significance=sky.significance(layer, sky.chosen(layer, search.planes), 0),
        segmentation=_segmentation(search, fit, order),
        clumps=clump_table(frame, [(c, n) for c, n in clumps if n in names], names, lights),
        known=known_table(frame, search.known),
        outliers=outliers,
    )


def _own_significance(search: Search, source: Entry, shape: RingShape, flux: np.ndarray) -> tuple[float, float]:
    """Return how significant the flux of a source is, its neighbours subtracted: in all, and in those that it was found in."""
    sky, layer = search.sky, search.layers[0]
    place = np.clip(np.rint(source.candidate.position).astype(int), 0, np.array(sky.shape) - 1)
    known = np.stack([sky.weights**2 * each for each in flux_information(sky, place, shape)])
    sharp = 0 if layer.group is None else int(layer.group[tuple(place)])
    found_in = known[sharp] if source.candidate.layer == 0 else known.sum(axis=0)
    result = []
    for each in known.sum(axis=0), found_in:
        total = float(each.sum())
        result.append(float((each * flux / sky.weights).sum() / np.sqrt(total)) if total > 0 else 0.0)
    return result[0], result[1]


def _segmentation(search: Search, fit: Fit, order: np.ndarray) -> np.ndarray:
    """Return which source, counted from 1, is the brightest at each pixel where there is significant light."""
    sky, layer = search.sky, search.layers[0]
    scale = min(1, sky.num_scales - 1)
    image = sky.significance(layer, sky.chosen(layer, search.planes), scale)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoDetectionsWarning)
        footprints = detect_sources(image, FOOTPRINT_SIGMA, FOOTPRINT_PIXELS)
    labels, brightest = np.zeros(sky.shape, dtype=int), np.zeros(sky.shape).ravel()
    flat = labels.ravel()
    for label, number in enumerate(order, start=1):
        start, stop = fit.images.indptr[number : number + 2]
        pixels = fit.images.indices[start:stop]
        light = fit.images.data[start:stop] * max(sky.brightness(fit.fluxes[number])[0], 0.0)
        wins = light > brightest[pixels]
        flat[pixels[wins]] = label
        brightest[pixels[wins]] = light[wins]
    return np.where(footprints.data > 0, labels, 0) if footprints is not None else np.zeros_like(labels)
