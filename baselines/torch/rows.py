"""Rows in the columns of the C programs (bench/harness/record.h), and the files they go to."""

import csv
import datetime
import fcntl
import os
import re
import sys
import zlib

import measure

SCHEMA = 3
COLUMNS = """schema run_id case_id time_utc git_sha git_dirty build host device driver cuda backend
program block pattern provider pass dtype batch seq_len chunk window groups position d_model n_heads
kv_heads d_head d_k d_v n_layers parameters state_bytes_per_sequence state_bytes_per_token model
prompt generate micro_batch latency_ms latency_low_ms latency_high_ms latency_p20_ms latency_p80_ms
latency_min_ms samples precision_pct baseline ratio ratio_low ratio_high prefill_ms tokens_per_s
flops tflops bytes gb_per_s roofline_ms roofline_pct predicted_ms peak_mem_mib memory_bytes rel_err
sm_clock_mhz throttled throttle_reasons power_w duty data status message requested providers warm
deterministic threads memory_total_mib copy_gb_per_s read_gb_per_s gemm_tflops compiler
runtime""".split()
SAMPLE_COLUMNS = """run_id case_id round position latency_ms sm_clock_mhz throttle power_w switches
others""".split()


def build_of(folder):
    """Commit, whether it was changed, and build of the library in a folder of make's."""
    found = {"git_sha": "unknown", "git_dirty": 1, "build": "unknown"}
    keys = {"GIT_SHA": "git_sha", "GIT_DIRTY": "git_dirty", "BUILD_ID": "build"}
    try:
        with open(os.path.join(folder, "version.h"), encoding="utf-8") as file:
            for name, value in re.findall(r'#define (\w+) "?(.*?)"?\n', file.read()):
                if name in keys:
                    found[keys[name]] = value
    except OSError:
        pass
    return found


def device_folder(backend, device):
    """The folder of a device in runs/ and results/, as device_folder_name() has it."""
    name = device.removeprefix("NVIDIA ")
    name = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")
    return f"cpu-{name}" if backend == "cpu" else name


def _shortened(number):
    return f"{number:.7g}"


class Rows:
    """The rows of one run, each on the disk before the next case begins; samples beside them."""

    def __init__(self, path, environment):
        self.environment = environment
        self.run_id = os.environ.get("RUN_ID") or "{:%Y-%m-%dT%H:%M:%SZ}-{}".format(
            datetime.datetime.now(datetime.timezone.utc), os.getpid()
        )
        self.written = []
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        self.file = _locked(path)
        self.samples = open(re.sub(r"\.csv$", "", path) + ".samples.csv", "w", encoding="utf-8")
        self.writer = csv.DictWriter(self.file, COLUMNS, lineterminator="\n")
        self.sample_writer = csv.DictWriter(self.samples, SAMPLE_COLUMNS, lineterminator="\n")
        self.writer.writeheader()
        self.sample_writer.writeheader()

    def case_id(self, case_number, provider_number):
        return f"{zlib.crc32(self.run_id.encode()):08x}.{case_number}.{provider_number}"

    def _base(self, case, provider, case_id, status, message):
        c, row = case, dict.fromkeys(COLUMNS, "")
        row.update(self.environment)
        row.update(schema=SCHEMA, run_id=self.run_id, case_id=case_id, program="peers")
        now = datetime.datetime.now(datetime.timezone.utc)
        row.update(time_utc=f"{now:%Y-%m-%dT%H:%M:%SZ}", status=status, message=message)
        row.update(block=c.block, pattern=c.pattern, provider=provider, requested=provider)
        row.update({"pass": c.what, "batch": c.batch, "seq_len": c.seq_len, "data": c.data})
        row.update(duty="sustained", warm=0, deterministic=0)
        if c.kind in ("layer", "rat_step"):
            row.update(d_model=c.d_model, n_layers=1, n_heads=c.n_heads)
            row.update({n: x for n, x in c.arguments.items() if n in ("chunk", "window", "groups")})
        else:
            row.update(d_model=c.n_heads * c.d_v, d_head=c.d_k, n_heads=c.n_heads)
            row.update(kv_heads=c.kv_heads or c.n_heads, d_k=c.d_k, d_v=c.d_v)
        return row

    def _append(self, row):
        self.writer.writerow(row)
        self.file.flush()
        os.fsync(self.file.fileno())
        self.written.append(row)
        return row

    def failed(self, case, provider, case_id, status, message):
        """A row of what was not measured, and why."""
        return self._append(self._base(case, provider, case_id, status, message))

    def measured(self, case, runner, case_id, verdict, precision):
        """The row of a provider's samples, which go to the file beside it first."""
        for s in runner.samples:
            line = {"run_id": self.run_id, "case_id": case_id, "round": s.round}
            line.update(position=s.position, latency_ms=_shortened(s.ms), throttle=s.throttle)
            line.update(sm_clock_mhz=s.sm_clock_mhz, power_w=s.power_w)
            self.sample_writer.writerow(line)
        self.samples.flush()
        summary = measure.summarize(runner.latencies())
        width = measure.half_width(summary.low, summary.high, summary.median)
        noisy = precision > 0 and width > precision
        message = f"the median is known to {width:.1%}; " if noisy else ""
        message += verdict.message
        status = "noisy" if noisy else "ok"
        row = self._base(case, runner.name, case_id, status, message)
        for name in ("median", "low", "high", "p20", "p80"):
            column = "latency_ms" if name == "median" else f"latency_{name}_ms"
            row[column] = _shortened(getattr(summary, name))
        row.update(latency_min_ms=_shortened(summary.minimum), samples=len(runner.samples))
        tokens = case.batch * (1 if case.what == "generation" else case.seq_len)
        row.update(
            precision_pct=100 * precision, tokens_per_s=_shortened(1e3 * tokens / summary.median)
        )
        row.update(rel_err="" if verdict.error is None else _shortened(verdict.error))
        if case.flops():
            row.update(flops=_shortened(case.flops()))
            row.update(tflops=_shortened(1e-9 * case.flops() / summary.median))
        row.update(_conditions(runner.samples))
        return self._append(row)

    def ratio(self, case, name, baseline, case_id, ratio, precision):
        """How many times faster than the baseline the provider `name` is."""
        width = measure.half_width(ratio.low, ratio.high, ratio.ratio)
        noisy = precision > 0 and width > precision
        message = f"the ratio is known to {width:.1%}" if noisy else ""
        row = self._base(case, name, case_id, "noisy" if noisy else "ok", message)
        row.update(baseline=baseline, samples=ratio.rounds, ratio=_shortened(ratio.ratio))
        row.update(ratio_low=_shortened(ratio.low), ratio_high=_shortened(ratio.high))
        row.update(precision_pct=100 * precision)
        return self._append(row)

    def close(self):
        self.file.close()
        self.samples.close()


def _conditions(samples):
    clocks = sorted(s.sm_clock_mhz for s in samples if s.sm_clock_mhz != "")
    powers = sorted(s.power_w for s in samples if s.power_w != "")
    if not clocks:
        return {}
    held = [s.throttle for s in samples if s.throttle]
    reasons = sorted({r for h in held for r in h.split("+")})
    return {
        "sm_clock_mhz": clocks[len(clocks) // 2],
        "power_w": powers[len(powers) // 2],
        "throttled": _shortened(len(held) / len(samples)),
        "throttle_reasons": "+".join(reasons),
    }


def _locked(path):
    """The file, empty; it has one writer at a time."""
    file = open(path, "a", newline="", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"peers: another program is writing {path}")
    file.truncate(0)
    return file
