import itertools

import pytest

from scenefit.arrays.box import Box

BOXES = [
    Box((3, 4)),
    Box((3, 4), (1, 2)),
    Box((5, 2), (-2, 3)),
    Box((2, 2), (10, -7)),
    Box((1, 1), (2, 3)),
    Box((0, 3), (1, 1)),
]


def pixels(box: Box) -> set:
    return set(itertools.product(range(box.origin[0], box.stop[0]), range(box.origin[1], box.stop[1])))


@pytest.mark.parametrize(("first", "second"), list(itertools.product(BOXES, BOXES)))
def test_intersection_holds_exactly_the_common_pixels(first, second):
    assert pixels(first.intersection(second)) == pixels(first) & pixels(second)


@pytest.mark.parametrize(("first", "second"), list(itertools.product(BOXES[:5], BOXES[:5])))
def test_union_is_the_smallest_box_around_both(first, second):
    union, both = first.union(second), pixels(first) | pixels(second)
    assert both <= pixels(union)
    for axis in (0, 1):
        values = [pixel[axis] for pixel in both]
        assert (union.origin[axis], union.stop[axis]) == (min(values), max(values) + 1)


@pytest.mark.parametrize("box", BOXES)
def test_shift_moves_every_pixel(box):
    assert pixels(box.shift((2, -5))) == {(y + 2, x - 5) for y, x in pixels(box)}


@pytest.mark.parametrize("margin", [0, 1, 3])
def test_grow_adds_a_margin_and_shrinks_back(margin):
    box = Box((4, 5), (-1, 2))
    grown = box.grow(margin)
    assert grown == Box((4 + 2 * margin, 5 + 2 * margin), (-1 - margin, 2 - margin))
    assert grown.grow(-margin) == box


def test_shrinking_too_far_leaves_an_empty_box():
    assert Box((4, 5)).grow(-3).is_empty


@pytest.mark.parametrize("half_size", [0, 2, (1, 3)])
def test_around_is_centred_on_the_nearest_pixel(half_size):
    box = Box.around((4.4, -2.6), half_size)
    half = (half_size, half_size) if isinstance(half_size, int) else half_size
    assert box.shape == (2 * half[0] + 1, 2 * half[1] + 1)
    assert (box.origin[0] + half[0], box.origin[1] + half[1]) == (4, -3)


@pytest.mark.parametrize("position", [(-0.5, 0.0), (-0.51, 0.0), (2.49, 3.49), (2.5, 0.0), (0.0, 3.5), (1.0, 2.0)])
def test_contains_goes_by_the_pixel_that_a_position_lies_on(position):
    nearest = tuple(int(p + 0.5) if p >= -0.5 else -1 for p in position)
    assert Box((3, 4)).contains(position) == (nearest in pixels(Box((3, 4))))


def test_slices_select_the_pixels_of_the_box():
    box = Box((2, 3), (1, 4))
    rows, columns = box.slices
    assert set(itertools.product(range(10)[rows], range(10)[columns])) == pixels(box)


def test_extent_is_that_of_the_outer_edges():
    assert Box((2, 3), (1, 4)).extent == (3.5, 6.5, 0.5, 2.5)


def test_reversed_bounds_are_empty():
    assert Box.from_bounds((3, 1), (0, 4)).is_empty
    assert not Box((1, 1)).is_empty


def test_negative_shape_is_refused():
    with pytest.raises(ValueError, match=r"shape \(height, width\), both >= 0.*got \(-1, 3\)"):
        Box((-1, 3))
