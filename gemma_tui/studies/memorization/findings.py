"""Membership, extraction and exposure of a measurement as notes, tables and charts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gemma_tui.figure import LineChart, Table
from gemma_tui.plots import Series
from gemma_tui.studies.memorization.law import DECODED, TOKENS, data_bits_per_parameter, membership_f1, sequences_at
from gemma_tui.studies.memorization.membership import HIGHER
from gemma_tui.studies.memorization.sequences import HELD_OUT, TRAIN
from gemma_tui.studies.memorization.suspects import FEW

SHOWN_CHANCE = "0.5"

FAINT = 0.55
"""The lowest F1 whose sequences the law's paper lists: members are hardly told from others."""


@dataclass(frozen=True, eq=False)
class Findings:
    """A part of a figure."""

    notes: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    charts: list[LineChart] = field(default_factory=list)


def membership_findings(found: dict[str, Any], curves: Mapping[str, np.ndarray], facts: dict[str, Any]) -> Findings:
    """How well each attack separates the sets, beside the baseline without a model."""
    members, others = found["members"], found["others"]
    names = [name for name, told in found["attacks"].items() if "auc" in told]
    told = {name: found["attacks"][name] for name in names}
    notes = [
        f"membership: {members:,} members of {found['members_tokens']:.1f} tokens on average, {others:,} non-members "
        f"of {found['others_tokens']:.1f}; every score is shown as {HIGHER}, whichever way it was published",
        f"best F1 is at the threshold that suits these texts best; calling every text a member gives "
        f"{2 * members / (2 * members + others):.3f}",
    ]
    if found["shots"]:
        notes.append(
            f"ReCaLL's prefix is {found['shots']} held-out sequences ({found['prefix_tokens']:,} tokens), which are no "
            "non-members of any attack"
        )
    if min(members, others) < FEW:
        notes.append(f"a set has fewer than {FEW} sequences: an interval of the AUC says little")
    notes += dict.fromkeys(a["lacks"] for a in found["attacks"].values() if "lacks" in a)
    notes += dict.fromkeys(r["reason"] for a in told.values() for r in a["rates"] if r["reason"])
    baseline = found["baseline"]
    notes += [text for text in (baseline.get("lacks"), baseline.get("warning")) if text]
    law = _law(facts)
    notes += [law] if law else []
    rows: list[Sequence[Any]] = [
        (a["label"], *a["auc"], *(r["tpr"] for r in a["rates"]), a["best_f1"], a["published"]) for a in told.values()
    ]
    rows += [(f"no model: {name}", *auc, None, None, None, HIGHER) for name, auc in baseline.get("parts", {}).items()]
    columns = ("attack", "auc", "low", "high", "tpr_at_0.1%", "tpr_at_1%", "best_f1", "published_as")
    defined = [(a["label"], a["formula"], a["threshold"], a["source"], a["note"]) for a in told.values()]
    lines = [Series(a["label"], curves[f"{name}_fpr"], curves[f"{name}_tpr"]) for name, a in told.items()]
    chart = LineChart("ROC: true positives", [*lines, Series("chance", [0.0, 1.0], [0.0, 1.0])], "false positives")
    tables = [
        Table("membership", columns, rows),
        Table("attack", ("attack", "higher = member of", "best_f1_at", "source", "note"), defined),
    ]
    return Findings(notes, tables, [chart])


def _law(facts: dict[str, Any]) -> str:
    """What the decoded law says of as many parameters and sequences; it is of sequences of 64 tokens."""
    if facts["max_tokens"] != TOKENS or not facts["rows"]:
        return ""
    counts = facts["rows"][TRAIN]
    count = counts["rows"] - sum(counts[kind] for kind in ("empty", "masked", "repeated"))
    every = facts["parameters"]["every"]
    f1 = membership_f1(data_bits_per_parameter(every, count, TOKENS, facts["vocabulary"]))
    return (
        f"law: F1 {f1:.3f} of the loss attack for {every:,} parameters trained on nothing but these {count:,} "
        f"sequences of {TOKENS} tokens, {FAINT:g} for {sequences_at(FAINT, every, TOKENS, facts['vocabulary']):,.0f} "
        f"({DECODED})"
    )


