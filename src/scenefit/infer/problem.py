"""The loss of a packed problem as a function of coordinates.

Everything here works on a `State`: a vector of coordinates (fluxes, centers, shapes, shifts, backgrounds) and the stacks
of free-pixel images. Fluxes are in units of the noise of the data, so that no amplitude matters; sizes and the like are
in unconstrained coordinates; fluxes, backgrounds and pixels keep their own values, within bounds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Bool, Complex, Float, Int, Shaped

from scenefit.arrays.compilation import as_booleans, as_floats, as_integers
from scenefit.arrays.stamps import bucket_count
from scenefit.data.abstractnoise import AbstractNoise
from scenefit.data.renderer import Renderer
from scenefit.model.morphology import AbstractImageMorphology
from scenefit.model.packing import Stack, evaluate_stacks, transform_stacks

LINEAR_LEAVES = ("flux", "background", "background_slope")
"""Leaves that the model is linear in, the others given."""


AMPLITUDES, AMPLITUDE_SCATTER = "morphology.amplitudes", 0.01
"""Leaves that count up to a factor, and how far from 1 their sums may stray."""


class State(eqx.Module):
    """A point in parameter space.

    Attributes
    ----------
    vector : array, shape (n,)
        Coordinates of everything but images.
    images : tuple of arrays, shape (stack member, ..., h, w)
        Values of free images, one stack each, of any sum: the model has them scaled to unit sum.
    """

    vector: Shaped[Array, " n"]
    images: tuple[Shaped[Array, "_ *plane _ _"], ...]


class Prewhitened(eqx.Module):
    """What stands for correlated noise where curvatures need not be exact: the transfer function whitens instead.

    Attributes
    ----------
    transfer : array, shape (channel, k, l)
        That of the renderer over the root of the noise's power in each mode.
    sky_gain : array, shape (channel,)
        The same for a background.
    noise : AbstractNoise
        Of independent pixels.
    """

    transfer: Complex[Array, "channel k l"]
    sky_gain: Float[Array, " channel"]
    noise: AbstractNoise


class Image(eqx.Module):
    """One observation as the solver sees it: data and model in units of the noise level of each channel.

    `y` and `x` are pixel coordinates relative to the middle of the observation; no `psf_variance` or `rotation` stands for 0.
    Noise of independent pixels has nothing `prewhitened`.
    """

    renderer: Renderer
    data: Float[Array, "channel y x"]
    noise: AbstractNoise
    shift: Float[Array, " 2"]
    rotation: Float[Array, ""] | None
    flux_scale: Float[Array, " channel"]
    psf_variance: Float[Array, " channel"] | None
    background: Float[Array, " channel"]
    background_slope: Float[Array, "channel 2"]
    y: Float[Array, " h"]
    x: Float[Array, " w"]
    gain: Float[Array, " channel"]
    prewhitened: Prewhitened | None

    def quick(self) -> Image:
        """Return the image with its noise whitened by the transfer function: as if it had no masks and edges."""
        if self.prewhitened is None:
            return self
        noise = self.prewhitened.noise
        for name in noise.parameters:
            noise = eqx.tree_at(_getter(name), noise, getattr(self.noise, name))
        gain = self.prewhitened.sky_gain
        return eqx.tree_at(
            lambda image: (image.renderer.transfer, image.background, image.background_slope, image.noise),
            self,
            (
                self.prewhitened.transfer,
                gain * self.background,
                gain[:, None] * self.background_slope,
                noise,
            ),
        )

    def sky(self) -> Float[Array, "channel h w"]:
        """Return the background."""
        slope_y, slope_x = self.background_slope.T[..., None, None]
        return self.background[:, None, None] + slope_y * self.y[:, None] + slope_x * self.x

    def residual(
        self, spectrum: Complex[Array, "model_channel k l"], kind: str = "score"
    ) -> Float[Array, "channel y x"]:
        """Return the residuals (see `Problem.residuals`), given the Fourier transform of the model image."""
        rendered = self.renderer(spectrum, self.shift, self.psf_variance, self.rotation)
        rendered = rendered * (self.gain * self.flux_scale)[:, None, None]
        return getattr(self.noise, f"{kind}_residual")(rendered + self.sky() - self.data)


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
    map : "identity", "range" or "disk"
        From coordinates to elements: the same, kept in range by projection; `smooth_range`; pairs in the plane to pairs
        inside the unit disk.
    """

    kind: str = eqx.field(static=True)
    number: int = eqx.field(static=True)
    name: str = eqx.field(static=True)
    start: int = eqx.field(static=True)
    stop: int = eqx.field(static=True)
    shape: tuple[int, ...] = eqx.field(static=True)
    map: str = eqx.field(static=True)

    def elements(self) -> np.ndarray:
        """Return the numbers of the elements, shape (stack member, entry); one row for an image."""
        return np.arange(self.start, self.stop).reshape(self.shape[0] if self.kind == "stack" else 1, -1)


