"""Other libraries' kernels, timed on the cases that `make bench-kernels` has measured.

    python3 baselines/torch/fla_kernels.py runs/DEVICE/kernels.csv [--blocks gla_forward,...]

flash-linear-attention's Triton kernels (provider fla), PyTorch's attention by
cuDNN and by FlashAttention-2 (torch-cudnn, torch-flash), FlashAttention-3
where it is installed (fa3), and PyTorch's matrix product (torch-cublas). Their
rows are appended to the file, with the shape, FLOPs, bytes and roofline of ours
for the same case and the libraries' versions; a table of all follows.

As in our programs: random data, the L2 cache flushed by reading before every
sample, the stream held while the host submits, medians, several forms of one
case alternating, and no time without a comparison with fp64 first.

Triton compiles dozens of variants of each kernel, one after another, and times
each for 125 ms; --jobs N compiles them in N processes first, --tune-ms shortens
the timing. A second run finds both done, in Triton's cache.
"""

import argparse
import csv
import datetime
import fcntl
import math
import os
import statistics
import subprocess
import sys
import time

TOLERANCE = 1.5e-2
BLOCKS = {
    "attention_forward": "attention",
    "attention_decode": "decode",
    "recurrence_forward": "hgrn",
    "gla_forward": "gla",
    "scalar_decay_forward": "scalar",
    "retention_forward": "retention",
    "linear_attention_forward": "linear attention",
    "gated_delta_forward": "gated delta rule",
    "gla_step": "gla step",
    "linear": "product",
}


def shard_autotuning(shard, shards):
    """Lets this process see only its part of every kernel's variants, and time none of them."""
    from triton.runtime.autotuner import Autotuner

    plain = Autotuner.__init__

    def init(self, fn, arg_names, configs, *more, **named):
        plain(self, fn, arg_names, list(configs)[shard::shards] or list(configs)[:1], *more, **named)

    def run_once(call, **_):
        call()
        return [1.0, 1.0, 1.0]

    Autotuner.__init__ = init
    Autotuner.do_bench = property(lambda self: run_once)


