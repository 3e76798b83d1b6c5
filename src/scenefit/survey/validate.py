"""Truth matching: how far a catalogue is from what is known of its sources."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import astropy.units as u
import equinox as eqx
import numpy as np
import scipy.optimize
from astropy.coordinates import SkyCoord, search_around_sky
from astropy.stats import binom_conf_interval, mad_std
from astropy.table import QTable, Table
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from scenefit.sky import units

SIZE_NAMES = ("half_light_radius", "hlr_arcsec", "hlr")
"""Columns that hold a half-light radius, in arcsec where they have no unit."""
MIN_BIN = 5
"""Sources in a bin of a running median at least."""
FORMAT = 1
"""Version of the layout of `Validation.summary`."""


class Validation(eqx.Module):
    """A catalogue compared with the truth.

    Attributes
    ----------
    pairs : QTable
        One row a match: `catalog_row`, `truth_row`, `separation` [arcsec], `magnitude` (true, in `channel`), `blended` (whether
        another true source is within `isolation` of it), and for every quantity Q its `residual_Q` (measured minus true) and
        `pull_Q` (in standard errors; NaN without an error). Quantities: `mag_CH`, the colours `CH1-CH2` of neighbouring channels
        and those asked for, `log_size` (natural logarithm of the half-light radius), `ra` and `dec` [arcsec; ra on the sky].
    detections : QTable
        One row a true source: `magnitude`, `found`, `catalog_row` (-1 for none).
    entries : QTable
        One row a row of the catalogue: `magnitude` (measured), `real`, `truth_row` (-1 for none).
    channel : str
        Channel of the magnitudes.
    outlier : float
        Magnitudes and colours off by more than this count as outliers; sizes off by more than this in the logarithm.
    """

    pairs: QTable
    detections: QTable
    entries: QTable
    channel: str = eqx.field(static=True)
    outlier: float = eqx.field(static=True)

    @property
    def completeness(self) -> float:
        """Fraction of the true sources that the catalogue has; NaN without any."""
        return _fraction(self.detections["found"])

    @property
    def purity(self) -> float:
        """Fraction of the catalogue's rows that are true sources; NaN without any."""
        return _fraction(self.entries["real"])

    @property
    def quantities(self) -> list[str]:
        """What was compared."""
        return [name.removeprefix("residual_") for name in self.pairs.colnames if name.startswith("residual_")]

    def statistics(self, *, select: np.ndarray | None = None) -> QTable:
        """Summarise residuals and pulls.

        Parameters
        ----------
        select : array of bool, shape (pair,), optional
            Pairs that count, such as `~validation.pairs["blended"]`.

        Returns
        -------
        QTable
            One row a quantity: `quantity`, `number` of finite residuals, their `median`, `median_absolute`, `mad_sigma`
            (1.4826 times the median absolute deviation from the median), `outlier_fraction`; and `pull_median` and
            `pull_mad_sigma`.
        """
        pairs = self.pairs if select is None else self.pairs[select]
        rows = []
        for name in self.quantities:
            residual, pull = (_finite(pairs[f"{kind}_{name}"]) for kind in ("residual", "pull"))
            outliers = (
                np.nan if name in ("ra", "dec") or not len(residual) else (np.abs(residual) > self.outlier).mean()
            )
            spreads = _median(residual), _median(np.abs(residual)), _spread(residual), outliers
            rows.append((name, len(residual), *spreads, _median(pull), _spread(pull)))
        names = ["quantity", "number", "median", "median_absolute", "mad_sigma", "outlier_fraction", "pull_median"]
        return QTable(rows=rows or None, names=[*names, "pull_mad_sigma"], dtype=[str, int, *[float] * 6])

    def running(self, quantity: str, *, bins: int | Sequence | np.ndarray = 8) -> QTable:
        """Return the residuals of a quantity against true magnitude.

        Parameters
        ----------
        quantity : str
            One of `quantities`.
        bins : int or sequence of float
            Number of bins with as many sources each (fewer if they would hold less than five), or their edges.

        Returns
        -------
        QTable
            One row a bin: `magnitude` (median), `number`, `median`, `median_error` (standard error of a median), `mad_sigma`,
            `pull_median`, `pull_mad_sigma`.

        Raises
        ------
        KeyError
            If there is no such quantity.
        """
        if quantity not in self.quantities:
            raise KeyError(f"There is no quantity {quantity!r}; there are {self.quantities}.")
        magnitude = np.asarray(self.pairs["magnitude"], float)
        residual, pull = (_plain(self.pairs[f"{kind}_{quantity}"]) for kind in ("residual", "pull"))
        valid = np.isfinite(residual) & np.isfinite(magnitude)
        magnitude, residual, pull = magnitude[valid], residual[valid], pull[valid]
        rows = []
        for low, high in itertools.pairwise(_edges(magnitude, bins)):
            inside = (magnitude >= low) & (magnitude < high)
            if count := int(inside.sum()):
                spread = _spread(residual[inside])
                # Of normal residuals; the median's error is larger than the mean's.
                error = spread * math.sqrt(math.pi / 2 / count)
                pulls = _finite(pull[inside])
                typical = _median(magnitude[inside]), count, _median(residual[inside]), error, spread
                rows.append((*typical, _median(pulls), _spread(pulls)))
        names = ["magnitude", "number", "median", "median_error", "mad_sigma", "pull_median", "pull_mad_sigma"]
        return QTable(rows=rows or None, names=names, dtype=[float, int, *[float] * 5])

    def fractions(self, kind: str = "completeness", *, bins: int | Sequence | np.ndarray = 8) -> QTable:
        """Return completeness or purity against magnitude.

        Parameters
        ----------
        kind : "completeness" or "purity"
            Against true magnitude, or against that of the catalogue.
        bins : int or sequence of float
            As in `running`.

        Returns
        -------
        QTable
            One row a bin: `magnitude` (median), `number`, `fraction`, `low` and `high` (68 % interval: Wilson 1927,
            doi:10.1080/01621459.1927.10502953).

        Raises
        ------
        ValueError
            If the kind is another.
        """
        tables = {"completeness": (self.detections, "found"), "purity": (self.entries, "real")}
        if kind not in tables:
            raise ValueError(f"kind is 'completeness' or 'purity'; got {kind!r}.")
        table, name = tables[kind]
        magnitude, success = np.asarray(table["magnitude"], float), np.asarray(table[name], bool)
        valid = np.isfinite(magnitude)
        magnitude, success = magnitude[valid], success[valid]
        rows = []
        for low, high in itertools.pairwise(_edges(magnitude, bins)):
            inside = (magnitude >= low) & (magnitude < high)
            if count := int(inside.sum()):
                interval = binom_conf_interval(int(success[inside].sum()), count, interval="wilson")
                rows.append((_median(magnitude[inside]), count, success[inside].mean(), *interval))
        return QTable(
            rows=rows or None,
            names=["magnitude", "number", "fraction", "low", "high"],
            dtype=[float, int, *[float] * 3],
        )

    def summary(self) -> dict:
        """Return all numbers as plain data for JSON; NaN becomes None."""
        isolated = ~np.asarray(self.pairs["blended"], bool)
        return {
            "format": FORMAT,
            "channel": self.channel,
            "num_truth": len(self.detections),
            "num_catalog": len(self.entries),
            "num_matched": len(self.pairs),
            "completeness": _number(self.completeness),
            "purity": _number(self.purity),
            "statistics": _records(self.statistics()),
            "statistics_isolated": _records(self.statistics(select=isolated)),
            "statistics_blended": _records(self.statistics(select=~isolated)),
            "running": {name: _records(self.running(name)) for name in self.quantities},
            "completeness_by_magnitude": _records(self.fractions("completeness")),
            "purity_by_magnitude": _records(self.fractions("purity")),
        }


