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
import faulthandler
import gc
import os
import platform
import sys
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
    parser.add_argument("--tune-ms", type=int, default=5, help="a variant; 0: the first [5]")
    parser.add_argument("--seconds", type=float, help="begin no case after that time [no limit]")
    parser.add_argument("--list", action="store_true", help="print the cases and who takes them")
    parser.add_argument("--trace", action="store_true", help="print where a provider raises or hangs")
    parser.add_argument("--out", help="file of rows, - for none [runs/DEVICE/peers.csv]")
    parser.add_argument("--part", metavar="I/N", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def find_libraries(build):
    """Where `blocks` finds libblocks, and that FlashAttention-3; before anything is imported."""
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
    sys.path[:0] = [HERE, os.path.join(ROOT, "python")]


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


def status_of_failure():
    """Of a provider that raised: "cuda" if the GPU answers nobody in this process any more."""
    import torch

    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except Exception:
        return "cuda"
    return "unsupported"


def judged(problem, launch, judge):
    """The outcome of a launch, and the judge of those after it."""
    import cases

    results = launch()
    if hasattr(launch, "verify"):
        share = launch.verify()
        if not share <= 1:
            message = f"an operation is off by {share:.3g} times what it may be"
            return Outcome(None, message, "mismatch"), judge
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
        outcome, judge = judged(problem, launch, judge)
        if outcome.status == "ok":
            launch()
    except torch.OutOfMemoryError as failure:
        return None, Outcome(None, reason(failure), "oom"), judge
    except Exception as failure:
        if options.trace:
            traceback.print_exc()
        return None, Outcome(None, reason(failure), status_of_failure()), judge
    return (launch if outcome.status == "ok" else None), outcome, judge


def measure_case(case, number, options, device, watch, rows):
    """Checks, times and writes the rows of a case."""
    import cases
    import measure
    import providers

    problem = cases.Problem(case, device)
    judge = None if case.kind == "layer" else cases.OperationJudge(problem)
    runners, outcomes = [], {}
    taking = providers.takers(case, device, options.provider)
    for i, provider in enumerate(taking):
        launch, outcomes[provider.name], judge = begin(problem, provider, judge, options)
        if outcomes[provider.name].status == "cuda":
            case_id, message = rows.case_id(number, i), outcomes[provider.name].message
            show(case, rows.failed(case, provider.name, case_id, "cuda", message))
            sys.exit("peers: the GPU is lost to this process; --provider leaves one out")
        if launch is not None:
            runners.append(measure.Runner(provider.name, launch))
        release()
    judge = None
    release()
    ours = next((r for r in runners if r.name == "blocks"), None)
    measure.alternate(watch, runners, ours, options.precision, options.max_time)
    by_name = {r.name: r for r in runners}
    for i, provider in enumerate(taking):
        name, case_id = provider.name, rows.case_id(number, i)
        outcome, runner = outcomes[name], by_name.get(name)
        if runner is not None and runner.failure is not None:
            outcome, runner = Outcome(None, reason(runner.failure), status_of_failure()), None
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
    cudnn = f"{cudnn // 10000}.{cudnn // 100 % 100}.{cudnn % 100}"
    found["cuda"] = f"CUDA {torch.version.cuda}; cuDNN {cudnn}"
    found.update(device=properties.name, dtype="bf16")
    found["memory_total_mib"] = f"{properties.total_memory / 2**20:.7g}"
    return found


def print_list(found, device, options):
    import cases
    import providers

    for case in found:
        taking = providers.takers(case, device, options.provider)
        names = [p.name + (" (missing)" if providers.missing(p) else "") for p in taking]
        print(f"{cases.name_of(case):30} {case!s:56} {', '.join(names)}")


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    options, began = parse_arguments(arguments), time.perf_counter()
    find_libraries(options.build)
    try:
        import torch

        import ahead
        import cases
        import measure
        import providers
        import rows
    except ImportError as problem:
        sys.exit(f"peers: {problem}; pip install -r baselines/torch/requirements.txt")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("peers: PyTorch finds no CUDA device")
    options.preset = options.preset or ("full" if device == "cuda" else "tiny")
    found = cases.wanted(options.preset, options.pattern)
    if not found:
        sys.exit(f"peers: no case is called {options.pattern}; --list names them")
    torch.backends.cuda.matmul.allow_tf32 = False
    if options.list:
        print_list(found, device, options)
        return 0
    if options.part:
        ahead.compile_part(options, device)
        return 0
    if options.jobs > 0:
        ahead.compile_ahead(os.path.abspath(__file__), options, arguments)
    if options.prepare:
        return 0
    if device == "cuda" and options.tune_ms > 0:
        ahead.shorten_tuning(options.tune_ms)
    elif device == "cuda":
        ahead.take_variants(slice(0, 1))
    if options.trace:
        faulthandler.dump_traceback_later(60, repeat=True)
    environment = environment_of(options, device, providers.PROVIDERS)
    folder = rows.device_folder(device, environment["device"])
    out = options.out or os.path.join(ROOT, "runs", folder, "peers.csv")
    print(environment["runtime"], flush=True)
    watch, written = measure.stopwatch(device), rows.Rows(out, environment)
    for number, case in enumerate(found):
        if options.seconds and time.perf_counter() - began > options.seconds:
            message, case_id = f"{options.seconds:g} s were over", written.case_id(number, 0)
            show(case, written.failed(case, "blocks", case_id, "skipped", message))
            continue
        try:
            measure_case(case, number, options, device, watch, written)
        except torch.OutOfMemoryError as problem:
            row = written.failed(case, "blocks", written.case_id(number, 0), "oom", reason(problem))
            show(case, row)
        release()
    written.close()
    faulthandler.cancel_dump_traceback_later()
    print(f"rows: {out}")
    return 1 if any(row["status"] == "mismatch" for row in written.written) else 0


if __name__ == "__main__":
    sys.exit(main())
