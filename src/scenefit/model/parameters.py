"""Parameters: what of a scene and its observations is free, by path.

A path names one array, such as `sources.host.center`, `sources.host.spectrum.flux`,
`sources.host.morphology.half_light_radius` or `observations.HSC.astrometry.shift`. Patterns take `*` for one or more
names and match a whole branch: `sources.*.morphology`, `observations.HSC`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import NamedTuple

import astropy.units as u
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from numpyro.distributions import constraints
from numpyro.distributions.transforms import ParameterFreeTransform, biject_to

from scenefit.data.nuisances import NUISANCES
from scenefit.sky import units

MAX_ROWS = 60
"""Parameters that are shown."""


class _UnitDisk(constraints.ParameterFreeConstraint):
    """Vectors of norm below 1."""

    event_dim = 1

    def __call__(self, x):
        return jnp.sum(x**2, axis=-1) < 1

    def feasible_like(self, prototype):
        return jnp.zeros_like(prototype)


class _UnitDiskTransform(ParameterFreeTransform):
    """`e = v / sqrt(1 + |v|^2)`: all of the plane onto the open unit disk, smooth at 0."""

    domain = constraints.real_vector
    codomain = _UnitDisk()

    def __call__(self, x):
        return x / jnp.sqrt(1 + jnp.sum(x**2, axis=-1, keepdims=True))

    def _inverse(self, y):
        return y / jnp.sqrt(jnp.maximum(1 - jnp.sum(y**2, axis=-1, keepdims=True), 1e-6))

    def log_abs_det_jacobian(self, x, y, intermediates=None):
        return -2 * jnp.log1p(jnp.sum(x**2, axis=-1))


unit_disk = _UnitDisk()
"""Constraint of an ellipticity: a pair of norm below 1."""
biject_to.register(_UnitDisk)(lambda _: _UnitDiskTransform())


class Parameter(eqx.Module):
    """One array of a scene or an observation.

    Attributes
    ----------
    path : str
    shape : tuple of int
    free : bool
        Whether a fit may change it.
    constraint : numpyro constraint
        The values it may take.
    prior : numpyro distribution or None
        Of each element, in the parameter's unit.
    tied_to : str or None
        Path of the parameter it always equals.
    unit : str
        "pixel" (of the model frame), "arcsec", "deg", "flux", "flux/pixel" or "".
    """

    path: str = eqx.field(static=True)
    shape: tuple[int, ...] = eqx.field(static=True)
    free: bool = eqx.field(static=True)
    constraint: constraints.Constraint = eqx.field(static=True)
    prior: dist.Distribution | None = None
    tied_to: str | None = eqx.field(static=True, default=None)
    unit: str = eqx.field(static=True, default="")

    def replace(self, **changes) -> Parameter:
        """Return a copy with some attributes changed."""
        return Parameter(**{**{name: getattr(self, name) for name in self.__dataclass_fields__}, **changes})

    def __repr__(self) -> str:
        state = f"= {self.tied_to}" if self.tied_to else "free" if self.free else "fixed"
        shape, prior = " x ".join(map(str, self.shape)), type(self.prior).__name__
        parts = [state, shape and f"[{shape}]", self.unit, "" if self.prior is None else f"prior {prior}"]
        return f"{self.path}: " + ", ".join(part for part in parts if part)


class Parameters(eqx.Module):
    """All parameters of a scene and its observations; `fix`, `free`, `prior` and `tie` return changed copies.

    Parameters
    ----------
    table : mapping of path to Parameter
    pixel_scale : float
        Arcsec per model pixel, for priors given as Quantity; NaN if there is no WCS.
    """

    table: dict[str, Parameter]
    pixel_scale: float = eqx.field(static=True)

    def __init__(self, table: Mapping[str, Parameter], pixel_scale: float = float("nan")):
        self.table = dict(table)
        self.pixel_scale = float(pixel_scale)

    @classmethod
    def default(cls, scene, observations) -> Parameters:
        """Build the natural choice: fluxes and shapes free; centers free except for free-pixel images; images fixed in place.

        The center of a free image is fixed because its values can move the light themselves. Offsets and
        backgrounds of the observations are fixed, parameters of their noise are free. Priors of a source's own
        (`Source.priors`) are taken over, and the parts of a concentric `CompositeSource` tied.
        """
        table = {}
        for path, component in scene.components():
            for name, parameter in _component_parameters(path, component).items():
                table[name] = parameter
        for obs in observations:
            for parameter in _observation_parameters(obs):
                if parameter.path in table:
                    raise ValueError(f"Observation names must be distinct; {obs.name!r} repeats.")
                table[parameter.path] = parameter
        result = cls(table, scene.frame.pixel_scale)
        for path, component in scene.components():
            for name, prior in component.priors.items():
                parameter = table[f"{path}.{name}"]
                result.table[parameter.path] = parameter.replace(prior=result._fitting(prior, parameter))
        for first, other in scene.ties():
            result.table[other] = result.table[other].replace(tied_to=first)
        return result

    def __getitem__(self, path: str) -> Parameter:
        """Return the parameter at a path; ValueError if that names several."""
        first, *more = self.match(path)
        if more:
            raise ValueError(f"{path!r} names {len(more) + 1} parameters; match() lists them.")
        return self.table[first]

    def __repr__(self) -> str:
        rows = [f"Parameters: {sum(map(self.is_fitted, self.table))} of {len(self.table)} fitted"]
        rows += [repr(parameter) for parameter in list(self)[:MAX_ROWS]]
        if len(self.table) > MAX_ROWS:
            rows.append(f"... and {len(self.table) - MAX_ROWS} more: `match` lists those of a pattern")
        return "\n".join(rows)

    def __iter__(self):
        """Iterate over the parameters."""
        return iter(self.table.values())

    def match(self, pattern: str) -> list[str]:
        """Return the paths that a pattern names.

        Raises
        ------
        KeyError
            If there is none, with the nearest paths.
        """
        expression = re.compile(".*".join(map(re.escape, pattern.split("*"))) + r"(\..*)?")
        found = [path for path in self.table if expression.fullmatch(path)]
        if not found:
            near = difflib.get_close_matches(pattern, list(self.table), n=3, cutoff=0.3)
            raise KeyError(f"No parameter matches {pattern!r}. " + (f"Nearest: {', '.join(near)}." if near else ""))
        return found

    def fix(self, pattern: str) -> Parameters:
        """Return a copy in which the parameters that match keep their value."""
        return self._change(pattern, free=False)

    def free(self, pattern: str, *, prior: dist.Distribution | None = None) -> Parameters:
        """Return a copy in which the parameters that match are fitted, under a prior if one is given.

        Raises
        ------
        KeyError
            If no parameter matches.
        ValueError
            If nothing then says where the model lies, how it is turned or how bright it is: see `check_anchored`.
        """
        changed = self._change(pattern, free=True)
        changed = changed if prior is None else changed.prior(pattern, prior)
        changed.check_anchored()
        return changed

    def prior(self, pattern: str, prior: dist.Distribution | None) -> Parameters:
        """Return a copy in which the parameters that match have that prior on each element (None: flat).

        Quantities in the distribution are converted to the unit of the parameter.

        Raises
        ------
        KeyError
            If no parameter matches.
        TypeError
            If the prior isn't a distribution of numpyro.
        ValueError
            If its unit or shape doesn't fit a parameter.
        """
        if not isinstance(prior, dist.Distribution | None):
            raise TypeError(f"A prior is a distribution from numpyro.distributions, or None; got {prior!r}.")
        table = dict(self.table)
        for path in self.match(pattern):
            table[path] = table[path].replace(prior=self._fitting(prior, table[path]))
        return Parameters(table, self.pixel_scale)

    def constrain(self, pattern: str, constraint: constraints.Constraint) -> Parameters:
        """Return a copy in which the parameters that match obey another constraint, such as `constraints.real`."""
        return self._change(pattern, constraint=constraint)

    def tie(self, path: str, *others: str) -> Parameters:
        """Return a copy in which the parameters that match `others` always equal the one at `path`.

        Raises
        ------
        KeyError
            If a path is unknown.
        ValueError
            If shapes or constraints differ, a parameter is tied to itself, or images are to be tied.
        """
        (first, *more) = self.match(path)
        if more:
            raise ValueError(f"tie() wants one parameter to tie others to; {path!r} matches {len(more) + 1}.")
        first = self.table[first].tied_to or first
        table = dict(self.table)
        for other in others:
            for name in self.match(other):
                a, b = table[first], table[name]
                if name == first:
                    raise ValueError(f"{name!r} can't be tied to itself.")
                if a.shape != b.shape or type(a.constraint) is not type(b.constraint):
                    raise ValueError(
                        f"Only parameters of one shape and constraint can be tied; {first!r} and {name!r} differ."
                    )
                if is_image(name):
                    raise ValueError(
                        f"Images can't be tied ({name!r}); use one source with both spectra's sum instead."
                    )
                table[name] = b.replace(tied_to=first)
                table |= {p.path: p.replace(tied_to=first) for p in self if p.tied_to == name}
        return Parameters(table, self.pixel_scale)

    def is_fitted(self, path: str) -> bool:
        """Return whether the parameter at a path is free, or tied to one that is."""
        return self.table[self.table[path].tied_to or path].free

    def completed(self, observations) -> Parameters:
        """Return a copy that has the parameters of all observations, those that weren't there fixed."""
        table = dict(self.table)
        for obs in observations:
            for parameter in _observation_parameters(obs):
                table.setdefault(parameter.path, parameter.replace(free=False))
        return Parameters(table, self.pixel_scale)

    def check_anchored(self, scene=None, observations=()):
        """Raise ValueError if nothing says where the model lies, how it is turned or how bright it is.

        Data stay the same if all centers move one way and the shifts of all observations the other way; likewise for rotations,
        and for flux scales and fluxes. So one of these must be fixed or have a prior. The place of a free image doesn't count:
        its pixels can move the light.

        Parameters
        ----------
        scene, observations : Scene and sequence of Observation, optional
            With them, an anchor only holds for what has a channel in common with it, directly or through others.
        """
        free = [path for path, parameter in self.table.items() if self.table[parameter.tied_to or path].free]
        names = [name for name in ANCHORED if any(path.endswith(f".{name}") for path in free)]
        if not names:
            return
        channels = [_any_channel(self.table)] if scene is None else _channels_of(scene, observations)
        found = [line for name in names for line in _unanchored(self.table, name, channels)]
        if found:
            raise ValueError("\n".join(found))

    def _change(self, pattern, **changes) -> Parameters:
        """Return a copy with attributes of the matching parameters changed."""
        table = dict(self.table)
        for path in self.match(pattern):
            table[path] = table[path].replace(**changes)
        return Parameters(table, self.pixel_scale)

    def _fitting(self, prior, parameter):
        """Return the distribution with Quantities as plain numbers in the parameter's unit, if it has the right shape."""

        def convert(leaf):
            if not isinstance(leaf, u.Quantity):
                return leaf
            if parameter.unit == "pixel" and leaf.unit.physical_type == "angle":
                if not np.isfinite(self.pixel_scale):
                    raise ValueError(f"There is no WCS: the prior of {parameter.path} must be in pixels, not {leaf}.")
                return leaf.to_value(u.arcsec) / self.pixel_scale
            target = {"arcsec": u.arcsec, "deg": u.deg, "pixel": u.pix, "flux": u.nJy, "flux/pixel": u.nJy}.get(
                parameter.unit
            )
            if target is None:
                raise ValueError(f"{parameter.path!r} has no unit; its prior must be plain numbers, not {leaf}.")
            return units.to_unit(leaf, target, f"The prior of {parameter.path}")

        if prior is None:
            return None
        prior = jax.tree.map(convert, prior, is_leaf=lambda leaf: isinstance(leaf, u.Quantity))
        if not _broadcasts(prior.shape(), parameter.shape):
            raise ValueError(
                f"The prior of {parameter.path} must have a shape that broadcasts to {parameter.shape}; got {prior.shape()}."
            )
        return prior


