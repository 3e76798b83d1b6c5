"""Components of a source in every draw of a posterior, or in a fit: their light on ellipses of one centre and shape."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from scenefit.infer.fit import FitResult
from scenefit.infer.sample import Posterior
from scenefit.model.morphology import (
    AbstractRingMorphology,
    DeVaucouleursMorphology,
    ExponentialMorphology,
    SersicMorphology,
    links,
    parameter_values,
    with_arrays,
    with_parameter_values,
)
from scenefit.model.scene import Scene
from scenefit.model.source import Source
from scenefit.sky.frame import Channel
from scenefit.survey.ellipses import (
    TABLE_STEP,
    AbstractLight,
    GrowthTable,
    RingLight,
    SersicLight,
    axis_ratio,
    convolved_light,
)

NUM_RADII, DEFAULT_RADII = 60, (0.03, 8.0)
"""Number of the radii of a profile if none are given, and their range: from so many half-light radii of the smallest component
to so many of the largest."""
SAME_CENTER = 1e-6
"""Pixels within which components count as concentric."""
_FIXED_INDEX = ((ExponentialMorphology, 1.0), (DeVaucouleursMorphology, 4.0))
_NUM_RINGS = 60


class RadialLight(eqx.Module):
    """Light by radius, of a source or of one of its components.

    Attributes
    ----------
    flux : array, shape (draw, channel)
    surface_brightness : array, shape (draw, channel, radius)
        Mean along the ellipse, flux per model pixel squared.
    curve_of_growth : array, shape (draw, channel, radius)
        Flux inside the ellipse.
    convolved_surface_brightness, convolved_curve_of_growth : array, shape (draw, channel, radius), or None
        The same of the light convolved with the PSF.
    """

    flux: np.ndarray
    surface_brightness: np.ndarray
    curve_of_growth: np.ndarray
    convolved_surface_brightness: np.ndarray | None
    convolved_curve_of_growth: np.ndarray | None


class Part(eqx.Module):
    """A component in every draw: its flux by channel, and its shape in every channel, or in one plane for all."""

    light: AbstractLight
    flux: np.ndarray
    center: np.ndarray
    ellipticity: np.ndarray

    @property
    def is_point(self) -> bool:
        """Whether it has no extent."""
        return not self.light.extent()

    def table(self, log_radius, center, ellipticity) -> GrowthTable:
        """Tabulate the light on ellipses."""
        return GrowthTable.build(self.light, log_radius, *self._placed(center, ellipticity))

    def radial_light(self, table, axes, center, ellipticity, widths) -> RadialLight:
        """Return the light on ellipses of given semi-major axes."""
        radius = axes * np.sqrt(axis_ratio(ellipticity))[..., None]
        flux = self.flux[..., None]
        density, growth = (flux * values for values in table.at(np.log(radius)))
        if widths is None:
            return RadialLight(self.flux, density, growth, None, None)
        convolved = np.full((2, *density.shape), np.nan)
        for width in np.unique(widths[np.isfinite(widths)]):
            channels = np.flatnonzero(widths == width)
            planes = channels if ellipticity.shape[1] > 1 else [0]
            light = jax.tree.map(lambda each, planes=planes: each[:, planes], self.light)
            shape, own_shape, offset = self._placed(center, ellipticity)
            convolved[:, :, channels] = convolved_light(
                light, radius[:, planes], shape[:, planes], own_shape[:, planes], offset, float(width)
            )
        return RadialLight(self.flux, density, growth, flux * convolved[0], flux * convolved[1])

    def _placed(self, center, ellipticity):
        """Return the shape of the ellipses, the part's own, and its place relative to their centre."""
        offset = self.center - center
        return ellipticity, self.ellipticity, np.where(np.abs(offset).max() > SAME_CENTER, offset, 0.0)


def part_of(
    fitted: FitResult | Posterior, channels: tuple[Channel, ...], path: str, component: Source, planes: int
) -> Part:
    """Return a component with the values of all draws, or of the fit, in one plane for all channels or in one for each.

    Raises
    ------
    ValueError
        If its light isn't a sum of rings.
    """
    morphology = component.morphology
    if not isinstance(morphology, AbstractRingMorphology):
        raise ValueError(
            f"{path} is a {type(morphology).__name__}, which has no radial profile: measure.measure_shapes measures images."
        )
    count = fitted.log_density.size if isinstance(fitted, Posterior) else 1

    def drawn(name, value) -> np.ndarray:
        if isinstance(fitted, Posterior) and f"{path}.{name}" in fitted.draws:
            return np.asarray(fitted[f"{path}.{name}"], dtype=float)
        return np.broadcast_to(np.asarray(value, dtype=float), (count, *np.shape(value)))

    values = {}
    for name, value in parameter_values(morphology).items():
        # As in Posterior.in_channels, which a fit doesn't have.
        link, each = links(morphology).get(name), drawn(f"morphology.{name}", value)
        each = each[:, None] if link is None else np.einsum("ck,dk...->dc...", link.basis(channels), each)
        values[name] = np.broadcast_to(each, (count, planes, *each.shape[2:]))
    plain = cast(AbstractRingMorphology, with_arrays(morphology))
    shape = np.asarray(_with(plain, values).shape, dtype=float)
    index = component.spectrum.layout(channels)
    flux = np.where(index >= 0, drawn("spectrum.flux", component.spectrum.flux)[:, np.maximum(index, 0)], 0.0)
    return Part(
        light=_light(plain, values, (count, planes)),
        flux=flux,
        center=drawn("center", component.center),
        ellipticity=np.broadcast_to(shape, (count, planes, 2)),
    )


