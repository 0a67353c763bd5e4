"""The same prompt written token by token and in blocks, by the same model, one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from engines.base import Engine
from gemma_tui.hub.models import Model
from gemma_tui.studies.generation import AR, Generation, GenerationPlan, settled, warm, write
from gemma_tui.studies.plan import honoured
from gemma_tui.tokenizer import BOS

if TYPE_CHECKING:
    from gemma_tui.tokenizer import Tokenizer

WAITING, WRITING, DONE = "waiting", "writing", "done"


@dataclass
class Side:
    """One of the texts."""

    plan: GenerationPlan
    generation: Generation = field(default_factory=Generation)
    state: str = WAITING


@dataclass
class SideBySide:
    """Texts of one prompt, in the order in which they are written.

    Attributes:
        tokenizer: the model's, once it is read.
        model, engine: that write them, once they have begun.
    """

    sides: tuple[Side, ...] = ()
    tokenizer: Tokenizer | None = None
    model: str = ""
    engine: str = ""

    def label(self, token: int) -> str:
        """A token as it stands in the vocabulary; not cleaned."""
        return self.tokenizer.token(token) if self.tokenizer else ""


def sides_of(plan: GenerationPlan, beside: bool) -> SideBySide:
    """The text of a plan, and before it, where that is in blocks, the same token by token.

    Args:
        beside: whether the latter is wanted.
    """
    plans = [plan]
    if beside and plan.decoder != AR:
        plans.insert(0, honoured(replace(plan, decoder=AR)))
    return SideBySide(tuple(map(Side, plans)))


def write_sides(engine: Engine, model: Model, texts: SideBySide) -> Iterator[tuple[float, str]]:
    """Write each text in turn with the model that is loaded; close it to stop.

    Yields:
        The share that is done, and what is being done.

    Raises:
        EngineError: a text cannot be written.
    """
    assert texts.tokenizer is not None
    texts.model, texts.engine = model.name, engine.name
    plans = []
    for side in texts.sides:
        plan, side.generation.warnings = settled(side.plan, model)
        plans.append(plan)
    if len(plans) > 1:
        for plan in plans:
            warm(engine, [[BOS]], plan.sampling(), [plan.blocks()])
    for number, (plan, side) in enumerate(zip(plans, texts.sides, strict=True)):
        side.state = WRITING
        try:
            for _ in write(engine, texts.tokenizer, plan, side.generation):
                done = len(side.generation.tokens)
                yield (number + done / plan.max_tokens) / len(texts.sides), f"{done:,} tokens"
        finally:
            side.state = DONE
