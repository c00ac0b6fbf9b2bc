"""Data sets: teachers on the sphere, digits, and arrays of one's own; what is refused."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import lazyjax as lj
from lazyjax.data.datasets import digits, draw_teacher, load_arrays, sphere


class TestTeacher:
    def test_points_are_uniform_on_the_sphere(self, getkey):
        x = np.asarray(sphere(getkey(), 20_000, 4))
        np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, rtol=1e-14)
        # Mean 0 and covariance 1/d, each within five standard errors.
        np.testing.assert_allclose(x.mean(axis=0), 0, atol=5 * (1 / 4 / 20_000) ** 0.5)
        np.testing.assert_allclose(x.T @ x / 20_000, np.eye(4) / 4, atol=5 * 0.25 / 20_000**0.5)

    def test_units_have_norm_one_up_to_the_scale(self, getkey):
        teacher = draw_teacher(getkey(), 7, scale=100.0)
        sizes = np.abs(teacher["a"]) * np.linalg.norm(teacher["b"], axis=1)
        np.testing.assert_allclose(sizes, 100, rtol=1e-14)
        inputs = jax.ShapeDtypeStruct((5, 7), sizes.dtype)
        assert jax.eval_shape(lj.models.two_layer(), teacher, inputs).shape == (5,)

    def test_both_signs_occur(self):
        signs = {float(sign) for seed in range(8) for sign in np.asarray(draw_teacher(jr.key(seed), 3)["a"])}
        assert signs == {-1.0, 1.0}

    def test_dtype(self):
        leaves = jax.tree.leaves(draw_teacher(jr.key(0), 3, dtype=jnp.float32))
        assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}

    def test_refuses_no_points_and_no_dimension(self):
        with pytest.raises(ValueError, match="n and d must be at least 1, got n=0, d=3"):
            sphere(jr.key(0), 0, 3)
        with pytest.raises(ValueError, match="n and d must be at least 1, got n=3, d=0"):
            draw_teacher(jr.key(0), 0)


class TestDigits:
    def test_splits_all_images_and_scales_them(self):
        data = digits(200)
        assert data.x.shape == (200, 64)
        assert data.x_test.shape == (1597, 64)
        assert data.y.dtype == data.y_test.dtype == jnp.int32
        images = np.concatenate([data.x, data.x_test])
        assert abs(float(images.mean())) < 1e-12
        assert float(images.std()) == pytest.approx(1)

    def test_keeps_the_shares_of_the_classes(self):
        data = digits(200)
        shares = np.bincount(data.y, minlength=10) / 200
        others = np.bincount(data.y_test, minlength=10) / 1597
        assert np.abs(shares - others).max() < 1 / 200

    def test_the_seed_decides_the_split(self):
        np.testing.assert_array_equal(digits(50, seed=1).x, digits(50, seed=1).x)
        assert not np.array_equal(digits(50, seed=1).x, digits(50, seed=2).x)

    def test_dtype(self):
        assert digits(10, dtype=jnp.float32).x.dtype == jnp.float32

    @pytest.mark.parametrize("num_train", [0, 9, 1788])
    def test_refuses_a_split_without_all_classes(self, num_train):
        with pytest.raises(ValueError, match=r"num_train must lie in 10\.\.1787.*got"):
            digits(num_train)


X, Y = np.ones((4, 3), np.float32), np.array([0, 1, 1, 0])


class TestLoadArrays:
    @pytest.fixture
    def save(self, tmp_path):
        def save(**arrays):
            np.savez(tmp_path / "my.npz", **arrays)
            return tmp_path / "my.npz"

        return save

    def test_reads_inputs_as_floats_and_labels_as_integers(self, save):
        data = load_arrays(save(x=np.ones((4, 3), np.uint8), y=Y.astype(np.uint8)))
        assert data.x.dtype == jnp.result_type(float)
        assert data.y.dtype == jnp.result_type(int)
        assert data.test is None

    def test_reads_test_data_and_real_targets(self, save):
        data = load_arrays(save(x=X, y=X[:, 0], x_test=X[:2], y_test=X[:2, 0], more=X))
        assert data.y.dtype == jnp.result_type(float)
        x_test, y_test = data.test
        assert (x_test.shape, y_test.shape) == ((2, 3), (2,))

    def test_yes_and_no_become_0_and_1(self, save):
        assert load_arrays(save(x=X, y=Y == 1)).y.tolist() == [0, 1, 1, 0]

    @pytest.mark.parametrize(
        ("arrays", "error", "match"),
        [
            ({"x": X}, ValueError, r"y is missing \(there: x\)"),
            ({"inputs": X, "y": Y}, ValueError, r"x is missing \(there: inputs, y\)"),
            ({"x": X, "y": Y, "x_test": X}, ValueError, "y_test is missing next to x_test"),
            ({"x": X, "y": Y, "y_test": Y}, ValueError, "x_test is missing next to y_test"),
            ({"x": X, "y": Y[:3]}, ValueError, "x and y must have equally many samples, got 4 and 3"),
            ({"x": X, "y": Y, "x_test": X, "y_test": Y[:2]}, ValueError, "x_test and y_test .* got 4 and 2"),
            ({"x": X, "y": Y, "x_test": X[:, :2], "y_test": Y}, ValueError, r"shape of x's, \(3,\), got \(2,\)"),
            ({"x": X[:0], "y": Y[:0]}, ValueError, r"x in .* at least one sample, got shape \(0, 3\)"),
            ({"x": np.float64(1), "y": Y}, ValueError, r"at least one sample, got shape \(\)"),
            ({"x": X, "y": np.array(["a", "b", "c", "d"])}, TypeError, "y in .* real numbers, got <U1"),
            ({"x": X + 1j, "y": Y}, TypeError, "x in .* real numbers, got complex64"),
            ({"x": np.array([[1, None]] * 4), "y": Y}, ValueError, "plain numeric arrays, but reading it failed"),
        ],
    )
    def test_refuses_what_it_cannot_use(self, save, arrays, error, match):
        with pytest.raises(error, match=match):
            load_arrays(save(**arrays))

    def test_says_how_many_entries_are_not_finite_and_where(self, save):
        x = X.copy()
        x[1, 2], x[3, 0] = np.nan, np.inf
        with pytest.raises(ValueError, match=r"x must be finite, but 2 of its 12 entries.*index \(1, 2\)"):
            load_arrays(save(x=x, y=Y))

    @pytest.mark.parametrize(
        ("arrays", "match"),
        [
            (
                {"y": np.array([0, 10**12, 1, 1])},
                r"y in .*my.npz\[1\] must be a number that int32 holds, got 1000000000000",
            ),
            ({"y": np.array([0, -(2**31) - 1, 1, 1])}, r"y in .*\[1\] must be a number that int32 holds"),
            ({"y_test": np.array([0, 2**40, 1, 1]), "x_test": X}, r"y_test in .*\[1\] must be"),
            (
                {"x": np.array([[1.0], [1e300], [0.0], [0.0]])},
                r"x in .*\[1, 0\] must be a number that float32 holds, got 1e\+30",
            ),
        ],
    )
    def test_refuses_numbers_that_32_bits_do_not_hold(self, save, arrays, match):
        with jax.enable_x64(False), pytest.raises(ValueError, match=match):
            load_arrays(save(**{"x": X, "y": Y} | arrays))

    def test_refuses_a_missing_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no\.npz does not exist"):
            load_arrays(tmp_path / "no.npz")

    def test_refuses_a_folder(self, tmp_path):
        with pytest.raises(ValueError, match=r"must be a \.npz file with arrays x and y, but is a folder"):
            load_arrays(tmp_path)

    @pytest.mark.parametrize("content", [b"", b"x,y\n1,2\n", b"PK\x03\x04 cut off"])
    def test_refuses_a_file_that_is_not_an_npz(self, tmp_path, content):
        (tmp_path / "my.csv").write_bytes(content)
        with pytest.raises(ValueError, match=r"must be a \.npz file .* numpy\.savez\('my\.npz'"):
            load_arrays(tmp_path / "my.csv")

    def test_refuses_a_bare_array(self, tmp_path):
        np.save(tmp_path / "my.npy", X)
        with pytest.raises(ValueError, match="it holds one bare array"):
            load_arrays(tmp_path / "my.npy")
