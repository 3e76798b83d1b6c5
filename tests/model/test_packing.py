import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scenefit.arrays.profiles import COMPACT_RINGS
from scenefit.model.link import BSpline, PerBand, Polynomial
from scenefit.model.morphology import (
    HALF_LIGHT_PER_SIGMA,
    ExponentialMorphology,
    GaussianMorphology,
    MultiGaussianMorphology,
    PixelMorphology,
    PointMorphology,
    SersicMorphology,
    in_channels,
)
from scenefit.model.packing import (
    MAX_ROOM,
    ROOM_CANVASES,
    component_box,
    evaluate_stacks,
    flux_units,
    memory_size,
    merged_buckets,
    model_psf_sigma,
    pack,
    transform_stacks,
)
from scenefit.model.scene import Scene
from scenefit.model.source import CompositeSource, Source
from scenefit.model.spectrum import StaticSpectrum, TransientSpectrum
from scenefit.sky.frame import Frame
from tests.blends import gaussian_density
from tests.helpers import compiled_for

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


def is_wide(morphology):
    """Whether a profile is sampled, without a cut of high frequencies."""
    return morphology.half_light_radius / HALF_LIGHT_PER_SIGMA > COMPACT_RINGS[1]


evaluate_profile = eqx.filter_jit(lambda morphology, y, x, psf_sigma: morphology.evaluate(y, x, psf_sigma))


def brute_force(components, shape=SHAPE):
    """Sum of all components on the frame: full profiles (from the formula, if wide), images pasted pixel by pixel."""
    image = np.zeros((3, *shape))
    y, x = np.mgrid[: shape[0], : shape[1]]
    for component in components:
        morphology = component.morphology
        if isinstance(morphology, PixelMorphology):
            plane = np.zeros(shape)
            corner = np.rint(component.center).astype(int) - morphology.anchor
            for index, value in np.ndenumerate(morphology.image):
                plane[tuple(corner + index)] = value
        elif isinstance(morphology, GaussianMorphology) and is_wide(morphology):
            sigma, e = morphology.half_light_radius / HALF_LIGHT_PER_SIGMA, morphology.ellipticity
            shape_matrix = np.array([[1 - e[0], e[1]], [e[1], 1 + e[0]]])
            moments = PSF_SIGMA**2 * np.eye(2) + sigma**2 * shape_matrix / np.sqrt(np.linalg.det(shape_matrix))
            plane = gaussian_density(y - component.center[0], x - component.center[1], moments)
        else:
            offsets = (axis - at for axis, at in zip((y[:, 0], x[0]), component.center, strict=True))
            plane = np.asarray(evaluate_profile(morphology, *offsets, PSF_SIGMA))
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


def test_stamps_that_memory_cannot_hold(monkeypatch):
    """10 GB here; a machine with less says so before it begins."""
    frame = Frame((1000, 1000), channels="i")
    sources = [(f"sources.{n}", Source((500.0, 500.0), [1.0], SersicMorphology(300.0, 4.0))) for n in range(800)]
    monkeypatch.setattr("scenefit.model.packing.memory_size", lambda: 4e9)
    with pytest.raises(
        MemoryError, match=r"The stamps of 800 components take .* this machine has 4\.0 GB; 800 of them, of"
    ):
        pack(frame, sources)


def test_this_machine_has_memory():
    assert 2**28 < memory_size() < 2**50


def test_light_in_the_margin(eps):
    """Of sources up to the edges, on the frame and around it; images of pixels end with the frame."""
    margin, components = 5, many_sources(24)
    scene = Scene(make_frame(margin=margin), components)
    moved = [component.replace(center=np.asarray(component.center) + margin) for component in components]
    expected = brute_force(moved, (SHAPE[0] + 2 * margin, SHAPE[1] + 2 * margin))
    outer = scene.evaluate(outer=True)
    # As for many sources.
    for plane, wanted in zip(outer, expected, strict=True):
        np.testing.assert_allclose(plane, wanted, atol=(2e-5 + 50 * eps) * wanted.max())
    inner = (slice(None), *scene.frame.inner_box.slices)
    assert expected.sum() - expected[inner].sum() > 0.005 * expected.sum()
    np.testing.assert_array_equal(scene.evaluate(), outer[inner])


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
        origin = np.asarray(stack.origin[member.row]) - frame.margin
        needed = component_box(component, frame)
        assert member.box.intersection(needed) == needed
        assert member.box == needed or not isinstance(component.morphology, PixelMorphology)
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
            image = compiled(stacks, PSF_SIGMA, (3, *frame.fft_shape))[(slice(None), *frame.inner_box.slices)]
            expected = brute_force(sources)
            # 1e-4: as for many sources, with room for rounding in float32.
            np.testing.assert_allclose(image, expected, atol=1e-4 * expected.max())
    assert len(traces) == 1


