"""Letting a model write, as a study: a plan, and the text piece by piece."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from engines.base import Engine, Sampling
from gemma_tui.studies.plan import option
from gemma_tui.studies.turns import asked
from gemma_tui.tokenizer import END_OF_TURN, EOS, Stream, Tokenizer

STOP_IDS = (EOS, END_OF_TURN)


@dataclass(frozen=True)
class GenerationPlan:
    """What is written and how the next token is chosen; every field is an option of ``gemma-tui generate``."""

    prompt: str = option("", "text to go on from", required=True)
    chat: bool = option(False, "put the prompt into Gemma's turns, for tuned models; control tokens in it are text")
    max_tokens: int = option(128, "new tokens at most", unit="tokens", low=1, high=1_000_000)
    temperature: float = option(0.8, "0 is greedy, 1 the model's own distribution", low=0.0, high=100.0)
    top_k: int = option(0, "draw from the k most probable tokens; 0 for all", low=0)
    top_p: float = option(0.95, "draw from the fewest tokens of this probability mass", low=1e-6, high=1.0)
    seed: int = option(0, "seed of the draws", low=0, high=2**31)

    def sampling(self) -> Sampling:
        """For the engine, with Gemma's stop tokens."""
        return Sampling(self.max_tokens, self.temperature, self.top_k, self.top_p, self.seed, STOP_IDS)


@dataclass
class Generation:
    """What was written so far; ``text`` is not cleaned."""

    prompt_tokens: int = 0
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    seconds: float = 0.0
    stopped: bool = False
    """Whether the model itself ended the text."""

    @property
    def tokens_per_second(self) -> float:
        """New tokens by the time since the prompt was given, reading it included."""
        return len(self.tokens) / self.seconds if self.seconds else 0.0


def encode_prompt(tokenizer: Tokenizer, text: str, chat: bool) -> list[int]:
    """Prompt tokens with one ``<bos>``; for a chat, in Gemma's turns, open for the model's answer.

    Control tokens spelled in a plain prompt are recognised, so that turns can be written by hand; the words of a chat
    stay the characters they are, as in training.
    """
    return asked(text, tokenizer) if chat else tokenizer.encode(text)


def write(engine: Engine, tokenizer: Tokenizer, plan: GenerationPlan, generation: Generation) -> Iterator[str]:
    """Yield the text each new token completes, not cleaned, and keep it in ``generation``; close it to stop."""
    prompt = encode_prompt(tokenizer, plan.prompt, plan.chat)
    generation.prompt_tokens = len(prompt)
    stream, began = Stream(tokenizer), time.perf_counter()
    for token in engine.generate(prompt, plan.sampling()):
        generation.tokens.append(token)
        generation.seconds = time.perf_counter() - began
        if token in STOP_IDS:
            generation.stopped = True
            break
        piece = stream.push(token)
        generation.text += piece
        yield piece
    rest = stream.flush()
    generation.text += rest
    yield rest
