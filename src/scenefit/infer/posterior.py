"""The posterior of a scene and its observations as a function of packed coordinates.

Everything here works on a `State`: a vector of coordinates (fluxes, centers, shapes, shifts, backgrounds) and the stacks
of free-pixel images. Fluxes are in units of the noise of the data, so that no amplitude matters; sizes and the like are
in unconstrained coordinates; fluxes, backgrounds and pixels keep their own values, within bounds.
"""

from __future__ import annotations

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Bool, Float, Int, Shaped
from numpyro.distributions import constraints

from scenefit.data.noise import AbstractNoise
from scenefit.data.observation import Observation
from scenefit.data.renderer import Renderer
from scenefit.model.morphology import PixelMorphology
from scenefit.model.packing import Member, Stack, evaluate_stacks, flux_units, model_psf_sigma, pack
from scenefit.model.parameters import Parameters, unit_disk
from scenefit.model.scene import Scene
from scenefit.model.source import Source


class State(eqx.Module):
    """A point in parameter space.

    Attributes
    ----------
    vector : array, shape (n,)
        Coordinates of everything but images.
    images : tuple of arrays, shape (stack member, h, w)
        Free-pixel images, one stack each.
    """

    vector: Shaped[Array, " n"]
    images: tuple[Shaped[Array, "_ _ _"], ...]


class Image(eqx.Module):
    """One observation as the solver sees it: data and model in units of the noise level of each channel."""

    renderer: Renderer
    data: Float[Array, "channel y x"]
    noise: AbstractNoise
    shift: Float[Array, " 2"]
    background: Float[Array, " channel"]
    gain: Float[Array, " channel"]


class Leaf(eqx.Module):
    """Which part of the vector is which array of the problem.

    Attributes
    ----------
    kind : "stack" or "image"
    number : int
        Which stack or image.
    name : str
        Attribute; "morphology.NAME" for a parameter of the morphology.
    start, stop : int
        Where it lies in the vector of elements.
    shape : tuple of int
    disk : bool
        Whether the last axis is a pair inside the unit disk.
    """

    kind: str = eqx.field(static=True)
    number: int = eqx.field(static=True)
    name: str = eqx.field(static=True)
    start: int = eqx.field(static=True)
    stop: int = eqx.field(static=True)
    shape: tuple[int, ...] = eqx.field(static=True)
    disk: bool = eqx.field(static=True)


