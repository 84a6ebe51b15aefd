"""What a lesson may be: short cells, rendered tables, pictures with words, answers that are true."""

import ast
import json
import re
import statistics

import pytest
import torch

from common import ROOT, config, measure, models, optim, report, runs, slimming

LABS = ("Lab1", "Lab2", "Assignment_MobileNet")
PATHS = sorted(path for lab in LABS for path in (ROOT / lab).glob("*.ipynb"))
BOOTSTRAP = "common.enter(homes"
lessons = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def cells_of(path, kind):
    cells = json.loads(path.read_text())["cells"]
    return [("".join(c["source"]), c["metadata"]) for c in cells if c["cell_type"] == kind]


def words(text):
    """Words of a text cell; a formula is one, an address none."""
    text = re.sub(r"\$\$.*?\$\$", " formula ", text, flags=re.S)
    text = re.sub(r"\]\([^)]*\)|<[^>]*>", " ", text)
    return len(re.findall(r"\w[\w'’./%-]*", text))


@lessons
def test_cells_are_short(path):
    """Code cells: 20 lines of 88 columns (exercises and checks 28); text cells: 150 words."""
    cells = cells_of(path, "code")
    code = [source for source, told in cells if "nbgrader" not in told]
    lines = [line for source, _ in cells for line in source.splitlines()]
    assert max(len(source.splitlines()) for source in code) <= 20
    assert max(len(source.splitlines()) for source, _ in cells) <= 28
    assert not [line for line in lines if len(line) > 88 or "fmt:" in line]
    other = ("assert ", BOOTSTRAP, "scale: str")  # checks, and how a lesson begins
    rest = [source.splitlines() for source in code if not any(map(source.__contains__, other))]
    long = [sum(map(bool, lines)) for lines in rest if len(lines) > 1]
    assert statistics.median(long) <= 6, "half of the code cells are short"
    texts = [source for source, _ in cells_of(path, "markdown")][1:]
    assert not [text[:60] for text in texts if words(text) > 150]


@lessons
def test_what_is_folded_is_an_answer_or_a_hint(path):
    for text, metadata in cells_of(path, "markdown"):
        hint = text.startswith("<details><summary>Hint</summary>")
        assert ("<details" in text) == ("answer" in metadata or hint), text[:80]


@lessons
def test_a_picture_comes_soon_and_has_words(path):
    """At most 15 lines of code between the first cell's search and the first picture."""
    code = [source for source, _ in cells_of(path, "code")]
    start = next(i for i, source in enumerate(code) if BOOTSTRAP in source) + 1
    first = next(i for i, source in enumerate(code) if "lesson.figure(" in source)
    lines = "\n".join(code[start : first + 1]).splitlines()
    assert len([line for line in lines if line.strip()]) <= 15
    calls = [node for source in code for node in ast.walk(ast.parse(source))]
    calls = [node for node in calls if isinstance(node, ast.Call)]
    named = [node for node in calls if ast.unparse(node.func) == "lesson.figure"]
    assert named and all(len(node.args) == 3 for node in named)
    assert not [source for source in code if "print(report.table" in source or "_ = plots" in source]


def test_every_lesson_begins_and_ends_alike():
    searches = {source for path in PATHS for source, _ in cells_of(path, "code") if BOOTSTRAP in source}
    assert len(searches) == 1 and len(searches.pop().splitlines()) <= 15
    for path in PATHS:
        code = [source for source, _ in cells_of(path, "code")]
        assert f's = lesson.start("{path.stem}", globals())' in "\n".join(code)
        assert "lesson.finish(" in code[-1]


NUMBER = re.compile(r"(?<![\w.,^-])[+−–-]?\.?\d[\d,]*(?:\.\d+)?")
ANSWERS = [(path, text, metadata) for path in PATHS for text, metadata in cells_of(path, "markdown") if "answer" in metadata]
answers = pytest.mark.parametrize("path,text,metadata", ANSWERS, ids=[f"{path.stem}-{i}" for i, (path, *_) in enumerate(ANSWERS)])
SOURCE = re.compile(r"^\*?(?:Runs?: |From |Computed in this lesson)[^*]*\*?$|\*(?:Runs?: |From |Computed in)[^*]*\*", re.M)


