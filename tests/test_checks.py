"""A fault of a later stage is found before the first negative or checkpoint is made."""

from pathlib import Path

import pytest

from tests.support.api_server import serve, written
from tests.support.project import Project

OWN = "negatives.sources.own={strategy: pool, file: none.jsonl}"


def costly(project: Project) -> list[Path]:
    return [path for kind in ("negatives", "checkpoints") for path in project.store.glob(f"{kind}/*/*")]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["rank={by: embedding, model: no/such/embedder}"], "no/such/embedder"),
        (["train.cpo.reference=no/such/reference"], "no/such/reference"),
        (["train.cpo.init=no/such/init"], "no/such/init"),
        ([OWN], "negatives.sources.own.file none.jsonl"),
        ([OWN, "train.cpo.negatives={own: 1}"], "negatives.sources.own.file none.jsonl"),
        (["evaluate.systems.far={model: no/such/system}"], "no/such/system"),
        (["evaluate.systems.mix={merge: {cpo: 0.5, no/such/part: 0.5}}"], "no/such/part"),
        (["evaluate.judges={local: {model: no/such/judge}}"], "no/such/judge"),
        (["evaluate.mauve_model=no/such/encoder", "evaluate.mauve_seeds=1"], "no/such/encoder"),
        (["evaluate.judges=[similarity]", "evaluate.embedder=no/such/embedder"], "no/such/embedder"),
        (["evaluate.judges={exact: {pattern: 'x(y)'}}"], "evaluate.judges.exact.pattern"),
        (["evaluate.max_new_tokens=100000", "evaluate.systems.base={model: MODEL}"], "evaluate.max_new_tokens"),
    ],
    ids=lambda value: value[0].partition("=")[0] if isinstance(value, list) else "",
)  # fmt: skip
def test_a_fault_of_a_later_stage_is_found_first(project: Project, settings: list[str], message: str) -> None:
    options = [part for setting in settings for part in ("--set", setting.replace("MODEL", str(project.model)))]
    result = project.cli("run", "tiny.yaml", *options)
    assert result.status == 2, result.err
    assert message in result.error()
    assert costly(project) == []


@pytest.mark.parametrize(
    "setting",
    ["evaluate.judges={taste: {kind: openai, api: mini}}", "negatives.sources.p={strategy: pool, model: mini}"],
)
def test_a_missing_key_is_found_first(project: Project, setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openai")
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    api = "apis.mini={url: 'http://127.0.0.1:9/v1', model: m, key: NO_SUCH_KEY}"
    result = project.cli("run", "tiny.yaml", "--set", api, "--set", setting)
    assert result.status == 2
    assert "apis.mini.key: the environment variable NO_SUCH_KEY is not set; export it" in result.error()
    assert costly(project) == []


@pytest.mark.slow
def test_a_finished_run_is_not_checked_for_what_it_does_not_use(made: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openai")
    with serve(lambda seen: written(seen, "A")) as server:
        api = f"apis.mini={{url: '{server.url}', model: m, key: MY_KEY}}"
        options = ["--set", api, "--set", "evaluate.judges={taste: {kind: openai, api: mini}}"]
        monkeypatch.setenv("MY_KEY", "k")
        assert made.cli("run", "tiny.yaml", *options).status == 0
        monkeypatch.delenv("MY_KEY")
        again = made.cli("run", "tiny.yaml", *options)
    assert again.status == 0, again.err
