"""RAT and RAT+ as their papers build them in PyTorch: an associative scan, and FlexAttention.

Our own code after the equations of docs/models.md, for the parameters of our layers "rat" and
"ratplus" under their names. On a GPU the modules are meant for torch.compile, and their block masks
are made beforehand, outside of what is compiled. On a CPU plain scores take FlexAttention's place,
and a doubling scan that of the associative one.
"""

import torch
import torch._inductor.config
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from cpu_blocks import rms_norm, rotate, rotation, scan_doubling

# Graphs with a scan are kept in the compiler's cache, as are all others.
try:
    torch._inductor.config.unsafe_marked_cacheable_functions["associative_scan"] = "1"
except AttributeError:
    pass


def _step(first, second):
    g, k, v = first
    next_g, next_k, next_v = second
    return g * next_g, next_g * k + next_k, next_g * v + next_v


def _scan(g, k, v, reverse=False):
    """h_t = g_t h_{t-1} + x_t along dimension 2 of [B, C, L, D], for x = k and for x = v."""
    if g.device.type == "cuda":
        from torch._higher_order_ops.associative_scan import associative_scan

        return associative_scan(_step, (g, k, v), dim=2, reverse=reverse)[1:]
    if reverse:
        return tuple(h.flip(2) for h in _scan(g.flip(2), k.flip(2), v.flip(2)))
    return scan_doubling(g, k), scan_doubling(g, v)


def _before(x, fill=0.0):
    """x of the token before, [B, C, L, D]."""
    return F.pad(x, (0, 0, 1, 0), value=fill)[:, :, :-1]


class Scan(torch.autograd.Function):
    """The scan of keys and values under the same gates; its gradient is the scan backwards."""

    @staticmethod
    def forward(ctx, g, k, v):
        k_scan, v_scan = _scan(g, k, v)
        ctx.save_for_backward(g, k_scan, v_scan)
        return k_scan, v_scan

    @staticmethod
    def backward(ctx, dk_scan, dv_scan):
        g, k_scan, v_scan = ctx.saved_tensors
        after = F.pad(g, (0, 0, 0, 1))[:, :, 1:]
        dk, dv = _scan(after, dk_scan, dv_scan, reverse=True)
        return dk * _before(k_scan) + dv * _before(v_scan), dk, dv


def gated_scan(g, k, v, chunk):
    """The gated averages of keys and values within chunks; [B, T, D], g in (0, 1), fp32 within."""
    shape, dtype = v.shape, v.dtype
    g, k, v = (x.float().unflatten(1, (-1, chunk)) for x in (g, k, v))
    k_scan, v_scan = Scan.apply(g, (1 - g) * k, (1 - g) * v)
    return k_scan.to(dtype).reshape(shape), v_scan.to(dtype).reshape(shape)


