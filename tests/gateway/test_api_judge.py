"""Verdicts, prompt groups, feedback and explanations over a real store, by HTTP, client and
command."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import msgspec
import numpy as np
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from typer.testing import CliRunner

from driftgate import cli
from driftgate.client import Client
from driftgate.codes import reason
from driftgate.errors import NotFoundError, RequestError
from driftgate.explain import TrajectoryExplanation
from driftgate.gateway import explanations
from driftgate.gateway.answers import Answers
from driftgate.gateway.api import ApiContext, add_api_routes
from driftgate.gateway.explanations import Explanations
from driftgate.gateway.verdicts import Verdicts
from driftgate.judgements import Feedback, TrajectoryVerdicts
from driftgate.mismatch import Bucket
from driftgate.storage import Reader, Record
from driftgate.testing.stores import write_store
from driftgate.testing.traces import ENGINE, TRAINER, make_intent, make_trace
from driftgate.trace import Comparable, Engine, Trace
from tests.core.planted import noise, run, scored, with_meta

NEWER = msgspec.structs.replace(ENGINE, version="0.30.0")
DRIFTED = 0.3
"""nats, of the run that is far off policy."""


def story() -> Iterator[Record]:
    """Three samples of one prompt under version 5, one of them bad; a run of another prompt under
    version 3; one half scored, one open, one with a gap; one of a newer engine, not comparable."""
    for name, sigma in (("a", 0.01), ("b", 0.01), ("c", DRIFTED)):
        yield from whole(name, sigma, version="5")
    yield from whole("stale", 0.01, version="3", seed=1)
    half = list(started("half", seed=2))
    yield from half
    yield from (scored(t, noise(1, 200, 0.01)) for t in half[:2] if isinstance(t, Trace))
    yield make_intent(make_trace(trajectory="open", routed=False))
    yield from started("gap", seed=3, missing=["prompt ids: not given"])
    why = Comparable(verdict="no", reasons=[reason("grammar_masked", "tool_choice", "free it")])
    for record in started("newer", seed=4, engine=NEWER):
        yield record
        if isinstance(record, Trace):
            yield scored(record, noise(2, 200, 0.01), comparable=why)
    yield from masked()
    yield scored(run(seed=9)[0], np.zeros(200), kind="noise_floor", trainer=ENGINE)


MASKED = Comparable(
    verdict="no", reasons=[reason("grammar_masked", "tool_choice=named", "free it")]
)


def masked() -> Iterator[Record]:
    """The demo's shape: a forced tool call at 25 nats, then three free steps, under one version."""
    for record in started("masked", seed=5, steps=4):
        yield record
        if isinstance(record, Trace):
            forced = record.meta.step == 0
            d = noise(record.meta.step, 200, 0.01)
            yield scored(
                record,
                d - 25.0 if forced else d,
                trainer_weight_version="5",
                comparable=MASKED if forced else Comparable(verdict="yes"),
            )


def started(
    name: str, *, seed: int = 0, version: str = "5", steps: int = 2, **meta: object
) -> Iterator[Record]:
    """Runs of one seed begin with the same prompt."""
    for trace in run(steps, seed=seed):
        call = f"{name}-{trace.meta.step}"
        named = with_meta(
            trace,
            trajectory=name,
            call_id=call,
            trace_id=f"{call}.0",
            parent=f"{name}-0.0" if trace.meta.step else None,
            weight_version=version,
            **meta,
        )
        yield make_intent(named)
        yield named


def whole(name: str, sigma: float, *, version: str, seed: int = 0) -> Iterator[Record]:
    for at, record in enumerate(started(name, seed=seed, version=version)):
        yield record
        if isinstance(record, Trace):
            d = noise(100 + at + len(name), 200, sigma)
            yield scored(record, d, trainer_weight_version="5")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("judged"), story())


@pytest.fixture
def reader(store: Path) -> Iterator[Reader]:
    reader = Reader(store)
    yield reader
    reader.close()


@pytest.fixture
async def client(reader: Reader) -> AsyncIterator[Client]:
    def refuse(*_: object) -> tuple[str, str]:
        raise RequestError("not here")

    app = web.Application()
    context = ApiContext(reader=reader, submit=refuse, mint=refuse)  # type: ignore[arg-type]
    add_api_routes(app, context)
    async with TestServer(app) as server, Client(str(server.make_url("/"))) as client:
        yield client


def verdict_of(reader: Reader, name: str) -> tuple[str | None, list[str]]:
    (item,) = Verdicts(reader).trajectory(name).items
    return item.verdict.verdict, [reason.code for reason in item.verdict.reasons]


