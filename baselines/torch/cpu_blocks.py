#!/usr/bin/env python3
"""Forward latency of the blocks on a CPU: PyTorch beside this project's programs.

    baselines/torch/cpu_blocks.py [--build build] [--rounds 5]

Both run the same mathematics (docs/models.md) in fp32 on the same pinned
cores, taking turns: a round is PyTorch's samples of a block, then ours. Of each
PyTorch block several idiomatic forms are timed and the fastest counts. Before
anything is timed, every form is compared with a plain fp64 loop. Medians are of
the rounds' medians; minima are of all samples, which other work on the machine
disturbs less.

Needs PyTorch 2.0 or newer and the programs built (`make drivers`).
"""

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
import time

import torch
import torch.nn.functional as F


def rms_norm(x, weight, eps=1e-6):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rotation(positions, d, dtype=torch.float32):
    """cos and sin of the rotary angles, [len(positions), d / 2]."""
    theta = 10000.0 ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    angle = positions.double()[:, None] * theta
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x, cos, sin):
    """Rotate-half on [..., T, d]."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


# Scans of h_t = g_t h_{t-1} + u_t along dimension -2 of [..., n, D], from zero.


def scan_loop(g, u):
    """One step after another; each is vectorized over everything else."""
    h = torch.empty_like(u)
    state = torch.zeros_like(u[..., 0, :])
    for t in range(u.shape[-2]):
        state = torch.addcmul(u[..., t, :], g[..., t, :], state)
        h[..., t, :] = state
    return h


def scan_doubling(g, u):
    """Associative scan: log2(n) passes over the whole tensor."""
    n, step = u.shape[-2], 1
    while step < n:
        shifted_u = F.pad(u, (0, 0, step, 0))[..., :n, :]
        shifted_g = F.pad(g, (0, 0, step, 0), value=1.0)[..., :n, :]
        u = torch.addcmul(u, g, shifted_u)
        g = g * shifted_g
        step *= 2
    return u


def scan_two_level(g, u, chunk=64):
    """Loops within all chunks at once, then over the chunks, then adds the carries."""
    shape = u.shape
    if shape[-2] % chunk:
        return scan_loop(g, u)
    g = g.unflatten(-2, (-1, chunk))
    u = u.unflatten(-2, (-1, chunk))
    inner, decay = scan_loop(g, u), g.cumprod(-2)
    carry = scan_loop(decay[..., -1, :], inner[..., -1, :])
    before = F.pad(carry, (0, 0, 1, 0))[..., :-1, :]
    return torch.addcmul(inner, decay, before.unsqueeze(-2)).reshape(shape)


class Attention(torch.nn.Module):
    forms = ("sdpa",)

    def __init__(self, d_model, heads, seq_len, **_):
        super().__init__()
        self.heads, self.d = heads, d_model // heads
        self.norm = torch.nn.Parameter(torch.ones(d_model))
        self.in_proj = torch.nn.Linear(d_model, 3 * d_model, bias=False)
        self.out_proj = torch.nn.Linear(d_model, d_model, bias=False)
        self.angles = rotation(torch.arange(seq_len), self.d)

    def forward(self, x, form):
        batch, seq_len, d_model = x.shape
        proj = self.in_proj(rms_norm(x, self.norm))
        v, q, k = (
            p.view(batch, seq_len, self.heads, self.d).transpose(1, 2) for p in proj.chunk(3, -1)
        )
        cos, sin = (a.to(x.dtype) for a in self.angles)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if form == "plain":
            scores = q @ k.transpose(-1, -2) * self.d**-0.5
            hidden = torch.ones(seq_len, seq_len, dtype=torch.bool).triu(1)
            out = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out_proj(out.transpose(1, 2).reshape(batch, seq_len, d_model))


class Recurrence(torch.nn.Module):
    forms = ("doubling", "two_level_32", "two_level_64", "two_level_128")

    def __init__(self, d_model, **_):
        super().__init__()
        self.norm = torch.nn.Parameter(torch.ones(d_model))
        self.in_proj = torch.nn.Linear(d_model, 3 * d_model, bias=False)
        self.out_proj = torch.nn.Linear(d_model, d_model, bias=False)
        self.gate_bias = torch.nn.Parameter(torch.rand(d_model) * 4)

    def forward(self, x, form):
        z, v, g = self.in_proj(rms_norm(x, self.norm)).chunk(3, -1)
        g = torch.sigmoid(g + self.gate_bias)
        u = (1 - g) * v
        if form == "plain":
            h = scan_loop(g, u)
        elif form == "doubling":
            h = scan_doubling(g, u)
        else:
            h = scan_two_level(g, u, int(form.rpartition("_")[2]))
        return x + self.out_proj(torch.sigmoid(z) * h)


class Rat(torch.nn.Module):
    forms = ("loop_scores", "doubling_scores", "loop_flash", "doubling_flash")

    def __init__(self, d_model, heads, seq_len, chunk, groups=2):
        super().__init__()
        self.heads, self.d, self.groups, self.chunk = heads, d_model // heads, groups, chunk
        self.norm = torch.nn.Parameter(torch.ones(d_model))
        width = 3 * d_model + 2 * groups * self.d
        self.in_proj = torch.nn.Linear(d_model, width, bias=False)
        self.out_proj = torch.nn.Linear(d_model, d_model, bias=False)
        self.gate_bias = torch.nn.Parameter(torch.rand(d_model) * 4)
        positions = torch.arange(seq_len)
        self.query_angles = rotation(positions // chunk, self.d)
        self.key_angles = rotation(positions[: seq_len // chunk], self.d)
        before = positions[: seq_len // chunk][None, :] < (positions // chunk)[:, None]
        self.bias = torch.zeros(before.shape).masked_fill(~before, -torch.inf)

    def split_heads(self, x):
        return x.unflatten(-1, (self.heads, self.d)).transpose(1, 2)

    def forward(self, x, form):
        batch, seq_len, d_model = x.shape
        shared = self.groups * self.d
        sizes = [d_model, d_model, d_model, shared, shared]
        z, v, g, q, k = self.in_proj(rms_norm(x, self.norm)).split(sizes, -1)
        tiles = self.heads // self.groups
        g = torch.sigmoid(g + self.gate_bias)
        kv = torch.cat((v, k.repeat(1, 1, tiles)), -1).unflatten(1, (-1, self.chunk))
        g_chunks = g.unflatten(1, (-1, self.chunk)).repeat(1, 1, 1, 2)
        scan = scan_doubling if form.startswith("doubling") else scan_loop
        v_scan, k_scan = scan(g_chunks, (1 - g_chunks) * kv).chunk(2, -1)
        v_chunk, k_chunk = self.split_heads(v_scan[:, :, -1]), self.split_heads(k_scan[:, :, -1])
        v_scan, k_scan = (self.split_heads(s.reshape(x.shape)) for s in (v_scan, k_scan))
        q = self.split_heads(q.repeat(1, 1, tiles))
        own = (q * k_scan).sum(-1) * self.d**-0.5
        q = rotate(q, *(a.to(x.dtype) for a in self.query_angles))
        k_chunk = rotate(k_chunk, *(a.to(x.dtype) for a in self.key_angles))
        mix = self.flash if form.endswith("flash") else self.scores
        out = mix(q, k_chunk, v_chunk, own, v_scan).transpose(1, 2).reshape(x.shape)
        return x + self.out_proj(torch.sigmoid(z) * out)

    def scores(self, q, k, v, own, own_value):
        """All scores at once: [B, H, T, C + 1]."""
        scores = q @ k.transpose(-1, -2) * self.d**-0.5 + self.bias.to(q.dtype)
        p = torch.cat((own.unsqueeze(-1), scores), -1).softmax(-1)
        return torch.addcmul(p[..., 1:] @ v, p[..., :1], own_value)

    def flash(self, q, k, v, own, own_value):
        """The fused CPU kernel over the chunks after the first, and its log-sum-exp to merge
        the own token with. Queries of chunk 0 see no chunk."""
        first = self.chunk
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q[:, :, first:], k, v, attn_mask=self.bias[first:].to(q.dtype)
        )
        if lse.shape[1] != q.shape[1]:  # [B, T, H] in some versions
            lse = lse.transpose(1, 2)
        weight = torch.sigmoid(own[:, :, first:] - lse).unsqueeze(-1).to(q.dtype)
        rest = torch.lerp(out, own_value[:, :, first:], weight)
        return torch.cat((own_value[:, :, :first], rest), 2)


def plain_rat(block, x):
    """RAT token by token, from its definition; fp64."""
    batch, seq_len, d_model = x.shape
    shared = block.groups * block.d
    proj = block.in_proj(rms_norm(x, block.norm))
    z, v, g, q, k = proj.split([d_model, d_model, d_model, shared, shared], -1)
    g = torch.sigmoid(g + block.gate_bias)
    out = torch.zeros_like(x)
    for h in range(block.heads):
        columns = slice(h * block.d, (h + 1) * block.d)
        group = slice(h % block.groups * block.d, (h % block.groups + 1) * block.d)
        finals_k, finals_v = [], []
        for t in range(seq_len):
            c = t // block.chunk
            if t % block.chunk == 0:
                kt, vt = torch.zeros_like(q[:, 0, group]), torch.zeros_like(q[:, 0, group])
            gate = g[:, t, columns]
            kt = gate * kt + (1 - gate) * k[:, t, group]
            vt = gate * vt + (1 - gate) * v[:, t, columns]
            turn = rotation(torch.tensor([c]), block.d, x.dtype)
            query = q[:, t, group]
            scores = [(query * kt).sum(-1)] + [
                (rotate(query, *turn) * final).sum(-1) for final in finals_k
            ]
            p = (torch.stack(scores, -1) * block.d**-0.5).softmax(-1)
            out[:, t, columns] = sum(
                p[:, i, None] * value for i, value in enumerate([vt] + finals_v)
            )
            if t % block.chunk == block.chunk - 1:
                finals_k.append(rotate(kt, *turn))
                finals_v.append(vt)
    return x + block.out_proj(torch.sigmoid(z) * out)


def check_forms():
    """Every form against a plain one in fp64, the residual taken off."""
    torch.manual_seed(1)
    small = {"d_model": 64, "heads": 4, "seq_len": 192, "chunk": 16}
    for block_class in (Attention, Recurrence, Rat):
        block = block_class(**small).double()
        x = torch.randn(2, small["seq_len"], small["d_model"], dtype=torch.float64)
        expected = plain_rat(block, x) if block_class is Rat else block(x, "plain")
        for form in usable_forms(block_class):
            error = (block(x, form) - expected).norm() / (expected - x).norm()
            if not error < 1e-6:  # the fused kernel's log-sum-exp is fp32
                sys.exit(f"{block_class.__name__} {form}: relative error {error:.2e}")


def usable_forms(block_class):
    fused = hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")
    return [f for f in block_class.forms if fused or not f.endswith("flash")]


def time_torch(run, samples):
    """Milliseconds of each sample, after two that warm up."""
    times = []
    for _ in range(samples + 2):
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return times[2:]


def time_ours(build, program, options, samples):
    """Median and minimum milliseconds of one of our programs."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "rows.csv")
        command = [os.path.join(build, program), "--backend", "cpu", "--preset", "small"]
        command += ["--pass", "prefill", "--warm", "--samples", str(samples), "--rows", "64"]
        command += ["--format", "none", "--out", path, *options]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        with open(path, newline="", encoding="utf-8") as file:
            row = list(csv.DictReader(file))[-1]
    if row["status"] != "ok":
        sys.exit(f"{program}: {row['status']}: {row['message']}")
    return float(row["latency_ms"]), float(row["latency_min_ms"])


