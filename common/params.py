"""Is a value legal? Rules for settings, names, files, and parameters of notebooks."""

import math
import re
from pathlib import Path

import numpy as np
import yaml

from common import WorkbookError, choose

SCALES = ("quick", "laptop", "full")


def one_of(legal):
    return lambda name, value: choose(name, value, legal)


def number(
    low=-math.inf,
    high=math.inf,
    below=math.inf,
    kind=(int, float, np.integer, np.floating),
    what="a number",
):
    """A rule for low ≤ value ≤ high, value < below; booleans, strings and nan are rejected."""
    limits = {">=": low, "<=": high, "<": below}
    legal = " and ".join(f"{sign} {v}" for sign, v in limits.items() if math.isfinite(v))

    def rule(name, value):
        fits = isinstance(value, kind) and not isinstance(value, bool)
        if not fits or not low <= value <= high or not value < below:
            raise WorkbookError(f"{name}={value!r} is not legal; give {what} {legal}".rstrip())

    return rule


def whole(low=-math.inf, high=math.inf):
    return number(low, high, kind=(int, np.integer), what="a whole number")


def text(name, value):
    if not isinstance(value, str):
        advice = f"give a text in quotes, with papermill: -r {name} {value}"
        raise WorkbookError(f"{name}={value!r} is not legal; {advice}")


def switch(name, value):
    if not isinstance(value, bool):
        raise WorkbookError(f"{name}={value!r} is not legal; give True or False")


def name(name, value):
    """A rule for what becomes a part of a file's or folder's name."""
    if not isinstance(value, str) or not re.fullmatch(
        r"(?=.{1,150}$)[\w.-]*\w[\w.-]*", value, re.ASCII
    ):
        legal = "letters, digits, '.', '-', '_', 150 at most"
        raise WorkbookError(f"{name}={value!r} is not legal; give {legal}")


def texts(name, values):
    """A rule for a list of texts, which may be empty."""
    if not isinstance(values, (list, tuple)) or not all(isinstance(each, str) for each in values):
        raise WorkbookError(f'{name}={values!r} is not legal; give a list, as in ["flip"]')


def mapping(legal):
    """A rule for a mapping with keys from `legal`; papermill takes one with -y or -f."""

    def rule(name, value):
        if not isinstance(value, dict):
            way = f'with papermill as -y "{name}: {{key: value}}"'
            raise WorkbookError(f"{name}={value!r} is not legal; give a mapping, {way}")
        for key in value:
            choose(f"key of {name}", key, legal)

    return rule


def optional(rule):
    """The same rule, with None allowed."""
    return lambda name, value: value is None or rule(name, value)


def several(rule):
    """The same rule for each value of a list that is not empty."""

    def check_each(name, values):
        if not isinstance(values, (list, tuple)) or not values:
            raise WorkbookError(f"{name}={values!r} is not legal; give a list, as in [1, 2]")
        for value in values:
            rule(name, value)

    return check_each


class UniqueKeys(yaml.SafeLoader):
    """YAML in which a key given twice is a mistake; YAML itself would keep the second.

    As in YAML 1.2, `no` and `off` are texts, 5e-2 is a number, and 012 is twelve.
    """

    yaml_implicit_resolvers = {}

    def construct_mapping(self, node, deep=False):
        own = [key for key, _ in node.value if key.value != "<<"]  # that merges another mapping
        keys = [str(self.construct_object(key, deep=True)) for key in own]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"{key!r} is a duplicate; rename or remove one")
        return super().construct_mapping(node, deep)


for tag, form, first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?\d+", list("-+0123456789")),
    ("float", r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?|[-+]?\.inf|\.nan", list("-+.0123456789")),
    ("merge", r"<<", ["<"]),
):
    UniqueKeys.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"^({form})$"), first)
UniqueKeys.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))


def read_yaml(path):
    """What a YAML file holds; raises WorkbookError where it cannot be read."""
    try:
        return yaml.load(Path(path).read_text(encoding="utf-8"), UniqueKeys)
    except (OSError, ValueError, KeyError, yaml.YAMLError) as error:
        raise WorkbookError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