@pytest.mark.parametrize(
    ("name", "verdict", "codes"),
    [
        ("a", "train", ["WITHIN_BUDGET"]),
        ("stale", "train_with_correction", ["STALE_POLICY_LAG"]),
        ("gap", "quarantine", ["INCOMPLETE_CAPTURE"]),
        ("newer", "quarantine", ["NOT_COMPARABLE"]),
        ("masked", "train_with_correction", ["NOT_COMPARABLE"]),
        ("half", None, []),
        ("open", None, []),
    ],
)
def test_each_run_has_its_verdict(
    reader: Reader, name: str, verdict: str | None, codes: list[str]
) -> None:
    assert verdict_of(reader, name) == (verdict, codes)


def test_a_run_far_off_policy_is_kept_out_of_training(reader: Reader) -> None:
    verdict, codes = verdict_of(reader, "c")
    assert verdict == "replay"
    assert codes[0] == "REPLAY_TIER_ESS"


def test_why_there_is_no_verdict(reader: Reader) -> None:
    verdicts = Verdicts(reader)
    (half,), (gone,) = (verdicts.trajectory(name).items for name in ("half", "open"))
    assert half.verdict.why_null == "1 of 2 traces that can be scored are scored"
    assert (half.captured, half.scored, half.trainer_digest) == (2, 1, TRAINER.digest)
    assert gone.verdict.why_null == "calls that have not ended: 1"
    assert gone.engine_digest is None


def test_a_prompt_group_is_judged_as_one_and_member_by_member(reader: Reader) -> None:
    for name in ("a", "b", "c"):
        (group,) = Verdicts(reader).trajectory(name).groups
        members = {m.trajectory: m.verdict.verdict for m in group.members}
        assert members == {"a": "train", "b": "train", "c": "replay"}
    sums = []
    for name in ("a", "b", "c"):
        steps = [r.meta.bucket for r in reader.scores(name)]
        sums.append(sum(b.log_ratio.mean * b.n_tokens for b in steps if b is not None))
    weights = np.exp(sums)
    kish = weights.sum() ** 2 / (3 * (weights**2).sum())
    assert group.ess_kish_trajectory == pytest.approx(kish, rel=1e-9)
    assert group.verdict.verdict == "train_with_correction"
    assert Verdicts(reader).trajectory("stale").groups == []
    assert reader.prompt_group("open") == []


def test_feedback_counts_by_engine_and_weight_version(reader: Reader) -> None:
    found = Verdicts(reader).feedback()
    rows = {(r.engine_digest, r.trainer_digest, r.weight_version): r for r in found.items}
    fresh = rows[ENGINE.digest, TRAINER.digest, "5"]
    assert fresh.verdicts == {"train": 2, "replay": 1, "train_with_correction": 1, "null": 1}
    assert fresh.codes["WITHIN_BUDGET"] == 2
    assert rows[ENGINE.digest, TRAINER.digest, "3"].verdicts == {"train_with_correction": 1}
    assert rows[NEWER.digest, TRAINER.digest, "5"].codes == {"NOT_COMPARABLE": 1}
    assert rows[ENGINE.digest, None, "5"].codes == {"INCOMPLETE_CAPTURE": 1}
    total = sum(b.sum_abs for b in _buckets(reader, "a", "b", "c", "half", "masked"))
    assert fresh.abs_log_ratio_mean == pytest.approx(total / fresh.n_tokens)
    assert (found.trajectories, found.of) == (9, 9)
    assert Verdicts(reader).feedback(limit=3).trajectories == 3


def fleet() -> Iterator[Record]:
    """Two engines, three versions; four runs under each, drifting as engine and version say. One
    run under two versions; one member of the first group without any score."""
    for engine_at, engine in enumerate((ENGINE, NEWER)):
        for version in ("8", "9", "10"):
            for at in range(4):
                name = f"e{engine_at}-v{version}-{at}"
                yield from graded(name, 0.01 * (1 + engine_at), version, engine=engine)
    mixed = list(graded("mixed", 0.01, "8", engine=ENGINE))
    for record in mixed:
        if isinstance(record, Trace) and record.meta.step:
            record.meta.weight_version = "9"
    yield from mixed
    yield from started("late", version="8", seed=0)


def graded(name: str, sigma: float, version: str, *, engine: Engine) -> Iterator[Record]:
    seed = sum(name.encode())
    for record in started(name, version=version, engine=engine, seed=0):
        yield record
        if isinstance(record, Trace):
            d = noise(seed + record.meta.step, 200, sigma)
            yield scored(record, d, trainer_weight_version="10")