def _light(morphology: AbstractRingMorphology, values, axes: tuple[int, int]) -> AbstractLight:
    """Return the round profile of a morphology whose parameters have the axes draw and plane."""
    index = next((number for kind, number in _FIXED_INDEX if isinstance(morphology, kind)), None)
    if index is not None or isinstance(morphology, SersicMorphology):
        return SersicLight(values.get("sersic_index", np.full(axes, index)), values["half_light_radius"])
    # Every draw and plane is a row; a morphology without parameters has one for all.
    flat = {name: jnp.asarray(value.reshape(-1, *value.shape[2:])) for name, value in values.items()}
    count = len(next(iter(flat.values()))) if flat else 1
    rings = jax.vmap(lambda own: _with(morphology, own).rings(_NUM_RINGS), axis_size=count)(flat)
    sigmas, weights = (np.asarray(each, dtype=float) for each in rings)
    if not flat:
        return RingLight(
            np.broadcast_to(sigmas, (*axes, sigmas.shape[1])), np.broadcast_to(weights, (*axes, weights.shape[1]))
        )
    return RingLight(sigmas.reshape(*axes, -1), weights.reshape(*axes, -1))


def _with(morphology: AbstractRingMorphology, values) -> AbstractRingMorphology:
    """Return a morphology without links with other parameters."""
    return cast(AbstractRingMorphology, with_parameter_values(morphology, values))


def find_components(scene: Scene, base: str) -> dict[str, Source]:
    """Return the components of a source, or of a part of one, by path.

    Raises
    ------
    KeyError
        If there are none, with the nearest names.
    """
    known = dict(scene.components())
    found = {path: each for path, each in known.items() if path == base or path.startswith(f"{base}.")}
    if not found:
        name = base.removeprefix("sources.")
        names = list(dict.fromkeys([*scene.sources, *(path.removeprefix("sources.") for path in known)]))
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.3) or names[:3]
        raise KeyError(f"The scene has no source {name!r}. Nearest: {', '.join(near)}.")
    return found


def common_ellipses(parts: Sequence[Part]) -> tuple[np.ndarray, np.ndarray]:
    """Return centre, shape (draw, 2), and ellipticity, shape (draw, plane, 2), of the ellipses of a whole."""
    extended = [part for part in parts if not part.is_point] or parts
    fluxes = np.clip([part.flux for part in extended], 0.0, None)
    total = fluxes.sum(axis=0)
    share = (fluxes / np.where(total > 0, total, 1.0)).sum(axis=-1)
    share = np.where(share.sum(axis=0) > 0, share, 1.0)
    share = share / share.sum(axis=0)
    center = np.einsum("kd,kdi->di", share, [part.center for part in extended])
    ellipticity = np.einsum("kd,kdpi->dpi", share, [part.ellipticity for part in extended])
    return center, ellipticity


def table_radii(parts: Sequence[Part], center, ellipticity, axes) -> np.ndarray:
    """Return logarithms of circularised radii from within all structure to beyond nearly all light."""
    radii = [radius for part in parts for radius in part.light.extent()]
    offsets = [float(np.abs(part.center - center).max()) for part in parts]
    radii += [2 * offset for offset in offsets if offset > SAME_CENTER]
    if axes is not None:
        flattening = np.sqrt(axis_ratio(ellipticity))
        radii += [float(axes[0] * flattening.min()), float(axes[-1] * flattening.max())]
    low, high = (min(radii), max(radii)) if radii else (1e-2, 1e2)
    steps = int(np.ceil(np.log(high / low) / TABLE_STEP))
    return np.log(low) + TABLE_STEP * np.arange(-1, steps + 2)


def default_radii(tables: Sequence[GrowthTable], parts: Sequence[Part], ellipticity) -> np.ndarray:
    """Return radii for the half-light radii, to within a step of the tables, of the components."""
    sizes = []
    for table, part in zip(tables, parts, strict=True):
        if not part.is_point:
            typical = np.median(table.growth, axis=0)
            sizes += [np.exp(table.log_radius[np.argmax(row >= 0.5 * row[-1])]) for row in typical]
    sizes = np.array(sizes or [1.0]) / np.sqrt(np.median(axis_ratio(ellipticity)))
    low, high = DEFAULT_RADII
    return np.geomspace(low * sizes.min(), high * sizes.max(), NUM_RADII)