def extraction_findings(found: dict[str, Any], rows: Sequence[dict[str, Any]]) -> Findings:
    """What greedy decoding and draws give back of each set, and the sequences that are given back most."""
    sets = found["sets"]
    names = [name.replace("_", "-") for name in sets]
    scheme = found["scheme"]
    notes = [
        f"extraction {found['split']}: exact by one teacher-forced pass of all sequences; near (edits in at most 10 % "
        "of the suffix) by greedy decoding of the compared ones",
        f"n draws of temperature {scheme['temperature']:g} and top-k {scheme['top_k']} hold the suffix with a chance "
        "of p at least (arXiv:2410.19482)",
    ]
    for name, counts in found["rows"].items():
        words = {
            "short": "are too short",
            "masked": "have a suffix that is not supervised",
            "repeated": "are there before",
            "shared": "are in the training set",
            "empty": "hold no text",
        }
        left = [f"{counts[kind]:,} {text}" for kind, text in words.items() if counts[kind]]
        if counts["rows"]:
            kept = (
                f"{name.replace('_', '-')}: {counts['kept']:,} of {counts['rows']:,} rows are cut to {found['split']}"
            )
            notes.append(f"{kept} ({', '.join(left)})" if left else kept)
    if HELD_OUT not in sets:
        notes.append("nothing is held out for extraction, so what is given back may be what anyone would write")
    measures = {
        "sequences": "sequences",
        "exact": "exact",
        "exact_share": "share exact",
        "exact_without_reasons": "exact, not tagged predictable",
        "compared": "compared for near matches",
        "near": "near or exact of these",
        "near_share": "share near",
        "recited": "tokens recited, mean",
    }
    table = [(words, *(part[key] for part in sets.values())) for key, words in measures.items()]
    grids = [part["discoverable"] for part in sets.values()]
    cells = [(c[0]["chance"], c[0]["draws"], *(cell["share"] for cell in c)) for c in zip(*grids, strict=True)]
    return Findings(
        notes,
        [
            Table("extraction", ("measure", *names), table),
            Table("discoverable", ("p", "n", *names), cells),
            _extracted(rows),
        ],
    )


def _extracted(rows: Sequence[dict[str, Any]]) -> Table:
    order = sorted(rows, key=lambda row: (row["set"] != TRAIN, -row["recited"], -(row["log_prob"] or -np.inf)))
    copied = ("zlib_ratio", "copies", "overlap", "templated", "repetition", "tf_idf")
    columns = ("row", "set", "exact", "near", "edits", "recited", "log_prob", f"n_at_{SHOWN_CHANCE}", *copied)
    cells = [
        (
            *(row[name] for name in columns[:7]),
            row["draws"][SHOWN_CHANCE],
            *(row[name] for name in copied),
            ", ".join(row["reasons"]),
            row["text"],
            row["decoded"],
        )
        for row in order
    ]
    return Table("extracted", (*columns, "predictable", "text", "decoded"), cells)


def exposure_findings(found: dict[str, Any]) -> Findings:
    """Exposure by repeats, and of each canary."""
    rows = found["repeats"]
    notes = [
        f"exposure: {len(found['canaries']):,} canaries of {found['space_bits']:.1f} bits ({found['space']}), each "
        f"among {found['strings']:,} strings that were not planted: at most {rows[0]['ceiling']:.2f} bits can be seen; "
        "what is not known has 1.44 on average"
    ]
    columns = ("repeats", "canaries", "mean", "lowest", "highest", "ceiling")
    each = ("repeats", "bits", "rank", "loss", "text")
    tables = [
        Table("exposure", columns, [tuple(row[name] for name in columns) for row in rows]),
        Table("canary", each, [tuple(canary[name] for name in each) for canary in found["canaries"]]),
    ]
    x = [float(row["repeats"]) for row in rows]
    lines = [Series(name, x, [float(row[name]) for row in rows]) for name in ("mean", "ceiling")]
    return Findings(notes, tables, [LineChart("exposure, bits", lines, "repeats")] if len(rows) > 1 else [])
