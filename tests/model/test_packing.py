import jax
import numpy as np
import pytest

from scenefit.model.morphology import GaussianMorphology, PixelMorphology, PointMorphology
from scenefit.model.packing import component_box, evaluate_stacks, flux_units, merged_buckets, model_psf_sigma, pack
from scenefit.model.scene import Scene
from scenefit.model.source import CompositeSource, Source
from scenefit.model.spectrum import StaticSpectrum, TransientSpectrum
from scenefit.sky.frame import Frame
from tests.blends import gaussian_density

SHAPE = (48, 52)
PSF_SIGMA = 0.7
CHANNELS = (("g", 1), ("g", 2), ("r", 1))
RNG = np.random.default_rng(4)
SPECTRA = [
    lambda: RNG.uniform(1, 9, 3),
    lambda: StaticSpectrum(RNG.uniform(1, 9, 2), ("g", "r")),
    lambda: TransientSpectrum(RNG.uniform(1, 9, 3), epochs=[2]),
]


def make_frame(**options):
    return Frame(SHAPE, channels=CHANNELS, **options)


def fluxes(component):
    """Total flux per channel, by hand."""
    spectrum = component.spectrum
    if isinstance(spectrum, StaticSpectrum):
        return np.array([spectrum.flux[0], spectrum.flux[0], spectrum.flux[1]])
    if isinstance(spectrum, TransientSpectrum):
        return np.array([0.0, spectrum.flux[1], 0.0])
    return np.asarray(spectrum.flux)


def brute_force(components, shape=SHAPE):
    """Sum of all components on the frame in float64: full profiles, images pasted pixel by pixel."""
    image = np.zeros((3, *shape))
    y, x = np.mgrid[: shape[0], : shape[1]]
    for component in components:
        morphology = component.morphology
        if isinstance(morphology, PixelMorphology):
            plane = np.zeros(shape)
            corner = np.rint(component.center).astype(int) - morphology.anchor
            for index, value in np.ndenumerate(morphology.image):
                plane[tuple(corner + index)] = value
        elif isinstance(morphology, PointMorphology):
            offsets = (axis - at for axis, at in zip((y[:, 0], x[0]), component.center, strict=True))
            plane = np.asarray(morphology.evaluate(*offsets, PSF_SIGMA))
        else:
            sigma, e = morphology.half_light_radius / np.sqrt(2 * np.log(2)), morphology.ellipticity
            shape_matrix = np.array([[1 - e[0], e[1]], [e[1], 1 + e[0]]])
            moments = PSF_SIGMA**2 * np.eye(2) + sigma**2 * shape_matrix / np.sqrt(np.linalg.det(shape_matrix))
            plane = gaussian_density(y - component.center[0], x - component.center[1], moments)
        image += fluxes(component)[:, None, None] * plane
    return image


