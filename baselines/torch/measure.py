"""Samples of several launches that alternate, their medians, intervals and paired ratios.

What the C programs do (docs/measuring.md, bench/harness/measure.c and statistics.c), for launches
that Python submits.
"""

import collections
import math
import random
import time

import numpy
import torch

LEAST_SAMPLES, LEAST_LONG_SAMPLES, MANY_SAMPLES = 10, 5, 100
LONG_MS = 1e3
LEAST_SECONDS = 0.05
RAMP_SECONDS = 0.2
RESAMPLES = 1000

Sample = collections.namedtuple("Sample", "round position ms sm_clock_mhz throttle power_w")
Summary = collections.namedtuple("Summary", "median low high p20 p80 minimum")
Ratio = collections.namedtuple("Ratio", "rounds ratio low high")


# ---- statistics ----


def _persistence(samples, median):
    """By how much the median's error grows where neighbours in time resemble each other."""
    off = samples - median
    before, after = off[:-1], off[1:]
    pairs = numpy.count_nonzero((before != 0) & (after != 0))
    if pairs < 8:
        return 1.0
    alike = numpy.count_nonzero(before * after > 0)
    r = min(max(math.sin(math.pi / 2 * (2 * alike / pairs - 1)), 0), 0.95)
    n = len(samples)
    lags = numpy.arange(1, n)
    return math.sqrt(1 + numpy.sum(2 * (1 - lags / n) * numpy.arcsin(r**lags) / (math.pi / 2)))


def summarize(samples):
    """Quantiles of samples in the order in which they were taken, and the median's 95% interval."""
    samples = numpy.asarray(samples, dtype=float)
    n, ordered = len(samples), numpy.sort(samples)
    p20, median, p80 = numpy.quantile(ordered, (0.2, 0.5, 0.8))
    reach = 0.98 * math.sqrt(n) * _persistence(samples, median)
    low = ordered[max(math.floor(0.5 * n - reach), 0)]
    high = ordered[min(math.ceil(0.5 * n + reach), n - 1)]
    return Summary(median, low, high, p20, p80, ordered[0])


def paired(one, other):
    """The latencies of rounds in which both were sampled, in order; round 0 was for warming up."""
    others = {s.round: s.ms for s in other if s.round > 0}
    both = [(s.ms, others[s.round]) for s in one if s.round in others]
    return [a for a, _ in both], [b for _, b in both]