def match(
    catalog: Table,
    truth: Table,
    *,
    radius: u.Quantity = 0.3 * u.arcsec,
    channel: str | None = None,
    magnitude_tolerance: float | None = 2.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Match rows of a catalogue to true sources, one to one, by position and flux.

    Among all pairs within the radius, and with magnitudes within the tolerance, as many as possible are chosen, with the smallest
    sum of (separation / radius)^2 + (difference of magnitudes / tolerance)^2.

    Parameters
    ----------
    catalog, truth : Table
        With `ra` and `dec` [deg if they have no unit] and, for the fluxes, `mag_CH` [AB] or `flux_CH` [nJy].
    radius : Quantity
    channel : str, optional
        Channel of the magnitudes; the first that both tables have by default.
    magnitude_tolerance : float, optional
        None for positions alone. Rows without a magnitude are matched by position.

    Returns
    -------
    catalog_rows, truth_rows : arrays of int, shape (match,)
        In order of the truth.

    Raises
    ------
    ValueError
        If positions are missing or not finite, the radius isn't positive, or the tables have no channel in common.
    """
    radius = u.Quantity(radius).to(u.arcsec)
    if not (radius.isscalar and radius > 0):
        raise ValueError(f"The matching radius is one positive angle; got {radius}.")
    positions = [_positions(table, name) for table, name in ((catalog, "catalogue"), (truth, "truth"))]
    if not len(catalog) or not len(truth):
        return np.zeros(0, int), np.zeros(0, int)
    near, source, separation, _ = search_around_sky(*positions, radius)
    cost = (separation / radius).to_value(u.one) ** 2
    if magnitude_tolerance is not None:
        label = _channel(channel, catalog, truth)
        difference = _magnitudes(catalog, label)[near] - _magnitudes(truth, label)[source]
        share = np.where(np.isfinite(difference), difference / magnitude_tolerance, 0.0) ** 2
        allowed = share <= 1
        near, source, cost = near[allowed], source[allowed], (cost + share)[allowed]
    rows = _assign(near, source, cost, (len(catalog), len(truth)))
    order = np.argsort(source[rows], kind="stable")
    return near[rows][order], source[rows][order]


def validate(
    catalog: Table,
    truth: Table,
    *,
    radius: u.Quantity = 0.3 * u.arcsec,
    channel: str | None = None,
    magnitude_tolerance: float | None = 2.0,
    colors: Sequence[tuple[str, str]] = (),
    isolation: u.Quantity = 1.0 * u.arcsec,
    outlier: float = 0.5,
) -> Validation:
    """Compare a catalogue with the truth.

    Parameters
    ----------
    catalog, truth : Table
        As in `match`; where there are `flux_err_CH` (or `mag_err_CH`), `ra_err`, `dec_err`, `half_light_radius_err` in the
        catalogue, residuals are compared with them. Pulls of magnitudes are those of the fluxes, which are defined where a
        flux is negative, too. Those of colours take the errors of their channels as independent: what these have in common,
        such as the part that models have in those of `catalog`, makes them narrow.
    radius, channel, magnitude_tolerance
        See `match`.
    colors : sequence of (str, str)
        Colours beside those of neighbouring channels.
    isolation : Quantity
        A source is called blended if another true one is within this distance.
    outlier : float
        In magnitudes.

    Returns
    -------
    Validation

    Raises
    ------
    ValueError
        See `match`; or if a colour is one of channels that a table doesn't have.
    """
    rows, sources = match(catalog, truth, radius=radius, channel=channel, magnitude_tolerance=magnitude_tolerance)
    shared = _channels(catalog, truth)
    label = _channel(channel, catalog, truth)
    if unknown := [pair for pair in colors if len(pair) != 2 or not set(pair) <= set(shared)]:
        raise ValueError(f"Colours are pairs of channels that both tables have, {shared}; got {unknown}.")
    found, real = (np.full(len(table), -1) for table in (truth, catalog))
    found[sources], real[rows] = rows, sources
    measured, true = catalog[rows], truth[sources]
    here, there = _positions(measured, "catalogue"), _positions(true, "truth")
    pairs = QTable({"catalog_row": rows, "truth_row": sources, "separation": here.separation(there).to(u.arcsec)})
    pairs["magnitude"] = _magnitudes(true, label)
    pairs["blended"] = _is_blended(truth, isolation)[sources]
    for name in shared:
        flux, error, value = _fluxes(measured, name), _errors(measured, name), _fluxes(true, name)
        pairs[f"residual_mag_{name}"] = _magnitudes(measured, name) - _magnitudes(true, name)
        pairs[f"pull_mag_{name}"] = _ratio(flux - value, error)
    for first, second in dict.fromkeys([*itertools.pairwise(shared), *map(tuple, colors)]):
        residual = pairs[f"residual_mag_{first}"] - pairs[f"residual_mag_{second}"]
        error = np.hypot(
            *(units.ab_magnitude_error(_fluxes(measured, n), _errors(measured, n)) for n in (first, second))
        )
        pairs[f"residual_{first}-{second}"], pairs[f"pull_{first}-{second}"] = residual, _ratio(residual, error)
    _add_sizes(pairs, measured, true)
    for name, offset in zip(("ra", "dec"), there.spherical_offsets_to(here), strict=True):
        offset = offset.to_value(u.arcsec)
        pairs[f"residual_{name}"] = offset
        pairs[f"pull_{name}"] = _ratio(offset, _column(measured, f"{name}_err", u.arcsec))
    return Validation(
        pairs=pairs,
        detections=QTable({"magnitude": _magnitudes(truth, label), "found": found >= 0, "catalog_row": found}),
        entries=QTable({"magnitude": _magnitudes(catalog, label), "real": real >= 0, "truth_row": real}),
        channel=label,
        outlier=float(outlier),
    )


def _assign(near, source, cost, shape) -> np.ndarray:
    """Return which of the pairs make the one-to-one matching of most pairs and, among those, of least cost."""
    if not len(near):
        return np.zeros(0, int)
    graph = coo_array((np.ones(len(near)), (near, shape[0] + source)), shape=(sum(shape), sum(shape)))
    _, group = connected_components(graph, directed=False)
    chosen = []
    order = np.argsort(group[near], kind="stable")
    for members in np.split(order, np.flatnonzero(np.diff(group[near][order])) + 1):
        left, i = np.unique(near[members], return_inverse=True)
        right, j = np.unique(source[members], return_inverse=True)
        # Worse than any sum of true costs, so that as many as possible are matched.
        never = 10.0 * (1 + cost[members].max()) * (1 + len(members))
        table, number = np.full((len(left), len(right)), never), np.full((len(left), len(right)), -1)
        table[i, j], number[i, j] = cost[members], members
        pairs = number[scipy.optimize.linear_sum_assignment(table)]
        chosen.append(pairs[pairs >= 0])
    return np.concatenate(chosen)


def _positions(table, name) -> SkyCoord:
    """Return the positions of a table."""
    columns = {column.lower(): column for column in table.colnames}
    if not {"ra", "dec"} <= set(columns):
        raise ValueError(f"The {name} wants columns ra and dec; it has {table.colnames}.")
    ra, dec = (_column(table, columns[axis], u.deg) for axis in ("ra", "dec"))
    if len(bad := np.flatnonzero(~(np.isfinite(ra) & np.isfinite(dec)))):
        raise ValueError(f"Positions of the {name} must be finite; rows {bad[:10].tolist()} aren't.")
    return SkyCoord(ra, dec, unit=u.deg)


def _channels(catalog, truth) -> list[str]:
    """Return the channels whose fluxes both tables have, in the order of the catalogue."""

    def known(table):
        names = [name.split("_", 1)[1] for name in table.colnames if name.startswith(("mag_", "flux_"))]
        return dict.fromkeys(name for name in names if not name.startswith("err_"))

    there = known(truth)
    return [name for name in known(catalog) if name in there]


def _channel(channel, catalog, truth) -> str:
    """Return a channel that both tables have."""
    shared = _channels(catalog, truth)
    if not shared or (channel is not None and channel not in shared):
        raise ValueError(
            f"Catalogue and truth want a channel in common, by columns mag_CH or flux_CH; {channel or 'any'} was asked for, "
            f"common are {shared}."
        )
    return shared[0] if channel is None else channel


def _column(table, name: str, unit) -> np.ndarray:
    """Return a column as numbers in a unit, which it is taken to be in if it has none; NaN if there is no such column."""
    if name not in table.colnames:
        return np.full(len(table), np.nan)
    column = table[name]
    column = column.filled(np.nan) if hasattr(column, "filled") else column
    own = getattr(column, "unit", None)
    if own in (None, u.dimensionless_unscaled):
        return _plain(column)
    return u.Quantity(_plain(column), own).to_value(unit)


def _plain(column) -> np.ndarray:
    """Return the values of a column."""
    return np.asarray(getattr(column, "value", column), dtype=float)


def _fluxes(table, label: str) -> np.ndarray:
    """Return fluxes in nJy (as they are without a unit), from magnitudes where there are some."""
    if f"mag_{label}" in table.colnames:
        flux = 10 ** (-0.4 * (_column(table, f"mag_{label}", u.mag) - units.ZEROPOINT_NJY))
        if np.isfinite(flux).any() or f"flux_{label}" not in table.colnames:
            own = _column(table, f"flux_{label}", u.nJy)
            # Negative fluxes have no magnitude.
            return np.where(np.isfinite(flux), flux, np.where(own <= 0, own, np.nan))
    return _column(table, f"flux_{label}", u.nJy)


def _errors(table, label: str) -> np.ndarray:
    """Return errors of fluxes; NaN if there are none."""
    if f"flux_err_{label}" in table.colnames:
        return _column(table, f"flux_err_{label}", u.nJy)
    relative = _column(table, f"mag_err_{label}", u.mag) * np.log(10) / 2.5
    return relative * np.abs(_fluxes(table, label))


def _magnitudes(table, label: str) -> np.ndarray:
    """Return AB magnitudes, NaN for negative fluxes (up to a constant where fluxes have no unit)."""
    return units.ab_magnitude(_fluxes(table, label))


def _is_blended(truth, isolation) -> np.ndarray:
    """Return which sources have another one within a distance."""
    result = np.zeros(len(truth), bool)
    if len(truth) > 1:
        positions = _positions(truth, "truth")
        first, second, _, _ = search_around_sky(positions, positions, u.Quantity(isolation).to(u.arcsec))
        result[first[first != second]] = True
    return result


def _add_sizes(pairs, measured, true):
    """Add residuals and pulls of sizes, of sources that have one."""
    names = [next((name for name in SIZE_NAMES if name in table.colnames), None) for table in (measured, true)]
    if None in names:
        return
    size, truth = (_column(table, str(name), u.arcsec) for table, name in zip((measured, true), names, strict=True))
    error = _column(measured, f"{names[0]}_err", u.arcsec)
    with np.errstate(invalid="ignore", divide="ignore"):
        has_size = (truth > 0) & (size > 0)
        pairs["residual_log_size"] = np.where(has_size, np.log(size / truth), np.nan)
        pairs["pull_log_size"] = np.where(truth > 0, _ratio(size - truth, error), np.nan)


def _ratio(value, error) -> np.ndarray:
    """Return values over errors, NaN where there is no error."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(np.isfinite(error) & (error > 0), value / error, np.nan)


def _edges(values, bins) -> np.ndarray:
    """Return edges of bins; the last one is just above the largest value."""
    if not isinstance(bins, int):
        edges = np.asarray(bins, float)
        if edges.ndim != 1 or len(edges) < 2 or not (np.diff(edges) > 0).all():
            raise ValueError(f"bins is a number, or at least two rising edges; got {bins}.")
        return edges
    if bins < 1:
        raise ValueError(f"bins is at least 1; got {bins}.")
    if not len(values):
        return np.zeros(0)
    edges = np.unique(np.quantile(values, np.linspace(0, 1, max(1, min(bins, len(values) // MIN_BIN)) + 1)))
    return np.append(edges[:-1] if len(edges) > 1 else edges, np.nextafter(values.max(), np.inf))


def _finite(column) -> np.ndarray:
    """Return the finite values of a column."""
    values = _plain(column)
    return values[np.isfinite(values)]


def _fraction(column) -> float:
    return float(np.mean(column)) if len(column) else float("nan")


def _median(values) -> float:
    return float(np.median(values)) if len(values) else float("nan")


def _spread(values) -> float:
    return float(mad_std(values)) if len(values) else float("nan")


def _number(value):
    """Return a number for JSON."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _records(table: QTable) -> list[dict]:
    """Return the rows of a table for JSON."""
    return [{name: _number(row[name]) for name in table.colnames} for row in table]