def _broadcasts(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """Return whether an array of `shape` can be broadcast to `target`."""
    try:
        return np.broadcast_shapes(shape, target) == target
    except ValueError:
        return False


IMAGES = ("image", "coefficients")
"""Names of the parameters that make up free images."""
ENVELOPE_SCATTER, ENVELOPE_FLOOR = 4.0, 1e-6
"""Standard deviation of a free pixel around its envelope, as a fraction of the envelope; of no less than so much of its peak."""
_UNITS = {"half_light_radius": "pixel", "shift": "pixel"}


def is_image(path: str) -> bool:
    """Return whether a path is that of a free image."""
    branch, _, name = path.rpartition(".")
    return name in IMAGES and branch.endswith(".morphology")


ANCHORED = {
    "astrometry.shift": "where the model lies",
    "astrometry.rotation": "how the model is turned",
    "calibration.flux_scale": "how bright the model is",
}
"""Parameters of observations of which not all may be free, and what would be left open."""


class _Channel(NamedTuple):
    """What has a channel: observations and components by path, and the entry of their arrays that is about it."""

    name: str | tuple
    observations: list[tuple[str, int]]
    sources: list[tuple[str, int]]


def _any_channel(table: Mapping[str, Parameter]) -> _Channel:
    """Return a channel that all observations and sources have."""
    ends = ".astrometry.shift", ".spectrum.flux"
    return _Channel("", *([(path.removesuffix(end), 0) for path in table if path.endswith(end)] for end in ends))


def _channels_of(scene, observations) -> list[_Channel]:
    """Return what has each channel of a scene."""
    entries = [(path, component.spectrum.layout(scene.frame.channels)) for path, component in scene.components()]
    return [
        _Channel(
            name,
            [(f"observations.{o.name}", o.channels.index(name)) for o in observations if name in o.channels],
            [(path, int(entry[number])) for path, entry in entries if entry[number] >= 0],
        )
        for number, name in enumerate(scene.frame.channels)
    ]


def _unanchored(table: Mapping[str, Parameter], name: str, channels: list[_Channel]) -> list[str]:
    """Return what is to be said of the parameters `name` of observations that have no anchor."""
    root = {path: parameter.tied_to or path for path, parameter in table.items()}
    loose = {path for path in root.values() if table[path].free}
    loose -= {root[path] for path, parameter in table.items() if parameter.prior is not None and not is_image(path)}
    sets = [_exchangeable(table, name, channel) for channel in channels]
    lost: dict[tuple[str, ...], list] = {}
    for group in _joined(sets):
        paths = {path for path, _ in group}
        if paths <= loose:
            own = tuple(path for path in table if path.endswith(f".{name}") and root[path] in paths)
            lost.setdefault(own, []).extend(c.name for c, part in zip(channels, sets, strict=True) if part & group)
    parts = {own: "" if len(names) == len(channels) else f" in {names}" for own, names in lost.items()}
    return [
        f"All observations' {name} are free{part}; nothing then says {ANCHORED[name]}. "
        f"Keep at least one of {list(own)} fixed as the anchor, or give it a prior."
        for own, part in parts.items()
    ]


def _exchangeable(table: Mapping[str, Parameter], name: str, channel: _Channel) -> set[tuple[str, int]]:
    """Return the parameters (path, entry) in a channel that stand for one another: `name`, and fluxes or places of sources."""
    if not (channel.sources and channel.observations):
        return set()
    by_entry = name == "calibration.flux_scale"
    nodes = [(f"{path}.{name}", entry) for path, entry in channel.observations]
    nodes += [(f"{path}.spectrum.flux" if by_entry else _place(table, path), entry) for path, entry in channel.sources]
    roots = {path: (table[path].tied_to if path in table else None) or path for path, _ in nodes}
    return {(roots[path], entry if by_entry else 0) for path, entry in nodes}


def _place(table: Mapping[str, Parameter], source: str) -> str:
    """Return the path of what says where a component lies: of its free image, or its center."""
    images = [f"{source}.morphology.{name}" for name in IMAGES]
    return next((path for path in images if path in table and table[path].free), f"{source}.center")


def _joined(sets) -> list[set]:
    """Return sets merged until no two have a member in common; none that is empty."""
    groups: list[set] = []
    for members in filter(None, sets):
        touching = [group for group in groups if not group.isdisjoint(members)]
        groups = [group for group in groups if group.isdisjoint(members)] + [members.union(*touching)]
    return groups


def _component_parameters(path, component) -> dict[str, Parameter]:
    """Return the parameters of one component by path."""
    pixels = any(name in IMAGES for name in component.morphology.constraints)
    table = {
        f"{path}.center": Parameter(f"{path}.center", (2,), not pixels, constraints.real, unit="pixel"),
        f"{path}.spectrum.flux": Parameter(
            f"{path}.spectrum.flux", component.spectrum.flux.shape, True, constraints.nonnegative, unit="flux"
        ),
    }
    for name, constraint in component.morphology.constraints.items():
        full = f"{path}.morphology.{name}"
        prior = _default_prior(name, component.morphology)
        value = getattr(component.morphology, name)
        # A link's parameter is the array of its values.
        shape = np.shape(getattr(value, "values", value))
        table[full] = Parameter(full, shape, True, constraint, prior, unit=_UNITS.get(name, ""))
    return table


FLUX_SCALE_ERROR, PSF_VARIANCE_ERROR = 0.02, 0.1
"""Standard deviations of the priors of flux scales, and of PSF variances in units of that of the PSF (of its width, half of
that), if no others are given: calibrations and PSFs are known, but not perfectly."""
LARGEST_LOSS = 0.8
"""Of its variance a PSF may lose this fraction."""


def _observation_parameters(obs) -> list[Parameter]:
    """Return the parameters of an observation: what is nearly right stays as it is, what noise leaves open is free."""
    base = f"observations.{obs.name}"
    variance = float(obs.psf.effective_sigma.min()) ** 2
    priors = {
        "calibration.flux_scale": dist.Normal(1.0, FLUX_SCALE_ERROR),
        "calibration.psf_variance": dist.Normal(0.0, PSF_VARIANCE_ERROR * variance),
    }
    ranges = {"calibration.psf_variance": constraints.greater_than(-LARGEST_LOSS * variance)}
    fixed = [
        Parameter(
            f"{base}.{path}", value.shape, False, ranges.get(path, kind.constraint), priors.get(path), unit=kind.unit
        )
        for (path, value), kind in zip(obs.nuisances().items(), NUISANCES.values(), strict=True)
    ]
    return fixed + [
        Parameter(f"{base}.noise.{name}", obs.background.shape, kind.is_free, kind.constraint, unit=kind.unit)
        for name, kind in obs.noise.parameters.items()
    ]


RING_SCALE = 0.005
"""Scale of the half-Cauchy prior of the amplitudes of rings: those that the data don't ask for stay empty, above all wide ones
that look like a sky, and bright ones hardly feel it."""


def _default_prior(name, morphology) -> dist.Distribution | None:
    """Return the prior that a parameter of a morphology has if no other is given."""
    if name in IMAGES:
        return morphology.prior()
    return dist.HalfCauchy(RING_SCALE) if name == "amplitudes" else None
