import astropy.units as u
import numpy as np
import pytest

from scenefit.sky import units


@pytest.mark.parametrize("zeropoint", [25.94, 27.0, 31.4, np.array([22.5, 30.0])])
def test_zeropoint_agrees_with_astropy(zeropoint):
    expected = (np.asarray(zeropoint) * u.ABmag).to_value(u.nJy)
    # 1e-12: rounding in float64; astropy's AB system and 31.4 define the same zero.
    np.testing.assert_allclose(units.nanojansky_per_unit(zeropoint), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("unit", "expected"), [("nJy", 1.0), ("uJy", 1e3), (u.Jy, 1e9), ("3.631 uJy", 3631.0), ("mJy / pix", 1e6)]
)
def test_units_convert_to_nanojansky(unit, expected):
    # 1e-12: rounding in float64.
    assert units.nanojansky_per_unit(unit=unit) == pytest.approx(expected, rel=1e-12)


def test_nothing_given_means_no_conversion():
    assert units.nanojansky_per_unit() is None


@pytest.mark.parametrize("unit", ["m", "nonsense", "mag", 7.5j])
def test_other_units_are_refused(unit):
    with pytest.raises(ValueError, match="unit= wants a flux density such as 'nJy' or 'uJy'; got"):
        units.nanojansky_per_unit(unit=unit)


def test_zeropoint_and_unit_together_are_refused():
    with pytest.raises(ValueError, match=r"either zeropoint=.*or unit=, not both"):
        units.nanojansky_per_unit(25.0, "nJy")


@pytest.mark.parametrize("zeropoint", [27.0 * u.mag, 27.0 * u.ABmag, [27.0, 27.0] * u.mag])
def test_zeropoints_may_have_the_unit_of_magnitudes(zeropoint):
    # 1e-12: rounding in float64.
    np.testing.assert_allclose(units.nanojansky_per_unit(zeropoint), units.nanojansky_per_unit(27.0), rtol=1e-12)


@pytest.mark.parametrize("zeropoint", [np.nan, np.inf, [25.0, np.nan], [25.0, None], 25 * u.STmag, 25 * u.nJy])
def test_zeropoint_must_be_finite(zeropoint):
    with pytest.raises(ValueError, match="zeropoint must be a finite AB magnitude; got"):
        units.nanojansky_per_unit(zeropoint)


def test_magnitude_agrees_with_astropy_and_is_nan_without_flux():
    flux = np.array([1e-3, 1.0, 3.6e4])
    # 1e-12: rounding in float64.
    np.testing.assert_allclose(units.ab_magnitude(flux), (flux * u.nJy).to_value(u.ABmag), rtol=1e-12)
    assert np.isnan(units.ab_magnitude([0.0, -1.0])).all()


def test_magnitude_error_is_the_slope_times_the_flux_error():
    flux, error = 120.0, 1e-3
    difference = units.ab_magnitude(flux - error) - units.ab_magnitude(flux + error)
    # 1e-9: the third-order term of the central difference, (error / flux)^2 / 3, and rounding.
    assert units.ab_magnitude_error(flux, error) == pytest.approx(difference / 2, rel=1e-8)
    assert np.isnan(units.ab_magnitude_error(-1.0, 1.0))


@pytest.mark.parametrize("angle", [30 * u.mas, 0.03 * u.arcsec, 0.03, (0.03 / 3600) * u.deg])
def test_angles_become_arcsec(angle):
    # 1e-12: rounding in float64.
    assert units.to_arcsec(angle) == pytest.approx(0.03, rel=1e-12)


def test_sequences_may_mix_units_and_plain_numbers():
    # 1e-12: rounding in float64.
    np.testing.assert_allclose(units.to_arcsec((30 * u.mas, -0.02)), [0.03, -0.02], rtol=1e-12)


def test_positions_are_pixels():
    np.testing.assert_array_equal(units.to_pixels([3, 4] * u.pix, "p"), [3, 4])
    np.testing.assert_array_equal(units.to_pixels((3, 4), "p"), [3, 4])


@pytest.mark.parametrize(
    ("values", "unit", "error", "message"),
    [
        (3 * u.m, u.arcsec, ValueError, r"shift must be in arcsec or a unit that converts to it; got <Quantity 3\. m>"),
        (3 * u.deg, u.dimensionless_unscaled, ValueError, "shift must be without a unit; got <Quantity"),
        ("far", u.arcsec, TypeError, "shift must be real numbers without a unit; got 'far'"),
        (None, u.arcsec, TypeError, "shift must be real numbers without a unit; got None"),
        (1j, u.arcsec, TypeError, "shift must be real numbers without a unit; got 1j"),
        ([1.0, "x"], u.arcsec, TypeError, r"shift must be real numbers without a unit; got \[1\.0, 'x'\]"),
    ],
)
def test_other_units_and_things_are_refused(values, unit, error, message):
    with pytest.raises(error, match=message):
        units.to_unit(values, unit, "shift")


def test_numbers_have_no_unit_and_masked_ones_are_nan():
    masked = np.ma.masked_array([1, 2], mask=[False, True])
    np.testing.assert_array_equal(units.as_numbers(masked, "n"), [1.0, np.nan])
    with pytest.raises(TypeError, match="n must be real numbers without a unit"):
        units.as_numbers([1, 2] * u.nJy, "n")


@pytest.mark.parametrize(
    ("unit", "expected"),
    [("nJy", True), ("Jy / pix", True), ("ct", False), ("MJy / sr", False), ("ELECTRONS", False), ("", False)],
)
def test_units_of_flux_density(unit, expected):
    assert units.is_flux_density(u.Unit(unit, parse_strict="silent")) is expected
