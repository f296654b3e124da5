"""Fixtures of the API's tests."""

import pytest

from cpo_pipe.data.models.tokenizer import TokenizerFiles
from cpo_pipe.pipeline.api import client, limits
from tests.support.models import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TokenizerFiles:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return TokenizerFiles(folder, "tiny")


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Wait a fraction of a second where a user's run waits longer; record what is logged; use no key of the user's."""
    monkeypatch.setattr(limits, "BACKOFF", 0.01)
    monkeypatch.setattr(limits, "LONGEST_BACKOFF", 0.1)
    monkeypatch.setattr(client, "_TOGETHER", 0.05)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    caplog.set_level("INFO")
