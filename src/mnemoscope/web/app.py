"""The pages: runs → run → sample, and two runs compared. Made on the server from the report's templates; one small script keeps
them up to date and gives them keys, and everything can be read without it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from socket import socket
from typing import Any, Literal

from jinja2 import ChoiceLoader, Environment, PackageLoader
from markupsafe import Markup
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from ..errors import MnemoscopeError, RunError, UnknownName, UsageError
from ..records.schema import Row
from ..records.store import differences, digest, short
from ..report import plots
from ..report.findings import Finding, Shot
from ..report.html import environment as report_environment
from ..report.pictures import Picture, Pictures, Thumbnails
from ..report.words import reference
from . import listing
from .access import Gate
from .connections import Config, Patience, Server
from .listing import Query
from .reading import Library, Snapshot
from .runs import Entry

__all__ = ["create_app", "serve"]

SIDE = 512
"""Longest side of the pictures on a sample's page, in pixels."""

THUMB = 128
"""The same, of the other seeds' thumbnails."""

SEEDS = 24
"""How many seeds of its prompt a sample's page shows."""

MOST_STEPS = 1000
"""How many steps of a score are drawn."""

LONGEST_RECORD = 100_000
"""Characters of a row, or of a configuration, that a page shows as it stands in its file."""

WHILE_RUNNING, OTHERWISE = 2000, 10000
"""Milliseconds between two looks at a run that is being written, and at any other: the same command may continue it."""


def create_app(folder: str | Path, *, host: str = "127.0.0.1", token: str | None = None) -> ASGIApp:
    """The application that shows the runs at or below a folder.

    Args:
        folder: A run folder, or a folder that holds some.
        host: Where it will listen; a host that others can reach needs a token.
        token: What a visitor must show once, in the address (``?token=``) or as a bearer.

    Returns:
        An ASGI application.

    Raises:
        UsageError: there is no such folder, or others could look without a token.
    """
    pages = _Pages(Library(folder))
    routes = [
        Route("/", pages.home),
        Route("/compare", pages.compare),
        Route("/pair", pages.pair),
        Route("/run/{run:path}", pages.run),
        Route("/sample/{run:path}", pages.sample),
        Route("/style.css", pages.style),
        Route("/view.js", pages.script),
    ]
    return Gate(
        Starlette(routes=routes, exception_handlers={MnemoscopeError: pages.failed, HTTPException: pages.missing}),
        host,
        token,
    )


def serve(
    app: ASGIApp,
    listening: socket,
    *,
    lifespan: Literal["on", "off"] = "off",
    grace: int = 1,
    leaving: Callable[[], object] | None = None,
    waiting: int = 0,
) -> None:
    """Answer on a socket that is bound, until interrupted. Addresses are not logged: one of them may hold a token.

    Args:
        app: What answers.
        listening: The socket.
        lifespan: Whether the application wants to be told when it starts and ends.
        grace: Seconds that answers which were begun may take after an interrupt.
        leaving: Called after an interrupt, before they are waited for.
        waiting: How many connections may wait for an answer with good reason.
    """
    server(app, lifespan=lifespan, grace=grace, leaving=leaving, waiting=waiting).run(sockets=[listening])


def server(
    app: ASGIApp,
    *,
    lifespan: Literal["on", "off"],
    grace: int,
    leaving: Callable[[], object] | None,
    waiting: int = 0,
    patience: Patience | None = None,
) -> Server:
    """What :func:`serve` runs, for whoever wants to end it from another thread, or to be more or less patient with visitors."""
    config = Config(
        app,
        waiting=waiting,
        patience=patience,
        log_config=None,  # whoever runs us has one way for all logs
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        lifespan=lifespan,
        timeout_graceful_shutdown=grace,
    )
    return Server(config, leaving)


@dataclass(frozen=True)
class _View:
    """One run as the report's table of several runs sees it."""

    key: str
    name: str
    summary: Any
    facts: dict[str, str]


@dataclass(frozen=True)
class _Opened:
    """One sample with its pictures, and the run as it was when it was opened."""

    run: Snapshot
    row: Row
    finding: Finding
    generated: Picture
    reference: Picture | None

    @property
    def nearest_words(self) -> str:
        """What was found nearest to this one picture."""
        near = self.row.nearest
        if near is None:
            return "this seed: not compared with references"
        named = f"{near.descriptor} {near.similarity:.3f} to reference {reference(near.reference)}"
        if near.copy_found is None:
            return f"this seed: {named}; not calibrated, so no copy is called"
        line = "" if near.threshold is None else f", threshold {near.threshold:.3f}"
        return f"this seed: {'copy found' if near.copy_found else 'no copy found'} ({named}{line})"


