"""Every command, link, code and band that the documents name is one that exists."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
import typer.main

from driftgate.bands import BANDS
from driftgate.breaks import BREAKS
from driftgate.cli import app
from driftgate.codes import CODES
from driftgate.commands.serve import _welcome
from driftgate.gateway.config import GatewayConfig
from driftgate.glossary import METRICS, ROUTER_METRICS
from driftgate.placing import Kind
from driftgate.replay import REPLAY_METRICS
from driftgate.teacher.config import TeacherConfig
from examples.tutorial import BLOCK, READY, TUTORIAL, Shell, run
from tests.commands import parse
from tools.reference import PAGES, field_docs

ROOT = Path(__file__).parents[1]
DOCS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "storage" / "FORMAT.md"],
    key=lambda path: path.relative_to(ROOT).as_posix(),
)
README = (ROOT / "README.md").read_text()
SETTINGS = {*GatewayConfig.__struct_fields__, *TeacherConfig.__struct_fields__}
NO_SETTINGS: set[str] = set()
"""Written like a setting, and something else."""


def commands(text: str) -> list[list[str]]:
    """``driftgate …`` lines of code blocks, as words, without what the shell does with them."""
    lines = re.findall(r"^(?: {4}|\$ )(driftgate .*)$", text, re.M)
    return [shlex.split(re.split(r" [#&|>]| 2>", line)[0]) for line in lines]


def inline_commands(text: str) -> list[list[str]]:
    """``driftgate …`` in backticks: the command and the options, mostly without the rest."""
    return [found.split() for found in re.findall(r"`(driftgate [a-z][^`]*)`", text)]


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_commands_parse_as_they_are_shown(path: Path) -> None:
    for _, *words in commands(path.read_text()):
        parse(words)


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_commands_in_the_text_exist_with_their_options(path: Path) -> None:
    for _, name, *words in inline_commands(path.read_text()):
        command: Any = typer.main.get_command(app)
        for word in (name, *words) if name == "index" else (name,):
            command = command.commands[word]
        known = {name for p in command.params for name in (*p.opts, *p.secondary_opts)}
        if path.name == "CHANGELOG.md":
            continue  # it names what was, too
        shown = {word.split("=")[0] for word in words if word.startswith("--")}
        assert shown <= known | {"--help"}, (name, *words)


def test_a_wrong_command_would_be_found() -> None:
    ((_, *words),) = commands("    driftgate cells --nonsense | head   # all\n")
    assert words == ["cells", "--nonsense"]
    with pytest.raises(Exception, match="No such option"):
        parse(words)


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_settings_are_settings(path: Path) -> None:
    text = path.read_text()
    for block in re.findall(r"```toml\n(.*?)```", text, re.S):
        assert set(tomllib.loads(block)) <= SETTINGS
    assert set(re.findall(r"`([a-z_]+) = [^`]*`", text)) <= SETTINGS | NO_SETTINGS


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_make_targets_exist(path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for line in re.findall(r"(?:^ {4}|`)make ([a-z -]+)", path.read_text(), re.M):
        assert set(line.split()) <= targets, line


def test_the_shown_configuration_is_valid() -> None:
    text = (ROOT / "docs" / "howto" / "vllm.md").read_text()
    (block,) = re.findall(r"```toml\n(.*?)```", text, re.S)
    config = msgspec.toml.decode(
        block, type=GatewayConfig, dec_hook=lambda type_, value: type_(value)
    )
    assert config.engine_settings == {"dtype": "bfloat16"}


def test_the_readme_names_reasons_and_metrics_by_their_names() -> None:
    names = set(re.findall(r"`([a-z]+(?:_[a-z0-9]+)+)`", README))
    known = {*CODES, *METRICS, *ROUTER_METRICS, *REPLAY_METRICS}
    known |= {"routes_via", "mismatch_kl", "gen_kl_error"}
    known |= {*GatewayConfig.__struct_fields__}
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


def test_every_setting_says_what_it_is() -> None:
    for kind in (GatewayConfig, TeacherConfig):
        assert set(field_docs(kind)) == set(kind.__struct_fields__)


def test_the_reference_names_everything_that_there_is() -> None:
    named = {page: make() for page, make in PAGES.items()}
    for name in SETTINGS:
        assert f"| `{name}` |" in named["reference/configuration.md"]
    for name in (*METRICS, *ROUTER_METRICS, *REPLAY_METRICS):
        assert f"| `{name}` |" in named["reference/metrics.md"]
    for code in CODES:
        assert f"| `{code}` |" in named["reference/reasons.md"]
    group: Any = typer.main.get_command(app)
    for name in group.commands:
        assert f"## driftgate {name}\n" in named["reference/cli.md"]


def test_the_site_builds_without_a_warning_and_asks_nobody_else(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > len(DOCS)
    for page in pages:
        text = page.read_text()
        fetched = re.findall(r"<(?:script|img|iframe|link)\b[^>]*\b(?:src|href)=\"?(\w+:)?//", text)
        assert not fetched, page
        assert "class=mermaid" not in text  # its script would come from a CDN
    for style in tmp_path.rglob("*.css"):
        assert not re.search(r"url\(\"?(https?:)?//", style.read_text()), style


def test_the_tutorial_is_its_own_script() -> None:
    shell = Shell({"8000": "43210", "8787": "43211"})
    text = (
        "a\n```console\n$ export A=b\n```\n\n"
        "```console\n$ echo $A :8000 $((43000+211))\nold\n```\nz\n"
    )
    assert run(text, shell) == text.replace("old", "b :8000 8787")
    with pytest.raises(SystemExit, match="status 3"):
        shell.run("exit 3")
    blocks = list(BLOCK.finditer((ROOT / TUTORIAL).read_text()))
    silent = [block["command"] for block in blocks if not block["output"]]
    assert [command.split()[:2] for command in silent] == [
        ["export", "OPENAI_API_KEY=none-needed"],
        ["driftgate", "teach"],
    ]


def test_the_tutorial_shows_all_that_a_gateway_says() -> None:
    settings = GatewayConfig(upstream="http://127.0.0.1:8000")
    *_, last = _welcome("http://127.0.0.1:8787", settings).splitlines()
    assert last in (ROOT / TUTORIAL).read_text().splitlines()
    assert READY["driftgate serve"] in last
