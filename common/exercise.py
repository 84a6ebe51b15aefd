"""Did the student write it? What the checks of all exercises ask."""

import dis
import inspect
import sys


def own(function) -> None:
    """Refuse a student's function or class that calls `common/`; raises AssertionError."""
    code = [
        each.__code__ for each in (function, *vars(function).values()) if hasattr(each, "__code__")
    ]
    for each in code:  # with functions inside, to which the list grows
        code += [inner for inner in each.co_consts if inspect.iscode(inner)]
    globals_ = sys.modules[function.__module__].__dict__
    steps = [step for each in code for step in dis.get_instructions(each)]
    used = {step.argval for step in steps if step.opname in ("LOAD_GLOBAL", "IMPORT_NAME")}
    for word in used:
        home = getattr(inspect.getmodule(globals_.get(word)), "__name__", word)
        if home.split(".")[0] == "common":
            problem = f"{function.__name__} uses {word}, which has the working version"
            raise AssertionError(f"{problem}; write it yourself")
