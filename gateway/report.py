"""Writes the dashboard with its answers beside it: a site that needs no gateway.

``index.html`` is the gateway's own page in one file; ``data/*.js`` hold what the API would answer
it, so that the two cannot show different things. The worst trajectories come in full until either
the number asked for or the size is reached; what was left out is listed on the page.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args
from urllib.parse import quote, urlencode

import msgspec

from driftgate.errors import DriftgateError
from driftgate.gateway.alarms import OF_NOW
from driftgate.gateway.api_live import GLOSSARY
from driftgate.gateway.pages import page_files
from driftgate.gateway.report_page import one_file
from driftgate.gateway.report_source import Source
from driftgate.gateway.report_text import LEFT_OUT, without_text
from driftgate.profiles import ProfileName
from driftgate.views import StepDetail, TrajectoryRow

__all__ = ["Limits", "Written", "write_report"]

BASE = "data/base.js"
"""What every view needs; the page runs it first. A folder that has it is a report."""

SERIES_POINTS = 120
"""As the page asks."""

PAGE = 500
"""Trajectories asked for at once."""

TOKENS_WITH_EXPERTS = 12
"""Of each answer, those with the largest |D|: the page lists as many. Experts of all tokens would
be most of a report."""

NAMED = 10
"""Trajectories that the page names of those that are not there in full."""

ABOUT_BYTES = 8192
"""For the lines that say what was left out: they are written last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much goes into a report."""

    top: int = 20
    """Trajectories in full, those with the largest |D| first."""
    size_bytes: int = 100 << 20
    """Of the whole folder: a host for static sites takes it, a browser opens each file when it is
    looked at."""
    rows: int = 20_000
    """Trajectories in the list: about 10 MB, which is read when the page opens."""
    text: bool = True
    """With the texts of messages and tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What a report holds."""

    in_full: int
    listed: int
    size_bytes: int
    left_out: list[str]
    damaged: list[str]
    """Trajectories that could not be read, and why: they are in the list only."""


@dataclass(slots=True)
class _Site:
    """Files of a report while it is written."""

    folder: Path
    limits: Limits
    size_bytes: int = 0
    files: dict[str, str] = field(default_factory=dict)
    """The file that holds the answer to each path."""

    def add(self, parts: list[tuple[str, dict[str, Any]]]) -> bool:
        """Write files of answers; False, and none of them, where they do not fit any more."""
        bodies = [(name, self.body(answers)) for name, answers in parts]
        paths = {path: name for name, answers in parts for path in answers}
        size = sum(len(body) for _, body in bodies) + len(self.body(paths))  # listed in BASE
        if self.size_bytes + size > self.limits.size_bytes:
            return False
        for name, body in bodies:
            (self.folder / name).write_bytes(body)
        self.size_bytes += size
        self.files |= paths
        return True

    def body(self, answers: dict[str, Any]) -> bytes:
        """A script that adds ``answers``. As a string: an object literal is not JSON where a key
        is ``__proto__``."""
        if not self.limits.text:
            answers = without_text(msgspec.json.decode(msgspec.json.encode(answers)))
        text = msgspec.json.encode(answers).replace(b"\\", b"\\\\").replace(b"'", b"\\'")
        return b"Object.assign((window.driftgateAnswers ??= {}), JSON.parse('%b'));\n" % text


async def write_report(source: Source, folder: Path, *, of: str, limits: Limits) -> Written:
    """Write the report of ``source`` to ``folder``, whole or not at all.

    ``of``: what it is of, in words. An earlier report there is replaced. DriftgateError where
    ``folder`` holds something else or cannot be written.
    """
    try:
        return await _write(source, folder, of, limits)
    except OSError as error:
        raise DriftgateError(f"cannot write {folder}: {error}; choose another --output") from error


async def _write(source: Source, folder: Path, of: str, limits: Limits) -> Written:
    if folder.exists() and any(folder.iterdir()) and not (folder / BASE).is_file():
        raise DriftgateError(
            f"{folder} holds something that is no report: name a new or empty folder"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        site = _Site(Path(scratch) / "site", limits)
        (site.folder / "data").mkdir(parents=True)
        written = await _fill(site, source, of)
        if folder.exists():
            shutil.rmtree(folder)
        site.folder.rename(folder)
    return written


async def _fill(site: _Site, source: Source, of: str) -> Written:
    rows, more = await _rows(source, site.limits.rows)
    base = {"rows": rows, **await _base(source)}
    page = one_file(page_files(), data=BASE)
    site.size_bytes = len(page.encode()) + len(site.body(base)) + ABOUT_BYTES
    if site.size_bytes > site.limits.size_bytes:
        raise DriftgateError(
            f"the page and its list of {len(rows)} trajectories alone take "
            f"{_mb(site.size_bytes)} MB: raise --max-mb"
        )
    order = await _worst_first(source, rows)
    in_full, too_large, damaged = 0, list[str](), list[str]()
    for number, name in enumerate(order[: site.limits.top]):
        try:
            parts = [part async for part in _trajectory(source, name, f"{number:04d}")]
        except DriftgateError as error:  # one trajectory's edge: the others are whole
            damaged.append(f"{name}: {error}")
            continue
        if site.add(parts):
            in_full += 1
        else:
            too_large.append(name)
    left_out = list(_left_out(site, len(rows), more, in_full, too_large, damaged))
    about = {
        "title": f"Report of {of}, by driftgate {version('driftgate')}: {in_full} of "
        f"{len(rows)} listed trajectories in full, those with the largest |D|. Made",
        "made_ns": time.time_ns(),
        "left_out": left_out,
        "left_out_fix": f"It holds {in_full} of {len(rows)} trajectories in full; "
        "`driftgate report --top` takes more.",
        "files": site.files,
    }
    (site.folder / BASE).write_bytes(site.body({"report": about, **base}))
    (site.folder / "index.html").write_text(page, encoding="utf-8")
    return Written(
        in_full=in_full,
        listed=len(rows),
        size_bytes=sum(file.stat().st_size for file in site.folder.rglob("*.*")),
        left_out=left_out,
        damaged=damaged,
    )


def _left_out(
    site: _Site,
    listed: int,
    more: bool,
    in_full: int,
    too_large: list[str],
    damaged: list[str],
) -> Iterator[str]:
    """In words, what the store has and the report has not."""
    if listed > in_full:
        yield f"The steps of {listed - in_full} trajectories: they are in the list only (--top)."
    if too_large:
        yield (
            f"Of those, {len(too_large)} did not fit into {site.limits.size_bytes >> 20} MB "
            f"(--max-mb): {', '.join(too_large[:NAMED])}{' …' if len(too_large) > NAMED else ''}."
        )
    for one in damaged[:NAMED]:
        yield f"Of those, one could not be read: {one}."
    if len(damaged) > NAMED:
        yield f"And {len(damaged) - NAMED} more could not be read."
    if more:
        yield f"Trajectories beyond the newest {listed}: they are not even in the list."
    yield (
        f"The experts of single tokens, but for the {TOKENS_WITH_EXPERTS} with the largest |D| of "
        "each answer."
    )
    if not site.limits.text:
        yield LEFT_OUT


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 20):.1f}"


async def _base(source: Source) -> dict[str, Any]:
    """Answers that are not about one trajectory, by their paths."""
    cells = await source.cells()
    routed = [cell for cell in cells.items if cell.kind == "drift" and cell.router is not None]
    now = await source.overview()
    kept = [alarm for alarm in now.alarms if alarm.code not in OF_NOW]
    names = [f"{cell.engine_digest}/{cell.trainer_digest}/{cell.model}" for cell in routed]
    return {
        "/api/overview": msgspec.structs.replace(now, alarms=kept),
        "/api/cells": cells,
        **{load_path(name): await source.expert_load(name) for name in names},
        f"/api/series?points={SERIES_POINTS}": await source.series(points=SERIES_POINTS),
        "/api/glossary": GLOSSARY,
    }


def load_path(cell: str) -> str:
    """As the page asks: a browser's ``URLSearchParams`` spells two characters otherwise."""
    query = urlencode({"cell": cell}).replace("~", "%7E").replace("%2A", "*")
    return f"/api/cells/load?{query}"


