"""What one sharpness-aware step costs, in units of one plain SGD step of the same model.

    python benchmarks/step_cost.py                      # everything, one to two hours
    python benchmarks/step_cost.py --workloads W2 --workers jax torch --rounds 3
    python benchmarks/step_cost.py --memory             # peak memory instead of time
    python benchmarks/step_cost.py --quick              # does it run at all?

Method:

- One worker process per framework and mode, pinned to one core, so that every
  framework computes with one thread and the CPU time of the process is the
  work that was done. Wall time stands in the raw results; other load on the
  machine moves it far more.
- All workers of a workload are alive at once. The driver runs one block of
  each contestant in turn, in reversed order on odd rounds, so that a slow
  phase of the machine meets all of them. A block is one call of `model.fit`
  on NumPy arrays, not shuffled and without metrics; the peers of PyTorch and
  JAX have no `fit` and run a bare loop over prepared batches. Two blocks of
  each run before the first round, and are not counted: they compile.
- `ratio` is the median over the rounds of contestant / plain, both of the
  same worker and round; the smallest and the largest one follow.
- `fb` is one forward and backward pass of the same network alone. A slow
  plain step flatters the ratio; `extra`, the median of (contestant - plain) /
  fb, it does not. A SAM step without any overhead has 1.00, BSAM 2.00.
- `floor` is the ratio that two passes alone leave room for: 1 + (`fb_twice` - `fb`) / plain, where
  `fb_twice` is two passes in one compiled function, the second at weights moved by the gradient of
  the first, with no norm, no optimizer and no look for NaN. Compilers make two such passes cheaper
  or dearer than twice one.
- Everything in float32; SGD with learning rate 1e-3 and momentum 0.9; rho 0.05.
- A figure that is nearer than 0.05 to its target is called a tie: medians on
  a machine that others use as well move by that much from run to run.

The networks are in `networks.py`, the contestants in `workers.py`.
"""

import argparse
import datetime
import hashlib
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import pathlib
import platform
import statistics
import sys

import workers
from networks import WORKLOADS

#: Targets for SAM / plain, by worker, for W1, W2 and W3.
SAM_TARGETS = {
    "tensorflow": (1.70, 1.65, 1.80),
    "tensorflow-jit": (1.84, 1.75, 1.80),
    "jax": (1.75, 1.87, 1.67),
    "torch": (2.02, 2.03, 1.98),
}
#: How much dearer than SAM itself each of these may be, for W1, W2 and W3.
MORE_THAN_SAM = {
    "asam": (0.05, 0.05, 0.05),
    "gsam": (0.05, 0.15, 0.03),
    "adaptive_gsam": (0.05, 0.15, 0.03),
}
BSAM_TARGETS = {"torch": (3.0, 3.2, 3.0)}
#: The worker whose four parts ours must not be dearer than.
PARTS_RIVALS = {"tensorflow": "tf_keras", "tensorflow-jit": "tf_keras-jit"}
#: Targets for the peak memory of SAM / plain on W1.
MEMORY_TARGETS = {"tensorflow": 1.02, "tensorflow-jit": 1.15, "jax": 1.12, "torch": 1.02}
TIE, MEMORY_TIE = 0.05, 0.01


def main():
    """Measure what the command line asks for, print the tables, write the results."""
    options = parse_arguments()
    if options.report:
        results = json.loads(options.report.read_text())
    else:
        results = {"facts": facts(options), "blocks": [], "memory": [], "problems": []}
        for workload in options.workloads:
            (measure_memory if options.memory else measure_time)(results, workload, options)
            save(results, options)
    print(report(results))
    return 1 if any(p["kind"] == "error" for p in results["problems"]) else 0


