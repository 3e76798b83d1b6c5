import numpy as np
import pytest
from astropy.wcs import WCS

import scenefit as sf
from scenefit.arrays.compilation import as_floats
from scenefit.data.nuisances import Astrometry
from scenefit.data.resample import Resampling

NATIVE, SIZE = 0.168, 40


def header(scale, size, rotation=0.0):
    wcs, turn = WCS(naxis=2), np.deg2rad(rotation)
    wcs.wcs.ctype, wcs.wcs.crval, wcs.wcs.crpix = ["RA---TAN", "DEC--TAN"], [150.0, 2.0], [(size + 1) / 2] * 2
    wcs.wcs.cd = scale / 3600 * np.array([[-np.cos(turn), np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    wcs.pixel_shape = (size, size)
    return wcs


def native(rng, **options):
    """A ground image of noise in two bands of different depth, with a bad column and a hole."""
    weights = np.ones((2, SIZE, SIZE)) * np.array([1.0, 4.0])[:, None, None]
    weights[0, :, 11] = 0
    weights[1, 20:23, 25:28] = 0
    data = rng.standard_normal(weights.shape) / np.array([1.0, 2.0])[:, None, None]
    given = {
        "weights": weights,
        "psf": sf.GaussianPSF(1.8),
        "wcs": header(NATIVE, SIZE),
        "channels": ["g", "i"],
        "name": "HSC",
    }
    return sf.Observation(data, **given | options)


def scene_on(frame, flux=300.0):
    center = frame.to_sky((np.array(frame.shape[1:]) - 1) / 2)
    spectrum = sf.ArraySpectrum([flux] * len(frame.channels))
    return sf.Scene(frame, {"star": sf.Source(center, spectrum, sf.PointMorphology())})


class TestResampled:
    @pytest.mark.parametrize(("scale", "rotation", "size"), [(0.03, 23.0, 120), (0.168, 23.0, 34), (0.1, 0.0, 45)])
    def test_chi_square_of_noise_has_the_mean_of_its_modes(self, rng, scale, rotation, size):
        """Exactly, for the covariance A D A^T that the resampling has: the trace of its whitened form."""
        obs = native(rng)
        target = header(scale, size, rotation)
        other = sf.CorrelatedObservation.from_observation(obs, target)
        resampling = Resampling.between(obs.wcs, obs.shape[1:], target, (size, size))
        draws = 200
        total = np.zeros(2)
        sigma = np.where(obs.noise.valid, 1 / np.sqrt(np.where(obs.noise.valid, obs.noise.weights, 1.0)), 0.0)
        for _ in range(draws):
            image, usable = resampling.apply(sigma * rng.standard_normal(sigma.shape), obs.noise.valid)
            assert (usable == other.noise.valid).all()
            total += np.asarray(other.noise.chi_square(as_floats(image)), float)
        modes = other.noise.num_modes()
        # 4 standard errors of a mean of chi-squares, whose variance may be up to 1.3 times that of independent numbers.
        tolerance = 4 * np.sqrt(1.3 * 2 / (modes * draws))
        np.testing.assert_array_less(np.abs(total / draws / modes - 1), tolerance)
        # No more modes than native pixels below the usable ones, within a rim.
        native_pixels = other.noise.valid.sum(axis=(1, 2)) * (scale / NATIVE) ** 2
        np.testing.assert_array_less(modes, 1.1 * native_pixels + 60)

    def test_masks_are_carried_along(self, rng):
        other = sf.CorrelatedObservation.from_observation(native(rng), header(0.03, 120))
        # The column at 11 is 8.5 native pixels from the middle, on either grid to the same side.
        column = 59.5 + (11 - 19.5) * 5.6
        assert not other.noise.valid[0, :, round(column)].any()
        assert other.noise.valid[1, 20, round(column)]
        assert np.isfinite(other.data).all()

    def test_sources_look_as_their_psf_says(self, rng):
        """A noise-free star, resampled, is what the resampled observation predicts, but for replicas of the kernel."""
        obs = native(rng, background=[0.5, 0.0], background_slope=[0.01, -0.02])
        frame = sf.Frame.from_observations([obs])
        scene = scene_on(frame)
        obs = native(rng, background=[0.5, 0.0], background_slope=[0.01, -0.02])
        clean = sf.Observation(
            obs.match(frame).render(scene),
            weights=obs.noise.weights,
            psf=obs.psf,
            wcs=obs.wcs,
            channels=obs.channels,
            name="HSC",
            background=obs.background,
            background_slope=obs.background_slope,
        )
        other = sf.CorrelatedObservation.from_observation(clean, header(0.1, 45, 10.0), order=5).match(frame)
        residual = other.residual(scene)
        # Order 5 leaves 0.14 % of the peak for a FWHM of 4 pixels; the star's is 4.2.
        assert np.abs(residual).max() < 2e-3 * np.abs(other.data - other.background_image()).max()

    def test_errors(self, rng, as_users_have_it):
        obs = native(rng)
        with pytest.raises(TypeError, match="wants an Observation; got a ndarray"):
            sf.CorrelatedObservation.from_observation(obs.data)
        with pytest.raises(TypeError, match="a Frame, an Observation, or a WCS with a pixel_shape; got a int"):
            sf.CorrelatedObservation.from_observation(obs, 3)
        with pytest.raises(
            ValueError, match="HSC: correlated noise is made from weights of independent pixels; got StudentT"
        ):
            sf.CorrelatedObservation.from_observation(obs.with_noise(sf.StudentTNoise(obs.noise.weights)))
        turned = native(rng, astrometry=Astrometry((0, 0), 0.1))
        with pytest.raises(ValueError, match="HSC: a rotation is about the middle of the native image"):
            sf.CorrelatedObservation.from_observation(turned, header(0.1, 45))
        far = header(0.1, 45)
        far.wcs.crval = [151.0, 2.0]
        with pytest.raises(ValueError, match="HSC: No pixel of the target lies on the native image"):
            sf.CorrelatedObservation.from_observation(obs, far)
        masked = native(rng, mask=~(np.hypot(*(np.mgrid[:SIZE, :SIZE] - 19.5)) < 2))
        with pytest.raises(
            ValueError, match="HSC: no pixel of the target lies, kernel included, on pixels with information"
        ):
            sf.CorrelatedObservation.from_observation(masked, header(0.1, 45))


def test_noise_is_measured_without_a_target(rng):
    """Noise through [1, 2, 1] x [1, 2, 1]: neighbours are correlated by 2 / 3."""
    white = rng.standard_normal((1, 122, 122))
    kernel = np.array([1, 2, 1]) / np.sqrt(6)
    smooth = sum(a * white[:, i : i + 120] for i, a in enumerate(kernel))
    smooth = sum(a * smooth[:, :, i : i + 120] for i, a in enumerate(kernel))
    obs = sf.Observation(smooth + 0.2, sigma=2.0, psf=sf.GaussianPSF(1.5), channels=["i"], background=0.2)
    measured = sf.CorrelatedObservation.from_observation(obs)
    function = measured.noise.correlation.function[0]
    middle = len(function) // 2
    # 14400 pixels, of which a fifth are independent: 3 standard errors of a correlation, and of a variance.
    assert function[middle, middle + 1] == pytest.approx(2 / 3, abs=0.06)
    assert measured.noise.level()[0] == pytest.approx(1.0, abs=0.06)
    assert isinstance(measured, sf.Observation)
    np.testing.assert_array_equal(measured.data, obs.data)
