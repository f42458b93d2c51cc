"""The first cases of the fuzzer: see `tests/fuzz/`. `make fuzz` tries a thousand others."""

import pytest

from tests.fuzz import fuzzer, known
from tests.fuzz.cases import NEWER_FROM, generate, lean, sensible
from tests.models import BACKEND

#: Each group tells of all its failures.
GROUPS = [range(first, first + 4) for first in (0, 4, 8, NEWER_FROM, NEWER_FROM + 4)]


@pytest.mark.slow
@pytest.mark.parametrize("seeds", GROUPS, ids=lambda seeds: f"seeds {seeds[0]} to {seeds[-1]}")
def test_random_programs_train_as_plain_keras_and_the_formulas_say(seeds):
    failures = []
    for seed in seeds:
        case, _ = known.avoid(sensible(lean(generate(seed))))
        text, _ = fuzzer.failure_of(case)
        if text is not None:
            line = f"python -m tests.fuzz --backend {BACKEND} --start {seed} --cases 1 --lean"
            failures.append(f"{text}\nrepeat: {line}")
    assert not failures, "\n\n".join(failures)
