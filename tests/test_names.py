"""One word, one meaning: a walk over the public signatures that holds the glossary of CONTRIBUTING.md."""

import ast
import collections
import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import lazyjax as lj

ROOT = Path(__file__).parents[1]

# Names that code outside of this repository uses.
RELIED_ON = """
    center symmetrize rescale on_data finite_jvp linearize gradient_flow gradient_descent train track compare
    gram gram_plan gram_diagonal kernel_matvec spectrum kernel_regression arccos_kernel deep_kernel kappa
    lazy_correction certify sweep diagnose square_loss logistic_loss softmax_cross_entropy RESULTS
    models.two_layer models.mlp models.diagonal_linear models.vgg11 models.resnet18
    bounds.theorem_2_2 bounds.theorem_2_2_radius bounds.theorem_2_3 bounds.theorem_2_3_radius bounds.theorem_2_4
    bounds.theorem_2_5 bounds.proposition_a_1 bounds.lemma_b_1 bounds.lemma_b_2 bounds.lip_sigma
    bounds.homogeneous_flow bounds.kappa_two_layer bounds.smith_inequality bounds.lecture_lemma_4
    bounds.lecture_lemma_5 bounds.lecture_lemma_6 bounds.lecture_theorem_2
""".split()  # noqa: SIM905

# Flat names of 0.1 that have moved to a namespace or are gone; CHANGELOG.md says where.
MOVED = """
    diagonal_linear init_diagonal_linear init_mlp init_two_layer mlp two_layer init_resnet18 init_vgg11 resnet18 vgg11
    condition_number effective_rank normalized_spectrum KernelRegression DeepKernel SOLVERS trained_outputs
    inverse_time_decay pad_and_crop random_flip activation_stability measure_kernel_drift Tracker Correction
    lazy_ratio step_criterion two_layer_curvature PathLipschitz lipschitz_along two_layer_lipschitz local_lipschitz
    sampled_lipschitz_lower
""".split()  # noqa: SIM905

# Old or British names of parameters, fields and methods, and what they are called.
REPLACED = {
    "optimiser": "optimizer",
    "losses": "loss",
    "train_loss": "loss",
    "train_accuracy": "accuracy",
    "rng": "key",
    "model": "f or h",
    "params0": "w0",
    "facts": "measurements",
    "image": "matvec",
    "back": "rmatvec",
}

# The order of positional arguments in the two families.
FAMILIES = {"h": ["h", "loss", "w0"], "f": ["f", "w0", "w", "training", "x", "x1", "x2", "y", "optimizer"]}


class Function(NamedTuple):
    """A public function or method, with the name under which a user finds it."""

    name: str
    value: Callable[..., Any]
    method: bool

    @property
    def parameters(self) -> list[inspect.Parameter]:
        parameters = list(inspect.signature(self.value).parameters.values())
        return [p for p in parameters if p.name not in ("self", "cls") and p.kind is not p.VAR_KEYWORD]


def exported(module: types.ModuleType) -> list[str]:
    """Return the public names of a namespace: what its `__init__.py` lists, or what a module defines."""
    if module is lj:
        return [name for name in dir(lj) if not name.startswith("_")]
    if hasattr(module, "__all__"):
        return list(module.__all__)
    if hasattr(module, "__path__"):
        tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
        lines = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
        return [alias.asname or alias.name for node in lines for alias in node.names]
    return [n for n, v in vars(module).items() if n[0] != "_" and getattr(v, "__module__", "") == module.__name__]


@cache
def public() -> dict[str, Any]:
    """Return everything that a user reaches from `lj` by name, each thing once, the shortest name first."""
    found: dict[str, Any] = {}
    seen = set()
    queue = collections.deque([("lj", lj)])
    while queue:
        prefix, module = queue.popleft()
        for name in exported(module):
            value = getattr(module, name)
            if id(value) in seen or name.startswith("_"):
                continue
            seen.add(id(value))
            found[f"{prefix}.{name}"] = value
            if inspect.ismodule(value):
                queue.append((f"{prefix}.{name}", value))
    return found


def classes() -> dict[str, type]:
    return {name: value for name, value in public().items() if inspect.isclass(value)}


def follows_another_interface(cls: type) -> bool:
    """Whether a class has its methods' names from another library, as a diffrax solver has."""
    return any(base.__module__.startswith("diffrax") for base in cls.__mro__)


