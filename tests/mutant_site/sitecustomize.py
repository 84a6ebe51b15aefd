"""Python reads this at every start, where this folder is on PYTHONPATH: puts one fault into `common`."""

import ast
import importlib.machinery
import json
import os
import sys


class Loader(importlib.machinery.SourceFileLoader):
    """Loads one module with a piece of one function exchanged."""

    fault = {}

    def get_data(self, path):
        data = super().get_data(path)
        return changed(data.decode(), **self.fault).encode() if path.endswith(".py") else data

    def get_code(self, fullname):  # never from the cache, and never into it
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)


def changed(source, function, old, new, **_):
    """The module's text with `old` exchanged for `new` in the function (or Class.method)."""
    body = ast.parse(source).body
    for name in function.split("."):
        node = next(node for node in body if getattr(node, "name", None) == name)
        body = node.body
    lines = source.split("\n")
    start, end = node.lineno - 1, node.end_lineno
    text = "\n".join(lines[start:end])
    if text.count(old) != 1:
        sys.exit(f"mutant: {old!r} stands {text.count(old)} times in {function}, not once")
    return "\n".join([*lines[:start], text.replace(old, new), *lines[end:]])


class Finder(importlib.machinery.PathFinder):
    """Finds modules as Python does, but gives the one with the fault our loader."""

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        if fullname != Loader.fault["module"]:
            return None
        spec = super().find_spec(fullname, path, target)
        if spec and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = Loader(fullname, spec.origin)
        return spec


if "WORKBOOK_MUTANT" in os.environ:
    Loader.fault = json.loads(os.environ["WORKBOOK_MUTANT"])
    sys.meta_path.insert(0, Finder)