def heads_first(x, heads):
    """[B, T, H d] as [B, H, T, d]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class _Mixer(torch.nn.Module):
    """Norm, projections and residual, with the mixing of a subclass between them."""

    def __init__(self, d_model, heads, width):
        super().__init__()
        self.heads, self.d = heads, d_model // heads
        self.input_norm = torch.nn.Module()
        self.input_norm.weight = torch.nn.Parameter(torch.ones(d_model))
        self.in_proj = torch.nn.Linear(d_model, width, bias=False)
        self.out_proj = torch.nn.Linear(d_model, d_model, bias=False)

    def project(self, x):
        normed = rms_norm(x.float(), self.input_norm.weight.float()).to(x.dtype)
        return self.in_proj(normed)

    def angles(self, name, positions):
        cos, sin = rotation(positions, self.d)
        self.register_buffer(name + "_cos", cos, persistent=False)
        self.register_buffer(name + "_sin", sin, persistent=False)

    def turned(self, x, name):
        cos, sin = getattr(self, name + "_cos"), getattr(self, name + "_sin")
        return rotate(x.float(), cos, sin).to(x.dtype)


class Rat(_Mixer):
    """RAT over a whole sequence; its length is a multiple of the chunk."""

    def __init__(self, d_model, heads, seq_len, chunk=16, groups=2):
        super().__init__(d_model, heads, 3 * d_model + 2 * groups * (d_model // heads))
        self.groups, self.chunk, self.seq_len = groups, chunk, seq_len
        self.gate_bias = torch.nn.Parameter(torch.zeros(d_model))
        positions = torch.arange(seq_len)
        self.angles("query", positions // chunk)
        self.angles("key", positions[: seq_len // chunk])
        self.mask = None

    def prepare(self, device):
        """Makes the mask; before anything is compiled."""
        chunk, chunks = self.chunk, self.seq_len // self.chunk
        if device == "cpu":
            token = torch.arange(self.seq_len)[:, None]
            self.mask = torch.arange(chunks)[None, :] < token // chunk
            return

        def earlier(b, h, token, key):
            return key < token // chunk

        self.mask = create_block_mask(earlier, None, None, self.seq_len, chunks, device=device)

    def projected(self, x):
        """z, v, g in (0, 1), and q and k of every head, all [B, T, D]."""
        d_model, shared = self.heads * self.d, self.groups * self.d
        sizes = [d_model, d_model, d_model, shared, shared]
        z, v, g, q, k = self.project(x).split(sizes, -1)
        tiles = self.heads // self.groups
        g = torch.sigmoid(g.float() + self.gate_bias.float())
        return z, v, g, q.repeat(1, 1, tiles), k.repeat(1, 1, tiles)

    def forward(self, x, mask):
        z, v, g, q, k = self.projected(x)
        k_scan, v_scan = (heads_first(h, self.heads) for h in gated_scan(g, k, v, self.chunk))
        q = heads_first(q, self.heads)
        last = slice(self.chunk - 1, None, self.chunk)
        own = (q.float() * k_scan.float()).sum(-1) * self.d**-0.5
        keys, values = self.turned(k_scan[:, :, last], "key"), v_scan[:, :, last].contiguous()
        out, lse = attend(self.turned(q, "query"), keys, values, mask)
        total = torch.logaddexp(lse, own)
        out = out.float() * (lse - total).exp().unsqueeze(-1)
        out = out + v_scan.float() * (own - total).exp().unsqueeze(-1)
        out = out.transpose(1, 2).flatten(2)
        return x + self.out_proj((torch.sigmoid(z.float()) * out).to(x.dtype))


def attend(q, k, v, mask):
    """Attention to the keys of a mask and its log-sum-exp; rows without a key give 0 and -inf."""
    if q.device.type == "cuda":
        return flex_attention(q, k, v, block_mask=mask, return_lse=True)
    scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(-1)
    p = (scores - lse.clamp_min(torch.finfo(lse.dtype).min).unsqueeze(-1)).exp()
    return p @ v, lse


class RatStep(Rat):
    """One token of each sequence at position seq_len - 1, the last of its chunk.

    The running pair is written into its chunk's place in the cache. There its key and the query are
    turned by the same angle, so that one softmax over the cache is RAT's.
    """

    def forward(self, x, k_state, v_state, k_cache, v_cache):
        """x [B, D]; states [B, D], changed; caches [B, H, C, d], whose last place is changed."""
        z, v, g, q, k = (y[:, 0] for y in self.projected(x.unsqueeze(1)))
        k_state.copy_(g * k_state + (1 - g) * k.float())
        v_state.copy_(g * v_state + (1 - g) * v.float())
        split = (x.shape[0], self.heads, 1, self.d)
        cos, sin = self.key_cos[-1:], self.key_sin[-1:]
        q = rotate(q.reshape(split).float(), cos, sin).to(x.dtype)
        k_cache[:, :, -1:] = rotate(k_state.reshape(split), cos, sin).to(x.dtype)
        v_cache[:, :, -1:] = v_state.reshape(split).to(x.dtype)
        out = F.scaled_dot_product_attention(q, k_cache, v_cache).flatten(1)
        return x + self.out_proj((torch.sigmoid(z.float()) * out.float()).to(x.dtype))


class RatPlus(_Mixer):
    """RAT+: one recurrence over the sequence, then attention to dilated, recent and first keys."""

    def __init__(self, d_model, heads, seq_len, dilation, window, initial):
        super().__init__(d_model, heads, 5 * d_model)
        self.seq_len, self.pattern = seq_len, (dilation, window, initial)
        self.angles("token", torch.arange(seq_len))
        self.mask = None

    def prepare(self, device):
        dilation, window, initial = self.pattern

        def seen(b, h, token, key):
            near = token - key <= window
            return (key <= token) & (near | (key < initial) | ((key + 1) % dilation == 0))

        if device == "cpu":
            token = torch.arange(self.seq_len)
            self.mask = seen(0, 0, token[:, None], token[None, :])
            return
        self.mask = create_block_mask(seen, None, None, self.seq_len, self.seq_len, device=device)

    def forward(self, x, mask):
        o, q, k, v, g = self.project(x).chunk(5, -1)
        k, v = gated_scan(torch.sigmoid(g.float()), k, v, self.seq_len)
        q, k, v = (heads_first(y, self.heads) for y in (q, k, v))
        out, _ = attend(self.turned(q, "token"), self.turned(k, "token"), v, mask)
        out = out.transpose(1, 2).flatten(2)
        return x + self.out_proj((torch.sigmoid(o.float()) * out.float()).to(x.dtype))
