"""peers.py on a processor: statistics, references, the recipe, rows, failures."""

import csv
import os
import re
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")

FOLDER = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ROOT = os.path.dirname(os.path.dirname(FOLDER))
sys.path[:0] = [FOLDER, os.path.join(ROOT, "python")]

import blocks  # noqa: E402
import cases  # noqa: E402
import measure  # noqa: E402
import peers  # noqa: E402
import providers  # noqa: E402
import recipe  # noqa: E402
import reference  # noqa: E402
import rows  # noqa: E402


@pytest.fixture(autouse=True)
def same_numbers():
    torch.manual_seed(0)


# ---- statistics ----


def test_a_median_has_order_statistics_for_its_interval():
    found = measure.summarize([float(i) for i in (0, 9, 1, 8, 2, 7, 3, 6, 4, 5)])
    assert found.median == 4.5
    assert (found.low, found.high) == (1, 9)
    assert found.minimum == 0


def test_samples_that_drift_are_known_less_well():
    still = measure.summarize([1 + 0.01 * (i * 7 % 20) for i in range(60)])
    drifting = measure.summarize([1 + 0.01 * (i // 3) for i in range(60)])
    assert drifting.high - drifting.low > 1.5 * (still.high - still.low)


def test_ratios_are_paired_by_round():
    def sample(number, ms):
        return measure.Sample(number, 0, ms, "", "", "")

    one = [sample(n, 2.0 * (1 + n % 3)) for n in (1, 2, 3, 5, 6)]
    other = [sample(n, 1.0 + n % 3) for n in (1, 2, 4, 5, 6)]
    a, b = measure.paired(one, other)
    assert len(a) == 4
    assert measure.ratio_of(a, b) == measure.Ratio(4, 2.0, 2.0, 2.0)


def test_runners_take_turns_and_one_that_raises_leaves():
    calls = []

    def fails():
        if len(calls) > 20:
            raise RuntimeError("no more")

    runners = [measure.Runner("a", lambda: calls.append("a")), measure.Runner("b", fails)]
    measure.alternate(measure.CpuStopwatch(), runners, runners[0], 0, 0.01)
    assert len(runners[0].samples) >= measure.LEAST_SAMPLES
    assert str(runners[1].failure) == "no more"
    assert sorted({s.position for s in runners[0].samples}) in ([0], [0, 1])


# ---- references ----


def doubles(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def test_attention_and_its_gradients():
    q, k, v, dout = doubles(3, 40, 8), doubles(40, 8), doubles(40, 8), doubles(3, 40, 8)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(
        leaves[0], leaves[1].expand(3, -1, -1), leaves[2].expand(3, -1, -1), is_causal=True
    )
    expected.backward(dout)
    out = reference.attention(q, k, v, rows=16)["out"]
    assert torch.allclose(out, expected)
    found = reference.attention(q, k, v, dout, rows=16)
    for name, leaf in zip(("dq", "dk", "dv"), leaves):
        assert torch.allclose(found[name], leaf.grad), name


def test_a_recurrence_and_its_gradients():
    x, gate, dout = doubles(2, 37, 5), -doubles(2, 37, 5).abs(), doubles(2, 37, 5)
    leaves = [y.clone().requires_grad_() for y in (x, gate)]
    h, expected = 0, []
    for t in range(x.shape[1]):
        h = leaves[1][:, t].exp() * h + leaves[0][:, t]
        expected.append(h)
    expected = torch.stack(expected, 1)
    expected.backward(dout)
    assert torch.allclose(reference.recurrence(x, gate)["out"], expected)
    found = reference.recurrence(x, gate, dout)
    assert torch.allclose(found["dx"], leaves[0].grad)
    assert torch.allclose(found["dgate"], leaves[1].grad)


@pytest.mark.parametrize("family", cases.FAMILIES)
def test_a_matrix_recurrence_chunk_by_chunk_is_that_token_by_token(family):
    decay, rule = cases.FAMILIES[family]
    n, seq_len, d_k, d_v = 2, 43, 6, 7
    q, k, v = doubles(n, seq_len, d_k), doubles(n, seq_len, d_k), doubles(n, seq_len, d_v)
    width = d_k if decay == "diagonal" else 1
    log_decay = None if decay == "none" else -doubles(n, seq_len, width).abs()
    k = torch.nn.functional.normalize(k, dim=-1)
    beta = torch.sigmoid(doubles(n, seq_len)) if rule == "delta" else None
    state, expected = torch.zeros(n, d_k, d_v, dtype=torch.float64), []
    for t in range(seq_len):
        if log_decay is not None:
            state = log_decay[:, t].exp().unsqueeze(-1) * state
        value = v[:, t]
        if beta is not None:
            value = beta[:, t, None] * (value - (k[:, t, None] @ state)[:, 0])
        state = state + k[:, t, :, None] * value[:, None]
        expected.append((q[:, t, None] @ state)[:, 0] * d_k**-0.5)
    found = reference.matrix_recurrence(q, k, v, log_decay, beta, chunk=16)
    assert torch.allclose(found, torch.stack(expected, 1))


# ---- the recipe ----


class Masked(torch.nn.Module):
    """A module of the recipe with its mask, under its parameters' own names."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        module.prepare("cpu")

    def named_parameters(self, *arguments, **named):
        return self.module.named_parameters(*arguments, **named)

    def forward(self, x):
        return self.module(x, self.module.mask)


@pytest.mark.parametrize(
    "module, pattern",
    [
        (recipe.Rat(64, 4, 64), "rat(chunk=16,heads=4)"),
        (
            recipe.RatPlus(64, 4, 64, dilation=16, window=8, initial=4),
            "ratplus(dilation=16,window=8,initial=4,heads=4)",
        ),
    ],
)
def test_the_recipe_is_our_layer(module, pattern):
    report = blocks.check(Masked(module), pattern, rounds=1)
    assert report.agrees and report.ours_agrees, str(report)


# ---- runs ----


def run(tmp_path, *options):
    """Exit code and rows of a run at the smallest sizes."""
    path = tmp_path / "peers.csv"
    common = ["--device", "cpu", "--max-time", "0.01", "--precision", "0", "--out", str(path)]
    code = peers.main([*common, *options])
    with open(path, newline="", encoding="utf-8") as file:
        return code, list(csv.DictReader(file))


def test_columns_are_those_of_the_c_programs():
    with open(os.path.join(ROOT, "bench/harness/record.h"), encoding="utf-8") as file:
        text = file.read()
    columns = text[text.index("define RECORD_COLUMNS") : text.index("enum { RECORD_SCHEMA")]
    names = re.findall(r"(?:TEXT|INTEGER|REAL)\((\w+), (?:KEY|VALUE)\)", columns)
    assert ["schema", *names] == rows.COLUMNS


def test_every_kind_of_case_is_verified_and_timed(tmp_path):
    wanted = "attention_*,kda_*,recurrence_*,rat.*,gla.train"
    code, found = run(tmp_path, "--pattern", wanted)
    assert code == 0
    assert {row["status"] for row in found} == {"ok"}
    ratios = [row for row in found if row["baseline"]]
    assert {row["baseline"] for row in ratios} == {"torch-flash", "torch-math", "recipe"}
    for row in ratios:
        assert float(row["ratio_low"]) <= float(row["ratio"]) <= float(row["ratio_high"])
    plain = [row for row in found if not row["baseline"]]
    assert all(float(row["latency_ms"]) > 0 for row in plain)
    with open(tmp_path / "peers.samples.csv", encoding="utf-8") as file:
        sampled = {row["case_id"] for row in csv.DictReader(file)}
    assert sampled == {row["case_id"] for row in plain}


def test_what_is_missing_raises_or_is_wrong_is_a_row(tmp_path, monkeypatch):
    def raises(problem):
        raise ValueError("heads of 32\nare not taken")

    def wrong(problem):
        return lambda: {"out": problem.inputs["q"]}

    more = [
        providers.Provider("gone", "gone-package", "gone_package", {"attention": raises}),
        providers.Provider("picky", "torch", "torch", {"attention": raises}),
        providers.Provider("wrong", "torch", "torch", {"attention": wrong}),
    ]
    monkeypatch.setattr(providers, "PROVIDERS", (providers.PROVIDERS[0], *more))
    code, found = run(tmp_path, "--pattern", "attention_forward/128")
    said = {row["provider"]: (row["status"], row["message"]) for row in found}
    assert code == 1
    assert said["blocks"][0] == "ok"
    assert said["gone"] == ("unsupported", "gone-package is not installed")
    assert said["picky"] == ("unsupported", "ValueError: heads of 32")
    assert said["wrong"][0] == "mismatch" and "rel_err" in said["wrong"][1]


def test_time_that_is_over_is_said(tmp_path):
    _, found = run(tmp_path, "--pattern", "attention_forward", "--seconds", "0.001")
    assert {row["status"] for row in found} == {"skipped"}


def test_a_case_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="no case is called colour"):
        run(tmp_path, "--pattern", "colour")


def test_tables_are_written_between_their_marks(tmp_path):
    run(tmp_path, "--pattern", "attention_forward,rat.prefill")
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- peers: all -->\nold\n<!-- /peers -->\nafter\n", encoding="utf-8")
    command = [sys.executable, os.path.join(ROOT, "scripts/peers_tables.py")]
    files = [str(tmp_path / "peers.csv"), str(page)]
    assert subprocess.run([*command, "--check", *files], capture_output=True).returncode == 1
    assert subprocess.run([*command, *files], capture_output=True).returncode == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n<!-- peers: all -->\n| Attention") and text.endswith("after\n")
    assert "old" not in text and "| rat L=16, prefill |" in text
    assert subprocess.run([*command, "--check", *files], capture_output=True).returncode == 0
