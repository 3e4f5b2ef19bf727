"""The Dockerfile and compose.yaml, as far as they can be checked without Docker: ``make
image-check`` runs the steps."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from driftgate.commands.serve import keys_from
from tests.commands import parse
from tools.image import installs, stage

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run(
        [hadolint, "--no-color", ROOT / "Dockerfile"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_a_stage_stands_on_its_base() -> None:
    text = "FROM x AS a\nCOPY one two ./\nFROM a AS b\n# no\nRUN pip install y \\\n  && true\n"
    copied, run = stage("b", text)
    assert copied.words == ["one", "two", "./"]
    assert list(installs([copied, run])) == [["pip", "install", "y"]]


@pytest.mark.parametrize("target", ["gateway", "teacher"])
def test_what_is_copied_is_there_and_not_ignored(target: str) -> None:
    kept = set(re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), re.M))
    for step in stage(target, DOCKERFILE):
        if step.name == "COPY":
            for name in step.words[:-1]:
                assert (ROOT / name).exists()
                assert name in kept


@pytest.mark.parametrize("target", ["gateway", "teacher"])
def test_images_drop_rights_and_their_defaults_parse(target: str) -> None:
    steps = stage(target, DOCKERFILE)
    (user,) = [step.rest for step in steps if step.name == "USER"]
    assert int(user) > 0
    (command,) = [step.words for step in steps if step.name == "CMD"]
    parse(command)


@pytest.mark.parametrize("service", ["gateway", "teacher"])
def test_composes_commands_parse_and_their_targets_exist(service: str) -> None:
    parse([re.sub(r"\$\{\w+[^}]*\}", "x", word) for word in COMPOSE[service]["command"]])
    assert stage(COMPOSE[service]["build"]["target"], DOCKERFILE)


def test_compose_shares_one_store_and_one_model() -> None:
    gateway, teacher = (COMPOSE[name] for name in ("gateway", "teacher"))
    assert gateway["volumes"] == teacher["volumes"]
    assert "--store=/data/store" in gateway["command"]
    assert "--store=/data/store" in teacher["command"]
    assert set(COMPOSE["engine"]["volumes"]) < set(gateway["volumes"])
    assert "ports" not in COMPOSE["engine"]  # agents cannot go around the gateway


def test_composes_keys_are_the_ones_that_serve_reads() -> None:
    keys = dict.fromkeys(COMPOSE["gateway"]["environment"], "k" * 40)
    assert set(keys_from(keys)) == {"call_keys", "read_keys", "admin_keys"}
