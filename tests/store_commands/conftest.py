"""Fixtures of the tests of the store's commands."""

import shutil

import pytest

from tests.support.project import Project
from tests.support.store_commands import names_in, register


@pytest.fixture
def used(made: Project) -> Project:
    """A project whose store one run uses in full."""
    shutil.rmtree(made.store / ".runs", ignore_errors=True)
    register(made, made.run_dir, *names_in(made))
    return made
