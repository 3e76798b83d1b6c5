"""Detection of sources in all observations together."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import astropy.units as u
import equinox as eqx
import numpy as np
import scipy.sparse
from astropy.coordinates import SkyCoord
from astropy.table import QTable, Table
from jax import Array
from photutils.segmentation import detect_sources
from photutils.utils.exceptions import NoDetectionsWarning

from scenefit.arrays.progress import with_progress
from scenefit.data.observation import Observation
from scenefit.model.scene import Scene
from scenefit.sky.frame import Frame, is_same_frame
from scenefit.survey.candidates import (
    HALF_LIGHT,
    Candidate,
    Host,
    candidate_at,
    first_candidates,
    further_candidates,
    one_at_a_time,
    sort_out,
)
from scenefit.survey.detections import Detections, flux_columns, length_unit, place_columns
from scenefit.survey.envelopes import psf_width
from scenefit.survey.listed import catalog_positions, usable_rows
from scenefit.survey.outliers import without_outliers
from scenefit.survey.significance import ALIKE, Layer, Sky
from scenefit.survey.subtraction import RingShape, fit_fluxes, fit_shapes, sharp_image, templates

SCALES = (0.0, 1.25, 2.5, 5.0)
"""Standard deviations of sources that are looked for, in units of that of the sharpest PSF; the last smooths clumps of galaxies
away."""
MODEL_ERROR = 0.08
"""Error of a model of detected sources, as a fraction of its light, that counts as noise in what it leaves."""
MATCH_RADIUS = 2.355
"""Distance within which a row of a catalogue is a detection, in standard deviations of the sharpest PSF."""
MAX_MOVE = 0.5
"""Model pixels along each axis by which a point is moved at once."""
SAME = 0.7
"""Two sources nearer to each other than this part of the smaller half-light radius are one."""
FOOTPRINT_SIGMA, FOOTPRINT_PIXELS = 2.0, 5
"""Significance (of smoothed light) and number of pixels of which footprints are made."""


class Entry(NamedTuple):
    """A source so far: a candidate, its row in the catalogue (-1: none), and whether the data show it."""

    candidate: Candidate
    row: int
    is_detected: bool


def detect(
    observations: Sequence[Observation] | Observation,
    frame: Frame,
    *,
    threshold: float = 5.0,
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
    (see `initialize`), with the fluxes that fit all observations best, and subtracted; then peaks of all scales are looked for
    in what is left, first of the sharpest observations, then of all.

    An unresolved peak within 3 half-light radii of a brighter source, with less than 5 % of its flux, is a clump of it. So are
    resolved ones within one half-light radius, with less than 10 %; they aren't recorded.

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
    search, outliers = _search(frame, observations, np.asarray(scales, dtype=float), threshold, scene)
    layer = search.layers[0]
    numerator = search.sky.chosen(layer, search.planes)
    sources = [
        Entry(candidate_at(search.sky, layer, numerator, center), row, False)
        for center, row in zip(centers, rows, strict=True)
    ]
    first = first_candidates(search.sky, layer, numerator, _spread(search, layer, search.scene_planes), threshold)
    new, clumps = sort_out(first, [host for _, host in search.known], search.sky.widths[0])
    sources = _with_new(search, sources, new)
    fit = _fit(search, sources, None)
    for turn in with_progress(range(iterate), "detect", progress):
        new, clumps = _further(search, sources, fit, resolved_only=turn < iterate - 1)
        if new:
            sources = _with_new(search, _recentered(search, sources, fit), new)
            fit = _fit(search, sources, fit)
    sources = _recentered(search, sources, fit)
    return _detections(search, sources, clumps, fit, outliers)


class Search(NamedTuple):
    """What does not change from one look to the next: `pulls` and `planes` of the data, `image` of the sharpest observations."""

    sky: Sky
    frame: Frame
    layers: list[Layer]
    pulls: list[Array]
    planes: np.ndarray
    scene_planes: np.ndarray
    image: np.ndarray
    known: list[tuple[str, Host]]
    threshold: float
    unit: u.UnitBase


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


def _search(frame: Frame, observations, scales, threshold, scene) -> tuple[Search, dict[str, np.ndarray]]:
    """Return what to search in, and the pixels of each observation that are left out."""
    model = None if scene is None else scene.evaluate()
    residuals, outliers, cleaned = [], {}, []
    for obs in observations:
        sky = obs.background_image()
        known = sky if model is None else obs.render(model)
        residual = np.where(obs.noise.valid, obs.data - known, 0.0)
        residual, outliers[obs.name] = without_outliers(obs, residual)
        residuals.append(residual)
        cleaned.append(eqx.tree_at(lambda o: o.data, obs, residual + sky))
    sky = Sky.build(frame, observations, residuals, scales)
    pulls = sky.pull(np.zeros(frame.shape))
    planes, scene_planes = sky.coadded(pulls), np.zeros((len(sky.groups), len(sky.sizes), *sky.shape))
    if model is not None:
        scene_planes = planes - sky.coadded(sky.pull(model))
    widths = np.array([psf_width(frame, obs) for obs in observations])
    search = Search(
        sky=sky,
        frame=frame,
        layers=sky.layers(),
        pulls=pulls,
        planes=planes,
        scene_planes=scene_planes,
        image=sharp_image(frame, cleaned, widths, ALIKE),
        known=[] if scene is None else _known(sky, scene),
        threshold=threshold,
        unit=u.nJy if all(obs.flux_unit == "nJy" for obs in observations) else u.dimensionless_unscaled,
    )
    return search, outliers


def _known(sky: Sky, scene: Scene) -> list[tuple[str, Host]]:
    """Return the sources of a scene as hosts."""
    result = []
    for (path, component), (box, image) in zip(scene.components(), scene.stamps().values(), strict=True):
        flux = np.asarray(component.spectrum.evaluate(scene.frame.channels), dtype=float) / sky.unit
        y, x = np.mgrid[box.slices]
        distance = np.hypot(y - component.center[0], x - component.center[1]).ravel()
        order = np.argsort(distance)
        light = np.cumsum(np.maximum(image.mean(axis=0).ravel()[order], 0.0))
        radius = float(distance[order][np.searchsorted(light, 0.5 * light[-1])]) if light[-1] > 0 else 0.0
        own = HALF_LIGHT * float(scene.frame.psf.effective_sigma[0])
        name = path.removeprefix("sources.")
        center = np.asarray(component.center, dtype=float)
        result.append((name, Host(center, float(np.sqrt(max(radius**2 - own**2, 0.0))), _brightness(sky, flux))))
    return result


def _brightness(sky: Sky, flux: np.ndarray) -> tuple[float, ...]:
    """Return the flux of a source, in units of the deepest channel, as the sharpest observations show it, and as all do."""
    result = []
    for groups in sky.information[:1], sky.information:
        known = sky.weights**2 * sum(each[0].max(axis=(1, 2)) for each in groups)
        result.append(float((known * flux / sky.weights).sum() / known.sum()))
    return tuple(result)


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
        row += _known_of(sky, place, shape).sum(axis=0)
    largest = np.array([each[0].max(axis=(1, 2)) for each in sky.information]).sum(axis=0)
    known = np.where(known > 1e-6 * largest, known, 0.0)
    start = np.zeros(known.shape)
    if before is not None:
        start[: len(before.fluxes)] = before.fluxes
    fluxes, pulls = fit_fluxes(sky, frame, images, known, search.pulls, start)
    return Fit(shapes, images, fluxes, known, pulls, sky.coadded(pulls))


def _recentered(search: Search, sources: Sequence[Entry], fit: Fit) -> list[Entry]:
    """Return the sources, points moved to where the gradient that their models leave is zero.

    For a PSF of variance v, the displacement is the slope of the numerator over that of the source itself, times 2 v. It matters
    for bright stars, whose rims are bright even if they are misplaced by little.
    """
    sky, layer = search.sky, search.layers[0]
    left = sky.chosen(layer, fit.planes)[0]
    steps, result = np.eye(2, dtype=int), []
    for source, flux in zip(sources, fit.fluxes, strict=True):
        candidate = source.candidate
        place = np.clip(np.rint(candidate.position).astype(int), 1, np.array(sky.shape) - 2)
        own = layer.information[(0, *place)] * _brightness(sky, flux)[0]
        if source.is_detected and candidate.is_compact and own > 0:
            slope = np.array([left[tuple(place + step)] - left[tuple(place - step)] for step in steps]) / 2
            move = np.clip(2 * layer.psf_sigma[tuple(place)] ** 2 * slope / own, -MAX_MOVE, MAX_MOVE)
            moved = np.clip(candidate.position + move, 0, np.array(sky.shape) - 1)
            source = source._replace(candidate=candidate._replace(position=moved))
        result.append(source)
    return result


def _known_of(sky: Sky, place: np.ndarray, shape: RingShape) -> np.ndarray:
    """Return about what each group of observations knows of the flux of a source, shape (group, channel)."""
    order = np.argsort(sky.sizes)
    sizes = order[sky.sizes[order] >= 0.7 * shape.radius(0.5) / HALF_LIGHT]
    known = []
    for each in sky.information:
        planes = each[(slice(None), slice(None), *place)]
        # The next larger size where a narrow one isn't known.
        used = next((size for size in sizes if planes[size].any()), int(order[-1]))
        known.append(planes[used])
    return np.stack(known)


def _further(
    search: Search, sources: Sequence[Entry], fit: Fit, *, resolved_only: bool
) -> tuple[list[Candidate], list[tuple[Candidate, int]]]:
    """Return new sources in what models leave, and clumps with the number of their host among sources and known ones."""
    sky = search.sky
    hosts = [
        Host(source.candidate.position, shape.radius(0.5), _brightness(sky, flux))
        for source, shape, flux in zip(sources, fit.shapes, fit.fluxes, strict=True)
    ]
    hosts += [host for _, host in search.known]
    lit = search.planes - fit.planes + search.scene_planes
    new, clumps = [], []
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
        accepted, its_clumps = sort_out(found, hosts + others, width, number)
        new += [candidate._replace(layer=number) for candidate in accepted]
        clumps += its_clumps
    return new, clumps


def _detections(search: Search, sources, clumps, fit: Fit, outliers) -> Detections:
    """Return the result: what is significant by itself, and what the catalogue has."""
    sky, frame = search.sky, search.frame
    own = [_own_significance(search, *each) for each in zip(sources, fit.shapes, fit.fluxes, strict=True)]
    significance = np.array([each for each, _ in own])
    is_shown = np.array([source.is_detected for source in sources], dtype=bool)
    is_shown &= np.array([min(each) >= search.threshold for each in own], dtype=bool)
    is_listed = np.array([source.row >= 0 for source in sources], dtype=bool)
    is_shown &= is_listed | ~_doubled(sources, fit.shapes, np.where(is_shown, significance, -np.inf))
    order = np.flatnonzero(is_shown | is_listed)
    order = order[np.lexsort((-significance[order], ~is_shown[order]))]
    positions = np.array([sources[n].candidate.position for n in order]).reshape(-1, 2)
    scale = length_unit(frame)
    table = QTable({"id": np.arange(len(order)).astype(str), **place_columns(frame, positions)})
    table["significance"] = significance[order]
    known = fit.information[order]
    fluxes = np.where(known > 0, fit.fluxes[order], np.nan) * sky.unit
    errors = np.where(known > 0, 1 / np.sqrt(np.where(known > 0, known, 1.0)), np.inf) * sky.unit
    for name, column in flux_columns(frame, fluxes, errors, search.unit).items():
        table[name] = column
    table["half_light_radius"] = np.array([fit.shapes[n].radius(0.5) for n in order]) * scale
    table["scale"] = np.array([sky.sizes[sources[n].candidate.scale] for n in order]) * scale
    table["is_compact"] = np.array([sources[n].candidate.is_compact for n in order], dtype=bool)
    origin = np.where(is_listed, np.where(is_shown, "both", "catalog"), "detected")
    table["origin"] = origin[order].astype("U8")
    table["catalog_row"] = np.array([sources[n].row for n in order], dtype=int)
    names = {int(n): str(rank) for rank, n in enumerate(order)}
    names |= {len(sources) + n: name for n, (name, _) in enumerate(search.known)}
    brightness = [_brightness(sky, flux)[0] for flux in fit.fluxes] + [host.flux[0] for _, host in search.known]
    layer = search.layers[-1]
    return Detections(
        frame=frame,
        positions=positions,
        table=table,
        significance=sky.significance(layer, sky.chosen(layer, search.planes), 0),
        segmentation=_segmentation(search, fit, order),
        clumps=_clump_table(frame, [(c, n) for c, n in clumps if n in names], names, brightness),
        known=_known_table(search),
        outliers=outliers,
    )


def _own_significance(search: Search, source: Entry, shape: RingShape, flux: np.ndarray) -> tuple[float, float]:
    """Return how significant the flux of a source is, its neighbours subtracted: in all, and in those that it was found in."""
    sky, layer = search.sky, search.layers[0]
    place = np.clip(np.rint(source.candidate.position).astype(int), 0, np.array(sky.shape) - 1)
    known = np.stack([sky.weights**2 * each for each in _known_of(sky, place, shape)])
    sharp = 0 if layer.group is None else int(layer.group[tuple(place)])
    found_in = known[sharp] if source.candidate.layer == 0 else known.sum(axis=0)
    result = []
    for each in known.sum(axis=0), found_in:
        total = float(each.sum())
        result.append(float((each * flux / sky.weights).sum() / np.sqrt(total)) if total > 0 else 0.0)
    return result[0], result[1]


def _doubled(sources: Sequence[Entry], shapes: Sequence[RingShape], significance: np.ndarray) -> np.ndarray:
    """Return which sources are well inside a more significant one that is as wide: parts of one thing."""
    positions = np.array([source.candidate.position for source in sources]).reshape(-1, 2)
    radii = np.array([shape.radius(0.5) for shape in shapes])
    distance = np.hypot(*(positions[:, None] - positions).transpose(2, 0, 1))
    is_inside = distance < SAME * np.minimum(radii[:, None], radii)
    return (is_inside & (significance > significance[:, None])).any(axis=1)


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
        light = fit.images.data[start:stop] * max(_brightness(sky, fit.fluxes[number])[0], 0.0)
        wins = light > brightest[pixels]
        flat[pixels[wins]] = label
        brightest[pixels[wins]] = light[wins]
    return np.where(footprints.data > 0, labels, 0) if footprints is not None else np.zeros_like(labels)


def _clump_table(frame: Frame, clumps, names, brightness) -> QTable:
    """Return the table of clumps."""
    positions = np.array([clump.position for clump, _ in clumps]).reshape(-1, 2)
    table = QTable(place_columns(frame, positions))
    table["significance"] = np.array([clump.significance for clump, _ in clumps], dtype=float)
    table["host"] = np.array([names[number] for _, number in clumps], dtype=str)
    table["fraction"] = np.array([clump.flux / brightness[number] for clump, number in clumps], dtype=float)
    return table


def _known_table(search: Search) -> QTable:
    """Return the table of the sources of the scene."""
    positions = np.array([host.position for _, host in search.known]).reshape(-1, 2)
    names = np.array([name for name, _ in search.known], dtype=str)
    return QTable({"id": names, **place_columns(search.frame, positions)})
