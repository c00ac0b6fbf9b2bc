"""A report as one page of HTML that a person can read anywhere: nothing in it is fetched."""

from collections.abc import Mapping
from html import escape
from string import Template
from typing import Any

from lazyjax.report.certificate import headline
from lazyjax.report.diagnose import LazinessReport
from lazyjax.report.verdict import kernel_facts, table_columns
from lazyjax.theory.certify import Certificate
from lazyjax.theory.claims import HEAD

CAPTIONS = {
    "scores": "Accuracy and loss at the end of training against the output scale. The dashed lines are the tangent "
    "model, the limit of all lines for large alpha.",
    "gaps": "Largest distance over time between the model and its tangent model, in outputs and in parameters. "
    "In the shaded region there is only numerical error, measured by a model run at alpha = inf.",
    "drift": "What moves during training: parameters, tangent kernel, signs of the preactivations. Lazy training "
    "is at the right-hand end, where nothing does.",
    "curves": "Training of the model at a few scales and of its tangent model. Where the lines lie on each other, "
    "training is lazy.",
    "eigenvalues": "Spectrum of the tangent kernel at the start: eigenvalues over the largest, sorted, against their "
    "index over the number of outputs; what is below rounding is left out. The tangent model learns the modes above "
    "the dashed line within the training time, the others hardly at all.",
}

