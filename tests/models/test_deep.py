"""The deep networks: counts derived by hand, a twin written with other primitives, and the rest of lazyjax on them."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest
from jax import lax

import lazyjax as lj
from helpers import relative_error, tree_allclose
from lazyjax.models.deep import convolve, find_network, pool

NARROW = 1 / 32


def count(tree):
    return sum(leaf.size for leaf in jtu.tree_leaves(tree))


def shapes(init, **options):
    return jax.eval_shape(partial(init, **options), jr.key(0))


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def moved(tree, seed, size=0.3):
    """Parameters near others: biases that are not zero, too."""
    rng = np.random.default_rng(seed)
    return jtu.tree_map(lambda leaf: jnp.asarray(np.asarray(leaf) + size * rng.normal(size=leaf.shape)), tree)


def textbook_convolution(layer, x, stride=1):
    """By its definition, in NumPy: a sum over the window."""
    weight, x = np.asarray(layer["weight"]), np.asarray(x)
    size, edge = weight.shape[0], weight.shape[0] // 2
    padded = np.pad(x, ((0, 0), (edge, edge), (edge, edge), (0, 0)))
    sides = [(side + 2 * edge - size) // stride + 1 for side in x.shape[1:3]]
    out = np.zeros((x.shape[0], *sides, weight.shape[3]))
    for i in range(sides[0]):
        for j in range(sides[1]):
            window = padded[:, i * stride : i * stride + size, j * stride : j * stride + size]
            out[:, i, j] = np.einsum("nabc,abco->no", window, weight)
    return out + np.asarray(layer["bias"])


def textbook_vgg(w, x):
    """VGG-11 in NumPy."""
    hidden = []
    for index, layer in enumerate(w[:-1]):
        hidden.append(textbook_convolution(layer, x))
        x = np.maximum(hidden[-1], 0)
        if index in (0, 1, 3, 5, 7):
            n, height, width, channels = x.shape
            x = x.reshape(n, height // 2, 2, width // 2, 2, channels).max((2, 4))
    return x.reshape(len(x), -1) @ np.asarray(w[-1]["weight"]).T + np.asarray(w[-1]["bias"]), hidden


def textbook_resnet(w, x):
    """ResNet-18 in NumPy."""
    hidden = [textbook_convolution(w["first"], x)]
    x = np.maximum(hidden[0], 0)
    for index, block in enumerate(w["blocks"]):
        stride = 2 if index in (2, 4, 6) else 1
        hidden.append(textbook_convolution(block["first"], x, stride))
        z = textbook_convolution(block["second"], np.maximum(hidden[-1], 0))
        x = textbook_convolution(block["shortcut"], x, stride) if stride == 2 else x
        hidden.append(z + x)
        x = np.maximum(hidden[-1], 0)
    return x.mean((1, 2)) @ np.asarray(w["last"]["weight"]).T + np.asarray(w["last"]["bias"]), hidden


NETS = {
    "vgg11": (lj.models.vgg11, lj.models.vgg11().init, textbook_vgg),
    "resnet18": (lj.models.resnet18, lj.models.resnet18().init, textbook_resnet),
}
each_net = pytest.mark.parametrize("name", NETS)


@cache
def start_of(name):
    """Parameters of a narrow net for images of one channel and three outputs, of Xavier's size, with biases."""
    shaped = shapes(NETS[name][1], width=NARROW, shape=(32, 32, 1), outputs=3)
    rng = np.random.default_rng(0)

    def draw(leaf):
        std = (leaf.shape[-1] / leaf.size) ** 0.5 if len(leaf.shape) == 4 else 0.3
        return jnp.asarray(std * rng.normal(size=leaf.shape))

    return jtu.tree_map(draw, shaped)


def net_of(name, *, patches=None, n=2):
    return NETS[name][0](patches=patches), start_of(name), normal(1, n, 32, 32, 1)


class TestConvolution:
    @pytest.mark.parametrize("patches", [True, False])
    @pytest.mark.parametrize(
        ("size", "stride", "sides"), [(3, 1, (5, 6)), (3, 2, (6, 6)), (1, 2, (5, 4)), (5, 2, (7, 8))]
    )
    def test_is_the_sum_over_the_window(self, patches, size, stride, sides):
        layer = {"weight": normal(0, size, size, 2, 3), "bias": normal(1, 3)}
        x = normal(2, 2, *sides, 2)
        expected = textbook_convolution(layer, x, stride)
        found = jax.jit(partial(convolve, stride=stride, patches=patches))(layer, x)
        np.testing.assert_allclose(found, expected, atol=1e-12)

    def test_the_default_is_a_product_on_a_cpu(self):
        layer = {"weight": jnp.ones((3, 3, 1, 1)), "bias": jnp.zeros(1)}
        here, there, convolution = (
            str(jax.make_jaxpr(partial(convolve, layer, patches=patches))(jnp.ones((1, 4, 4, 1))))
            for patches in (None, True, False)
        )
        assert here == (there if jax.default_backend() == "cpu" else convolution)
        assert "conv_general_dilated" in convolution
        assert "conv_general_dilated" not in there

    def test_pools_two_by_two(self):
        x = jnp.asarray(np.random.default_rng(0).permutation(np.arange(96.0)).reshape(2, 4, 6, 2))
        expected = np.asarray(x).reshape(2, 2, 2, 3, 2, 2).max((2, 4))
        np.testing.assert_array_equal(pool(x), expected)


