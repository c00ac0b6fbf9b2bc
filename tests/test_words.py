"""The words of the package: American spelling, docstrings that open with a sentence, no private dialect."""

import ast
import io
import json
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Not itself, and not the table of old names.
SKIPPED = {"CHANGELOG.md"}

# Stems of British spellings, and the American word.
BRITISH = {
    r"optimis(e|er|ers|ed|es|ing|ation|ations)": "optimiz-",
    r"minimis(e|er|ers|ed|es|ing|ation)": "minimiz-",
    r"maximis(e|er|ers|ed|es|ing|ation)": "maximiz-",
    r"(un|re)?(parametr|parameter)is(e|ed|es|ing|ation)": "parameteriz-",
    r"(re)?lineari[s](e|ed|es|ing|ation|ations)": "lineariz-",
    r"(un)?normalis(e|er|ed|es|ing|ation)": "normaliz-",
    r"initialis(e|er|ed|es|ing|ation)": "initializ-",
    r"regularis(e|er|ed|es|ing|ation)": "regulariz-",
    r"generalis(e|ed|es|ing|ation)": "generaliz-",
    r"symmetris(e|ed|es|ing|ation)": "symmetriz-",
    r"vectoris(e|ed|es|ing|ation)": "vectoriz-",
    r"diagonalis(e|ed|es|ing|ation)": "diagonaliz-",
    r"orthogonalis(e|ed|es|ing|ation)": "orthogonaliz-",
    r"discretis(e|ed|es|ing|ation)": "discretiz-",
    r"factoris(e|ed|es|ing|ation)": "factoriz-",
    r"(re|mis)?organis(e|ed|es|ing|ation)": "organiz-",
    r"(un)?recognis(e|ed|es|ing)": "recogniz-",
    r"(summar|categor|serial|special|real|visual|util|equal|emphas|stabil|local)is(e|ed|es|ing|ation)": "-iz-",
    r"analys(e|ed|es(?= the| a)|ing)": "analyz-",
    r"centr(e|ed|es|ing)": "center",
    r"behaviour(s|al)?": "behavior",
    r"colour(s|ed|ing|map)?": "color",
    r"neighbour(s|ing|hood|hoods)?": "neighbor",
    r"favour(s|ed|ing|able|ite)?": "favor",
    r"honour(s|ed|ing)?": "honor",
    r"(label|model|cancel|travel|signal|channel)l(ed|ing|er)": "one l",
    r"grey(s|scale)?": "gray",
    r"learnt|spelt|burnt": "-ed",
    r"programme(s)?": "program",
    r"artefact(s)?": "artifact",
    r"catalogue(s|d)?": "catalog",
    r"licence(s)?": "license",
    r"defence|offence": "-se",
    r"metre(s)?|litre(s)?": "-er",
    r"whilst|amongst|towards": "while, among, toward",
    r"judgement": "judgment",
    r"fulfil(s)?": "fulfill",
    r"sceptic(al)?": "skeptic",
    r"acknowledgement": "acknowledgment",
}
SPELLING = re.compile(rf"\b({'|'.join(BRITISH)})\b", re.IGNORECASE)

# Words of a dialect of our own.
DIALECT = {
    r"beside": "next to, or compared with",
    r"mirrored": "symmetrized",
    r"an? (lane|seed|epoch|time|layer|sample|row|column|output|figure|step|program|update|image|theorem) each": "per",
    r"(one|once|a row|a program|a key|a number|an? \w+) an? (lane|epoch|seed)": "per",
    r"one an? (neuron|unit|class|output|target|leaf|parameter|sample|row|layer|figure|theorem|model)": "per",
    r"some minutes": "a few minutes",
    r"hold(s|ing)? (\w+ )?against": "check against",
}
PHRASES = re.compile(rf"\b({'|'.join(DIALECT)})\b", re.IGNORECASE)

# First words of a docstring that make it a fragment.
FRAGMENTS = (
    "Of|As|Those|These|Its|His|By|With|Without|From|For|In|On|At|To|Into|Where|Whose|Which|That|Than|And|Or|But|Nor|"
    "Both|All|Any|Some|Such|Same|Only|Not|No|Nothing|None|There|Here|So|If|Whether|Yes|How|What|Why|Who|When|Until|"
    "The same|The other|The one|An? other"
)
OPENINGS = re.compile(rf"^({FRAGMENTS})\b")


