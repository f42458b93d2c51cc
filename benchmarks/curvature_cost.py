"""What a product with the Hessian costs, and eigenvalues, trace and density made of them.

    python benchmarks/curvature_cost.py                       # everything, about an hour
    python benchmarks/curvature_cost.py --workers jax torch --items product top5
    python benchmarks/curvature_cost.py --quick               # does it run at all?

Method:

- The problem: a CNN with BatchNormalization and 124,554 weights, trained for 40 steps on the
  digits of scikit-learn, scaled up to 32x32x3; the cross-entropy of 512 of them in inference mode,
  float32. It is trained once, and all workers get the same weights. True eigenvalues are those of
  keras_sharp at residuals below 3e-5, on the first backend that is installed: the peers confirm
  them in the column `error`.
- One worker process per backend and peer, pinned to one core, so that the CPU time of the process
  is the work that was done. All are alive at once, and run one item each in turn, in reversed order
  on odd rounds. Each item but the long ones runs once before the first round, uncounted: it
  compiles.
- `gradients` is the median over the rounds of item / gradient, both of the same worker and round;
  the smallest and the largest follow. Gradients differ from framework to framework: look at the CPU
  time as well.
- The products of keras_sharp share one pass through the network; `first_product` is that pass, two
  evaluations of the loss that check it, and one product. `product_anew` is a product with several
  batches, which repeats the pass each time and keeps nothing. The other figures of keras_sharp are
  without the pass, those of the peers with all that they set up.
- `bare_jax` is the same network in JAX without Keras: what JAX itself takes for a gradient, and for
  a product by `jax.linearize`.
- Seeds are the numbers of the rounds. `products` and `error`, of the worst eigenvalue, are the
  largest of all rounds.

The workers are in `curvature_workers.py`.
"""

import argparse
import multiprocessing
import os
import pathlib
import statistics
import sys
import tempfile

import curvature_workers as workers
from step_cost import TIE, facts, progress, save, spread, verdict

#: Targets in gradients of the same worker.
TARGETS = {
    "tensorflow": {"product": 2.6},
    "jax": {"product": 1.6, "top5": 26, "trace": 160, "hutch_plus_plus": 160, "density": 70},
    "torch": {"product": 2.6, "top5": 45, "trace": 260, "hutch_plus_plus": 260, "density": 105},
}
#: Targets for the number of products, wherever keras_sharp runs.
PRODUCTS = {"top5": 17, "top1": 8}
PEERS = ("pyhessian", "hessian-eigenthings", "curvlinops-for-pytorch", "scipy", "scikit-learn")


def main():
    """Measure what the command line asks for, print the table, write the results."""
    options = parse_arguments()
    results = {"facts": facts(options, PEERS), "blocks": [], "problems": []}
    measure(results, options)
    save(results, options)
    print(report(results))
    return 1 if any(p["kind"] == "error" for p in results["problems"]) else 0


