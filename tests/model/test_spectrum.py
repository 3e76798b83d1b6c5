import astropy.units as u
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scenefit.model.spectrum import AbstractSpectrum, ArraySpectrum, StaticSpectrum, TransientSpectrum
from tests.helpers import final_classes

EPOCHS = (("g", 1), ("r", 1), ("g", 2), ("r", 2), ("g", "last"))

# name: spectrum, channels, total flux in each of them
EXAMPLES = {
    "array": (ArraySpectrum([3.0, 1.0, 2.0]), ("g", "r", "i"), [3, 1, 2]),
    "array of epochs": (ArraySpectrum(np.arange(5.0)), EPOCHS, [0, 1, 2, 3, 4]),
    "static": (StaticSpectrum([3.0, 1.0], ("g", "r")), EPOCHS, [3, 1, 3, 1, 3]),
    "static, other order": (StaticSpectrum([1.0, 7.0, 3.0], ("r", "z", "g")), EPOCHS, [3, 1, 3, 1, 3]),
    "static in plain bands": (StaticSpectrum([3.0, 1.0], ("g", "r")), ("r", ("g", 4)), [1, 3]),
    "transient": (TransientSpectrum([1.0, 2, 3, 4, 5], epochs=[2, "last"]), EPOCHS, [0, 0, 3, 4, 5]),
    "variable": (TransientSpectrum([1.0, 2, 3, 4, 5]), EPOCHS, [1, 2, 3, 4, 5]),
}


@pytest.fixture(params=EXAMPLES)
def example(request):
    return EXAMPLES[request.param]


def test_every_spectrum_is_covered():
    assert final_classes(AbstractSpectrum) == {type(spectrum) for spectrum, _, _ in EXAMPLES.values()}


def test_total_flux_per_channel(example):
    spectrum, channels, expected = example
    # Exact: small integers.
    np.testing.assert_array_equal(spectrum.evaluate(channels), expected)


def test_the_layout_says_which_entry_a_channel_shows(example):
    spectrum, channels, expected = example
    layout = spectrum.layout(channels)
    assert layout.shape == (len(channels),)
    shown = [spectrum.flux[n] if n >= 0 else 0.0 for n in layout]
    np.testing.assert_array_equal(shown, expected)


def test_flux_is_linear_and_differentiable(example):
    spectrum, channels, _ = example
    jacobian = jax.jacfwd(lambda flux: with_flux(spectrum, flux).evaluate(channels))(jnp.asarray(spectrum.flux))
    expected = np.zeros((len(channels), len(spectrum.flux)))
    for channel, entry in enumerate(spectrum.layout(channels)):
        if entry >= 0:
            expected[channel, entry] = 1
    np.testing.assert_array_equal(jacobian, expected)


def with_flux(spectrum, flux):
    options = {"bands": spectrum.bands} if isinstance(spectrum, StaticSpectrum) else {}
    options |= {"epochs": spectrum.epochs} if isinstance(spectrum, TransientSpectrum) else {}
    return type(spectrum)(flux, **options)


@pytest.mark.parametrize(
    ("make", "channels", "message"),
    [
        (lambda: ArraySpectrum([1.0, 2.0]), ("g",), r"2 flux\(es\) for 1 channels \['g'\]"),
        (lambda: StaticSpectrum([1.0], ("g",)), EPOCHS, r"bands \['g'\], which don't include channel\(s\).*'r'"),
        (lambda: TransientSpectrum([1.0, 2.0]), EPOCHS, r"2 flux\(es\) for 5 channels"),
        (lambda: TransientSpectrum([1.0, 2.0]), ("g", ("g", 1)), r"named \(band, epoch\); got \['g'\]"),
        (lambda: TransientSpectrum(np.ones(5), epochs=[1, 7]), EPOCHS, r"epochs \[7\], which no channel has"),
    ],
    ids=["array", "static", "transient length", "plain channel", "unknown epoch"],
)
def test_channels_that_do_not_fit(make, channels, message):
    with pytest.raises(ValueError, match=message):
        make().layout(channels)


@pytest.mark.parametrize("flux", [np.ones((2, 2)), np.ones(0)])
def test_fluxes_are_a_vector(flux):
    with pytest.raises(ValueError, match=r"shape \(n,\), n > 0; got shape"):
        ArraySpectrum(flux)


@pytest.mark.parametrize("flux", [[1.0, 0.002] * u.uJy, [1.0 * u.uJy, 2.0]])
def test_fluxes_may_have_a_unit(flux):
    # 1e-12: rounding in float64.
    np.testing.assert_allclose(ArraySpectrum(flux).flux, [1000.0, 2.0], rtol=1e-12)


def test_fluxes_in_another_unit():
    with pytest.raises(ValueError, match="The flux of a spectrum must be in nJy or a unit that converts to it"):
        ArraySpectrum([1.0, 2.0] * u.mag)


@pytest.mark.usefixtures("as_users_have_it")
@pytest.mark.parametrize("epochs", [3, "first"])
def test_epochs_are_a_sequence(epochs):
    with pytest.raises(TypeError, match="wants a sequence of epochs; got"):
        TransientSpectrum([1.0, 2.0], epochs)


def test_a_number_is_one_flux():
    assert ArraySpectrum(3.0).flux.shape == (1,)


def test_static_wants_one_flux_per_band():
    with pytest.raises(ValueError, match=r"1 flux\(es\) for 2 band"):
        StaticSpectrum([1.0], ("g", "r"))
    with pytest.raises(ValueError, match="distinct"):
        StaticSpectrum([1.0, 1.0], ("g", "g"))
