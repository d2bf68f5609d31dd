"""Compiles beforehand, in several processes, what providers compile when they are first called."""

import contextlib
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
    variants, others = {}, {}
    for case in cases.wanted(options.preset, options.pattern):
        for provider in providers.takers(case, device, options.provider):
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
    provider.builders[case.kind](cases.Problem(case, device))()
    gc.collect()
    torch.cuda.empty_cache()


def reduced(case):
    """A case of the same kernels with few tokens."""
    sequences = 1 if case.batch == 1 else 2
    return dataclasses.replace(case, seq_len=min(case.seq_len, 1024), sequences=sequences)


def compile_ahead(program, options, arguments):
    """Runs --jobs processes that compile a part each; for so long at most."""
    start = time.perf_counter()
    command = [sys.executable, program, *arguments, "--jobs", "0"]
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
    print(
        f"{options.jobs} processes compiled: {seconds:.0f} s, {unfinished} unfinished", flush=True
    )
