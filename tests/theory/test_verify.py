"""The theory on random instances, at a small size, and the command that tries it at full size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import problems
from lazyjax.cli import command as cli
from lazyjax.theory.random_problems import FAMILIES, CurvedLoss
from lazyjax.theory.verify import verify

SMALL = (FAMILIES[0], FAMILIES[3])


def run():
    lines = []
    return verify(instances=2, families=SMALL, report=lines.append), lines


def check_nothing_is_violated_and_everything_applies_somewhere(out, lines):
    assert (out.violations, out.stopped, out.flows) == (0, 0, 28)
    assert [score.violations for score in out.scores] == [0] * len(out.scores)
    assert all(score.instances > 0 for score in out.scores)
    assert min(score.tightest for score in out.scores) > 1 - 1e-6
    # Not vacuous: most theorems are sharp within a factor of 10 in some instance.
    assert np.median([score.tightest for score in out.scores]) < 10
    assert lines[0].startswith("1/2: two-layer tanh")


def check_rates_are_those_of_theorem_2_2(out):
    for rates in out.rates:
        for name, (low, high) in rates.fitted.items():
            assert rates.expected[name] - 0.05 < low <= high < rates.expected[name] + 0.05


def check_printed_forms_fail_where_they_are_false_and_corrections_hold(out):
    errors = {c.source: c for c in out.counterexamples}
    assert all(c.holds for c in errors.values())
    refuted = {name: c.refuted for name, c in errors.items()}
    assert refuted["poster, infinite horizon"] == pytest.approx(2 / 3)
    assert refuted["poster, finite horizon"] == 0
    np.testing.assert_allclose(errors["poster, infinite horizon"].true, 1, atol=0.02)
    assert refuted["lecture notes, lemma 5"] == refuted["lecture notes, theorem 2"] == 1
    assert 0.02 < refuted["Smith's report, theorem 2.4"] < 0.5
    assert refuted["supplement, proposition A.1"] > 0.8
    finite = errors["poster, finite horizon"]
    # Ten times the scale: a tenth of the bound, and no more of the gap.
    assert float(finite.corrected[0] / finite.corrected[-1]) == pytest.approx(10, rel=0.5)
    assert float(finite.true[0] / finite.true[-1]) > 9


def check_it_prints_three_tables(out):
    text = str(out)
    assert "28 random flows" in text
    assert "0 violation(s)" in text
    for word in ("LN 5", "exponents of alpha", "as printed"):
        assert word in text


def check_the_command_prints_and_tells_by_its_code(out, monkeypatch, capsys):
    monkeypatch.setattr(cli, "verify", lambda **options: out)
    cli.main(["verify", "--instances", "2"])
    assert "0 violation(s)" in capsys.readouterr().out


@pytest.mark.end_to_end
@pytest.mark.long
def test_the_whole_theory_on_two_families(monkeypatch, capsys):
    """One test, since the runs that all checks look at take a minute."""
    out, lines = run()
    check_nothing_is_violated_and_everything_applies_somewhere(out, lines)
    check_rates_are_those_of_theorem_2_2(out)
    check_printed_forms_fail_where_they_are_false_and_corrections_hold(out)
    check_it_prints_three_tables(out)
    check_the_command_prints_and_tells_by_its_code(out, monkeypatch, capsys)


def test_the_curved_loss_is_what_it_says():
    loss = CurvedLoss(minimizer=problems.normal(0, 4), weight=0.25)
    y, v = problems.normal(1, 4), problems.normal(2, 4)
    np.testing.assert_allclose(loss.weight * loss.gradient(y), jax.grad(loss)(y), rtol=1e-12)
    hessian = jax.hessian(loss)(y) / loss.weight
    np.testing.assert_allclose(loss.hvp(y, v), hessian @ v, rtol=1e-12)
    values = np.linalg.eigvalsh(hessian)
    assert loss.strong_convexity() <= values[0] <= values[-1] <= loss.smoothness
    np.testing.assert_allclose(loss.root(y).apply(v) ** 2, loss.weight * hessian @ v**2, rtol=1e-12)
    with pytest.raises(ValueError, match="outputs must have the target's shape"):
        loss.check((3,))


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="must be at least 1"):
        verify(instances=0)
    with jax.enable_x64(False), pytest.raises(ValueError, match="verify needs float64"):
        verify()
    assert jnp.result_type(float) == jnp.float64
