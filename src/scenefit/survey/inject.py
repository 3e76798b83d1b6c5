"""Injection and recovery: known sources put into real images, and what a pipeline makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import astropy.units as u
import equinox as eqx
import numpy as np
from astropy.coordinates import SkyCoord, search_around_sky
from astropy.table import QTable, Table, vstack

from scenefit.arrays.progress import with_progress
from scenefit.data.noise import PoissonNoise, WhiteNoise
from scenefit.data.observation import Observation, naming
from scenefit.infer.fit import FitResult, Status
from scenefit.model.parameters import Parameters
from scenefit.model.scene import Scene
from scenefit.sky import units
from scenefit.survey.catalog import channel_label
from scenefit.survey.measure import default_channel_weights, measure_shapes
from scenefit.survey.radii import light_radii
from scenefit.survey.validate import Validation, match, validate


def inject(
    observations: Observation | Sequence[Observation],
    scene: Scene,
    *,
    gain: float | Mapping[str, float] | None = None,
    seed: int | np.random.Generator = 0,
) -> tuple[list[Observation], QTable]:
    """Add the light of a scene to images, in the pixels of each.

    Every observation gets `render(scene)` without background: through its own PSF, offset, rotation, flux scale and PSF
    variance. The flux added to an image is that of the sources times its flux scale, but for what falls beyond the image or
    the scene's frame. Pixels without information stay so.

    Parameters
    ----------
    observations : Observation or sequence of them
        Not changed.
    scene : Scene
        What to add, on a frame that reaches far enough around its sources to hold their light. Only needs the channels of
        the observations.
    gain : float or mapping from names of observations, optional
        Counts per data unit (that of the images as they were handed in, before conversion to nJy). The added light then has the
        Poisson noise of its counts, and the weights are lowered by that much where the noise is `WhiteNoise`, as if the sources
        had been there during the exposure. None adds light without noise, which is right where the noise of the sky prevails, and
        for resampled images. `PoissonNoise` knows its own gain, and always gets counts.
    seed : int or numpy.random.Generator
        Of the noise.

    Returns
    -------
    list of Observation
        As matched (or not) as they were.
    QTable
        `truth_table` of the scene.

    Raises
    ------
    TypeError
        If something else than observations, or no scene, is given.
    ValueError
        If there is no observation, a source's center lies outside the frame, channels are missing, a gain isn't positive or of an
        observation that isn't there, or the noise is neither white nor of counts and a gain is given.
    """
    originals = _as_observations(observations)
    _check_scene(scene)
    new = _added(originals, _matched(originals, scene), scene, gain, np.random.default_rng(seed))
    return new, truth_table(scene, unit=_unit(originals))


def truth_table(scene: Scene, *, unit: u.UnitBase = u.nJy) -> QTable:
    """List what is known of the sources of a scene, in the columns that `validate` compares.

    Positions and sizes are defined as in `catalog`: the half-light radius is that of the circle that holds half the light, the
    channels added with the inverse of their flux in the whole scene, and 0 for a point.

    Parameters
    ----------
    scene : Scene
    unit : astropy unit
        Of the fluxes: nJy, or `astropy.units.dimensionless_unscaled` for images that aren't calibrated.

    Returns
    -------
    QTable
        One row a source: id; ra, dec [deg, ICRS; NaN without a WCS]; y, x [pix on the frame]; for every channel CH flux_CH
        [nJy] and mag_CH [AB mag; NaN unless fluxes are in nJy]; half_light_radius [arcsec, or pix without a WCS].
    """
    frame, names = scene.frame, list(scene.sources)
    weights, stamps = default_channel_weights(scene), scene.stamps()
    shapes = measure_shapes(scene, weights, stamps=stamps)
    centers = np.array([shape.center for shape in shapes]).reshape(len(names), 2)
    table = QTable()
    table["id"] = np.array(names, dtype=str)
    if frame.wcs is None:
        table["ra"] = table["dec"] = np.full(len(names), np.nan) * u.deg
    else:
        sky = frame.to_sky(centers).icrs
        table["ra"], table["dec"] = sky.ra.deg * u.deg, sky.dec.deg * u.deg
    table["y"], table["x"] = centers[:, 0] * u.pix, centers[:, 1] * u.pix
    flux = np.zeros((len(names), len(frame.channels)))
    for row, (name, source) in zip(flux, scene.sources.items(), strict=True):
        for _, component in source.components(name):
            row += np.asarray(component.spectrum.evaluate(frame.channels), dtype=float)
    is_calibrated = u.Unit(unit).is_equivalent(u.nJy)
    for channel, values in zip(frame.channels, flux.T, strict=True):
        label = channel_label(channel)
        table[f"flux_{label}"] = values * unit
        magnitude = units.ab_magnitude((values * unit).to_value(u.nJy)) if is_calibrated else np.nan * values
        table[f"mag_{label}"] = magnitude * u.mag
    scale, length = (1.0, u.pix) if frame.wcs is None else (frame.pixel_scale, u.arcsec)
    known = FitResult(scene, (), Parameters.default(scene, ()), Status.CONVERGED, 0.0, {}, 0, {})
    radius = light_radii(known, shapes, weights, (0.5,), stamps)[:, 0]
    table["half_light_radius"] = radius * scale * length
    return table


def recover(
    observations: Observation | Sequence[Observation],
    draw: Callable[[np.random.Generator], Scene],
    measure: Callable[[list[Observation]], Table],
    *,
    trials: int,
    existing: Table | None = None,
    gain: float | Mapping[str, float] | None = None,
    seed: int = 0,
    progress: bool = True,
    radius: u.Quantity = 0.3 * u.arcsec,
    channel: str | None = None,
    magnitude_tolerance: float | None = 2.0,
    isolation: u.Quantity = 1.0 * u.arcsec,
    outlier: float = 0.5,
) -> Validation:
    """Inject sources again and again, run a pipeline on the images, and compare what it finds with what was put in.

    Parameters
    ----------
    observations : Observation or sequence of them
        Images that are real, or as good as. Not changed.
    draw : callable
        Takes a random generator, returns the scene to be injected. Scenes on one frame with the same number and kinds of
        sources share compiled programs.
    measure : callable
        The pipeline: takes the list of observations with the sources in, returns a catalogue as `validate` takes it.
    trials : int
        How often, at least once. Every trial starts from the same images.
    existing : Table, optional
        What the pipeline finds in the images as they are, `measure(observations)`. Rows of a trial's catalogue that go with these
        better than with an injected source are left out; without it they count as false. An injected source that lies within
        `isolation` of one counts as blended.
    gain
        See `inject`.
    seed : int
        Trial number n draws the same whatever the number of trials.
    progress : bool
        Whether to show a progress bar on standard error if it takes more than two seconds.
    radius, channel, magnitude_tolerance, isolation, outlier
        See `validate`.

    Returns
    -------
    Validation
        Of all trials together; its tables have a column `trial`, and rows are numbered through the stacked tables of all trials
        (of the catalogues without what was left out).

    Raises
    ------
    TypeError
        If `draw` returns no scene or `measure` no table.
    ValueError
        If there is no trial; see also `inject` and `validate`.
    """
    if trials < 1:
        raise ValueError(f"recover wants at least one trial; got {trials}.")
    originals = _as_observations(observations)
    matched, parts, offset = originals, [], (0, 0)
    generators = np.random.default_rng(seed).spawn(trials)
    for number, generator in enumerate(with_progress(generators, "injection and recovery", progress)):
        scene = draw(generator)
        _check_scene(scene)
        matched = _matched(matched, scene)
        truth = truth_table(scene, unit=_unit(originals))
        table = measure(_added(originals, matched, scene, gain, generator))
        if not isinstance(table, Table):
            raise TypeError(
                f"recover: measure must return a table, such as that of catalog(); got {type(table).__name__}."
            )
        # What finds nothing may have no columns either.
        table = table if len(table) else truth[:0]
        if existing is not None and len(existing):
            table = table[_is_new(table, truth, existing, radius, channel, magnitude_tolerance)]
        result = validate(
            table,
            truth,
            radius=radius,
            channel=channel,
            magnitude_tolerance=magnitude_tolerance,
            isolation=isolation,
            outlier=outlier,
        )
        if existing is not None and len(existing):
            result = _blended_with(existing, result, truth, isolation)
        parts.append(_numbered(result, number, offset))
        offset = offset[0] + len(table), offset[1] + len(truth)
    return _stacked(parts)


def _as_observations(observations) -> list[Observation]:
    """Return the observations, one or several, as a list."""
    several = [observations] if isinstance(observations, Observation) else list(observations)
    if wrong := [each for each in several if not isinstance(each, Observation)]:
        raise TypeError(f"Sources are injected into Observations; got a {type(wrong[0]).__name__}.")
    if not several:
        raise ValueError("There is no observation to inject sources into; give at least one.")
    return several


def _check_scene(scene):
    """Raise unless there is a scene whose sources lie on its frame."""
    if not isinstance(scene, Scene):
        raise TypeError(f"What is injected is a Scene, on a Frame; got a {type(scene).__name__}.")
    centers = {path: np.asarray(part.center, dtype=float) for path, part in scene.components()}
    if outside := [path for path, center in centers.items() if not scene.frame.box.contains(tuple(center))]:
        raise ValueError(
            f"Sources to be injected must lie on the scene's frame of {scene.frame.box.shape} pixels; {outside[0]} is at "
            f"(y, x) = {centers[outside[0]].tolist()}. Give the frame more room: light beyond it is cut off."
        )


def _unit(observations) -> u.UnitBase:
    """Return the unit of fluxes."""
    return u.nJy if all(obs.flux_unit == "nJy" for obs in observations) else u.dimensionless_unscaled


def _matched(observations, scene: Scene) -> list[Observation]:
    """Return the observations matched to the frame of a scene; those that are already stay as they are."""
    return [obs.match(scene.frame) for obs in observations]


def _added(originals, matched, scene: Scene, gain, rng) -> list[Observation]:
    """Return the observations with the light of a scene, which `matched` renders, added."""
    gains = dict(gain) if isinstance(gain, Mapping) else {obs.name: gain for obs in originals}
    names = [obs.name for obs in originals]
    if unknown := [name for name in gains if name not in names]:
        raise ValueError(f"gain: no observation is named {unknown}; there are {names}.")
    model = scene.evaluate(outer=True)
    new = []
    for obs, seen in zip(originals, matched, strict=True):
        light = np.where(obs.noise.valid, seen.render(model) - seen.background_image(), 0.0)
        with naming(obs.name):
            light, noise = _with_counts(obs, light, gains.get(obs.name), rng)
        new.append(eqx.tree_at(lambda o: (o.data, o.noise), obs, (obs.data + light, noise)))
    return new


def _with_counts(obs: Observation, light: np.ndarray, gain, rng):
    """Return the light as it is counted, and the noise with that of its counts."""
    if gain is not None and not (isinstance(gain, float | int | np.number) and 0 < gain < np.inf):
        raise ValueError(f"the gain is one positive number, counts per data unit; got {gain!r}.")
    noise = obs.noise
    if isinstance(noise, PoissonNoise):
        per_unit = np.asarray(noise.gain, dtype=float)[:, None, None]
        counts = rng.poisson(np.maximum(light, 0.0) * per_unit)
        return counts / per_unit, PoissonNoise(np.asarray(noise.counts, dtype=float) + counts, noise.gain)
    if gain is None:
        return light, noise
    if not isinstance(noise, WhiteNoise):
        raise ValueError(
            f"photon noise is added to independent Gaussian noise only (WhiteNoise); this is {type(noise).__name__}. Leave "
            "gain= out."
        )
    per_unit = gain / obs.nanojansky[:, None, None]
    expected = np.maximum(light, 0.0)
    # The scale multiplies the errors of the weights, not those of the counts added.
    scale = np.asarray(noise.scale, dtype=float)[:, None, None] ** 2
    weights = np.asarray(noise.weights, dtype=float)
    weights = weights / (1 + weights * expected / per_unit / scale)
    return rng.poisson(expected * per_unit) / per_unit, eqx.tree_at(lambda n: n.weights, noise, weights)


def _is_new(table, truth, existing, radius, channel, magnitude_tolerance) -> np.ndarray:
    """Return which rows of a catalogue aren't sources that were in the images before."""
    fluxes = [name for name in truth.colnames if name.startswith(("mag_", "flux_")) and name in existing.colnames]
    # Both at once: a row between two sources goes to the one that leaves most of the others a row.
    both = vstack([_in_standard_units(each, fluxes) for each in (truth, existing)])
    rows, sources = match(table, both, radius=radius, channel=channel, magnitude_tolerance=magnitude_tolerance)
    is_new = np.ones(len(table), dtype=bool)
    is_new[rows[sources >= len(truth)]] = False
    return is_new


