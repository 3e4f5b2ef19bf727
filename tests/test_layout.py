"""The folders at the top install under one name, and the links in driftgate/ show the same tree."""

from __future__ import annotations

import importlib
import json
import tomllib
from pathlib import Path

import pytest

from tools.vendor import FOLDERS, MANIFEST, digest

ROOT = Path(__file__).parents[1]
PARTS = ["adapters", "gateway", "storage", "teacher"]


def pyproject() -> dict[str, dict[str, dict[str, object]]]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_part_is_installed_under_driftgate() -> None:
    setuptools = pyproject()["tool"]["setuptools"]
    assert setuptools["package-dir"] == {f"driftgate.{part}": part for part in PARTS}
    assert set(setuptools["packages"]) == {  # type: ignore[call-overload]
        "driftgate",
        "driftgate.commands",
        "driftgate.testing",
        *(f"driftgate.{part}" for part in PARTS),
    }


@pytest.mark.parametrize("part", PARTS)
def test_the_link_points_at_the_real_folder(part: str) -> None:
    link = ROOT / "driftgate" / part
    assert link.is_symlink()
    assert link.readlink() == Path("..") / part


@pytest.mark.parametrize("part", PARTS)
def test_every_module_of_a_part_belongs_to_a_listed_package(part: str) -> None:
    folders = {path.parent for path in (ROOT / part).rglob("*.py")}
    assert folders == {ROOT / part}, "a folder below a part needs its own line in pyproject.toml"


def test_every_file_of_the_dashboard_is_shipped() -> None:
    globs = pyproject()["tool"]["setuptools"]["package-data"]["driftgate.gateway"]  # type: ignore[index]
    part = ROOT / "gateway"
    shipped = {path for glob in globs for path in part.glob(glob) if path.is_file()}
    assert {path for path in (part / "web").rglob("*") if path.is_file()} == shipped


@pytest.mark.parametrize("folder", FOLDERS)
def test_vendored_files_are_as_npm_gave_them(folder: Path) -> None:
    entries = json.loads((folder / MANIFEST).read_text())
    listed = {
        folder / entry["name"] / name: sha256
        for entry in entries
        for name, sha256 in entry["sha256"].items()
    }
    assert {folder / entry["name"] / "LICENSE.txt" for entry in entries} <= listed.keys()
    found = {path: digest(path.read_bytes()) for path in folder.rglob("*") if path.is_file()}
    del found[folder / MANIFEST]
    assert found == listed


@pytest.mark.parametrize("part", PARTS)
def test_a_part_imports_by_its_full_name(part: str) -> None:
    module = importlib.import_module(f"driftgate.{part}")
    assert module.__file__ is not None
    assert Path(module.__file__).resolve().parent == ROOT / part
