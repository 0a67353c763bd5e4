"""What is looked at in a text; every field is an option of ``gemma-tui attention``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gemma_tui.errors import UsageError
from gemma_tui.studies.plan import option

VIEWS = (
    "heads", "head", "local-global", "sinks", "types", "lens", "attribution", "ablation", "scan", "patching",
    "differences", "neurons", "circuits", "rollout", "check",
)  # fmt: skip
MAX_TEXT_BYTES = 16 << 20
SAMPLE = (
    "The old clock on the wall of the station was always seven minutes slow. Nobody ever set it right, because "
    "everybody in the town knew. The old clock on the wall of the station was always seven minutes slow."
)


@dataclass(frozen=True)
class AttentionPlan:
    """A text, and a view of what the model does with it."""

    text: str = option(SAMPLE, "text to look into")
    text_file: str = option("", "a file with the text, in place of it")
    bos: bool = option(True, "begin with <bos>, as the model was trained")
    view: str = option("heads", "what is shown", choices=VIEWS)
    metric: str = option("entropy", "what heads are coloured and sorted by", views=("heads",))
    where: str = option("", "heads that are kept, as sink > 0.3 and local", views=("heads",))
    layer: int = option(
        0, "layer of the head that is looked at", low=0, high=1000, views=("head", "attribution", "neurons", "circuits")
    )
    head: int = option(0, "the head", low=0, high=1000, views=("head", "attribution", "neurons"))
    position: str = option(
        "",
        "position that is looked at: a number or a token of the text; empty for the last",
        views=("head", "lens", "attribution", "neurons", "circuits", "rollout"),
    )
    key_position: str = option(
        "",
        "key, as position is given: token whose readers are shown, empty for position itself; or of the score that is "
        "split, empty for the largest weight",
        views=("head", "neurons"),
    )
    queries: str = option("", "queries of a head's map: 100:400 is 100 to 399; empty for all", views=("head",))
    keys: str = option("", "keys of a head's map, as queries are given; empty for all", views=("head",))
    token: str = option(
        "",
        "token whose logit is split or followed, empty for the most probable; that circuits begin with, empty for the "
        "one at the position",
        views=("lens", "attribution", "patching", "circuits"),
    )
    contrast: str = option("", "token whose logit is taken off; empty for none", views=("attribution", "patching"))
    pooling: str = option("max", "how pairs share a cell of a map", choices=("max", "mean"), views=("head",))
    per_row: bool = option(False, "weights of a map over the largest of their row", views=("head",))
    without_sink: bool = option(False, "position 0 taken out of a map, rows made to sum to one again", views=("head",))
    gamma: float = option(
        1.0, "weights of a map to this power; less than 1 lifts the small ones", low=0.05, high=10.0, views=("head",)
    )
    ablate: str = option(
        "", "what is taken away: L3.H1, L3.G0, L3, local, global, beyond, L3.H1:5>0", views=("ablation",)
    )
    how: str = option(
        "zero", "what takes the place of a head's output", choices=("zero", "mean"), views=("ablation", "scan")
    )
    patch: str = option(
        "stream", "what patching takes from the other text", choices=("stream", "heads"), views=("patching",)
    )
    other_text: str = option(
        "", "a second text, of as many tokens: of patching and differences", views=("patching", "differences")
    )
    other_model: str = option("", "a second model or run: of differences", views=("differences",))
    other_engine: str = option(
        "", "a second engine: of differences", choices=("", "torch", "mlx"), views=("differences",)
    )
    other_dtype: str = option(
        "", "a second dtype: of differences", choices=("", "float32", "bfloat16"), views=("differences",)
    )
    epsilon: float = option(0.3, "weight from which a column is a sink", low=0.0, high=1.0, views=("sinks",))
    repeats: int = option(4, "texts of random tokens for the types of heads", low=2, high=1000, views=("types",))
    seed: int = option(0, "seed of the random tokens", low=0, high=2**31, views=("types",))


def text_of(plan: AttentionPlan) -> str:
    """The text itself.

    Raises:
        UsageError: the file cannot be read, is too large, or there are two texts.
    """
    if not plan.text_file:
        return plan.text
    if plan.text not in ("", SAMPLE):
        raise UsageError("text: give --text or --text-file, not both")
    path = Path(plan.text_file).expanduser()
    try:
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise UsageError(f"{path} is over {MAX_TEXT_BYTES >> 20} MiB, more than any context holds: cut it")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}): check the path") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8: convert it") from None
