"""What a detection returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import astropy.units as u
import equinox as eqx
import numpy as np
from astropy.coordinates import SkyCoord
from astropy.table import QTable

from scenefit.sky.frame import Frame
from scenefit.survey.candidates import Candidate, Host
from scenefit.survey.catalog import channel_label


class Detections(eqx.Module):
    """Sources found in images, most significant first; those of a catalogue that weren't found come last.

    Attributes
    ----------
    frame : Frame
    positions : array, shape (n, 2)
        (y, x) on the frame.
    table : QTable
        One row a source: id; ra, dec [deg, ICRS; NaN without a WCS]; y, x [pix on the frame]; significance (of its flux, its
        neighbours subtracted); flux_CH and flux_err_CH for every channel CH [nJy, or data units]: those of a smooth model of the
        source fitted together with all others, with errors of the noise alone; NaN and infinite without data; half_light_radius
        [arcsec, or pix without a WCS] of that model, 0 for a point; scale [the same] of the Gaussian that it was most significant
        with; is_compact, whether that is a point; origin: "detected", "catalog" or "both"; catalog_row, its row in the catalogue
        or -1.
    significance : array, shape (y, x)
        Of a point source at each pixel of the frame, all observations taken together; 0 without data.
    segmentation : array of int, shape (y, x)
        Which row of the table, plus 1, shows at each pixel; 0 for none.
    clumps : QTable
        Unresolved peaks on brighter resolved sources, which aren't listed as sources: ra, dec, y, x, significance, host (the id
        of that source), fraction (of its flux; NaN if it has none).
    known : QTable
        Sources of the scene that was subtracted: id, ra, dec, y, x.
    outliers : dict of array of bool, shape (channel, y, x)
        By name of the observation, pixels that were left out as sharper than the PSF.
    """

    frame: Frame
    positions: np.ndarray
    table: QTable
    significance: np.ndarray
    segmentation: np.ndarray
    clumps: QTable
    known: QTable
    outliers: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def skycoord(self) -> SkyCoord:
        """Positions on the sky; raises ValueError without a WCS."""
        return self.frame.to_sky(self.positions)

    @property
    def undetected_rows(self) -> np.ndarray:
        """Rows of the catalogue that weren't detected."""
        return np.sort(self._rows("catalog"))

    @property
    def matched_rows(self) -> np.ndarray:
        """Rows of the catalogue that were detected."""
        return np.sort(self._rows("both"))

    def _rows(self, origin: str) -> np.ndarray:
        return np.asarray(self.table["catalog_row"])[np.asarray(self.table["origin"]) == origin]


def place_columns(frame: Frame, positions: np.ndarray) -> dict:
    """Return the columns ra, dec, y and x of positions on the frame."""
    if frame.wcs is None:
        ra = dec = np.full(len(positions), np.nan)
    elif len(positions):
        sky = frame.to_sky(positions).icrs
        ra, dec = sky.ra.deg, sky.dec.deg
    else:
        ra = dec = np.zeros(0)
    return {"ra": ra * u.deg, "dec": dec * u.deg, "y": positions[:, 0] * u.pix, "x": positions[:, 1] * u.pix}


def flux_columns(frame: Frame, fluxes: np.ndarray, errors: np.ndarray, unit: u.UnitBase) -> dict:
    """Return the columns of fluxes and errors, shape (source, channel)."""
    columns = {}
    for number, channel in enumerate(frame.channels):
        label = channel_label(channel)
        columns[f"flux_{label}"] = fluxes[:, number] * unit
        columns[f"flux_err_{label}"] = errors[:, number] * unit
    return columns


def length_unit(frame: Frame) -> u.Quantity:
    """Return the side of a pixel of the frame: in arcsec, or one pixel without a WCS."""
    return 1.0 * u.pix if frame.wcs is None else frame.pixel_scale * u.arcsec


def clump_table(
    frame: Frame, clumps: Sequence[tuple[Candidate, int]], names: Mapping[int, str], fluxes: np.ndarray
) -> QTable:
    """Return the table of clumps, each with the number of its host, of which there are the names and fluxes."""
    positions = np.array([clump.position for clump, _ in clumps]).reshape(-1, 2)
    table = QTable(place_columns(frame, positions))
    table["significance"] = np.array([clump.significance for clump, _ in clumps], dtype=float)
    table["host"] = np.array([names[number] for _, number in clumps], dtype=str)
    light = np.array([clump.flux for clump, _ in clumps], dtype=float)
    hosts = fluxes[[number for _, number in clumps]] if clumps else np.zeros(0)
    table["fraction"] = np.divide(light, hosts, where=hosts > 0, out=np.full(len(light), np.nan))
    return table


def known_table(frame: Frame, known: Sequence[tuple[str, Host]]) -> QTable:
    """Return the table of sources that were known before, with their names."""
    positions = np.array([host.position for _, host in known]).reshape(-1, 2)
    return QTable({"id": np.array([name for name, _ in known], dtype=str), **place_columns(frame, positions)})
