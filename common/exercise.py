"""Did the student write it? What the checks of all exercises ask."""

import dis
import inspect
import sys
import types


def own(function) -> None:
    """Refuse what is no function or class, and one that calls `common/`; raises AssertionError.

    Looks into functions of the same notebook that it calls, but not behind tricks.
    """
    assert inspect.isroutine(function) or inspect.isclass(function), "this is no function or class"
    name, todo, seen = function.__name__, [function], set()
    while todo:
        each = todo.pop()
        each = getattr(each, "__func__", None) or getattr(each, "fget", None) or each
        if inspect.isclass(each):
            todo += [*vars(each).values(), *each.__bases__]
        if isinstance(each, types.FunctionType):
            todo += [each.__code__, *(each.__defaults__ or ())]
        if not inspect.iscode(each):
            _refuse(name, getattr(each, "__name__", name), each)
        elif each not in seen:
            seen.add(each)
            todo += each.co_consts
            notebook = sys.modules[function.__module__].__dict__
            steps = dis.get_instructions(each)
            for step in steps:
                if step.opname == "IMPORT_NAME":
                    _refuse(name, step.argval, sys.modules.get(step.argval))
                elif step.opname == "LOAD_GLOBAL":
                    value = notebook.get(step.argval)
                    _refuse(name, step.argval, value)
                    todo += [value] * (getattr(value, "__module__", "") == function.__module__)


def _refuse(function: str, word: str, value) -> None:
    """Refuse a module of `common`, and a function or class of one."""
    home = getattr(inspect.getmodule(value), "__name__", "")
    if home.split(".")[0] == "common":
        problem = f"{function} uses {word}, which has the working version"
        raise AssertionError(f"{problem}; write it yourself")