def _blended_with(existing, result: Validation, truth: QTable, isolation) -> Validation:
    """Return a comparison whose sources near one that was there before count as blended, too."""
    known = _in_standard_units(existing, ())
    places = [SkyCoord(table["ra"], table["dec"], unit=u.deg) for table in (known, truth)]
    near = np.unique(search_around_sky(*places, u.Quantity(isolation))[1])
    pairs = result.pairs.copy()
    pairs["blended"] = np.asarray(pairs["blended"], dtype=bool) | np.isin(pairs["truth_row"], near)
    return Validation(pairs, result.detections, result.entries, result.channel, result.outlier)


def _in_standard_units(table, fluxes) -> Table:
    """Return positions [deg] and some columns of fluxes [nJy] or magnitudes of a table as plain numbers."""
    names = {name.lower(): name for name in table.colnames}
    wanted = {"ra": (names.get("ra", "ra"), u.deg), "dec": (names.get("dec", "dec"), u.deg)}
    wanted |= {name: (name, u.mag if name.startswith("mag_") else u.nJy) for name in fluxes}
    plain = Table()
    for name, (own_name, unit) in wanted.items():
        column = table[own_name]
        column = column.filled(np.nan) if hasattr(column, "filled") else column
        own = getattr(column, "unit", None) or u.dimensionless_unscaled
        values = np.asarray(getattr(column, "value", column), dtype=float)
        plain[name] = values if own == u.dimensionless_unscaled else u.Quantity(values, own).to_value(unit)
    return plain


def _numbered(result: Validation, trial: int, offset: tuple[int, int]) -> Validation:
    """Return a comparison with its trial's number, and rows counted from those of the trials before."""
    tables = []
    for table in (result.pairs, result.detections, result.entries):
        table = table.copy()
        table.add_column(np.full(len(table), trial), name="trial", index=0)
        for name, first in zip(("catalog_row", "truth_row"), offset, strict=True):
            if name in table.colnames:
                table[name] = np.where(table[name] < 0, table[name], table[name] + first)
        tables.append(table)
    return Validation(*tables, channel=result.channel, outlier=result.outlier)


def _stacked(parts: Sequence[Validation]) -> Validation:
    """Return one comparison of all trials; quantities are those of the trials that found something."""
    filled = [part.pairs for part in parts if len(part.pairs)] or [parts[0].pairs]
    return Validation(
        pairs=vstack(filled, join_type="inner"),
        detections=vstack([part.detections for part in parts]),
        entries=vstack([part.entries for part in parts]),
        channel=parts[0].channel,
        outlier=parts[0].outlier,
    )
