"""Exercises: the stub fails, the solution passes, usual wrong attempts fail with their own message."""

import ast
import json
import re
import sys
import textwrap
import types

import pytest

from common import classroom
from tests.attempts import ATTEMPTS
from tests.test_lessons import words

NOTEBOOKS = [path for paths in classroom.labs().values() for path in paths]
SOLUTION = re.compile(r"( *)### BEGIN SOLUTION\n(.*?) *### END SOLUTION\n?", re.S)
STUB = r"\1# YOUR CODE HERE\n\1raise NotImplementedError()\n"


def graded(path, **wanted):
    """Name → (source, metadata) of the cells of a notebook for nbgrader, in order."""
    found = {}
    for cell in classroom.cells_of(path):
        told = cell["metadata"].get("nbgrader", {})
        if told and all(told[key] == value for key, value in wanted.items()):
            found[told["grade_id"]] = "".join(cell["source"]), cell["metadata"]
    return found


EXERCISES = {name: (path, source) for path in NOTEBOOKS for name, (source, _) in graded(path, solution=True, grade=False).items()}
exercises = pytest.mark.parametrize("name", EXERCISES)
CASES = [(name, case) for name, cases in ATTEMPTS.items() for case in cases]


def imports(path):
    """The imports of a notebook: all that a check may need besides the exercise's own cell."""
    lines = []
    for cell in classroom.cells_of(path):
        if cell["cell_type"] == "code" and "common.enter" not in (source := "".join(cell["source"])):
            nodes = ast.parse(source).body
            lines += [ast.unparse(node) for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))]
    return "\n".join(lines)


def check(name, code):
    """Run an exercise's cell and its check; AssertionError, or what else it raises."""
    path, _ = EXERCISES[name]
    lesson = types.ModuleType("student")
    sys.modules["student"] = lesson
    for source in (imports(path), code, graded(path)[f"check-{name}"][0]):
        exec(compile(source, name, "exec"), lesson.__dict__)


def changed(source, case):
    """A solution with a wrong attempt in its place."""
    indent, inside = SOLUTION.search(source).groups()
    text = textwrap.dedent(inside)
    for old, new in [case[1:3], *case[4:]]:
        if old not in text:  # of several lines, whose first is in a block
            lines = [re.escape(line) for line in old.splitlines()]
            found = re.search(r"\n *".join(lines), text)
            assert found, f"{old!r} is not in the solution"
            pad = re.search(r"^ *", text[text.rfind("\n", 0, found.start()) + 1 :])[0]
            new = new.replace("\n", f"\n{pad}")
            old = found[0]
        text = text.replace(old, new)
    return SOLUTION.sub(lambda _: textwrap.indent(text, indent), source)


@exercises
def test_the_stub_fails_and_the_solution_passes(name, capsys):
    _, source = EXERCISES[name]
    with pytest.raises(NotImplementedError):
        check(name, SOLUTION.sub(STUB, source))
    check(name, source)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("name,case", CASES, ids=[f"{name}: {case[0]}" for name, case in CASES])
def test_a_wrong_attempt_fails_with_its_own_message(name, case):
    with pytest.raises(AssertionError) as failed:
        check(name, changed(EXERCISES[name][1], case))
    others = [other[3] for other in ATTEMPTS[name] if other is not case]
    assert case[3] in str(failed.value)
    assert not [other for other in others if other in str(failed.value)]


@exercises
def test_calling_the_working_version_is_no_solution(name):
    _, source = EXERCISES[name]
    indent = SOLUTION.search(source)[1]
    code = SOLUTION.sub(lambda found: f"{indent}from common import slimming\n{found[2]}", source)
    with pytest.raises(AssertionError, match="which has the working version; write it yourself"):
        check(name, code)