class _Pages:
    """What is shown at each address."""

    def __init__(self, library: Library):
        self.library = library
        self.thumbnails = Thumbnails()

    @cached_property
    def env(self) -> Environment:
        """The report's words and macros, with our pages before them."""
        env = report_environment()
        env.loader = ChoiceLoader([PackageLoader("mnemoscope.web"), PackageLoader("mnemoscope.report")])
        env.globals |= {"Query": Query, "listing": listing, "MOST": listing.SIZE}
        env.globals |= {"MOST_STEPS": MOST_STEPS, "LONGEST_RECORD": LONGEST_RECORD}
        return env

    # Pages ----------------------------------------------------------------------------------------------------------------

    def home(self, request: Request) -> Response:
        """All runs, a page of them."""
        query = Query.parse({k: request.query_params[k] for k in ("q", "page") if k in request.query_params})
        runs = self.library.runs()
        page = listing.list_runs(runs.entries, query)
        page = replace(page, lines=self.library.count_rows(page.lines))
        version = digest([page.number, page.matching, page.all, runs.complete, [_facts(e) for e in page.lines]])
        if _has_seen(request, version):
            return Response(status_code=204)
        running = any(e.status == "running" for e in page.lines)
        return self._page(
            "home",
            version,
            running,
            page=page,
            query=query,
            folder=self.library.folder,
            complete=runs.complete,
        )

    def run(self, request: Request) -> Response:
        """One run: its numbers, and its prompts or samples as a list."""
        run = self.library.run(request.path_params["run"])
        if _has_seen(request, run.version):
            return Response(status_code=204)
        query = Query.parse(request.query_params)
        page = listing.listed(run, query)
        return self._page(
            "list",
            run.version,
            run.manifest.status == "running",
            run=run,
            model=run.manifest.model,
            query=query,
            page=page,
            others=[name for name in self.library.names() if name != run.name],
            config=_record(run.manifest.config, sort=True),
        )

    def sample(self, request: Request) -> Response:
        """One sample: pictures, scores over the steps, the other seeds of its prompt, the whole record."""
        name, query = request.path_params["run"], Query.parse(request.query_params)
        opened = self._open(name, request.query_params.get("id", ""))
        row, run = opened.row, opened.run
        seeds, pictures = run.seeds[row.prompt_id, row.prompt], self._pictures(run)
        rows = [self.library.sample(name, id) for _, id in seeds[:SEEDS]]
        others = [_Opened(run, o, opened.finding, pictures.generated(_shot(o), THUMB), None) for o in rows]
        return self._page(
            "sample",
            run.version,
            False,
            run=run,
            query=query,
            opened=opened,
            others=others,
            seeds=len(seeds),
            place=listing.place(run, query, row.id, (row.prompt_id, row.prompt)),
            figure=_steps(run, row, rows),
            record=_record(row.model_dump(mode="json", exclude_none=True)),
        )

    def compare(self, request: Request) -> Response:
        """Two runs, and how each prompt did in both."""
        runs = a, b = [self.library.run(name) for name in self._two(request)]
        version = digest([run.version for run in runs])
        if _has_seen(request, version):
            return Response(status_code=204)
        query = Query.parse(request.query_params).at(("run", a.name), ("run", b.name))
        return self._page(
            "compare",
            version,
            any(run.manifest.status == "running" for run in runs),
            a=a,
            b=b,
            views=[_View(f"run{i + 1}", r.name, r.summary, {"model": r.manifest.model}) for i, r in enumerate(runs)],
            query=query,
            page=listing.compared(a, b, query),
            differences=differences(a.manifest.setting, b.manifest.setting),
        )

    def pair(self, request: Request) -> Response:
        """One prompt in two runs."""
        names = self._two(request)
        ids = request.query_params.getlist("id")
        if len(ids) != 2 or not any(ids):
            raise UsageError(f"{len(ids)} samples were named; a pair is two, of which one may be empty.")
        query = Query.parse(request.query_params).at(("run", names[0]), ("run", names[1]))
        opened = [self._open(name, id) if id else None for name, id in zip(names, ids, strict=True)]
        runs = a, b = [self.library.run(name) for name in names]
        return self._page(
            "pair",
            digest([run.version for run in runs]),
            False,
            runs=runs,
            opened=opened,
            prompt=next(o.row.prompt for o in opened if o),
            query=query,
            place=listing.place_of_pair(a, b, query, (ids[0], ids[1])),
        )

    def style(self, request: Request) -> Response:
        """The report's style sheet, its figures' colors, and what only pages with lists need."""
        return Response("\n".join([self._file("style.css"), plots.CSS, self._file("view.css")]), media_type="text/css")

    def script(self, request: Request) -> Response:
        """The script."""
        return Response(self._file("view.js"), media_type="text/javascript")

    def _file(self, name: str) -> str:
        """A file that lies beside the templates, as it is."""
        assert self.env.loader is not None
        return self.env.loader.get_source(self.env, name)[0]

    # Errors ---------------------------------------------------------------------------------------------------------------

    async def failed(self, request: Request, error: Exception) -> Response:
        """The sentence that the command line would print."""
        status = 404 if isinstance(error, UnknownName) else 400 if isinstance(error, UsageError) else 500
        return self._error(str(error), status)

    async def missing(self, request: Request, error: Exception) -> Response:
        """An address that leads nowhere."""
        status = error.status_code if isinstance(error, HTTPException) else 404
        return self._error(f"there is no page {request.url.path}; all runs are on the first one.", status)

    def _error(self, sentence: str, status: int) -> Response:
        page = self.env.get_template("error.html.jinja").render(sentence=sentence, version="", every=0)
        return HTMLResponse(_encoded(page), status)

    # What pages share -----------------------------------------------------------------------------------------------------

    def _page(self, name: str, version: str, running: bool, **facts: Any) -> Response:
        every = WHILE_RUNNING if running else OTHERWISE
        page = self.env.get_template(f"{name}.html.jinja").render(version=version, every=every, **facts)
        return HTMLResponse(_encoded(page))

    def _two(self, request: Request) -> list[str]:
        names = request.query_params.getlist("run")
        if len(names) != 2:
            raise UsageError(f"{len(names)} runs were named; mark the two that should be compared.")
        return names

    def _open(self, name: str, id: str) -> _Opened:
        row = self.library.sample(name, id)
        run = self.library.run(name)  # after the row, so that it knows of it
        finding = run.findings.get((row.prompt_id, row.prompt))
        if finding is None:
            raise RunError(f"{name} changed while it was read; open the page again.")
        pictures = self._pictures(run)
        near = None if row.nearest is None else pictures.reference(row.nearest, SIDE)
        return _Opened(run, row, finding, pictures.generated(_shot(row), SIDE), near)

    def _pictures(self, run: Snapshot) -> Pictures:
        return Pictures(run.folder, thumbnails=self.thumbnails)


