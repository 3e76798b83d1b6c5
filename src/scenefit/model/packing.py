"""Packing: all components of a scene as a few padded stacks, evaluated by one operation per stack.

Components with the same kind of morphology and the same bucket of stamp sizes share a stack. Neither the number of
sources nor their positions are static, so that fitting another blend of the same padded shape compiles nothing and
compile time does not depend on how many sources there are.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Collection, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Complex, Float, Int

from scenefit.arrays import fourier
from scenefit.arrays.box import Box
from scenefit.arrays.compilation import as_booleans, as_floats, as_integers
from scenefit.arrays.stamps import add_stamps, bucket_count, bucket_size
from scenefit.model.clumpy import ClumpyMorphology
from scenefit.model.link import AbstractLink
from scenefit.model.morphology import AbstractImageMorphology, in_channels, links, with_arrays
from scenefit.model.source import Source
from scenefit.sky.frame import Frame

MAX_ROOM, ROOM_CANVASES = 2.5, 4
"""The stamps of profiles are at most by this ratio larger than need be, as long as all have no more pixels than so many
canvases."""
STAMP_COPIES = 3
"""Images of the size of all stamps that a fit holds at a time, at least: the stamps, a change and a gradient."""
FEWEST_CLUMPS = 4
"""Clumps of all morphologies are padded to this number, or its double, fourfold ..."""
SPARE_CANVASES, SPARE_PIXELS = (3, 10), 1 << 21
"""Canvases that stamps may be padded by to have fewer distinct sizes: the second number, but the first where that is more than so
many pixels. Every size is compiled by itself."""


class Stack(eqx.Module):
    """Components of one kind and stamp size; padded members have no mask and no flux.

    Attributes
    ----------
    morphology : AbstractMorphology
        Leaves stacked along a first axis of length n; for images, placed on the padded stamp. Links are there as arrays of
        their values, shape (n, k, ...).
    bases : dict of array, shape (n, channel, k)
        For each parameter that is a link, what turns the values into the parameter in each channel.
    center : array, shape (n, 2)
    flux : array, shape (n, f)
        Entries of the spectra, in units of `flux_unit` of the packing; padded with zeros.
    flux_index, flux_gain : arrays, shape (n, channel)
        Channel c shows `flux[flux_index[c]] * flux_gain[c]`.
    origin : array of int, shape (n, 2)
        First pixel of the padded stamps on the canvas.
    margin : array of int, shape ()
        Pixel of the canvas that is the first of the frame, on which centers are.
    mask : array of bool, shape (n, h, w)
        Pixels of the true stamps.
    """

    morphology: eqx.Module
    bases: dict[str, Float[Array, "n channel _"]]
    center: Float[Array, "n 2"]
    flux: Float[Array, "n f"]
    flux_index: Int[Array, "n channel"]
    flux_gain: Float[Array, "n channel"]
    origin: Int[Array, "n 2"]
    margin: Int[Array, ""]
    mask: Bool[Array, "n h w"]

    @property
    def spectra(self) -> Float[Array, "n channel"]:
        """Total flux per channel."""
        return jnp.take_along_axis(self.flux, self.flux_index, axis=1) * self.flux_gain

    def stamps(self, psf_sigma: Float[Array, ""]) -> Float[Array, "n plane h w"]:
        """Evaluate all morphologies on their padded stamps: one plane, or one a channel if there are links."""
        height, width = self.mask.shape[1:]
        names = list(self.bases)

        def linked(morphology):
            return [getattr(morphology, name) for name in names]

        def one(morphology, bases, center, origin):
            y = jnp.arange(height) + origin[0] - center[0]
            x = jnp.arange(width) + origin[1] - center[1]
            if not names:
                return morphology.evaluate(y, x, psf_sigma)[None]
            values = [
                jnp.tensordot(bases[name], value, axes=1) for name, value in zip(names, linked(morphology), strict=True)
            ]

            def plane(parameters):
                return eqx.tree_at(linked, morphology, parameters).evaluate(y, x, psf_sigma)

            return jax.vmap(plane)(values)

        stamps = jax.vmap(one)(self.morphology, self.bases, self.center, self.origin - self.margin)
        return jnp.where(self.mask[:, None], stamps, 0.0)


def evaluate_stacks(stacks: Sequence[Stack], psf_sigma, shape: tuple[int, int, int]) -> Float[Array, "channel y x"]:
    """Return the model image of all stacks on a canvas of `shape` (channel, y, x)."""
    canvas = jnp.zeros(shape, jnp.result_type(float))
    for stack in stacks:
        canvas = add_stamps(canvas, stack.spectra, stack.stamps(psf_sigma), stack.origin)
    return canvas


def transform_stacks(stacks: Sequence[Stack], psf_sigma, shape: tuple[int, int, int]) -> Complex[Array, "channel k l"]:
    """Return the Fourier transform of `evaluate_stacks`.

    Where there are fewer components than channels, each is transformed once for all of them.
    """
    if any(stack.bases for stack in stacks) or sum(len(stack.origin) for stack in stacks) >= shape[0]:
        return fourier.transform(evaluate_stacks(stacks, psf_sigma, shape))
    spectrum = jnp.zeros((), jnp.result_type(complex))
    for stack in stacks:
        stamps = stack.stamps(psf_sigma)
        for n in range(len(stamps)):
            blank, one = jnp.zeros((1, *shape[1:]), stamps.dtype), jnp.ones((1, 1), stamps.dtype)
            modes = fourier.transform(add_stamps(blank, one, stamps[n : n + 1], stack.origin[n : n + 1]))
            spectrum = spectrum + stack.spectra[n][:, None, None] * modes
    return spectrum if stacks else fourier.transform(jnp.zeros(shape, jnp.result_type(float)))


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

    @property
    def window(self) -> tuple[slice, slice]:
        """Rows and columns of the padded stamp that are the true one."""
        (y, x), (height, width) = self.offset, self.box.shape
        return slice(y, y + height), slice(x, x + width)


def member_stamps(members: Sequence[Member], images: Sequence[np.ndarray | Array]) -> dict[str, tuple[Box, np.ndarray]]:
    """Return the true stamps of components, by path, from the padded ones of all stacks (see `Scene.stamps`)."""
    arrays = [np.asarray(image, dtype=float) for image in images]
    return {
        member.path: (member.box, arrays[member.stack][(member.row, slice(None), *member.window)]) for member in members
    }


def component_box(component: Source, frame: Frame, room: float = 1.0, tolerance: float | None = None) -> Box:
    """Return the stamp of a component on the model frame and its margin; empty if it lies outside.

    That of a profile is by the factor `room` larger than need be, so that it holds the profile when that has grown; all but a
    fraction `tolerance` of its light lies within (see `AbstractMorphology.radius`).
    """
    morphology = component.morphology
    if isinstance(morphology, AbstractImageMorphology):
        corner = [int(np.rint(c)) - a for c, a in zip(np.asarray(component.center), morphology.anchor, strict=True)]
        height, width = morphology.values.shape[-2:]
        return Box((height, width), (corner[0], corner[1]))
    shapes = in_channels(morphology, frame.channels)
    radius = room * max(shape.radius(model_psf_sigma(frame), tolerance) for shape in shapes)
    # Not more than reaches over the whole frame.
    half = int(np.ceil(min(radius, 2 * max(frame.outer_box.shape))))
    return Box.around(tuple(np.asarray(component.center, float)), half).intersection(frame.outer_box)


def _room(components, frame) -> float:
    """Return by how much the stamps of profiles can be larger than need be."""
    analytic = [
        component for _, component in components if not isinstance(component.morphology, AbstractImageMorphology)
    ]
    pixels = sum(np.prod(component_box(component, frame).shape) for component in analytic)
    return float(np.clip(np.sqrt(ROOM_CANVASES * np.prod(frame.fft_shape) / max(pixels, 1)), 1.0, MAX_ROOM))


def model_psf_sigma(frame: Frame) -> float:
    """Return the standard deviation of the Gaussian model PSF in pixels."""
    return float(frame.psf.effective_sigma[0])


def pack(
    frame: Frame,
    components: Sequence[tuple[str, Source]],
    flux_unit: np.ndarray | None = None,
    *,
    whole_frame: bool = False,
    roomy: Collection[str] = (),
) -> tuple[list[Stack], list[Member]]:
    """Pack components into stacks.

    Parameters
    ----------
    frame : Frame
    components : sequence of (path, Source)
    flux_unit : array, shape (channel,), optional
        Unit of the flux in each channel of the model image; 1 by default.
    whole_frame : bool
        Whether the stamps of profiles cover the frame and its margin, whatever their size.
    roomy : collection of str
        Paths of profiles whose stamps are larger than need be by `MAX_ROOM`, whatever that costs.

    Returns
    -------
    stacks : list of Stack
    members : list of Member
        One a component, in order.

    Raises
    ------
    ValueError
        If a component lies outside the frame, or an image sticks out of it.
    MemoryError
        If the stamps can't be held in memory.
    """
    unit = np.ones(len(frame.channels)) if flux_unit is None else np.asarray(flux_unit, dtype=float)
    canvas = frame.fft_shape
    placed = []
    room = np.inf if whole_frame else _room(components, frame)
    for path, component in components:
        box = component_box(component, frame, max(room, MAX_ROOM) if path in roomy else room)
        is_image = isinstance(component.morphology, AbstractImageMorphology)
        inner = box.intersection(frame.box if is_image else frame.outer_box)
        if inner.is_empty or (inner.shape != box.shape):
            raise ValueError(
                f"{path}: its stamp of {box.shape} pixels at (y, x) = {box.origin} isn't inside the model frame of "
                f"{frame.box.shape} pixels. Remove the source, cut its image or enlarge the frame."
            )
        placed.append((path, component, box))
    limit, stop = frame.outer_box.shape, frame.outer_box.stop
    sides = [min(bucket_size(max(box.shape)), max(limit)) for _, _, box in placed]
    pixels = canvas[0] * canvas[1]
    buckets = merged_buckets(sides, int(pixels * np.clip(SPARE_PIXELS / pixels, *SPARE_CANVASES)))
    placed = [
        (path, component, box, (min(side, limit[0]), min(side, limit[1])))
        for (path, component, box), side in zip(placed, buckets, strict=True)
    ]
    clumps = _clump_count([component.morphology for _, component, _, _ in placed])
    keys = sorted({_stack_key(component, shape, clumps) for _, component, _, shape in placed}, key=str)
    rows: dict = {key: [] for key in keys}
    members = []
    for path, component, box, shape in placed:
        key = _stack_key(component, shape, clumps)
        corner = [min(o, n - s) for o, n, s in zip(box.origin, stop, shape, strict=True)]
        offset = (box.origin[0] - corner[0], box.origin[1] - corner[1])
        layout = component.spectrum.layout(frame.channels)
        flux_unit = flux_units(layout, unit, component.spectrum.flux.shape[0])
        members.append(Member(path, keys.index(key), len(rows[key]), box, offset, flux_unit))
        rows[key].append((component, members[-1], np.add(corner, frame.margin), layout))
    _check_memory(rows)
    return [_build_stack(rows[key], key[2], unit, frame, clumps) for key in keys], members


def memory_size() -> float:
    """Return the bytes of memory of this machine, infinite where it doesn't say."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, OSError, ValueError):  # Windows
        return np.inf