class Problem(eqx.Module):
    """All that a fit needs, as arrays: two blends of one padded shape differ in values only.

    Attributes
    ----------
    stacks : tuple of Stack
        Components; what is free in them is replaced by the state.
    images : tuple of Image
    index : array of int, shape (e,)
        Element e of the leaves is coordinate `index[e]` (tied elements share one).
    low, high : arrays, shape (e,)
        Range of each element.
    bounded : array of bool, shape (e,)
        Whether the coordinate is the element itself, kept in range by projection, or a smooth map of it.
    free : State of bool
        What may change.
    lowest, highest : State
        Bounds of the coordinates.
    priors : tuple of (distribution, int array, array)
        Distribution, the elements that it holds for, and their unit.
    image_priors : tuple of (array, array), shape (stack member, h, w)
        Mean and inverse variance of the normal prior of each pixel; inverse variance 0 for none.
    leaves : tuple of Leaf
    psf_sigma : float
    canvas : (int, int, int)
    """

    stacks: tuple[Stack, ...]
    images: tuple[Image, ...]
    index: Int[Array, " e"]
    low: Float[Array, " e"]
    high: Float[Array, " e"]
    bounded: Bool[Array, " e"]
    free: State
    lowest: State
    highest: State
    priors: tuple
    image_priors: tuple
    psf_sigma: Float[Array, ""]
    leaves: tuple[Leaf, ...]
    canvas: tuple[int, int, int] = eqx.field(static=True)

    def elements(self, vector: Float[Array, " n"]) -> Float[Array, " e"]:
        """Return the parameter values from the coordinates."""
        coordinate = vector[self.index]
        values = jnp.where(self.bounded, coordinate, smooth_range(coordinate, self.low, self.high))
        for leaf in self.leaves:
            if leaf.disk:
                pairs = coordinate[leaf.start : leaf.stop].reshape(-1, 2)
                pairs = pairs / jnp.sqrt(1 + jnp.sum(pairs**2, axis=1, keepdims=True))
                values = values.at[leaf.start : leaf.stop].set(pairs.ravel())
        return values

    def fill(self, state: State) -> tuple[list[Stack], list[Image]]:
        """Return stacks and images with the values of a state."""
        elements = self.elements(state.vector)
        stacks, images = list(self.stacks), list(self.images)
        for leaf in self.leaves:
            value = elements[leaf.start : leaf.stop].reshape(leaf.shape)
            group = stacks if leaf.kind == "stack" else images
            group[leaf.number] = eqx.tree_at(_getter(leaf.name), group[leaf.number], value)
        remaining = iter(state.images)
        for number, stack in enumerate(stacks):
            if isinstance(stack.morphology, PixelMorphology):
                stacks[number] = eqx.tree_at(lambda s: s.morphology.image, stack, next(remaining))
        return stacks, images

    def model(self, state: State) -> Float[Array, "channel y x"]:
        """Return the model image on the padded canvas."""
        return evaluate_stacks(self.fill(state)[0], self.psf_sigma, self.canvas)

    def residuals(self, state: State) -> tuple[Float[Array, "channel y x"], ...]:
        """Return the whitened residuals (model minus data) of every observation."""
        stacks, images = self.fill(state)
        spectrum = jnp.fft.rfft2(evaluate_stacks(stacks, self.psf_sigma, self.canvas))
        return tuple(
            image.noise.whiten(
                image.renderer(spectrum, image.shift) * image.gain[:, None, None]
                + image.background[:, None, None]
                - image.data
            )
            for image in images
        )

    def log_prior(self, vector: Float[Array, " n"]) -> Float[Array, ""]:
        """Return the log-density of the priors at the parameter values."""
        elements = self.elements(vector)
        return sum(
            (jnp.sum(prior.log_prob(elements[where] * unit)) for prior, where, unit in self.priors), jnp.zeros(())
        )

    def loss(self, state: State) -> Float[Array, ""]:
        """Return half the chi-square minus the log-prior."""
        chi_square = sum(jnp.vdot(residual, residual) for residual in self.residuals(state))
        return 0.5 * chi_square - self.log_prior(state.vector) + 0.5 * self.image_penalty(state.images)

    def image_penalty(self, images: tuple[Float[Array, "m h w"], ...]) -> Float[Array, ""]:
        """Return the squared distance of the pixels from the means of their priors, in standard deviations."""
        terms = [jnp.sum(w * (i - m) ** 2) for i, (m, w) in zip(images, self.image_priors, strict=True)]
        return sum(terms, jnp.zeros(()))

    def project(self, state: State) -> State:
        """Return the nearest state within bounds."""
        return jax.tree.map(jnp.clip, state, self.lowest, self.highest)


def smooth_range(coordinate, low, high):
    """Map unconstrained coordinates into (low, high): exponential with one bound, logistic with two, identity with none."""
    has_low, has_high = jnp.isfinite(low), jnp.isfinite(high)
    safe_low, safe_high = jnp.where(has_low, low, 0.0), jnp.where(has_high, high, 1.0)
    grown = jnp.exp(jnp.clip(jnp.where(has_low, coordinate, -coordinate), -30, 30))
    both = safe_low + (safe_high - safe_low) * jax.nn.sigmoid(coordinate)
    one = jnp.where(has_low, safe_low + grown, safe_high - grown)
    return jnp.where(has_low & has_high, both, jnp.where(has_low | has_high, one, coordinate))


