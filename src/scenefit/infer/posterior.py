"""From a scene, observations and parameters to a packed problem, and back."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import numpy as np
import numpyro.distributions as dist
from numpyro.distributions import constraints

from scenefit.arrays.compilation import as_booleans, as_complexes, as_floats, as_integers, compiled
from scenefit.data.abstractnoise import AbstractNoise
from scenefit.data.correlation import LEAST_POWER, power_at
from scenefit.data.nuisances import LARGEST_ROTATION, NUISANCES
from scenefit.data.observation import Observation
from scenefit.data.renderer import Renderer
from scenefit.infer.matched import channel_units
from scenefit.infer.problem import Image, Leaf, Prewhitened, Problem, State, stacked_priors, unconstrained
from scenefit.model.morphology import AbstractImageMorphology, parameter_values, with_parameter_values
from scenefit.model.packing import Member, model_psf_sigma, pack
from scenefit.model.parameters import IMAGES, Parameters, unit_disk
from scenefit.model.scene import Scene
from scenefit.model.source import Source
from scenefit.sky.frame import Frame


class Layout(eqx.Module):
    """What leads from a state back to a user's scene and observations.

    Attributes
    ----------
    members : list of Member
        Where each component is packed.
    noise_level : list of arrays, shape (channel,)
        Data unit of each observation.
    renderers : list of Renderer
        Of each observation; those of the problem, which can turn observations whose rotation is free.
    places : dict of (array, array)
        For every parameter that the problem knows, by path: its elements and their units, both of the parameter's shape.
    """

    members: list[Member]
    noise_level: list[np.ndarray]
    renderers: list[Renderer]
    places: dict[str, tuple[np.ndarray, np.ndarray]]


def build(
    scene: Scene,
    observations: Sequence[Observation],
    parameters: Parameters,
    *,
    whole_frame: bool = False,
    roomy: Collection[str] = (),
) -> tuple[Problem, State, Layout]:
    """Pack a scene, matched observations and parameters; its profiles on the whole frame, or some with more room, if asked for.

    Raises
    ------
    ValueError
        If an observation isn't matched, a start violates its constraint, or a constraint isn't a range.
    """
    frame, parameters = scene.frame, parameters.completed(observations)
    observations, parameters = _able_to_turn(observations, parameters)
    levels = [obs.noise.level() for obs in observations]
    if loose := [obs.name for obs in observations if obs.renderer is None]:
        raise ValueError(f"{loose[0]} isn't matched to the frame: use obs.match(frame).")
    unit = channel_units(frame, observations)
    components = list(scene.components())
    stacks, members = pack(frame, components, unit, whole_frame=whole_frame, roomy=roomy)
    images = [_as_image(obs, level, unit, parameters) for obs, level in zip(observations, levels, strict=True)]
    table = _element_table(frame, stacks, members, observations, levels, parameters)
    layout = Layout(members, levels, [obs.matched_renderer for obs in observations], table.places)
    free_images, image_low, image_priors = _image_bounds(stacks, members, parameters)
    lowest, highest = table.coordinate_bounds()
    problem = Problem(
        stacks=tuple(stacks),
        images=tuple(images),
        index=as_integers(table.index),
        low=as_floats(table.low),
        high=as_floats(table.high),
        free=State(as_booleans(table.free), free_images),
        lowest=State(as_floats(lowest), image_low),
        highest=State(as_floats(highest), tuple(as_floats(np.full(low.shape, np.inf)) for low in image_low)),
        priors=stacked_priors(table.priors),
        image_priors=image_priors,
        psf_sigma=as_floats(model_psf_sigma(frame)),
        leaves=table.leaves,
        canvas=(len(frame.channels), *frame.fft_shape),
    )
    values = tuple(as_floats(s.morphology.values) for s in stacks if isinstance(s.morphology, AbstractImageMorphology))
    return problem, State(as_floats(table.start), values), layout


def unpack(
    problem: Problem, state: State, layout: Layout, scene: Scene, observations: Sequence[Observation]
) -> tuple[Scene, tuple[Observation, ...]]:
    """Return the scene and observations with the values of a state."""
    stacks, images = jax.tree.map(np.asarray, _fill(problem, state))
    fitted = {}
    for member, (_, component) in zip(layout.members, scene.components(), strict=True):
        fitted[member.path] = _unpack_component(stacks[member.stack], member, component)
    sources = {name: _replace_components(source, f"sources.{name}", fitted) for name, source in scene.sources.items()}
    moved = tuple(
        _unpack_image(*each) for each in zip(observations, images, layout.noise_level, layout.renderers, strict=True)
    )
    return Scene(scene.frame, sources), moved


def _unpack_image(obs, image, level, renderer) -> Observation:
    """Return an observation with the values of its image."""
    obs = obs.with_renderer(renderer, obs.frame)
    if image.rotation is not None:
        _warn_at_limit(obs.name, abs(float(image.rotation)), renderer)
    fitted = {path: getattr(image, path.rpartition(".")[2]) for path in NUISANCES}
    units = {path: _data_unit(path, value, level) for path, value in obs.nuisances().items()}
    obs = obs.with_nuisances({p: np.asarray(v, float) * units[p] for p, v in fitted.items() if v is not None})
    kinds = obs.noise.parameters
    if not kinds:
        return obs
    values = [
        np.asarray(getattr(image.noise, name), float) * (level if kind.scales_with_data else 1.0)
        for name, kind in kinds.items()
    ]
    return obs.with_noise(eqx.tree_at(lambda noise: [getattr(noise, name) for name in kinds], obs.noise, values))


def _warn_at_limit(name: str, rotation: float, renderer: Renderer):
    """Warn of a rotation that the padding of the frame keeps from becoming larger."""
    largest = LARGEST_ROTATION if renderer.turn is None else float(renderer.turn.largest)
    if AT_LIMIT * largest < rotation and largest < LARGEST_ROTATION:
        warnings.warn(
            f"{name}: its rotation of {rotation:.3g} degrees is the largest that the padding of the frame allows; give the Frame "
            "more padding, or correct the WCS.",
            stacklevel=3,
        )


_fill = compiled(Problem.fill)


def with_parameters(
    scene: Scene, observations: Sequence[Observation], values: Mapping[str, np.ndarray]
) -> tuple[Scene, tuple[Observation, ...]]:
    """Return scene and observations with other values of the parameters at some paths (see `Parameters`).

    Raises
    ------
    KeyError
        If there is no parameter at a path.
    """
    known = Parameters.default(scene, observations).table
    if unknown := sorted(set(values) - set(known)):
        raise KeyError(f"There is no parameter {unknown}.")
    changed = {path: _with_values(path, component, values) for path, component in scene.components()}
    sources = {name: _replace_components(source, f"sources.{name}", changed) for name, source in scene.sources.items()}
    moved = []
    for obs in observations:
        base = f"observations.{obs.name}."
        new = {path.removeprefix(base): np.asarray(v, float) for path, v in values.items() if path.startswith(base)}
        obs = obs.with_nuisances({path: value for path, value in new.items() if path in NUISANCES})
        for name in obs.noise.parameters:
            if f"noise.{name}" in new:
                noise = eqx.tree_at(lambda n, name=name: getattr(n, name), obs.noise, new[f"noise.{name}"])
                obs = obs.with_noise(noise)
        moved.append(obs)
    return Scene(scene.frame, sources), tuple(moved)


def _with_values(path, component, values) -> Source:
    """Return a component with those of the values that are its own."""
    own = {
        key.removeprefix(f"{path}."): np.asarray(value, float) for key, value in values.items() if key.startswith(path)
    }
    morphology = component.morphology
    shapes = {name: own[f"morphology.{name}"] for name in morphology.constraints if f"morphology.{name}" in own}
    if isinstance(morphology, AbstractImageMorphology) and shapes:
        (image,) = shapes.values()
        morphology = morphology.with_values(image)
    else:
        morphology = with_parameter_values(morphology, shapes)
    spectrum = eqx.tree_at(lambda s: s.flux, component.spectrum, own.get("spectrum.flux", component.spectrum.flux))
    return component.replace(center=own.get("center", component.center), spectrum=spectrum, morphology=morphology)


def flux_coordinates(problem: Problem, layout: Layout) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return, for every component, which coordinate each entry of its spectrum is (-1: none) and its unit."""
    index = np.asarray(problem.index)
    leaves = {leaf.number: leaf for leaf in problem.leaves if leaf.kind == "stack" and leaf.name == "flux"}
    result = []
    for member in layout.members:
        where = np.full(len(member.flux_unit), -1)
        if (leaf := leaves.get(member.stack)) is not None:
            where = index[leaf.start : leaf.stop].reshape(leaf.shape)[member.row]
        result.append((where, member.flux_unit))
    return result


