"""Small inputs and brute-force references that several test modules use."""

from __future__ import annotations

import inspect

import jax
import numpy as np
from astropy.io import fits
from astropy.wcs import WCS

from scenefit.data.observation import Observation
from scenefit.sky.psf import GaussianPSF

CENTER_DEG = (150.3, 2.05)
"""Where all test images point (ICRS right ascension and declination)."""


def tangent_header(
    shape,
    scale_arcsec=0.1,
    *,
    rotation_deg=0.0,
    flip=(False, False),
    offset=(0.0, 0.0),
    center_deg=CENTER_DEG,
    dialect="CD",
):
    """Return the header of a tangent-plane image.

    Parameters
    ----------
    shape : (int, int)
        Height and width.
    scale_arcsec : float
        Pixel side.
    rotation_deg : float
        Angle by which the axes are turned, before flipping; x points west at 0.
    flip : (bool, bool)
        Whether y and x run the other way.
    offset : (float, float)
        Position (y, x) of the field centre in pixels, from the middle of the image.
    center_deg : (float, float)
        Right ascension and declination of the field centre.
    dialect : str
        "CD", "PC" (with CDELT) or "CROTA" (with CDELT; without flips).
    """
    angle = np.deg2rad(rotation_deg)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    signs = np.diag([-1.0 if f else 1.0 for f in flip[::-1]])
    scale = np.array([-scale_arcsec, scale_arcsec]) / 3600
    matrix = np.diag(scale) @ turn @ signs
    header = fits.Header({"NAXIS": 2, "NAXIS1": shape[1], "NAXIS2": shape[0], "RADESYS": "ICRS"})
    for axis, ctype in enumerate(("RA---TAN", "DEC--TAN")):
        header[f"CTYPE{axis + 1}"] = ctype
        header[f"CUNIT{axis + 1}"] = "deg"
        header[f"CRVAL{axis + 1}"] = center_deg[axis]
        header[f"CRPIX{axis + 1}"] = (shape[1 - axis] + 1) / 2 + offset[1 - axis]
        if dialect != "CD":
            header[f"CDELT{axis + 1}"] = scale[axis]
    if dialect == "CROTA":
        # From the y axis, counter-clockwise where the axes are left-handed.
        header["CROTA2"] = -rotation_deg
        return header
    rows = matrix if dialect == "CD" else matrix / scale[:, None]
    for i, j in np.ndindex(2, 2):
        header[f"{dialect}{i + 1}_{j + 1}"] = rows[i, j] + 0.0
    return header


def with_sip(header, strength=1e-4):
    """Return the header with a quadratic SIP distortion of `strength` per pixel."""
    header = header.copy()
    header["CTYPE1"], header["CTYPE2"] = "RA---TAN-SIP", "DEC--TAN-SIP"
    header["A_ORDER"], header["B_ORDER"] = 2, 2
    header["A_2_0"], header["A_1_1"], header["B_0_2"], header["B_1_1"] = strength * np.array([1, -0.5, 0.7, 0.3])
    return header


def with_tpv(header, strength=20.0):
    """Return the header with a quadratic TPV distortion of `strength` per degree."""
    header = header.copy()
    header["CTYPE1"], header["CTYPE2"] = "RA---TPV", "DEC--TPV"
    for axis, (square, mixed) in {1: (strength, -0.5 * strength), 2: (0.7 * strength, 0.3 * strength)}.items():
        header[f"PV{axis}_0"], header[f"PV{axis}_1"], header[f"PV{axis}_2"] = 0.0, 1.0, 0.0
        header[f"PV{axis}_4"], header[f"PV{axis}_5"] = square, mixed
    return header


def tangent_wcs(*args, **kwargs) -> WCS:
    """Return the WCS of `tangent_header`."""
    return WCS(tangent_header(*args, **kwargs))


def gaussian_image(shape, center, sigma) -> np.ndarray:
    """Return samples of a round Gaussian of unit flux, in float64."""
    y, x = np.arange(shape[0])[:, None] - center[0], np.arange(shape[1]) - center[1]
    return np.exp(-(y**2 + x**2) / (2 * sigma**2)) / (2 * np.pi * sigma**2)


def make_observation(shape=(12, 14), *, scale_arcsec=0.1, channels=("g",), wcs=True, psf=None, name="obs", **options):
    """Return a small observation: noise of unit variance, a Gaussian PSF of 1.5 pixels, a tangent-plane WCS.

    `options` go to `tangent_header` (rotation_deg, flip, offset, center_deg) or else to `Observation`.
    """
    geometry = {key: options.pop(key) for key in ("rotation_deg", "flip", "offset", "center_deg") if key in options}
    if wcs is True:
        wcs = tangent_wcs(shape, scale_arcsec, **geometry)
    data = options.pop("data", None)
    if data is None:
        data = np.random.default_rng(5).normal(size=(len(channels), *shape))
    if not {"weights", "variance", "sigma", "noise"} & options.keys():
        options["weights"] = 1.0
    psf = GaussianPSF(1.5) if psf is None else psf
    return Observation(data, psf=psf, wcs=wcs, channels=channels, name=name, **options)


def final_classes(interface) -> set[type]:
    """Return all concrete subclasses of an interface inside the package."""
    found = set()
    for cls in interface.__subclasses__():
        found |= final_classes(cls)
        if not inspect.isabstract(cls) and cls.__module__.startswith("scenefit."):
            found.add(cls)
    return found


def compiled_for(tree) -> tuple:
    """Return what decides whether a compiled function takes a tree: its structure, and shapes and types of its arrays."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((np.shape(leaf), str(np.asarray(leaf).dtype)) for leaf in leaves)


def spectrum_sum(image, ky, kx, origin=(0.0, 0.0), spacing=1.0):
    """Return `sum_n image(n) exp(-2 pi i k.(n - origin) spacing)` at each pair of frequencies, by brute force."""
    y = (np.arange(image.shape[-2]) - origin[0]) * spacing
    x = (np.arange(image.shape[-1]) - origin[1]) * spacing
    phase = ky[..., None, None] * y[:, None] + kx[..., None, None] * x
    return np.einsum("...yx,yx->...", np.exp(-2j * np.pi * phase), image)