@cache
def functions() -> list[Function]:
    """Return the public functions, and the public methods of public classes."""
    found = [Function(name, value, False) for name, value in public().items() if inspect.isfunction(value)]
    for name, cls in classes().items():
        for attribute, value in vars(cls).items():
            called = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            named = attribute == "__call__" or not attribute.startswith("_")
            if inspect.isfunction(called) and named and not follows_another_interface(cls):
                found.append(Function(f"{name}.{attribute}", called, True))
    return found


def fields() -> Iterator[tuple[str, str, Any]]:
    """Yield the class, the name and the annotation of every public field of a public class."""
    for name, cls in classes().items():
        if follows_another_interface(cls):
            continue
        if dataclasses.is_dataclass(cls):
            yield from ((name, f.name, f.type) for f in dataclasses.fields(cls) if not f.name.startswith("_"))
        elif hasattr(cls, "_fields"):
            yield from ((name, field, cls.__annotations__.get(field)) for field in cls._fields)  # pyright: ignore


def words() -> Iterator[tuple[str, str, Any]]:
    """Yield where it stands, the word and its annotation, for every public parameter and field."""
    yield from fields()
    for function in functions():
        yield from ((function.name, p.name, p.annotation) for p in function.parameters)


@cache
def glossary() -> dict[str, str]:
    """Return word and meaning of the table in CONTRIBUTING.md."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text.partition("## Glossary")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.+?) \| (.+?) \| (.+?) \|$", table, re.MULTILINE)
    return {word: meaning for names, meaning, _ in rows for word in re.findall(r"`(\w+)`", names)}


def test_names_that_others_rely_on_exist():
    missing = [name for name in RELIED_ON if not callable(_at(name)) and name != "RESULTS"]
    assert missing == []
    assert "successful" in dir(lj.RESULTS)


def _at(dotted: str) -> Any:
    value: Any = lj
    for name in dotted.split("."):
        value = getattr(value, name, None)
    return value


def test_two_layer_keeps_its_parameters():
    net = lj.models.two_layer(jnp.tanh)
    w0 = eqx.filter_eval_shape(lambda key: net.init(key, d=3, width=4), jax.random.key(0))
    assert {name: leaf.shape for name, leaf in w0.items()} == {"a": (4,), "b": (4, 3)}


def test_about_forty_names_are_flat():
    flat = [name for name in exported(lj) if not inspect.ismodule(getattr(lj, name))]
    assert 30 <= len(flat) <= 45, flat


def test_no_name_of_before_is_left():
    assert [name for name in MOVED if hasattr(lj, name)] == []


def test_replaced_words_are_gone():
    offenders = [f"{where}: {word} is {REPLACED[word]}" for where, word, _ in words() if word in REPLACED]
    offenders += [f.name for f in functions() if f.method and f.name.rpartition(".")[2] in REPLACED]
    assert not offenders, "\n".join(offenders)


@pytest.mark.parametrize("first", FAMILIES)
def test_arguments_stand_in_the_order_of_their_family(first):
    order = FAMILIES[first]
    offenders = []
    for function in functions():
        positional = [p.name for p in function.parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        if positional[:1] == [first] and not function.method:
            shared = [name for name in positional if name in order]
            if shared != sorted(shared, key=order.index) or positional[: len(shared)] != shared:
                offenders.append(f"{function.name}({', '.join(positional)}): {', '.join(order)} come first, so ordered")
    assert not offenders, "\n".join(offenders)


def test_models_come_first():
    offenders = [
        f"{function.name}({', '.join(names)})"
        for function in functions()
        for names in [[p.name for p in function.parameters]]
        if not function.method and ({"h", "f"} & set(names[1:]))
    ]
    assert not offenders, "\n".join(offenders)


def test_options_are_keyword_only():
    options = {"alpha", "difference", "rtol", "atol", "progress", "throw", "mean", "solver", "test", "test_model"}
    offenders = [
        f"{function.name}: {p.name}"
        for function in functions()
        for p in function.parameters
        if p.name in options and p.kind is not p.KEYWORD_ONLY and not function.method
    ]
    assert not offenders, "\n".join(offenders)


def test_displacement_is_a_tree():
    offenders = [
        f"{where}: {word} is {annotation}, the number is displacement_norm"
        for where, word, annotation in words()
        if word == "displacement" and not re.search("PyTree|dict|Params", _text(annotation))
    ]
    assert not offenders, "\n".join(offenders)


def test_displacement_norm_is_a_number():
    offenders = [
        f"{where}: {word} is {annotation}"
        for where, word, annotation in words()
        if word in ("displacement_norm", "param_gap", "output_gap") and re.search("PyTree|dict", _text(annotation))
    ]
    assert not offenders, "\n".join(offenders)


def _text(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "") + str(annotation)


def test_difference_is_exact_or_plain():
    taking = {
        f"{f.name}()": (p.default, p.annotation) for f in functions() for p in f.parameters if p.name == "difference"
    }
    for name, cls in classes().items():
        option = inspect.signature(cls).parameters.get("difference") if dataclasses.is_dataclass(cls) else None
        if option is not None and option.default is not option.empty:
            taking[name] = (option.default, option.annotation)
    assert {"lj.finite_jvp()", "lj.track()", "lj.training.TrainingOptions"} <= set(taking)
    assert {name: default for name, (default, _) in taking.items() if default != "exact"} == {}
    literals = {name: typing.get_args(annotation) for name, (_, annotation) in taking.items()}
    assert {name: values for name, values in literals.items() if values not in ((), ("exact", "plain"))} == {}


def test_another_difference_is_refused():
    # By the body of each function: the annotation, which is checked in tests only, would refuse it first.
    def square(w):
        return w**2

    calls = [
        (lj.finite_jvp, (square, jnp.ones(2), jnp.ones(2), 0.0)),
        (lj.track, (lambda w, x: x @ w, jnp.ones(2), jnp.ones((3, 2)))),
    ]
    for function, arguments in calls:
        with pytest.raises((ValueError, TypeError), match=r"(?s)difference.*exact.*plain"):
            inspect.unwrap(function)(*arguments, difference="finite")


def test_test_is_data_and_test_model_a_model():
    offenders = [f"{w}: test is a model" for w, word, a in words() if word == "test" and "Callable" in _text(a)]
    offenders += [
        f"{w}: test_model is no model" for w, word, a in words() if word == "test_model" and "Callable" not in _text(a)
    ]
    assert not offenders, "\n".join(offenders)
    assert any(word == "test_model" for _, word, _ in words())


def test_every_class_that_is_returned_is_public():
    reachable = {id(value) for value in public().values()}
    offenders = [
        f"{function.name} returns {cls.__module__}.{cls.__qualname__}, which `lj` does not lead to"
        for function in functions()
        for cls in _classes(_returned(function.value))
        if cls.__module__.partition(".")[0] == "lazyjax" and id(cls) not in reachable
    ]
    assert not offenders, "\n".join(offenders)


def _returned(function: Callable[..., Any]) -> Any:
    """Return a function's return annotation, evaluated where the function was written."""
    annotation = inspect.signature(function).return_annotation
    if not isinstance(annotation, str):
        return annotation
    scope = vars(inspect.getmodule(inspect.unwrap(function)))
    try:
        return eval(annotation, dict(scope))
    except NameError:  # imported for type checkers only, such as xarray.Dataset
        names = {node.id for node in ast.walk(ast.parse(annotation)) if isinstance(node, ast.Name)}
        assert not [n for n in names if n in scope and inspect.isclass(scope[n])], f"{function}: {annotation}"
        return None


def _classes(annotation: Any) -> Iterator[type]:
    if inspect.isclass(annotation) and not typing.get_args(annotation):
        yield annotation
    for part in typing.get_args(annotation):
        yield from _classes(part)


def test_every_public_thing_is_documented():
    named = [(name, value) for name, value in public().items() if inspect.isclass(value) or inspect.isfunction(value)]
    assert [name for name, value in named if not value.__doc__] == []
    assert [f.name for f in functions() if not f.value.__doc__ and not f.name.endswith("__call__")] == []


def test_the_glossary_has_every_word_that_functions_share():
    uses = collections.Counter(p.name for f in functions() if not f.method for p in f.parameters)
    shared = {word for word, count in uses.items() if count >= 3}
    assert sorted(shared - set(glossary())) == [], "give the word one meaning in the glossary of CONTRIBUTING.md"


def test_the_glossary_has_no_word_that_nothing_uses():
    used = {word for _, word, _ in words()} | {f.name.rpartition(".")[2] for f in functions()}
    assert sorted(set(glossary()) - used) == []