class TestCounts:
    def test_vgg11_has_the_papers(self):
        w = shapes(lj.models.vgg11().init)
        assert count(w[:-1]) == 9_220_480
        assert count(w[-1]) == 5_130
        assert len(w) == 9

    def test_resnet18_has_those_of_its_layers(self):
        first = 9 * 3 * 64 + 64
        same = {c: 9 * c * c + c for c in (64, 128, 256, 512)}
        stages = [4 * same[64]]
        for before, after in ((64, 128), (128, 256), (256, 512)):
            stages.append(9 * before * after + after + 3 * same[after] + before * after + after)
        last = 512 * 10 + 10
        assert count(shapes(lj.models.resnet18().init)) == first + sum(stages) + last == 11_169_162

    @each_net
    def test_products_of_width_multiply_every_channel(self, name):
        narrow, wide = (shapes(NETS[name][1], width=width, shape=(32, 32, 64)) for width in (0.5, 4))
        for (path, a), b in zip(jtu.tree_leaves_with_path(narrow), jtu.tree_leaves(wide), strict=True):
            ratios = {large // small for small, large in zip(a.shape, b.shape, strict=True)}
            assert 8 in ratios or a.shape == b.shape == (10,), path

    def test_other_images_and_outputs(self):
        w = shapes(lj.models.vgg11().init, shape=(64, 32, 2), outputs=4)
        assert w[0]["weight"].shape == (3, 3, 2, 64)
        assert w[-1]["weight"].shape == (4, 1024)
        x = jax.ShapeDtypeStruct((5, 64, 32, 2), jnp.result_type(float))
        assert jax.eval_shape(lj.models.vgg11(), w, x).shape == (5, 4)


@each_net
def test_the_init_is_xaviers_and_no_two_layers_share_their_weights(name):
    w = NETS[name][1](jr.key(0), width=0.25, gain=1.3, dtype=jnp.float32)
    firsts = []
    for path, leaf in jtu.tree_leaves_with_path(jtu.tree_map(np.asarray, w)):
        assert leaf.dtype == np.float32
        if "bias" in jtu.keystr(path):
            assert not leaf.any()
            continue
        fans = leaf.shape[-1] + leaf.shape[-2]
        window = leaf.size / (leaf.shape[-1] * leaf.shape[-2])
        std = 1.3 * (2 / (window * fans)) ** 0.5
        # A standard deviation of N numbers is right to 1/sqrt(2 N); within five of these.
        np.testing.assert_allclose(leaf.std(), std, rtol=5 / (2 * leaf.size) ** 0.5)
        firsts.append(leaf.ravel()[:4].astype(float) / np.linalg.norm(leaf.ravel()[:4]))
    units = np.stack(firsts)
    assert np.abs(units @ units.T - np.eye(len(units))).max() < 1 - 1e-6


# Compilation is the cost: the two ways to convolve are told apart on one network.
@pytest.mark.parametrize(("name", "patches"), [("vgg11", True), ("vgg11", False), ("resnet18", True)])
def test_outputs_and_preactivations_are_the_textbooks(name, patches):
    f, w, x = net_of(name, patches=patches)
    outputs, hidden = NETS[name][2](w, x)
    found_outputs, found = jax.jit(lambda w, x: (f(w, x), f.preactivations(w, x)))(w, x)
    np.testing.assert_allclose(found_outputs, outputs, rtol=1e-10)
    assert len(found) == {"vgg11": 8, "resnet18": 17}[name]
    for a, b in zip(found, hidden, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "patches"), [("vgg11", True), pytest.param("resnet18", False, marks=pytest.mark.end_to_end)]
)
def test_finite_jvp_and_linearize(name, patches):
    """Against the two evaluations in float64, and the derivative; in float32 at the paper's largest alpha."""
    f, w, x = net_of(name, patches=patches)
    u = moved(jtu.tree_map(lambda leaf: np.zeros(leaf.shape), w), 2, 1.0)

    @jax.jit
    def all_of(w, u, x, eps):
        h = partial(f, x=x)
        ends = h(jtu.tree_map(lambda a, b: a + eps * b, w, u)), h(w)
        return (
            lj.finite_jvp(h, w, u, eps),
            (ends[0] - ends[1]) / eps,
            lj.linearize(h, w).jvp(u),
            jax.jvp(h, (w,), (u,))[1],
        )

    finite, plain, tangent, derivative = all_of(w, u, x, 1e-2)
    np.testing.assert_allclose(finite, plain, rtol=1e-9)
    np.testing.assert_allclose(tangent, derivative, rtol=1e-9)
    assert relative_error(finite, derivative) > 1e-3
    near, _, _, _ = all_of(w, u, x, 1e-9)
    single = partial(jtu.tree_map, lambda leaf: jnp.asarray(np.asarray(leaf, np.float32)))
    finite, plain, _, _ = all_of(single(w), single(u), single(x), jnp.float32(1e-7))
    assert relative_error(finite, near) < 1e-4
    assert relative_error(plain, near) > 1e-2


