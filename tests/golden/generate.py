#!/usr/bin/env python3
"""Makes golden files anew, those that packages can make, with other random numbers.

    pip install torch==2.15.0 transformers==5.17.0 flash-linear-attention==0.6.0 safetensors==0.8.0
    tests/golden/generate.py /tmp/golden [NAME...]
    build/golden /tmp/golden/*.safetensors

A NAME is that of a file here without its ending ("op_gla", "layer_mamba"); none: all that can be
made. Sizes and metadata are those of the files here; what a file here has besides (states, outputs
made token by token) is left out. The operations of flash-linear-attention convert to fp32 inside;
the layers of transformers run in fp64.
"""

import importlib
import importlib.metadata
import math
import pathlib
import sys

import torch
from safetensors.torch import save_file

B, T, H, DK, DV = 2, 77, 2, 64, 128


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def log_decay(*shape):
    return torch.nn.functional.logsigmoid(normal(*shape)) / 16


def write(folder, name, tensors, metadata):
    packages = ("torch", "transformers", "flash-linear-attention")
    versions = (f"{package} {importlib.metadata.version(package)}" for package in packages)
    metadata = dict(metadata, versions=" ".join(versions))
    tensors = {key: t.detach().float().contiguous() for key, t in tensors.items()}
    save_file(tensors, str(folder / f"{name}.safetensors"), metadata)


# ---- operations of flash-linear-attention, plain functions ----


def fla(module, function):
    return getattr(importlib.import_module("fla.ops." + module), function)


def transposed(function, names=("q", "k", "v", "beta", "w")):
    """A function of [B, H, T, ...] as one of [B, T, H, ...]."""

    def run(**tensors):
        swapped = {k: t.transpose(1, 2) if k in names else t for k, t in tensors.items()}
        o, state = function(**swapped)
        return o.transpose(1, 2), state

    return run


def gla(q, k, v, gk, h0=None):
    function = fla("gla.naive", "naive_recurrent_gla")
    return function(q, k, v, gk, initial_state=h0, output_final_state=True)


def scalar_decay(q, k, v, g, h0):
    return fla("simple_gla.naive", "naive_recurrent_simple_gla")(q, k, v, g, initial_state=h0)


def linear_attention(q, k, v):
    return fla("linear_attn.naive", "naive_recurrent_linear_attn")(q, k, v)


def retention(q, k, v):
    return transposed(lambda **t: (fla("retention.naive", "naive_retention")(**t), None))(
        q=q, k=k, v=v
    )


def delta_rule(q, k, v, beta):
    function = fla("delta_rule.naive", "delta_rule_recurrence")
    return transposed(function)(q=q, k=k, v=v, beta=beta)


def gated_delta_rule(q, k, v, beta, g, h0):
    function = fla("gated_delta_rule.naive", "naive_recurrent_gated_delta_rule")
    return function(q, k, v, beta, g, initial_state=h0, output_final_state=True)


def kda(q, k, v, gk, beta, h0):
    function = fla("kda.naive", "naive_recurrent_kda")
    return function(q, k, v, gk, beta, initial_state=h0, output_final_state=True)


def rwkv6(q, k, v, w, u):
    def function(**t):
        naive = fla("rwkv6.recurrent_naive", "naive_recurrent_rwkv6")
        return naive(**t, scale=DK**-0.5, output_final_state=True)

    return transposed(function)(q=q, k=k, v=v, w=w, u=u)


def hgrn(x, g, h0):
    return fla("hgrn.naive", "naive_recurrent_hgrn")(
        x, g, initial_state=h0, output_final_state=True
    )


def unit(*shape):
    return torch.nn.functional.normalize(normal(*shape), dim=-1)


KEYS, VALUES = (B, T, H, DK), (B, T, H, DV)


def inputs(keys=normal, **more):
    return {"q": normal(*KEYS), "k": keys(*KEYS), "v": normal(*VALUES), **more}


def state():
    return normal(B, H, DK, DV)


OPERATIONS = {
    "gla": (gla, lambda: inputs(gk=log_decay(*KEYS), h0=state())),
    "gla_strong_decay": (gla, lambda: inputs(gk=-20 * torch.rand(KEYS, dtype=torch.float64))),
    "scalar_decay": (scalar_decay, lambda: inputs(g=log_decay(B, T, H), h0=state())),
    "linear_attention": (linear_attention, inputs),
    "retention": (retention, inputs),
    "delta_rule": (delta_rule, lambda: inputs(unit, beta=normal(B, T, H).sigmoid())),
    "gated_delta_rule": (
        gated_delta_rule,
        lambda: inputs(unit, beta=normal(B, T, H).sigmoid(), g=log_decay(B, T, H), h0=state()),
    ),
    "kda": (
        kda,
        lambda: inputs(unit, gk=log_decay(*KEYS), beta=normal(B, T, H).sigmoid(), h0=state()),
    ),
    "rwkv6": (rwkv6, lambda: inputs(w=log_decay(*KEYS), u=normal(H, DK))),
    "hgrn": (
        hgrn,
        lambda: {"x": normal(B, T, DV), "g": log_decay(B, T, DV), "h0": normal(B, DV)},
    ),
}


