"""Images: files in the published formats, written here; what is missing, cut off, or would run a program."""

import gzip
import pickle
import shutil
from pathlib import Path

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from sklearn.datasets import load_digits

from lazyjax.data.images import FASHION_FOLDER, load_images, noise_images

RED, GREEN, BLUE = range(3)


def pixels(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


# ---- digits ----


class TestDigits:
    def test_every_pixel_becomes_a_square(self):
        data = load_images("digits")
        assert data.x.shape == (1400, 32, 32, 1)
        assert data.x_test.shape == (397, 32, 32, 1)
        assert data.y.dtype == jnp.int32
        squares = np.asarray(data.x).reshape(-1, 8, 4, 8, 4)
        np.testing.assert_array_equal(squares, np.broadcast_to(squares[:, :, :1, :, :1], squares.shape))
        small = {(im.tobytes(), int(y)) for im, y in zip(*load_digits(return_X_y=True), strict=True)}
        for images, labels in ((data.x, data.y), (data.x_test, data.y_test)):
            raw = np.abs(np.round(np.asarray(images, np.float64)[:, ::4, ::4, 0] * 0.376 * 16 + 0.3053 * 16))
            assert {(im.tobytes(), int(y)) for im, y in zip(raw, labels, strict=True)} <= small

    def test_pixels_have_mean_zero_and_variance_one(self):
        data = load_images()
        pixels = np.concatenate([np.asarray(data.x), np.asarray(data.x_test)])
        assert abs(pixels.mean()) < 1e-3
        assert pixels.std() == pytest.approx(1, abs=1e-3)

    def test_the_first_ones_of_a_dtype(self):
        data, few = load_images(), load_images(num_train=20, num_test=5, dtype=jnp.float32)
        assert few.x.dtype == jnp.float32
        np.testing.assert_array_equal(few.x, np.asarray(data.x)[:20].astype(np.float32))
        np.testing.assert_array_equal(few.y_test, np.asarray(data.y_test)[:5])


# ---- Fashion-MNIST ----


def write_idx(path, array, *, packed=True):
    head = bytes([0, 0, 8, array.ndim]) + np.asarray(array.shape, ">u4").tobytes()
    raw = head + array.tobytes()
    path.write_bytes(gzip.compress(raw) if packed else raw)


@pytest.fixture
def fashion(tmp_path):
    for part, n, packed in (("train", 6, True), ("t10k", 4, False)):
        ending = ".gz" if packed else ""
        write_idx(tmp_path / f"{part}-images-idx3-ubyte{ending}", pixels(n, n, 28, 28), packed=packed)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte{ending}", np.arange(n, dtype=np.uint8), packed=packed)
    return tmp_path


class TestFashion:
    def test_images_are_padded_with_black_and_scaled(self, fashion):
        data = load_images("fashion-mnist", fashion)
        assert data.x.shape == (6, 32, 32, 1)
        np.testing.assert_array_equal(data.y_test, np.arange(4))
        raw = np.asarray(data.x)[..., 0] * 0.353 + 0.286
        np.testing.assert_allclose(raw[:, 2:30, 2:30], pixels(6, 6, 28, 28) / 255, atol=1e-6)
        edge = np.ones((32, 32), bool)
        edge[2:30, 2:30] = False
        np.testing.assert_allclose(raw[:, edge], 0, atol=1e-6)

    @pytest.mark.skipif(not FASHION_FOLDER.is_dir(), reason="Debian's package dataset-fashion-mnist is not there")
    def test_the_packages_files(self):
        data = load_images("fashion-mnist", num_train=600, num_test=500)
        inner = np.asarray(data.x)[:, 2:30, 2:30]
        assert abs(inner.mean()) < 0.02
        assert inner.std() == pytest.approx(1, abs=0.02)
        np.testing.assert_array_equal(np.unique(data.y), np.arange(10))

    def test_a_missing_file_names_the_package(self, fashion):
        with pytest.raises(
            FileNotFoundError, match=r"nothing/train-images-idx3-ubyte\.gz does not exist.*package datas"
        ):
            load_images("fashion-mnist", fashion / "nothing")
        (fashion / "t10k-labels-idx1-ubyte").unlink()
        with pytest.raises(FileNotFoundError, match=r"t10k-labels-idx1-ubyte\.gz does not exist \(nor does it without"):
            load_images("fashion-mnist", fashion)

    @pytest.mark.parametrize(
        ("spoil", "match"),
        [
            (lambda raw: raw[:-7], r"its 3129 bytes of data do not fill the shape \(4, 28, 28\) it gives"),
            (lambda raw: raw + b"\0", "its 3137 bytes"),
            (lambda raw: raw[:10], "it begins with 00 00 08 03"),
            (lambda raw: b"", "it begins with nothing"),
            (lambda raw: b"\0\0\x0d\3" + raw[4:], "IDX file of bytes with 3 .*it begins with 00 00 0d 03"),
            (lambda raw: raw[:4] + b"\xff" * 12 + raw[16:], "do not fill the shape"),
        ],
    )
    def test_a_broken_file_is_named(self, fashion, spoil, match):
        path = fashion / "t10k-images-idx3-ubyte"
        path.write_bytes(spoil(path.read_bytes()))
        with pytest.raises(ValueError, match=rf"(?s)t10k-images-idx3-ubyte must hold.*{match}"):
            load_images("fashion-mnist", fashion)

    @pytest.mark.parametrize(
        "spoil", [lambda raw: raw[:-20], lambda raw: b"no gzip", lambda raw: raw[:30] + b"\7" * 99]
    )
    def test_a_broken_gzip_file_is_named(self, fashion, spoil):
        path = fashion / "train-images-idx3-ubyte.gz"
        path.write_bytes(spoil(path.read_bytes()))
        with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz must hold a whole gzip file"):
            load_images("fashion-mnist", fashion)

    def test_labels_fit_images_and_classes(self, fashion):
        write_idx(fashion / "t10k-labels-idx1-ubyte", np.arange(3, dtype=np.uint8), packed=False)
        with pytest.raises(ValueError, match="must hold one label per image, got 3 for 4 images"):
            load_images("fashion-mnist", fashion)
        write_idx(fashion / "t10k-labels-idx1-ubyte", np.array([0, 10, 2, 3], np.uint8), packed=False)
        with pytest.raises(ValueError, match=r"must hold labels in 0\.\.9, but they are in 0\.\.10"):
            load_images("fashion-mnist", fashion)
        write_idx(fashion / "t10k-images-idx3-ubyte", pixels(0, 4, 32, 32), packed=False)
        with pytest.raises(ValueError, match=r"images of 28 x 28 pixels, got \(32, 32\)"):
            load_images("fashion-mnist", fashion)


# ---- CIFAR-10 ----


def batches(n=3):
    """Images by file, (n, 32, 32, 3), and their labels."""
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    return {name: (pixels(i, n, 32, 32, 3), (np.arange(n) * 3 + i) % 10) for i, name in enumerate(names)}


def planes(images):
    """Rows of 3072: all red, then all green, then all blue."""
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


def write_binary(folder):
    folder.mkdir()
    for name, (images, labels) in batches().items():
        rows = np.concatenate([labels[:, None].astype(np.uint8), planes(images)], axis=1)
        (folder / f"{name}.bin").write_bytes(rows.tobytes())


def write_python(folder, protocol=2):
    folder.mkdir()
    for name, (images, labels) in batches().items():
        texts = {"batch_label": name, "filenames": [f"{i}.png" for i in labels]}
        content = {**texts, "labels": labels.tolist(), "data": np.ascontiguousarray(planes(images))}
        # Python 2, which wrote them, had no other texts than bytes.
        named = {key.encode(): value for key, value in content.items()} if protocol == 2 else content
        (folder / name).write_bytes(pickle.dumps(named, protocol))


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(
    ("write", "name"),
    [
        (write_binary, "cifar-10-batches-bin"),
        (write_python, "cifar-10-batches-py"),
        (lambda folder: write_python(folder, 4), "cifar-10-batches-py"),
    ],
)
def test_both_formats_of_cifar(write, name, nested, tmp_path):
    write(tmp_path / name)
    data = load_images("cifar10", tmp_path if nested else tmp_path / name)
    content = batches()
    images = np.concatenate([content[f"data_batch_{i}"][0] for i in range(1, 6)]) / 255
    assert data.x.shape == (15, 32, 32, 3)
    x = np.asarray(data.x)
    np.testing.assert_allclose(x[..., RED], (images[..., RED] - 0.4914) / 0.2023, atol=1e-5)
    np.testing.assert_allclose(x[..., GREEN], (images[..., GREEN] - 0.4822) / 0.1994, atol=1e-5)
    np.testing.assert_allclose(x[..., BLUE], (images[..., BLUE] - 0.4465) / 0.2010, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(data.y)[3:6], content["data_batch_2"][1])
    np.testing.assert_array_equal(data.y_test, content["test_batch"][1])


class TestBrokenCifar:
    def test_no_folder_and_no_files(self, tmp_path):
        with pytest.raises(ValueError, match=r"cifar10 needs its files.*--data-dir"):
            load_images("cifar10")
        with pytest.raises(
            FileNotFoundError, match=r"holds neither data_batch_1\.bin nor data_batch_1 of CIFAR-10; name"
        ):
            load_images("cifar10", tmp_path)

    def test_one_file_is_missing(self, tmp_path):
        write_binary(tmp_path / "a")
        (tmp_path / "a" / "data_batch_3.bin").unlink()
        with pytest.raises(FileNotFoundError, match=r"data_batch_3\.bin does not exist next to the other files"):
            load_images("cifar10", tmp_path / "a")

    @pytest.mark.parametrize("size", [0, 3072, 5000])
    def test_a_binary_file_is_cut_off(self, tmp_path, size):
        write_binary(tmp_path / "a")
        path = tmp_path / "a" / "data_batch_2.bin"
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(
            ValueError, match=rf"data_batch_2\.bin must hold records of 3073 bytes.*it has {size} bytes"
        ):
            load_images("cifar10", tmp_path / "a")

    def test_labels_are_classes(self, tmp_path):
        write_binary(tmp_path / "a")
        path = tmp_path / "a" / "test_batch.bin"
        path.write_bytes(b"\x63" + path.read_bytes()[1:])
        with pytest.raises(ValueError, match=r"test_batch\.bin must hold labels in 0\.\.9, but they are in 1\.\.99"):
            load_images("cifar10", tmp_path / "a")

    @pytest.mark.parametrize(
        ("content", "match"),
        [
            ([1, 2], "a dictionary whose 'data' are bytes .*they are NoneType"),
            ({"data": np.zeros((2, 3072)), "labels": [0, 1]}, r"they are f8 \(2, 3072\)"),
            ({"data": np.zeros((2, 9), np.uint8), "labels": [0, 1]}, r"they are u1 \(2, 9\)"),
            ({"data": np.zeros((2, 3072), np.uint8), "labels": [0]}, "a list of 2 'labels'"),
            ({"data": np.zeros((2, 3072), np.uint8), "labels": ["a", "b"]}, "a list of 2 'labels'"),
            ({"data": np.zeros((0, 3072), np.uint8), "labels": []}, "a list of 0 'labels'"),
            ({"data": np.zeros((2, 3072), np.uint8), "labels": [0, -1]}, r"labels in 0\.\.9, but they are in -1\.\.0"),
        ],
    )
    def test_a_pickle_holds_something_else(self, tmp_path, content, match):
        write_python(tmp_path / "a")
        (tmp_path / "a" / "data_batch_4").write_bytes(pickle.dumps(content, 4))
        with pytest.raises(ValueError, match=rf"data_batch_4 must hold.*{match}"):
            load_images("cifar10", tmp_path / "a")

    @pytest.mark.parametrize("size", [0, 1, 40, 3000])
    def test_a_pickle_is_cut_off(self, tmp_path, size):
        write_python(tmp_path / "a")
        path = tmp_path / "a" / "data_batch_1"
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(ValueError, match=r"data_batch_1 must hold a pickle of plain .*reading it failed"):
            load_images("cifar10", tmp_path / "a")


class Program:
    """Would make a file when it is unpickled."""

    def __init__(self, function, *arguments):
        self.what = function, arguments

    def __reduce__(self):
        return self.what


@pytest.mark.parametrize(
    ("what", "name"),
    [
        (lambda path: Program(Path.touch, path), r"pathlib.*\.\w+|\w+\.getattr"),
        (lambda path: Program(exec, f"open({str(path)!r}, 'w')"), r"\w+\.exec"),
        (lambda path: Program(shutil.copy, __file__, path), r"shutil\.copy"),
        (lambda path: np.array([Program(eval, f"open({str(path)!r}, 'w')")]), r"\w+\.eval"),
        (lambda path: Program(np.load, path), r"numpy.*\.load"),
    ],
)
def test_a_pickle_runs_nothing(what, name, tmp_path):
    write_python(tmp_path / "a")
    made = tmp_path / "made"
    content = {"labels": [0], "data": what(made)}
    (tmp_path / "a" / "test_batch").write_bytes(pickle.dumps(content, 2))
    with pytest.raises(ValueError, match=rf"test_batch must hold a pickle.*it asks for ({name}), which was not run"):
        load_images("cifar10", tmp_path / "a")
    assert not made.exists()


def test_a_pickle_cannot_call_other_codecs(tmp_path):
    write_python(tmp_path / "a")
    raw = b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00hex\x86R."
    (tmp_path / "a" / "test_batch").write_bytes(raw)
    with pytest.raises(ValueError, match="it asks for the encoding 'hex'"):
        load_images("cifar10", tmp_path / "a")


# ---- requests ----


@pytest.mark.parametrize(
    ("arguments", "options", "match"),
    [
        (("cifar",), {}, "no data set 'cifar' among digits, fashion-mnist, cifar10; did you mean cifar10"),
        (("Fashion_MNIST",), {}, "did you mean fashion-mnist"),
        (("xyz",), {}, "choose one of these"),
        (("digits", "somewhere"), {}, "digits come with scikit-learn and have no folder, got somewhere"),
        (("digits",), {"num_train": 1401}, r"num_train must lie in 1\.\.1400, .*got 1401"),
        (("digits",), {"num_test": 0}, r"num_test must lie in 1\.\.397, .*got 0"),
    ],
)
def test_bad_requests_are_refused(arguments, options, match):
    with pytest.raises(ValueError, match=match):
        load_images(*arguments, **options)


def test_noise_is_uniform_in_the_units_of_the_data():
    x = np.asarray(noise_images(jr.key(0), 50, "cifar10"))
    raw = x * np.array([0.2023, 0.1994, 0.2010]) + np.array([0.4914, 0.4822, 0.4465])
    assert x.shape == (50, 32, 32, 3)
    assert float(raw.min()) > -1e-6
    assert float(raw.max()) < 1 + 1e-6
    # The standard error of the mean of 153,600 uniform numbers is 7e-4, that of their variance below 2e-4.
    assert float(raw.mean()) == pytest.approx(0.5, abs=4e-3)
    assert float(raw.var()) == pytest.approx(1 / 12, abs=1e-3)
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        noise_images(jr.key(0), 0)