def numbers_of(text):
    """Numbers of an answer, as written; not those of formulas, names in `code`, and n = 1."""
    text = re.sub(r"\$\$.*?\$\$|\]\([^)]*\)|`[^`]*[A-Za-z][^`]*`", " ", text, flags=re.S)
    text = re.sub(r"\$([^$]*)\$", lambda found: found[1] if re.fullmatch(r"[\d.,+−-]*", found[1]) else " ", text)
    text = SOURCE.sub(" ", text).replace("$", " ").replace("`", " ")
    text = re.sub(r"\bn = \d\b|CIFAR-100?\b|ResNet-\d+|VGG-1\d|\bL[12]\b|\bLabs? [12]\.[1-5]\b|\bLab [12]\b", " ", text)
    text = re.sub(r"\((?:19|20)\d\d\)|, (?:19|20)\d\d\b|\d+ ?× ?\d+(?= pixels| convolutions)|16-bit|\b\de-\d\b", " ", text)
    return [number.rstrip(",") for number in NUMBER.findall(text)]


def history(name):
    """Rows of a run's recorded curve, numbers as numbers."""
    lines = (ROOT / "reports" / "runs" / f"{name}.csv").read_text().splitlines()
    keys, *rows = [line.split(",") for line in lines]
    return [{key: float(v) for key, v in zip(keys, row) if v} for row in rows]


def manifest(name):
    return runs.read_manifest(ROOT / "reports" / "runs" / f"{name}.json")


def seeds(*names, key="test"):
    """Accuracies of several runs, in percent."""
    return [100 * manifest(name)[key]["accuracy"] for name in names]


def best(name):
    """Validation accuracy of a run's best epoch, in percent."""
    return 100 * manifest(name)["best"]["val_accuracy"]


def macs(name, size=32, **arguments):
    return measure.macs(models.build(name, **arguments), size)


def params(name, **arguments):
    return measure.params(models.build(name, **arguments))


def measured(name, key):
    """What was measured of a run, by the beginning of its key."""
    return next(kept["found"] for k, kept in manifest(name)["measured"].items() if k.startswith(key))


def swept(name, ratio):
    """The row of a run's sweep at a ratio."""
    return next(row for row in measured(name, "sweep") if row["ratio"] == ratio)


def mean(values):
    return sum(values) / len(values)


def gammas(name, stage=None):
    """|gamma| of a recorded network's inner channels: of all stages, or of one, from 0."""
    found = slimming.gammas(runs.load_model(ROOT / "reports" / "weights" / f"{name}.pt"))
    return torch.cat(found if stage is None else [found[stage]]).detach().abs()


def reach(images, **settings):
    """How far a training's L1 penalty can move a gamma that the loss does not defend."""
    told = config.TrainConfig(**settings)
    steps = -(-images // told.batch_size) * told.epochs
    peak = told.lr_gamma * (told.lr_other if told.optimizer == "muon" else told.lr)
    rates = (peak * optim.lr_factor(t, steps, 0, told.schedule) for t in range(steps))
    return told.lam / (1 - told.momentum) * sum(rates)


KNOWN = [history, manifest, measured, swept, seeds, best, macs, params, gammas, reach, mean]
KNOWN += [min, max, sum, abs, round, len, sorted, next]
KNOWN = {function.__name__: function for function in KNOWN} | dict(paired=None, report=report)


@answers
def test_an_answer_is_short_and_its_numbers_are_true(path, text, metadata):
    """At most 120 words and six numbers; each is computed again from the runs, and rounded."""
    assert text.startswith("<details>") and text.rstrip().endswith("</details>"), "a cell of its own"
    kept = metadata["answer"]
    assert text.count("</summary>") == 1
    text = text.partition("</summary>")[2]
    assert words(text) <= 120
    found = numbers_of(text)
    assert set(found) == set(kept) and len(kept) <= 6, (found, list(kept))
    named = " ".join(SOURCE.findall(text))
    assert named, "where it is from"
    for number, formula in kept.items():
        if formula.startswith("source: "):
            place = re.search(r"reports/[\w/.]+\.md", formula)
            assert not place or number in (ROOT / place[0]).read_text(), f"{number} is not in {place[0]}"
        else:
            assert re.search(r"[(*/+-]", formula), "a formula, not the number once more"
            digits = len(number.partition(".")[2])
            value = eval(formula, {"__builtins__": {}}, dict(KNOWN))
            shown = f"{value:+,.{digits}f}" if number[0] in "+−-" else f"{value:,.{digits}f}"
            assert shown.replace("-", "−") == number.replace("-", "−"), (number, value)
