#!/usr/bin/env python3
"""Draw the demo field that scenefit ships, with GalSim and from a fixed seed.

Seven sources in a patch of sky six arcseconds wide, seen by two cameras: one F814W
image with the pixels and the sharpness of the Hubble Space Telescope (HST), its axes
turned by 23 degrees against north, and g, r, i, z, y images as Hyper Suprime-Cam (HSC)
takes them from the ground. The sources touch in the HSC images and come apart in the
HST one. Nothing of scenefit is used, so the truth is independent of it.

    python benchmarks/make_demo_field.py                  # write the packaged file
    python benchmarks/make_demo_field.py --check          # compare that file with a rerun
    python benchmarks/make_demo_field.py --out other.fits --seed 5 --preview other.png

Needs ``galsim``, ``astropy``, ``numpy`` and ``matplotlib``. HDUs of the file:

PRIMARY
    SEED; OFF_E, OFF_N: the true astrometric offset of the HSC in arcsec (a source of
    given sky coordinates appears displaced by that much, east and north, from where the
    WCS of the HSC image puts it); ROT: angle of the HST axes against north in degrees.
HST_OBS, HST_WEIGHTS, HST_PSF
    (y, x); flux per pixel, inverse variance, PSF stamp with the pixel response included.
HSC_OBS, HSC_WEIGHTS, HSC_PSF
    (channel, y, x); the same in the five bands named in CHANNELS.
CATALOG
    RA, DEC (ICRS, deg): true positions with 5 mas of noise, as a detection has them.
TRUTH
    id, ra, dec, kind, half_light_radius_arcsec, and mag_CH (AB) and flux_CH (nJy) in
    every channel. The radius is that of the circle around (ra, dec) that holds half of
    the F814W light on the sky, before any PSF; 0 for a star.

Both `*_PSF` images are samples on the pixel grid of their camera, not renormalized: what
their sum lacks of one is light that falls outside the stamp.
"""

import argparse
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import astropy
import galsim
import numpy as np
from astropy.io import fits
from astropy.table import Table
from astropy.wcs import WCS
from matplotlib.figure import Figure

DEFAULT_SEED = 20
DEFAULT_OUT = Path(__file__).resolve().parents[1] / "src/scenefit/app/data/demo_field.fits"
MAX_BYTES = 1_000_000

CHANNELS = ("F814W", "g", "r", "i", "z", "y")
FIELD_CENTER_DEG = (150.3, 2.05)  # right ascension, declination (ICRS)
HSC_OFFSET_ARCSEC = (0.03, -0.02)  # east, north
CATALOG_NOISE_ARCSEC = 0.005
NANOJANSKY_ZEROPOINT = 31.4  # AB magnitude of 1 nJy

# AB magnitude minus that in i, in the order of CHANNELS: plausible galaxies at z ~ 0.4
OLD_STARS = (-0.08, 1.75, 0.65, 0.0, -0.25, -0.38)
DISK_STARS = (-0.04, 0.80, 0.30, 0.0, -0.12, -0.17)
YOUNG_STARS = (-0.01, 0.25, 0.08, 0.0, -0.02, -0.04)
K_DWARF = (-0.04, 1.30, 0.42, 0.0, -0.15, -0.22)

# Airy wings reach far: draw them on larger transforms than by GalSim's default
ACCURATE = galsim.GSParams(maximum_fft_size=16384, folding_threshold=1e-3)


