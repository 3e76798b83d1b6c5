"""Significance on the model frame: of sources of several sizes, in all observations together, next to their surroundings.

Channels are added as a source of constant flux density wants it: `n = sum_c n_c` and `F = sum_c F_c` in one flux unit (see
`infer.matched`), which weighs every channel by what it knows. `n / sqrt(F)` is then a significance. Light that varies slowly,
such as that of a galaxy under a clump or a neighbour, is told apart by a second Gaussian, four times as wide, at the same place,
whose flux is solved for as well: with `r = F_st / F_tt` the contrast of size s with its surroundings t is

    (n_s - r n_t) / sqrt(F_ss - r F_st)
"""

from __future__ import annotations

from collections.abc import Sequence

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from scipy import ndimage

from scenefit.arrays.box import Box
from scenefit.arrays.compilation import as_floats
from scenefit.data.observation import Observation
from scenefit.infer.matched import Camera, camera, channel_units, information, pulled, smoothed
from scenefit.sky.frame import Frame
from scenefit.survey.envelopes import psf_width

SURROUNDINGS, LEAST_SIZE = 4.0, 0.6
"""Width of the surroundings in units of a source's, and the width that a point counts as, in those of the PSF's."""
ALIKE = 1.3
"""Observations whose PSFs are by less than this factor wider than the sharpest one are as sharp."""
COVERED = 0.3
"""Part of the information, in units of what the surroundings suggest, that a pixel must have to count."""
TELLS_APART = 0.02
"""Part of the information that must be left when the surroundings are solved for."""
WHOLE, NARROW = 0.7, 2.0
"""Where noise is correlated, a pixel with less than this part of the information of its neighbours is too near an edge or mask to
know that of sources narrower than so many standard deviations of the PSF."""


class Layer(eqx.Module):
    """Information of some observations together, by pair of sizes, and the width of their PSF.

    Attributes
    ----------
    information : array, shape (pair, y, x)
        First that of every size (surroundings, too) with itself, then that of every size of sources with its surroundings.
    covered : array of bool, shape (scale, y, x)
        Where any of the observations has data enough for sources of a scale.
    group : array of int, shape (y, x), or None
        Which group of observations counts at each pixel; None for all.
    psf_sigma : array, shape (y, x)
        Width, in model pixels, of the PSF of the sharpest of them.
    """

    information: np.ndarray
    covered: np.ndarray
    group: np.ndarray | None
    psf_sigma: np.ndarray