def _unpack_component(stack, member, component) -> Source:
    """Return a component with the values of its row of a stack."""
    row = member.row
    flux = np.asarray(stack.flux[row], dtype=float) * member.flux_unit
    morphology = component.morphology
    if isinstance(morphology, AbstractImageMorphology):
        image = np.asarray(stack.morphology.values[(row, ..., *member.window)], dtype=float)
        if image.sum() > 0:
            morphology = morphology.with_values(image)
        else:
            flux = np.zeros_like(flux)
    else:
        shapes = {name: value.shape for name, value in parameter_values(morphology).items()}
        values = {n: getattr(stack.morphology, n)[(row, *map(slice, shape))] for n, shape in shapes.items()}
        values = {name: np.asarray(value, dtype=float) for name, value in values.items()}
        morphology = with_parameter_values(morphology, values)
    spectrum = eqx.tree_at(lambda s: s.flux, component.spectrum, flux)
    return component.replace(
        center=np.asarray(stack.center[row], dtype=float), spectrum=spectrum, morphology=morphology
    )


def _replace_components(source, path, fitted):
    """Return a source with its components replaced by the fitted ones."""
    if isinstance(source, Source):
        return fitted[path]
    parts = {name: _replace_components(part, f"{path}.parts.{name}", fitted) for name, part in source.parts.items()}
    return source.with_parts(parts)