@dataclass(frozen=True)
class Camera:
    """An imager: pixel grid, depth and PSF.

    Parameters
    ----------
    name : str
        Prefix of its HDUs.
    channels : tuple of str
        Names of its bands.
    zeropoint : float
        AB magnitude of one unit of flux.
    pixel_scale_arcsec : float
        Width of the (square) pixels.
    num_pixels : int
        Pixels along either side of the (square) image.
    rotation_deg : float
        Angle between the y axis and north.
    sigma : tuple of float
        Standard deviation of the noise per pixel in each channel, in units of flux.
    psfs : tuple of galsim.GSObject
        PSF in each channel, without the pixel response.
    psf_num_pixels : int
        Pixels along either side of the PSF stamps; odd.
    offset_arcsec : tuple of float
        Error of its astrometry, east and north: where a source appears, minus where
        the WCS puts it.
    wcs_style : {"CD", "PC"}
        Keywords that the linear part of the WCS is written in.
    """

    name: str
    channels: tuple[str, ...]
    zeropoint: float
    pixel_scale_arcsec: float
    num_pixels: int
    rotation_deg: float
    sigma: tuple[float, ...]
    psfs: tuple[galsim.GSObject, ...]
    psf_num_pixels: int
    offset_arcsec: tuple[float, float]
    wcs_style: str

    def header(self) -> fits.Header:
        """Return the tangential WCS and the photometric zeropoint as FITS keywords.

        Returns
        -------
        fits.Header
            Keywords with CD1_1... or with PC1_1... and CDELT1..., by `wcs_style`.
        """
        reference = (self.num_pixels + 1) / 2
        scale_deg = self.pixel_scale_arcsec / 3600
        angle = np.deg2rad(self.rotation_deg)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        flip = np.diag([-1.0, 1.0])  # x grows to the west when rotation_deg is 0
        header = fits.Header()
        header["WCSAXES"] = 2
        for axis, ctype in enumerate(("RA---TAN", "DEC--TAN")):
            header[f"CTYPE{axis + 1}"] = ctype
            header[f"CUNIT{axis + 1}"] = "deg"
            header[f"CRVAL{axis + 1}"] = FIELD_CENTER_DEG[axis]
            header[f"CRPIX{axis + 1}"] = reference
        if self.wcs_style == "CD":
            matrix = scale_deg * flip @ turn
        else:
            matrix = flip @ turn @ flip
            header["CDELT1"], header["CDELT2"] = -scale_deg, scale_deg
        for i, j in np.ndindex(2, 2):
            # adding 0 turns -0.0 into 0.0
            header[f"{self.wcs_style}{i + 1}_{j + 1}"] = float(matrix[i, j]) + 0.0
        header["RADESYS"] = "ICRS"
        header["MAGZERO"] = (self.zeropoint, "AB magnitude of one unit of flux")
        if len(self.channels) == 1:
            header["FILTER"] = self.channels[0]
        else:
            header["CHANNELS"] = ",".join(self.channels)
        return header

    def galsim_wcs(self) -> galsim.JacobianWCS:
        """Return the linear map from pixels to GalSim's sky axes in arcsec.

        Returns
        -------
        galsim.JacobianWCS
            (x, y) -> (u, v), where u grows to the west and v to the north.
        """
        jacobian = 3600 * WCS(self.header(), naxis=2).pixel_scale_matrix
        return galsim.JacobianWCS(*(-jacobian[0]), *jacobian[1])


@dataclass(frozen=True)
class Component:
    """Light of one color: a profile and its magnitudes.

    Parameters
    ----------
    profile : galsim.GSObject or None
        Profile of unit flux in arcsec, centroid at the origin; None for a point.
    magnitudes : np.ndarray, shape (6,)
        AB magnitude in each of `CHANNELS`.
    """

    profile: galsim.GSObject | None
    magnitudes: np.ndarray


@dataclass(frozen=True)
class Source:
    """A sum of components around one position.

    Parameters
    ----------
    kind : str
        What it is, in a word.
    east_arcsec, north_arcsec : float
        Position relative to the center of the field.
    components : tuple of Component
        What it is made of.
    """

    kind: str
    east_arcsec: float
    north_arcsec: float
    components: tuple[Component, ...]

    @property
    def coordinates_deg(self) -> tuple[float, float]:
        """Right ascension and declination (ICRS, deg)."""
        return displace(*FIELD_CENTER_DEG, self.east_arcsec, self.north_arcsec)

    def relative_flux(self, zeropoint: float) -> np.ndarray:
        """Return the flux of every component, shape (component, channel).

        Parameters
        ----------
        zeropoint : float
            AB magnitude of one unit of flux.

        Returns
        -------
        np.ndarray, shape (component, channel)
            Total flux in all of `CHANNELS`.
        """
        magnitudes = np.stack([part.magnitudes for part in self.components])
        return 10 ** (-0.4 * (magnitudes - zeropoint))

    def magnitudes(self) -> np.ndarray:
        """Return the total AB magnitude in each of `CHANNELS`, shape (6,)."""
        return -2.5 * np.log10(self.relative_flux(0.0).sum(axis=0))


