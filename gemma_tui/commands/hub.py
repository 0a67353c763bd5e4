"""``gemma-tui models`` where it is about the hub and its cache: search, download, verify, remove, clean, adopt."""

from __future__ import annotations

import argparse
import queue
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gemma_tui.commands.signals import heard
from gemma_tui.errors import GemmaTuiError
from gemma_tui.hub import keeping
from gemma_tui.hub.cache import Removal, cached_repos, finished_bytes, leftovers
from gemma_tui.hub.descriptions import (
    FOUND,
    fetching_command,
    fit_of,
    found_cells,
    inside_lines,
    name_of,
    preview,
    using_command,
)
from gemma_tui.hub.downloads import CANCELLED, DONE, KEPT, Download
from gemma_tui.hub.fetching import Request
from gemma_tui.hub.headers import look_inside
from gemma_tui.hub.models import resolve
from gemma_tui.hub.remote import check_names
from gemma_tui.hub.remote import search as search_hub
from gemma_tui.output import Output, age, bytes_text, duration
from gemma_tui.runs.processes import start
from gemma_tui.studies.fitting import main_needs, memory_lines, use_of
from gemma_tui.studies.using import refuse_in_use

INTERRUPTED = 130
DETACH_SECONDS = 60


def search(args: argparse.Namespace, output: Output) -> int:
    """Gemma-3 models on the hub."""
    found = search_hub(args.query, args.limit)
    rows = []
    for item in found:
        fits = fit_of(item)
        output.row(
            "found", name=item.repo, format=item.kind, parameters=item.parameters, dtype=item.dtype, bytes=item.nbytes,
            licence=item.licence, gated=item.gated, downloads=item.downloads, modified=item.modified, fits=fits,
        )  # fmt: skip
        rows.append(found_cells(item))
    if found:
        output.table(FOUND, rows, unbroken=True)
    else:
        output.say("nothing of Gemma-3 was found: try other words")
    output.row("end", status="done", found=len(found))
    return 0


def download(args: argparse.Namespace, output: Output) -> int:
    """Fetch models into the Hugging Face cache, one after another."""
    from huggingface_hub import is_offline_mode

    requests = [Request(repo, args.revision, tuple(args.include)) for repo in args.repos]
    for request in requests:
        check_names(request.repo, request.revision)
    if args.detach and not is_offline_mode():  # what is here is told at once
        return _detach(requests, output)
    failed: list[str] = []
    for request in requests:
        item = _fetched(request, output)
        if item.state == CANCELLED:
            output.say(f"{request.repo}: cancelled; {KEPT}")
            output.row("end", status="interrupted", repo=request.repo, kept=finished_bytes(request.repo), note=KEPT)
            return INTERRUPTED
        if item.state != DONE:
            failed.append(f"{request.repo}: {item.detail}" if request.repo not in item.detail else item.detail)
    if failed:
        raise GemmaTuiError("; ".join(failed))
    output.row("end", status="done", models=[request.repo for request in requests])
    return 0


def _detach(requests: Sequence[Request], output: Output) -> int:
    """Fetch in a process that outlives this one and its terminal; wait until the hub has agreed to the first."""
    shared = requests[0]
    words = [*(request.repo for request in requests), f"--revision={shared.revision}"]
    process = start(["models", "download", *words, *(f"--include={pattern}" for pattern in shared.include)], "plan")
    process.wait(DETACH_SECONDS)
    pid = process.process.pid
    output.say(f"process {pid} goes on by itself: {process.log} says how far it is, `kill {pid}` cancels it")
    output.row("end", status="detached", pid=pid, log=str(process.log))
    return 0


def _fetched(request: Request, output: Output) -> Download:
    item = Download(request, events=queue.SimpleQueue())
    with heard(lambda *_: item.cancel()):
        item.start()
        for event in item.follow():
            _tell(item, event, output)
    return item


def _tell(item: Download, event: Mapping[str, Any], output: Output) -> None:
    row = dict(event)
    output.row(row.pop("kind"), **{"repo": item.request.repo, **row})
    kind = event["kind"]
    if kind == "plan":
        output.say(f"{item.request.repo} at {event['commit'][:12]}: {event['files']} files, "
                   f"{bytes_text(event['bytes'])}, of which {bytes_text(event['download'])} come now")  # fmt: skip
    elif kind == "progress":
        left = f", {duration(item.seconds_left)} left" if item.seconds_left is not None else ""
        output.passing(f"{item.share:4.0%}  {bytes_text(item.done)} of {bytes_text(item.total)}, "
                       f"{bytes_text(item.rate)}/s{left}")  # fmt: skip
    elif kind == "checking":
        output.passing(f"{item.detail}")
    elif kind == "retry":
        output.say(item.detail)
    elif kind == "fetched" and item.state == DONE:  # it may end just as it is cancelled
        output.say(f"{name_of(item.request)} is checked and ready: `{using_command(item)}`")


