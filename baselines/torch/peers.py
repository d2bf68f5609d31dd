#!/usr/bin/env python3
"""Ours and other people's kernels and layers on the same tensors, in one process, in turns.

    make bench-peers
    baselines/torch/peers.py [--pattern 'attention_*'] [--jobs 16] [--out FILE]

Each case (cases.py) is computed by every provider that takes it (providers.py). What a provider
gives is compared with fp64 first, outputs and gradients; what is wrong is a `mismatch` and not
timed. Then the samples of all alternate, each after a flush of the caches, in a new random order
every round (measure.py). Rows have the columns of the C programs (docs/rows.md): one for each
provider, and a `ratio` row for each rival, of how many times faster than it ours is. A provider
that is not installed, or that raises, is a row `unsupported` that says so.

Kernels that are compiled when they are first called, Triton's in dozens of variants one after the
other, are compiled in --jobs processes beforehand; --prepare does nothing else.
"""

import argparse
import contextlib
import fcntl
import fnmatch
import gc
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", default=os.path.join(ROOT, "build"), help="where libblocks is")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="[cuda, if there is one]")
    parser.add_argument("--preset", choices=("full", "small", "tiny"), help="[full; on a CPU tiny]")
    parser.add_argument("--pattern", default="*", metavar="GLOB[,GLOB...]", help="cases to measure")
    parser.add_argument("--provider", default="*", metavar="GLOB[,GLOB...]", help="besides ours")
    parser.add_argument("--precision", type=float, default=0.01, help="of the intervals [0.01]")
    parser.add_argument("--max-time", type=float, default=0.5, help="seconds a provider [0.5]")
    parser.add_argument("--jobs", type=int, default=0, help="processes that compile beforehand [0]")
    parser.add_argument("--compile-seconds", type=float, help="of that at most [no limit]")
    parser.add_argument("--prepare", action="store_true", help="compile, measure nothing")
    parser.add_argument("--tune-ms", type=int, default=5, help="of a variant of Triton's; 0: take the first [5]")
    parser.add_argument("--seconds", type=float, help="begin no case after that time [no limit]")
    parser.add_argument("--list", action="store_true", help="print the cases and who takes them")
    parser.add_argument("--trace", action="store_true", help="print where a provider raises")
    parser.add_argument("--out", help="file of rows, - for none [runs/DEVICE/peers.csv]")
    parser.add_argument("--part", metavar="I/N", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def find_libraries(build):
    """Where `blocks` finds libblocks and libblocks FlashAttention-3. Before anything is imported."""
    library = os.path.join(build, "libblocks-peers.so")
    if os.path.exists(library):
        os.environ.setdefault("BLOCKS_LIBRARY", os.path.abspath(library))
    flash3 = os.path.join(build, "libflash3.so")
    if os.path.exists(flash3):
        os.environ.setdefault("FLASH3_LIBRARY", os.path.abspath(flash3))
    # fla would hand the gated delta rule over to FlashQLA, which is measured by itself.
    os.environ.setdefault("FLA_FLASH_QLA", "0")
    # Processes that compile leave FlashAttention-4's kernels for others.
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    # What part of the variants comes to is no result to keep: processes that compile set 0.
    os.environ.setdefault("FLA_CACHE_RESULTS", "1")
    sys.path[:0] = [HERE, os.path.join(ROOT, "python")]


def matches(name, globs):
    return any(fnmatch.fnmatchcase(name, g) for g in globs.split(","))


def name_of(case):
    """What --pattern is compared with: "attention_forward/4096", "rat.train/4096"."""
    name = case.block if case.what == "kernel" else f"{case.block}.{case.what}"
    return f"{name}/{case.seq_len}"


def wanted_cases(preset, globs):
    import cases

    globs = ",".join(f"{g},{g}/*" for g in globs.split(","))
    return [c for c in cases.PRESETS[preset]() if matches(name_of(c), globs)]


def takers(case, device, globs):
    """The providers that have a builder for a case, ours first."""
    import providers

    return [
        p
        for p in providers.PROVIDERS
        if case.kind in p.builders
        and p.device in ("", device)
        and p.takes(case)
        and (p.name == "blocks" or matches(p.name, globs))
    ]


# ---- compiling beforehand ----


def take_variants(chosen):
    """Lets this process see only the chosen ones of every Triton kernel's variants, and time none."""
    from triton.runtime.autotuner import Autotuner

    plain = Autotuner.__init__

    def init(self, fn, arg_names, configs, *more, **named):
        mine = list(configs)[chosen] or list(configs)[:1]
        plain(self, fn, arg_names, mine, *more, **named)

    def run_once(call, **_):
        call()
        return [1.0, 1.0, 1.0]

    Autotuner.__init__ = init
    Autotuner.do_bench = property(lambda self: run_once)


def shorten_tuning(milliseconds):
    """Lets Triton's autotuner time each variant for so long only."""
    import triton
    from triton.runtime.autotuner import Autotuner

    def timed(call, quantiles):
        return triton.testing.do_bench(
            call, warmup=max(milliseconds // 5, 1), rep=milliseconds, quantiles=quantiles
        )

    Autotuner.do_bench = property(lambda self: timed)


# Providers whose kernels Triton compiles in many variants, which do not know how many tokens there
# are; and those that compile nothing when they are called.
TRITON = ("fla", "mamba_ssm")
COMPILED = ("blocks", "cudnn", "flash3", "torch-cudnn", "torch-flash", "torch-math")
# How many processes may have tensors of full size at once.
AT_FULL_SIZE = 4


@contextlib.contextmanager
def one_of_few():
    """Waits until fewer than AT_FULL_SIZE processes are in here."""
    names = [f"peers-{os.getppid()}-{i}.lock" for i in range(AT_FULL_SIZE)]
    files = [open(os.path.join(tempfile.gettempdir(), name), "w") for name in names]
    while True:
        for file in files:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            try:
                yield
            finally:
                for each in files:
                    each.close()
            return
        time.sleep(0.2)


def jobs_of(options, device):
    """What is to be compiled: (case, provider) of Triton's variants, and of everything else."""
    import providers

    variants, others = {}, {}
    for case in wanted_cases(options.preset, options.pattern):
        for provider in takers(case, device, options.provider):
            if provider.name in COMPILED or providers.missing(provider):
                continue
            if provider.name in TRITON:
                variants.setdefault((provider.name, str(reduced(case))), (reduced(case), provider))
            else:
                others.setdefault((provider.name, str(case)), (case, provider))
    return list(variants.values()), list(others.values())


def compile_part(options, device):
    """One process's share: its variants of Triton's kernels, and every N-th of the rest."""
    part, parts = map(int, options.part.split("/"))
    tunes = options.tune_ms > 0
    take_variants(slice(part, None, parts) if tunes else slice(0, 1))
    variants, others = jobs_of(options, device)
    others = others[part::parts]
    if not tunes:
        variants = variants[part::parts]
    # What waits for memory does so while others compile variants.
    for case, provider in others + variants if part % 2 else variants + others:
        start = time.perf_counter()
        full_size = provider.name not in TRITON
        try:
            with one_of_few() if full_size else contextlib.nullcontext():
                compile_one(case, provider, device)
        except Exception as problem:  # it is said when it is measured
            print(f"  part {part}: {provider.name}: {case}: {problem!r:.200}", flush=True)
        if full_size or not tunes or part == 0:
            seconds = time.perf_counter() - start
            print(f"  compiled {provider.name:12} {case}: {seconds:.1f} s", flush=True)


def compile_one(case, provider, device):
    import cases

    provider.builders[case.kind](cases.Problem(case, device))()
    release()


def reduced(case):
    """A case of the same kernels with few tokens."""
    import dataclasses

    sequences = 1 if case.batch == 1 else 2
    return dataclasses.replace(case, seq_len=min(case.seq_len, 1024), sequences=sequences)


def compile_ahead(options, arguments):
    """Runs --jobs processes that compile a part each; for so long at most."""
    start = time.perf_counter()
    command = [sys.executable, os.path.abspath(__file__), *arguments, "--jobs", "0"]
    environment = dict(os.environ, FLA_CACHE_RESULTS="0", OMP_NUM_THREADS="1")
    parts = [f"{i}/{options.jobs}" for i in range(options.jobs)]
    workers = [subprocess.Popen([*command, "--part", p], env=environment) for p in parts]
    unfinished = 0
    for worker in workers:
        left = None
        if options.compile_seconds:
            left = max(0, start + options.compile_seconds - time.perf_counter())
        try:
            worker.wait(left)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
            unfinished += 1
    seconds = time.perf_counter() - start
    print(f"{options.jobs} processes compiled: {seconds:.0f} s, {unfinished} unfinished", flush=True)


# ---- measuring ----


class Outcome:
    """How a provider's first launch went: its error, and what is said of it."""

    def __init__(self, error=None, message="", status="ok"):
        self.error, self.message, self.status = error, message, status


def reason(problem):
    """One line of what a library says."""
    import blocks

    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    text = lines[0] if lines else ""
    name = type(problem).__name__
    if isinstance(problem, blocks.Error):
        return text
    return f"{name}: {text}"[:300]


def judged(problem, provider, launch, judge):
    """The outcome of a launch, and the judge of those after it."""
    import cases

    results = launch()
    if hasattr(launch, "verify"):
        share = launch.verify()
        if not share <= 1:
            return Outcome(None, f"{share:.3g} times what an operation may be off by", "mismatch"), judge
        judge = cases.LayerJudge(problem, {**results, **launch.gradients()})
        return Outcome(None, f"each operation verified: {share:.2f} of its bound at worst"), judge
    if judge is None and problem.case.kind == "layer":
        return Outcome(None, "ours, which it would be compared with, did not run", "skipped"), None
    worst = judge.judge(results)
    message = f"worst: {worst.name}, {worst.error / worst.bound:.2f} of its bound"
    if not worst.error <= worst.bound:
        message = f"rel_err {worst.error:.3g} in {worst.name}, allowed are {worst.bound:.3g}"
        return Outcome(worst.error, message, "mismatch"), judge
    return Outcome(worst.error, message), judge


def begin(problem, provider, judge, options):
    """A provider's launch (None if there is none), its outcome, and the judge."""
    import torch

    import providers

    gone = providers.missing(provider)
    if gone:
        return None, Outcome(None, gone, "unsupported"), judge
    try:
        launch = provider.builders[problem.case.kind](problem)
        outcome, judge = judged(problem, provider, launch, judge)
        if outcome.status == "ok":
            launch()
    except torch.OutOfMemoryError as failure:
        return None, Outcome(None, reason(failure), "oom"), judge
    except Exception as failure:
        if options.trace:
            traceback.print_exc()
        return None, Outcome(None, reason(failure), "unsupported"), judge
    return (launch if outcome.status == "ok" else None), outcome, judge


def measure_case(case, number, options, device, watch, rows):
    """Checks, times and writes the rows of a case."""
    import cases
    import measure

    problem = cases.Problem(case, device)
    judge = None if case.kind == "layer" else cases.OperationJudge(problem)
    runners, outcomes = [], {}
    taking = takers(case, device, options.provider)
    for provider in taking:
        launch, outcomes[provider.name], judge = begin(problem, provider, judge, options)
        if launch is not None:
            runners.append(measure.Runner(provider.name, launch))
        release()
    if judge is not None:
        judge.expected = None
    release()
    ours = next((r for r in runners if r.name == "blocks"), None)
    measure.alternate(watch, runners, ours, options.precision, options.max_time)
    by_name = {r.name: r for r in runners}
    for i, provider in enumerate(taking):
        name, case_id = provider.name, rows.case_id(number, i)
        outcome, runner = outcomes[name], by_name.get(name)
        if runner is not None and runner.failure is not None:
            outcome, runner = Outcome(None, reason(runner.failure), "unsupported"), None
        if runner is None:
            show(case, rows.failed(case, name, case_id, outcome.status, outcome.message))
        else:
            show(case, rows.measured(case, runner, case_id, outcome, options.precision))
    for i, provider in enumerate(taking):
        rival = by_name.get(provider.name)
        if ours is None or rival is None or rival is ours or ours.failure or rival.failure:
            continue
        ratio = measure.ratio_of(*measure.paired(rival.samples, ours.samples))
        case_id = rows.case_id(number, len(taking) + i)
        show(case, rows.ratio(case, "blocks", rival.name, case_id, ratio, options.precision))


def release():
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def show(case, row):
    if row["ratio"]:
        low, high = float(row["ratio_low"]), float(row["ratio_high"])
        text = f"ours is {float(row['ratio']):.3g} times as fast ({low:.3g} to {high:.3g})"
        print(f"{case!s:56} {row['baseline']:12} {text}", flush=True)
        return
    text = row["message"]
    if row["latency_ms"]:
        text = f"{float(row['latency_ms']):9.4g} ms  {row['samples']:4} samples  {text}"
    print(f"{case!s:56} {row['provider']:12} {row['status']:11} {text}", flush=True)


# ---- the run ----


def processor():
    """The name of this machine's processor."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def environment_of(options, device, used):
    """The columns that are the same in every row."""
    import torch

    import providers
    import rows

    libraries = dict.fromkeys(providers.version(p) for p in used if providers.missing(p) is None)
    found = rows.build_of(options.build)
    found.update(host=platform.node(), backend=device, threads=torch.get_num_threads())
    found["runtime"] = "; ".join(["PyTorch " + torch.__version__, *libraries])
    if device == "cpu":
        found.update(device=processor(), dtype="fp32")
        return found
    properties = torch.cuda.get_device_properties(0)
    try:
        import pynvml
        import triton

        pynvml.nvmlInit()
        driver = pynvml.nvmlSystemGetDriverVersion()
        found["driver"] = driver.decode() if isinstance(driver, bytes) else driver
        found["runtime"] += "; Triton " + triton.__version__
    except Exception:
        pass
    cudnn = torch.backends.cudnn.version()
    found["cuda"] = f"CUDA {torch.version.cuda}; cuDNN {cudnn // 10000}.{cudnn // 100 % 100}.{cudnn % 100}"
    found.update(device=properties.name, dtype="bf16")
    found["memory_total_mib"] = f"{properties.total_memory / 2**20:.7g}"
    return found


def print_list(found, device, options):
    import providers

    for case in found:
        taking = takers(case, device, options.provider)
        names = [p.name + (" (missing)" if providers.missing(p) else "") for p in taking]
        print(f"{name_of(case):30} {case!s:56} {', '.join(names)}")


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    options, began = parse_arguments(arguments), time.perf_counter()
    find_libraries(options.build)
    try:
        import torch

        import measure
        import providers
        import rows
    except ImportError as problem:
        sys.exit(f"peers: {problem}; pip install -r baselines/torch/requirements.txt")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("peers: PyTorch finds no CUDA device")
    options.preset = options.preset or ("full" if device == "cuda" else "tiny")
    found = wanted_cases(options.preset, options.pattern)
    if not found:
        sys.exit(f"peers: no case is called {options.pattern}; --list names them")
    torch.backends.cuda.matmul.allow_tf32 = False
    if options.list:
        print_list(found, device, options)
        return 0
    if options.part:
        compile_part(options, device)
        return 0
    if options.jobs > 0:
        compile_ahead(options, arguments)
    if options.prepare:
        return 0
    if device == "cuda" and options.tune_ms > 0:
        shorten_tuning(options.tune_ms)
    elif device == "cuda":
        take_variants(slice(0, 1))
    environment = environment_of(options, device, providers.PROVIDERS)
    folder = rows.device_folder(device, environment["device"])
    out = options.out or os.path.join(ROOT, "runs", folder, "peers.csv")
    print(environment["runtime"], flush=True)
    watch, written = measure.stopwatch(device), rows.Rows(out, environment)
    for number, case in enumerate(found):
        if options.seconds and time.perf_counter() - began > options.seconds:
            message = f"{options.seconds:g} s were over"
            show(case, written.failed(case, "blocks", written.case_id(number, 0), "skipped", message))
            continue
        try:
            measure_case(case, number, options, device, watch, written)
        except torch.OutOfMemoryError as problem:
            row = written.failed(case, "blocks", written.case_id(number, 0), "oom", reason(problem))
            show(case, row)
        release()
    written.close()
    print(f"rows: {out}")
    return 1 if any(row["status"] == "mismatch" for row in written.written) else 0


if __name__ == "__main__":
    sys.exit(main())
