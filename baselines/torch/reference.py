"""The operations from their definitions, in fp64, with their gradients.

Sequences and heads are independent, so a few of them are computed, every token of them. Equations:
docs/models.md. A recurrence of matrices is computed chunk by chunk, because a token at a time is
hopeless on a GPU; tests hold it against a loop over tokens.
"""

import torch


def attention(q, k, v, dout=None, rows=1024):
    """Causal softmax attention of one head: q [n, T, d] (n queries share the key), k, v [T, d].

    Returns out [n, T, d], and with dout dq, dk, dv.
    """
    n, seq_len, d = q.shape
    scale = d**-0.5
    out = torch.empty(n, seq_len, v.shape[-1], dtype=q.dtype, device=q.device)
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for i in range(n):
        for first in range(0, seq_len, rows):
            last = min(first + rows, seq_len)
            keys, values = k[:last], v[:last]
            scores = q[i, first:last] @ keys.T * scale
            position = torch.arange(first, last, device=q.device)
            scores.masked_fill_(torch.arange(last, device=q.device) > position[:, None], -torch.inf)
            p = scores.softmax(-1)
            out[i, first:last] = p @ values
            if dout is None:
                continue
            given = dout[i, first:last]
            dscores = given @ values.T
            dscores -= (given * out[i, first:last]).sum(-1, keepdim=True)
            dscores *= p
            dq[i, first:last] = dscores @ keys * scale
            dk[:last] += dscores.T @ q[i, first:last] * scale
            dv[:last] += p.T @ given
    return {"out": out} if dout is None else {"dq": dq, "dk": dk, "dv": dv}


def scan(decay, x):
    """h_t = decay_t h_{t-1} + x_t along dimension 1, from zero, by doubling."""
    step = 1
    while step < x.shape[1]:
        x = torch.cat((x[:, :step], torch.addcmul(x[:, step:], decay[:, step:], x[:, :-step])), 1)
        decay = torch.cat((decay[:, :step], decay[:, step:] * decay[:, :-step]), 1)
        step *= 2
    return x


def recurrence(x, gate, dout=None):
    """h_t = exp(gate_t) h_{t-1} + x_t, [n, T, D]."""
    decay = gate.exp()
    h = scan(decay, x)
    if dout is None:
        return {"out": h}
    zero = torch.zeros_like(x[:, :1])
    later = torch.cat((decay[:, 1:], zero), 1)
    dx = scan(later.flip(1), dout.flip(1)).flip(1)
    dgate = dx * decay * torch.cat((zero, h[:, :-1]), 1)
    return {"dx": dx, "dgate": dgate}


def _pairs(a, b, total):
    """sum_d a_id b_jd exp(G_id - G_jd) for j <= i, else 0; total: G, [n, c, 1 or d]."""
    c = a.shape[1]
    later = torch.ones(c, c, dtype=torch.bool, device=a.device).triu(1)
    gap = (total[:, :, None] - total[:, None, :]).masked_fill(later[..., None], -torch.inf)
    if total.shape[-1] == 1:
        return (a @ b.transpose(1, 2)) * gap[..., 0].exp()
    return torch.einsum("nid,njd,nijd->nij", a, b, gap.exp())


def matrix_recurrence(q, k, v, log_decay=None, beta=None, chunk=64):
    """S_t = A_t S_{t-1} + k_t^T v_t, o_t = q_t S_t / sqrt(d_k); q, k [n, T, d_k], v [n, T, d_v].

    log_decay: log A_t, [n, T, 1 or d_k]. beta [n, T]: the delta rule, which adds k_t^T beta_t (v_t
    - k_t A_t S_{t-1}).
    """
    n, seq_len, d_k = q.shape
    if log_decay is None:
        log_decay = torch.zeros(n, seq_len, 1, dtype=q.dtype, device=q.device)
    state = torch.zeros(n, d_k, v.shape[-1], dtype=q.dtype, device=q.device)
    q, out = q * d_k**-0.5, []
    for first in range(0, seq_len, chunk):
        at = slice(first, first + chunk)
        qc, kc, values = q[:, at], k[:, at], v[:, at]
        total = log_decay[:, at].cumsum(1)
        if beta is not None:
            b = beta[:, at, None]
            system = (b * _pairs(kc, kc, total)).tril(-1)
            missing = b * (values - (kc * total.exp()) @ state)
            one = torch.eye(system.shape[1], dtype=q.dtype, device=q.device)
            values = torch.linalg.solve_triangular(
                system + one, missing, upper=False, unitriangular=True
            )
        out.append((qc * total.exp()) @ state + _pairs(qc, kc, total) @ values)
        last = total[:, -1:]
        state = last.exp().transpose(1, 2) * state
        state = state + (kc * (last - total).exp()).transpose(1, 2) @ values
    return torch.cat(out, 1)


def matrix_gradients(tensors, dout):
    """The gradients of matrix_recurrence's tensors, by "d" and their names."""
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    with torch.enable_grad():
        out = matrix_recurrence(**leaves)
        found = torch.autograd.grad(out, list(leaves.values()), dout)
    return {"d" + name: x for name, x in zip(leaves, found)}