def many_sources(number, half=18):
    """Components of all kinds and many sizes, up to the edges of the frame."""
    result = []
    for n in range(number):
        center = RNG.uniform(-0.4, np.array(SHAPE) - 0.6)
        spectrum = SPECTRA[n % 3]()
        if n % 4 == 0:
            result.append(Source(center, spectrum, PointMorphology()))
        elif n % 4 < 3:
            e = RNG.uniform(-0.4, 0.4, 2)
            result.append(Source(center, spectrum, GaussianMorphology(RNG.uniform(0.5, 3.5), e)))
        else:
            image = RNG.random(RNG.integers(3, half, 2))
            center = [RNG.uniform(n // 2, s - n + n // 2 - 1) for s, n in zip(SHAPE, image.shape, strict=True)]
            result.append(Source(center, spectrum, PixelMorphology(image)))
    return result


def test_evaluation_equals_the_brute_force_sum(eps):
    components = many_sources(24)
    image = Scene(make_frame(), components).evaluate()
    expected = brute_force(components)
    for channel, plane in enumerate(image):
        # 2e-5: a profile at the edge of its stamp, where 1e-5 of the flux is left, over its peak; 50 eps: rounding.
        atol = (2e-5 + 50 * eps) * expected[channel].max()
        np.testing.assert_allclose(plane, expected[channel], atol=atol)


def test_evaluation_in_double_precision():
    components = [c for c in many_sources(24) if isinstance(c.morphology, PixelMorphology)]
    with jax.enable_x64(True):
        image = Scene(make_frame(), components).evaluate()
    expected = brute_force(components)
    # 1e-14: images have no wings to cut; rounding in float64.
    np.testing.assert_allclose(image, expected, atol=1e-14 * expected.max())


@pytest.mark.parametrize("center", [(0, 0), (-0.49, 51.4), (47.4, 0.0), (24, -0.4), (47, 51)])
def test_stamps_at_the_edge_of_the_frame(center, eps):
    source = Source(center, [1.0, 2.0, 3.0], GaussianMorphology(2.0, (0.2, -0.3)))
    expected = brute_force([source])
    # As for many sources.
    np.testing.assert_allclose(
        Scene(make_frame(), [source]).evaluate(), expected, atol=(2e-5 + 50 * eps) * expected.max()
    )


def test_images_up_to_the_last_pixel(eps):
    image = RNG.random(SHAPE)
    source = Source((24, 26), [1.0, 2.0, 3.0], PixelMorphology(image))
    # 4 eps: rounding of two products. The stamp is the frame, and the padded one larger.
    np.testing.assert_allclose(Scene(make_frame(), [source]).evaluate(), brute_force([source]), rtol=4 * eps)
    np.testing.assert_allclose(Scene(make_frame(padding=0), [source]).evaluate(), brute_force([source]), rtol=4 * eps)


def test_a_composite_is_the_sum_of_its_parts(eps):
    parts = {"bulge": many_sources(1)[0], "rest": CompositeSource({"disk": many_sources(2)[1]})}
    image = Scene(make_frame(), {"galaxy": CompositeSource(parts)}).evaluate()
    expected = brute_force([parts["bulge"], parts["rest"].parts["disk"]])
    # As for many sources.
    np.testing.assert_allclose(image, expected, atol=(2e-5 + 50 * eps) * expected.max())


def test_flux_units_go_into_the_stacks_and_out_again(eps):
    components = [(str(n), c) for n, c in enumerate(many_sources(12))]
    frame = make_frame()
    plain, _ = pack(frame, components)
    unit = np.array([1e-20, 3.0, 1e10])
    scaled, _ = pack(frame, components, unit)
    for a, b in zip(plain, scaled, strict=True):
        # 10 eps: rounding of two products.
        np.testing.assert_allclose(np.asarray(b.spectra, float) * unit, a.spectra, rtol=10 * eps)


def test_the_unit_of_an_entry_is_that_of_its_first_channel():
    units = flux_units(np.array([1, 1, -1, 0]), np.array([2.0, 3.0, 5.0, 7.0]), 3)
    np.testing.assert_array_equal(units, [7, 2, 1])


def test_members_say_where_their_stamps_are():
    components = [(str(n), c) for n, c in enumerate(many_sources(16))]
    frame = make_frame()
    stacks, members = pack(frame, components)
    assert [m.path for m in members] == [path for path, _ in components]
    assert len({(m.stack, m.row) for m in members}) == len(members)
    for member, (_, component) in zip(members, components, strict=True):
        stack = stacks[member.stack]
        mask = np.asarray(stack.mask[member.row])
        rows, columns = np.nonzero(mask)
        origin = np.asarray(stack.origin[member.row])
        assert member.box == component_box(component, frame)
        assert mask.sum() == np.prod(member.box.shape)
        assert (origin[0] + rows.min(), origin[1] + columns.min()) == member.box.origin
        assert (rows.min(), columns.min()) == member.offset
    for number, stack in enumerate(stacks):
        used = sum(m.stack == number for m in members)
        assert not stack.mask[used:].any()
        assert not stack.flux[used:].any()


@pytest.mark.parametrize(
    ("sides", "spare", "expected"),
    [
        ([11, 11, 15], 0, [11, 11, 15]),
        # Two stamps grow from 11^2 to 15^2: 208 pixels.
        ([11, 11, 15], 207, [11, 11, 15]),
        ([11, 11, 15], 208, [15, 15, 15]),
        # The cheapest merger comes first (15^2 into 21^2 alone costs 216), then three stamps grow from 15^2 to 21^2.
        ([11, 11, 15, 21], 208 + 647, [15, 15, 15, 21]),
        ([11, 11, 15, 21], 208 + 648, [21, 21, 21, 21]),
        ([], 100, []),
        ([29], 100, [29]),
    ],
)
def test_bucket_merging(sides, spare, expected):
    assert merged_buckets(sides, spare) == expected


def test_merging_makes_few_stacks_on_a_large_frame():
    components = [(str(n), c) for n, c in enumerate(many_sources(24))]
    stacks, _ = pack(make_frame(padding=300), components)
    # Points; Gaussians; images; each with spectra of two and of three entries, at one size each.
    assert len(stacks) <= 6


@pytest.mark.parametrize(
    "source",
    [
        Source((-30, 10), [1.0, 1, 1], PointMorphology()),
        Source((2, 10), [1.0, 1, 1], PixelMorphology(np.ones((9, 9)))),
        Source((20, 20), [1.0, 1, 1], PixelMorphology(np.ones((49, 9)))),
    ],
    ids=["outside", "sticks out", "too large"],
)
def test_sources_that_are_not_inside(source):
    with pytest.raises(
        ValueError, match=r"sources.0: its stamp of .* isn't inside the model frame of \(48, 52\) pixels"
    ):
        Scene(make_frame(), [source]).evaluate()


def test_the_model_psf_is_that_of_the_frame():
    # 1e-12: rounding in float64.
    assert model_psf_sigma(make_frame()) == pytest.approx(PSF_SIGMA, rel=1e-12)


def test_more_sources_of_one_padded_shape_compile_nothing():
    traces = []

    def evaluate(stacks, psf_sigma, shape):
        traces.append(shape)
        return evaluate_stacks(stacks, psf_sigma, shape)

    compiled = jax.jit(evaluate, static_argnums=2)
    frame = make_frame()
    # 5 and 6 sources are both padded to 6.
    for number in (5, 6):
        for _ in range(2):
            sources = [
                Source(RNG.uniform(10, 35, 2), RNG.uniform(1, 9, 3), GaussianMorphology(1.5)) for _ in range(number)
            ]
            stacks, _ = pack(frame, list(Scene(frame, sources).components()))
            image = compiled(stacks, PSF_SIGMA, (3, *frame.fft_shape))[:, : SHAPE[0], : SHAPE[1]]
            expected = brute_force(sources)
            # 1e-4: as for many sources, with room for rounding in float32.
            np.testing.assert_allclose(image, expected, atol=1e-4 * expected.max())
    assert len(traces) == 1