def _data_unit(path, value, level):
    """Return the unit of a nuisance's values, per channel, in which the problem has them."""
    return np.reshape(level, (-1, *[1] * (value.ndim - 1))) if NUISANCES[path].scales_with_data else 1.0


def _as_image(obs: Observation, level, unit, parameters: Parameters) -> Image:
    """Return the observation in units of its noise level, restricted to the pixels on the frame."""
    renderer = obs.matched_renderer
    window = renderer.window.slices
    noise = obs.noise.scaled(level).restricted(renderer.inside, window)
    independent, correlation = noise.independent()
    values: dict[str, Any] = {
        path: as_floats(value / _data_unit(path, value, level)) for path, value in obs.nuisances().items()
    }
    # A blur costs an exponential a mode, a rotation the faster routes to pixels: not where there are none.
    for path in ("calibration.psf_variance", TURN):
        if not _is_used(obs, path, parameters):
            values[path] = None
    return Image(
        renderer=eqx.tree_at(lambda r: r.inside, renderer, as_booleans(renderer.inside)),
        data=as_floats(obs.data[(slice(None), *window)] / level[:, None, None]),
        noise=noise.on_device(),
        **{path.rpartition(".")[2]: value for path, value in values.items()},
        y=as_floats(np.arange(window[0].start, window[0].stop) - (obs.shape[1] - 1) / 2),
        x=as_floats(np.arange(window[1].start, window[1].stop) - (obs.shape[2] - 1) / 2),
        gain=as_floats(unit[list(renderer.channels)] / level),
        prewhitened=None if correlation is None else _prewhitened(renderer, independent, correlation),
    )


def _prewhitened(renderer: Renderer, independent: AbstractNoise, correlation: np.ndarray) -> Prewhitened:
    """Return what stands for correlated noise in quick curvatures."""
    (yy, yx), (xy, xx) = np.asarray(renderer.affine, dtype=float)
    ky, kx = np.asarray(renderer.ky, dtype=float)[:, None], np.asarray(renderer.kx, dtype=float)
    power = power_at(correlation, yy * ky + xy * kx, yx * ky + xx * kx, LEAST_POWER)
    return Prewhitened(
        as_complexes(np.asarray(renderer.transfer) / np.sqrt(power)),
        as_floats(1 / np.sqrt(power[:, 0, 0])),
        independent.on_device(),
    )


TURN, AT_LIMIT = "astrometry.rotation", 0.999
"""Path of the rotation, and the part of the largest one beyond which it is said to be at its limit."""