def displace(ra_deg: float, dec_deg: float, east_arcsec: float, north_arcsec: float) -> tuple[float, float]:
    """Move a position by a small angle on the sky.

    Parameters
    ----------
    ra_deg, dec_deg : float
        Right ascension and declination.
    east_arcsec, north_arcsec : float
        Displacement along either direction.

    Returns
    -------
    tuple of float
        Right ascension and declination in degrees.
    """
    stretch = np.cos(np.deg2rad(dec_deg))
    return ra_deg + east_arcsec / 3600 / stretch, dec_deg + north_arcsec / 3600


def make_cameras() -> tuple[Camera, Camera]:
    """Describe the two cameras.

    Returns
    -------
    tuple of Camera
        HST and HSC. The square of the HSC is the larger one and holds all of the
        turned HST image.
    """
    hst_psf = galsim.Convolve(
        galsim.Airy(lam=814, diam=2.4, obscuration=0.33, gsparams=ACCURATE),
        galsim.Gaussian(fwhm=0.045, gsparams=ACCURATE),  # jitter of the pointing
    )
    hst = Camera(
        name="HST",
        channels=CHANNELS[:1],
        zeropoint=25.94,
        pixel_scale_arcsec=0.03,
        num_pixels=200,
        rotation_deg=23.0,
        sigma=(0.010,),
        psfs=(hst_psf,),
        psf_num_pixels=101,
        offset_arcsec=(0.0, 0.0),
        wcs_style="CD",
    )
    seeing = ((0.75, 0.010), (0.68, -0.008), (0.55, 0.006), (0.62, 0.012), (0.66, 0.0))
    hsc_psfs = tuple(
        galsim.Moffat(beta=3.0, fwhm=fwhm, trunc=5 * fwhm, gsparams=ACCURATE).shear(g1=g1, g2=0.005)
        for fwhm, g1 in seeing
    )
    hsc = Camera(
        name="HSC",
        channels=CHANNELS[1:],
        zeropoint=27.0,
        pixel_scale_arcsec=0.168,
        num_pixels=48,
        rotation_deg=0.0,
        sigma=(0.055, 0.07, 0.075, 0.11, 0.22),
        psfs=hsc_psfs,
        psf_num_pixels=45,
        offset_arcsec=HSC_OFFSET_ARCSEC,
        wcs_style="PC",
    )
    return hst, hsc


def split_light(
    mag_i: float,
    parts: Sequence[tuple[float, galsim.GSObject | None, Sequence[float]]],
) -> tuple[Component, ...]:
    """Share the light of a source among components.

    Parameters
    ----------
    mag_i : float
        Total AB magnitude in i.
    parts : sequence of (float, galsim.GSObject or None, sequence of float)
        Fraction of the i-band light (together 1), profile, and AB magnitudes minus that
        in i.

    Returns
    -------
    tuple of Component
        One for each part.
    """
    return tuple(
        Component(profile, mag_i - 2.5 * np.log10(fraction) + np.asarray(colors)) for fraction, profile, colors in parts
    )


def sersic(
    index: float,
    half_light_radius: float,
    axis_ratio: float = 1.0,
    position_angle: float = 0.0,
) -> galsim.GSObject:
    """Return an elliptical Sersic profile of unit flux, cut off at six radii.

    The cut keeps the total flux of an index of 4 inside the field.

    Parameters
    ----------
    index : float
        Sersic index.
    half_light_radius : float
        Geometric mean of the semi-axes of the half-light ellipse, arcsec.
    axis_ratio : float
        Minor by major axis.
    position_angle : float
        Angle of the major axis from north to east, degrees.

    Returns
    -------
    galsim.GSObject
        The profile on GalSim's sky axes.
    """
    profile = galsim.Sersic(
        index,
        half_light_radius=half_light_radius,
        trunc=6 * half_light_radius,
        gsparams=ACCURATE,
    )
    return incline(profile, axis_ratio, position_angle)


def incline(profile: galsim.GSObject, axis_ratio: float, position_angle: float) -> galsim.GSObject:
    """Flatten a round profile at constant area.

    Parameters
    ----------
    profile : galsim.GSObject
        Profile to flatten.
    axis_ratio : float
        Minor by major axis.
    position_angle : float
        Angle of the major axis from north to east, degrees.

    Returns
    -------
    galsim.GSObject
        The sheared profile.
    """
    # GalSim counts from its first axis, west, through north
    beta = (90 + position_angle) * galsim.degrees
    return profile.shear(q=axis_ratio, beta=beta)