# ---- room to grow


def test_stamps_of_few_profiles_have_room_to_grow():
    """A profile in a fit may grow without a new stamp, where that costs little beside the transforms of the canvas."""
    frame = Frame((120, 130), channels=("g",), padding=20)
    galaxy = ("0", Source((60, 60), [1.0], ExponentialMorphology(2.0)))
    image = ("1", Source((60, 60), [1.0], PixelMorphology(np.ones((9, 9)))))
    _, (large, fixed) = pack(frame, [galaxy, image])
    assert large.box == component_box(galaxy[1], frame, MAX_ROOM)
    assert large.box.shape[0] > 2 * component_box(galaxy[1], frame).shape[0]
    assert fixed.box == component_box(image[1], frame)
    many = [(str(n), Source((60, 60), [1.0], ExponentialMorphology(2.0))) for n in range(160)]
    _, members = pack(frame, many)
    assert {member.box for member in members} == {component_box(galaxy[1], frame)}


def test_room_is_limited_in_all():
    frame = Frame((120, 130), channels=("g",), padding=20)
    for count in (1, 16, 32, 48):
        components = [(str(n), Source((60, 60), [1.0], ExponentialMorphology(2.0))) for n in range(count)]
        _, members = pack(frame, components)
        # 10 %: halves are rounded up to whole pixels.
        assert sum(np.prod(member.box.shape) for member in members) < 1.1 * ROOM_CANVASES * np.prod(frame.fft_shape)


# ---- links: stamps of one plane a channel


WAVELENGTHS = {"g": 0.48, "r": 0.62, "i": 0.75}
TREND = Polynomial([1.0, 2.5], WAVELENGTHS)
PER_BAND = PerBand({"g": 1.2, "r": 2.2})
LINKED = [
    GaussianMorphology(TREND, (0.2, 0.3)),
    GaussianMorphology(PER_BAND),
    GaussianMorphology(BSpline([1.0, 2.0, 3.0], WAVELENGTHS, 2)),
    GaussianMorphology(2.0, PerBand({"g": (0.3, 0.0), "r": (0.0, 0.3)})),
    ExponentialMorphology(PER_BAND, PerBand({"g": (0.3, 0.0), "r": (0.0, 0.3)})),
    SersicMorphology(1.5, PerBand({"g": 1.0, "r": 3.0})),
    MultiGaussianMorphology([0.5, 1.5], PerBand({"g": (1.0, 3.0), "r": (2.0, 1.0)})),
    GaussianMorphology(2.0),
    PointMorphology(),
]


def evaluate(frame, stacks):
    """The image of stacks on the canvas, in float64."""
    function = eqx.filter_jit(lambda stacks, psf_sigma: evaluate_stacks(stacks, psf_sigma, (3, *frame.fft_shape)))
    return np.asarray(function(stacks, jnp.asarray(PSF_SIGMA)), float)


def linked_components():
    return [
        (f"sources.{n}", Source((15.0 + 2 * n, 30.0 - n), RNG.uniform(1, 9, 3), morphology))
        for n, morphology in enumerate(LINKED)
    ]


def test_components_share_a_stack_if_the_values_of_their_links_have_one_shape():
    frame = make_frame(padding=300)
    stacks, members = pack(frame, linked_components())
    # The first two have links of two values, of whichever kind, the third three, the fourth for another parameter.
    assert len({member.stack for member in members}) == len(LINKED) - 1
    assert members[0].stack == members[1].stack
    stack = stacks[members[0].stack]
    assert stack.bases.keys() == {"half_light_radius"}
    for member, link in zip(members[:2], (TREND, PER_BAND), strict=True):
        # 1e-6: the conversion to float32.
        np.testing.assert_allclose(stack.bases["half_light_radius"][member.row], link.basis(CHANNELS), rtol=1e-6)
        np.testing.assert_allclose(stack.morphology.half_light_radius[member.row], link.values, rtol=1e-6)
    assert stacks[members[4].stack].bases.keys() == {"half_light_radius", "ellipticity"}
    assert stacks[members[7].stack].bases == {}


