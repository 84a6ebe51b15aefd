"""Checks of a notebook's parameters, since papermill passes strings through and only warns about unknown names."""

import ast
import math
import os
from pathlib import Path

from common import ROOT, WorkbookError, choose

SCALES = ("quick", "laptop", "full")
standard = False  # whether papermill runs the notebook with the settings of a scale as they stand


def check(namespace: dict, neutral: tuple = (), **rules) -> None:
    """Check a notebook's parameters: `check(globals(), scale=one_of(SCALES), epochs=optional(whole(1)))`.

    Every parameter has a rule from below. Sets `standard`, for which the `neutral` ones do not count; without papermill
    it is False, since a cell edited by hand does not tell what was changed. Raises WorkbookError for an illegal value,
    and for a name that papermill injected although the notebook has no such parameter.
    """
    for name in injected(namespace):
        choose("parameter", name, rules)
    for name, rule in rules.items():
        rule(name, namespace[name])
    global standard
    standard = "scale" in injected(namespace) and set(injected(namespace)) <= {"scale", *neutral}


def injected(namespace: dict) -> list:
    """Names assigned by papermill, which puts them into a cell of their own that starts with "# Parameters"."""
    cells = [cell for cell in namespace.get("In", ()) if cell.startswith("# Parameters")]
    statements = (node for cell in cells for node in ast.parse(cell).body if isinstance(node, ast.Assign))
    return [target.id for node in statements for target in node.targets if isinstance(target, ast.Name)]


def one_of(legal):
    return lambda name, value: choose(name, value, legal)


def number(low=-math.inf, high=math.inf, below=math.inf, kind=(int, float), what="a number"):
    """A rule for low ≤ value ≤ high, value < below; booleans, strings and nan are rejected."""

    def rule(name, value):
        if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high or not value < below:
            limits = [f"{text} {limit}" for text, limit in ((">=", low), ("<=", high), ("<", below)) if math.isfinite(limit)]
            raise WorkbookError(f"{name}={value!r} is not legal; give {what} {' and '.join(limits)}".rstrip())

    return rule


def whole(low=-math.inf, high=math.inf):
    return number(low, high, kind=int, what="a whole number")


def text(name, value):
    if not isinstance(value, str):
        raise WorkbookError(f"{name}={value!r} is not legal; give a text in quotes")


def switch(name, value):
    if not isinstance(value, bool):
        raise WorkbookError(f"{name}={value!r} is not legal; give True or False")


def mapping(legal):
    """A rule for a mapping with keys from `legal`; papermill takes one with -y or -f."""

    def rule(name, value):
        if not isinstance(value, dict):
            raise WorkbookError(f'{name}={value!r} is not legal; give a mapping, with papermill as -y "{name}: {{key: value}}"')
        for key in value:
            choose(f"key of {name}", key, legal)

    return rule


def optional(rule):
    """The same rule, with None allowed: "as the scale's table says"."""
    return lambda name, value: value is None or rule(name, value)


def several(rule):
    """The same rule for each value of a list that is not empty."""

    def check_each(name, values):
        if not isinstance(values, (list, tuple)) or not values:
            raise WorkbookError(f"{name}={values!r} is not legal; give a list, as in [1, 2]")
        for value in values:
            rule(name, value)

    return check_each


def settings(table: dict, scale: str, **overrides) -> dict:
    """The row of `table` for `scale`, with every override that is not None in its place."""
    return table[scale] | {name: value for name, value in overrides.items() if value is not None}


def runs_folder() -> Path:
    """Where runs are kept: $RUNS_DIR, relative to the repository, or `runs/` there."""
    return ROOT / os.environ.get("RUNS_DIR", "runs")