def _check_memory(rows):
    """Raise MemoryError if stamps take more memory than there is."""
    itemsize = jnp.result_type(float).itemsize
    sizes = {key: STAMP_COPIES * itemsize * bucket_count(len(each)) * np.prod(key[2]) for key, each in rows.items()}
    total, available = sum(sizes.values()), memory_size()
    if total > available:
        largest = max(sizes, key=lambda key: sizes[key])
        raise MemoryError(
            f"The stamps of {sum(map(len, rows.values()))} components take {total / 1e9:.1f} GB at least, and this machine has "
            f"{available / 1e9:.1f} GB; {len(rows[largest])} of them, of {' x '.join(map(str, largest[2]))} pixels, take "
            f"{sizes[largest] / 1e9:.1f} GB. Make the stamps smaller (half_size=, or smaller radii), or fit parts of the field."
        )


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


def _stack_key(component, shape, clumps):
    """Return what components of one stack have in common."""
    morphology = component.morphology
    is_image = isinstance(morphology, AbstractImageMorphology)
    shapes = morphology.values.shape[:-2] if is_image else _leaf_shapes(_padded(morphology, clumps))
    return type(morphology).__name__, shapes, shape, component.spectrum.flux.shape[0]


def _clump_count(morphologies) -> int:
    """Return the number that the clumps of all morphologies are padded to: one of few, so that they share a stack."""
    most = max((len(each.offsets) for each in morphologies if isinstance(each, ClumpyMorphology)), default=0)
    return 1 << max(FEWEST_CLUMPS.bit_length() - 1, (most - 1).bit_length())


