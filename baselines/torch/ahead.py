"""Compiles beforehand, in several processes, what providers compile when they are first called."""

import dataclasses
import fcntl
import gc
import os
import subprocess
import sys
import tempfile
import time

import torch

import cases
import providers


def take_variants(chosen):
    """Lets this process see the chosen ones of every Triton kernel's variants, and time none."""
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
# How many processes may have a layer of full size at once.
LAYERS_AT_ONCE = 4


def free_slot():
    """A file that holds one of few slots until it is closed; None if all are taken."""
    for i in range(LAYERS_AT_ONCE):
        file = open(os.path.join(os.environ["PEERS_SLOTS"], str(i)), "w", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            continue
        return file
    return None


def jobs_of(options, device):
    """What is to be compiled, as (case, provider): Triton's variants; operations; whole layers."""
    variants, operations, layers = {}, {}, {}
    for case in cases.wanted(options.preset, options.pattern):
        for provider in providers.takers(case, device, options.provider):
            if provider.name in COMPILED or providers.missing(provider):
                continue
            if provider.name in TRITON:
                jobs, small = variants, dataclasses.replace(few(case), seq_len=1024)
            elif case.kind in ("layer", "rat_step"):
                jobs, small = layers, case
            else:
                jobs, small = operations, few(case)
            jobs.setdefault((provider.name, str(small)), (small, provider))
    return [list(jobs.values()) for jobs in (variants, operations, layers)]


def few(case):
    """A case with few sequences. One is another case than two."""
    return dataclasses.replace(case, sequences=min(case.batch, 2))


def compile_part(options, device):
    """One process's share: its variants of Triton's kernels, and every N-th of the rest.

    A layer's turn comes when there is room for its tensors, and variants are compiled until then.
    """
    part, parts = map(int, options.part.split("/"))
    tunes = options.tune_ms > 0
    take_variants(slice(part, None, parts) if tunes else slice(0, 1))
    variants, operations, layers = jobs_of(options, device)
    once = operations + layers
    once, layers = once[part::parts], {id(job) for job in layers}
    if not tunes:
        variants = variants[part::parts]
    while once or variants:
        slot = free_slot() if once and id(once[0]) in layers else None
        ready = once and (slot or id(once[0]) not in layers)
        if ready:
            compile_one(part, *once.pop(0), device, True)
        elif variants:
            compile_one(part, *variants.pop(0), device, part == 0 or not tunes)
        else:
            time.sleep(0.2)
        if slot:
            slot.close()


def compile_one(part, case, provider, device, aloud):
    """Launches a case once."""
    start = time.perf_counter()
    try:
        provider.builders[case.kind](cases.Problem(case, device))()
    except Exception as problem:  # it is said when it is measured
        print(f"  part {part}: {provider.name}: {case}: {problem!r:.200}", flush=True)
    if aloud:
        seconds = time.perf_counter() - start
        print(f"  compiled {provider.name:12} {case}: {seconds:.1f} s", flush=True)
    gc.collect()
    torch.cuda.empty_cache()


def compile_ahead(program, options, arguments):
    """Runs --jobs processes that compile a part each; for so long at most."""
    start = time.perf_counter()
    command = [sys.executable, program, *arguments, "--jobs", "0"]
    with tempfile.TemporaryDirectory() as slots:
        # What part of the variants comes to is no result to keep.
        environment = dict(os.environ, FLA_CACHE_RESULTS="0", OMP_NUM_THREADS="1")
        environment.update(PEERS_SLOTS=slots, TORCHINDUCTOR_COMPILE_THREADS="2")
        parts = [f"{i}/{options.jobs}" for i in range(options.jobs)]
        workers = [subprocess.Popen([*command, "--part", p], env=environment) for p in parts]
        unfinished = sum(not ended(w, options.compile_seconds, start) for w in workers)
    seconds = time.perf_counter() - start
    print(f"{options.jobs} processes: {seconds:.0f} s, {unfinished} unfinished", flush=True)


def ended(worker, limit, start):
    """Whether a process ends by itself before its time is over; else it is ended."""
    left = max(0, start + limit - time.perf_counter()) if limit else None
    try:
        worker.wait(left)
    except subprocess.TimeoutExpired:
        worker.kill()
        worker.wait()
        return False
    return True
