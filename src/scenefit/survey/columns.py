"""The columns of a catalogue, in one place: what each holds, and what it is called in the Virtual Observatory."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from astropy.table import Table

from scenefit.sky.frame import Channel


class Column(NamedTuple):
    """A column: its meaning, and its UCD (of a column of a channel, without the part of the spectrum)."""

    description: str
    ucd: str


COLUMNS = {
    "id": Column("name of the source", "meta.id;meta.main"),
    "ra": Column("right ascension, ICRS; NaN without a WCS", "pos.eq.ra;meta.main"),
    "dec": Column("declination, ICRS; NaN without a WCS", "pos.eq.dec;meta.main"),
    "ra_err": Column("standard error on the sky, not divided by cos(dec)", "stat.error;pos.eq.ra"),
    "dec_err": Column("standard error", "stat.error;pos.eq.dec"),
    "y": Column("row on the model frame, from 0", "pos.cartesian.y"),
    "x": Column("column on the model frame, from 0", "pos.cartesian.x"),
    "y_err": Column("standard error", "stat.error;pos.cartesian.y"),
    "x_err": Column("standard error", "stat.error;pos.cartesian.x"),
    "half_light_radius": Column(
        "radius of the circle that holds half the light, model PSF removed, the channels added in units of their errors",
        "phys.angSize;src.morph",
    ),
    "half_light_radius_err": Column("standard error", "stat.error;phys.angSize"),
    "r80": Column("radius of the circle that holds 80 % of the light, as half_light_radius", "phys.angSize;src.morph"),
    "r80_err": Column("standard error", "stat.error;phys.angSize"),
    "r90": Column("radius of the circle that holds 90 % of the light, as half_light_radius", "phys.angSize;src.morph"),
    "r90_err": Column("standard error", "stat.error;phys.angSize"),
    "r20": Column("radius of the circle that holds 20 % of the light, as half_light_radius", "phys.angSize;src.morph"),
    "concentration": Column("5 log10(r80 / r20); NaN where r20 is 0", "src.morph.param"),
    "axis_ratio": Column(
        "minor over major axis of the matching elliptical Gaussian, model PSF removed; NaN if there is no measurable size",
        "phys.size.axisRatio",
    ),
    "axis_ratio_err": Column("standard error", "stat.error;phys.size.axisRatio"),
    "position_angle": Column("of its major axis, east of north; counter-clockwise from +x without a WCS", "pos.posAng"),
    "position_angle_err": Column(
        "standard error, at most that of an angle of which nothing is known", "stat.error;pos.posAng"
    ),
    "snr": Column("flux over its error without that of models, all channels added in quadrature", "stat.snr;phot.flux"),
    "star_score": Column(
        "probability of a point against a galaxy, 0 to 1; NaN for free pixels, whose size has no error",
        "src.class.starGalaxy",
    ),
    "flux_correlation": Column(
        "correlation of the flux with that of another source: the largest one of all channels, without its sign",
        "stat.correlation;phot.flux",
    ),
    "masked_fraction": Column(
        "fraction of the light on pixels without information, in the channel with data where it is largest",
        "phot.flux;arith.ratio",
    ),
    "flags": Column("sum of the bits of the flags", "meta.code.qual"),
}
"""By name."""
CHANNEL_COLUMNS = {
    "flux": Column("total flux of the model", "phot.flux.density"),
    "flux_err": Column("standard error, that of models included", "stat.error;phot.flux.density"),
    "mag": Column("AB magnitude; NaN where the flux isn't positive or isn't calibrated", "phot.mag"),
    "mag_err": Column("standard error, to first order", "stat.error;phot.mag"),
    "blendedness": Column(
        "1 - sum(m_s^2) / sum(m_s m), with the model m_s of the source and m of all: 0 if alone",
        "phot.flux;arith.ratio",
    ),
    "chi_square": Column(
        "mean square of the whitened residuals on the brightest pixels, which hold 80 % of the light", "stat.fit.chi2"
    ),
    "num_pixels": Column("independent numbers in that mean", "meta.number;instr.pixel"),
}
"""By the name that the channel's is appended to."""

_BANDS = {
    "u": "em.opt.U",
    "b": "em.opt.B",
    "g": "em.opt.B",
    "v": "em.opt.V",
    "r": "em.opt.R",
    "i": "em.opt.I",
    "z": "em.opt.I",
    "y": "em.opt.I",
    "j": "em.IR.J",
    "h": "em.IR.H",
    "k": "em.IR.K",
    "ks": "em.IR.K",
}
"""Parts of the spectrum by the usual names of bands, from where most of their light is."""
_LIMITS = (
    (300.0, "em.UV"),
    (400.0, "em.opt.U"),
    (500.0, "em.opt.B"),
    (600.0, "em.opt.V"),
    (750.0, "em.opt.R"),
    (1000.0, "em.opt.I"),
    (1500.0, "em.IR.J"),
    (2000.0, "em.IR.H"),
    (3000.0, "em.IR.K"),
)
"""Longest wavelength [nm] of each part of the spectrum, as the list of UCD words has them."""
_SPACE_FILTER = re.compile(r"f(\d{3})(?:w|m|n|lp|x|w2)$", re.IGNORECASE)
_LONGEST_OPTICAL = 200
"""Numbers in names of filters of space telescopes are nm from here on, in units of 10 nm below."""


def spectral_part(band: str) -> str | None:
    """Return the UCD word of the part of the spectrum that a band is in; None for a name that says nothing.

    Known are the usual letters, alone or at the end of a name ("r", "sdss_r", "HSC-Y"), and filters of space telescopes: F814W
    is at 814 nm, F160W at 1600 nm, F444W in doubt at 444 nm.
    """
    name = re.split(r"[\s._:-]", str(band).strip())[-1]
    if found := _SPACE_FILTER.match(name):
        number = float(found[1])
        wavelength = number if number >= _LONGEST_OPTICAL else 10 * number
        return next((word for limit, word in _LIMITS if wavelength < limit), None)
    return _BANDS.get(name.lower())


def describe(table: Table, channels: Sequence[Channel], labels: Sequence[str], is_calibrated: bool):
    """Write description and UCD into the columns of a catalogue.

    Parameters
    ----------
    table : Table
    channels : sequence of str or (band, epoch)
    labels : sequence of str
        What the channels are called in the columns' names.
    is_calibrated : bool
        Whether fluxes are flux densities.
    """
    for name, column in COLUMNS.items():
        if name in table.colnames:
            _describe(table, name, column.description, column.ucd)
    for channel, label in zip(channels, labels, strict=True):
        band = channel[0] if isinstance(channel, tuple) else channel
        part = spectral_part(str(band))
        for name, column in CHANNEL_COLUMNS.items():
            ucd = column.ucd if is_calibrated else column.ucd.replace("phot.flux.density", "phot.flux")
            _describe(
                table, f"{name}_{label}", f"{column.description} ({label})", ucd if part is None else f"{ucd};{part}"
            )


def _describe(table: Table, name: str, description: str, ucd: str):
    """Write into one column."""
    table[name].info.description = description
    table[name].info.meta = {"ucd": ucd}