def _padded(morphology, clumps: int):
    """Return a morphology with so many clumps, and then without links, if it has any."""
    plain = with_arrays(morphology)
    return plain.padded(clumps) if isinstance(plain, ClumpyMorphology) else morphology


def _leaf_shapes(morphology):
    """Return the shapes of all arrays of a morphology, and which are the values of links."""
    arrays = [(name, getattr(morphology, name)) for name in morphology.__dataclass_fields__]
    return tuple(
        (name, "link", np.shape(value.values)) if isinstance(value, AbstractLink) else (name, "", np.shape(value))
        for name, value in arrays
    )


def flux_units(layout: np.ndarray, unit: np.ndarray, count: int) -> np.ndarray:
    """Return the unit in which each of `count` spectrum entries is packed: that of its first channel."""
    values = np.ones(count)
    for channel in range(len(unit) - 1, -1, -1):
        if layout[channel] >= 0:
            values[layout[channel]] = unit[channel]
    return values


def _build_stack(rows, shape, unit, frame, clumps) -> Stack:
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
        mask[(n, *member.window)] = True
    return Stack(
        morphology=_stacked_morphologies(rows, mask.shape, clumps),
        bases=_stacked_bases(rows, count, frame.channels),
        center=as_floats(center),
        flux=as_floats(flux),
        flux_index=as_integers(index),
        flux_gain=as_floats(gain),
        origin=as_integers(origin),
        margin=as_integers(frame.margin),
        mask=as_booleans(mask),
    )


def _stacked_morphologies(rows, shape, clumps):
    """Return the morphologies of one kind as a single one, its leaves stacked; images placed on the padded stamps."""
    first = rows[0][0].morphology
    if isinstance(first, AbstractImageMorphology):
        morphologies = [component.morphology.padded(shape[1:], member.offset) for component, member, *_ in rows]
        morphologies += [jax.tree.map(np.zeros_like, morphologies[0])] * (shape[0] - len(rows))
    else:
        morphologies = [with_arrays(_padded(component.morphology, clumps)) for component, *_ in rows]
        morphologies += morphologies[:1] * (shape[0] - len(rows))
    return jax.tree.map(lambda *leaves: as_floats(np.stack([np.asarray(x, float) for x in leaves])), *morphologies)


def _stacked_bases(rows, count, channels) -> dict[str, Array]:
    """Return the bases of the linked parameters, those of the padding like the first."""
    present = [links(component.morphology) for component, *_ in rows]
    present += present[:1] * (count - len(rows))
    return {name: as_floats(np.stack([each[name].basis(channels) for each in present])) for name in present[0]}