def knots(x: np.ndarray, y: np.ndarray, sigma: np.ndarray, flux: np.ndarray) -> galsim.GSObject:
    """Return round Gaussian knots with unit total flux and the centroid at the origin.

    Parameters
    ----------
    x, y : np.ndarray, shape (knot,)
        Positions before centering, arcsec.
    sigma : np.ndarray, shape (knot,)
        Widths, arcsec.
    flux : np.ndarray, shape (knot,)
        Relative fluxes.

    Returns
    -------
    galsim.GSObject
        Sum of the knots.
    """
    flux = flux / flux.sum()
    x, y = x - flux @ x, y - flux @ y
    return galsim.Sum(
        [
            galsim.Gaussian(sigma=s, flux=f, gsparams=ACCURATE).shift(dx, dy)
            for dx, dy, s, f in zip(x, y, sigma, flux, strict=True)
        ]
    )


def spiral_arms(
    rng: np.random.Generator,
    *,
    num_knots: int,
    scale_arcsec: float,
    inner_arcsec: float,
    outer_arcsec: float,
    pitch_deg: float,
    width_arcsec: float,
    scatter: float,
) -> galsim.GSObject:
    """Place knots along two logarithmic spiral arms seen face on.

    Parameters
    ----------
    rng : np.random.Generator
        Scatters positions, widths and fluxes.
    num_knots : int
        Knots in each arm.
    scale_arcsec : float
        Exponential scale of the decline of brightness outward.
    inner_arcsec, outer_arcsec : float
        Radii between which the arms run.
    pitch_deg : float
        Angle between an arm and the circle.
    width_arcsec : float
        Mean standard deviation of a knot at half the outer radius; grows outward.
    scatter : float
        Standard deviation of the natural logarithm of the knots' flux.

    Returns
    -------
    galsim.GSObject
        Arms of unit flux.
    """
    radius = np.tile(np.linspace(inner_arcsec, outer_arcsec, num_knots), 2)
    radius = radius + rng.normal(0, 0.02, radius.size)
    winding = np.log(radius / inner_arcsec) / np.tan(np.deg2rad(pitch_deg))
    phase = winding + np.repeat([0.0, np.pi], num_knots)
    phase = phase + rng.normal(0, 0.07, radius.size)
    # a knot stands for its length of arm, which grows with the radius
    flux = radius * np.exp(-radius / scale_arcsec)
    flux = flux * rng.lognormal(0, scatter, radius.size)
    sigma = width_arcsec * rng.uniform(0.7, 1.3, radius.size)
    sigma = sigma * (0.6 + 0.8 * radius / outer_arcsec)
    return knots(radius * np.cos(phase), radius * np.sin(phase), sigma, flux)


def clump_chain(rng: np.random.Generator, *, num_clumps: int, length_arcsec: float) -> galsim.GSObject:
    """Return a bent chain of clumps, as of an irregular star-forming galaxy.

    Parameters
    ----------
    rng : np.random.Generator
        Scatters positions, widths and fluxes.
    num_clumps : int
        Clumps in the chain.
    length_arcsec : float
        From its first clump to the last.

    Returns
    -------
    galsim.GSObject
        Clumps of unit flux.
    """
    along = np.linspace(-0.5, 0.5, num_clumps)
    x = length_arcsec * along + rng.normal(0, 0.02, num_clumps)
    y = length_arcsec * 1.1 * along**2 + rng.normal(0, 0.05, num_clumps)
    flux = rng.lognormal(0, 0.6, num_clumps)
    return knots(x, y, rng.uniform(0.02, 0.055, num_clumps), flux)


