"""APIs in a recipe: a key is refused and never shown."""

from typing import Any

import pytest

from tests.support.recipes import API, refusal


def test_an_api_key_in_the_recipe_is_refused_and_not_shown() -> None:
    said = refusal(apis={"gpt": {**API, "key": "sk-proj-secret"}})
    assert said.endswith("apis.gpt.key: must be the name of an environment variable, in capitals; never the key itself")
    assert "secret" not in said


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("https://x/v1?api_key=secret", "contains a query string or fragment, in which a key would be stored"),
        ("https://x/v1#secret", "contains a query string or fragment"),
        ("https://x/v1?", "contains a query string or fragment"),
        ("https://secret@x/v1", "contains a user name or password"),
        ("https://me:secret@x/v1", "contains a user name or password"),
        ("x/v1?api_key=secret", "must be a URL that begins with http:// or https://"),
        ("ftp://x/secret", "must be a URL that begins with"),
        ("https://", "must be a URL that begins with"),
        ("https://[secret", "must be a URL that begins with"),
        ({"secret": "secret"}, "must be a URL that begins with"),
    ],
)
def test_a_key_in_an_apis_url_is_refused_and_not_shown(url: Any, said: str) -> None:
    message = refusal(apis={"gpt": {**API, "url": url}})
    assert message.startswith(f"apis.gpt.url: {said}")
    assert "secret" not in message


def test_a_key_that_is_not_text_is_not_shown_either() -> None:
    assert "secret" not in refusal(apis={"gpt": {**API, "key": ["secret"]}})


def test_an_api_where_weights_are_needed_is_refused() -> None:
    train = {"cpo": {"init": "gpt", "objective": "mle"}}
    assert "train.cpo names gpt, which is an API" in refusal(apis={"gpt": API}, train=train)
