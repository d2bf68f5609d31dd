#!/usr/bin/env python3
"""Writes the tables of rivals into documents, from the rows of `make bench-peers`.

    scripts/peers_tables.py results/h200/peers.csv docs/h200.md README.md
    scripts/peers_tables.py --check ...        1 if a document is not as it would be written

A document has a pair of lines, <!-- peers: all --> (or short) and <!-- /peers -->. What is between
them is replaced: `all` has every case, `short` those of SHORT. The last column is the paired ratio
to the fastest rival and its 95% interval; below stand the cases in which ours is slower, and why
a rival has no figure.
"""

import csv
import re
import sys

OURS = "blocks"
NAMES = {
    "blocks": "ours",
    "cudnn": "cuDNN",
    "flash3": "FA3",
    "fa4": "FA4",
    "torch-cudnn": "PyTorch, cuDNN",
    "torch-flash": "PyTorch, FA2",
    "flashinfer": "FlashInfer",
    "flash_qla": "FlashQLA",
    "mamba_ssm": "mamba-ssm",
}
SHORT = (
    ("attention_forward", "4096"),
    ("attention_forward", "131072"),
    ("attention_backward", "4096"),
    ("attention_backward", "131072"),
    ("gated_delta_forward", "32768"),
    ("gated_delta_backward", "32768"),
    ("rat", "4096"),
    ("rat", "131072"),
    ("gla", "4096"),
    ("retnet", "4096"),
    ("gated_delta_net", "4096"),
)
KEY = ("block", "pattern", "pass", "batch", "seq_len", "n_heads", "kv_heads", "d_k", "d_v", "data")
GROUPS = (
    ("Attention, TFLOP/s of visible pairs", lambda row: row["block"].startswith("attention_")),
    ("Recurrences as operations, ms", lambda row: row["pass"] == "kernel"),
    ("Layers with their projections, ms", lambda row: True),
)


def read(path):
    """The rows of each case, by the case's key; of rows that repeat the last counts."""
    cases = {}
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            case = cases.setdefault(tuple(row[name] for name in KEY), {})
            case[(row["provider"], row["baseline"])] = row
    return cases


def measured(row):
    return row is not None and row["status"] in ("ok", "noisy")


def rivals(case):
    """The ratio rows of a case, in which ours is the subject."""
    return [row for (_, baseline), row in case.items() if baseline and measured(row)]


def closest(case):
    """The ratio to the rival that is fastest beside ours; None if there is none."""
    return min(rivals(case), key=lambda row: float(row["ratio"]), default=None)


def title(row):
    words = row["block"].replace("_", " ")
    if row["chunk"]:
        words += f" L={row['chunk']}"
    if row["pass"] == "kernel":
        sizes = f"{row['n_heads']} × {row['d_k']}"
        sizes += f"/{row['d_v']}" if row["d_v"] != row["d_k"] else ""
        words += f", {sizes}"
        if row["kv_heads"] != row["n_heads"]:
            words += f" over {row['kv_heads']}"
    else:
        words += f", {row['pass']}"
    if row["data"] != "normal":
        words += f", {row['data'].replace('-', ' ')}"
    return words


def figure(case, provider):
    row = case.get((provider, ""))
    if not measured(row):
        return ""
    value = row["tflops"] or row["latency_ms"]
    digits = f"{float(value):.3g}"
    return f"{float(digits):.0f}" if float(digits) >= 100 else digits


def ratio_text(row):
    if row is None:
        return ""
    low, high = float(row["ratio_low"]), float(row["ratio_high"])
    return f"{float(row['ratio']):.2f} ({low:.2f} to {high:.2f})"


def table(heading, cases):
    """A table of cases, as lines of Markdown."""
    found = {p for case in cases for (p, b), row in case.items() if not b and measured(row)}
    providers = [p for p in NAMES if p in found] + sorted(found - set(NAMES))
    names = [NAMES.get(p, p) for p in providers]
    lines = ["| " + " | ".join([heading, "B × T", *names, "fastest rival / ours"]) + " |"]
    lines.append("|---|---|" + "---:|" * (len(names) + 1))
    for case in cases:
        row = next(iter(case.values()))
        cells = [title(row), f"{row['batch']} × {row['seq_len']}"]
        cells += [figure(case, p) for p in providers]
        lines.append("| " + " | ".join([*cells, ratio_text(closest(case))]) + " |")
    return lines


def losses(cases):
    """One line: where a rival is faster, with the interval clear of 1."""
    found = []
    for case in cases:
        row = closest(case)
        if row is not None and float(row["ratio_high"]) < 1:
            rival = f"{NAMES.get(row['baseline'], row['baseline'])}, {float(row['ratio']):.2f}"
            found.append(f"{title(row)} at T = {row['seq_len']} ({rival})")
    if not found:
        return "No rival that was measured is faster in any of these cases."
    return "Ours is slower than the fastest rival in: " + "; ".join(found) + "."


def absences(cases):
    """Which providers have no figure where others have, and what they said."""
    said = {}
    for case in cases:
        for (provider, baseline), row in case.items():
            if not baseline and not measured(row):
                key = (NAMES.get(provider, provider), row["status"], row["message"])
                said.setdefault(key, []).append(f"{title(row)} at {row['seq_len']}")
    lines = []
    for (provider, status, message), where in said.items():
        place = "all its cases" if "not installed" in message else "; ".join(where)
        lines.append(f"- {provider}, {status}: {message} ({place})")
    return lines


def is_short(row):
    plain = row["data"] == "normal" and row["kv_heads"] in ("", row["n_heads"])
    return plain and (row["block"], row["seq_len"]) in SHORT and row["d_k"] in ("", "128")


def written(path, kind):
    """What stands between the marks."""
    cases = read(path)
    chosen = [c for c in cases.values() if kind == "all" or is_short(next(iter(c.values())))]
    lines, left = [], chosen
    for heading, belongs in GROUPS:
        group = [c for c in left if belongs(next(iter(c.values())))]
        left = [c for c in left if not belongs(next(iter(c.values())))]
        if group:
            lines += [*table(heading, group), ""]
    lines.append(losses(chosen))
    if kind == "all":
        lines += ["", *absences(chosen)] if absences(chosen) else []
    first = next(iter(chosen[0].values())) if chosen else None
    if first:
        lines += ["", f"Commit {first['git_sha'][:8]}; {first['runtime']}; {first['cuda']}."]
    return "\n".join(lines)


MARKS = re.compile(r"(<!-- peers: (all|short) -->\n)(.*?)(<!-- /peers -->)", re.DOTALL)


def main(arguments):
    check = arguments[:1] == ["--check"]
    arguments = arguments[check:]
    if len(arguments) < 2:
        print(__doc__.strip(), file=sys.stderr)
        return 2
    path, *documents = arguments
    stale = False
    for document in documents:
        with open(document, encoding="utf-8") as file:
            text = file.read()
        if not MARKS.search(text):
            print(f"peers_tables: {document} has no <!-- peers: all --> or short", file=sys.stderr)
            return 1
        new = MARKS.sub(lambda m: m[1] + written(path, m[2]) + "\n" + m[4], text)
        if new == text:
            continue
        stale = True
        if check:
            print(f"peers_tables: {document} is not what {path} says", file=sys.stderr)
            continue
        with open(document, "w", encoding="utf-8") as file:
            file.write(new)
        print(document)
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