class Priors(eqx.Module):
    """Priors of one kind on parameters of one size, evaluated by one operation.

    Attributes
    ----------
    leaves : tuple of arrays, shape (n, ...)
        The leaves of `n` distributions of one structure, stacked along a first axis, in the order of their names.
    structure : PyTreeDef
        Of the distributions.
    order : tuple of int
        Which of `leaves` is which leaf of the structure.
    index : array of int, shape (n, *parameter)
        Elements of the parameter that each is for.
    unit : array, shape (n, *parameter)
        Their units.
    counts : array of bool, shape (n,)
        False for padding.
    """

    leaves: tuple[Float[Array, "n ..."], ...]
    structure: Any = eqx.field(static=True)
    order: tuple[int, ...] = eqx.field(static=True)
    index: Int[Array, "n *k"]
    unit: Float[Array, "n *k"]
    counts: Bool[Array, " n"]

    def log_prob(self, elements: Float[Array, " e"]) -> Float[Array, ""]:
        """Return the sum of the log-densities of all."""

        def one(leaves, value):
            distribution = jax.tree.unflatten(self.structure, [leaves[place] for place in self.order])
            return jnp.sum(distribution.log_prob(value))

        each = jax.vmap(one)(self.leaves, elements[self.index] * self.unit)
        return jnp.sum(jnp.where(self.counts, each, 0.0))


def stacked_priors(priors: Iterable[tuple]) -> tuple[Priors, ...]:
    """Stack priors (distribution, elements, units) whose distributions have the same structure, padding their number.

    Neither the structure of the problem nor the time to compile it depends on how many parameters have a prior.
    """
    groups: dict[tuple, list] = {}
    for prior, index, unit in priors:
        values, structure = jax.tree.flatten(prior)
        sequence = tuple(_leaves_by_name(jax.tree.unflatten(structure, range(len(values)))))
        leaves = [np.asarray(values[place], dtype=float) for place in sequence]
        key = type(prior).__name__, index.shape, tuple(leaf.shape for leaf in leaves), sequence, structure
        groups.setdefault(key, []).append((leaves, index, unit))
    stacked = []
    for key in sorted(groups, key=lambda key: str(key[:3])):
        rows, (*_, sequence, structure) = groups[key], key
        count = bucket_count(len(rows))
        leaves, index, unit = zip(*rows, *[rows[0]] * (count - len(rows)), strict=True)
        stacked.append(
            Priors(
                leaves=tuple(as_floats(np.stack(column)) for column in zip(*leaves, strict=True)),
                structure=structure,
                order=tuple(sequence.index(place) for place in range(len(sequence))),
                index=as_integers(np.stack(index)),
                unit=as_floats(np.stack(unit)),
                counts=as_booleans(np.arange(count) < len(rows)),
            )
        )
    return tuple(stacked)