def make_sources(rng: np.random.Generator) -> list[Source]:
    """Compose the seven sources of the field.

    Parameters
    ----------
    rng : np.random.Generator
        Places the knots of the spiral and of the irregular galaxy; positions,
        magnitudes and smooth shapes are fixed.

    Returns
    -------
    list of Source
        The brightest galaxy first.
    """
    arms = spiral_arms(
        rng,
        num_knots=50,
        scale_arcsec=0.5,
        inner_arcsec=0.26,
        outer_arcsec=1.40,
        pitch_deg=19.0,
        width_arcsec=0.07,
        scatter=0.3,
    )
    young_clusters = spiral_arms(
        rng,
        num_knots=18,
        scale_arcsec=0.6,
        inner_arcsec=0.26,
        outer_arcsec=1.0,  # farther out they would pass for sources of their own
        pitch_deg=19.0,
        width_arcsec=0.025,
        scatter=0.8,
    )
    clumps = clump_chain(rng, num_clumps=9, length_arcsec=1.0)
    spiral = split_light(
        20.6,
        [
            (0.20, sersic(2.0, 0.15, 0.85, 35), OLD_STARS),
            (0.38, sersic(1.0, 0.65, 0.72, 35), DISK_STARS),
            (0.30, incline(arms, 0.72, 35), YOUNG_STARS),
            (0.12, incline(young_clusters, 0.72, 35), YOUNG_STARS),
        ],
    )
    edge_on = split_light(
        21.7,
        [
            (0.30, sersic(2.5, 0.12, 0.70, 118), OLD_STARS),
            (0.70, sersic(1.0, 0.42, 0.22, 118), DISK_STARS),
        ],
    )
    lenticular = split_light(
        21.6,
        [
            (0.40, sersic(3.0, 0.13, 0.80, 160), OLD_STARS),
            (0.60, sersic(1.0, 0.45, 0.45, 160), DISK_STARS),
        ],
    )
    irregular = split_light(
        21.9,
        [
            (0.50, sersic(0.8, 0.34, 0.50, 55), YOUNG_STARS),
            (0.50, clumps.rotate(145 * galsim.degrees), YOUNG_STARS),
        ],
    )
    elliptical = split_light(21.8, [(1.0, sersic(4.0, 0.20, 0.75, 80), OLD_STARS)])
    faint = split_light(24.0, [(1.0, sersic(1.0, 0.18, 0.60, 10), DISK_STARS)])
    star = split_light(21.9, [(1.0, None, K_DWARF)])
    return [
        Source("spiral", 0.10, 0.05, spiral),
        Source("disk", -1.55, 1.75, edge_on),
        Source("disk", 1.75, -1.60, lenticular),
        Source("irregular", 1.85, 1.35, irregular),
        Source("elliptical", -1.35, -1.40, elliptical),
        Source("faint", 0.15, 2.25, faint),
        Source("star", -2.05, -0.15, star),
    ]


def render(
    camera: Camera,
    channel: int,
    source: Source,
    image: galsim.Image,
    position: galsim.PositionD,
) -> None:
    """Add one source to an image of one channel, without noise.

    Parameters
    ----------
    camera : Camera
        Supplies PSF and zeropoint.
    channel : int
        Index among the channels of the camera.
    source : Source
        What to draw.
    image : galsim.Image
        Image that is added to; carries the camera's `galsim_wcs`.
    position : galsim.PositionD
        Where its center falls, in pixels of the image.
    """
    column = CHANNELS.index(camera.channels[channel])
    flux = source.relative_flux(camera.zeropoint)[:, column]
    psf = camera.psfs[channel]
    for part, part_flux in zip(source.components, flux, strict=True):
        seen = psf if part.profile is None else galsim.Convolve(part.profile, psf)
        (part_flux * seen).drawImage(image, center=position, add_to_image=True)


def render_field(camera: Camera, sources: Sequence[Source]) -> np.ndarray:
    """Draw all sources where the camera sees them, its astrometric error included.

    Parameters
    ----------
    camera : Camera
        Camera to draw for.
    sources : sequence of Source
        Sources to draw.

    Returns
    -------
    np.ndarray, shape (channel, y, x)
        Flux per pixel without noise, float64.
    """
    wcs = WCS(camera.header(), naxis=2)
    planes = []
    for channel in range(len(camera.channels)):
        image = galsim.ImageD(camera.num_pixels, camera.num_pixels, wcs=camera.galsim_wcs())
        image.setOrigin(0, 0)
        for source in sources:
            seen_at = displace(*source.coordinates_deg, *camera.offset_arcsec)
            x, y = wcs.wcs_world2pix(*seen_at, 0)
            render(camera, channel, source, image, galsim.PositionD(float(x), float(y)))
        planes.append(image.array)
    return np.stack(planes)


def draw_psfs(camera: Camera) -> np.ndarray:
    """Draw the PSFs on the pixel grid of the camera, centered on the middle pixel.

    Parameters
    ----------
    camera : Camera
        Camera to draw for.

    Returns
    -------
    np.ndarray, shape (channel, y, x)
        Fraction of the light per pixel, pixel response included.
    """
    size, wcs = camera.psf_num_pixels, camera.galsim_wcs()
    stamps = [psf.drawImage(galsim.ImageD(size, size, wcs=wcs)) for psf in camera.psfs]
    return np.stack([stamp.array for stamp in stamps])