async def _rows(source: Source, limit: int) -> tuple[list[TrajectoryRow], bool]:
    """The newest trajectories, and whether there are more."""
    rows: list[TrajectoryRow] = []
    before: str | None = None
    while len(rows) < limit:
        size = min(PAGE, limit - len(rows))
        page = await source.trajectories(limit=size, before=before, drift=True)
        rows += page.items
        before = page.next
        if before is None:
            break
    return rows, before is not None


async def _worst_first(source: Source, rows: list[TrajectoryRow]) -> list[str]:
    """Names by their largest comparable |D|; then those with none that is comparable, then the
    unscored, newest first."""
    sizes: dict[str, tuple[bool, float]] = {}
    async for event in source.drift(after=0, follow=False, kind="drift"):
        score = event.score
        if score.worst is not None and score.worst.log_ratio is not None:
            found = (score.comparable.verdict != "no", abs(score.worst.log_ratio))
            sizes[score.trajectory] = max(found, sizes.get(score.trajectory, (False, 0.0)))
    listed = [row.trajectory for row in rows]
    return sorted(listed, key=lambda name: sizes.get(name, (False, -1.0)), reverse=True)


async def _trajectory(
    source: Source, name: str, number: str
) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    """File and answers of everything the page asks about one trajectory."""
    root = f"/api/trajectories/{_encoded(name)}"
    detail = await source.trajectory(name)
    whole: dict[str, Any] = {
        root: detail,
        f"{root}/mismatch": await source.mismatch(name),
        f"{root}/explain": await source.explain(name),
        f"{root}/tree": await source.tree(name),
    }
    for profile in get_args(ProfileName):
        whole[f"{root}/verdict?profile={profile}"] = await source.verdict(name, profile=profile)
    yield f"data/{number}.js", whole
    for step in detail.steps:
        if step.choices:
            found = await source.step(name, step.step)
            answers: dict[str, Any] = {f"{root}/steps/{step.step}": found}
            answers |= await _routes(source, f"{root}/steps/{step.step}", found)
            yield f"data/{number}-{step.step}.js", answers


async def _routes(source: Source, root: str, step: StepDetail) -> dict[str, Any]:
    """Route disagreement of each answer that has routes on both sides."""
    answers: dict[str, Any] = {}
    for choice in step.choices:
        if choice.routes is None or choice.trainer_routes is None:
            continue
        at = choice.meta.choice
        path = f"{root}/routes?choice={at}"
        answers[path] = await source.step_routes(step.trajectory, step.step, choice=at)
        known = [token for token in choice.tokens if token.log_ratio is not None]
        known.sort(key=lambda token: -abs(token.log_ratio or 0.0))
        for token in known[:TOKENS_WITH_EXPERTS]:
            one = await source.step_routes(step.trajectory, step.step, choice=at, token=token.index)
            # Its own row is in ``token``: the others would be the same for each.
            answers[f"{path}&token={token.index}"] = msgspec.structs.replace(one, missed=[])
    return answers


def _encoded(name: str) -> str:
    """As JavaScript's ``encodeURIComponent``, which makes the page's paths."""
    return quote(name, safe="!~*'()")
