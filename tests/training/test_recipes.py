"""Random crops and flips: what they contain, how likely each is, and that the key decides."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import lazyjax as lj

IMAGES = np.arange(1.0, 1 + 400 * 3 * 4 * 2).reshape(400, 3, 4, 2)  # no pixel is zero


def shifts(image, changed, padding):
    """Where in the padded image the crop lies; all places that fit."""
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    height, width, _ = image.shape
    places = [(i, j) for i in range(2 * padding + 1) for j in range(2 * padding + 1)]
    return [(i, j) for i, j in places if np.array_equal(padded[i : i + height, j : j + width], changed)]


def test_a_crop_is_a_window_of_the_padded_image_and_all_are_likely():
    out = np.asarray(lj.training.pad_and_crop(jr.key(0), IMAGES, padding=1))
    found = [shifts(a, b, 1) for a, b in zip(np.asarray(IMAGES), out, strict=True)]
    assert all(len(places) == 1 for places in found)
    _, counts = np.unique([places[0] for places in found], axis=0, return_counts=True)
    # 400 draws among nine: 44 +- 6.3 each.
    assert len(counts) == 9
    assert counts.min() > 20
    assert counts.max() < 70


def test_a_flip_mirrors_half_of_the_images_left_to_right():
    out = np.asarray(lj.training.random_flip(jr.key(0), IMAGES))
    images = np.asarray(IMAGES)
    kept = (out == images).all(axis=(1, 2, 3))
    flipped = (out == images[:, :, ::-1]).all(axis=(1, 2, 3))
    assert (kept != flipped).all()
    assert 160 < kept.sum() < 240


@pytest.mark.parametrize("augment", [lj.training.pad_and_crop, lj.training.random_flip])
def test_the_key_decides_jitted_or_not_in_any_dtype(augment):
    x = jnp.asarray(IMAGES[:20].astype(np.uint8))
    out = augment(jr.key(1), x)
    assert out.dtype == x.dtype
    assert out.shape == x.shape
    np.testing.assert_array_equal(out, augment(jr.key(1), x))
    np.testing.assert_array_equal(out, jax.jit(augment)(jr.key(1), x))
    assert not np.array_equal(out, augment(jr.key(2), x))


def test_no_padding_changes_nothing():
    np.testing.assert_array_equal(lj.training.pad_and_crop(jr.key(0), IMAGES, padding=0), IMAGES)


def test_bad_images_are_refused(untyped):
    for augment in (lj.training.pad_and_crop, lj.training.random_flip):
        with pytest.raises(
            ValueError, match=r"x must be images of shape \(n, height, width, channels\), got shape \(2,"
        ):
            augment(jr.key(0), np.ones((2, 3, 4)))
    for padding in (-1, 1.5):
        with pytest.raises(ValueError, match="padding must be a whole number of pixels"):
            lj.training.pad_and_crop(jr.key(0), IMAGES, padding=padding)
