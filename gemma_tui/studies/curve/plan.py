"""What is decoded, and in which ways."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

from engines.base import Sampling
from engines.blocks import BlockDecoding
from gemma_tui.errors import UsageError
from gemma_tui.studies.generation import (
    AR,
    DECODERS,
    SBD,
    STOP_IDS,
    GenerationPlan,
    mask_token_option,
    order_option,
)  # fmt: skip
from gemma_tui.studies.plan import command, option, options, parse
from gemma_tui.studies.turns import PROMPT_FORMS

SHARED = ("decoder", "block", "gamma", "order", "mask_token", "max_tokens", "stop", "seed")
"""Options that mean the same for a single text."""

MAX_WAYS = 100


@dataclass(frozen=True)
class CurvePlan:
    """A model and rows that it goes on from, greedily; every field is an option of ``gemma-tui generate --data``."""

    model: str = option("nano", "model: a name, a folder, a hub id or a run")
    data: str = option(
        "",
        "the speed-quality curve over rows: .jsonl or .txt, a folder (its test rows) or hf:REPO; --block and --gamma "
        "take several values then, with commas, and their defaults are sbd, 16 and 0,0.01,0.1,0.4",
        required=True,
    )
    decoder: str = option(SBD, "ar decodes token by token only", choices=DECODERS)
    block: str = option("16", "places decided together; several with commas", decoders=(SBD,))
    gamma: str = option(
        "0,0.01,0.1,0.4",
        "bounds of the entropy that one pass decides, inf for all; several with commas",
        decoders=(SBD,),
    )
    order: str = order_option()
    mask_token: int | None = mask_token_option()
    max_tokens: int = option(128, "new tokens of a row at most", unit="tokens", low=1, high=131_072)
    stop: str = option("", r"strings that end a text, with commas between; \n a newline, \, a comma")
    limit: int = option(0, "rows, drawn by the seed; 0 for all", low=0, high=10_000_000)
    prompts: str | None = option(
        None,
        "how prompt and completion are written",
        choices=PROMPT_FORMS,
        open_means="as the run was trained, else turns",
    )
    prefix: int = option(
        32, "tokens of a row without an answer that are gone on from", unit="tokens", low=1, high=131_072
    )
    batch_size: int = option(1, "rows decoded side by side", low=1, high=4096)
    dtype: str | None = option(
        None, "dtype of the weights", choices=("float32", "bfloat16"), open_means="the device's default"
    )
    seed: int = option(0, "seed of the choice of rows", low=0, high=2**31)
    name: str = option("", "name of the run; empty for curve")

    def sampling(self) -> Sampling:
        """Greedy, with Gemma's stop tokens."""
        return Sampling(self.max_tokens, stop_ids=STOP_IDS)


def command_of(plan: CurvePlan, engine: str) -> str:
    """What does the same on the command line."""
    return command(("generate", plan.model, "--engine", engine), replace(plan, model=CurvePlan.model))


@dataclass(frozen=True)
class Way:
    """One way to decode: a point of the curve.

    Attributes:
        block: 1 for next-token decoding, which has no ``gamma``.
    """

    block: int = 1
    gamma: float | None = None

    @property
    def key(self) -> str:
        """``ar``, or like ``sbd-16-0.1``."""
        return AR if self.gamma is None else f"{SBD}-{self.block}-{self.gamma:g}"

    def blocks(self, order: str, mask: int) -> BlockDecoding | None:
        """For the engine; None for token by token."""
        return None if self.gamma is None else BlockDecoding(self.block, self.gamma, order, mask)


def ways_of(plan: CurvePlan) -> list[Way]:
    """Next-token decoding, then every block size with every bound.

    Raises:
        UsageError: a value is no number or out of range, or they are too many.
    """
    if plan.decoder == AR:
        return [Way()]
    ways = [Way(int(b), g) for b, g in itertools.product(_values(plan, "block"), _values(plan, "gamma"))]
    if len(ways) > MAX_WAYS:
        raise UsageError(f"these are {len(ways):,} ways to decode; {MAX_WAYS} at most make a curve: give fewer")
    return [Way(), *ways]


def _values(plan: CurvePlan, name: str) -> list[float]:
    single = next(o for o in options(GenerationPlan) if o.name == name)
    return sorted({parse(single, part.strip(), "generate") for part in str(getattr(plan, name)).split(",")})