def unconstrained(value: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Return the coordinate that `smooth_range` maps to `value` (moved inside by a hair where it lies on a bound)."""
    result = np.array(value, dtype=float)
    both, one_low = np.isfinite(low) & np.isfinite(high), np.isfinite(low) & ~np.isfinite(high)
    one_high = ~np.isfinite(low) & np.isfinite(high)
    with np.errstate(all="ignore"):
        fraction = np.clip((value - low) / (high - low), 1e-4, 1 - 1e-4)
        result = np.where(both, np.log(fraction / (1 - fraction)), result)
        result = np.where(one_low, np.log(np.maximum(value - low, 1e-6)), result)
        return np.where(one_high, -np.log(np.maximum(high - value, 1e-6)), result)


def _getter(name):
    """Return the function that takes attribute `name` (with dots) from a module, for `eqx.tree_at`."""

    def get(module):
        for part in name.split("."):
            module = getattr(module, part)
        return module

    return get


class Layout(eqx.Module):
    """What leads from a state back to a user's scene and observations.

    Attributes
    ----------
    members : list of Member
        Where each component is packed.
    flux_unit : array, shape (channel,)
        Flux per channel that 1 in the packed model stands for.
    noise_level : list of arrays, shape (channel,)
        Data unit of each observation.
    """

    members: list[Member]
    flux_unit: np.ndarray
    noise_level: list[np.ndarray]


def build(scene: Scene, observations: Sequence[Observation], parameters: Parameters) -> tuple[Problem, State, Layout]:
    """Pack a scene, matched observations and parameters.

    Raises
    ------
    ValueError
        If an observation isn't matched, a start violates its constraint, or a constraint isn't a range.
    """
    frame = scene.frame
    levels = [obs.noise.level() for obs in observations]
    unit = _flux_unit(frame, observations, levels)
    components = list(scene.components())
    stacks, members = pack(frame, components, unit)
    images = [_as_image(obs, level, unit) for obs, level in zip(observations, levels, strict=True)]
    layout = Layout(members, unit, levels)
    table = _element_table(stacks, components, frame.channels, observations, parameters, layout)
    free_images, image_low, image_priors = _image_bounds(stacks, members, parameters)
    lowest, highest = table.coordinate_bounds()
    dtype = jnp.result_type(float)
    problem = Problem(
        stacks=tuple(stacks),
        images=tuple(images),
        index=jnp.asarray(table.index, jnp.int32),
        low=jnp.asarray(table.low, dtype),
        high=jnp.asarray(table.high, dtype),
        bounded=jnp.asarray(table.bounded),
        free=State(jnp.asarray(table.free), free_images),
        lowest=State(jnp.asarray(lowest, dtype), image_low),
        highest=State(jnp.asarray(highest, dtype), tuple(jnp.full_like(low, jnp.inf) for low in image_low)),
        priors=table.priors,
        image_priors=image_priors,
        psf_sigma=jnp.asarray(model_psf_sigma(frame), dtype),
        leaves=table.leaves,
        canvas=(len(frame.channels), *frame.fft_shape),
    )
    pixels = tuple(s.morphology.image for s in stacks if isinstance(s.morphology, PixelMorphology))
    return problem, State(jnp.asarray(table.start, dtype), pixels), layout


def unpack(
    problem: Problem, state: State, layout: Layout, scene: Scene, observations: Sequence[Observation]
) -> tuple[Scene, tuple[Observation, ...]]:
    """Return the scene and observations with the values of a state; images are scaled to unit sum again."""
    stacks, images = jax.tree.map(np.asarray, problem.fill(state))
    fitted = {}
    for member, (_, component) in zip(layout.members, scene.components(), strict=True):
        fitted[member.path] = _unpack_component(stacks[member.stack], member, component, scene.frame, layout.flux_unit)
    sources = {name: _replace_components(source, f"sources.{name}", fitted) for name, source in scene.sources.items()}
    moved = tuple(
        obs.with_shift(np.asarray(image.shift, float)).with_background(np.asarray(image.background, float) * level)
        for obs, image, level in zip(observations, images, layout.noise_level, strict=True)
    )
    return Scene(scene.frame, sources), moved


def flux_coordinates(problem: Problem, layout: Layout, scene: Scene) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return, for every component, which coordinate each entry of its spectrum is (-1: none) and its unit."""
    index = np.asarray(problem.index)
    leaves = {leaf.number: leaf for leaf in problem.leaves if leaf.kind == "stack" and leaf.name == "flux"}
    result = []
    for member, (_, component) in zip(layout.members, scene.components(), strict=True):
        count = component.spectrum.flux.shape[0]
        units = flux_units(component.spectrum.layout(scene.frame.channels), layout.flux_unit, count)
        where = np.full(count, -1)
        if (leaf := leaves.get(member.stack)) is not None:
            where = index[leaf.start : leaf.stop].reshape(leaf.shape)[member.row, :count]
        result.append((where, units))
    return result


def _unpack_component(stack, member, component, frame, flux_unit) -> Source:
    """Return a component with the values of its row of a stack."""
    row = member.row
    count = component.spectrum.flux.shape[0]
    units = flux_units(component.spectrum.layout(frame.channels), flux_unit, count)
    flux = np.asarray(stack.flux[row, :count], dtype=float) * units
    morphology = component.morphology
    if isinstance(morphology, PixelMorphology):
        (y, x), (height, width) = member.offset, member.box.shape
        image = np.asarray(stack.morphology.image[row, y : y + height, x : x + width], dtype=float)
        if (total := image.sum()) > 0:
            flux, morphology = flux * total, PixelMorphology(image, morphology.anchor, morphology.envelope)
        else:
            flux = np.zeros_like(flux)
    else:
        names = list(morphology.constraints)
        values = [np.asarray(getattr(stack.morphology, name)[row], dtype=float) for name in names]
        morphology = (
            eqx.tree_at(lambda m: [getattr(m, name) for name in names], morphology, values) if names else morphology
        )
    spectrum = eqx.tree_at(lambda s: s.flux, component.spectrum, flux)
    return Source(np.asarray(stack.center[row], dtype=float), spectrum, morphology)


def _replace_components(source, path, fitted):
    """Return a source with its components replaced by the fitted ones."""
    if isinstance(source, Source):
        return fitted[path]
    parts = {name: _replace_components(part, f"{path}.parts.{name}", fitted) for name, part in source.parts.items()}
    return eqx.tree_at(lambda s: s.parts, source, parts)


def _flux_unit(frame, observations, levels) -> np.ndarray:
    """Return the flux unit of each model channel: the lowest noise level among the observations that show it."""
    unit = np.full(len(frame.channels), np.inf)
    for obs, level in zip(observations, levels, strict=True):
        if obs.renderer is None:
            raise ValueError(f"{obs.name} isn't matched to the frame: use obs.match(frame).")
        has_data = obs.noise.valid.any(axis=(1, 2))
        for channel, value, seen in zip(obs.renderer.channels, level, has_data, strict=True):
            unit[channel] = min(unit[channel], value if seen else np.inf)
    return np.where(np.isfinite(unit), unit, 1.0)


def _as_image(obs: Observation, level, unit) -> Image:
    """Return the observation in units of its noise level, restricted to the pixels on the frame."""
    window = obs.renderer.window.slices
    dtype = jnp.result_type(float)
    noise = obs.noise.scaled(level).restricted(obs.renderer.inside, window)
    return Image(
        renderer=eqx.tree_at(lambda r: r.inside, obs.renderer, jnp.asarray(obs.renderer.inside)),
        data=jnp.asarray(obs.data[(slice(None), *window)] / level[:, None, None], dtype),
        noise=jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), noise),
        shift=jnp.asarray(obs.astrometry.shift, dtype),
        background=jnp.asarray(obs.background / level, dtype),
        gain=jnp.asarray(unit[list(obs.renderer.channels)] / level, dtype),
    )


