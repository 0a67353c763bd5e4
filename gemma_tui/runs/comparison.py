"""Runs side by side: their measures over step, tokens or seconds, what differs in their plans, and how they ended."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from gemma_tui.output import bytes_text, count_text
from gemma_tui.runs.store import Row, Run, RunStore
from gemma_tui.text import one_line

AXES = {"step": "step", "tokens": "tokens seen", "seconds": "seconds of computing"}
TITLES = {
    "loss": "loss, nats per token",
    "valid_loss": "validation loss, nats per token",
    "grad_norm": "gradient norm",
    "learning_rate": "learning rate",
    "tokens_per_second": "tokens per second",
    "memory": "memory after a step, bytes",
    "peak_memory": "peak memory, bytes",
    "effective_rank": "rank of the accumulated update",
    "memorized_bits": "memorised bits",
    "memorized_bits_per_parameter": "memorised bits per trained parameter",
    "held_out_loss": "loss of the measured held-out sequences, nats per token",
    "generalisation": "decrease of the held-out loss since step 0, nats per token",
}
"""What the known measures are called; a run may have others, which go by their own names."""

LABELS = ("name", "group")
"""Options that change nothing but what a run is called."""

WIDE_SPAN = 8
"""The largest over the smallest value of an option from which on it is drawn logarithmically."""

MISSING = "—"
SMOOTHED = 20
"""Points that the mean goes over, unless asked otherwise."""

ROWS_PER_READ = 2000
BLOCK = 128
TELLING = 40
"""Windows after which a value's weight in a mean is e^-40."""


@dataclass
class Curve:
    """One measure of one run, a point for each time it was recorded.

    Attributes:
        tokens, seconds: cumulated at the step of the point; NaN where the run did not record them.
        value: NaN where it was not finite.
        evaluated: it comes from evaluations, which are means already, so it is never smoothed.
    """

    evaluated: bool
    step: array[float] = field(default_factory=lambda: array("d"))
    tokens: array[float] = field(default_factory=lambda: array("d"))
    seconds: array[float] = field(default_factory=lambda: array("d"))
    value: array[float] = field(default_factory=lambda: array("d"))

    def add(self, step: float, tokens: float, seconds: float, value: float) -> None:
        """Append a point; one of the same step, or of a later one, gives way to it."""
        if self.step and self.step[-1] >= step:
            self.cut(step)
        self.step.append(step)
        self.tokens.append(tokens)
        self.seconds.append(seconds)
        self.value.append(value)

    def cut(self, step: float) -> None:
        """Drop the points from a step on."""
        place = bisect_left(self.step, step)
        for column in (self.step, self.tokens, self.seconds, self.value):
            del column[place:]

    def points(self, axis: str, window: int) -> tuple[np.ndarray, np.ndarray]:
        """x and y, smoothed over ``window`` points unless it comes from evaluations; float64 ``[points]`` each."""
        y = np.array(self.value)
        return np.array(getattr(self, axis)), y if self.evaluated else smooth(y, window)


@dataclass(frozen=True)
class Result:
    """Where a run stands; None is what it did not record, or what was not finite at the end.

    Attributes:
        loss: the last training loss, smoothed, nats per token.
        tokens: supervised tokens seen.
        tokens_per_second: the median over the steps.
        memory: the most bytes in use at once, beyond what was there before the model.
        effective_rank: the latest that was measured, of the accumulated update.
        memorized_bits: the latest that were measured.
    """

    run: str
    state: str
    valid_loss: float | None
    best_valid_loss: float | None
    loss: float | None
    tokens: int | None
    tokens_per_second: float | None
    memory: int | None
    optimizer_bytes: int | None
    trainable: int | None
    effective_rank: float | None
    memorized_bits: float | None


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _loss(value: float) -> str:
    return f"{value:.4f}"


