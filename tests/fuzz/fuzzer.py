"""Runs cases one after the other, in one process, and says what came out."""

import collections
import gc
import resource
import time
import traceback
import warnings

import keras

from tests.fuzz import known
from tests.fuzz.cases import Case, generate, lean, sensible, shrink
from tests.fuzz.oracles import Checker, check
from tests.models import BACKEND


def failure_of(case):
    """What is wrong with a case, as a text; `None` if nothing is. And whether it is unstable."""
    keras.utils.clear_session()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return None, check(case)
        except AssertionError as error:
            return str(error), False
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            last = str(error).strip().splitlines() or [""]
            text = f"{type(error).__name__}: {last[0][:300]} ({where.filename}:{where.lineno})"
            plain = _plain_error(case)
            if plain is not None:
                text += f"\nPlain Keras raises as well: {type(plain).__name__}."
            return text + "\n" + "".join(traceback.format_tb(error.__traceback__)[-12:]), False


def _plain_error(case):
    """What plain Keras raises when it trains the model of a case, or `None`."""
    try:
        Checker(case).plain()
    except Exception as error:
        return error
    return None


def of_seed(seed, is_lean=False):
    """The case of a seed. JAX compiles all of it: only every tenth is as large as elsewhere."""
    is_lean = is_lean or (BACKEND == "jax" and seed % 10 > 0)
    return sensible(lean(generate(seed))) if is_lean else generate(seed)


def kind_of(text):
    """What two failures have in common that are the same."""
    return text.split(":")[0]


def run(args):
    """Run all cases and print a summary: the exit status."""
    if args.case:
        seeds, cases = [args.start], [Case.from_json(args.case)]
    else:
        seeds = range(args.start, args.start + args.cases)
        cases = (of_seed(seed, args.lean) for seed in seeds)
    failed, unstable, covered = [], 0, collections.Counter()
    begin = last = time.perf_counter()
    for number, (seed, case) in enumerate(zip(seeds, cases, strict=True), 1):
        case, reasons = known.avoid(case)
        start = time.perf_counter()
        text, is_unstable = failure_of(case)
        unstable += is_unstable
        covered.update(case.features())
        covered.update(f"left out: {reason}" for reason in reasons)
        if text is not None:
            failed.append(seed)
            options = " --lean" if args.lean else ""
            report(seed, case, text, options, shrinks=not args.no_shrink)
        now = time.perf_counter()
        if now - start > 20:
            print(f"  seed {seed} took {now - start:.0f} s: {case.to_json()}", flush=True)
        if number % 20 == 0:
            gc.collect()
        if now - last > 30 or number == len(seeds):
            last = now
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            print(
                f"{BACKEND}: {number} of {len(seeds)} cases, {len(failed)} failed, {unstable} "
                f"unstable, {(now - begin) / number:.2f} s each, {memory:.1f} GiB",
                flush=True,
            )
        if number % 200 == 0:
            forget()
    print("\nWhat was tried:")
    for feature, count in sorted(covered.items()):
        print(f"  {feature:<40} {count}")
    print(f"\n{BACKEND}: {len(failed)} of {len(seeds)} cases failed: {failed}")
    return int(bool(failed))


def report(seed, case, text, options="", shrinks=True):
    """Print a failure, how to repeat it, and what is left of it."""
    print(f"\nFAILED: seed {seed}\n{text}")
    print(f"  repeat: python -m tests.fuzz --backend {BACKEND} --start {seed} --cases 1{options}")
    print(f"  case:   {case.to_json()}", flush=True)
    if not shrinks:
        return
    kind = kind_of(text)

    def fails(candidate):
        if known.avoid(candidate)[1]:
            return False
        found = failure_of(candidate)[0]
        return found is not None and kind_of(found) == kind

    small = shrink(case, fails)
    print(f"  shrunk: python -m tests.fuzz --backend {BACKEND} --case '{small.to_json()}'")
    print(f"  {failure_of(small)[0]}\n", flush=True)


def forget():
    """Let go of what was compiled, so that the memory of a long run stays flat."""
    keras.utils.clear_session()
    if BACKEND == "jax":
        import jax

        jax.clear_caches()
    gc.collect()
