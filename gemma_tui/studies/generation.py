"""Letting a model write, as a study: a plan, the text piece by piece, and what every forward pass decided."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from engines.base import Engine, Sampling
from engines.blocks import MASK, ORDERS, BlockDecoding, DecodingPass
from engines.gemma3 import Gemma3Config
from gemma_tui.errors import UsageError
from gemma_tui.hub.models import Model
from gemma_tui.hub.set_blocks import set_blocks_of
from gemma_tui.studies.chat import ask
from gemma_tui.studies.plan import option
from gemma_tui.studies.writing import Writing, parse_stops
from gemma_tui.tokenizer import END_OF_TURN, EOS, Tokenizer

STOP_IDS = (EOS, END_OF_TURN)
AR, SBD = "ar", "sbd"
DECODERS = (AR, SBD)
MAX_BLOCK = 4096


def order_option() -> Any:
    """What is decided first, of every plan that decodes blocks."""
    return option("entropy", "what a pass decides first", choices=ORDERS, decoders=(SBD,))


def mask_token_option() -> Any:
    """The mask token, of every plan that decodes blocks."""
    return option(
        None, "id that stands for a place not decided yet", low=0, high=2**31,
        open_means="the one the model was trained with, else 4", decoders=(SBD,),
    )  # fmt: skip


@dataclass(frozen=True)
class GenerationPlan:
    """What is written and how the next tokens are chosen; every field is an option of ``gemma-tui generate``."""

    prompt: str = option("", "text to go on from", required=True)
    chat: bool = option(
        False, "put the prompt into turns, by the model's own template or Gemma's; control tokens in it are text"
    )
    decoder: str = option(AR, "ar decides token by token, sbd blocks of tokens (arXiv:2509.04185)", choices=DECODERS)
    block: int = option(16, "places decided together", unit="tokens", low=1, high=MAX_BLOCK, decoders=(SBD,))
    gamma: float = option(
        0.1, "bound of the entropy that one pass decides; inf for a whole block", unit="nats", low=0.0,
        high=math.inf, decoders=(SBD,),
    )  # fmt: skip
    order: str = order_option()
    mask_token: int | None = mask_token_option()
    max_tokens: int = option(128, "new tokens at most", unit="tokens", low=1, high=1_000_000)
    temperature: float = option(0.8, "0 is greedy, 1 the model's own distribution", low=0.0, high=100.0)
    top_k: int = option(0, "draw from the k most probable tokens; 0 for all", low=0)
    top_p: float = option(0.95, "draw from the fewest tokens of this probability mass", low=1e-6, high=1.0)
    min_p: float = option(0.0, "leave out tokens below this share of the most probable one", low=0.0, high=1.0)
    repetition_penalty: float = option(1.0, "above 1 makes tokens that were seen less probable", low=0.01, high=100.0)
    stop: str = option("", r"strings that end the text, with commas between; \n a newline, \, a comma")
    seed: int = option(0, "seed of the draws", low=0, high=2**31)

    def sampling(self) -> Sampling:
        """For the engine, with Gemma's stop tokens."""
        return Sampling(
            self.max_tokens, self.temperature, self.top_k, self.top_p, self.seed, STOP_IDS, self.min_p,
            self.repetition_penalty,
        )  # fmt: skip

    def blocks(self) -> BlockDecoding | None:
        """For the engine; None for token by token."""
        if self.decoder == AR:
            return None
        return BlockDecoding(self.block, self.gamma, self.order, MASK if self.mask_token is None else self.mask_token)


@dataclass
class Generation:
    """What was written so far; ``text`` is not cleaned.

    Attributes:
        passes: all forward passes, the last of which ended the text.
        tokens: decided without a gap, up to the one that ended the text.
        seconds: since the prompt was given, reading it included.
        ended: ``stop token`` or ``stop string``; nothing where the text was cut, or goes on.
        warnings: what a person should know before believing the text.
    """

    passes: list[DecodingPass] = field(default_factory=list)
    prompt_tokens: int = 0
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    seconds: float = 0.0
    ended: str = ""
    warnings: list[str] = field(default_factory=list)

    @property
    def stopped(self) -> bool:
        """Whether the text came to an end of its own."""
        return bool(self.ended)

    @property
    def tokens_per_second(self) -> float:
        """New tokens by the time since the prompt was given, reading it included."""
        return len(self.tokens) / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_pass(self) -> float:
        """New tokens by forward passes; reading the prompt is part of the first."""
        return len(self.tokens) / len(self.passes) if self.passes else 0.0