def half_light_radius(source: Source, seed: int, num_photons: int = 1_000_000) -> float:
    """Measure the circular half-light radius in F814W, without any PSF.

    The median distance from the center of photons shot from the profile, good to about
    one part in a thousand for a million of them.

    Parameters
    ----------
    source : Source
        Source to measure.
    seed : int
        Seed of GalSim's random numbers; positive.
    num_photons : int
        How many to shoot.

    Returns
    -------
    float
        Radius in arcsec; 0 for a point.
    """
    flux = source.relative_flux(0.0)[:, 0]
    extended = [
        part_flux * part.profile
        for part, part_flux in zip(source.components, flux / flux.sum(), strict=True)
        if part.profile is not None
    ]
    if not extended:
        return 0.0
    photons = galsim.Sum(extended).shoot(num_photons, rng=galsim.BaseDeviate(seed))
    return float(np.median(np.hypot(photons.x, photons.y)))


def truth_table(sources: Sequence[Source], seed: int) -> Table:
    """Tabulate what was drawn.

    Parameters
    ----------
    sources : sequence of Source
        Sources of the field.
    seed : int
        Seed of the field.

    Returns
    -------
    Table
        Columns as described for the TRUTH extension at the top of this file.
    """
    ra, dec = np.transpose([source.coordinates_deg for source in sources])
    table = Table()
    table["id"] = np.arange(len(sources), dtype=np.int32)
    table["ra"], table["dec"] = ra, dec
    table["kind"] = [source.kind for source in sources]
    table["half_light_radius_arcsec"] = [
        half_light_radius(source, seed + 1 + index) for index, source in enumerate(sources)
    ]
    magnitudes = np.stack([source.magnitudes() for source in sources])
    for channel, column in zip(CHANNELS, magnitudes.T, strict=True):
        table[f"mag_{channel}"] = column
    for channel, column in zip(CHANNELS, magnitudes.T, strict=True):
        table[f"flux_{channel}"] = 10 ** (-0.4 * (column - NANOJANSKY_ZEROPOINT))
    for name, unit in {"ra": "deg", "dec": "deg"}.items():
        table[name].unit = unit
    table["half_light_radius_arcsec"].unit = "arcsec"
    for channel in CHANNELS:
        table[f"mag_{channel}"].unit = "mag"
        table[f"flux_{channel}"].unit = "nJy"
    return table


def catalog_table(truth: Table, rng: np.random.Generator) -> Table:
    """Return positions as a detection would hand them over.

    Parameters
    ----------
    truth : Table
        True positions in `ra` and `dec`.
    rng : np.random.Generator
        Draws the errors.

    Returns
    -------
    Table
        RA and DEC in degrees.
    """
    errors = rng.normal(0, CATALOG_NOISE_ARCSEC, (len(truth), 2))
    positions = [displace(row["ra"], row["dec"], *error) for row, error in zip(truth, errors, strict=True)]
    ra, dec = np.transpose(positions)
    table = Table({"RA": ra, "DEC": dec})
    table["RA"].unit = table["DEC"].unit = "deg"
    return table


def primary_hdu(hst: Camera, hsc: Camera, seed: int) -> fits.PrimaryHDU:
    """Describe the field in the primary header.

    Parameters
    ----------
    hst, hsc : Camera
        The two cameras.
    seed : int
        Seed of the field.

    Returns
    -------
    fits.PrimaryHDU
        Header without data.
    """
    hdu = fits.PrimaryHDU()
    east, north = hsc.offset_arcsec
    header = hdu.header
    header["OBJECT"] = "scenefit demo field"
    header["SEED"] = (seed, "seed of all random numbers")
    header["OFF_E"] = (east, "[arcsec] true HSC displacement, east")
    header["OFF_N"] = (north, "[arcsec] true HSC displacement, north")
    header["ROT"] = (hst.rotation_deg, "[deg] HST axes against north")
    header["CREATOR"] = Path(__file__).name
    header["GALSIM"] = (galsim.__version__, "version that drew the images")
    header["NUMPY"] = (np.__version__, "version that drew the noise")
    header["ASTROPY"] = (astropy.__version__, "version that wrote the file")
    header["COMMENT"] = "Simulated blend of seven sources as seen by HST and by HSC."
    header["COMMENT"] = "A source appears in HSC_OBS at its coordinates + (OFF_E, OFF_N)."
    return hdu


