"""What a measurement tells: bits and losses of each set, and of each sequence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from gemma_tui.studies.memorization.bits import Parameters, per_parameter, sequence_bits, totals, uniform
from gemma_tui.studies.memorization.sequences import HELD_OUT, TRAIN, Sequences
from gemma_tui.text import one_line
from gemma_tui.tokenizer import Tokenizer

SHOWN = 60
"""Tokens of a sequence that its row shows."""


def supervised(sequences: Sequences) -> np.ndarray:
    """How many tokens of each sequence are counted, int ``[n]``."""
    return np.array([int(window.supervised[1:].sum()) for window in sequences.windows])


def summary(
    sequences: Sequences, target: np.ndarray, reference: np.ndarray | None, parameters: Parameters, vocabulary: int
) -> dict[str, Any]:
    """Bits, losses and bits per parameter of each set, ready for JSON.

    Without a reference there are only signed bits, against the uniform code of log2 V bits a token; with one, bits per
    parameter are of the clipped ones.

    Args:
        target, reference: log-likelihoods of every sequence, nats.
        vocabulary: V.
    """
    tokens = supervised(sequences)
    found: dict[str, Any] = {"against": "uniform code" if reference is None else "reference"}
    for name, numbers in sequences.sets.items():
        chosen = slice(numbers.start, numbers.stop)
        count = int(tokens[chosen].sum())
        row: dict[str, Any] = {"sequences": len(numbers), "tokens": count, "loss": -float(target[chosen].sum()) / count}
        if reference is None:
            signed = totals(sequence_bits(target[chosen], uniform(tokens[chosen], vocabulary))).signed
            row |= {"signed_against_uniform": signed, **per_parameter(signed, parameters)}
        else:
            bits = sequence_bits(target[chosen], reference[chosen])
            every = totals(bits)
            row |= {
                "reference_loss": -float(reference[chosen].sum()) / count,
                "signed": every.signed,
                "clipped": every.clipped,
                "mixture": every.mixture,
                "bits_per_token": every.clipped / count,
                "sequences_with_bits": int((bits.clipped > 0).sum()),
                **per_parameter(every.clipped, parameters),
            }
        found[name] = row
    if HELD_OUT in found:
        found["gap"] = found[HELD_OUT]["loss"] - found[TRAIN]["loss"]
    return found


def sequence_rows(
    sequences: Sequences, target: np.ndarray, reference: np.ndarray | None, vocabulary: int, tokenizer: Tokenizer
) -> Iterator[dict[str, Any]]:
    """A row for each sequence, ready for JSON: its set, row, beginning, likelihoods (nats) and bits."""
    tokens = supervised(sequences)
    bits = sequence_bits(target, uniform(tokens, vocabulary) if reference is None else reference)
    for name, numbers in sequences.sets.items():
        for i in numbers:
            row = {
                "set": name,
                "row": int(sequences.rows[i]),
                "tokens": int(tokens[i]),
                "target": float(target[i]),
                "reference": None if reference is None else float(reference[i]),
            }
            if reference is None:
                row["signed_against_uniform"] = float(bits.signed[i])
            else:
                row |= {kind: float(getattr(bits, kind)[i]) for kind in ("signed", "clipped", "mixture")}
            shown = sequences.windows[i].ids[:SHOWN].tolist()
            yield {**row, "text": one_line(tokenizer.decode(shown), SHOWN)}
