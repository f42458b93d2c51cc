"""What works on which backend: counted in the reports of the tests, and written into the docs.

    make test                  # all of it: the reports lie in build/reports
    python tests/features.py   # the table of README.md

A feature is a pattern for the names of tests; a cell is how many of them passed on a backend.
Nothing is written if one failed, or if a report holds a part of the tests only.
"""

import pathlib
import re
import sys
import xml.etree.ElementTree as ElementTree

ROOT = pathlib.Path(__file__).resolve().parent.parent
REPORTS = ROOT / "build" / "reports"
PAGES = [ROOT / "README.md"]
BACKENDS = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch"}

#: A pattern for `file::test[parameters]`, by feature.
FEATURES = {
    "every method, in every region: the ten promises": r"test_every_method::",
    "Sequential, Functional, subclassed; nested inputs and outputs": (
        r"::test_every_kind_of_model|nested_inputs|::test_outputs_are_known"
    ),
    "BatchNormalization and dropout: one move, the same masks": (
        r"batchnorm|_masks|::test_the_seed_advances|dropout"
    ),
    "regularizers, `add_loss`, sample and class weights, masks": (
        r"regularizer|add_loss|sample_weights|class_weights|masks_reach|masked"
    ),
    "float16 and bfloat16, loss scaling": r"test_precision::",
    "micro-batches (m-sharpness)": r"test_micro_batches::",
    "gradient accumulation, clipping, EMA, constraints": (
        r"clipping|averaged_weights|constraints_hold|accumul"
    ),
    "LoRA, frozen weights": r"lora|frozen",
    "`jit_compile`, eager, `steps_per_execution`": (
        r"compiled_and_eager|steps_per_execution|nothing_is_compiled|compiles_"
    ),
    "arrays, `tf.data`, `DataLoader`, `PyDataset`": r"::test_any_source_of_data",
    "a model of each zoo layer, second derivatives": r"test_zoo::",
    "saving, loading, resuming": r"test_saving::|test_backup::",
    "callbacks and probes": r"test_callbacks::|test_probes::",
    "policies; LookSAM, ESAM, Momentum-SAM and their like": r"test_cheaper::",
    "KerasHub tasks": r"test_keras_hub::",
    "KerasTuner": r"test_keras_tuner::",
    "eigenvalues, trace, density; sharpness": r"test_curvature::|test_sharpness::",
    "`MirroredStrategy`": r"\[mirrored",
    "`MultiWorkerMirroredStrategy`": r"\[workers",
    "`keras.distribution.DataParallel`": r"\[data_parallel|\[processes.*jax",
    "`keras.distribution.ModelParallel`": r"\[model_parallel",
    "several processes of `jax.distributed`, `torchrun`": r"\[processes|\[ddp",
}

TABLE = re.compile(r"(<!-- tests: what works -->\n).*?(<!-- end of tests -->)", re.DOTALL)


def outcomes(backend):
    """The outcome of each test in the report of a backend, by its name."""
    path = REPORTS / f"{backend}.xml"
    if not path.exists():
        sys.exit(f"There is no report of {backend} in {path.parent}. Run `make test` first.")
    found = {}
    for case in ElementTree.parse(path).iter("testcase"):
        name = f"{case.get('classname').removeprefix('tests.')}::{case.get('name')}"
        if case.find("failure") is not None or case.find("error") is not None:
            found[name] = "failed"
        else:
            found[name] = "passed" if case.find("skipped") is None else "skipped"
    return found


def count(found, pattern):
    """How many tests of a feature passed."""
    matching = [name for name in found if re.search(pattern, name)]
    failed = [name for name in matching if found[name] == "failed"]
    if failed:
        sys.exit(f"Failed: {failed}. Nothing was written.")
    return sum(found[name] == "passed" for name in matching)


def table():
    """The table, as Markdown."""
    found = {backend: outcomes(backend) for backend in BACKENDS}
    for backend, tests in found.items():
        if len(tests) < 1000:
            sys.exit(f"The report of {backend} holds {len(tests)} tests. Run all: `make test`.")
    rows = [f"| tests passed | {' | '.join(BACKENDS.values())} |", "|---|---|---|---|"]
    for feature, pattern in FEATURES.items():
        counts = [count(found[backend], pattern) for backend in BACKENDS]
        rows.append(f"| {feature} | {' | '.join(f'{n:,}' if n else '-' for n in counts)} |")
    return "\n".join(rows) + "\n"


def main():
    rows = table()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        page.write_text(TABLE.sub(lambda match: match[1] + rows + match[2], text), "utf-8")
    print(rows)


if __name__ == "__main__":
    main()
