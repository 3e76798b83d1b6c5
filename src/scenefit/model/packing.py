"""Packing: all components of a scene as a few padded stacks, evaluated by one operation per stack.

Components with the same kind of morphology and the same bucket of stamp sizes share a stack. Neither the number of
sources nor their positions are static, so that fitting another blend of the same padded shape compiles nothing and
compile time does not depend on how many sources there are.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from scenefit.arrays.box import Box
from scenefit.arrays.compilation import as_booleans, as_floats, as_integers
from scenefit.arrays.stamps import add_stamps, bucket_count, bucket_size
from scenefit.model.morphology import PixelMorphology
from scenefit.model.source import Source
from scenefit.sky.frame import Frame

SPARE_CANVASES = 3
"""Pixels, in units of the canvas, that stamps may be padded by to have fewer distinct sizes."""


class Stack(eqx.Module):
    """Components of one kind and stamp size; padded members have no mask and no flux.

    Attributes
    ----------
    morphology : AbstractMorphology
        Leaves stacked along a first axis of length n; for images, placed on the padded stamp.
    center : array, shape (n, 2)
    flux : array, shape (n, f)
        Entries of the spectra, in units of `flux_unit` of the packing; padded with zeros.
    flux_index, flux_gain : arrays, shape (n, channel)
        Channel c shows `flux[flux_index[c]] * flux_gain[c]`.
    origin : array of int, shape (n, 2)
        First pixel of the padded stamps on the canvas.
    mask : array of bool, shape (n, h, w)
        Pixels of the true stamps.
    """

    morphology: eqx.Module
    center: Float[Array, "n 2"]
    flux: Float[Array, "n f"]
    flux_index: Int[Array, "n channel"]
    flux_gain: Float[Array, "n channel"]
    origin: Int[Array, "n 2"]
    mask: Bool[Array, "n h w"]

    @property
    def spectra(self) -> Float[Array, "n channel"]:
        """Total flux per channel."""
        return jnp.take_along_axis(self.flux, self.flux_index, axis=1) * self.flux_gain

    def stamps(self, psf_sigma: Float[Array, ""]) -> Float[Array, "n h w"]:
        """Evaluate all morphologies on their padded stamps."""
        height, width = self.mask.shape[1:]

        def one(morphology, center, origin):
            y = jnp.arange(height) + origin[0] - center[0]
            x = jnp.arange(width) + origin[1] - center[1]
            return morphology.evaluate(y, x, psf_sigma)

        return jnp.where(self.mask, jax.vmap(one)(self.morphology, self.center, self.origin), 0.0)


def evaluate_stacks(stacks: Sequence[Stack], psf_sigma, shape: tuple[int, int, int]) -> Float[Array, "channel y x"]:
    """Return the model image of all stacks on a canvas of `shape` (channel, y, x)."""
    canvas = jnp.zeros(shape, jnp.result_type(float))
    for stack in stacks:
        canvas = add_stamps(canvas, stack.spectra, stack.stamps(psf_sigma), stack.origin)
    return canvas


class Member(eqx.Module):
    """Where a component lies in the packing.

    Attributes
    ----------
    path : str
        Path of the component.
    stack, row : int
        Which stack, and which member of it.
    box : Box
        The true stamp on the model frame.
    offset : (int, int)
        First pixel of the true stamp on the padded one.
    flux_unit : array, shape (f,)
        What 1 stands for in each entry of the packed spectrum.
    """

    path: str = eqx.field(static=True)
    stack: int = eqx.field(static=True)
    row: int = eqx.field(static=True)
    box: Box
    offset: tuple[int, int] = eqx.field(static=True)
    flux_unit: np.ndarray


def component_box(component: Source, frame: Frame) -> Box:
    """Return the stamp of a component on the model frame; empty if it lies outside."""
    morphology = component.morphology
    if isinstance(morphology, PixelMorphology):
        corner = [int(np.rint(c)) - a for c, a in zip(np.asarray(component.center), morphology.anchor, strict=True)]
        height, width = morphology.image.shape
        return Box((height, width), (corner[0], corner[1]))
    half = int(np.ceil(morphology.radius(model_psf_sigma(frame))))
    return Box.around(tuple(np.asarray(component.center, float)), half).intersection(frame.box)


def model_psf_sigma(frame: Frame) -> float:
    """Return the standard deviation of the Gaussian model PSF in pixels."""
    return float(frame.psf.effective_sigma[0])


def pack(
    frame: Frame, components: Sequence[tuple[str, Source]], flux_unit: np.ndarray | None = None
) -> tuple[list[Stack], list[Member]]:
    """Pack components into stacks.

    Parameters
    ----------
    frame : Frame
    components : sequence of (path, Source)
    flux_unit : array, shape (channel,), optional
        Unit of the flux in each channel of the model image; 1 by default.

    Returns
    -------
    stacks : list of Stack
    members : list of Member
        One a component, in order.

    Raises
    ------
    ValueError
        If a component lies outside the frame, or an image sticks out of it.
    """
    unit = np.ones(len(frame.channels)) if flux_unit is None else np.asarray(flux_unit, dtype=float)
    canvas = frame.fft_shape
    placed = []
    for path, component in components:
        box = component_box(component, frame)
        inner = box.intersection(frame.box)
        if inner.is_empty or (inner.shape != box.shape):
            raise ValueError(
                f"{path}: its stamp of {box.shape} pixels at (y, x) = {box.origin} isn't inside the model frame of "
                f"{frame.box.shape} pixels. Remove the source, cut its image or enlarge the frame."
            )
        placed.append((path, component, box))
    limit = frame.box.shape
    sides = [min(bucket_size(max(box.shape)), max(limit)) for _, _, box in placed]
    buckets = merged_buckets(sides, SPARE_CANVASES * canvas[0] * canvas[1])
    placed = [
        (path, component, box, (min(side, limit[0]), min(side, limit[1])))
        for (path, component, box), side in zip(placed, buckets, strict=True)
    ]
    keys = sorted({_stack_key(component, shape) for _, component, _, shape in placed}, key=str)
    rows: dict = {key: [] for key in keys}
    members = []
    for path, component, box, shape in placed:
        key = _stack_key(component, shape)
        origin = tuple(min(o, n - s) for o, n, s in zip(box.origin, limit, shape, strict=True))
        offset = (box.origin[0] - origin[0], box.origin[1] - origin[1])
        layout = component.spectrum.layout(frame.channels)
        flux_unit = flux_units(layout, unit, component.spectrum.flux.shape[0])
        members.append(Member(path, keys.index(key), len(rows[key]), box, offset, flux_unit))
        rows[key].append((component, members[-1], origin, layout))
    return [_build_stack(rows[key], key[2], unit) for key in keys], members


def merged_buckets(sides: Sequence[int], spare: int) -> list[int]:
    """Return larger bucket sizes, fewer distinct ones, as long as that adds no more than `spare` pixels in all.

    Every distinct size is compiled separately, whereas a few more pixels hardly cost anything beside the Fourier
    transforms of the canvas.
    """
    result = list(sides)
    while len(set(result)) > 1:
        sizes = sorted(set(result))
        costs = [(result.count(a) * (b * b - a * a), a, b) for a, b in itertools.pairwise(sizes)]
        cost, small, large = min(costs)
        if cost > spare:
            break
        spare -= cost
        result = [large if side == small else side for side in result]
    return result


def _stack_key(component, shape):
    """Return what components of one stack have in common."""
    morphology = component.morphology
    static = "" if isinstance(morphology, PixelMorphology) else str(jax.tree.structure(morphology))
    return type(morphology).__name__, static, shape, component.spectrum.flux.shape[0]


def flux_units(layout: np.ndarray, unit: np.ndarray, count: int) -> np.ndarray:
    """Return the unit in which each of `count` spectrum entries is packed: that of its first channel."""
    values = np.ones(count)
    for channel in range(len(unit) - 1, -1, -1):
        if layout[channel] >= 0:
            values[layout[channel]] = unit[channel]
    return values


def _build_stack(rows, shape, unit) -> Stack:
    """Stack components (with their members, origins and spectrum layouts) on stamps of `shape`, padding their number."""
    count, num_channels = bucket_count(len(rows)), len(unit)
    num_flux = rows[0][0].spectrum.flux.shape[0]
    flux, gain = np.zeros((count, num_flux)), np.zeros((count, num_channels))
    index = np.zeros((count, num_channels), int)
    center, origin = np.zeros((count, 2)), np.zeros((count, 2), int)
    mask = np.zeros((count, *shape), bool)
    for n, (component, member, corner, layout) in enumerate(rows):
        flux[n] = np.asarray(component.spectrum.flux, dtype=float) / member.flux_unit
        index[n] = np.maximum(layout, 0)
        gain[n] = np.where(layout >= 0, member.flux_unit[index[n]] / unit, 0.0)
        center[n], origin[n] = np.asarray(component.center, float), corner
        mask[(n, *_window(member))] = True
    return Stack(
        morphology=_stacked_morphologies(rows, mask.shape),
        center=as_floats(center),
        flux=as_floats(flux),
        flux_index=as_integers(index),
        flux_gain=as_floats(gain),
        origin=as_integers(origin),
        mask=as_booleans(mask),
    )


def _window(member: Member) -> tuple[slice, slice]:
    """Return where the true stamp lies on the padded one."""
    (y, x), (height, width) = member.offset, member.box.shape
    return slice(y, y + height), slice(x, x + width)


def _stacked_morphologies(rows, shape):
    """Return the morphologies of one kind as a single one, its leaves stacked; images placed on the padded stamps."""
    first = rows[0][0].morphology
    if isinstance(first, PixelMorphology):
        images = np.zeros(shape)
        for n, (component, member, *_) in enumerate(rows):
            images[(n, *_window(member))] = component.morphology.image
        blank = PixelMorphology(np.ones((1, 1)), anchor=(0, 0))
        return eqx.tree_at(lambda m: m.image, blank, as_floats(images))
    morphologies = [component.morphology for component, *_ in rows]
    morphologies += [first] * (shape[0] - len(rows))
    return jax.tree.map(lambda *leaves: as_floats(np.stack([np.asarray(x, float) for x in leaves])), *morphologies)