def _is_used(obs: Observation, path: str, parameters: Parameters) -> bool:
    """Return whether a nuisance of an observation may be anything but 0."""
    parameter = parameters.table[f"observations.{obs.name}.{path}"]
    return bool(parameter.free or parameter.tied_to or obs.nuisances()[path].any())


def _able_to_turn(observations, parameters: Parameters) -> tuple[list[Observation], Parameters]:
    """Return the observations with renderers that can turn those whose rotation is used, and how far they may be turned."""
    result = list(observations)
    for number, obs in enumerate(observations):
        if obs.renderer is None or not _is_used(obs, TURN, parameters):
            continue
        result[number] = turned = obs.match(obs.frame, turning=True)
        largest, path = float(turned.matched_renderer.turn.largest), f"observations.{obs.name}.{TURN}"
        low, high = _range(parameters.table[path])
        parameters = parameters.constrain(path, constraints.interval(max(low, -largest), min(high, largest)))
    return result, parameters


ONE_SIDED, TWO_SIDED = 15.0, 7.0
"""Coordinates of parameters with one bound (logarithms) and with two (logits) stay between minus and plus these: beyond, nothing
would change."""


class _ElementTable:
    """Collects the elements of all leaves that hold something free."""

    def __init__(self):
        self.leaves = ()
        self.priors: list[tuple[dist.Distribution, np.ndarray, np.ndarray]] = []
        self.start, self.low, self.high = np.zeros(0), np.zeros(0), np.zeros(0)
        self.bounded, self.free, self.index = np.zeros(0, bool), np.zeros(0, bool), np.zeros(0, int)
        self.places: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def add(
        self,
        kind,
        number,
        name,
        value,
        entries,
        parameters: Parameters,
        linear: bool,
        unit: float | np.ndarray = 1.0,
        limits: tuple[np.ndarray, np.ndarray] | None = None,
    ):
        """Add an array; `entries` are (path, indices into the array) of the parameters that it holds.

        Values stay within `limits` (of their last axis), if there are any, and where they are.
        """
        value = np.asarray(value, dtype=float)
        # A row may be longer than the parameter: padded.
        specs = [
            (parameter, (*np.atleast_1d(where), *map(slice, parameter.shape)) if kind == "stack" else where)
            for parameter, where in ((parameters.table[path], where) for path, where in entries)
        ]
        anchors = {p.tied_to for p in parameters}
        if not any(p.free or p.tied_to or p.path in anchors for p, _ in specs):
            return
        first, shape = len(self.start), value.shape
        low, high, free = np.full(shape, -np.inf), np.full(shape, np.inf), np.zeros(shape, bool)
        units = np.broadcast_to(unit, shape)
        disk = any(parameter.constraint is unit_disk for parameter, _ in specs)
        numbers = np.arange(first, first + value.size).reshape(shape)
        for parameter, where in specs:
            self.places[parameter.path] = numbers[where], units[where]
            free[where] = parameter.free
            if not disk:
                low[where], high[where] = (bound / units[where] for bound in _range(parameter))
                _check_start(parameter, value[where], low[where], high[where])
        if limits is not None:
            low = np.maximum(low, np.minimum(limits[0], value))
            high = np.minimum(high, np.maximum(limits[1], value))
        coordinate = value if linear else unconstrained(value, low, high)
        if disk:
            coordinate = value / np.sqrt(np.maximum(1 - np.sum(value**2, axis=-1, keepdims=True), 1e-6))
        for parameter, where in specs:
            if parameter.prior is not None:
                self.priors.append((parameter.prior, numbers[where], units[where]))
        coordinate_map = "disk" if disk else "identity" if linear else "range"
        self.leaves += (Leaf(kind, number, name, first, first + value.size, shape, coordinate_map),)
        self.start = np.append(self.start, coordinate.ravel())
        self.low, self.high = np.append(self.low, low.ravel()), np.append(self.high, high.ravel())
        self.bounded = np.append(self.bounded, np.full(value.size, linear))
        self.free = np.append(self.free, free.ravel())
        self.index = np.append(self.index, numbers.ravel())

    def coordinate_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the bounds of the coordinates: of those that are projected into their range, and where maps onto it saturate."""
        lowest, highest = np.full(len(self.start), -np.inf), np.full(len(self.start), np.inf)
        ends = np.isfinite(self.low).astype(int) + np.isfinite(self.high)
        saturated = np.array([np.inf, ONE_SIDED, TWO_SIDED])[ends]
        np.maximum.at(lowest, self.index, np.where(self.bounded, self.low, -saturated))
        np.minimum.at(highest, self.index, np.where(self.bounded, self.high, saturated))
        return lowest, highest

    def tie(self, parameters: Parameters):
        """Let tied elements share the coordinates of those they are tied to."""
        for parameter in parameters:
            if parameter.tied_to is None or parameter.path not in self.places:
                continue
            own, other = (self.places[path][0].ravel() for path in (parameter.path, parameter.tied_to))
            self.index[own] = other
            self.free[own] = False


def _element_table(frame: Frame, stacks, members, observations, levels, parameters) -> _ElementTable:
    """Return the elements of all stacks and observations; centers don't leave the frame."""
    table, limits = _ElementTable(), (np.full(2, -0.5), np.array(frame.box.shape) - 0.5)
    rows: list[list[tuple[str, Member]]] = [[] for _ in stacks]
    for member in members:
        rows[member.stack].append((member.path, member))
    for number, stack in enumerate(stacks):

        def entries(suffix, rows=rows[number]):
            return [(f"{path}.{suffix}", np.s_[member.row]) for path, member in rows]

        table.add("stack", number, "center", stack.center, entries("center"), parameters, linear=True, limits=limits)
        units = np.ones(stack.flux.shape)
        for _, member in rows[number]:
            units[member.row] = member.flux_unit
        fluxes = entries("spectrum.flux")
        table.add("stack", number, "flux", stack.flux, fluxes, parameters, linear=True, unit=units)
        for name in stack.morphology.constraints:
            if name not in IMAGES:
                # What may well be at its bound keeps its own value, within bounds.
                closed = stack.morphology.constraints[name] is constraints.nonnegative
                path, value = f"morphology.{name}", getattr(stack.morphology, name)
                table.add("stack", number, path, value, entries(path), parameters, linear=closed)
    for number, obs in enumerate(observations):
        base, level = f"observations.{obs.name}", levels[number]

        def add(name, path, value, *, linear=True, unit: float | np.ndarray = 1.0, number=number, base=base):
            entries = [(f"{base}.{path}", np.s_[...])]
            table.add("image", number, name, value / unit, entries, parameters, linear=linear, unit=unit)

        for path, value in obs.nuisances().items():
            add(path.rpartition(".")[2], path, value, unit=_data_unit(path, value, level))
        for name, kind in obs.noise.parameters.items():
            value, unit = np.asarray(getattr(obs.noise, name), float), level if kind.scales_with_data else 1.0
            add(f"noise.{name}", f"noise.{name}", value, linear=False, unit=unit)
    table.tie(parameters)
    return table