COLUMNS: Mapping[str, tuple[str, Callable[[Any], str]]] = {
    "state": ("state", str),
    "valid_loss": ("valid", _loss),
    "loss": ("train", _loss),
    "tokens_per_second": ("tokens/s", _whole),
    "memory": ("peak memory", bytes_text),
    "optimizer_bytes": ("optimizer", bytes_text),
    "effective_rank": ("rank", lambda value: f"{value:.4g}"),
    "best_valid_loss": ("best valid", _loss),
    "tokens": ("tokens", count_text),
    "trainable": ("trainable", count_text),
    "memorized_bits": ("memorised bits", lambda value: f"{value:,.1f}"),
}
"""The columns of a table of results, those that fit into 80 characters first: heading, and how a value is written."""


def cells(result: Result) -> list[str]:
    """A result as ``COLUMNS`` has it, what is missing as a dash."""
    values = asdict(result)
    return [MISSING if values[name] is None else write(values[name]) for name, (_, write) in COLUMNS.items()]


@dataclass
class Compared:
    """A run among those that are compared, read as far as it has come.

    Attributes:
        look: number of its colour and marker, which it keeps.
        hidden: it is left out of the chart.
        behind: there was more to read than was read.
    """

    run: Run
    look: int
    hidden: bool = False
    behind: bool = True
    curves: dict[str, Curve] = field(default_factory=dict)
    start: Mapping[str, Any] = field(default_factory=dict)
    _metric: int = 0
    _event: int = 0
    _step: int = 0
    _tokens: float = math.nan
    _seconds: float = math.nan

    def read(self, store: RunStore, limit: int) -> bool:
        """Read at most ``limit`` rows of what is new; returns whether anything changed."""
        before, self.run = self.run, store.run(self.run.run_id)
        metrics = store.metrics(self.run.run_id, self._metric, limit)
        events = store.events(self.run.run_id, self._event, limit)
        self.behind = limit in (len(metrics), len(events))
        for row in metrics:
            self._add(row)
        for event in events:
            self._event = event.cursor
            if event.kind in ("start", "checkpoint"):
                self.start = {**self.start, **event.values}
        return bool(metrics or events) or self.run.state != before.state

    def result(self, window: int) -> Result:
        """Where it stands, its training loss smoothed over ``window`` points."""
        valid, loss = self._values("valid_loss"), self._values("loss")
        # What lies further back weighs less than a double tells.
        recent = smooth(loss[-TELLING * window :], window)
        best, speed, memory, ranks, bits = (
            values[np.isfinite(values)]
            for values in (
                valid,
                *map(self._values, ("tokens_per_second", "peak_memory", "effective_rank", "memorized_bits")),
            )
        )
        return Result(
            run=self.run.run_id,
            state=self.run.state,
            valid_loss=_last(valid),
            best_valid_loss=float(best.min()) if best.size else None,
            loss=_last(recent),
            tokens=_integer(self._tokens),
            tokens_per_second=float(np.median(speed)) if speed.size else None,
            memory=int(memory.max()) if memory.size else None,
            optimizer_bytes=_integer(self.start.get("optimizer_bytes")),
            trainable=_integer(self.start.get("trainable")),
            effective_rank=_last(ranks),
            memorized_bits=_last(bits),
        )

    def _values(self, measure: str) -> np.ndarray:
        return np.array(self.curves[measure].value if measure in self.curves else (), np.float64)

    def _add(self, row: Row) -> None:
        self._metric = row.cursor
        evaluated = row.kind != "step"
        if not evaluated:
            if row.step < self._step:
                # The run went on from a save: what it had done after that is done again.
                for curve in self.curves.values():
                    curve.cut(row.step)
            self._step = row.step
            # The seconds of an evaluation are its own; it stands where its step stands.
            self._tokens, self._seconds = (_number(row.values.get(axis)) for axis in ("tokens", "seconds"))
        elif row.step == 0 and math.isnan(self._tokens):
            self._tokens = self._seconds = 0.0
        for measure, value in row.values.items():
            if measure not in AXES and (value is None or _is_number(value)):
                self._point(measure, row.step, value, evaluated)

    def _point(self, measure: str, step: int, value: float | None, evaluated: bool) -> None:
        curve = self.curves.get(measure)
        if curve is None:
            if value is None:
                return
            curve = self.curves[measure] = Curve(evaluated)
        curve.add(step, self._tokens, self._seconds, _number(value))


