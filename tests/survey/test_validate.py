"""Truth matching against catalogues made from a truth with known errors."""

from __future__ import annotations

import itertools
import json

import astropy.units as u
import numpy as np
import pytest
from astropy.table import MaskedColumn, QTable, Table

from scenefit.survey.validate import match, validate

SIGMA_FLUX, SIGMA_POSITION, SIGMA_SIZE = 40.0, 0.02, 0.1
ZEROPOINT = 31.4


def sky(offsets):
    """Return ra, dec [deg] of offsets (east, north) in arcsec from a field on the equator."""
    offsets = np.asarray(offsets, float) / 3600
    return 150 + offsets[:, 0], offsets[:, 1]


def truth_of(offsets, magnitudes):
    """Return a truth table with a blue and a red channel, one magnitude apart."""
    ra, dec = sky(offsets)
    magnitudes = np.asarray(magnitudes, float)
    return Table({"ra": ra, "dec": dec, "mag_g": magnitudes + 1.0, "mag_i": magnitudes})


@pytest.fixture(scope="module")
def survey():
    """A truth of 2000 sources on a grid 3 arcsec apart, and a catalogue with known errors that lacks one in ten."""
    rng = np.random.default_rng(5)
    number = 2000
    offsets = 3.0 * np.stack([np.arange(number) % 50, np.arange(number) // 50], axis=1)
    truth = truth_of(offsets, rng.uniform(20, 24, number))
    truth["hlr_arcsec"] = 0.4
    measured = offsets + rng.normal(0, SIGMA_POSITION, offsets.shape)
    ra, dec = sky(measured)
    table = QTable({"ra": ra * u.deg, "dec": dec * u.deg})
    for name in ("g", "i"):
        flux = 10 ** (-0.4 * (truth[f"mag_{name}"] - ZEROPOINT)) + rng.normal(0, SIGMA_FLUX, number)
        table[f"flux_{name}"] = (flux / 1000) * u.uJy
        table[f"flux_err_{name}"] = np.full(number, SIGMA_FLUX) * u.nJy
    for name in ("ra_err", "dec_err"):
        table[name] = np.full(number, 1000 * SIGMA_POSITION) * u.mas
    table["half_light_radius"] = (0.4 + rng.normal(0, SIGMA_SIZE * 0.4, number)) * u.arcsec
    table["half_light_radius_err"] = np.full(number, SIGMA_SIZE * 0.4) * u.arcsec
    order = rng.permutation(number)[: number * 9 // 10]
    return table[order], truth, order


class TestMatch:
    def test_of_shuffled_rows(self, survey):
        table, truth, order = survey
        rows, sources = match(table, truth)
        # Sources are 3 arcsec apart and off by 0.02: nothing can be confused.
        assert len(rows) == len(table)
        np.testing.assert_array_equal(order[rows], sources)
        assert (np.diff(sources) > 0).all()

    def test_takes_as_many_pairs_as_there_are(self):
        # The nearest pair first would leave the two others alone: entry 0 is nearest to source 1.
        truth = truth_of([(0, 0), (0.25, 0)], [21, 21])
        table = truth_of([(0.15, 0), (0.45, 0)], [21, 21])
        rows, sources = match(table, truth)
        assert list(zip(rows, sources, strict=True)) == [(0, 0), (1, 1)]

    def test_by_flux_where_positions_do_not_tell(self):
        truth = truth_of([(0, 0), (0.1, 0)], [20, 23])
        table = truth_of([(0.05, 0), (0.051, 0)], [22.9, 20.1])
        rows, sources = match(table, truth)
        assert list(zip(rows, sources, strict=True)) == [(1, 0), (0, 1)]

    def test_against_all_assignments(self):
        rng = np.random.default_rng(2)
        truth = truth_of(rng.uniform(0, 0.5, (5, 2)), rng.uniform(21, 23, 5))
        table = truth_of(rng.uniform(0, 0.5, (5, 2)), rng.uniform(21, 23, 5))
        rows, sources = match(table, truth, radius=1 * u.arcsec, magnitude_tolerance=4.0)

        def cost(pairs):
            pairs = np.array(pairs)
            apart = [3600 * np.subtract(table[axis][pairs[:, 0]], truth[axis][pairs[:, 1]]) for axis in ("ra", "dec")]
            return np.sum(np.square(apart)) + np.sum(
                np.square(table["mag_g"][pairs[:, 0]] - truth["mag_g"][pairs[:, 1]]) / 16.0
            )

        best = min(([*zip(range(5), p, strict=True)] for p in itertools.permutations(range(5))), key=cost)
        assert len(rows) == 5
        np.testing.assert_allclose(cost([*zip(rows, sources, strict=True)]), cost(best), rtol=1e-6)

    def test_leaves_out_what_is_too_bright_or_too_far(self):
        truth = truth_of([(0, 0), (5, 0)], [24, 24])
        table = truth_of([(0.1, 0), (5.4, 0)], [20, 24])
        assert len(match(table, truth)[0]) == 0
        assert len(match(table, truth, magnitude_tolerance=None)[0]) == 1
        assert len(match(table, truth, magnitude_tolerance=None, radius=0.5 * u.arcsec)[0]) == 2

    def test_without_a_flux_by_position(self):
        truth, table = truth_of([(0, 0)], [22]), truth_of([(0.1, 0)], [np.nan])
        assert len(match(table, truth)[0]) == 1

    def test_of_bad_input(self):
        truth = truth_of([(0, 0)], [22])
        with pytest.raises(ValueError, match="columns ra and dec"):
            match(Table({"x": [1.0]}), truth)
        with pytest.raises(ValueError, match=r"rows \[0\]"):
            match(truth_of([(np.nan, 0)], [22]), truth)
        with pytest.raises(ValueError, match="channel in common"):
            match(truth, Table({"ra": [150.0], "dec": [0.0], "mag_z": [20.0]}))
        with pytest.raises(ValueError, match="channel in common"):
            match(truth, truth, channel="z")
        with pytest.raises(ValueError, match="one positive angle"):
            match(truth, truth, radius=-1 * u.arcsec)


class TestValidation:
    def test_statistics_are_those_of_the_errors_put_in(self, survey):
        table, truth, order = survey
        result = validate(table, truth, channel="i", colors=[("i", "g")])
        assert result.completeness == pytest.approx(0.9)
        assert result.purity == 1.0
        statistics = {row["quantity"]: row for row in result.statistics()}
        assert set(statistics) == {"mag_g", "mag_i", "g-i", "i-g", "log_size", "ra", "dec"}
        # Robust widths of 1800 normal numbers are good to 1.17 / sqrt(2 * 1800) = 2 per cent, medians to 3: four of these.
        for name in ("mag_g", "mag_i", "log_size", "ra", "dec"):
            assert statistics[name]["pull_mad_sigma"] == pytest.approx(1.0, abs=0.08), name
            assert statistics[name]["pull_median"] == pytest.approx(0.0, abs=0.12), name
        assert statistics["ra"]["mad_sigma"] == pytest.approx(SIGMA_POSITION, rel=0.08)
        assert statistics["log_size"]["mad_sigma"] == pytest.approx(SIGMA_SIZE, rel=0.1)
        assert statistics["g-i"]["median"] == -statistics["i-g"]["median"]
        pairs = result.pairs
        np.testing.assert_array_equal(order[pairs["catalog_row"]], pairs["truth_row"])
        flux = 10 ** (-0.4 * (truth["mag_i"][pairs["truth_row"]] - ZEROPOINT))
        measured = table["flux_i"].to_value(u.nJy)[pairs["catalog_row"]]
        np.testing.assert_allclose(pairs["residual_mag_i"], -2.5 * np.log10(measured / flux), atol=1e-9)
        np.testing.assert_allclose(pairs["pull_mag_i"], (measured - flux) / SIGMA_FLUX, atol=1e-6)

    def test_outliers_and_blends(self):
        truth = truth_of([(3 * n, 0) for n in range(10)] + [(0.7, 0)], np.full(11, 22.0))
        table = truth.copy()
        table["mag_i"][:2] += 0.6
        result = validate(table, truth)
        blended = np.asarray(result.pairs["blended"])
        np.testing.assert_array_equal(np.flatnonzero(blended), [0, 10])
        row = {row["quantity"]: row for row in result.statistics()}["mag_i"]
        assert row["outlier_fraction"] == pytest.approx(2 / 11)
        assert row["median"] == pytest.approx(0.0)
        isolated = {row["quantity"]: row for row in result.statistics(select=~blended)}["mag_i"]
        assert isolated["number"] == 9
        assert isolated["outlier_fraction"] == pytest.approx(1 / 9)

    def test_running_median_follows_a_trend(self):
        rng = np.random.default_rng(1)
        magnitude = np.linspace(20, 24, 400)
        truth = truth_of([(3 * n, 0) for n in range(400)], magnitude)
        table = truth.copy()
        table["mag_i"] += 0.1 * (magnitude - 20) + rng.normal(0, 0.01, 400)
        running = validate(table, truth, channel="i").running("mag_i", bins=[20, 21, 22, 23, 24.1])
        np.testing.assert_array_equal(running["number"], [100] * 4)
        # Within a bin the trend itself spreads residuals evenly over 0.1: standard error of the median 0.005.
        np.testing.assert_allclose(running["median"], 0.1 * (np.asarray(running["magnitude"]) - 20), atol=0.01)
        equal = validate(table, truth, channel="i").running("mag_i", bins=8)
        np.testing.assert_array_equal(equal["number"], [50] * 8)

    def test_fractions_by_magnitude(self):
        truth = truth_of([(3 * n, 0) for n in range(100)], np.repeat([21.0, 23.0], 50))
        table = truth[:70]
        result = validate(table, truth, channel="i")
        found = result.fractions("completeness", bins=[20, 22, 24])
        np.testing.assert_allclose(found["fraction"], [1.0, 0.4])
        # Wilson's interval for 20 of 50 at one standard deviation.
        middle, half = (20 + 0.5) / 51, np.sqrt(50 * 0.4 * 0.6 + 0.25) / 51
        np.testing.assert_allclose([found["low"][1], found["high"][1]], [middle - half, middle + half], rtol=1e-3)
        np.testing.assert_allclose(result.fractions("purity", bins=[20, 22, 24])["fraction"], [1.0, 1.0])
        with pytest.raises(ValueError, match="'completeness' or 'purity'"):
            result.fractions("beauty")

    def test_of_nothing(self):
        truth = truth_of([(0, 0)], [22])
        empty = validate(truth[:0], truth)
        assert empty.completeness == 0.0
        assert np.isnan(empty.purity)
        assert len(empty.pairs) == 0
        assert json.loads(json.dumps(empty.summary()))["purity"] is None
        assert np.isnan(validate(truth, truth[:0]).completeness)

    def test_of_masked_and_negative_fluxes(self):
        truth = truth_of([(0, 0), (3, 0)], [22, 22])
        table = QTable({"ra": truth["ra"] * u.deg, "dec": truth["dec"] * u.deg})
        table["mag_i"] = MaskedColumn([22.1, 0.0], mask=[False, True])
        table["flux_i"], table["flux_err_i"] = [5000.0, -50.0] * u.nJy, [100.0, 100.0] * u.nJy
        result = validate(table, truth)
        np.testing.assert_allclose(result.pairs["residual_mag_i"], [0.1, np.nan], atol=1e-6)
        true = 10 ** (-0.4 * (22 - ZEROPOINT))
        np.testing.assert_allclose(result.pairs["pull_mag_i"][1], (-50 - true) / 100, rtol=1e-6)

    def test_summary_is_plain(self, survey):
        table, truth, _ = survey
        text = json.dumps(validate(table, truth).summary(), allow_nan=False)
        assert json.loads(text)["num_matched"] == len(table)

    def test_of_unknown_names(self, survey):
        table, truth, _ = survey
        with pytest.raises(ValueError, match="Colours are pairs"):
            validate(table, truth, colors=[("g", "z")])
        with pytest.raises(KeyError, match="no quantity 'mag_z'"):
            validate(table, truth).running("mag_z")
        with pytest.raises(ValueError, match="rising edges"):
            validate(table, truth).running("mag_g", bins=[2.0, 1.0])