def settled(plan: GenerationPlan, model: Model) -> tuple[GenerationPlan, list[str]]:
    """The plan with the mask token that the model was trained with, and what a person should know.

    Raises:
        UsageError: the plan has another mask token than the model.
        GemmaTuiError: what the model was trained with cannot be read.
    """
    if plan.decoder == AR:
        return plan, []
    mask, warnings = mask_of(model, plan.mask_token, plan.block)
    return replace(plan, mask_token=mask), warnings


def mask_of(model: Model, given: int | None, block: int) -> tuple[int, list[str]]:
    """The mask token for a model, and warnings about its training and the longest block.

    Raises:
        UsageError: the given one is not that of the model's training.
    """
    trained = set_blocks_of(model)
    if trained is None:
        base = set_blocks_of(replace(model, adapter=None))
        why = (
            f"{model.name} was last trained without a mask token, so its blocks are guesses and poor; "
            "`gemma-tui train --method sbd` teaches it"
        )
        mask = MASK if base is None else base.mask_token
        return mask if given is None else given, [why]
    if given not in (None, trained.mask_token):
        raise UsageError(
            f"mask_token: {model.name} was trained with mask token {trained.mask_token}, not {given}: leave "
            "--mask-token out"
        )
    if block > trained.max_block:
        long = f"{model.name} was trained with blocks of {trained.max_block} tokens at most, not {block}"
        return trained.mask_token, [f"{long}: longer ones are guesswork"]
    return trained.mask_token, []


def check_room(config: Gemma3Config, prompt: int, max_tokens: int, blocks: BlockDecoding) -> None:
    """Refuse blocks that have no room in the context, or a mask token that is not there.

    Args:
        prompt: tokens of it.

    Raises:
        UsageError: they have none.
    """
    context = config.max_position_embeddings
    if prompt + blocks.block > context:
        raise UsageError(
            f"block: {max(0, context - prompt):,} tokens of the context of {context:,} are left after the prompt, too "
            f"few for a block of {blocks.block:,}: lower --block, or shorten the prompt"
        )
    if prompt + max_tokens > context:
        raise UsageError(
            f"max_tokens: {context - prompt:,} tokens of the context of {context:,} are left after the prompt, not "
            f"{max_tokens:,}: lower --max-tokens"
        )
    check_mask_id(blocks.mask, config.vocab_size)


def check_mask_id(mask: int, vocabulary: int) -> None:
    """Refuse a mask token that the model has not.

    Raises:
        UsageError: it is so.
    """
    if mask >= vocabulary:
        raise UsageError(f"mask_token: the model has no token {mask:,}: its ids end at {vocabulary - 1:,}")


def warm(
    engine: Engine, prompts: Sequence[Sequence[int]], sampling: Sampling, ways: Iterable[BlockDecoding | None]
) -> None:
    """Two passes in each way, as wide as they will be, so that none pays for what is done once."""
    for blocks in ways:
        for _ in islice(engine.decode(prompts, sampling, blocks), 2):
            pass


def encode_prompt(tokenizer: Tokenizer, text: str, chat: bool, folder: Path | None = None) -> list[int]:
    """Prompt tokens with one ``<bos>``; for a chat, in turns, open for the model's answer.

    Control tokens spelled in a plain prompt are recognised, so that turns can be written by hand; the words of a chat
    stay the characters they are, as in training.

    Args:
        folder: of the model, whose chat template is used where it has one; None for Gemma's turns.

    Raises:
        GemmaTuiError: the template cannot be used, or the text is not valid Unicode.
    """
    return ask(tokenizer, folder or Path(), text) if chat else tokenizer.encode(text)


def write(engine: Engine, tokenizer: Tokenizer, plan: GenerationPlan, generation: Generation) -> Iterator[str]:
    """Yield the text that each pass completes, not cleaned, and keep all of it in ``generation``; close it to stop.

    Raises:
        EngineError: no model is loaded, a block has no room, or the chat template cannot be used.
    """
    info = engine.model()
    folder = Path(info.folder) if info and info.folder else None
    prompt = encode_prompt(tokenizer, plan.prompt, plan.chat, folder)
    sampling, blocks = plan.sampling(), plan.blocks()
    if info is not None and blocks is not None:
        check_room(info.config, len(prompt), plan.max_tokens, blocks)
    generation.prompt_tokens = len(prompt)
    writing, began = Writing(tokenizer, sampling.stop_ids, parse_stops(plan.stop)), time.perf_counter()
    generation.tokens = writing.tokens
    for said in engine.decode([prompt], sampling, blocks):
        piece = writing.take(said)
        generation.passes.append(said)
        generation.seconds = time.perf_counter() - began
        generation.text += piece
        yield piece
        if writing.ended:
            break
    rest = writing.finish()
    generation.text, generation.ended = generation.text + rest, writing.ended
    yield rest
