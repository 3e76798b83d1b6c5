"""Saved models: scenes, observations, parameters and fit results as ASDF files.

A file holds what the constructors need, by name, next to a schema version; nothing is pickled, and only
classes of scenefit and numpyro are ever built from it. Arrays come back bit for bit, as NumPy arrays.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import importlib.metadata
import inspect
import os
import secrets
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import asdf
import equinox as eqx
import jax
import numpy as np
import numpyro.distributions as dist
from astropy.io import fits
from astropy.utils.exceptions import AstropyWarning
from astropy.wcs import WCS, DistortionLookupTable, Sip
from numpyro.distributions import constraints
from numpyro.distributions.util import lazy_property

from scenefit.arrays import box
from scenefit.data import correlated, correlation, noise, nuisances, observation
from scenefit.infer import diagnostics, fit, sample
from scenefit.model import clumpy, link, morphology, parameters, scene, source, spectrum, starlet
from scenefit.sky import frame, mixture, psf, resampledpsf

SCHEMA_VERSION = 1
"""Version of the layout of saved files; `MIGRATIONS` has an entry for every older one."""
MIGRATIONS: dict[int, Callable[[dict], dict]] = {}
"""By schema version: what turns the content of a file of that version into that of the next one."""
DERIVED: dict[type, tuple[str, ...]] = {
    observation.Observation: ("renderer", "frame"),
    starlet.StarletMorphology: ("splines",),
    correlated.CorrelatedNoise: ("average", "whitening", "kept", "amplification"),
}
"""Attributes that aren't saved: `match` makes those of an observation anew, the constructor the others."""
INLINE_SIZE = 16
"""Arrays of up to this many numbers stand as text among the rest, larger ones as binary blocks."""
_MODULES = (
    box,
    psf,
    resampledpsf,
    mixture,
    frame,
    noise,
    correlation,
    correlated,
    nuisances,
    observation,
    spectrum,
    link,
    morphology,
    clumpy,
    starlet,
    source,
    scene,
    parameters,
    fit,
    diagnostics,
    sample,
)


def _public_classes(base: type) -> dict[str, Any]:
    """Return the public classes that `_MODULES` define under `base`, abstract ones left out."""
    return {
        name: cls
        for module in _MODULES
        for name, cls in inspect.getmembers(module, inspect.isclass)
        if cls.__module__ == module.__name__
        and issubclass(cls, base)
        and not name.startswith(("_", "Abstract"))
        and not inspect.isabstract(cls)
    }


CLASSES = _public_classes(eqx.Module)
"""Modules that can be saved."""
ENUMS = _public_classes(enum.Enum)
"""Enums that can be saved, by the names of their members."""
_CONSTRAINTS = {
    **{name: value for name, value in vars(constraints).items() if not name.startswith("_")},
    "unit_disk": parameters.unit_disk,
}


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which replaces `path` at the end, or vanishes after an error.

    Raises
    ------
    FileNotFoundError
        If there is no such folder.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: expected an existing folder {path.parent} to write into; there is none.")
    temporary = path.with_name(f".{secrets.token_hex(4)}-{path.name}")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save(path: str | os.PathLike, obj) -> None:
    """Save a scene, observations, parameters, a frame or the result of a fit, whole or not at all.

    Parameters
    ----------
    path : path
        File to write, `.asdf` by custom; replaced if it exists.
    obj : Scene, Observation, Parameters, Frame, FitResult, or a tuple or dict of such
        Renderers aren't saved: `obs.match(frame)`, or the next fit, makes them anew.

    Raises
    ------
    TypeError
        If it holds something that isn't part of scenefit or numpyro. Nothing is written then.
    """
    content = {"schema_version": SCHEMA_VERSION, "package_version": package_version(), "object": to_tree(obj)}
    with atomic_path(path) as temporary:
        asdf.AsdfFile({"scenefit": content}).write_to(temporary)