def test_there_are_enough_of_each():
    assert set(ATTEMPTS) == set(EXERCISES) and 10 <= len(EXERCISES) <= 12
    assert all(2 <= len(cases) <= 4 for cases in ATTEMPTS.values())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_an_exercise_has_what_it_needs(path):
    """Heading with minutes, difficulty and points; docstring; 3 to 15 lines; a hint; a check behind."""
    cells = classroom.cells_of(path)
    texts = ["".join(cell["source"]) for cell in cells]
    points = dict.fromkeys(re.findall(r"\| (\d) · ", texts[0]), 0)
    for i, cell in enumerate(cells):
        told = cell["metadata"].get("nbgrader", {})
        if told.get("solution") and not told["grade"]:
            heading, hint, after = texts[i - 1], texts[i + 1], cells[i + 2]["metadata"]["nbgrader"]
            assert after["grade_id"] == f"check-{told['grade_id']}" and after["locked"]
            found = re.search(r"### Exercise \d · .*\n(\d+) minutes · ●[●○]{2} · (\d) points", heading)
            assert int(found[2]) == after["points"]
            assert hint.startswith("<details><summary>Hint</summary>") and hint.rstrip().endswith("</details>")
            solution = SOLUTION.search(texts[i])[2]
            assert 2 <= len(solution.strip().splitlines()) <= 15 and '"""' in texts[i]
            assert texts[i + 2].splitlines()[0].startswith(("exercise.own(", "from ")) and "exercise.own(" in texts[i + 2]
        if told.get("solution") and told["grade"]:
            question = texts[i - 1]
            assert f"**Your answer** ({told['points']} point" in question, told["grade_id"]
            assert "Rubric: " in texts[i]
    total = sum(cell["metadata"]["nbgrader"].get("points", 0) for cell in cells if "nbgrader" in cell["metadata"])
    rows = re.findall(r"^\| \d · .*\| (\d*) \|$", texts[0], re.M)
    assert sum(int(row or 0) for row in rows) == total and points


def sentences(text):
    text = re.sub(r"<[^>]*>|\*\*", "", text.partition("</summary>")[2])
    return [each.strip() for each in re.split(r"(?<=[.:!?])\s+|\n", text) if len(each.strip()) >= 30]


@pytest.fixture(scope="module")
def edition(tmp_path_factory):
    pytest.importorskip("nbgrader")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RUNS_DIR", str(tmp_path_factory.mktemp("edition")))
        yield classroom.student("Lab2")


def test_a_students_folder_holds_no_solution_and_no_answer(edition):
    """No line of a solution of 30 characters or more, no sentence of an answer, but in common/."""
    files = [path for path in edition.rglob("*") if path.suffix in (".ipynb", ".md", ".yaml", ".json", ".py", ".txt")]
    files = [path for path in files if path.relative_to(edition).parts[0] != "common"]
    assert len([path for path in files if path.suffix == ".ipynb"]) == 3
    told = ["".join(cell["source"]) for path in files if path.suffix == ".ipynb" for cell in classroom.cells_of(path)]
    told = "\n".join(told + [path.read_text(encoding="utf-8") for path in files if path.suffix != ".ipynb"])
    secret = []
    for path in NOTEBOOKS:
        for source, _ in graded(path, solution=True, grade=False).values():
            secret += [line.strip() for line in SOLUTION.search(source)[2].splitlines() if len(line.strip()) >= 30]
        for source, _ in graded(path, solution=True, grade=True).values():
            secret += sentences(source)
    assert len(secret) > 80
    for path in edition.rglob("*.ipynb"):  # numbers of answers and how they are computed stand there
        assert not [cell for cell in classroom.cells_of(path) if "answer" in cell["metadata"]]
    assert not [line for line in secret if line in told]


def test_links_of_a_students_folder_lead_somewhere(edition):
    for path in edition.rglob("*.ipynb"):
        for cell in filter(lambda cell: cell["cell_type"] == "markdown", classroom.cells_of(path)):
            for link in re.findall(r"\]\(([^)#]+)\)", "".join(cell["source"])):
                assert link.startswith("http") or (path.parent / link).exists(), (path.name, link)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_hints_are_short_and_names_are_unique(path):
    names = [name for each in NOTEBOOKS for name in graded(each)]
    assert len(set(names)) == len(names)
    texts = ["".join(c["source"]) for c in json.loads(path.read_text())["cells"]]
    assert not [text for text in texts if text.startswith("<details><summary>Hint") and words(text) > 60]
