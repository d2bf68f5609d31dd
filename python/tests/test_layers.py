"""Layers by their patterns: parameters by name, steps, gradients."""

import numpy as np
import pytest

import blocks
from blocks import _library

B, T, D = 2, 24, 64
NAMES = _library.listed("layer_name")


def error(a, b):
    return np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)


def inputs(seed=0):
    return np.random.default_rng(seed).standard_normal((B, T, D)).astype(np.float32)


def copy_parameters(to, source):
    for name in source:
        to[name] = source[name]


def silu(x):
    return x / (1 + np.exp(-x))


def log_sigmoid(x):
    return -np.logaddexp(0, -x)


def gla_formula(p, x, heads):
    """The GLA layer in fp64, without the norm before it and the residual."""
    x = x.astype(np.float64)
    q, k, v, g = (x @ p[n + "_proj.weight"].T for n in "qkvg")
    decay = x @ p["gk_proj.0.weight"].T @ p["gk_proj.1.weight"].T + p["gk_proj.1.bias"]
    q, k, v, decay = (
        y.reshape(B, T, heads, -1) for y in (q, k, v, np.exp(log_sigmoid(decay) / 16))
    )
    state = np.zeros((B, heads, k.shape[-1], v.shape[-1]))
    out = np.empty_like(v)
    for t in range(T):
        state = decay[:, t][..., None] * state + k[:, t][..., None] * v[:, t][..., None, :]
        out[:, t] = np.einsum("bhk,bhkv->bhv", q[:, t], state) / np.sqrt(q.shape[-1])
    out *= ((out**2).mean(-1, keepdims=True) + 1e-5) ** -0.5
    out *= p["g_norm.weight"]
    return (out.reshape(B, T, -1) * silu(g)) @ p["o_proj.weight"].T


def test_gla_is_its_formula():
    layer = blocks.Layer("gla(heads=4)", D, B, T, mode="prefill", mixer_only=True)
    generator = np.random.default_rng(3)
    for name, shape in layer.shapes.items():
        layer[name] = generator.standard_normal(shape) * 0.2
    x = inputs()
    parameters = {name: layer[name].astype(np.float64) for name in layer}
    assert error(layer(x), gla_formula(parameters, x, 4)) < 2e-5
    assert 0 <= layer.verify() <= 1


@pytest.mark.parametrize("mixer_only", [True, False])
@pytest.mark.parametrize("pattern", NAMES + ["rat(chunk=4),swa(window=5)"])
def test_fp32_agrees_with_the_reference(pattern, mixer_only):
    layer = blocks.Layer(pattern, D, B, T, seed=1, mixer_only=mixer_only)
    reference = blocks.Layer(pattern, D, B, T, mixer_only=mixer_only, device="reference")
    assert layer.shapes == reference.shapes and len(layer) >= 2
    for name in layer:
        layer[name] = layer[name] * (5 if name.endswith("proj.weight") else 1)
    copy_parameters(reference, layer)
    x, dy = inputs(1), inputs(2)
    y, expected = layer(x), reference(x)
    assert expected.dtype == np.float64
    assert error(y, expected) < 2e-5
    assert error(layer.backward(dy), reference.backward(dy)) < 2e-5
    for name in layer:
        assert error(layer.gradient(name), reference.gradient(name)) < 2e-4


@pytest.mark.parametrize("pattern", NAMES)
def test_steps_after_a_prompt(pattern):
    whole = blocks.Layer(pattern, D, B, T, mode="prefill")
    part = blocks.Layer(pattern, D, B, 8, mode="prefill", capacity=T)
    alone = blocks.Layer(pattern, D, B, mode="generation", capacity=T)
    copy_parameters(part, whole)
    copy_parameters(alone, whole)
    x = inputs()
    expected = whole(x)
    assert error(part(x[:, :8]), expected[:, :8]) < 1e-5
    for t in range(T):
        if t >= 8:
            assert error(part.step(x[:, t], t), expected[:, t]) < 1e-4
        assert error(alone.step(x[:, t], t), expected[:, t]) < 1e-4
    alone.clear()
    assert error(alone.step(x[:, 0], 0), expected[:, 0]) < 1e-4


def test_a_gradient_is_a_difference():
    layer = blocks.Layer("rat(chunk=4)", D, B, T, device="reference", seed=2)
    x, dy = inputs(1).astype(np.float64), inputs(2).astype(np.float64)
    direction = inputs(3).astype(np.float64)
    layer(x)
    dx = layer.backward(dy)
    ends = [np.sum(dy * layer(x + s * 1e-5 * direction)) for s in (1, -1)]
    assert np.sum(dx * direction) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6)


def test_names_of_a_stack():
    layer = blocks.Layer("gla(heads=2),rat(chunk=4)", D, B, T)
    assert layer.shapes["layers.0.q_proj.weight"] == (D // 2, D)
    assert any(name.startswith("layers.1.") for name in layer)
    assert layer.pattern.startswith("gla(heads=2)")
    value = np.random.default_rng(0).standard_normal((D // 2, D)).astype(np.float32)
    layer["layers.0.q_proj.weight"] = value
    assert np.array_equal(layer["layers.0.q_proj.weight"], value)


def test_mistakes_are_named():
    with pytest.raises(blocks.Invalid, match="no layer 'brick'"):
        blocks.Layer("brick", D)
    layer = blocks.Layer("gla(heads=4)", D, B, T)
    with pytest.raises(blocks.Invalid, match="no parameter 'q.weight', but .*q_proj.weight"):
        layer["q.weight"] = np.zeros(3)
    with pytest.raises(blocks.Invalid, match="q_proj.weight is .* not"):
        layer["q_proj.weight"] = np.zeros((D, D))
    with pytest.raises(KeyError):
        layer["q.weight"]
    with pytest.raises(blocks.Invalid, match="input is"):
        layer(inputs()[:, :3])
    with pytest.raises(blocks.Invalid, match="after forward"):
        layer.backward(inputs())
    with pytest.raises(blocks.Invalid, match="no step"):
        layer.step(inputs()[:, 0], 0)
    alone = blocks.Layer("gla(heads=4)", D, B, mode="generation", capacity=T)
    with pytest.raises(blocks.Invalid, match="position 24"):
        alone.step(inputs()[:, 0], T)


def test_a_layer_writes_into_the_array_that_it_is_given():
    layer = blocks.Layer("rat(chunk=8)", 64, batch=2, seq_len=24)
    x = np.random.default_rng(0).standard_normal((2, 24, 64)).astype(np.float32)
    y, dx = np.empty_like(x), np.empty_like(x)
    assert layer.forward(x, out=y) is y
    assert np.array_equal(y, layer.forward(x))
    assert layer.backward(x, out=dx) is dx
    assert np.array_equal(dx, layer.backward(x))
    with pytest.raises(blocks.Invalid, match="out has to be a dense"):
        layer.forward(x, out=np.empty((2, 24, 32), np.float32))