class Sky(eqx.Module):
    """Observations as significance sees them, and what they know of fluxes at every pixel of the frame.

    Attributes
    ----------
    inner : Box
        Where the frame lies on the padded grid.
    groups : tuple of tuple of Camera
        Observations of equal sharpness, the sharpest first.
    information : tuple of arrays, shape (pair, channel, y, x)
        Of each group; see `Layer`.
    depth : array, shape (group, channel)
        The most that is known of the flux of a source of the smallest size.
    counts : array of bool, shape (group, size, y, x)
        Where a group is taken to know anything.
    widths : array, shape (group,)
        Of their PSFs: standard deviations in model pixels.
    response : array, shape (k, l)
        Transfer function of the frame's PSF.
    sizes : array, shape (s,)
        Standard deviations, in model pixels, of all Gaussians.
    num_scales : int
        How many of them are sources; the others are surroundings.
    around : tuple of int
        For each of these, the number of its surroundings.
    unit : array, shape (channel,)
        Of fluxes.
    weights : array, shape (channel,)
        One flux density in these units, in those of the deepest channel.
    """

    inner: Box
    groups: tuple[tuple[Camera, ...], ...]
    information: tuple[np.ndarray, ...]
    depth: np.ndarray
    counts: np.ndarray
    widths: np.ndarray
    response: Array
    sizes: np.ndarray
    num_scales: int = eqx.field(static=True)
    around: tuple[int, ...] = eqx.field(static=True)
    unit: np.ndarray
    weights: np.ndarray

    @classmethod
    def build(
        cls, frame: Frame, observations: Sequence[Observation], residuals: Sequence[np.ndarray], scales: np.ndarray
    ) -> Sky:
        """Prepare matched observations, with what is left of their data, for sources of some scales (in units of the PSF)."""
        widths = np.array([psf_width(frame, obs) for obs in observations])
        numbers, group_widths = _groups(widths)
        unit = channel_units(frame, observations)
        has_data = np.zeros(len(unit), bool)
        for obs in observations:
            has_data[list(frame.channel_index(obs.channels))] |= obs.noise.valid.any(axis=(1, 2))
        unit[~has_data] = unit[has_data].min()
        sizes, around = _sizes(np.asarray(scales, float), widths.min())
        pairs = tuple((n, n) for n in range(len(sizes))) + tuple(enumerate(around))
        groups = tuple(
            tuple(camera(frame, observations[n], residuals[n], unit) for n in members) for members in numbers
        )
        canvas = (len(frame.channels), *frame.fft_shape)
        inner = frame.inner_box
        known = [np.asarray(information(g, as_floats(sizes), pairs, canvas, inner)) for g in groups]
        counts = np.stack([_counts(*each, sizes) for each in zip(groups, known, group_widths, strict=True)])
        known = [
            np.stack(
                [np.where((mask[i] & mask[j])[None], plane, 0.0) for (i, j), plane in zip(pairs, each, strict=True)]
            )
            for each, mask in zip(known, counts, strict=True)
        ]
        ky, kx = np.fft.fftfreq(frame.fft_shape[0]), np.fft.rfftfreq(frame.fft_shape[1])
        return cls(
            inner=inner,
            groups=groups,
            information=tuple(known),
            depth=np.stack([each[0].max(axis=(1, 2)) for each in known]),
            counts=counts,
            widths=group_widths,
            response=as_floats(frame.psf.transfer(ky, kx, np.eye(2))[0].real),
            sizes=sizes,
            num_scales=len(scales),
            around=around,
            unit=unit,
            weights=unit.min() / unit,
        )

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the frame."""
        return self.inner.shape

    def brightness(self, flux: np.ndarray) -> tuple[float, float]:
        """Return the flux of a source, in units of the deepest channel, as the sharpest group shows it, and as all do."""
        known = self.weights**2 * np.stack([self.depth[0], self.depth.sum(axis=0)])
        sharp, full = (known * flux / self.weights).sum(axis=1) / known.sum(axis=1)
        return float(sharp), float(full)

    def pull(self, model: np.ndarray) -> list[Array]:
        """Return what each group of observations says that a model image lacks; see `pulled`."""
        scaled = as_floats(model / self.unit[:, None, None])
        return [pulled(group, scaled) for group in self.groups]

    def coadded(self, pulls: Sequence[Array]) -> np.ndarray:
        """Return the numerators of all sizes, the channels added, of each group, shape (group, size, y, x)."""
        added = jnp.stack([jnp.tensordot(as_floats(self.weights), pull, axes=1) for pull in pulls])
        planes = np.asarray(smoothed(added, self.response, as_floats(self.sizes), self.inner))
        return np.where(self.counts, np.moveaxis(planes, 1, 0), 0.0)

    def layers(self) -> list[Layer]:
        """Return the sharpest observations with data at each pixel, and all of them unless that is the same."""
        squares = (self.weights**2)[:, None, None]
        known = np.stack([(each * squares).sum(axis=1) for each in self.information])
        covered = np.stack([[self._covered(each, scale) for scale in range(self.num_scales)] for each in known])
        if len(known) == 1:
            return [Layer(known[0], covered[0], None, np.broadcast_to(self.widths[0], self.shape))]
        seen = covered[:, 0]
        group = np.where(seen.any(axis=0), seen.argmax(axis=0), len(known) - 1)
        sharpest, sharp = (np.take_along_axis(each, group[None, None], axis=0)[0] for each in (known, covered))
        widths = self.widths[group]
        return [
            Layer(sharpest, sharp, group, widths),
            Layer(known.sum(axis=0), np.logical_or.reduce(covered), None, widths),
        ]

    def chosen(self, layer: Layer, planes: np.ndarray) -> np.ndarray:
        """Return the numerators that count in a layer, shape (size, y, x)."""
        if layer.group is None:
            return planes.sum(axis=0)
        return np.take_along_axis(planes, layer.group[None, None], axis=0)[0]

    def _covered(self, known: np.ndarray, scale: int) -> np.ndarray:
        """Return where there are data enough for a scale, from what is known of all."""
        own, wide = known[scale], known[self.around[scale]]
        has_wide = wide > 1e-3 * wide.max()
        if not has_wide.any():
            return np.zeros(own.shape, bool)
        typical = np.median(own[has_wide] / wide[has_wide])
        return has_wide & (own > COVERED * typical * wide) & (own > 0)

    def significance(self, layer: Layer, numerator: np.ndarray, scale: int, spread=0.0) -> np.ndarray:
        """Return the significance of sources of a scale, 0 without data; `spread` is an error of the numerator besides noise."""
        known, good = layer.information[scale], layer.covered[scale]
        return np.where(good, numerator[scale] / np.sqrt(np.where(good, known, 1.0) + spread**2), 0.0)

    def contrast(self, layer: Layer, numerator: np.ndarray, scale: int, spread=0.0) -> np.ndarray:
        """Return the significance of the contrast of a scale with its surroundings, 0 without data."""
        own, wide = layer.information[scale], layer.information[self.around[scale]]
        cross = layer.information[len(self.sizes) + scale]
        good = layer.covered[scale]
        ratio = np.where(good, cross / np.where(good, wide, 1.0), 0.0)
        left = own - ratio * cross
        good &= left > TELLS_APART * own
        difference = numerator[scale] - ratio * numerator[self.around[scale]]
        return np.where(good, difference / np.sqrt(np.where(good, left, 1.0) + spread**2), 0.0)

    def flux(self, layer: Layer, numerator: np.ndarray, scale: int) -> np.ndarray:
        """Return fluxes of sources of a scale, in units of the deepest channel; 0 without data."""
        known, good = layer.information[scale], layer.covered[scale]
        return np.where(good, numerator[scale] / np.where(good, known, 1.0), 0.0)


def _counts(cameras: tuple[Camera, ...], known: np.ndarray, width: float, sizes: np.ndarray) -> np.ndarray:
    """Return where the information of each size, computed as if masks and edges were far, is that of the data."""
    counts = np.ones((len(sizes), *known.shape[-2:]), bool)
    if any(each.noise.reach for each in cameras):
        points = known[0].sum(axis=0)
        counts[sizes < NARROW * width] = points > WHOLE * ndimage.maximum_filter(points, size=5)
    return counts


def _groups(widths: np.ndarray) -> tuple[list[list[int]], np.ndarray]:
    """Return numbers of observations about as sharp as one another, sharpest first, and the widths of their sharpest PSF."""
    groups: list[list[int]] = []
    for number in np.argsort(widths, kind="stable"):
        if groups and widths[number] < ALIKE * widths[groups[-1][0]]:
            groups[-1].append(int(number))
        else:
            groups.append([int(number)])
    return groups, np.array([widths[group[0]] for group in groups])


def _sizes(scales: np.ndarray, psf_sigma: float) -> tuple[np.ndarray, tuple[int, ...]]:
    """Return all sizes in model pixels, sources first, and for each source the number of its surroundings."""
    sizes = [float(scale) * psf_sigma for scale in scales]
    around = []
    for scale in scales:
        wanted = SURROUNDINGS * max(float(scale), LEAST_SIZE) * psf_sigma
        near = [n for n, size in enumerate(sizes) if abs(size - wanted) < 0.1 * wanted]
        if not near:
            sizes.append(wanted)
        around.append(near[0] if near else len(sizes) - 1)
    return np.array(sizes), tuple(around)
