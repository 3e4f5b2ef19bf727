"""``driftgate explain``, ``verdict`` and ``feedback``: why the sides differ, and what a run is good
for."""

from __future__ import annotations

from typing import Annotated

import typer

from driftgate import cli_io
from driftgate.client import DEFAULT_URL
from driftgate.commands.options import JsonOption, KeyOption, StoreInstead, UrlOption
from driftgate.errors import NotFoundError
from driftgate.explain import TrajectoryExplanation
from driftgate.judgements import MAX_FEEDBACK
from driftgate.profiles import ProfileName

__all__ = ["explain", "feedback", "verdict"]

Trajectory = Annotated[str, typer.Argument(help="Name of the trajectory.")]
ProfileOption = Annotated[
    ProfileName,
    typer.Option(help="Off-policy budget: default, or observatory, the original's numbers."),
]


def explain(
    trajectory: Trajectory,
    trainer: Annotated[str | None, typer.Option(help="Only this trainer's digest.")] = None,
    as_json: JsonOption = False,
    store: StoreInstead = None,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = None,
) -> None:
    """Say why trainer and engine differ on a trajectory.

    Causes with their share of the drift and what to do, and where in the run the drift sits.
    """
    from driftgate import render_judge
    from driftgate.gateway.explanations import Explanations

    def explained(by: str | None) -> TrajectoryExplanation:
        return cli_io.read_or_ask(
            store,
            url,
            key,
            lambda answers: Explanations(answers.reader).trajectory(trajectory, trainer=by),
            lambda client: client.explain(trajectory, trainer=by),
        )

    found = explained(trainer)
    if trainer is not None and not found.items:
        trainers = sorted({item.trainer_digest for item in explained(None).items})
        if trainers:
            raise NotFoundError(
                f"{trajectory} is not scored by trainer {trainer}, but by {', '.join(trainers)}"
            )
    cli_io.show(found, as_json, lambda _: render_judge.explanation(found))


def verdict(
    trajectory: Trajectory,
    profile: ProfileOption = "default",
    as_json: JsonOption = False,
    store: StoreInstead = None,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = None,
) -> None:
    """Say whether a trajectory may be trained on, and if not, why not.

    Its prompt group as well, and which trainers' own gates would clip or drop it.
    """
    from driftgate import render_judge
    from driftgate.gateway.verdicts import Verdicts

    found = cli_io.read_or_ask(
        store,
        url,
        key,
        lambda answers: Verdicts(answers.reader).trajectory(trajectory, profile),
        lambda client: client.verdict(trajectory, profile=profile),
    )
    cli_io.show(found, as_json, lambda _: render_judge.verdicts(found))


def feedback(
    profile: ProfileOption = "default",
    limit: Annotated[
        int, typer.Option(min=1, max=MAX_FEEDBACK, help="Newest trajectories to count.")
    ] = 200,
    as_json: JsonOption = False,
    store: StoreInstead = None,
    url: UrlOption = DEFAULT_URL,
    key: KeyOption = None,
) -> None:
    """Print the verdicts by engine and weight version."""
    from driftgate import render_judge
    from driftgate.gateway.verdicts import Verdicts

    found = cli_io.read_or_ask(
        store,
        url,
        key,
        lambda answers: Verdicts(answers.reader).feedback(profile, limit),
        lambda client: client.feedback(profile=profile, limit=limit),
    )
    cli_io.show(found, as_json, lambda _: render_judge.feedback(found))