@pytest.mark.parametrize("name", ["vgg11", pytest.param("resnet18", marks=pytest.mark.end_to_end)])
def test_gram_is_that_of_the_jacobian(name):
    f, w, x = net_of(name)
    whole, jacobian = jax.jit(lambda w, x: (lj.gram(f, w, x), jax.jacrev(f)(w, x)))(w, x)
    rows = np.concatenate([np.reshape(leaf, (6, -1)) for leaf in jtu.tree_leaves(jacobian)], axis=1)
    np.testing.assert_allclose(np.reshape(whole, (6, 6)), rows @ rows.T, rtol=1e-9, atol=1e-9)


def test_compiled_derivatives_are_those_of_eager_code():
    x = normal(0, 2, 6, 6, 2)
    layers = [{"weight": normal(i, 3, 3, 2, 2), "bias": normal(3 + i, 2)} for i in range(2)]

    def loss(layers):
        z = pool(jax.nn.relu(convolve(layers[0], x)))
        return jnp.sum(jax.nn.relu(convolve(layers[1], z, stride=2)) ** 2)

    assert tree_allclose(jax.jit(jax.grad(loss))(layers), jax.grad(loss)(layers), rtol=1e-9, atol=1e-9)


def test_patches_keep_convolutions_out_of_loops():
    """The derivatives of a convolution in a scan are what XLA for CPUs has only slow programs for."""
    f, w, x = net_of("vgg11", patches=True)
    text = jax.jit(jax.grad(lambda w: jnp.sum(f(w, x)))).lower(w).as_text()
    assert "stablehlo.convolution" not in text
    assert "stablehlo.dot_general" in text


def test_stability_of_activations_by_hand():
    """One bias turned around in the second layer: its units are on for some pixels and off for others."""
    f, w, x = net_of("vgg11", n=3)
    stability = jax.jit(lambda w, other: lj.laziness.activation_stability(f, w, other, x))
    assert float(stability(w, w)) == 1
    dead = [*w]
    dead[7] = {"weight": w[7]["weight"], "bias": jnp.asarray(np.full(16, -1e3))}
    before = jax.jit(lambda w: f.preactivations(w, x)[7])(w)
    assert before.shape == (3, 2, 2, 16)
    share = 1 - np.mean(np.asarray(before) > 0)
    assert 0.3 < share < 0.7
    np.testing.assert_allclose(stability(w, dead), (7 + share) / 8)


def test_vmap_over_parameters():
    f, w, x = net_of("vgg11")
    both = jtu.tree_map(lambda leaf: jnp.asarray(np.stack([leaf, 2 * np.asarray(leaf)])), w)
    mapped, first = jax.jit(lambda both: (jax.vmap(f, (0, None))(both, x), f(jtu.tree_map(lambda a: a[1], both), x)))(
        both
    )
    np.testing.assert_allclose(mapped[1], first, rtol=1e-10)
    assert np.abs(mapped[0] - mapped[1]).max() > 1


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"shape": (28, 28, 1)}, r"shape must be at least 32 x 32, which five poolings halve, got \(28, 28, 1\); pad"),
        ({"shape": (32, 32)}, r"shape must be \(height, width, channels\) of an image, all positive, got \(32, 32\)"),
        ({"width": 0.0}, "width must be a positive factor of the channels, got 0.0"),
        ({"width": float("inf")}, "width must be a positive factor"),
        ({"outputs": 0}, "outputs must be at least 1, got 0"),
        ({"gain": -1.0}, "gain must be a positive factor, got -1.0"),
    ],
)
def test_bad_inits_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        lj.models.vgg11().init(jr.key(0), **options)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("vgg16", "did you mean vgg11"),
        ("ResNet-18", "did you mean resnet18"),
        ("lenet", "did you mean resnet18"),
        ("transformer", "choose one of these"),
    ],
)
def test_an_unknown_network_gets_the_nearest_name(name, match):
    with pytest.raises(ValueError, match=f"no network '{name}' among vgg11, resnet18; {match}"):
        find_network(name)


def test_the_networks_own_convolutions_are_public_lax():
    """`patches=False` is the platform's convolution, the one that an accelerator should have."""
    f, w, x = net_of("vgg11", patches=False)
    dimensions = ("NHWC", "HWIO", "NHWC")
    expected = lax.conv_general_dilated(x, w[0]["weight"], (1, 1), "SAME", dimension_numbers=dimensions)
    found = jax.jit(lambda w: f.preactivations(w, x)[0])(w)
    np.testing.assert_allclose(found, np.asarray(expected) + np.asarray(w[0]["bias"]), atol=1e-12)