def parse_arguments():
    """The options, with what `--quick` stands for filled in."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    items = workers.QUICK + workers.LONG
    add("--workers", nargs="+", choices=workers.WORKERS, default=list(workers.WORKERS))
    add("--items", nargs="+", choices=items, help="default: all; the gradient always runs")
    add("--rounds", type=int, default=7)
    add("--core", type=int, default=max(os.sched_getaffinity(0)), help="default: the last one")
    add("--quick", action="store_true", help="one round without the long items")
    add("--output", type=pathlib.Path, help="write all raw figures to this JSON file")
    options = parser.parse_args()
    options.rounds = 1 if options.quick else options.rounds
    options.items = options.items or (workers.QUICK if options.quick else items)
    return options


def measure(results, options):
    """Run the rounds and append every figure to `results`."""
    running, turns = {}, []
    with tempfile.TemporaryDirectory() as folder:
        problem = str(pathlib.Path(folder) / "problem.npz")
        first = workers.WORKERS[options.workers[0]].backend
        progress(f"training on {first}")
        trainer = start(workers.make_problem, problem, first, options.core)
        trainer.join()
        try:
            for name in options.workers:
                progress(f"{name}: importing and building")
                ours, theirs = multiprocessing.Pipe()
                process = start(workers.serve, theirs, name, problem, options.core)
                theirs.close()
                running[name] = (process, ours)
                kind, answer = receive(ours)
                if kind != "ready":
                    note(results, name, "all", kind, answer)
                    continue
                for item in answer:
                    if item == "gradient" or item in options.items:
                        turns.append((name, item))
                        if item not in workers.LONG:  # The others have compiled what these need.
                            progress(f"{name} {item}: once, uncounted")
                            ask(results, running, name, item, 0)
            failed = {(p["worker"], p["item"]) for p in results["problems"]}
            turns = [turn for turn in turns if turn not in failed]
            for number in range(options.rounds):
                save(results, options)
                progress(f"round {number + 1} of {options.rounds}")
                for name, item in turns if number % 2 == 0 else reversed(turns):
                    figures = ask(results, running, name, item, number)
                    if figures:
                        block = {"worker": name, "item": item, "round": number, **figures}
                        results["blocks"].append({**block, "load": os.getloadavg()[0]})
        finally:
            for process, _ in running.values():
                process.terminate()
                process.join()


def start(target, *args):
    """A process of its own, which starts from nothing."""
    process = multiprocessing.get_context("spawn").Process(target=target, args=args, daemon=True)
    process.start()
    return process


def receive(connection):
    """The answer of a worker."""
    try:
        return connection.recv()
    except (EOFError, OSError):
        return "error", "The process ended."


def ask(results, running, name, item, number):
    """The figures of one run of an item, or `None`."""
    _, connection = running[name]
    try:
        connection.send((item, number))
        kind, answer = receive(connection)
    except OSError:
        kind, answer = "error", "The process ended."
    if kind == "done":
        return answer
    note(results, name, item, kind, answer)
    return None


def note(results, worker, item, kind, text):
    """Remember why there is no figure; a peer that is not installed is no error."""
    problem = {"worker": worker, "item": item, "kind": kind, "text": text}
    if problem not in results["problems"]:
        results["problems"].append(problem)
    progress(f"{worker} {item}: {kind}: {text}")


def report(results):
    """The results as Markdown."""
    known, blocks = results["facts"], results["blocks"]
    versions = ", ".join(f"{name} {version}" for name, version in known["versions"].items())
    loads = [block["load"] for block in blocks] or [known["load"][0]]
    lines = [
        f"{known['cpu']}, {known['cores']} cores, one used; load {min(loads):.1f} to "
        f"{max(loads):.1f}. Python {known['python']}, {versions}. {known['date']}.",
        "",
        "| worker | item | CPU ms | gradients (min-max) | target | | products | error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows = {}  # (worker, item) -> round -> figures
    for block in blocks:
        rows.setdefault((block["worker"], block["item"]), {})[block["round"]] = block
    for (worker, item), rounds in rows.items():
        gradient = rows.get((worker, "gradient"), {})
        ratios = [b["cpu_s"] / gradient[n]["cpu_s"] for n, b in rounds.items() if n in gradient]
        milliseconds = 1e3 * statistics.median(b["cpu_s"] for b in rounds.values())
        limit = TARGETS.get(worker, {}).get(item)
        products = max((b["products"] for b in rounds.values() if "products" in b), default="")
        if worker in TARGETS and item in PRODUCTS:
            products = f"{products} [{PRODUCTS[item]}]"
        worst = [b["error"] for b in rounds.values() if "error" in b]
        lines.append(
            f"| {worker} | {item} | {milliseconds:.0f} | {spread(ratios)} "
            f"| {'' if limit is None else limit} | {verdict(ratios, limit, TIE)} | {products} "
            f"| {f'{max(worst):.1e}' if worst else ''} |"
        )
    for problem in results["problems"]:
        lines += [
            "",
            f"- {problem['worker']} {problem['item']}: {problem['kind']}: {problem['text']}",
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