def about_remote(name: str, output: Output) -> int:
    """A model of the hub before anything of it is fetched: what comes, whether it would load, what it would need."""
    repo, _, revision = name.partition("@")
    inside = look_inside(repo, revision or "main")
    remote, config, files = inside.remote, inside.config, inside.files
    shared = {"name": repo, "commit": remote.commit, "licence": remote.licence, "gated": remote.gated}
    if config is None:
        output.row("remote", **shared, choice=[{"path": f.path, "bytes": f.size} for f in files])
    else:
        needs = main_needs(config)
        output.row("remote", **shared, files=len(files), bytes=sum(f.size for f in files), dtypes=inside.dtypes,
                   parameters=config.parameter_count(), memory={use_of(need): need.nbytes for need in needs},
                   left_out=list(remote.code), fits={use_of(need): need.verdict for need in needs},
                   config=config.to_dict())  # fmt: skip
    lines = inside_lines(inside) + (memory_lines(config) if config is not None else [])
    output.table(("", f"{repo}, not here"), lines)
    request = Request(repo, revision or "main", () if config else (files[0].path,))
    if config is not None:
        output.say(f"`gemma-tui models fit {name}` tells what each method of training needs, on each engine")
    output.say(f"`{fetching_command(request)}` fetches it")
    output.row("end", status="done")
    return 0


def disk_use(output: Output) -> None:
    """What the hub's cache takes, by repository and commit."""
    repos, rows = cached_repos(), []
    for repo in repos:
        revisions = [asdict(revision) for revision in repo.revisions]
        output.row("cached", name=repo.repo, bytes=repo.nbytes, revisions=revisions)
        for i, one in enumerate(repo.revisions):
            name, size = ("", "") if i else (repo.repo, bytes_text(repo.nbytes))
            refs = ", ".join(one.refs) or "detached"
            rows.append((name, size, one.commit[:12], refs, bytes_text(one.nbytes), one.files, age(one.modified)))
    if repos:
        output.table(("in the hub cache", "on disk", "commit", "refs", "size", "files", "age"), rows)


def verify(args: argparse.Namespace, output: Output) -> int:
    """Hold a model's files against their checksums, and its headers against our limits."""
    from huggingface_hub import is_offline_mode

    from gemma_tui.hub.verification import verify as check

    model = resolve(args.model)
    with output.progress("checking") as progress:
        found = check(model, args.offline or is_offline_mode(), progress)
    output.row("verified", name=model.name, folder=str(model.folder), against=found.against, files=found.files,
               bytes=found.nbytes, problems=found.problems)  # fmt: skip
    output.say(f"{model.name}: {found.files} files, {bytes_text(found.nbytes)}, against {found.against}")
    if found.problems:
        name, problem = next(iter(found.problems.items()))
        more = f" and {len(found.problems) - 1} more" if len(found.problems) > 1 else ""
        raise GemmaTuiError(f"{model.name}: {name}: {problem}{more}; remove the model and fetch it again")
    output.say("everything is as it should be")
    output.row("end", status="done")
    return 0


def remove(args: argparse.Namespace, output: Output) -> int:
    """Delete a model from the cache or the data folder, after a look at what goes."""
    return _delete(keeping.removal(args.model), args, output)


def clean(args: argparse.Namespace, output: Output) -> int:
    """Delete what downloads that broke off have left."""
    return _delete(leftovers(), args, output)


def _delete(found: Removal, args: argparse.Namespace, output: Output) -> int:
    refuse_in_use(found)
    adapters = keeping.adapters_on(found)
    output.row(
        "removal", what=found.what, frees=found.frees, commits=list(found.commits), adapters=adapters,
        paths=[str(path) for path in (*found.folders, *found.files, *found.links)],
    )  # fmt: skip
    if found.empty:
        output.say("there is nothing to delete")
        output.row("end", status="done", freed=0)
        return 0
    for line in preview(found, adapters):
        output.say(line)
    if not args.yes and not _agreed(output):
        output.say("nothing was deleted; --yes deletes without asking")
        output.row("end", status="preview", freed=0)
        return 0
    found.execute()
    output.say(f"freed {bytes_text(found.frees)}")
    output.row("end", status="done", freed=found.frees)
    return 0


def _agreed(output: Output) -> bool:
    if output.as_json or not (sys.stdin.isatty() and sys.stdout.isatty()):
        return False
    print("delete it? [y/N] ", end="", flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def adopt(args: argparse.Namespace, output: Output) -> int:
    """Give a folder from elsewhere a name here, without a copy."""
    model = keeping.adopt(Path(args.folder), args.name)
    output.say(f"{model.name} is {model.folder}, where it stays; `gemma-tui models remove {model.name}` forgets it")
    output.row("end", status="done", model=model.name, folder=str(model.folder))
    return 0