def test_feedback_of_two_engines_and_three_versions(tmp_path: Path) -> None:
    reader = Reader(write_store(tmp_path, fleet()))
    found = Verdicts(reader).feedback()
    rows = {(r.engine_digest, r.trainer_digest, r.weight_version): r for r in found.items}
    assert len(rows) == len(found.items) == 8
    for at, engine in enumerate((ENGINE, NEWER)):
        for version, verdict in (
            ("8", "train_with_correction"),
            ("9", "train_with_correction"),
            ("10", "train"),
        ):
            row = rows[engine.digest, TRAINER.digest, version]
            assert row.verdicts == {verdict: 4}
            names = [f"e{at}-v{version}-{n}" for n in range(4)]
            sums = [b.sum_abs for b in _buckets(reader, *names)]
            assert row.n_tokens == 200 * 8
            assert row.abs_log_ratio_mean == pytest.approx(sum(sums) / row.n_tokens)
            lagging = {} if version == "10" else {"STALE_POLICY_LAG": 4}
            assert row.codes == (lagging or {"WITHIN_BUDGET": 4})
    assert rows[ENGINE.digest, TRAINER.digest, "8+9"].trajectories == 1
    unscored = rows[ENGINE.digest, None, "8"]
    assert unscored.verdicts == {"null": 1}
    assert unscored.kl_k3_rollout_train is None
    assert unscored.undefined == dict.fromkeys(
        ("kl_k3_rollout_train", "abs_log_ratio_mean"), "no comparable token (0 bad)"
    )
    reader.close()


def test_a_group_waits_for_members_that_no_trainer_has_scored(tmp_path: Path) -> None:
    reader = Reader(write_store(tmp_path, fleet()))
    groups = Verdicts(reader).trajectory("e0-v10-0").groups
    (group,) = groups
    assert {m.trajectory for m in group.members} >= {"late", "mixed", "e0-v8-0"}
    assert not any(m.trajectory.startswith("e1") for m in group.members)
    assert (group.of, len(group.members)) == (26, 14)
    assert group.verdict.verdict is None
    assert group.verdict.why_null == "26 of 28 traces that can be scored are scored"
    assert group.ess_kish_trajectory is None
    assert group.undefined == {"ess_kish_trajectory": "runs that are not scored in full: 1"}
    reader.close()


def _buckets(reader: Reader, *names: str) -> Iterator[Bucket]:
    """Of the comparable scores."""
    for name in names:
        for row in reader.scores(name, kind="drift"):
            if row.meta.bucket is not None and row.meta.comparable.verdict != "no":
                yield row.meta.bucket


def test_a_forced_tool_call_is_set_aside_and_its_answer_named(reader: Reader) -> None:
    """As it was, 99 % of the drift of such a run was said to be stale weights."""
    (told,) = Explanations(reader).trajectory("masked").items
    (aside,) = told.set_aside
    assert (aside.code, aside.steps, aside.tokens) == ("grammar_masked", [0], 200)
    assert aside.share_of_tokens == 0.25
    sums = [r.meta.bucket.sum_abs for r in reader.scores("masked") if r.meta.bucket]
    assert aside.share_of_drift == pytest.approx(sums[0] / sum(sums))
    assert {cause.name: cause.share for cause in told.causes}["stale_weights"] == 0.0
    assert told.abs_log_ratio_mean == pytest.approx(sum(sums[1:]) / 600)
    assert told.comparable == {"yes": 3, "no": 1}
    (item,) = Verdicts(reader).trajectory("masked").items
    assert [one.trace_id for one in item.verdict.not_comparable] == ["masked-0.0"]
    assert item.n_tokens == 600


def test_of_a_long_run_answers_evenly_over_it_are_read(
    reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explanations, "MAX_TOKENS", 350)
    (told,) = Explanations(reader).trajectory("masked").items
    whole = [r.meta for r in reader.scores("masked") if r.meta.comparable.verdict == "yes"]
    worst = max(whole, key=lambda meta: abs(meta.bucket.worst.log_ratio))  # type: ignore[union-attr]
    read = {0, whole.index(worst)}
    assert (told.n_responses, told.n_tokens) == (len(read), 200 * len(read))
    assert (told.left_out_responses, told.left_out_tokens) == (3 - len(read), 600 - told.n_tokens)
    assert told.set_aside[0].share_of_tokens == 0.25