def shorten_tuning(milliseconds):
    """Lets Triton's autotuner time each variant for so long only."""
    from triton.runtime.autotuner import Autotuner

    def timed(call, quantiles):
        return triton.testing.do_bench(call, warmup=max(milliseconds // 5, 1), rep=milliseconds,
                                       quantiles=quantiles)

    Autotuner.do_bench = property(lambda self: timed)


class Case:
    """One of our rows, its sizes as integers."""

    def __init__(self, row, tiny=False):
        self.row = row
        self.block = row["block"]
        for name in ("batch", "seq_len", "n_heads", "d_head", "d_k", "d_v"):
            setattr(self, name, int(row[name]) if row[name] else 0)
        if tiny:
            self.batch, self.seq_len = min(self.batch, 2), min(self.seq_len, 512)

    def describe(self):
        r = self.row
        sizes = [f"{k}={r[c]}" for k, c in (("T", "seq_len"), ("B", "batch"), ("H", "n_heads"),
                 ("dk", "d_k"), ("dv", "d_v"), ("W", "window"), ("L", "chunk")) if r[c]]
        return f"{self.block} {' '.join(sizes)}"


def normal(*shape):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def log_decay(*shape):
    """As ours: logsigmoid(normal) / 16."""
    return F.logsigmoid(torch.randn(*shape, device="cuda")).div_(16).to(torch.bfloat16)


# Each maker returns the forms of a case, {provider: (call, name)}, and a check: the relative error
# of the worst row it looks at.


def worst_row(actual, expected):
    error = (actual.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
    return math.inf if not torch.isfinite(actual).all() else float(error.max())


def attention(c):
    if c.row["window"] or c.row["chunk"]:
        return {}, None
    b, t, h, d = c.batch, c.seq_len, c.n_heads, c.d_head
    q, k, v = (normal(b, t, h, d) for _ in range(3))

    def check(out):
        rows = torch.tensor([0, t // 3, t - 1], device="cuda")
        worst = 0.0
        for i, j in ((0, 0), (b - 1, h - 1)):
            scores = q[i, rows, j].double() @ k[i, :, j].double().T * d**-0.5
            hidden = torch.arange(t, device="cuda")[None, :] > rows[:, None]
            p = scores.masked_fill(hidden, -math.inf).softmax(-1)
            worst = max(worst, worst_row(out[i, rows, j], p @ v[i, :, j].double()))
        return worst

    def sdpa(backend):
        def call():
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(
                    q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
            return out.transpose(1, 2)
        return call

    forms = {
        "torch-cudnn": (sdpa(SDPBackend.CUDNN_ATTENTION), "scaled_dot_product_attention, cuDNN"),
        "torch-flash": (sdpa(SDPBackend.FLASH_ATTENTION), "scaled_dot_product_attention, flash"),
    }
    try:
        from flash_attn_interface import flash_attn_func

        forms["fa3"] = (lambda: flash_attn_func(q, k, v, causal=True)[0], "flash_attn_func")
    except ImportError:
        pass
    return forms, check


def decode(c):
    b, t, h, d = c.batch, c.seq_len, c.n_heads, c.d_head
    q, k, v = normal(b, h, 1, d), normal(b, h, t, d), normal(b, h, t, d)

    def check(out):
        worst = 0.0
        for i, j in ((0, 0), (b - 1, h - 1)):
            p = (q[i, j].double() @ k[i, j].double().T * d**-0.5).softmax(-1)
            worst = max(worst, worst_row(out[i, j], p @ v[i, j].double()))
        return worst

    def sdpa(backend):
        def call():
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v)
        return call

    return {
        "torch-cudnn": (sdpa(SDPBackend.CUDNN_ATTENTION), "scaled_dot_product_attention, cuDNN"),
        "torch-flash": (sdpa(SDPBackend.FLASH_ATTENTION), "scaled_dot_product_attention, flash"),
    }, check


def hgrn(c):
    from fla.ops.hgrn import chunk_hgrn, fused_recurrent_hgrn

    x, g = normal(c.batch, c.seq_len, c.n_heads * c.d_head), None
    g = log_decay(*x.shape)

    def check(out):
        n, state, expected = min(c.seq_len, 1024), 0.0, []
        for t in range(n):
            state = g[-1, t].double().exp() * state + x[-1, t].double()
            expected.append(state)
        return worst_row(out[-1, :n], torch.stack(expected))

    return {
        "fla": (lambda: chunk_hgrn(x, g)[0], "chunk_hgrn"),
        "fla-recurrent": (lambda: fused_recurrent_hgrn(x, g)[0], "fused_recurrent_hgrn"),
    }, check


def plain_matrix(q, k, v, decay, beta=None):
    """S_t = decay_t S + k_t v_t, o_t = q_t S_t / sqrt(d_k) of one head, fp64; decay [n, d_k]."""
    q, k, v = q.double() * q.shape[-1] ** -0.5, k.double(), v.double()
    state = torch.zeros(k.shape[-1], v.shape[-1], device="cuda", dtype=torch.float64)
    out = []
    for t in range(q.shape[0]):
        state = decay[t][:, None] * state
        value = v[t] if beta is None else beta[t].double() * (v[t] - k[t] @ state)
        state = state + k[t][:, None] * value
        out.append(q[t] @ state)
    return torch.stack(out)


def matrix(c, make, g=None, constant=None, beta=None, key_scale=1.0):
    """make(q, k, v) gives the forms; g are log decays [B, T, H] or [B, T, H, d_k]."""
    b, t, h = c.batch, c.seq_len, c.n_heads
    q, k, v = normal(b, t, h, c.d_k), normal(b, t, h, c.d_k) * key_scale, normal(b, t, h, c.d_v)

    def check(out):
        n, worst = min(t, 512), 0.0
        for i, j in ((0, 0), (b - 1, h - 1)):
            if g is not None:
                decay = g[i, :n, j].double().exp()
                decay = decay if decay.dim() == 2 else decay[:, None].expand(n, c.d_k)
            else:
                decay = torch.full((n, c.d_k), constant(j), device="cuda", dtype=torch.float64)
            expected = plain_matrix(q[i, :n, j], k[i, :n, j], v[i, :n, j], decay,
                                    None if beta is None else beta[i, :n, j])
            worst = max(worst, worst_row(out[i, :n, j], expected))
        return worst

    return make(q, k, v), check


def gla(c):
    from fla.ops.gla import chunk_gla

    g = log_decay(c.batch, c.seq_len, c.n_heads, c.d_k)
    return matrix(c, lambda q, k, v: {"fla": (lambda: chunk_gla(q, k, v, g)[0], "chunk_gla")}, g)


def scalar(c):
    from fla.ops.simple_gla import chunk_simple_gla

    g = log_decay(c.batch, c.seq_len, c.n_heads)
    return matrix(c, lambda q, k, v: {
        "fla": (lambda: chunk_simple_gla(q, k, v, g)[0], "chunk_simple_gla")}, g)


def retention(c):
    from fla.ops.retention import chunk_retention

    return matrix(c, lambda q, k, v: {
        "fla": (lambda: chunk_retention(q, k, v)[0], "chunk_retention")},
        constant=lambda h: 1 - 2.0 ** (-5 - h))


def linear_attention(c):
    from fla.ops.linear_attn import chunk_linear_attn

    return matrix(c, lambda q, k, v: {
        "fla": (lambda: chunk_linear_attn(q, k, v, normalize=False)[0], "chunk_linear_attn")},
        constant=lambda h: 1.0)


def gated_delta(c):
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    g = log_decay(c.batch, c.seq_len, c.n_heads)
    beta = torch.rand_like(g)
    return matrix(c, lambda q, k, v: {
        "fla": (lambda: chunk_gated_delta_rule(q, k, v, g, beta)[0], "chunk_gated_delta_rule")},
        g, beta=beta, key_scale=c.d_k**-0.5)


def gla_step(c):
    from fla.ops.gla import fused_recurrent_gla

    b, h = c.batch, c.n_heads
    q, k, v, g = (normal(b, 1, h, c.d_k), normal(b, 1, h, c.d_k), normal(b, 1, h, c.d_v),
                  log_decay(b, 1, h, c.d_k))
    state = torch.randn(b, h, c.d_k, c.d_v, device="cuda")

    def check(out):
        after = g[-1, 0, -1].double().exp()[:, None] * state[-1, -1].double()
        after = after + k[-1, 0, -1].double()[:, None] * v[-1, 0, -1].double()
        return worst_row(out[-1, 0, -1], q[-1, 0, -1].double() @ after * c.d_k**-0.5)

    return {"fla": (lambda: fused_recurrent_gla(q, k, v, gk=g, initial_state=state,
                                                output_final_state=True)[0],
                    "fused_recurrent_gla")}, check


def product(c):
    x, weight = normal(c.batch * c.seq_len, c.d_k), normal(c.d_v, c.d_k) * 0.02

    def check(out):
        return worst_row(out[-3:], x[-3:].double() @ weight.double().T)

    return {"torch-cublas": (lambda: F.linear(x, weight), "linear")}, check


MAKERS = {
    "attention": attention, "decode": decode, "hgrn": hgrn, "gla": gla, "scalar": scalar,
    "retention": retention, "linear attention": linear_attention,
    "gated delta rule": gated_delta, "gla step": gla_step, "product": product,
}


class Stopwatch:
    def __init__(self):
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        self.buffer = torch.zeros(3 * cache // 4, device="cuda", dtype=torch.int32)
        self.start, self.stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample(self, call, hold_ms):
        """Milliseconds of one call with a cold cache; the stream is held while it is submitted."""
        self.buffer.sum()
        torch.cuda._sleep(int(hold_ms * 2e6))
        self.start.record()
        call()
        self.stop.record()
        torch.cuda.synchronize()
        return self.start.elapsed_time(self.stop)


def submission_ms(call):
    """What the host needs to submit a call, with a margin."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    elapsed = 1e3 * (time.perf_counter() - begin)
    torch.cuda.synchronize()
    return min(2 * elapsed + 0.2, 20)


def measure(case, max_time):
    """{provider: (form, samples, error or message)}"""
    forms, check = MAKERS[BLOCKS[case.block]](case)
    results, calls = {}, {}
    for provider, (call, form) in forms.items():
        try:
            error = check(call())
            if not error <= TOLERANCE:
                results[provider] = (form, [], f"mismatch: rel_err {error:.2g}")
                continue
            call()
            calls[provider] = (call, submission_ms(call))
            results[provider] = (form, [], error)
        except Exception as problem:  # a library's limits are its row's message
            text = str(problem).strip()
            results[provider] = (form, [], (text.splitlines() or [repr(problem)])[0][:200])
            torch.cuda.empty_cache()
    begin = time.perf_counter()
    while calls and (len(results[next(iter(calls))][1]) < 5
                     or time.perf_counter() - begin < max_time * len(calls)):
        for provider, (call, hold_ms) in calls.items():
            results[provider][1].append(watch.sample(call, hold_ms))
        if time.perf_counter() - begin > 10 * max_time * len(calls):
            break
    return results


def row_of(case, provider, form, samples, outcome, versions):
    """A row of the run that the case is of, whose shapes and device it has."""
    row = dict(case.row)
    for name in ("case_id", "latency_ms", "latency_low_ms", "latency_high_ms", "latency_p20_ms",
                 "latency_p80_ms", "latency_min_ms", "samples", "precision_pct", "tokens_per_s",
                 "tflops", "gb_per_s", "roofline_pct", "predicted_ms", "rel_err", "peak_mem_mib",
                 "memory_bytes", "sm_clock_mhz", "throttled", "throttle_reasons", "power_w"):
        if name in row:
            row[name] = ""
    row.update(program="fla_kernels", provider=provider, requested=provider,
               providers=form, runtime=versions, message="",
               time_utc=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"))
    if not samples:
        mismatch = isinstance(outcome, str) and outcome.startswith("mismatch")
        row.update(status="mismatch" if mismatch else "unsupported", message=str(outcome))
        return row
    median = statistics.median(samples)
    ordered = sorted(samples)
    tokens = case.batch * (1 if case.block.endswith(("_step", "_decode")) else case.seq_len)
    row.update(status="ok", latency_ms=f"{median:.7g}", latency_min_ms=f"{ordered[0]:.7g}",
               latency_p20_ms=f"{ordered[len(ordered) // 5]:.7g}",
               latency_p80_ms=f"{ordered[len(ordered) * 4 // 5]:.7g}", samples=len(samples),
               rel_err=f"{outcome:.7g}", tokens_per_s=f"{1e3 * tokens / median:.7g}",
               tflops=f"{1e-9 * float(row['flops']) / median:.7g}",
               gb_per_s=f"{1e-6 * float(row['bytes']) / median:.7g}",
               roofline_pct=f"{100 * float(row['roofline_ms']) / median:.7g}")
    return row


SHAPE = ("block", "batch", "seq_len", "chunk", "window", "n_heads", "d_head", "d_k", "d_v", "dtype")


def shape_of(row):
    return tuple(row[name] for name in SHAPE)


def print_table(rows):
    """Every case with all its providers, and the best of ours against the best of theirs."""
    cases = {}
    for row in rows:
        if row["status"] == "ok":
            cases.setdefault(shape_of(row), {})[row["provider"]] = float(row["latency_ms"])
    ours = ("hopper", "portable", "cpu")
    print(f"\n{'case':64} {'ours':>10}  {'theirs':>10}  ratio  all, ms")
    for shape, times in cases.items():
        name = Case(dict(zip(SHAPE, shape), **{})).describe()
        mine = {p: ms for p, ms in times.items() if p.startswith(ours)}
        theirs = {p: ms for p, ms in times.items() if p not in mine}
        best, peer = (min(side.values()) if side else math.nan for side in (mine, theirs))
        every = ", ".join(f"{p} {ms:.4g}" for p, ms in sorted(times.items(), key=lambda i: i[1]))
        print(f"{name:64} {best:10.4g}  {peer:10.4g}  {peer / best:5.2f}  {every}")


def compile_ahead(path, blocks, jobs):
    command = [sys.executable, os.path.abspath(__file__), path, "--blocks", ",".join(blocks)]
    # What a part of the variants comes to is no result to keep.
    environment = dict(os.environ, FLA_CACHE_RESULTS="0")
    workers = [subprocess.Popen(command + ["--compile-only", f"{i}/{jobs}"], env=environment)
               for i in range(jobs)]
    for worker in workers:
        worker.wait()


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", help="kernels.csv of this device; rows are appended to it")
    parser.add_argument("--blocks", default=",".join(BLOCKS), help="blocks to measure [all]")
    parser.add_argument("--max-time", type=float, default=0.5, help="seconds of samples [0.5]")
    parser.add_argument("--jobs", type=int, default=0, help="processes that compile ahead [0]")
    parser.add_argument("--tune-ms", type=int, help="milliseconds for each of Triton's variants")
    parser.add_argument("--compile-only", metavar="I/N", help="compile one part of the variants")
    return parser.parse_args()


def read_cases(path, blocks):
    """The header, all rows, and one of ours for every shape in the blocks wanted."""
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    first = {}
    for row in rows:
        if row["block"] in blocks and row["block"] in BLOCKS and row["flops"] and row["dtype"] == "bf16":
            first.setdefault(shape_of(row), row)
    return reader.fieldnames, rows, list(first.values())


def open_for_rows(path):
    """As the programs have it: one writer at a time, and no row after one that was cut."""
    file = open(path, "a+", newline="", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"fla_kernels: another program is writing {path}")
    file.seek(0)
    if not file.read().endswith("\n"):
        sys.exit(f"fla_kernels: the last row of {path} is cut; `make bench-kernels ARGS=--resume`")
    return file


def compile_part(part, cases):
    torch.set_grad_enabled(False)
    for row in cases:
        try:
            forms, _ = MAKERS[BLOCKS[row["block"]]](Case(row, tiny=True))
            for provider, (call, _) in forms.items():
                if provider.startswith("fla"):
                    call()
        except Exception as problem:
            print(f"part {part}: {row['block']}: {problem}", file=sys.stderr)


def main():
    global watch
    a = parse_arguments()
    blocks = a.blocks.split(",")
    try:
        names, rows, cases = read_cases(a.file, blocks)
    except OSError as problem:
        sys.exit(f"fla_kernels: {problem}; `make bench-kernels` writes it")
    except (KeyError, UnicodeDecodeError, csv.Error):
        sys.exit(f"fla_kernels: {a.file} is no file of `make bench-kernels`")
    if a.compile_only:
        compile_part(a.compile_only, cases)
        return
    if a.jobs > 0:
        begin = time.perf_counter()
        compile_ahead(a.file, blocks, a.jobs)
        print(f"compiled ahead in {time.perf_counter() - begin:.0f} s", flush=True)
    if a.tune_ms:
        shorten_tuning(a.tune_ms)
    torch.set_grad_enabled(False)
    torch.manual_seed(1)
    watch = Stopwatch()
    versions = f"PyTorch {torch.__version__}; cuDNN {torch.backends.cudnn.version()}"
    versions += f"; Triton {triton.__version__}; fla {fla.__version__}"
    print(versions)
    with open_for_rows(a.file) as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        for ours in cases:
            case = Case(ours)
            try:
                results = measure(case, a.max_time)
            except torch.OutOfMemoryError as problem:
                results = {}
                print(f"{case.describe():64} {str(problem).splitlines()[0]}", flush=True)
            torch.cuda.empty_cache()
            for provider, (form, samples, outcome) in results.items():
                row = row_of(case, provider, form, samples, outcome, versions)
                writer.writerow(row)
                file.flush()
                rows.append(row)
                print(f"{case.describe():64} {provider:14} {row['latency_ms'] or row['message']:>10} "
                      f"{row['rel_err']:>10}  {form}", flush=True)
    print_table(rows)


if __name__ == "__main__":
    missing = None
    try:
        import torch
        import torch.nn.functional as F
        import triton
        from torch.nn.attention import SDPBackend, sdpa_kernel

        if "--compile-only" in sys.argv:
            shard_autotuning(*map(int, sys.argv[sys.argv.index("--compile-only") + 1].split("/")))
        import fla
        import fla.ops
    except ImportError as problem:
        missing = problem.name or str(problem)
    if missing:
        sys.exit(f"fla_kernels: {missing} is missing; pip install torch fla-core einops")
    if not torch.cuda.is_available():
        sys.exit("fla_kernels: PyTorch finds no CUDA device")
    main()
