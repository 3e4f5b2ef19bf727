"""What tests of the core share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from driftgate.testing.checkpoints import make_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()
