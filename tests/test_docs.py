"""Every command, link, code and band that the documents name is one that exists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import msgspec
import pytest
import typer.main

from driftgate.bands import BANDS
from driftgate.breaks import BREAKS
from driftgate.cli import app
from driftgate.codes import CODES
from driftgate.gateway.config import GatewayConfig
from driftgate.glossary import METRICS, ROUTER_METRICS
from driftgate.placing import Kind
from driftgate.replay import REPLAY_METRICS

ROOT = Path(__file__).parents[1]
DOCS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "storage" / "FORMAT.md"],
    key=lambda path: path.relative_to(ROOT).as_posix(),
)
README = (ROOT / "README.md").read_text()


def commands(text: str) -> list[list[str]]:
    """``driftgate …`` lines of code blocks, as words."""
    return [line.split("#")[0].split() for line in re.findall(r"^ {4}(driftgate .*)$", text, re.M)]


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_commands_have_the_options_they_are_shown_with(path: Path) -> None:
    group = typer.main.get_command(app)
    for _, *words in commands(path.read_text()):
        command = group.commands[words[0]]  # type: ignore[attr-defined]
        known = {name for parameter in command.params for name in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known, words


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_make_targets_exist(path: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    for line in re.findall(r"(?:^ {4}|`)make ([a-z ]+)", path.read_text(), re.M):
        assert set(line.split()) <= targets, line


def test_the_readmes_configuration_is_valid() -> None:
    (block,) = re.findall(r"```toml\n(.*?)```", README, re.S)
    config = msgspec.toml.decode(
        block, type=GatewayConfig, dec_hook=lambda type_, value: type_(value)
    )
    assert config.engine_settings == {"dtype": "bfloat16"}


def test_the_readme_names_reasons_and_metrics_by_their_names() -> None:
    names = set(re.findall(r"`([a-z]+(?:_[a-z0-9]+)+)`", README))
    known = {*CODES, *METRICS, *ROUTER_METRICS, *REPLAY_METRICS}
    known |= {"routes_via", "mismatch_kl", "gen_kl_error"}
    assert names <= known, names - known


def test_the_readmes_bands_are_the_codes_own() -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*\| < ([\d.e-]+) \| >= ([\d.e-]+) \|$", README, re.M)
    assert len(rows) == 4
    for name, green, red in rows:
        assert (BANDS[name].green, BANDS[name].red) == (float(green), float(red)), name


def test_every_shape_and_every_break_of_the_tree_is_explained() -> None:
    text = (ROOT / "docs" / "tree.md").read_text()
    for kind in get_args(Kind):
        assert f"| `{kind}` |" in text
    for code, (meaning, fix) in BREAKS.items():
        assert f"| `{code}` | {meaning} | {fix} |" in text