def test_stamps_have_one_plane_or_one_a_channel():
    components = {path.removeprefix("sources."): each for path, each in linked_components()[5:8]}
    stamps = Scene(make_frame(), components).stamps()
    for name, component in components.items():
        box, planes = stamps[f"sources.{name}"]
        shapes = in_channels(component.morphology, CHANNELS)
        assert planes.shape == (len(shapes), *box.shape)
        for plane, shape in zip(planes, shapes, strict=True):
            y, x = component.center
            rows, columns = (np.arange(first, last) for first, last in zip(box.origin, box.stop, strict=True))
            expected = np.asarray(evaluate_profile(shape, rows - y, columns - x, PSF_SIGMA))
            # 1e-4: the number of rings follows from the stamp; further rings are nearly flat.
            np.testing.assert_allclose(plane, expected, atol=1e-4 * expected.max())


def test_stamps_of_links_are_as_large_as_the_largest_plane():
    component = Source((24, 26), np.ones(3), GaussianMorphology(PerBand({"g": 1.0, "r": 4.0})))
    for room in (1.0, 1.5):
        box = component_box(component, make_frame(), room)
        largest = component_box(Source((24, 26), np.ones(3), GaussianMorphology(4.0)), make_frame(), room)
        assert box == largest


def test_padding_with_links_adds_nothing(eps):
    """Five sources are padded to six."""
    frame = make_frame()
    components = [(str(n), Source((20.0 + n, 25.0), [1.0, 2.0, 3.0], GaussianMorphology(TREND))) for n in range(5)]
    (stack,), _ = pack(frame, components)
    assert len(stack.origin) == 6
    assert not stack.mask[5].any()
    assert np.isfinite(stack.bases["half_light_radius"]).all()
    image = evaluate(frame, [stack])[(slice(None), *frame.inner_box.slices)]
    expected = np.zeros((3, *SHAPE))
    for number, shape in enumerate(in_channels(GaussianMorphology(TREND), CHANNELS)):
        plain = [Source(c.center, c.spectrum, shape) for _, c in components]
        expected[number] = brute_force(plain)[number]
    # As for many sources.
    np.testing.assert_allclose(image, expected, atol=(2e-5 + 50 * eps) * image.max())


@pytest.mark.parametrize("chosen", [[], LINKED[-1:], LINKED[-1:] * 3, LINKED[:1]], ids=len)
def test_the_transform_of_stacks(chosen, eps):
    """With fewer components than channels, with more, and with links."""
    frame = make_frame()
    components = [(str(n), Source((20, 25 + n), [1.0, 2.0, 3.0], m)) for n, m in enumerate(chosen)]
    stacks, _ = pack(frame, components)
    expected = np.fft.rfft2(evaluate(frame, stacks))
    transform = eqx.filter_jit(lambda stacks, psf_sigma: transform_stacks(stacks, psf_sigma, (3, *frame.fft_shape)))
    spectrum = transform(stacks, jnp.asarray(PSF_SIGMA))
    # 50 eps: rounding in transforms of 6000 values, relative to their sum.
    np.testing.assert_allclose(spectrum, expected, atol=50 * eps * max(1.0, np.abs(expected).max()))


def test_other_links_of_the_same_shape_compile_nothing():
    """Neither the kind of a link nor its wavelengths are part of the compiled program."""
    frame, kinds = make_frame(), set()
    others = [
        TREND,
        Polynomial([2.0, 2.2], {"g": 0.5, "r": 0.7}),
        BSpline([1.0, 1.5], WAVELENGTHS, 1),
        PER_BAND,
    ]
    for link in others:
        stacks, _ = pack(frame, [("0", Source((24, 26), [1.0, 2.0, 3.0], GaussianMorphology(link)))])
        kinds.add(compiled_for(stacks))
    # At most two sizes of stamps.
    assert len(kinds) <= 2
