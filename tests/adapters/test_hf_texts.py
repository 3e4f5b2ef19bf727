"""Digests of tokenizers and templates: equal where they do the same, whoever wrote the files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from driftgate.adapters.hf_texts import text_digests
from driftgate.testing.checkpoints import make_checkpoint


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("texts") / "dense", "dense")


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(made / name, tmp_path)
    return tmp_path


def test_both_are_named_and_stay_the_same(made: Path, copy: Path) -> None:
    assert set(text_digests(made)) == {"tokenizer", "chat_template"}
    assert text_digests(copy) == text_digests(made)


def test_where_the_template_stands_and_how_json_is_spelled_changes_nothing(
    made: Path, copy: Path
) -> None:
    template = (copy / "chat_template.jinja").read_text()
    (copy / "chat_template.jinja").unlink()
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    named = [{"name": "rag", "template": "x"}, {"name": "default", "template": template}]
    for spelled in (template, named):
        settings["chat_template"] = spelled
        (copy / "tokenizer_config.json").write_text(json.dumps(settings))
        said = json.loads((copy / "tokenizer.json").read_text()) | {"padding": None}
        (copy / "tokenizer.json").write_text(json.dumps(said, indent=7))
        assert text_digests(copy) == text_digests(made)


def test_another_token_and_another_template_are_told_apart(made: Path, copy: Path) -> None:
    said = json.loads((copy / "tokenizer.json").read_text())
    said["added_tokens"][0]["content"] = "<|other|>"
    (copy / "tokenizer.json").write_text(json.dumps(said))
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    theirs, own = text_digests(copy), text_digests(made)
    assert theirs["tokenizer"] != own["tokenizer"]
    assert theirs["chat_template"] != own["chat_template"]


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"model": 3}', b"[" * 100_000])
def test_files_that_are_none_give_no_digest(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    assert text_digests(tmp_path) == {}
    assert text_digests(tmp_path / "nowhere") == {}