def make_field(seed: int) -> fits.HDUList:
    """Draw the whole field.

    Parameters
    ----------
    seed : int
        Seed of knots, catalog errors and pixel noise.

    Returns
    -------
    fits.HDUList
        What is described at the top of this file.
    """
    knot_rng, catalog_rng, noise_rng = np.random.default_rng(seed).spawn(3)
    cameras = make_cameras()
    sources = make_sources(knot_rng)
    truth = truth_table(sources, seed)
    hdus = fits.HDUList([primary_hdu(*cameras, seed)])
    for camera in cameras:
        clean = render_field(camera, sources)
        sigma = np.reshape(camera.sigma, (-1, 1, 1))
        observed = clean + sigma * noise_rng.standard_normal(clean.shape)
        weights = np.broadcast_to(sigma**-2, clean.shape)
        images = {"OBS": observed, "WEIGHTS": weights, "PSF": draw_psfs(camera)}
        for suffix, image in images.items():
            header = camera.header() if suffix == "OBS" else None
            plane = image[0] if len(camera.channels) == 1 else image
            hdus.append(fits.ImageHDU(plane.astype(np.float32), header, f"{camera.name}_{suffix}"))
    tables = {"CATALOG": catalog_table(truth, catalog_rng), "TRUTH": truth}
    for name, table in tables.items():
        hdu = fits.BinTableHDU(table, name=name)
        hdu.header["RADESYS"] = "ICRS"
        hdus.append(hdu)
    return hdus


def check_rerun(hdus: fits.HDUList, again: fits.HDUList) -> None:
    """Raise if two fields differ by more than rounding.

    Parameters
    ----------
    hdus, again : fits.HDUList
        Fields to compare.

    Raises
    ------
    ValueError
        If extensions, shapes or values differ.
    """
    names, names_again = ([hdu.name for hdu in each] for each in (hdus, again))
    if names != names_again:
        raise ValueError(f"extensions {names_again}, expected {names}")
    for hdu in hdus[1:]:
        other = again[hdu.name]
        if isinstance(hdu, fits.BinTableHDU):
            pairs = {name: (hdu.data[name], other.data[name]) for name in hdu.columns.names}
        else:
            pairs = {"pixels": (hdu.data, other.data)}
        for name, (left, right) in pairs.items():
            if left.dtype.kind in "US":
                same = np.array_equal(left, right)
            else:
                # float32 pixels of another FFT library agree to this
                same = np.allclose(left, right, rtol=1e-5, atol=1e-6)
            if not same:
                raise ValueError(f"a rerun changes {hdu.name}: {name}")


def check_flux(hdus: fits.HDUList, tolerance: float = 0.01) -> float:
    """Draw every source alone on a wide image and compare its flux with TRUTH.

    Parameters
    ----------
    hdus : fits.HDUList
        Field to check.
    tolerance : float
        Largest relative difference.

    Returns
    -------
    float
        Largest relative difference found.

    Raises
    ------
    ValueError
        If a flux is off by more than the tolerance.
    """
    sources = make_sources(np.random.default_rng(hdus[0].header["SEED"]).spawn(3)[0])
    worst = 0.0
    for camera in make_cameras():
        to_nanojansky = 10 ** (0.4 * (NANOJANSKY_ZEROPOINT - camera.zeropoint))
        size = round(18 / camera.pixel_scale_arcsec)  # 0.3 % of an Airy disk is farther out
        for channel, name in enumerate(camera.channels):
            for row, source in zip(hdus["TRUTH"].data, sources, strict=True):
                image = galsim.ImageD(size, size, wcs=camera.galsim_wcs())
                render(camera, channel, source, image, image.true_center)
                drawn = image.array.sum() * to_nanojansky
                error = abs(drawn / row[f"flux_{name}"] - 1)
                if error > tolerance:
                    raise ValueError(
                        f"{source.kind} has {drawn:.1f} nJy in {name}, TRUTH says {row[f'flux_{name}']:.1f}"
                    )
                worst = max(worst, error)
    return worst


