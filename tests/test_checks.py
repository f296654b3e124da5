"""A fault of a later stage is found before the first negative or checkpoint is made."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.numpy import load_file

from cpo_pipe.data.store import Store
from cpo_pipe.needs import training_needs
from cpo_pipe.pipeline.engines.vllm import VllmEngine
from cpo_pipe.recipe.load import load_recipe
from cpo_pipe.resolve import Resolver
from tests.support.api_server import Reply, serve, written
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


MISTAKES = {
    "data.source=nothing.jsonl": "data.source nothing.jsonl: no such file",
    "data.tokenizer=no/such/tokenizer": "tokenizer no/such/tokenizer: no such folder",
    "train.start.init={architecture: llama, config: {hiden_size: 64}}": "train.start.init.config.hiden_size: not a key",
    "train.start.report_to=[wandb]": "train.start.report_to: wandb is not installed; pip install wandb",
    "train.cpo.reference=strat": "train.cpo: model strat: no such folder or training",
    "negatives.sources.autoregressive.model=no/such/generator": "negatives.sources.autoregressive: model no/such/gen",
    "negatives.sources.autoregressive.engine=vllm": "negatives.sources.autoregressive.engine is vllm, which is not",
    "rank={by: embedding, model: no/such/embedder}": "embedding model no/such/embedder",
    "negatives.drop_correct={by: similarity, model: no/such/other, threshold: 0.9}": "embedding model no/such/other",
    "evaluate.systems.far={model: no/such/system}": "evaluate.systems.far: model no/such/system",
    "evaluate.judges={local: {model: no/such/judge}}": "evaluate.judges.local: model no/such/judge",
    "evaluate.mauve_model=no/such/encoder": "evaluate.mauve_model: model no/such/encoder",
    "evaluate.annotations=none.jsonl": "evaluate.annotations none.jsonl: no such file",
    "evaluate.systems.gpt={model: gpt}": "apis.gpt.url: http://127.0.0.1:9/v1 does not answer",
}
OTHERS = ["apis.gpt={url: 'http://127.0.0.1:9/v1', model: m}", "evaluate.mauve_seeds=1"]


def options(*settings: str) -> list[str]:
    return [part for setting in settings for part in ("--set", setting)]


@pytest.mark.parametrize("command", ["check", "run"])
def test_all_mistakes_are_reported_at_once_and_nothing_is_made(
    project: Project, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openai")
    monkeypatch.setattr(VllmEngine, "not_installed", lambda: "pip install it")
    result = project.cli(command, "tiny.yaml", *options(*OTHERS, *MISTAKES))
    assert result.status == 2
    lines = result.err.splitlines()
    assert all(line.startswith("error: ") for line in lines), result.err
    missing = {message for message in MISTAKES.values() if sum(message in line for line in lines) != 1}
    assert not missing, result.err
    assert len(lines) == len(MISTAKES)
    assert not project.store.exists() or not [*project.store.glob("examples/*")]
    assert not (project.root / "runs").exists()


def test_a_recipe_without_a_mistake_passes_and_nothing_is_made(project: Project) -> None:
    result = project.cli("check", "tiny.yaml")
    assert (result.status, result.out) == (0, "nothing is wrong, as far as it can be seen now\n"), result.err
    assert not [*project.store.glob("examples/*")]
    project.cli("prepare", "tiny.yaml")
    result = project.cli("check", "tiny.yaml", "--set", "evaluate.judges={exact: {pattern: 'x(y)'}}")
    assert result.status == 2, "with examples their contents are checked, too"
    assert "evaluate.judges.exact.pattern" in result.error()


@pytest.mark.parametrize(
    ("status", "message"),
    [(200, None), (404, None), (500, None), (401, "refuses the key in MY_KEY (status 401)"), (403, "(status 403)")],
)
def test_a_server_is_asked_whether_it_takes_the_key(
    project: Project, status: int, message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openai")
    monkeypatch.setenv("MY_KEY", "s3cret")
    with serve() as server:
        server.models = Reply({"object": "list", "data": [], "error": {"message": "no"}}, status)
        api = f"apis.gpt={{url: '{server.url}', model: m, key: MY_KEY}}"
        result = project.cli("check", "tiny.yaml", *options(api, "evaluate.systems.gpt={model: gpt}"))
        assert (server.listed, server.seen) == (1, [])
    assert result.status == (2 if message else 0), result.err
    assert message is None or message in result.error()
    assert "s3cret" not in result.err


def test_a_training_that_cannot_fit_is_refused(project: Project) -> None:
    huge = "{hidden_size: 8192, intermediate_size: 32768, num_hidden_layers: 60, num_attention_heads: 64}"
    setting = f"train.start.init={{architecture: llama, config: {huge}}}"
    result = project.cli("run", "tiny.yaml", *options(setting))
    assert result.status == 2
    assert re.search(
        r"train\.start: 6\d,\d{3},\d{3},\d{3} parameters need at least 9\d\d\.\d GiB .* \(--force", result.error()
    )
    assert not (project.root / "runs").exists()
    lora = "{r: 4, target_modules: [q_proj]}"
    again = project.cli("check", "tiny.yaml", *options(setting, f"train.start.lora={lora}", f"train.cpo.lora={lora}"))
    assert "need at least 24" in again.error(), "frozen weights take 4 bytes of the 16"


def test_needs_are_those_of_the_model(made: Project) -> None:
    recipe = load_recipe("tiny.yaml")
    found = training_needs(Resolver(recipe, Store("cpo-store"), "tiny.yaml", []))
    weights = load_file(made.model / "model.safetensors")
    count = sum(weight.size for weight in weights.values())
    assert {name: need.parameters for name, need in found.items()} == {"start": count, "cpo": count}
    assert found["cpo"].memory == 16 * count
    (checkpoint, _) = made.store.glob("checkpoints/*/model.safetensors")
    assert found["cpo"].disk == pytest.approx(checkpoint.stat().st_size, rel=0.05)


def test_checkpoints_that_do_not_fit_on_the_disk_are_refused(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpo_pipe.needs.shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    assert "the checkpoints of start, cpo need" in project.cli("check", "tiny.yaml").error()


@pytest.mark.slow
def test_force_tries_what_does_not_fit(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpo_pipe.needs.memory_of_device", lambda: (1000, "this machine"))
    assert "but this machine has 0.0 GiB" in project.cli("run", "tiny.yaml").error()
    assert project.cli("run", "tiny.yaml", "--force").status == 0
    assert project.cli("run", "tiny.yaml").status == 0, "what is trained already need not fit"


def test_wrong_columns_of_all_sources_are_named_with_those_there_are(project: Project) -> None:
    project.write("test.jsonl", '{"q": "a", "target": "b"}\n' * 30)
    settings = ["data.columns={prompt: question, target: target}", "data.test_source=test.jsonl"]
    result = project.cli("check", "tiny.yaml", *(part for one in settings for part in ("--set", one)))
    assert result.status == 2
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    named = [error.rpartition("; ")[2] for error in errors]
    assert named == ["its columns are q, target", "its columns are prompt, target"]
    assert "column question (data.columns.prompt)" in errors[0]