class Comparison:
    """Runs in the order they were added. Each has the lowest number that no other had when it came, as its look, and
    keeps it: hiding, adding or removing others changes no colour.
    """

    def __init__(self, runs: Sequence[Run] = ()) -> None:
        self.runs: list[Compared] = []
        for run in runs:
            self.add(run)

    def __contains__(self, run_id: object) -> bool:
        """Whether a run with this id is among them."""
        return any(compared.run.run_id == run_id for compared in self.runs)

    def add(self, run: Run) -> None:
        """Add a run, unless it is there."""
        if run.run_id in self:
            return
        taken = {compared.look for compared in self.runs}
        self.runs.append(Compared(run, next(n for n in range(len(taken) + 1) if n not in taken)))

    def remove(self, run_id: str) -> None:
        """Take a run out; its look is free again."""
        self.runs = [compared for compared in self.runs if compared.run.run_id != run_id]

    def read(self, store: RunStore, rows: int = ROWS_PER_READ) -> list[Compared]:
        """Read what is new, few enough rows that no frame waits for it; returns the runs that changed."""
        share = max(1, rows // max(1, len(self.runs)))
        return [compared for compared in self.runs if compared.read(store, share)]

    def read_all(self, store: RunStore) -> None:
        """Read all there is."""
        for compared in self.runs:
            while compared.read(store, ROWS_PER_READ) and compared.behind:
                pass

    def measures(self) -> list[str]:
        """The measures that any of the runs recorded, the known ones first."""
        found = {measure for compared in self.runs for measure in compared.curves}
        return [m for m in TITLES if m in found] + sorted(found - TITLES.keys())

    def shown(self, measure: str) -> Iterator[tuple[Compared, Curve]]:
        """The runs that are not hidden and have the measure."""
        for compared in self.runs:
            if not compared.hidden and measure in compared.curves:
                yield compared, compared.curves[measure]

    def options(self) -> list[str]:
        """The options in which runs differ that are alike in all others, and that are numbers in all runs."""
        found = self._differences()
        numbers = (
            option for option, values in found.items()
            if option not in AXES and len(values) == len(self.runs) and all(map(_is_number, values.values()))
        )  # fmt: skip
        return [option for option in numbers if len(set(self._groups(option))) < len(self.runs)]

    def axes(self) -> dict[str, str]:
        """What a measure can be drawn against, with its title: also the options that differ and are numbers."""
        return AXES | {option: one_line(option.replace("_", " "), 40) for option in self.options()}

    def log_x(self, axis: str) -> bool:
        """Whether an option spans so much that a logarithmic axis shows it better."""
        values = [_number(compared.run.plan.get(axis)) for compared in self.runs] if axis not in AXES else []
        return bool(values) and 0 < min(values) * WIDE_SPAN <= max(values) < math.inf

    def lines(self, measure: str, axis: str, window: int) -> list[tuple[str, np.ndarray, np.ndarray, int]]:
        """Name, x, y and look of each line of a chart: a run's, or the last values of the runs over an option.

        Against an option, runs that also differ in others are on lines of their own, named by these.
        """
        shown = [(compared, *curve.points(axis if axis in AXES else "step", window))
                 for compared, curve in self.shown(measure)]  # fmt: skip
        if axis in AXES:
            return [(compared.run.run_id, x, y, compared.look) for compared, x, y in shown]
        groups = dict(zip((compared.run.run_id for compared in self.runs), self._groups(axis), strict=True))
        ends: dict[str, list[tuple[float, float]]] = {}
        for compared, _, values in shown:
            if values.size:
                point = _number(compared.run.plan[axis]), float(values[-1])
                ends.setdefault(groups[compared.run.run_id], []).append(point)
        names = list(dict.fromkeys(groups.values()))
        return [
            (name or axis, *np.array(sorted(ends[name]), np.float64).T, number)
            for number, name in enumerate(names) if name in ends
        ]  # fmt: skip

    def _differences(self) -> dict[str, dict[str, Any]]:
        """What differs but for the labels."""
        found = differences([compared.run for compared in self.runs])
        return {key: values for key, values in found.items() if key not in LABELS}

    def _groups(self, option: str) -> list[str]:
        """For each run, what it has of the other options that differ, for a person; nothing where none does."""
        others = {key: values for key, values in self._differences().items() if key != option}
        return [
            ", ".join(f"{key} {option_text(values, compared.run.run_id)}" for key, values in others.items())
            for compared in self.runs
        ]


def title(measure: str, evaluated: bool, window: int) -> str:
    """What a chart of a measure is called, for a person."""
    name = TITLES.get(measure, one_line(measure, 40))
    return name if evaluated or window == 1 else f"{name}, mean over {window}"


def differences(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """The study, engine and options in which runs differ: for each the value of every run that has it."""
    facts = {run.run_id: {"study": run.study, "engine": run.engine, **run.plan} for run in runs}
    keys = dict.fromkeys(key for plan in facts.values() for key in plan)
    found = {key: {run: plan[key] for run, plan in facts.items() if key in plan} for key in keys}
    return {key: values for key, values in found.items() if len(values) < len(facts) or not _all_same(values)}


def option_text(values: Mapping[str, Any], run_id: str) -> str:
    """A run's value of an option, for a person; a dash if the run does not know the option."""
    if run_id not in values:
        return MISSING
    value = values[run_id]
    if value is None:
        return "auto"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else one_line(str(value), 60) or "none"


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """The debiased exponential mean of a series: float64 ``[points]``, NaN where ``values`` is not finite.

    ``m_t = d m_{t-1} + (1 - d) y_t`` with ``d = 1 - 1 / window``, over ``1 - d^t`` (Kingma & Ba, arXiv:1412.6980, §3),
    t counting the finite values only. A window of 1 leaves them as they are.
    """
    finite = np.isfinite(values)
    smoothed = np.full(values.shape, math.nan)
    smoothed[finite] = _debiased(values[finite], 1 - 1 / max(1, window))
    return smoothed


def _debiased(y: np.ndarray, decay: float) -> np.ndarray:
    """By blocks, in each of which the recurrence is a product with a triangular matrix."""
    if not y.size or decay == 0:
        return y
    padded = np.zeros(-(-y.size // BLOCK) * BLOCK)
    padded[: y.size] = y
    place = np.arange(BLOCK)
    weights = np.tril(decay ** np.maximum(place[:, None] - place, 0)) * (1 - decay)
    means = padded.reshape(-1, BLOCK) @ weights.T
    carried, fading = 0.0, decay ** (place + 1)
    for block in means:
        block += carried * fading
        carried = block[-1]
    counts = np.arange(1, y.size + 1)
    return means.reshape(-1)[: y.size] / -np.expm1(counts * math.log(decay))


def _all_same(values: Mapping[str, Any]) -> bool:
    first, *others = values.values()
    return all(other == first and isinstance(other, bool) == isinstance(first, bool) for other in others)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Any) -> float:
    """NaN for what is none, as another program may have written it."""
    try:
        return float(value) if _is_number(value) else math.nan
    except OverflowError:
        return math.nan


def _integer(value: Any) -> int | None:
    number = _number(value)
    return int(number) if math.isfinite(number) else None


def _last(values: np.ndarray) -> float | None:
    return float(values[-1]) if values.size and math.isfinite(values[-1]) else None