class _ElementTable:
    """Collects the elements of all leaves that hold something free."""

    def __init__(self):
        self.leaves, self.priors = (), ()
        self.start, self.low, self.high = np.zeros(0), np.zeros(0), np.zeros(0)
        self.bounded, self.free, self.index = np.zeros(0, bool), np.zeros(0, bool), np.zeros(0, int)
        self.places: dict[str, np.ndarray] = {}

    def add(self, kind, number, name, value, entries, parameters: Parameters, linear: bool, unit=1.0):
        """Add an array; `entries` are (path, indices into the array) of the parameters that it holds."""
        value = np.asarray(value, dtype=float)
        specs = [(parameters.table[path], where) for path, where in entries]
        if not any(p.free or (p.tied_to and parameters.table[p.tied_to].free) for p, _ in specs):
            return
        first, shape = len(self.start), value.shape
        low, high, free = np.full(shape, -np.inf), np.full(shape, np.inf), np.zeros(shape, bool)
        units = np.broadcast_to(unit, shape)
        disk = any(parameter.constraint is unit_disk for parameter, _ in specs)
        numbers = np.arange(first, first + value.size).reshape(shape)
        for parameter, where in specs:
            self.places[parameter.path] = numbers[where]
            free[where] = parameter.free
            if not disk:
                low[where], high[where] = (bound / units[where] for bound in _range(parameter))
                _check_start(parameter, value[where], low[where], high[where])
        coordinate = value if linear else unconstrained(value, low, high)
        if disk:
            coordinate = value / np.sqrt(np.maximum(1 - np.sum(value**2, axis=-1, keepdims=True), 1e-6))
        for parameter, where in specs:
            if parameter.prior is not None:
                prior = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(float)), parameter.prior)
                scale = jnp.asarray(units[where].ravel(), jnp.result_type(float))
                self.priors += ((prior, jnp.asarray(numbers[where].ravel(), jnp.int32), scale),)
        self.leaves += (Leaf(kind, number, name, first, first + value.size, shape, disk),)
        self.start = np.append(self.start, coordinate.ravel())
        self.low, self.high = np.append(self.low, low.ravel()), np.append(self.high, high.ravel())
        self.bounded = np.append(self.bounded, np.full(value.size, linear))
        self.free = np.append(self.free, free.ravel())
        self.index = np.append(self.index, numbers.ravel())

    def coordinate_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the bounds of the coordinates that are projected into their range; infinite for the others."""
        lowest, highest = np.full(len(self.start), -np.inf), np.full(len(self.start), np.inf)
        np.maximum.at(lowest, self.index, np.where(self.bounded, self.low, -np.inf))
        np.minimum.at(highest, self.index, np.where(self.bounded, self.high, np.inf))
        return lowest, highest

    def tie(self, parameters: Parameters):
        """Let tied elements share the coordinates of those they are tied to."""
        for parameter in parameters:
            if parameter.tied_to is None or parameter.path not in self.places:
                continue
            own, other = self.places[parameter.path].ravel(), self.places[parameter.tied_to].ravel()
            self.index[own] = other
            self.free[own] = False


def _element_table(stacks, components, channels, observations, parameters, layout) -> _ElementTable:
    """Return the elements of all stacks and observations."""
    table = _ElementTable()
    rows: list[list[tuple[str, Member, Source]]] = [[] for _ in stacks]
    for member, (path, component) in zip(layout.members, components, strict=True):
        rows[member.stack].append((path, member, component))
    for number, stack in enumerate(stacks):

        def entries(suffix, rows=rows[number], count=None):
            return [
                (f"{path}.{suffix}", np.s_[m.row] if count is None else np.s_[m.row, :count]) for path, m, _ in rows
            ]

        if not isinstance(stack.morphology, PixelMorphology):
            table.add("stack", number, "center", stack.center, entries("center"), parameters, linear=True)
        num_flux = stack.flux.shape[1]
        units = np.ones(stack.flux.shape)
        for _, member, component in rows[number]:
            units[member.row] = flux_units(component.spectrum.layout(channels), layout.flux_unit, num_flux)
        fluxes = entries("spectrum.flux", count=num_flux)
        table.add("stack", number, "flux", stack.flux, fluxes, parameters, linear=True, unit=units)
        for name in stack.morphology.constraints:
            if name != "image":
                value = getattr(stack.morphology, name)
                table.add(
                    "stack",
                    number,
                    f"morphology.{name}",
                    value,
                    entries(f"morphology.{name}"),
                    parameters,
                    linear=False,
                )
    for number, obs in enumerate(observations):
        base, everything = f"observations.{obs.name}", np.s_[:]
        shift, background = [(f"{base}.astrometry.shift", everything)], [(f"{base}.background", everything)]
        level = layout.noise_level[number]
        table.add("image", number, "shift", obs.astrometry.shift, shift, parameters, linear=True)
        table.add(
            "image", number, "background", obs.background / level, background, parameters, linear=True, unit=level
        )
    table.tie(parameters)
    return table


def _image_bounds(stacks, members, parameters):
    """Return which pixels of the image stacks are free, their lower bounds and their priors."""
    numbers = [number for number, stack in enumerate(stacks) if isinstance(stack.morphology, PixelMorphology)]
    free = {n: np.zeros(stacks[n].mask.shape, bool) for n in numbers}
    low = {n: np.zeros((stacks[n].mask.shape[0], 1, 1)) for n in numbers}
    mean = {n: np.zeros(stacks[n].mask.shape) for n in numbers}
    weight = {n: np.zeros(stacks[n].mask.shape) for n in numbers}
    for member in members:
        if member.stack not in free:
            continue
        parameter = parameters.table[f"{member.path}.morphology.image"]
        (y, x), (height, width) = member.offset, member.box.shape
        window = np.s_[member.row, y : y + height, x : x + width]
        free[member.stack][window] = parameter.free
        low[member.stack][member.row] = _range(parameter)[0]
        if parameter.prior is not None:
            if not isinstance(parameter.prior, dist.Normal):
                raise ValueError(f"{parameter.path}: the prior of an image must be Normal; got {parameter.prior}.")
            mean[member.stack][window] = np.asarray(parameter.prior.loc)
            weight[member.stack][window] = 1 / np.asarray(parameter.prior.scale) ** 2
    dtype = jnp.result_type(float)
    priors = tuple((jnp.asarray(mean[n], dtype), jnp.asarray(weight[n], dtype)) for n in numbers)
    return tuple(jnp.asarray(f) for f in free.values()), tuple(jnp.asarray(v, dtype) for v in low.values()), priors


def _range(parameter) -> tuple[float, float]:
    """Return the bounds that a constraint stands for."""
    constraint = parameter.constraint
    low, high = getattr(constraint, "lower_bound", -np.inf), getattr(constraint, "upper_bound", np.inf)
    if constraint not in (constraints.real, constraints.real_vector) and np.isinf(low) and np.isinf(high):
        raise ValueError(
            f"{parameter.path}: the constraint {constraint} isn't a range of numbers; use an interval or 'real'."
        )
    return float(low), float(high)


def _check_start(parameter, value, low, high):
    """Raise ValueError if a start violates its range."""
    if not (np.isfinite(value).all() and (value >= low).all() and (value <= high).all()):
        raise ValueError(
            f"{parameter.path} must start within {parameter.constraint}; got {np.array2string(np.asarray(value), threshold=6)}."
        )