COLUMNS = {
    "alpha": "output scale; “tangent” is the tangent model",
    "train loss": "loss R on the training data at the end",
    "test loss": "loss R on the test data at the end",
    "train acc %": "correct answers on the training data at the end",
    "test acc %": "correct answers on the test data at the end",
    "out gap %": "largest output gap between model and tangent model over time, in percent of the initial residual",
    "|w-wbar|": "largest distance of the parameters from those of the tangent model over time",
    "|w-w0|": "distance of the parameters from their start at the end",
    "drift %": "relative change of the tangent kernel at the end, on the first training samples (up to 320 outputs)",
    "stable %": "preactivations that have the sign of the start at the end",
    "steps": "steps of the solver",
}

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>lazyjax report</title>
<style>
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --soft: #667; --line: #ddd; --tint: #f3f5f8;
  --mark: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --paper: #16181c; --soft: #9aa; --line: #3a3d44;
  --tint: #21242b; --mark: #56b4e9; } }
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1.2rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .2rem; } h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem; }
.verdict { border-left: 4px solid var(--mark); background: var(--tint); padding: .8rem 1.1rem; font-size: 1.08rem;
  margin: 1.2rem 0; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.lanes { font-size: .9rem; width: 100%; }
.lanes th, .lanes td { text-align: right; padding: .25rem .55rem; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
.lanes thead th { border-bottom: 2px solid var(--soft); } .lanes tbody tr:last-child td { border-top: 2px solid
  var(--soft); }
.claims { font-size: .87rem; } .claims th, .claims td { text-align: left; padding: .15rem .7rem .15rem 0;
  border-bottom: 1px solid var(--line); white-space: nowrap; }
.pairs th { text-align: left; font-weight: 600; color: var(--soft); padding: .1rem 1.2rem .1rem 0;
  vertical-align: top; white-space: nowrap; }
.pairs td { padding: .1rem 0; overflow-wrap: anywhere; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1.2rem; }
figure { margin: 0; break-inside: avoid; } figure img { display: block; width: 100%; max-width: 28rem;
  margin: 0 auto; background: #fff; border-radius: 6px; padding: .5rem; box-sizing: border-box; }
figcaption, .key { font-size: .87rem; color: var(--soft); } figcaption { margin: .4rem .3rem; }
code { font-size: .92em; overflow-wrap: anywhere; }
@media print { body { max-width: none; padding: 0; font-size: 10.5pt; background: #fff; color: #000; }
  h2 { break-after: avoid; } .lanes { font-size: 7.5pt; } .lanes th, .lanes td { padding: .15rem .3rem; } }
</style>
</head>
<body>
<h1>How lazily does this model train?</h1>
<div class="key">$subtitle</div>
<p class="verdict">$verdict</p>
<h2>The problem</h2>
$problem
<h2>Along the scales</h2>
<div class="wide">$table</div>
<p class="key">$key</p>
<h2>Rates</h2>
$slopes
$kernel
$certificate
<h2>Figures</h2>
<div class="figures">
$figures
</div>
$notes
<h2>How this was made</h2>
$made
</body>
</html>
""")


def render_html(report: LazinessReport, figures: Mapping[str, str], settings: Mapping[str, Any]) -> str:
    """Return the whole report as one self-contained page.

    Args:
        report: From `lazyjax.diagnose`.
        figures: Name to image, as the address of an `<img>`: "data:image/svg+xml;base64,...".
        settings: What to show under "How this was made": name to text, number, list or mapping.

    Returns:
        The text of an HTML file.
    """
    a = report.dataset.attrs
    problem = {
        "parameters": f"{a['num_params']}, norm at the start {a['w0_norm']:.4g}",
        "data": f"{a['num_train']} training and {a['num_test']} test samples, {a['outputs']} output(s) each",
        "loss": f"{a['loss']}, norm of the initial residual {a['initial_residual']:.4g}",
        "training": f"gradient flow for time {a['horizon']:.4g} in {a['dtype']}; the model is centered, h(w0) = 0",
        "step criterion": f"{a['lazy_ratio']:.3g} at alpha = 1 (small means lazy)",
    }
    columns = table_columns(report.dataset)
    key = "; ".join(f"<b>{escape(name)}</b>: {escape(COLUMNS[name])}" for name, _ in columns if name in COLUMNS)
    return PAGE.substitute(
        subtitle=escape("lazyjax: the gradient flows of a model and of its tangent model, over output scales"),
        verdict=escape(report.verdict),
        problem=_pairs(problem),
        table=_table(columns),
        key=key + ".",
        slopes=_pairs({name.replace("_", " "): str(slope) for name, slope in report.slopes.items()}),
        kernel=_kernel(kernel_facts(report.dataset)),
        certificate=_certificate(report.certificate),
        figures="\n".join(_figure(name, source) for name, source in figures.items()),
        notes=_notes(report.notes),
        made=_pairs({name: _text(value) for name, value in settings.items()}),
    )


def _pairs(rows: Mapping[str, str]) -> str:
    cells = "\n".join(f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in rows.items())
    return f'<table class="pairs">\n{cells}\n</table>'


def _table(columns: list[tuple[str, list[str]]], kind: str = "lanes") -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name, _ in columns)
    rows = zip(*(cells for _, cells in columns), strict=True)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<table class="{kind}">\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>'


def _figure(name: str, source: str) -> str:
    caption = CAPTIONS.get(name, name)
    return (
        f'<figure><img src="{escape(source)}" alt="{escape(caption)}">\n'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _kernel(facts: Mapping[str, str]) -> str:
    return f"<h2>What the kernel alone predicts</h2>\n{_pairs(facts)}" if facts else ""


def _certificate(certificate: Certificate | None) -> str:
    """Return the section on the theorems: a table of all bounds, and what they assume."""
    if certificate is None:
        return ""
    columns = [(name, list(cells)) for name, *cells in zip(HEAD, *certificate.rows(), strict=True)]
    assumptions = "\n".join(f"<li>{escape(text)}</li>" for text in certificate.assumptions())
    return (
        f"<h2>The theorems</h2>\n<p>{escape(headline(certificate).capitalize())}. Each bound takes its constants from "
        "the flow itself, and is shown at the time where it is closest to what was measured; “-” means that the "
        f'assumptions fail or are not known.</p>\n<div class="wide">{_table(columns, "claims")}</div>\n'
        f"<details><summary>What they assume</summary>\n<ul>\n{assumptions}\n</ul>\n</details>"
    )


def _notes(notes: tuple[str, ...]) -> str:
    if not notes:
        return ""
    return "<h2>Notes</h2>\n<ul>\n" + "\n".join(f"<li>{escape(note)}</li>" for note in notes) + "\n</ul>"


def _text(value: Any) -> str:
    if value is None:
        return "not given"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_text(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_text(item) for item in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
