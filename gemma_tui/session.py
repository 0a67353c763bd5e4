"""What the app holds: two engine threads, the model on each, and the jobs that run there.

Nothing here waits and nothing calls the screen: a screen reads these plain values a few times a second.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from engines import ENGINES, available_engines, default_engine
from engines.errors import UnsupportedError
from engines.thread import EngineThread
from gemma_tui.studies.events import Control, passing

if TYPE_CHECKING:
    from engines.base import DeviceInfo, Engine, ModelInfo, Progress
    from gemma_tui.runs.store import RunStore
    from gemma_tui.studies.attention.looking import Board, Desk
    from gemma_tui.studies.attention.plan import AttentionPlan
    from gemma_tui.studies.capacity.plan import MoreCells
    from gemma_tui.studies.conversion import ConversionPlan
    from gemma_tui.studies.pass_times import PassTimes, RooflinePlan
    from gemma_tui.studies.recording import Recorded
    from gemma_tui.studies.side_by_side import SideBySide

Begin = Callable[["Engine", "Control", "RunStore"], "Recorded"]
"""Registers a run, or takes one over; runs on the engine's thread."""

MEASURED = {
    "memorization": ("measure", "memorization", "sequences"),
    "where": ("where", "memorization", "parts"),
    "curve": ("curve", "decoding", "rows"),
    "bench": ("bench", "benchmark", "cells"),
}
"""Of studies that measure: the kind of job, its label, and what its steps are."""

NO_MODEL = "no model is loaded: press 1, choose one and press enter"


@dataclass
class Job:
    """Something an engine is doing.

    Attributes:
        kind: ``load``, ``train``, ``generate``, ``look``, ``study``, ``sweep``, ``measure``, ``where``, ``curve``,
            ``roofline``, ``bench`` or ``convert``.
        label: a few words for the status line.
        share: how much of it is done, 0 to 1.
        detail: what is being done now.
        passing: what is done between two steps, how far that is, and the time it still takes.
        run: the run it belongs to, once that is registered.
        before: the share that was done before it began, of a run that goes on.
    """

    kind: str
    label: str
    engine: str
    control: Control = field(default_factory=Control)
    share: float = 0.0
    detail: str = ""
    passing: str = ""
    run: str = ""
    before: float = 0.0
    started: float = field(default_factory=time.monotonic)
    future: Future[Any] = field(default_factory=Future)

    @property
    def seconds_left(self) -> float | None:
        """An estimate from the share done; None while there is nothing to go by."""
        passed, done = time.monotonic() - self.started, self.share - self.before
        return passed * (1 - self.share) / done if done > 0.02 and passed > 0.5 else None


@dataclass
class Place:
    """One engine's thread and what is on it."""

    thread: EngineThread
    device: DeviceInfo | None = None
    model: str = ""
    info: ModelInfo | None = None
    memory: int = 0
    job: Job | None = None
    desk: Desk | None = None
    """The text that was looked at last; belongs to the engine's thread."""

    def clear(self, engine: Engine) -> None:
        """Give back what the model and the text take; runs on the engine's thread."""
        self.desk = None
        engine.unload()

    def settle(self, engine: Engine, name: str, anew: bool) -> None:
        """Say which model a study left on the engine, or load it again after others; runs on the engine's thread."""
        from gemma_tui.studies.loading import load

        self.desk = None
        if not name:
            engine.unload()
        elif anew:
            load(engine, name)
        self.info = engine.model()
        self.model = name if self.info is not None else ""