def _image_bounds(stacks, members, parameters):
    """Return which values of the image stacks are free, their lower bounds and their priors."""
    images = {
        n: stack.morphology for n, stack in enumerate(stacks) if isinstance(stack.morphology, AbstractImageMorphology)
    }
    shapes = {n: morphology.values.shape for n, morphology in images.items()}
    free = {n: np.zeros(shape, bool) for n, shape in shapes.items()}
    low = {n: np.zeros((shape[0], *(1 for _ in shape[1:]))) for n, shape in shapes.items()}
    mean, weight = ({n: np.zeros(shape) for n, shape in shapes.items()} for _ in range(2))
    for member in members:
        if member.stack not in images:
            continue
        (name,) = images[member.stack].constraints
        parameter = parameters.table[f"{member.path}.morphology.{name}"]
        window = (member.row, ..., *member.window)
        free[member.stack][window] = parameter.free
        low[member.stack][member.row] = _range(parameter)[0]
        if parameter.prior is not None:
            if not isinstance(parameter.prior, dist.Normal):
                raise ValueError(f"{parameter.path}: the prior of an image must be Normal; got {parameter.prior}.")
            mean[member.stack][window] = np.asarray(parameter.prior.loc)
            weight[member.stack][window] = 1 / np.asarray(parameter.prior.scale) ** 2
    priors = tuple((as_floats(mean[n]), as_floats(weight[n])) for n in images)
    return tuple(as_booleans(f) for f in free.values()), tuple(as_floats(v) for v in low.values()), priors


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