def parse_arguments():
    """The options, with what `--quick` stands for filled in."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--workloads", nargs="+", choices=WORKLOADS, help="default: all")
    add("--workers", nargs="+", choices=workers.WORKERS, default=list(workers.WORKERS))
    add(
        "--contestants",
        nargs="+",
        choices=(*workers.OURS, *workers.CHEAPER),
        default=list(workers.OURS),
    )
    add("--rounds", type=int, help="default: 9; 3 with --memory")
    add("--steps", type=int, help="steps per block; default: 2, 60 and 6 for W1, W2 and W3")
    add("--core", type=int, default=max(os.sched_getaffinity(0)), help="default: the last one")
    add("--memory", action="store_true", help="peak memory in fresh processes, no times; W1")
    add(
        "--quick", action="store_true", help="one round of two steps on W2: the figures mean little"
    )
    add("--output", type=pathlib.Path, help="write all raw figures to this JSON file")
    add("--report", type=pathlib.Path, help="print the tables of such a file, and measure nothing")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.steps = options.rounds or 1, options.steps or 2
    options.rounds = options.rounds or (3 if options.memory else 9)
    few = ["W1"] if options.memory else ["W2"] if options.quick else list(WORKLOADS)
    options.workloads = options.workloads or few
    return options


# Measuring


class Process:
    """A worker process, seen from the driver."""

    def __init__(self, name, workload, options, contestants=None):
        self.name = name
        allowed = contestants or (*workers.BASELINES, *options.contestants)
        self.steps = options.steps or WORKLOADS[workload].steps
        context = multiprocessing.get_context("spawn")  # Fork would copy this process.
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=workers.serve,
            args=(theirs, name, workload, self.steps, allowed, options.core),
            daemon=True,
        )
        self._process.start()
        theirs.close()
        kind, *answer = self._receive()
        self.contestants = answer[0] if kind == "ready" else []
        self.problem = None if kind == "ready" else {"kind": kind, "text": answer[0]}

    def ask(self, request):
        """The answer to a request, a tuple that starts with its kind."""
        try:
            self._connection.send(request)
        except OSError:
            return self._ended()
        return self._receive()

    def close(self):
        """End the process."""
        if self._process.is_alive():
            self._process.terminate()
        self._process.join()

    def _receive(self):
        try:
            return self._connection.recv()
        except (EOFError, OSError):
            return self._ended()

    def _ended(self):
        self._process.join()
        return "error", f"The process ended with exit code {self._process.exitcode}."


def measure_time(results, workload, options):
    """Run the rounds of one workload and append every block to `results`."""
    running, turns = [], []
    try:
        for name in options.workers:
            progress(f"{workload} {name}: importing and building")
            process = Process(name, workload, options)
            running.append(process)
            if process.problem:
                note_problem(results, workload, name, "all", process.problem)
            for contestant in process.contestants:
                progress(f"{workload} {name} {contestant}: compiling")
                answers = [process.ask((contestant, process.steps)) for _ in range(2)]
                if answers[-1][0] == "time":
                    turns.append((process, contestant))
                else:
                    problem = {"kind": "error", "text": answers[-1][1]}
                    note_problem(results, workload, name, contestant, problem)
        for number in range(options.rounds):
            save(results, options)
            progress(f"{workload}: round {number + 1} of {options.rounds}")
            for process, contestant in turns if number % 2 == 0 else reversed(turns):
                kind, *answer = process.ask((contestant, process.steps))
                if kind == "error":
                    problem = {"kind": kind, "text": answer[0]}
                    note_problem(results, workload, process.name, contestant, problem)
                    continue
                block = {
                    "workload": workload,
                    "worker": process.name,
                    "contestant": contestant,
                    "round": number,
                    "steps": process.steps,
                    "cpu_s": answer[0],
                    "wall_s": answer[1],
                    "load": os.getloadavg()[0],
                }
                results["blocks"].append(block)
    finally:
        for process in running:
            process.close()


def measure_memory(results, workload, options):
    """Peak memory of each contestant after two blocks, each in a process of its own."""
    for number in range(options.rounds):
        for name in options.workers:
            for contestant in ("plain", *options.contestants):
                if contestant not in ("plain", *workers.WORKERS[name].contestants):
                    continue
                progress(f"{workload} {name} {contestant}: memory, round {number + 1}")
                process = Process(name, workload, options, (contestant,))
                answer = (process.problem or {}).get("kind"), (process.problem or {}).get("text")
                if not process.problem:
                    for _ in range(2):
                        answer = process.ask((contestant, process.steps))
                    if answer[0] == "time":
                        answer = process.ask("memory")
                process.close()
                if answer[0] != "memory":
                    problem = {"kind": answer[0], "text": answer[1]}
                    note_problem(results, workload, name, contestant, problem)
                    continue
                peak = {
                    "workload": workload,
                    "worker": name,
                    "contestant": contestant,
                    "round": number,
                    "imported_mib": answer[1],
                    "peak_mib": answer[2],
                }
                results["memory"].append(peak)


def note_problem(results, workload, worker, contestant, problem):
    """Remember why there is no figure; a peer that is not installed is no error."""
    entry = {"workload": workload, "worker": worker, "contestant": contestant, **problem}
    if entry not in results["problems"]:
        results["problems"].append(entry)
    progress(f"{workload} {worker} {contestant}: {problem['kind']}: {problem['text']}")


def save(results, options):
    """Write what has been measured so far; a long run may be cut short."""
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(results, indent=1) + "\n")


def progress(text):
    """Say what is being done, on the error output: the tables go to the other one."""
    print(f"[{datetime.datetime.now():%H:%M:%S}] {text}", file=sys.stderr, flush=True)


def facts(options, peers=("tf_keras", "optax", "pytorch_optimizer")):
    """What a reader needs to know to judge the figures."""
    names = "keras-sharp keras tensorflow tensorflow-cpu jax jaxlib torch numpy"
    versions = {}
    for name in (*names.split(), *peers):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    cpu = [
        line.partition(":")[2].strip()
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": versions,
        "keras_sharp_source": digest_of_package(),
        "cpu": cpu[0] if cpu else platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
        "quick": options.quick,
    }


def digest_of_package():
    """A short hash of the source of keras_sharp, to tell versions under development apart."""
    spec = importlib.util.find_spec("keras_sharp")
    if spec is None:
        return None
    digest = hashlib.sha256()
    for path in sorted(pathlib.Path(spec.origin).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


# Reporting


def report(results):
    """The results as Markdown."""
    known = results["facts"]
    versions = ", ".join(f"{name} {version}" for name, version in known["versions"].items())
    loads = [block["load"] for block in results["blocks"]] or [known["load"][0]]
    lines = [
        f"{known['cpu']}, {known['cores']} cores, one used; load {min(loads):.1f} to "
        f"{max(loads):.1f}. Python {known['python']}, {versions}. {known['date']}.",
    ]
    if known["quick"]:
        lines += [
            "",
            "**A quick run: it shows that everything works, and the figures mean little.**",
        ]
    for workload in WORKLOADS:
        if any(block["workload"] == workload for block in results["blocks"]):
            lines += ["", *time_table(results["blocks"], workload)]
        if any(peak["workload"] == workload for peak in results["memory"]):
            lines += ["", *memory_table(results["memory"], workload)]
    if results["problems"]:
        lines += ["", "No figures:", ""]
    for problem in results["problems"]:
        reason = "not installed" if problem["kind"] == "missing" else "failed"
        names = f"{problem['workload']} {problem['worker']} {problem['contestant']}"
        lines.append(f"- {names}: {reason}: {problem['text']}")
    return "\n".join(lines)


def time_table(blocks, workload):
    """The lines of the table of one workload."""
    figures = {}  # worker -> contestant -> the figures of each round
    for block in blocks:
        if block["workload"] == workload:
            rounds = figures.setdefault(block["worker"], {}).setdefault(block["contestant"], {})
            rounds[block["round"]] = 1e3 * block["cpu_s"] / block["steps"]
    ratios = {worker: ratios_to_plain(rows) for worker, rows in figures.items()}
    count = 1 + max(b["round"] for b in blocks if b["workload"] == workload)
    lines = [
        f"### {workload}, {WORKLOADS[workload].title}: {count} rounds",
        "",
        "| worker | contestant | CPU ms/step | ratio to plain (min-max) | extra, fb | floor "
        "| target | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for worker, rows in figures.items():
        for contestant, times in rows.items():
            ratio, extra = ratios[worker][contestant], extras(rows, contestant)
            floor = floors(rows) if contestant == "sam" else []
            limit = target(workload, worker, contestant, ratios)
            lines.append(
                f"| {worker} | {contestant} | {statistics.median(times.values()):.3g} "
                f"| {spread(ratio)} | {f'{statistics.median(extra):.2f}' if extra else ''} "
                f"| {f'{statistics.median(floor):.2f}' if floor else ''} "
                f"| {'' if limit is None else f'{limit:.2f}'} "
                f"| {verdict(ratio, limit, TIE)} |"
            )
    return lines


def ratios_to_plain(rows):
    """For each contestant of a worker, contestant / plain in each round."""
    plain = rows.get("plain", {})
    return {
        contestant: [times[n] / plain[n] for n in times if n in plain]
        for contestant, times in rows.items()
    }


def extras(rows, contestant):
    """(contestant - plain) / fb in each round; nothing for the baselines."""
    plain, fb = rows.get("plain", {}), rows.get("fb", {})
    if contestant in workers.BASELINES:
        return []
    times = rows[contestant]
    return [(times[n] - plain[n]) / fb[n] for n in times if n in plain and n in fb]


def floors(rows):
    """1 + (fb_twice - fb) / plain in each round."""
    plain, fb, twice = (rows.get(name, {}) for name in workers.BASELINES)
    return [1 + (twice[n] - fb[n]) / plain[n] for n in twice if n in plain and n in fb]


def target(workload, worker, contestant, ratios):
    """The ratio that is aimed at, or `None` if there is no target."""
    column = list(WORKLOADS).index(workload)

    def measured(worker, contestant):
        values = ratios.get(worker, {}).get(contestant)
        return statistics.median(values) if values else None

    if worker not in SAM_TARGETS:  # A peer.
        return None
    if contestant == "sam":
        return SAM_TARGETS[worker][column]
    if contestant in MORE_THAN_SAM:
        sam = measured(worker, "sam")
        return None if sam is None else sam + MORE_THAN_SAM[contestant][column]
    if contestant == "bsam":
        if worker in BSAM_TARGETS:
            return BSAM_TARGETS[worker][column]
        fb = measured(worker, "fb")  # Two more passes, and a tenth of a step.
        return None if fb is None else 1 + 2 * fb + 0.1
    if contestant == "sam_4_parts":
        return measured(PARTS_RIVALS.get(worker), "sam_4_parts")
    return None


def memory_table(peaks, workload):
    """The lines of the table of peak memory."""
    figures = {}
    for peak in peaks:
        if peak["workload"] == workload:
            rows = figures.setdefault(peak["worker"], {})
            rows.setdefault(peak["contestant"], []).append((peak["peak_mib"], peak["imported_mib"]))
    lines = [
        f"### {workload}, {WORKLOADS[workload].title}: peak memory, a fresh process each time",
        "",
        "| worker | contestant | peak MiB | less imports MiB | peak / plain | target | |",
        "|---|---|---|---|---|---|---|",
    ]
    for worker, rows in figures.items():
        for contestant, pairs in rows.items():
            peak = statistics.median(p for p, _ in pairs)
            rise = statistics.median(p - i for p, i in pairs)
            ratio = (
                peak / statistics.median(p for p, _ in rows["plain"]) if "plain" in rows else None
            )
            limit = MEMORY_TARGETS.get(worker) if (contestant, workload) == ("sam", "W1") else None
            lines.append(
                f"| {worker} | {contestant} | {peak:.0f} | {rise:.0f} "
                f"| {'' if ratio is None else f'{ratio:.3f}'} "
                f"| {'' if limit is None else f'{limit:.2f}'} "
                f"| {verdict(ratio and [ratio], limit, MEMORY_TIE)} |"
            )
    return lines


def spread(values):
    """Median, smallest and largest value."""
    if not values:
        return ""
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def verdict(values, limit, tie):
    """Whether the median keeps to the limit: met, tie or missed."""
    if limit is None or not values:
        return ""
    distance = statistics.median(values) - limit
    if abs(distance) < tie:
        return "tie"
    return "met" if distance < 0 else "missed"


if __name__ == "__main__":
    sys.exit(main())