def fastest_form(block, x, samples, compile_too):
    """The fastest form, as something to call, and its name."""
    candidates = {f: (lambda f=f: block(x, f)) for f in usable_forms(type(block))}
    if compile_too:
        compiled = torch.compile(block)
        for form in usable_forms(type(block)):
            candidates[f"{form} (compiled)"] = lambda f=form: compiled(x, f)
    least = {}
    for name, run in candidates.items():
        least[name] = min(time_torch(run, samples))
        print(f"    {name:28} {least[name]:9.2f} ms", flush=True)
    best = min(least, key=least.get)
    return candidates[best], best


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", default="build", help="folder of our programs [build]")
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--chunk", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=7, help="samples of each side in a round")
    parser.add_argument("--compile", action="store_true", help="try torch.compile as well")
    return parser.parse_args()


def main():
    a = parse_arguments()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: a.threads])
    torch.set_num_threads(a.threads)
    torch.set_grad_enabled(False)
    check_forms()
    torch.manual_seed(1)
    sizes = {"d_model": a.d_model, "heads": a.heads, "seq_len": a.seq_len, "chunk": a.chunk}
    x = torch.randn(1, a.seq_len, a.d_model)
    common = ["--d-model", a.d_model, "--seq-len", a.seq_len, "--tokens", a.seq_len]
    common += ["--threads", a.threads]
    ours = {
        "attention": (Attention, ["--pattern", "attention", "--heads", a.heads]),
        "rat": (Rat, ["--chunk", a.chunk, "--heads", a.heads]),
        "recurrence": (Recurrence, []),
    }
    print(f"PyTorch {torch.__version__}, {a.threads} threads, fp32, B=1 {sizes}")
    print(f"load of the machine before: {os.getloadavg()[0]:.1f}")
    lines = []
    for program, (block_class, options) in ours.items():
        options = [str(o) for o in common + options]
        print(f"  {program}: forms in PyTorch")
        run, form = fastest_form(block_class(**sizes), x, a.samples, a.compile)
        rounds = []
        for _ in range(a.rounds):
            theirs = time_torch(run, a.samples)
            theirs = statistics.median(theirs), min(theirs)
            rounds.append(theirs + time_ours(a.build, program, options, a.samples))
        medians = [statistics.median(side) for side in zip(*rounds)]
        minima = [min(side) for side in zip(*rounds)]
        lines.append(
            f"| {program} | {form} | {medians[0]:.1f} | {medians[2]:.1f} "
            f"| {medians[2] / medians[0]:.2f} | {minima[1]:.1f} | {minima[3]:.1f} "
            f"| {minima[3] / minima[1]:.2f} |"
        )
    print("\n| block | PyTorch form | PyTorch, ms | ours | ratio | least: PyTorch | ours | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
