"""The house: imports run downwards, and no room grows beyond what a reader holds in their head."""

import ast

import pytest

from common import ROOT

# From top to bottom; a room imports only rooms of lower rows.
ROWS = (
    ("course", "doctor"),
    ("pages", "classroom", "grading"),
    ("lesson",),
    ("widgets", "exercise"),
    ("sweep",),
    ("cli",),
    ("train",),
    ("report", "measure", "storage"),
    ("optim", "runs"),
    ("config", "evaluate"),
    ("slimming", "data"),
    ("models", "augment"),
    ("params", "sources", "competition"),
    ("mirrors",),
    ("plots", "__init__"),
)
LEVEL = {room: -row for row, rooms in enumerate(ROWS) for room in rooms}
FILES = sorted((ROOT / "common").rglob("*.py"))
BYTES = 211_000  # all rooms but models/


def room_of(path):
    return path.relative_to(ROOT / "common").parts[0].removesuffix(".py")


def imported(tree):
    """Rooms that a file imports, each with its line; those of a `__main__` block do not count."""
    tops = [node for node in tree.body if "__main__" not in ast.unparse(node).split("\n")[0]]
    for node in (inner for top in tops for inner in ast.walk(top)):
        if isinstance(node, ast.ImportFrom) and node.module == "common":
            for alias in node.names:
                yield alias.name if alias.name in LEVEL else "__init__"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("common."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("common."))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downwards(path):
    room = room_of(path)
    assert room in LEVEL, "a new room needs a place in the house"
    above = [other for other in imported(ast.parse(path.read_text())) if other != room]
    above = [other for other in above if LEVEL[other] >= LEVEL[room]]
    assert not above, f"{room} imports {above}, which do not lie below it"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_is_small(path):
    text = path.read_text()
    lines = text.split("\n")
    wide = [number for number, line in enumerate(lines, 1) if len(line) > 100]
    assert not wide, f"lines of over 100 characters: {wide}"
    assert len(lines) <= 261, "more than 260 lines"
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)]
    long = [n.name for n in functions if n.end_lineno - n.lineno >= 60]
    assert not long, f"functions of over 60 lines: {long}"


def test_the_house_is_small():
    size = sum(path.stat().st_size for path in FILES if room_of(path) != "models")
    assert size <= BYTES, f"common/ without models/ has {size:,} bytes: what can go?"
