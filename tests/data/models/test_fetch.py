"""What `fetch` says of names that lead to nothing."""

from cpo_pipe.data.models.fetch import _not_given


class Answered(OSError):
    """As the hub client's: it holds the hub's answer."""

    response = "404"


def test_only_where_the_hub_was_not_reached_is_working_without_it_advised() -> None:
    advice = "without a network give a folder, or start from scratch (docs/install.md)"
    unreachable, wrapped = RuntimeError("not cached"), RuntimeError("not found")
    unreachable.__cause__, wrapped.__cause__ = OSError("Name or service not known"), Answered("404")
    assert advice in str(_not_given("a/b", "model", unreachable))
    assert advice not in str(_not_given("a/b", "model", wrapped))
    assert advice not in str(_not_given("a/b", "model", Answered("gated")))