@cache
def sources() -> dict[str, str]:
    """Return the text of every file that people read, by its name: code, pages, and the Markdown of notebooks."""
    found = {}
    for pattern in ("src/**/*.py", "src/**/*.pyi", "examples/*.py", "benchmarks/*.py", "scripts/*.py"):
        found |= {_name(path): path.read_text(encoding="utf-8") for path in sorted(ROOT.glob(pattern))}
    for pattern in ("*.md", "docs/*.md", "benchmarks/*.md"):
        pages = [path for path in sorted(ROOT.glob(pattern)) if path.name not in SKIPPED]
        found |= {_name(path): path.read_text(encoding="utf-8") for path in pages}
    for path in sorted(ROOT.glob("notebooks/*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        found[_name(path)] = "\n".join("".join(c["source"]) for c in cells)
    return found


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tokens(name: str) -> list[tokenize.TokenInfo]:
    """Return the tokens of a file of code."""
    return list(tokenize.generate_tokens(io.StringIO(sources()[name]).readline))


@cache
def prose() -> list[tuple[str, str]]:
    """Return place and text of every line that is written for people: of code, its comments and strings."""
    found = []
    for name, text in sources().items():
        if name.endswith((".py", ".pyi")):
            texts = [(t.start[0], t.string) for t in tokens(name) if t.type in (tokenize.COMMENT, tokenize.STRING)]
        else:
            texts = [(1, text)]
        found += [(f"{name}:{n}", line) for start, text in texts for n, line in enumerate(text.splitlines(), start)]
    return found


def code() -> Iterator[str]:
    """Yield the names of the files of the package."""
    yield from (name for name in sources() if name.startswith("src/") and name.endswith(".py"))


@cache
def docstrings() -> list[tuple[str, str, ast.AST]]:
    """Return place, first line and owner of every docstring of functions and classes of the package."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return [
        (f"{name}:{node.body[0].lineno}", doc.partition("\n")[0], node)
        for name in code()
        for node in ast.walk(ast.parse(sources()[name]))
        if isinstance(node, kinds) and (doc := ast.get_docstring(node))
    ]


def is_property(node: ast.AST) -> bool:
    """Return whether a definition is an attribute to its readers."""
    return any("property" in ast.unparse(decorator) for decorator in getattr(node, "decorator_list", []))


def test_spelling_is_american():
    offenders = [f"{place} {match.group()}" for place, line in prose() for match in SPELLING.finditer(line)]
    assert not offenders, "\n".join(offenders)


def test_names_in_code_are_spelled_as_americans_do():
    offenders = {
        f"{name}:{token.start[0]} {token.string}"
        for name in code()
        for token in tokens(name)
        if token.type == tokenize.NAME and SPELLING.search(re.sub(r"_|(?<=[a-z])(?=[A-Z])", " ", token.string))
    }
    assert not offenders, "\n".join(sorted(offenders))


def test_phrases_are_plain():
    offenders = [f"{place} {match.group()}" for place, line in prose() for match in PHRASES.finditer(line)]
    assert not offenders, "\n".join(offenders)


def test_docstrings_open_with_a_sentence():
    offenders = [
        f"{place} {first}"
        for place, first, node in docstrings()
        if OPENINGS.match(first) and not (is_property(node) and first.startswith("Whether"))
    ]
    assert not offenders, "\n".join(offenders)


def test_public_functions_open_with_a_verb():
    nouns = re.compile(r"^(The|An?|Its|Each|Every|One|Two|Three|Half|Numbers?|Values?)\b")
    offenders = [
        f"{place} {first}"
        for place, first, node in docstrings()
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and nouns.match(first)
        if not is_property(node)
    ]
    assert not offenders, "\n".join(offenders)


def test_the_lint_sees_what_it_is_for():
    assert all(SPELLING.search(word) for word in ("Optimiser", "centred", "labelled", "behaviour", "catalogue"))
    assert not any(SPELLING.search(word) for word in ("optimizer", "center", "analysis", "noise", "precise", "centric"))
    assert all(PHRASES.search(text) for text in ("beside its tangent", "one a lane", "mirrored nets"))
    assert not any(PHRASES.search(text) for text in ("besides", "a lane diverges", "one per lane"))
    assert all(OPENINGS.match(text) for text in ("Of sizes", "The same, scaled", "Those that fail", "As the solver's"))
    assert not any(OPENINGS.match(text) for text in ("Return the sizes", "Offer", "Assert", "The scale alpha"))
