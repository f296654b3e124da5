"""The commands `cpo-pipe store …`."""

from cpo_pipe.store_commands.commands import store_app

__all__ = ["store_app"]
