"""`make mutants`: how many of the faults are caught; exit code 1 unless all are."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence

from tests.mutants.catalogue import MUTANTS
from tests.mutants.runner import FAILED, PASSED, Mutant, import_libraries, run_all, run_tests


def out_of_date(mutants: Sequence[Mutant]) -> list[str]:
    """What has to be changed in the list before it says anything."""
    reasons = [reason for mutant in mutants if (reason := mutant.stale())]
    places = Counter((mutant.file, mutant.old) for mutant in mutants)
    return reasons + [f"{f}: {old!r} is listed twice" for (f, old), n in places.items() if n > 1]


def main(words: list[str]) -> int:
    chosen = [m for m in MUTANTS if not words or any(w in m.file + m.breaks for w in words)]
    stale = out_of_date(chosen)
    if stale or not chosen:
        print("the list of mutants is out of date (tests/mutants/catalogue.py):", file=sys.stderr)
        print("\n".join(stale or ["nothing is chosen"]), file=sys.stderr)
        return 2
    began = time.monotonic()
    import_libraries()
    # Tests that fail anyway would catch everything.
    tests = sorted({test for mutant in chosen for test in mutant.tests})
    print(f"{len(tests)} tests without any mutant ...", flush=True)
    ask = run_tests(tests, None)
    while (verdict := ask()) is None:
        time.sleep(0.1)
    if verdict.code != PASSED:
        print(f"they fail without any mutant:\n{verdict.output}", file=sys.stderr)
        return 2
    print(f"they pass, in {verdict.seconds:.0f} s", flush=True)
    caught = 0
    for mutant, verdict in run_all(chosen):
        caught += verdict.code == FAILED
        word = {PASSED: "SURVIVED", FAILED: "caught"}.get(verdict.code, "BROKEN")
        print(f"{word:8} {verdict.seconds:5.1f} s  {mutant.file}: {mutant.breaks}", flush=True)
        if verdict.code != FAILED:
            print(f"         tests: {' '.join(mutant.tests)}", flush=True)
            print("\n".join(verdict.output.splitlines()[-15:]), flush=True)
    seconds = time.monotonic() - began
    print(f"{caught} of {len(chosen)} mutants caught ({caught / len(chosen):.0%}), {seconds:.0f} s")
    return 0 if caught == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
