"""Faults that a user would be misled by, put into `common` one at a time: which ones does no test notice?

`python -m tests.mutants` tries them all and names the survivors (about an hour); `python -m tests.mutants word …` those
whose name holds one of the words. They stand in mutants.yaml; each runs the tests that should care.
"""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import yaml

from common import ROOT

LIMIT = 600  # seconds; the tests of a fault that makes somebody wait for ever count as failed


def noticed(mutant: dict) -> tuple:
    """(name, whether its tests fail, the first that does or what went wrong, seconds)."""
    started = time.monotonic()
    module, function = mutant["where"].split(":")
    fault = json.dumps(dict(module=module, function=function, old=mutant["old"], new=mutant["new"]))
    paths = os.pathsep.join([str(ROOT / "tests" / "mutant_site"), str(ROOT)])
    environment = os.environ | dict(WORKBOOK_MUTANT=fault, PYTHONPATH=paths, OMP_NUM_THREADS="1")
    words = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--no-header", *mutant["tests"].split()]
    try:
        result = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return mutant["name"], True, f"its tests did not end within {LIMIT} s", LIMIT
    lines = result.stdout.splitlines() + result.stderr.splitlines()
    first = next((line for line in lines if line.startswith(("FAILED", "ERROR"))), lines[-1] if lines else "no output")
    if result.returncode not in (0, 1):  # a fault that is not there, or no tests
        first = f"could not be tried: {' '.join(lines[-3:])}"
    return mutant["name"], result.returncode == 1, first[:150], time.monotonic() - started


def main(words):
    known = yaml.safe_load((ROOT / "tests" / "mutants.yaml").read_text(encoding="utf-8"))
    chosen = [m for m in known if not words or any(word in m["name"] for word in words)]
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) - 1)) as pool:
        survivors = []
        for name, seen, first, seconds in pool.map(noticed, chosen):
            print(f"{'noticed ' if seen else 'SURVIVES'} {name} ({seconds:.0f} s): {first}", flush=True)
            survivors += [] if seen else [name]
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} noticed; survivors: {', '.join(survivors) or 'none'}")
    return len(survivors)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) > 0)