def load(path: str | os.PathLike):
    """Load what `save` wrote.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it isn't a file of `save`, is damaged, or was written with a newer schema.
    """
    content = _read_content(Path(path))
    version = content["schema_version"]
    if version > SCHEMA_VERSION:
        raise ValueError(
            f"{path}: written by scenefit {content.get('package_version')} with schema version {version}; "
            f"scenefit {package_version()} reads versions up to {SCHEMA_VERSION}. "
            "Upgrade: pip install --upgrade scenefit."
        )
    while version < SCHEMA_VERSION:
        content = MIGRATIONS[version](content)
        version += 1
    try:
        return from_tree(content["object"])
    except (KeyError, TypeError, ValueError) as exc:
        raise ValueError(f"{path}: its content doesn't make a valid object: {exc}") from exc


def package_version() -> str:
    """Return the version of the installed package."""
    try:
        return importlib.metadata.version("scenefit")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _read_content(path: Path) -> dict:
    """Return what `save` wrote as plain dicts, lists and arrays."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a file written by scenefit.save; there is no such file.")
    try:
        with warnings.catch_warnings():
            # A block that is missing from a truncated file is only warned of.
            warnings.simplefilter("error", asdf.exceptions.AsdfWarning)
            with asdf.open(path, lazy_load=False, memmap=False) as file:
                content = file.tree.get("scenefit")
    # Damaged YAML and blocks raise errors of many kinds.
    except Exception as exc:
        raise ValueError(f"{path}: expected an ASDF file written by scenefit.save; reading it failed: {exc}") from exc
    if not isinstance(content, Mapping) or not isinstance(content.get("schema_version"), int):
        raise ValueError(f"{path}: expected an ASDF file written by scenefit.save; it has no scenefit schema version.")
    return dict(content)


def to_tree(value):
    """Return a value as dicts with a "type", lists, arrays, numbers and strings."""
    if value is None:
        return None
    if isinstance(value, enum.Enum):
        if ENUMS.get(type(value).__name__) is not type(value):
            raise TypeError(f"Only scenefit's own enums can be saved; got {value!r}.")
        return {"type": "enum", "name": type(value).__name__, "member": value.name}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.ndarray | jax.Array):
        return _array_to_tree(np.asarray(value))
    if isinstance(value, tuple | list):
        return [to_tree(item) for item in value]
    if isinstance(value, Mapping):
        return {"type": "dict", "items": [[to_tree(key), to_tree(item)] for key, item in value.items()]}
    if isinstance(value, WCS):
        return _wcs_to_tree(value)
    if isinstance(value, constraints.Constraint):
        return _constraint_to_tree(value)
    if isinstance(value, dist.Distribution):
        return _distribution_to_tree(value)
    name = type(value).__name__
    if CLASSES.get(name) is type(value):
        names = [f.name for f in dataclasses.fields(value) if f.name not in DERIVED.get(type(value), ())]
        return {"type": name, **{name: to_tree(getattr(value, name)) for name in names}}
    raise TypeError(f"Only objects of scenefit and numpyro's distributions can be saved; got a {type(value)}.")


def from_tree(tree) -> Any:
    """Return the value of which `to_tree` made the tree; lists come back as tuples."""
    if isinstance(tree, list):
        return tuple(from_tree(item) for item in tree)
    if isinstance(tree, np.ndarray):
        return np.array(tree, dtype=tree.dtype.newbyteorder("="))
    if not isinstance(tree, Mapping):
        return tree
    kind, fields = tree["type"], {key: value for key, value in tree.items() if key != "type"}
    if kind in _READERS:
        return _READERS[kind](fields)
    if kind not in CLASSES:
        raise ValueError(f"unknown type {kind!r}")
    return _build(CLASSES[kind], {name: from_tree(value) for name, value in fields.items()})


def _array_to_tree(array: np.ndarray):
    """Return an array: small ones as text, the others for a binary block."""
    if array.dtype.kind not in "biuf":
        raise TypeError(f"Only arrays of real numbers and booleans can be saved; got type {array.dtype}.")
    if array.size > INLINE_SIZE:
        return np.ascontiguousarray(array)
    return {
        "type": "array",
        "dtype": array.dtype.name,
        "shape": list(array.shape),
        "values": array.ravel().tolist(),
    }


def _array_from_tree(fields) -> np.ndarray:
    """Return a small array."""
    return np.array(fields["values"], dtype=fields["dtype"]).reshape(fields["shape"])


def _dict_from_tree(fields) -> dict:
    """Return a dict; it is kept as pairs, because YAML loses the order of keys."""
    return {from_tree(key): from_tree(value) for key, value in fields["items"]}


def _build(cls: type, fields: dict):
    """Return an instance with the given fields: by its constructor, then with arrays bit for bit as saved."""
    # Where constructors take something else than what they keep.
    if cls is frame.Frame:
        given = {**fields, "shape": fields["box"].shape}
    elif cls is observation.Observation:
        # Data and background were converted when they first came in.
        given = {**fields, "unit": "nJy" if fields["flux_unit"] == "nJy" else None}
    elif issubclass(cls, morphology.AbstractImageMorphology):
        # A fitted image may have faded to nothing, which the constructor refuses.
        given = {**fields, **{name: np.ones_like(fields[name]) for name in cls.constraints}}
    elif cls is psf.ImagePSF:
        given = {**fields, "center": fields["center"][0]}
    else:
        given = fields
    accepted = inspect.signature(cls).parameters
    instance = cls(**{name: value for name, value in given.items() if name in accepted})
    changed = [name for name in fields if not _is_same(getattr(instance, name), fields[name])]
    if not changed:
        return instance
    return eqx.tree_at(lambda m: [getattr(m, name) for name in changed], instance, [fields[name] for name in changed])


def _is_same(built, saved) -> bool:
    """Whether a field of a new instance is what was saved, to the last bit of its arrays."""
    built_leaves, built_tree = jax.tree.flatten(built)
    saved_leaves, saved_tree = jax.tree.flatten(saved)
    return built_tree == saved_tree and all(
        a is b or _same_array(np.asarray(a), np.asarray(b)) for a, b in zip(built_leaves, saved_leaves, strict=True)
    )


def _same_array(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays have the same type, shape and bits."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def _arguments(value, of: str) -> dict:
    """Return the arguments that a distribution or constraint was constructed with."""
    names = [
        name
        for name in inspect.signature(type(value).__init__).parameters
        # Lazy properties are other ways to give the same: a covariance instead of its Cholesky factor.
        if name not in ("self", "validate_args") and not isinstance(getattr(type(value), name, None), lazy_property)
    ]
    try:
        return {name: to_tree(getattr(value, name)) for name in names}
    except (AttributeError, TypeError) as exc:
        raise TypeError(f"The {of} {value!r} can't be saved: its arguments aren't known ({exc}).") from exc


def _distribution_to_tree(value: dist.Distribution) -> dict:
    """Return a distribution as the name of its class in numpyro and its arguments."""
    name = type(value).__name__
    if getattr(dist, name, None) is not type(value):
        raise TypeError(f"Only priors from numpyro.distributions can be saved; got a {type(value)}.")
    tree = {"type": "distribution", "name": name, "arguments": _arguments(value, "prior")}
    if not _is_same(_distribution_from_tree(tree), value):
        raise TypeError(f"The prior {value!r} can't be saved: numpyro doesn't rebuild it from its arguments.")
    return tree


def _distribution_from_tree(fields) -> dist.Distribution:
    """Return a distribution of numpyro."""
    cls = getattr(dist, fields["name"], None)
    if not (inspect.isclass(cls) and issubclass(cls, dist.Distribution)):
        raise ValueError(f"unknown distribution {fields['name']!r}")
    return cls(**{name: from_tree(value) for name, value in fields["arguments"].items()})


def _constraint_to_tree(value: constraints.Constraint) -> dict:
    """Return a constraint as its name in numpyro, with arguments if it has any."""
    for name, known in _CONSTRAINTS.items():
        if type(known) is type(value) and known == value:
            return {"type": "constraint", "name": name}
        if known is type(value):
            return {"type": "constraint", "name": name, "arguments": _arguments(value, "constraint")}
    raise TypeError(f"Only constraints from numpyro.distributions.constraints can be saved; got {value!r}.")


def _constraint_from_tree(fields) -> constraints.Constraint:
    """Return a constraint of numpyro, or of the parameters."""
    if fields["name"] not in _CONSTRAINTS:
        raise ValueError(f"unknown constraint {fields['name']!r}")
    known = _CONSTRAINTS[fields["name"]]
    if "arguments" not in fields:
        return known
    return known(**{name: from_tree(value) for name, value in fields["arguments"].items()})


def _enum_from_tree(fields) -> enum.Enum:
    """Return a member of an enum."""
    if fields["name"] not in ENUMS:
        raise ValueError(f"unknown enum {fields['name']!r}")
    return ENUMS[fields["name"]][fields["member"]]


def _wcs_to_tree(wcs: WCS) -> dict:
    """Return a WCS as FITS cards, with the numbers that cards round to 14 digits in full."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AstropyWarning)
        header = wcs.to_header(relax=True)
    # The cards give a CD matrix as PC and CDELT, which don't mix with CD.
    for key in [key for key in header if key.startswith(("PC", "CD"))]:
        del header[key]
    core, sip = wcs.wcs, wcs.sip
    exact = {name: np.array(getattr(core, name), dtype=float) for name in ("crpix", "crval", "lonpole", "latpole")}
    exact |= {"cd": np.array(core.cd)} if core.has_cd() else {"pc": core.get_pc(), "cdelt": core.get_cdelt()}
    tables = {name: getattr(wcs, name) for name in ("cpdis1", "cpdis2", "det2im1", "det2im2")}
    return {
        "type": "WCS",
        "header": [card.strip() for card in header.tostring(sep="\n").split("\n")],
        "exact": {name: _array_to_tree(value) for name, value in exact.items()},
        "pv": [list(entry) for entry in core.get_pv()],
        "sip": None if sip is None else [to_tree(getattr(sip, name)) for name in ("a", "b", "ap", "bp", "crpix")],
        "lookup": {
            name: [to_tree(np.array(getattr(table, part))) for part in ("data", "crpix", "crval", "cdelt")]
            for name, table in tables.items()
            if table is not None
        },
        "pixel_shape": to_tree(wcs.pixel_shape),
        "pixel_bounds": to_tree(wcs.pixel_bounds),
    }


def _wcs_from_tree(fields) -> WCS:
    """Return a WCS."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AstropyWarning)
        wcs = WCS(fits.Header.fromstring("\n".join(fields["header"]), sep="\n"))
    for name, value in fields["exact"].items():
        value = _array_from_tree(value)
        setattr(wcs.wcs, name, value if value.ndim else float(value))
    if fields["pv"]:
        wcs.wcs.set_pv([tuple(entry) for entry in fields["pv"]])
    if fields["sip"] is not None:
        wcs.sip = Sip(*from_tree(fields["sip"]))
    for name, parts in fields["lookup"].items():
        data, *place = from_tree(parts)
        setattr(wcs, name, DistortionLookupTable(data, *(tuple(part) for part in place)))
    wcs.pixel_shape = from_tree(fields["pixel_shape"])
    wcs.pixel_bounds = from_tree(fields["pixel_bounds"])
    wcs.wcs.set()
    return wcs


_READERS: dict[str, Callable] = {
    "array": _array_from_tree,
    "dict": _dict_from_tree,
    "enum": _enum_from_tree,
    "WCS": _wcs_from_tree,
    "constraint": _constraint_from_tree,
    "distribution": _distribution_from_tree,
}