def _leaves_by_name(value) -> list:
    """Return the leaves of distributions in the order of their names.

    numpyro flattens them in that of a set, which differs from process to process, and compiled programs with it: those that are
    kept on disk wouldn't be found again.
    """
    if isinstance(value, dist.Distribution):
        names = sorted(type(value).gather_pytree_data_fields())
        return [leaf for name in names for leaf in _leaves_by_name(value.__dict__.get(name))]
    parts = jax.tree.leaves(value, is_leaf=lambda part: isinstance(part, dist.Distribution))
    return [
        leaf for part in parts for leaf in (_leaves_by_name(part) if isinstance(part, dist.Distribution) else [part])
    ]


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
    free : State of bool
        What may change.
    lowest, highest : State
        Bounds of the coordinates.
    priors : tuple of Priors
        One for each kind.
    image_priors : tuple of (array, array), shape (stack member, ..., h, w)
        Mean and inverse variance of the normal prior of each value of an image; inverse variance 0 for none.
    leaves : tuple of Leaf
    psf_sigma : float
    canvas : (int, int, int)
    """

    stacks: tuple[Stack, ...]
    images: tuple[Image, ...]
    index: Int[Array, " e"]
    low: Float[Array, " e"]
    high: Float[Array, " e"]
    free: State
    lowest: State
    highest: State
    priors: tuple[Priors, ...]
    image_priors: tuple
    psf_sigma: Float[Array, ""]
    leaves: tuple[Leaf, ...]
    canvas: tuple[int, int, int] = eqx.field(static=True)

    def elements(self, vector: Float[Array, " n"]) -> Float[Array, " e"]:
        """Return the parameter values from the coordinates."""
        values = coordinate = vector[self.index]
        # All at once: operations on every leaf by itself would be much of what is compiled.
        is_ranged, is_disk, other = self.maps()
        if is_ranged.any():
            values = jnp.where(is_ranged, smooth_range(coordinate, self.low, self.high), values)
        if is_disk.any():
            values = jnp.where(is_disk, coordinate / jnp.sqrt(1 + coordinate**2 + coordinate[other] ** 2), values)
        return values

    def maps(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return which elements are mapped into a range, which are of pairs in the unit disk, and the other one of each pair."""
        is_ranged, is_disk = (np.zeros(len(self.index), bool) for _ in range(2))
        other = np.arange(len(self.index))
        for leaf in self.leaves:
            part = slice(leaf.start, leaf.stop)
            is_ranged[part], is_disk[part] = leaf.map == "range", leaf.map == "disk"
            if leaf.map == "disk":
                other[part] = other[part].reshape(-1, 2)[:, ::-1].ravel()
        return is_ranged, is_disk, other

    def fill(self, state: State) -> tuple[list[Stack], list[Image]]:
        """Return stacks and images with the values of a state."""
        return self.with_elements(self.elements(state.vector), state.images)

    def with_elements(
        self, elements: Float[Array, " e"], free_images: Sequence[Array]
    ) -> tuple[list[Stack], list[Image]]:
        """Return stacks and images with values of the parameters, and of free images."""
        stacks, images = list(self.stacks), list(self.images)
        for leaf in self.leaves:
            value = elements[leaf.start : leaf.stop].reshape(leaf.shape)
            group = stacks if leaf.kind == "stack" else images
            group[leaf.number] = eqx.tree_at(_getter(leaf.name), group[leaf.number], value)
        remaining = iter(free_images)
        for number, stack in enumerate(stacks):
            if isinstance(stack.morphology, AbstractImageMorphology):
                stacks[number] = eqx.tree_at(lambda s: s.morphology.values, stack, unit_sum(next(remaining)))
        return stacks, images

    def model(self, state: State) -> Float[Array, "channel y x"]:
        """Return the model image on the padded canvas."""
        return evaluate_stacks(self.fill(state)[0], self.psf_sigma, self.canvas)

    def residuals(
        self, state: State, kind: str = "score"
    ) -> tuple[tuple[Float[Array, "_ _ _"], ...], tuple[Float[Array, "..."], ...]]:
        """Return all that the loss has as a square, or as if it were one.

        Parameters
        ----------
        state : State
        kind : "score", "deviance" or "fisher"
            Which residuals of the data: see the methods of `AbstractNoise`. They are the same for Gaussian noise.

        Returns
        -------
        data : tuple of arrays, shape (channel, y, x)
            Residuals (model minus data), one array an observation.
        others : tuple of arrays
            Values of images minus the means of their priors, in standard deviations, one array a stack of images; and how far
            the sums of amplitudes, which count as fractions, are from 1.
        """
        stacks, images = self.fill(state)
        spectrum = transform_stacks(stacks, self.psf_sigma, self.canvas)
        data = tuple(image.residual(spectrum, kind) for image in images)
        return data, self.image_residuals(state) + self.scales(state.vector)

    def image_residuals(self, state: State) -> tuple[Float[Array, "..."], ...]:
        """Return values of images minus the means of their priors, in standard deviations, one array a stack of images."""
        priors = zip(state.images, self.image_priors, strict=True)
        return tuple(jnp.sqrt(weight) * (unit_sum(image) - mean) for image, (mean, weight) in priors)

    @property
    def is_gaussian(self) -> bool:
        """Whether the loss of the data is half the square of their residuals."""
        return all(image.noise.is_gaussian for image in self.images)

    def scales(self, vector: Float[Array, " n"]) -> tuple[Float[Array, " _"], ...]:
        """Return how far the sums of amplitudes are from 1: the model doesn't depend on them."""
        leaves = [leaf for leaf in self.leaves if leaf.name == AMPLITUDES]
        if not leaves:
            return ()
        elements = self.elements(vector)
        sums = [jnp.sum(elements[leaf.start : leaf.stop].reshape(leaf.shape), axis=-1) for leaf in leaves]
        return tuple(((total - 1) / AMPLITUDE_SCATTER).ravel() for total in sums)

    def log_prior(self, vector: Float[Array, " n"]) -> Float[Array, ""]:
        """Return the log-density of the priors at the parameter values."""
        elements = self.elements(vector)
        return sum((priors.log_prob(elements) for priors in self.priors), jnp.zeros(()))

    @property
    def has_spread(self) -> bool:
        """Whether parameters of the noise add to the loss."""
        return any(leaf.name.startswith("noise.") for leaf in self.leaves)

    @property
    def has_potential(self) -> bool:
        """Whether the loss has parts that aren't squares."""
        return bool(self.priors) or self.has_spread

    def potential(self, state: State) -> Float[Array, ""]:
        """Return the part of the loss that isn't a square: minus the log-prior, and what the noise's parameters add."""
        return sum((jnp.sum(spread) for spread in self.spreads(state)), -self.log_prior(state.vector))

    def spreads(self, state: State) -> list[Float[Array, "_ _ _"]]:
        """Return what the parameters of the noise add to the loss of every pixel, for observations whose noise has any."""
        images = {leaf.number for leaf in self.leaves if leaf.name.startswith("noise.")}
        filled = self.fill(state)[1] if images else []
        return [filled[number].noise.log_spread() for number in sorted(images)]

    def loss(self, state: State) -> Float[Array, ""]:
        """Return minus the log-density of the data and the parameters, up to a constant."""
        squares = [jnp.vdot(residual, residual) for residual in jax.tree.leaves(self.residuals(state, "deviance"))]
        return 0.5 * sum(squares) + self.potential(state)

    def project(self, state: State) -> State:
        """Return the nearest state within bounds, its images scaled to unit sum."""
        inside = jax.tree.map(jnp.clip, state, self.lowest, self.highest)
        return State(inside.vector, tuple(unit_sum(image) for image in inside.images))


def totals(images: Float[Array, "m *plane h w"]) -> Float[Array, "m *one 1 1"]:
    """Return the sums of the members of a stack, with axes of length 1 for those that are summed over."""
    return jnp.sum(images, axis=tuple(range(1, images.ndim)), keepdims=True)


def unit_sum(images: Float[Array, "m *plane h w"]) -> Float[Array, "m *plane h w"]:
    """Return the images scaled to unit sum; those that sum to nothing as they are."""
    total = totals(images)
    return images / jnp.where(total > 0, total, 1.0)


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