class Session:
    """The engines of one app, and which of them new jobs go to."""

    def __init__(self, engine: str = "auto") -> None:
        self.engine = default_engine() if engine == "auto" else engine
        self._places: dict[str, Place] = {}
        self._ended: list[Job] = []
        self.newest: Job | None = None
        """What was started last, whether or not it still runs."""

    @property
    def place(self) -> Place:
        """The chosen engine."""
        return self._at(self.engine)

    @property
    def places(self) -> list[Place]:
        """The engines that were used, and what is on them."""
        return list(self._places.values())

    @property
    def jobs(self) -> list[Job]:
        """What runs now, on whichever engine."""
        return [place.job for place in self._places.values() if place.job is not None]

    def job_of(self, run: str) -> Job | None:
        """The job of a run, if it runs in this app."""
        return next((job for job in self.jobs if job.run == run), None)

    def finished(self) -> list[Job]:
        """Jobs that have ended since the last call; each is told once."""
        ended, self._ended = self._ended, []
        for place in self._places.values():
            if place.job is not None and place.job.future.done():
                ended.append(place.job)
                place.job = None
        return ended

    def switch(self) -> str:
        """Choose the other engine; the loaded model goes along unless something runs on the engine it is on.

        Returns:
            What happened, for a person.

        Raises:
            UnsupportedError: there is no other engine here.
        """
        others = [name for name in ENGINES if name != self.engine and name in available_engines()]
        if not others:
            raise UnsupportedError(f"{self.engine} is the only engine here: `gemma-tui doctor` says how to add another")
        before, self.engine = self.place, others[0]
        if before.job is not None and before.job.kind == "look":
            before.job.control.stop.set()
        elif before.job is not None:
            return f"engine {self.engine}; {before.job.label} goes on with {before.thread.name}"
        if self.place.job is not None:
            busy = f"engine {self.engine} is busy with {self.place.job.label}"
            return f"{busy}; {before.model} stays loaded on {before.thread.name}" if before.model else busy
        if before.model:
            if before.model != self.place.model:
                self.load(before.model)
            before.thread.submit(before.clear)
            before.model, before.info = "", None
        return f"engine {self.engine}"

    def load(self, name: str) -> Job:
        """Load a model, or a run's result, on the chosen engine.

        Raises:
            UnsupportedError: the engine is busy.
        """
        place = self.place

        def work(engine: Engine, job: Job) -> None:
            from gemma_tui.studies.loading import load

            place.model, place.info, place.desk = "", None, None
            load(engine, name, None, _progress(job, "loading was stopped"))
            place.model, place.info = name, engine.model()

        return self._start(Job("load", f"loading {name}", self.engine), work)

    def begin(self, study: str, plan: Any) -> Job:
        """Begin a study as a run, on the chosen engine.

        Args:
            study: its name, as ``gemma_tui.studies.registry`` has it.
            plan: the study's own.

        Raises:
            UnsupportedError: the engine is busy, or the heads of the loaded model are to be studied and there is none.
        """
        if study == "heads" and not plan.over:
            self._loaded()

        def begin(engine: Engine, control: Control, store: RunStore) -> Recorded:
            from gemma_tui.studies import registry

            return registry.begin(study, plan, engine, control, store)

        return self._course(study, begin)

    def resume(self, study: str, run: str, more: MoreCells | None = None) -> Job:
        """Go on with a run that ended before its last step, on the chosen engine.

        Args:
            more: what a sweep over capacity gets.

        Raises:
            UnsupportedError: the engine is busy.
        """

        def begin(engine: Engine, control: Control, store: RunStore) -> Recorded:
            from gemma_tui.studies import registry

            return registry.resume(store.run(run), engine, control, store, more)

        return self._course(study, begin)

    def _course(self, study: str, begin: Begin) -> Job:
        """Let a run take its course."""
        courses = {"training": self._train, "heads": self._study, "capacity": self._sweep}
        return courses[study](begin) if study in courses else self._measure(begin, *MEASURED[study])

    def _train(self, begin: Begin) -> Job:
        """Train; what was trained stays loaded."""
        place = self.place

        def work(engine: Engine, job: Job) -> None:
            place.desk = None
            with _registered(engine, job, begin) as recorded:
                place.model, place.info = "", None
                run = recorded.run
                for event in recorded.events:
                    job.share, job.passing = event.step / run.steps, passing(event)
                    job.detail = f"step {event.step:,}/{run.steps:,}"
                    place.memory = engine.memory()
            place.model, place.info = run.run_id, engine.model()

        return self._start(Job("train", "training", self.engine), work)

    def generate(self, texts: SideBySide) -> Job:
        """Let the loaded model write texts of one prompt, one after the other, into what they are kept in.

        Raises:
            UnsupportedError: the engine is busy, or no model is loaded.
        """
        place = self._loaded()

        def work(engine: Engine, job: Job) -> None:
            from gemma_tui.hub.models import resolve
            from gemma_tui.studies.side_by_side import write_sides
            from gemma_tui.tokenizer import read_tokenizer

            model = resolve(place.model)
            texts.tokenizer = read_tokenizer(model.folder)
            for job.share, job.detail in write_sides(engine, model, texts):
                if job.control.stop.is_set():
                    break

        return self._start(Job("generate", "writing", self.engine), work)

    def look(self, plan: AttentionPlan, show: Callable[[Board], object]) -> Job:
        """Look into a text with the loaded model.

        Args:
            show: called with the view on the engine's thread, unless the job was stopped before.

        Raises:
            UnsupportedError: the engine is busy, or no model is loaded.
        """
        place = self._loaded()

        name = place.model

        def work(engine: Engine, job: Job) -> None:
            from gemma_tui.studies.attention.looking import StoppedError, board_of, desk_of, look

            if job.control.stop.is_set():
                return
            place.desk = desk_of(place.desk, engine, name)
            place.desk.stop = job.control.stop
            view = look(place.desk, plan)
            while not job.control.stop.is_set():
                try:
                    job.share = next(view)
                except StopIteration as end:
                    show(board_of(place.desk, end.value, plan))
                    return
                except StoppedError:
                    return
            view.close()

        return self._start(Job("look", plan.view, self.engine), work)

    def _study(self, begin: Begin) -> Job:
        """Study heads over many texts; the model that is loaded is so afterwards, too."""
        place = self.place

        def work(engine: Engine, job: Job) -> None:
            from gemma_tui.studies.attention.survey import plan_of

            held = engine.model()
            with _registered(engine, job, begin) as recorded:
                plan, total = plan_of(recorded.run), recorded.run.steps
                try:
                    for event in recorded.events:
                        if event.kind == "start":
                            place.model = place.model if plan.over else plan.model
                            total = event.values["texts"] * max(1, event.values["checkpoints"])
                        job.share, job.detail = event.step / total, f"text {event.step:,}/{total:,}"
                        place.info, place.memory = engine.model(), engine.memory()
                finally:
                    if engine.model() is not held:
                        place.settle(engine, place.model if plan.over else plan.model, bool(plan.over))

        return self._start(Job("study", "heads", self.engine), work)

    def _sweep(self, begin: Begin) -> Job:
        """Sweep over the capacity of small networks; the loaded model is left alone."""
        place = self.place

        def work(engine: Engine, job: Job) -> None:
            with _registered(engine, job, begin) as recorded:
                total = recorded.run.steps
                for event in recorded.events:
                    if event.kind == "start":
                        job.before = event.step / total
                    at = event.values.get("done" if event.kind == "training" else "at")
                    job.share = event.values.get("share", event.step / total)
                    job.detail = f"{event.step:,}/{total:,} cells" + (f", step {at:,}" if at else "")
                    place.memory = engine.memory()

        return self._start(Job("sweep", "capacity", self.engine), work)

    def roofline(self, plan: RooflinePlan, found: list[PassTimes]) -> Job:
        """Time forward passes of the loaded model; ``found`` gets what is measured.

        Raises:
            UnsupportedError: the engine is busy, or no model is loaded.
        """
        self._loaded()

        def work(engine: Engine, job: Job) -> None:
            from gemma_tui.studies.pass_times import time_passes

            for job.share in time_passes(engine, plan, found):
                if job.control.stop.is_set():
                    break

        return self._start(Job("roofline", "timing passes", self.engine), work)

    def _measure(self, begin: Begin, kind: str, label: str, unit: str) -> Job:
        """Measure in steps; the model that is loaded is so afterwards, too.

        Args:
            unit: what the steps are.
        """
        place = self.place

        def work(engine: Engine, job: Job) -> None:
            with _registered(engine, job, begin) as recorded, _kept(engine, place):
                total = max(1, recorded.run.steps)
                for event in recorded.events:
                    if event.kind == "load":  # which it tells before it does it
                        place.model, place.info = event.values["model"], None
                    else:
                        place.info = engine.model()
                    job.share, job.passing = event.step / total, passing(event)
                    job.detail = f"{event.step:,}/{total:,} {unit}"
                    place.memory = engine.memory()

        return self._start(Job(kind, label, self.engine), work)

    def convert(self, plan: ConversionPlan) -> Job:
        """Make another model of one, on the chosen engine or, quantised, on MLX.

        The model that is loaded there is so afterwards, too; the job's detail tells what was made.

        Raises:
            UnsupportedError: the engine is busy.
        """
        name = "mlx" if plan.bits is not None else self.engine
        place = self._at(name)

        def work(engine: Engine, job: Job) -> None:
            from gemma_tui.studies.conversion import convert, in_words

            with _kept(engine, place):
                made = convert(plan, lambda: engine, _progress(job, "converting was stopped; nothing is left of it"))
            job.detail = in_words(plan, made)

        return self._start(Job("convert", f"converting {plan.model}", name), work)

    def stop(self) -> None:
        """Ask everything that runs to end; training saves first."""
        for job in self.jobs:
            job.control.stop.set()

    def _loaded(self) -> Place:
        """The chosen engine, with a model on it."""
        if not self.place.model:
            raise UnsupportedError(NO_MODEL)
        return self.place

    def _at(self, engine: str) -> Place:
        if engine not in self._places:
            self._places[engine] = Place(EngineThread(engine))
        return self._places[engine]

    def _start(self, job: Job, work: Callable[[Engine, Job], None]) -> Job:
        for other in self.jobs:
            if "bench" in (job.kind, other.kind) and not other.future.done():
                raise UnsupportedError(
                    f"{other.label} runs, and a benchmark wants the machine to itself: stop it first"
                )
        place = self._at(job.engine)
        before = place.job
        if before is not None and before.future.done():
            self._ended.append(before)
        elif before is not None and before.kind == job.kind and job.kind in ("load", "look"):
            before.control.stop.set()  # another one was chosen meanwhile
        elif before is not None:
            raise UnsupportedError(f"{job.engine} is busy with {before.label}: stop it first, or switch the engine")
        place.job = self.newest = job

        def run(engine: Engine) -> None:
            place.device = engine.device()
            try:
                work(engine, job)
            finally:
                place.memory = engine.memory()

        job.future = place.thread.submit(run)
        return job


@contextmanager
def _registered(engine: Engine, job: Job, begin: Begin) -> Iterator[Recorded]:
    """A run that a job computes, with the store open as long."""
    from gemma_tui.runs.store import RunStore

    with closing(RunStore()) as store:
        recorded = begin(engine, job.control, store)
        job.run = job.label = recorded.run.run_id
        yield recorded


@contextmanager
def _kept(engine: Engine, place: Place) -> Iterator[None]:
    """The model that is loaded is so afterwards, too; runs on the engine's thread."""
    held, name = engine.model(), place.model
    try:
        yield
    finally:
        if engine.model() is held:
            place.model, place.info = name, held
        else:
            place.model, place.info = "", None
            place.settle(engine, name, anew=True)


def _progress(job: Job, stopped: str) -> Progress:
    """Tells how far a job is, and ends it once that was asked for.

    Args:
        stopped: what is said then.
    """

    def progress(share: float, text: str) -> None:
        if job.control.stop.is_set():
            raise UnsupportedError(stopped)
        job.share, job.detail = share, text

    return progress