def check_file(path: Path) -> None:
    """Check a written field: size, rerun, flux; print what was found.

    Parameters
    ----------
    path : Path
        File to check.

    Raises
    ------
    ValueError
        If one of the checks fails.
    """
    content = path.read_bytes()
    if len(content) > MAX_BYTES:
        raise ValueError(f"{path} has {len(content)} bytes, at most {MAX_BYTES}")
    with fits.open(io.BytesIO(content)) as hdus:
        again = make_field(hdus[0].header["SEED"])
        check_rerun(hdus, again)
        worst = check_flux(hdus)
    buffer = io.BytesIO()
    again.writeto(buffer)
    identical = buffer.getvalue() == content
    print(
        f"ok: {len(content) / 1000:.0f} kB, rerun equal (byte for byte: {identical}), fluxes within {100 * worst:.2f} %"
    )


def color_image(planes: np.ndarray, softening: float, white: float) -> np.ndarray:
    """Turn three planes into a color image with an asinh stretch of their mean.

    Parameters
    ----------
    planes : np.ndarray, shape (3, y, x)
        Red, green and blue.
    softening : float
        Mean level at which the stretch turns from linear to logarithmic.
    white : float
        Mean level shown at full brightness.

    Returns
    -------
    np.ndarray, shape (y, x, 3)
        Between 0 and 1. Colors survive saturation.
    """
    mean = np.maximum(planes.mean(axis=0), 1e-6 * softening)
    stretch = np.arcsinh(mean / softening) / np.arcsinh(white / softening)
    color = np.clip(planes * (stretch / mean), 0, None)
    color = color / np.maximum(color.max(axis=0), 1)
    return np.moveaxis(color, 0, -1)


def write_preview(hdus: fits.HDUList, path: Path) -> None:
    """Write a picture of the field: HSC in color (i, r, g) and HST in gray.

    Parameters
    ----------
    hdus : fits.HDUList
        Field to show.
    path : Path
        Image file to write.
    """
    hsc, hst = hdus["HSC_OBS"].data.astype(float), hdus["HST_OBS"].data.astype(float)
    balance = np.reshape([0.75, 1.0, 1.6], (3, 1, 1))
    color = color_image(balance * hsc[[2, 1, 0]], softening=0.4, white=14.0)
    gray = np.arcsinh(np.clip(hst, 0, None) / 0.03) / np.arcsinh(0.45 / 0.03)
    figure = Figure(figsize=(10, 5.3), layout="constrained", facecolor="white")
    panels = {"HSC_OBS": (color, None), "HST_OBS": (np.clip(gray, 0, 1), "gray")}
    titles = {
        "HSC_OBS": 'HSC i, r, g (0.168"/pixel)',
        "HST_OBS": 'HST F814W (0.03"/pixel)',
    }
    for index, (name, (picture, cmap)) in enumerate(panels.items()):
        wcs = WCS(hdus[name].header, naxis=2)
        axes = figure.add_subplot(1, 2, index + 1)
        axes.imshow(picture, origin="lower", cmap=cmap, vmin=0, vmax=1)
        axes.set_title(titles[name])
        axes.set_xticks([])
        axes.set_yticks([])
        height, width = picture.shape[:2]
        start = wcs.wcs_pix2world(0.92 * width, 0.08 * height, 0)
        for letter, step in {"N": (0.0, 0.5), "E": (0.5, 0.0)}.items():
            tip = wcs.wcs_world2pix(*displace(*map(float, start), *step), 0)
            axes.annotate(
                letter,
                xy=(0.92 * width, 0.08 * height),
                xytext=tuple(map(float, tip)),
                color="white",
                ha="center",
                va="center",
                arrowprops={"arrowstyle": "-", "color": "white"},
            )
    figure.savefig(path, dpi=110)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line.

    Parameters
    ----------
    arguments : sequence of str, optional
        Arguments instead of those of the process.

    Returns
    -------
    argparse.Namespace
        `out`, `seed`, `check` and `preview`.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="FITS file")
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED)
    parser.add_argument("--check", action="store_true", help="check the file at --out, write nothing")
    parser.add_argument("--preview", type=Path, help="also write a picture here")
    return parser.parse_args(arguments)


def main() -> None:
    """Write the field, or check one that is there."""
    arguments = parse_arguments()
    if arguments.check:
        check_file(arguments.out)
    else:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        make_field(arguments.seed).writeto(arguments.out, overwrite=True)
        print(f"{arguments.out}: {arguments.out.stat().st_size / 1000:.0f} kB")
    if arguments.preview is not None:
        with fits.open(arguments.out) as hdus:
            write_preview(hdus, arguments.preview)


if __name__ == "__main__":
    main()