def _has_seen(request: Request, version: str) -> bool:
    """Whether the page that asks shows this already; nothing more is made for it then."""
    return request.query_params.get("seen") == version


def _facts(entry: Entry) -> list[Any]:
    """What the list shows of a run, as plain values."""
    return [v for k, v in vars(entry).items() if k != "folder"]


def _shot(row: Row) -> Shot:
    return Shot(row.seed, None, row.image, row.nearest)


def _record(value: Mapping[str, Any], *, sort: bool = False) -> str:
    """Plain values as JSON that a person reads, cut where nobody reads on."""
    return short(json.dumps(value, indent=2, ensure_ascii=False, sort_keys=sort, default=str), LONGEST_RECORD)


def _encoded(page: str) -> bytes:
    return page.encode("utf-8", errors="replace")


def _steps(run: Snapshot, row: Row, others: Sequence[Row]) -> Markup | None:
    """The score of this seed over the steps, and of all seeds of its prompt where there are several."""
    detector = run.summary.detector
    if detector is None or detector not in row.scores or len(row.scores[detector].per_step) < 2:
        return None
    curves = [o.scores[detector].per_step[:MOST_STEPS] for o in others if detector in o.scores]
    drawn = [plots.Bundle(f"seed {row.seed}", [row.scores[detector].per_step[:MOST_STEPS]])]
    if len(curves) > 1:
        drawn.append(plots.Bundle(f"median of {len(curves)} seeds", curves))
    return plots.steps(drawn, axis=f"{detector} ({row.scores[detector].space}-space)")