def ratio_of(baseline, value):
    """The median of baseline / value over rounds, with a bootstrap's 95% interval.

    Rounds are drawn in blocks, so that drift counts.
    """
    ratios = numpy.asarray(baseline, dtype=float) / numpy.asarray(value, dtype=float)
    n = len(ratios)
    block = max(1, round(n ** (1 / 3) - 1))
    generator = numpy.random.default_rng(1)
    first = generator.integers(0, n, (RESAMPLES, -(-n // block)))
    drawn = (first[:, :, None] + numpy.arange(block)) % n
    medians = numpy.median(ratios[drawn.reshape(RESAMPLES, -1)[:, :n]], axis=1)
    low, high = numpy.quantile(medians, (0.025, 0.975))
    return Ratio(n, float(numpy.median(ratios)), float(low), float(high))


def half_width(low, high, value):
    """Half the width of an interval, relative to the value inside it."""
    return 0.5 * (high - low) / value


# ---- stopwatches ----


class CpuStopwatch:
    """Launches on this process's threads, after a walk through more memory than caches hold."""

    def __init__(self):
        self.flush = torch.zeros(16 << 20)

    def hold_for(self, launch):
        return 0.0

    def sample(self, launch, hold_ms):
        self.flush.add_(1)
        start = time.perf_counter()
        launch()
        return 1e3 * (time.perf_counter() - start)

    def conditions(self):
        return "", "", ""


class CudaStopwatch:
    """Launches between two events of the current stream, after the L2 cache was flushed.

    The stream is held while the host submits, so that the events enclose no pause of the host.
    """

    REASONS = (
        (0x4, "power"),
        (0x20, "heat"),
        (0x40, "heat"),
        (0x8, "hardware"),
        (0x80, "hardware"),
    )

    def __init__(self):
        properties = torch.cuda.get_device_properties(0)
        words = 3 * properties.L2_cache_size // 4
        self.buffer = torch.zeros(words, device="cuda", dtype=torch.int32)
        self.start, self.stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        try:
            import pynvml

            pynvml.nvmlInit()
            self.board = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
            self.nvml = pynvml
        except Exception:  # without it the conditions are unknown
            self.nvml = None

    def hold_for(self, launch):
        """Milliseconds that the host needs to submit a launch, with a margin."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        launch()
        elapsed = 1e3 * (time.perf_counter() - start)
        torch.cuda.synchronize()
        return min(2 * elapsed + 0.2, 30)

    def sample(self, launch, hold_ms):
        self.buffer.sum()
        torch.cuda._sleep(int(hold_ms * 2e6))
        self.start.record()
        launch()
        self.stop.record()
        torch.cuda.synchronize()
        return self.start.elapsed_time(self.stop)

    def conditions(self):
        """The clock, what holds it down, and the power, just after a sample."""
        if self.nvml is None:
            return "", "unknown", ""
        clock = self.nvml.nvmlDeviceGetClockInfo(self.board, self.nvml.NVML_CLOCK_SM)
        power = self.nvml.nvmlDeviceGetPowerUsage(self.board) / 1e3
        mask = self.nvml.nvmlDeviceGetCurrentClocksThrottleReasons(self.board)
        found = {name for bit, name in self.REASONS if mask & bit}
        return clock, "+".join(sorted(found)), power


def stopwatch(device):
    return CudaStopwatch() if device == "cuda" else CpuStopwatch()


# ---- rounds ----


class Runner:
    """Something to launch, and its samples."""

    def __init__(self, name, launch):
        self.name = name
        self.launch = launch
        self.samples = []
        self.seconds = 0.0
        self.hold_ms = 0.0
        self.failure = None

    def latencies(self):
        return [s.ms for s in self.samples]


def _take(watch, runner, number, position):
    start = time.perf_counter()
    try:
        ms = watch.sample(runner.launch, runner.hold_ms)
    except Exception as problem:
        runner.failure = problem
        return
    if number > 0:
        runner.samples.append(Sample(number, position, ms, *watch.conditions()))
    runner.seconds += time.perf_counter() - start


def _precise(runner, baseline, precision):
    summary = summarize(runner.latencies())
    if half_width(summary.low, summary.high, summary.median) > precision:
        return False
    if runner is baseline or baseline is None:
        return True
    a, b = paired(baseline.samples, runner.samples)
    ratios = summarize(numpy.asarray(a) / numpy.asarray(b))
    return half_width(ratios.low, ratios.high, ratios.median) <= precision


def _has_least(runner):
    total, n = sum(runner.latencies()), len(runner.samples)
    if n == 0:
        return False
    least = LEAST_SAMPLES if total / n < LONG_MS else LEAST_LONG_SAMPLES
    return n >= least and (total >= 1e3 * LEAST_SECONDS or n >= MANY_SAMPLES)


def _enough(runners, baseline, precision, max_time):
    if not all(_has_least(r) for r in runners):
        return False
    if sum(r.seconds for r in runners) >= max_time * len(runners):
        return True
    return all(_precise(r, baseline, precision) for r in runners)


def alternate(watch, runners, baseline, precision, max_time, seed=1):
    """Samples every runner once a round, in a new random order, until the intervals are narrow.

    precision: half the width of the 95% intervals of medians and of ratios to the baseline,
    relative; max_time: seconds a runner. A runner that raises leaves, with its `failure`.
    """
    order = random.Random(seed)
    for runner in runners:
        runner.hold_ms = watch.hold_for(runner.launch)
    began = time.perf_counter()
    while time.perf_counter() - began < RAMP_SECONDS:
        for runner in runners:
            _take(watch, runner, 0, 0)
    for runner in runners:
        runner.seconds = 0.0
    number = 0
    while True:
        running = [r for r in runners if r.failure is None]
        if not running or _enough(running, baseline, precision, max_time):
            return
        number += 1
        order.shuffle(running)
        for position, runner in enumerate(running):
            _take(watch, runner, number, position)
