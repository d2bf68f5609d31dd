"""blocks.check: of a formula in numpy, and of the modules of docs/python.md in PyTorch."""

import pathlib
import re

import numpy as np
import pytest

import blocks

DOCS = pathlib.Path(__file__).resolve().parent.parent.parent / "docs" / "python.md"

B, T, D, H = 1, 5, 16, 2


def log_sigmoid(x):
    return -np.logaddexp(0, -x)


class Gla:
    """Gated linear attention in fp64, its gradients by central differences."""

    def __init__(self, wrong_decay=False):
        generator = np.random.default_rng(0)
        shapes = {
            "q_proj.weight": (D // 2, D),
            "k_proj.weight": (D // 2, D),
            "v_proj.weight": (D, D),
            "g_proj.weight": (D, D),
            "gk_proj.0.weight": (16, D),
            "gk_proj.1.weight": (D // 2, 16),
            "gk_proj.1.bias": (D // 2,),
            "g_norm.weight": (D // H,),
            "o_proj.weight": (D, D),
        }
        self.parameters = {
            name: (0.4 * generator.standard_normal(shape)).astype(np.float32).astype(np.float64)
            for name, shape in shapes.items()
        }
        self.wrong_decay = wrong_decay

    def forward(self, x):
        p = self.parameters
        q, k, v, g = (x @ p[n + "_proj.weight"].T for n in "qkvg")
        gate = x @ p["gk_proj.0.weight"].T @ p["gk_proj.1.weight"].T + p["gk_proj.1.bias"]
        decay = np.exp(log_sigmoid(gate) / 16)
        q, k, v, decay = (y.reshape(B, T, H, -1) for y in (q, k, v, decay))
        state, out = 0, np.empty_like(v)
        for t in range(T):
            update = k[:, t][..., None] * v[:, t][..., None, :]
            a = decay[:, t][..., None]
            state = a * (state + update) if self.wrong_decay else a * state + update
            out[:, t] = np.einsum("bhk,bhkv->bhv", q[:, t], state) / np.sqrt(q.shape[-1])
        out *= ((out**2).mean(-1, keepdims=True) + 1e-5) ** -0.5 * p["g_norm.weight"]
        return (out.reshape(B, T, D) * g / (1 + np.exp(-g))) @ p["o_proj.weight"].T

    def run(self, x, dy):
        def difference(array):
            gradient = np.empty(array.size)
            flat = array.reshape(-1)
            for i in range(array.size):
                kept, ends = flat[i], []
                for step in (1e-5, -1e-5):
                    flat[i] = kept + step
                    ends.append(np.sum(dy * self.forward(x)))
                flat[i] = kept
                gradient[i] = (ends[0] - ends[1]) / 2e-5
            return gradient.reshape(array.shape)

        y = self.forward(x)
        return y, difference(x), {n: difference(p) for n, p in self.parameters.items()}


def check(module, pattern="gla(heads=2)", **more):
    return blocks.check(module, pattern, batch=B, seq_len=T, **{"rounds": 0, **more})


def test_a_formula_agrees(capsys):
    report = check(Gla(), rounds=1)
    assert str(report) + "\n" == capsys.readouterr().out
    assert report.shape == (B, T, D)
    assert report.agrees and report.ours_agrees and not report.differs
    assert {t.name for t in report.tensors} >= {"y", "dx", "gradient of gk_proj.1.bias"}
    assert len(report.tensors) == 2 + len(Gla().parameters)
    assert report["y"].theirs < 1e-6
    assert report.ratio > 0 and "all 11 tensors agree" in str(report)


def test_a_decay_in_the_wrong_place_is_caught():
    report = check(Gla(wrong_decay=True))
    assert not report.agrees and report.ours_agrees
    # The norm hides it at the first token, whose output is a multiple of v.
    assert "y" in report.differs and report.first_token == 1
    assert report.differs[0].startswith("gradient of gk_proj")
    assert "the module is not gla(heads=2)" in str(report)


def test_one_wrong_gradient_is_named():
    class Wrong(Gla):
        def run(self, x, dy):
            y, dx, gradients = super().run(x, dy)
            gradients["k_proj.weight"] = gradients["k_proj.weight"] * 1.001
            return y, dx, gradients

    report = check(Wrong())
    assert report.differs == ["gradient of k_proj.weight"]
    assert report.first_token is None


def test_a_width_that_no_layer_has():
    module = Gla()
    module.parameters = {"weight": np.zeros((3, 5))}
    with pytest.raises(blocks.Invalid, match="give d_model"):
        check(module)


def test_it_can_be_quiet(capsys):
    check(Gla(), quiet=True, d_model=D)
    assert capsys.readouterr().out == ""


def test_a_nan_is_caught():
    class Wrong(Gla):
        def run(self, x, dy):
            y, dx, gradients = super().run(x, dy)
            y[0, 3, 2] = np.nan
            return y, dx, gradients

    report = check(Wrong())
    assert report.differs == ["y"] and report.first_token == 3


def test_names_are_translated_and_missed():
    module = Gla()
    module.parameters["mine"] = module.parameters.pop("q_proj.weight")
    with pytest.raises(blocks.Invalid, match=r"no 'q_proj.weight' \[8, 16\].*no 'mine' \[8, 16\]"):
        check(module)
    module.forward = lambda x: x  # it is refused before it runs
    module = Gla()
    module.parameters["o_norm.weight"] = module.parameters.pop("g_norm.weight")
    module.parameters["spare"] = np.zeros(3)
    with pytest.raises(blocks.Invalid, match=r"gla\(heads=2\) has no 'spare' \[3\]"):
        check(module)


def blocks_of_docs():
    """The Python of docs/python.md: the module, and the line that is wrong."""
    return re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.S)[:2]


def module_of_docs(wrong):
    code, line = blocks_of_docs()
    code = code[: code.index("torch.manual_seed")]
    if wrong:
        right = "            state = a[:, t, :, :, None] * state + update\n"
        assert right in code
        code = code.replace(right, line)
    names = {}
    exec(code, names)
    return names["GatedLinearAttention"]


def test_the_module_of_the_docs():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    module = module_of_docs(wrong=False)(128, 4)
    report = blocks.check(module, "gla(heads=4)", rounds=1)
    assert report.agrees and report.ours_agrees, str(report)
    assert len(report.tensors) == 11 and report.ratio > 0
    assert all(p.grad is None for p in module.parameters())


def test_the_wrong_module_of_the_docs():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    module = module_of_docs(wrong=True)(128, 4)
    report = blocks.check(module, "gla(heads=4)", rounds=0)
    assert not report.agrees and report.ours_agrees
    assert report.differs[0].startswith("gradient of gk_proj") and report.first_token == 0


def test_float64_and_translated_names_of_a_module():
    torch = pytest.importorskip("torch")
    inner = module_of_docs(wrong=False)(64, 2)

    class Wrapper(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mixer = inner

        def forward(self, x):
            return self.mixer(x), None

    names = {"mixer." + name: name for name, _ in inner.named_parameters()}
    report = blocks.check(Wrapper().double(), "gla(heads=2)", names=names, rounds=0)
    assert report.agrees and report["y"].theirs < 1e-6 and report.shape[2] == 64


def test_a_whole_layer_with_norm_and_residual():
    torch = pytest.importorskip("torch")
    mixer = module_of_docs(wrong=False)

    class Whole(mixer):
        def __init__(self, d, heads):
            super().__init__(d, heads)
            self.input_norm = torch.nn.RMSNorm(d, eps=1e-6)

        def forward(self, x):
            return x + super().forward(self.input_norm(x))

    torch.manual_seed(1)
    report = blocks.check(Whole(64, 2), "gla(heads=2)", rounds=0)
    assert report.agrees and "gradient of input_norm.weight" in [t.name for t in report.tensors]


def test_operations_on_tensors():
    torch = pytest.importorskip("torch")
    q, k, v = torch.randn(3, 2, 4, 33, 16).transpose(2, 3)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.double().transpose(1, 2) for x in (q, k, v)), is_causal=True
    ).transpose(1, 2)
    out = blocks.attention(q, k, v, causal=True)
    assert out.dtype == torch.float32 and torch.is_tensor(out)
    assert torch.linalg.norm(out - expected) < 1e-5 * torch.linalg.norm(expected)
    wide = blocks.attention(q.double(), k.double(), v.double())
    assert torch.linalg.norm(wide - expected) < 1e-12 * torch.linalg.norm(expected)
    half = blocks.attention(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert torch.linalg.norm(half - expected) < 2e-2 * torch.linalg.norm(expected)


def test_gradients_of_operations_in_torch():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    q, k, v, gate = random(1, 5, 2, 4), random(1, 5, 1, 4), random(1, 5, 1, 4), random(1, 5, 2, 4)
    assert torch.autograd.gradcheck(lambda *t: blocks.attention(*t[:3], gate=t[3]), (q, k, v, gate))
    q, k, v, decay, h0 = (random(1, 5, 2, n) for n in (4, 4, 3, 4, 1))
    h0 = random(1, 2, 4, 3)
    run = lambda *t: blocks.gla(*t[:3], -t[3].abs(), h0=t[4])  # noqa: E731
    assert torch.autograd.gradcheck(run, (q, k, v, decay, h0))
    out, state = blocks.gla(q, k, v, -decay.abs(), final_state=True)
    assert out.requires_grad and not state.requires_grad
    x, g, bias, z = random(1, 5, 6), random(1, 5, 6), random(6), random(1, 5, 6)
    run = lambda *t: blocks.recurrence(t[0], t[1], gate_bias=t[2], z=t[3])  # noqa: E731
    assert torch.autograd.gradcheck(run, (x, g, bias, z))
    with torch.no_grad():
        assert not blocks.recurrence(x, g).requires_grad
    narrow = x.detach().float().requires_grad_()
    blocks.recurrence(narrow, g.detach().float()).sum().backward()
    assert narrow.grad.dtype == torch.float32 and torch.all(torch.isfinite(narrow.grad))