@pytest.mark.parametrize(("count", "most"), [(10, 10), (1024, 1024), (5000, 1026)])
def test_how_many_answers_are_read_is_bounded(count: int, most: int) -> None:
    metas = [scored(run(1)[0], np.zeros(200)).meta] * count
    read = explanations.chosen(metas)
    assert len(read) <= most
    assert sum(200 for _ in read) <= explanations.MAX_TOKENS + 2 * 200
    steps = np.diff(sorted(read))
    assert not steps.size or steps.max() <= 2 * steps.min()


def test_explanations_read_traces_scores_and_floors(reader: Reader) -> None:
    (told,) = Explanations(reader).trajectory("stale").items
    causes = {cause.name: cause for cause in told.causes}
    assert sum(cause.share for cause in told.causes) == pytest.approx(1.0)
    assert causes["stale_weights"].evidence["sampled_under"] == "3"
    assert causes["stale_weights"].evidence["scored_under"] == "5"
    assert (told.captured, told.scored, told.n_tokens) == (2, 2, 400)
    assert told.noise_floor == 0.0
    assert Explanations(reader).trajectory("gap").why_empty == "it is not scored yet"
    assert Explanations(reader).trajectory("a", trainer="nobody").items == []


def test_the_detail_and_the_live_scores_carry_verdicts(reader: Reader) -> None:
    answers = Answers(reader)
    (pair,) = answers.trajectory("c").verdicts
    assert (pair.verdict.verdict, pair.verdict.profile) == ("replay", "default")
    events = answers.drift(0, 100, "c", None)
    assert [event.verdict.verdict for event in events if event.verdict] == ["replay", "replay"]
    (floor,) = answers.drift(0, 100, None, "noise_floor")
    assert floor.verdict is None


async def test_client_and_api_give_what_the_store_gives(client: Client, reader: Reader) -> None:
    verdicts = Verdicts(reader)
    assert await client.verdict("a") == verdicts.trajectory("a")
    old = await client.verdict("c", profile="observatory")
    assert old == verdicts.trajectory("c", "observatory")
    assert old.items[0].verdict.verdict == "train"
    assert await client.feedback(limit=4) == verdicts.feedback(limit=4)
    assert await client.explain("a") == Explanations(reader).trajectory("a")
    for ask in (client.verdict, client.explain):
        with pytest.raises(NotFoundError):
            await ask("none")


@pytest.mark.parametrize(
    "query",
    [
        "trajectories/a/verdict?profile=lenient",
        "trajectories/a/verdict?foo=1",
        "trajectories/a/explain?profile=default",
        "feedback?limit=0",
        "feedback?limit=100000",
    ],
)
async def test_wrong_questions_are_refused(client: Client, query: str) -> None:
    async with httpx.AsyncClient(base_url=client.url) as http:
        answer = await http.get(f"/api/{query}")
    assert answer.status_code == 400
    assert answer.json()["error"]["fix"]


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (["explain", "a"], TrajectoryExplanation),
        (["verdict", "a"], TrajectoryVerdicts),
        (["feedback"], Feedback),
    ],
)
def test_commands_print_the_apis_json(store: Path, words: list[str], kind: type) -> None:
    result = CliRunner().invoke(cli.app, [*words, "--json", "--store", str(store)])
    assert result.exit_code == 0, result.output
    msgspec.json.decode(result.stdout, type=kind)


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["verdict", "a"], ["train  under profile default", "prompt group of 3", "gate_"]),
        (["verdict", "half"], ["no verdict", "1 of 2 traces"]),
        (["verdict", "c", "--profile", "observatory"], ["under profile observatory"]),
        (["verdict", "open"], ["calls that have not ended: 1"]),
        (["explain", "stale"], ["shares of mean|D|", "stale_weights", "unexplained", "T^0"]),
        (["explain", "masked"], ["set aside: grammar_masked: 200 tokens, 25.0% of all"]),
        (["verdict", "masked"], ["200 of 800 tokens (25.0%): grammar_masked in step 0. mask"]),
        (["explain", "newer"], ["no comparable token"]),
        (["explain", "gap"], ["nothing to explain: it is not scored yet"]),
        (["feedback"], ["profile default", "NOT_COMPARABLE 1", "none yet"]),
    ],
)
def test_commands_for_people(store: Path, words: list[str], shown: list[str]) -> None:
    result = CliRunner().invoke(cli.app, [*words, "--store", str(store)])
    assert result.exit_code == 0, result.output
    for text in shown:
        assert text in result.stdout