def make_operation(folder, op):
    function, draw = OPERATIONS[op]
    given = {key: t.float().requires_grad_() for key, t in draw().items()}
    o, final = function(**given)
    do = normal(*o.shape).float()
    gradients = torch.autograd.grad(o, list(given.values()), do)
    tensors = dict(given, o=o, do=do)
    tensors.update(zip(("d" + key for key in given), gradients))
    if final is not None:
        tensors["final_state"] = final
    metadata = {"op": op, "scale": "1/sqrt(dk)", "layout": "B,T,H,D", "reference": "fla.ops"}
    write(folder, "op_" + op, tensors, metadata)


# ---- layers of transformers ----


def mamba():
    from transformers.models.mamba import modeling_mamba as m

    config = m.MambaConfig(
        hidden_size=64, state_size=16, time_step_rank=4, num_hidden_layers=1, use_mambapy=False
    )
    metadata = {"block": "mamba", "conv_width": "4", "d_model": "64"}
    return m.MambaMixer(config, 0), metadata, 50, {}


def mamba2():
    from transformers.models.mamba2 import modeling_mamba2 as m

    config = m.Mamba2Config(
        hidden_size=64,
        state_size=128,
        num_heads=2,
        head_dim=64,
        n_groups=1,
        chunk_size=32,
        num_hidden_layers=1,
    )
    metadata = {
        "block": "mamba2",
        "n_heads": "2",
        "conv_width": "4",
        "out_norm_eps": "1e-05",
        "norm_before_gate": "0",
        "d_model": "64",
    }
    return m.Mamba2Mixer(config, 0), metadata, 50, {}


def recurrent_gemma(width, heads, **more):
    from transformers.models.recurrent_gemma import modeling_recurrent_gemma as m

    config = m.RecurrentGemmaConfig(
        hidden_size=width, lru_width=width, num_attention_heads=heads, num_hidden_layers=1, **more
    )
    config._attn_implementation = "eager"
    return m, config


def hawk():
    m, config = recurrent_gemma(96, 2)
    positions = torch.arange(50)[None].expand(B, -1)
    metadata = {"block": "hawk", "n_heads": "2", "c": "8", "conv_width": "4", "d_model": "96"}
    more = {"position_ids": positions, "attention_mask": None, "use_cache": False}
    return m.RecurrentGemmaRecurrentBlock(config, 0), metadata, 50, more


def griffin_attention():
    m, config = recurrent_gemma(128, 2, num_key_value_heads=1, head_dim=64)
    age = torch.arange(83)[:, None] - torch.arange(83)[None]
    hidden = torch.where((age >= 0) & (age < 24), 0.0, -math.inf).double()
    metadata = {
        "block": "griffin_attention",
        "n_heads": "2",
        "n_kv_heads": "1",
        "window": "24",
        "window_rule": "0 <= t - s < window",
        "rope_base": "10000",
        "rope_fraction": "0.5",
        "d_model": "128",
    }
    more = {
        "position_ids": torch.arange(83)[None].expand(B, -1),
        "attention_mask": hidden[None, None].expand(B, 1, -1, -1),
    }
    return m.RecurrentGemmaAttention(config, 0), metadata, 83, more


LAYERS = {
    "mamba": mamba,
    "mamba2": mamba2,
    "hawk": hawk,
    "griffin_attention": griffin_attention,
}


def make_layer(folder, name):
    layer, metadata, tokens, more = LAYERS[name]()
    layer = layer.double().eval()
    for key, p in layer.named_parameters():
        # Numbers that fp32 holds; those that have a meaning stay near it.
        noise = normal(*p.shape) * (p.shape[-1] ** -0.5 if p.dim() > 1 else 0.2)
        keeps = any(word in key for word in ("A_log", "dt", "norm", "recurrent_param", "D"))
        p.data = ((p.data + 0.1 * noise) if keeps else noise).float().double()
    x = normal(B, tokens, int(metadata["d_model"])).float().double().requires_grad_()
    y = layer(x, **more)
    y = y[0] if isinstance(y, tuple) else y
    dy = normal(*y.shape).float().double()
    y.backward(dy)
    tensors = {"x": x, "y": y, "dy": dy, "dx": x.grad}
    for key, p in layer.named_parameters():
        tensors.update({"param." + key: p, "grad." + key: p.grad})
    metadata["note"] = "mixer only: no pre-norm, no residual"
    metadata["reference"] = "transformers " + type(layer).__name__
    write(folder, "layer_" + name, tensors, metadata)


def main(folder, names):
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    makers = {"op_" + op: (make_operation, op) for op in OPERATIONS}
    makers.update({"layer_" + name: (make_layer, name) for name in LAYERS})
    unknown = [name for name in names if name not in makers]
    if unknown:
        sys.exit(f"{', '.join(unknown)}: cannot be made (can be: {', '.join(makers)})")
    for name in names or makers:
        torch.manual_seed(sum(name.encode()))
        make, what = makers[name]
        make(folder, what)
        print(name)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2:])
