"""Radial profiles of fitted sources: surface brightness and light by semi-major axis, sizes and concentrations, with errors."""

from __future__ import annotations

from collections.abc import Sequence

import astropy.units as u
import equinox as eqx
import jax
import numpy as np
from astropy.table import QTable

from scenefit.infer.fit import FitResult
from scenefit.infer.sample import Posterior
from scenefit.model.morphology import links
from scenefit.sky import units
from scenefit.sky.frame import Channel, Frame, pixel_scale_of
from scenefit.survey.ellipses import TABLE_STEP, GrowthTable, axis_ratio, outermost_fall
from scenefit.survey.parts import (
    Part,
    RadialLight,
    common_ellipses,
    default_radii,
    find_components,
    part_of,
    table_radii,
)

PETROSIAN_ETA = 0.2
"""Ratio of surface brightnesses that defines the Petrosian radius (Blanton et al. 2001, AJ 121, 2358, doi:10.1086/320405)."""
PETROSIAN_ANNULUS = (0.8, 1.25)
"""Annulus, in Petrosian radii, whose surface brightness is compared (Blanton et al. 2001)."""
QUANTILES = (0.16, 0.5, 0.84)
"""Of the draws of a posterior: the ends of the error bar, and its middle."""


class Profile(eqx.Module):
    """Light of a source on ellipses around its centre: of one shape, its own, and of growing semi-major axis.

    Arrays start with an axis of draws: those of the posterior, or the one of a fit. `summary` and `table` turn them into values
    with errors.

    Attributes
    ----------
    name : str
    channels : tuple
        Of the model frame.
    radius : array, shape (radius,)
        Semi-major axes, model pixels.
    total : RadialLight
    components : dict of RadialLight
        Of the parts of a CompositeSource, on the ellipses of the whole: they add up to it.
    center : array, shape (draw, 2)
        (y, x) of the ellipses on the model frame, pixels.
    ellipticity : array, shape (draw, channel, 2)
        Of the ellipses, `(1 - q^2) / (1 + q^2) (cos 2 theta, sin 2 theta)`.
    psf_sigma : array, shape (channel,), or None
        Width, in model pixels, of the Gaussian of the convolved profiles.
    pixel_scale : float
        Arcsec per model pixel; NaN without a WCS.
    is_calibrated : bool
        Whether fluxes are in nJy.
    is_sampled : bool
        Whether there are draws of a posterior.
    tables : dict of GrowthTable
        What sizes are computed from, for each component.
    """

    name: str = eqx.field(static=True)
    channels: tuple[Channel, ...] = eqx.field(static=True)
    radius: np.ndarray
    total: RadialLight
    components: dict[str, RadialLight]
    center: np.ndarray
    ellipticity: np.ndarray
    psf_sigma: np.ndarray | None
    pixel_scale: float = eqx.field(static=True)
    is_calibrated: bool = eqx.field(static=True)
    is_sampled: bool = eqx.field(static=True)
    tables: dict[str, GrowthTable]

    @property
    def radius_arcsec(self) -> np.ndarray:
        """Semi-major axes in arcsec; NaN without a WCS."""
        return self.radius * self.pixel_scale

    @property
    def has_magnitudes(self) -> bool:
        """Whether surface brightnesses have magnitudes: fluxes are in nJy, and there is a WCS."""
        return self.is_calibrated and bool(np.isfinite(self.pixel_scale))

    @property
    def flux(self) -> np.ndarray:
        """Total flux, shape (draw, channel)."""
        return self.total.flux

    @property
    def axis_ratio(self) -> np.ndarray:
        """Axis ratio of the ellipses, shape (draw, channel)."""
        return axis_ratio(self.ellipticity)

    @property
    def r20(self) -> np.ndarray:
        """Semi-major axis of the ellipse with 20 % of the light, pixels, shape (draw, channel)."""
        return self.fraction_radius(0.2)

    @property
    def r50(self) -> np.ndarray:
        """Semi-major axis of the ellipse with half of the light, pixels, shape (draw, channel)."""
        return self.fraction_radius(0.5)

    @property
    def r80(self) -> np.ndarray:
        """Semi-major axis of the ellipse with 80 % of the light, pixels, shape (draw, channel)."""
        return self.fraction_radius(0.8)

    @property
    def r90(self) -> np.ndarray:
        """Semi-major axis of the ellipse with 90 % of the light, pixels, shape (draw, channel)."""
        return self.fraction_radius(0.9)

    @property
    def c80_20(self) -> np.ndarray:
        """Concentration r80 / r20, shape (draw, channel); NaN where r20 is 0."""
        return _ratio(self.r80, self.r20)

    @property
    def c90_50(self) -> np.ndarray:
        """Concentration r90 / r50, shape (draw, channel); NaN where r50 is 0."""
        return _ratio(self.r90, self.r50)

    def magnitudes(self, surface_brightness: np.ndarray) -> np.ndarray:
        """Return AB mag per square arcsec of surface brightnesses (flux per pixel squared); NaN where they aren't positive.

        Raises
        ------
        ValueError
            If fluxes aren't in nJy, or there is no WCS.
        """
        if not self.has_magnitudes:
            raise ValueError("Magnitudes per square arcsec want observations with zeropoints and a WCS.")
        return np.asarray(units.ab_magnitude(surface_brightness / self.pixel_scale**2))

    def fraction_radius(self, fraction: float) -> np.ndarray:
        """Return the semi-major axis of the ellipse that holds a fraction of the light, before any PSF.

        Returns
        -------
        array, shape (draw, channel)
            Pixels. 0 if more light than that is within a hundredth of the half-light radius of the smallest component: in a
            point, that is. NaN where the total flux isn't positive.

        Raises
        ------
        ValueError
            If the fraction isn't between 0 and 1.
        """
        if not 0 < fraction < 1:
            raise ValueError(f"A fraction of the light lies between 0 and 1; got {fraction}.")
        total = np.where(self.flux > 0, self.flux, np.nan)[..., None]

        def missing(_, growth):
            return fraction - growth / total

        at_nodes = missing(*self._light())
        radius = self._outermost(at_nodes, lambda log_radius: missing(*self._light(log_radius)))
        return np.where(at_nodes[..., 0] < 0, 0.0, radius)

    def isophotal_radius(
        self, *, mag_per_arcsec2: float | None = None, surface_brightness: float | None = None
    ) -> np.ndarray:
        """Return the semi-major axis beyond which the source is fainter than a surface brightness, before any PSF.

        Parameters
        ----------
        mag_per_arcsec2, surface_brightness : float
            One of the two: in AB mag per square arcsec, or as flux per model pixel squared.

        Returns
        -------
        array, shape (draw, channel)
            Pixels; NaN where the source is fainter everywhere.

        Raises
        ------
        ValueError
            If both or none are given, the surface brightness isn't positive, or magnitudes are asked for without zeropoints
            and WCS.
        """
        if (mag_per_arcsec2 is None) == (surface_brightness is None):
            raise ValueError("Give either mag_per_arcsec2= or surface_brightness=.")
        level = surface_brightness
        if mag_per_arcsec2 is not None:
            level = 10 ** (-0.4 * (mag_per_arcsec2 - self.magnitudes(np.ones(()))))
        if level is None or not level > 0:
            raise ValueError(f"A surface brightness must be positive; got {level}.")
        return self._outermost(self._light()[0] - level, lambda log_radius: self._light(log_radius)[0] - level)

    def petrosian_radius(self, eta: float = PETROSIAN_ETA) -> np.ndarray:
        """Return the Petrosian radius, on ellipses and before any PSF.

        It is the largest semi-major axis a at which the mean surface brightness between 0.8 a and 1.25 a is `eta` times that
        within a.

        Returns
        -------
        array, shape (draw, channel)
            Pixels; NaN where there is none.

        References
        ----------
        Petrosian 1976, ApJ 209, L1; Blanton et al. 2001, AJ 121, 2358, doi:10.1086/320405; Shimasaku et al. 2001, AJ 122,
        1238, doi:10.1086/322094.
        """
        if not 0 < eta < 1:
            raise ValueError(f"eta lies between 0 and 1; got {eta}.")
        inner, outer = PETROSIAN_ANNULUS

        def excess(log_radius):
            within, left_out, up_to = (self._light(log_radius + np.log(factor))[1] for factor in (1.0, inner, outer))
            return (up_to - left_out) / (outer**2 - inner**2) / np.where(within > 0, within, np.nan) - eta

        nodes = np.broadcast_to(self._log_radius, (*self.flux.shape, len(self._log_radius)))
        return self._outermost(excess(nodes), excess)

    def summary(self, mag_per_arcsec2: float | None = None) -> QTable:
        """Return total flux, sizes and concentrations, a row a channel.

        Parameters
        ----------
        mag_per_arcsec2 : float, optional
            Surface brightness at which to give the isophotal radius.

        Returns
        -------
        QTable
            channel; flux, mag, axis_ratio, r20, r50, r80, r90, petrosian_radius, isophotal_radius (if asked for) [arcsec, or
            pix without a WCS], C80_20, C90_50. For a posterior these are medians, and NAME_minus and NAME_plus the distances
            to the 16 and 84 % quantiles; draws in which a value is NaN don't count.

        Raises
        ------
        ValueError
            If an isophotal radius is asked for without zeropoints and WCS.
        """
        has_sky = np.isfinite(self.pixel_scale)
        length, scale = (u.arcsec, self.pixel_scale) if has_sky else (u.pix, 1.0)
        radii = {name: getattr(self, name) for name in ("r20", "r50", "r80", "r90")}
        radii["petrosian_radius"] = self.petrosian_radius()
        if mag_per_arcsec2 is not None:
            radii["isophotal_radius"] = self.isophotal_radius(mag_per_arcsec2=mag_per_arcsec2)
        table = QTable()
        table["channel"] = [" ".join(map(str, c)) if isinstance(c, tuple) else c for c in self.channels]
        self._add(table, "flux", self.flux, u.nJy if self.is_calibrated else u.dimensionless_unscaled)
        magnitude = units.ab_magnitude(self.flux) if self.is_calibrated else np.full(self.flux.shape, np.nan)
        self._add(table, "mag", magnitude, u.mag)
        self._add(table, "axis_ratio", self.axis_ratio, u.dimensionless_unscaled)
        for name, values in radii.items():
            self._add(table, name, values * scale, length)
        for outer, inner in ((80, 20), (90, 50)):
            ratio = _ratio(radii[f"r{outer}"], radii[f"r{inner}"])
            self._add(table, f"C{outer}_{inner}", ratio, u.dimensionless_unscaled)
        return table

    def table(self, channel: Channel) -> QTable:
        """Return the profile in a channel, a row a radius.

        Returns
        -------
        QTable
            radius [arcsec, or pix without a WCS]; surface_brightness [mag / arcsec2, or flux / pix2 without zeropoints or WCS];
            curve_of_growth; both after convolution (`convolved_NAME`), if there is a PSF; with `NAME_minus` and `NAME_plus` as in
            `summary`.

        Raises
        ------
        ValueError
            If the profile has no such channel.
        """
        if channel not in self.channels:
            raise ValueError(f"The profile has channels {list(self.channels)}, not {channel!r}.")
        number = self.channels.index(channel)
        flux_unit = u.nJy if self.is_calibrated else u.dimensionless_unscaled
        table = QTable()
        table["radius"] = self.radius_arcsec * u.arcsec if np.isfinite(self.pixel_scale) else self.radius * u.pix
        for name in ("surface_brightness", "curve_of_growth"):
            for column in (name, f"convolved_{name}"):
                values, unit = getattr(self.total, column), flux_unit
                if values is None:
                    continue
                values = values[:, number]
                if name == "surface_brightness":
                    unit = u.mag / u.arcsec**2 if self.has_magnitudes else flux_unit / u.pix**2
                    values = self.magnitudes(values) if self.has_magnitudes else values
                self._add(table, column, values, unit)
        return table

    def _add(self, table, name, values, unit):
        """Add a column, and for a posterior those of its errors."""
        if not self.is_sampled:
            table[name] = values[0] * unit
            return
        low, middle, high = quantiles(values)
        for suffix, column in (("", middle), ("_minus", middle - low), ("_plus", high - middle)):
            table[name + suffix] = column * unit

    def _light(self, log_radius: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return surface brightness and growth of the whole at circularised radii, shape (draw, channel, n), or at the nodes."""
        density, growth = np.zeros(()), np.zeros(())
        for name, table in self.tables.items():
            flux = self.components[name].flux[..., None]
            each = (table.density, table.growth) if log_radius is None else table.at(log_radius)
            density, growth = density + flux * each[0], growth + flux * each[1]
        return density, growth

    @property
    def _log_radius(self) -> np.ndarray:
        """Logarithms of the circularised radii of the tables."""
        return next(iter(self.tables.values())).log_radius

    def _outermost(self, values, function) -> np.ndarray:
        """Return the largest semi-major axis at which a function, known at the radii of the tables, becomes negative."""
        return outermost_fall(self._log_radius, values, function) / np.sqrt(self.axis_ratio)


def profile(
    fitted: FitResult | Posterior,
    name: str,
    *,
    radii=None,
    psf_sigma=None,
    observation: str | None = None,
) -> Profile:
    """Return the radial profile of a source, or of a part of one, in every channel.

    Surface brightnesses are means along ellipses, curves of growth sums inside them. The ellipses of a single component are its
    own, in every channel. Those of a composite source have the mean centre and ellipticity of its parts other than points,
    weighted with their share of the flux (the mean over channels of their share in each), the same in all channels but for
    shapes that depend on wavelength.

    Parameters
    ----------
    fitted : FitResult or Posterior
        With a posterior, the profile has all its draws, and errors.
    name : str
        Of the source, or the path of a part: "host", "sources.host", "host.parts.bulge".
    radii : array or Quantity, shape (radius,), optional
        Semi-major axes, increasing, in model pixels or as angles. By default 60 from 0.03 to 8 half-light radii.
    psf_sigma : float, array of shape (channel,), or Quantity, optional
        Add profiles convolved with a round Gaussian of this standard deviation, in model pixels or as an angle.
    observation : str, optional
        Convolve with the Gaussian that has the effective width of this observation's PSF (the one with its peak value),
        instead. An approximation: wings of the PSF are left out. Channels that the observation lacks are NaN.

    Returns
    -------
    Profile

    Raises
    ------
    KeyError
        If there is no such source, part or observation.
    ValueError
        If a component is an image of free pixels, radii aren't positive and increasing, a width isn't positive, or two are given.
    TypeError
        If `fitted` is neither a fit nor a posterior.

    Notes
    -----
    Without a PSF, Sersic profiles are exact on their own ellipses. Convolved ones are those of the Gaussians by which models
    are rendered (`scenefit.arrays.profiles`): good to 1e-5 of the central surface brightness for indices from 1 to 6, to 1e-3 for
    0.5, so that the faint outskirts of such a profile, beyond three half-light radii, mean nothing.
    """
    return profiles([fitted], name, radii=radii, psf_sigma=psf_sigma, observation=observation)[0]


def profiles(
    fits: Sequence[FitResult | Posterior], name: str, *, radii=None, psf_sigma=None, observation: str | None = None
) -> list[Profile]:
    """Return the profiles (see `profile`) of one source in several fits with the same frame, at the same radii."""
    if wrong := [each for each in fits if not isinstance(each, FitResult | Posterior)]:
        raise TypeError(f"A profile is made from a FitResult or a Posterior; got a {type(wrong[0]).__name__}.")
    results = [each.result if isinstance(each, Posterior) else each for each in fits]
    frame, base = results[0].scene.frame, f"sources.{name.removeprefix('sources.')}"
    axes = None if radii is None else _check_radii(radii, frame)
    parts = [_parts(each, result, base) for each, result in zip(fits, results, strict=True)]
    ellipses = [common_ellipses(list(own.values())) for own in parts]
    ends = [table_radii(list(own.values()), *at, axes)[[0, -1]] for own, at in zip(parts, ellipses, strict=True)]
    low, high = min(end[0] for end in ends), max(end[1] for end in ends)
    log_radius = low + TABLE_STEP * np.arange(int(np.ceil((high - low) / TABLE_STEP - 1e-6)) + 1)
    tables = [
        {label: part.table(log_radius, *at) for label, part in own.items()}
        for own, at in zip(parts, ellipses, strict=True)
    ]
    if axes is None:
        every = [(table[label], part) for own, table in zip(parts, tables, strict=True) for label, part in own.items()]
        shapes = np.concatenate([ellipticity for _, ellipticity in ellipses])
        axes = default_radii([table for table, _ in every], [part for _, part in every], shapes)
    found = []
    for fitted, result, own, (center, ellipticity), table in zip(fits, results, parts, ellipses, tables, strict=True):
        widths = _psf_widths(result, psf_sigma, observation)
        lights = {n: part.radial_light(table[n], axes, center, ellipticity, widths) for n, part in own.items()}
        found.append(
            Profile(
                name=base.removeprefix("sources."),
                channels=frame.channels,
                radius=axes,
                total=jax.tree.map(lambda *each: sum(each[1:], each[0]), *lights.values()),
                components=lights,
                center=center,
                ellipticity=np.broadcast_to(ellipticity, (len(center), len(frame.channels), 2)),
                psf_sigma=widths,
                pixel_scale=frame.pixel_scale,
                is_calibrated=all(obs.flux_unit == "nJy" for obs in result.observations),
                is_sampled=isinstance(fitted, Posterior),
                tables=table,
            )
        )
    return found


def _parts(fitted: FitResult | Posterior, result: FitResult, base: str) -> dict[str, Part]:
    """Return the components of a source, by what is left of their paths."""
    channels, components, parts = result.scene.frame.channels, find_components(result.scene, base), {}
    is_linked = any(links(each.morphology) for each in components.values())
    for path, component in components.items():
        label = path.removeprefix(base).replace(".parts.", ".").strip(".") or base.rpartition(".")[2]
        parts[label] = part_of(fitted, channels, path, component, len(channels) if is_linked else 1)
    return parts


def quantiles(values: np.ndarray) -> np.ndarray:
    """Return the 16, 50 and 84 % quantiles of draws, shape (3, ...), NaN left out; NaN where there is nothing else."""
    known = np.isfinite(values).any(axis=0)
    return np.where(known, np.nanquantile(np.where(known, values, 0.0), QUANTILES, axis=0), np.nan)


def _ratio(outer: np.ndarray, inner: np.ndarray) -> np.ndarray:
    """Return a ratio of radii, NaN where the inner one is 0."""
    return outer / np.where(inner > 0, inner, np.nan)


def _check_radii(radii, frame: Frame) -> np.ndarray:
    """Return semi-major axes in pixels."""
    axes = np.atleast_1d(_in_pixels(radii, frame, "The radii of a profile"))
    if axes.ndim != 1 or not (np.isfinite(axes).all() and (np.diff(axes, prepend=0.0) > 0).all()):
        raise ValueError(f"The radii of a profile are positive and increase, shape (radius,); got {radii}.")
    return axes


def _psf_widths(result: FitResult, psf_sigma, observation) -> np.ndarray | None:
    """Return the width, in model pixels, of the Gaussian to convolve with in every channel, NaN for none; None if not wanted."""
    frame, widths = result.scene.frame, np.full(len(result.scene.frame.channels), np.nan)
    if psf_sigma is not None and observation is not None:
        raise ValueError("Give either psf_sigma= or observation=, not both.")
    if psf_sigma is not None:
        given = _in_pixels(psf_sigma, frame, "psf_sigma")
        if given.shape not in ((), widths.shape) or not (np.isfinite(given) & (given > 0)).all():
            raise ValueError(
                f"psf_sigma is one positive width, or one for each of {len(widths)} channels; got {psf_sigma}."
            )
        return np.broadcast_to(given, widths.shape)
    if observation is None:
        return None
    known = {obs.name: obs for obs in result.observations}
    if observation not in known:
        raise KeyError(f"There is no observation {observation!r}; there are {', '.join(known)}.")
    obs = known[observation]
    ratio = 1.0 if obs.wcs is None else pixel_scale_of(obs.wcs) / frame.pixel_scale
    widths[list(frame.channel_index(obs.channels))] = ratio * obs.psf.effective_sigma
    return widths


def _in_pixels(length, frame: Frame, what: str) -> np.ndarray:
    """Return a length, in pixels or as an angle, in model pixels."""
    if isinstance(length, u.Quantity) and length.unit.physical_type == "angle":
        if frame.wcs is None:
            raise ValueError(f"{what} must be in pixels, since the frame has no WCS; got {length}.")
        return np.asarray(length.to_value(u.arcsec) / frame.pixel_scale)
    return units.to_pixels(length, what)
