"""What bad input gets: one line that names the field, its value, the rule and the fix; and nothing made is lost."""

import importlib.util
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from cpo_pipe.data.store import Store


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is neither a folder nor a training must not wait for a network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


# ── the recipe and the options ───────────────────────────────────────────────────────────────────────────────────

SET_CASES = {
    # --set: (stage, what the message says)
    "train.cpo.beta=-1": ("train", "train.cpo.beta is -1: input should be greater than 0"),
    "train.cpo.learning_rate=.nan": (
        "train",
        "--set train.cpo.learning_rate=.nan: line 1, column 1: .nan is not a finite number",
    ),
    "train.start.max_steps=many": ("train", "train.start.max_steps is 'many': input should be a valid integer"),
    "train.cpo.bta=1": ("train", "train.cpo.bta is not a known key; did you mean beta?"),
    "trian.cpo.beta=1": ("train", "trian is not a known key; did you mean train?"),
    "train.cop.beta=1": ("train", "--set train.cop.beta: cop is not in train; did you mean cpo?"),
    "train.cpo.beta": ("train", "--set train.cpo.beta: must be section.key=value"),
    "=3": ("train", "--set =3: must be section.key=value"),
    "train.cpo.beta={": ("train", "--set train.cpo.beta={: not valid YAML (line 1"),
    "train.cpo.beta.x=1": ("train", "train.cpo.beta is not a section"),
    "train.start.init=cpo": ("train", "train has a cycle: "),
    "train.cpo.objective=ppo": (
        "train",
        "train.cpo: unknown objective 'ppo'; did you mean dpo?",
    ),
    "train.cpo.objective=cpo-ranked": ("rank", "rank.by is none, but the objective cpo-ranked of train.cpo needs"),
    "train.cpo.reference=null": ("train", "train.cpo.reference is empty: input should be a valid string"),
    "negatives=null": ("train", "negatives is missing: train.cpo has the objective cpo"),
    "negatives.sources.autoregressive.engine=vlm": ("generate-negatives", "unknown engine 'vlm'; did you mean vllm?"),
    "negatives.sources={}": ("generate-negatives", "negatives.sources: no source; add one"),
    "negatives.sources.autoregressive.max_new_tokens=127": (
        "generate-negatives", "autoregressive.max_new_tokens is 127 and the longest prompt",
    ),
    "evaluate.max_new_tokens=127": ("evaluate", "but the context of start is 128 tokens"),
    "evaluate.baseline=strat": ("evaluate", "evaluate: baseline 'strat' is not among the systems (start, cpo); did"),
    "evaluate.judges={exact: {pattern: '(['}}": ("evaluate", "judges.exact.pattern: '([' is not a regular expression"),
    "evaluate=null": ("evaluate", "evaluate: the recipe has no such section"),
    "evaluate.systems.cpo={merge: {start: 0.5, cpo: 0.4}}": ("evaluate", "evaluate.systems.cpo: merge weights sum to"),
    "data.train=30": ("prepare", "data.train 30 + data.validation 4 + data.test 4: only 24 rows are left to split"),
    "data.source=absent.jsonl": ("prepare", "data.source absent.jsonl: no such file"),
    "data.source=absent": ("prepare", "data.source absent: no such file or folder, and the hub gave no such data set"),
    "data.columns.prompt=question": ("prepare", "no column 'question' (data.columns.prompt); the columns there are"),
    "data.max_prompt_tokens=1": ("prepare", "more than data.max_rejected 0.1 allows; see pairs.jsonl:1 (prompt too"),
    "data.tokenizer=absent": ("prepare", "tokenizer absent: no such folder"),
    "name=../up": ("prepare", "name is '../up': string should match pattern"),
    "data=3": ("prepare", "data is 3: must be a section"),
    "data.source=pairs.json": ("prepare", "data.source pairs.json: no such file; give the path"),
    "train.start.init=absent/model": ("train", "model absent/model: no such folder or training, and the hub did not"),
    "train.start.init=not a name": ("train", "model not a name: no such folder"),
    "train.cpo.init=stat": ("train", "model stat: no such folder or training, and the hub did not give it"),
    "train.start.init={architecture: lama}": ("train", "a lama model cannot be made"),
    "negatives.sources.autoregressive.model=./gone": ("generate-negatives", "model ./gone: no such folder"),
}  # fmt: skip


@pytest.mark.parametrize("override", SET_CASES)
def test_a_bad_setting(made, override: str) -> None:
    stage, message = SET_CASES[override]
    before = made.made()
    result = made.cli(stage, "tiny.yaml", "--set", override)
    assert result.status == 2, result.err
    assert message in result.error()
    assert made.made() == before


RECIPE_FILES = {
    "a list": (b"- data\n- train\n", "recipe bad.yaml: is ['data', 'train']: must be a mapping with the sections name"),
    "empty": (b"", "recipe bad.yaml: is empty: must be a mapping with the sections name, note, data"),
    "not YAML": (b"data: {source: [1\ntrain: 3", "recipe bad.yaml: not valid YAML (line 2, column 6: "),
    "a tab": (b"data:\n\tsource: x\n", "recipe bad.yaml: not valid YAML (line 2, column 1: "),
    "not UTF-8": (b"name: caf\xe9\n", "recipe bad.yaml: not UTF-8 (byte 9); save it as UTF-8"),
    "a key twice": (b"name: a\nname: b\n", "recipe bad.yaml: line 2, column 1: duplicate key name; remove one"),
    "nothing required": (b"name: a\n", "recipe bad.yaml: data is missing"),
    "a Python object": (
        b"name: !!python/object:os.system {}\n",
        "the tag tag:yaml.org,2002:python/object:os.system",
    ),
}


@pytest.mark.parametrize("kind", RECIPE_FILES)
def test_a_bad_recipe_file(made, kind: str) -> None:
    content, message = RECIPE_FILES[kind]
    before = made.made()
    result = made.cli("run", made.write("bad.yaml", content))
    assert result.status == 2
    assert message in result.error()
    assert made.made() == before


ARGUMENTS = {
    "prepare absent.yaml": "recipe absent.yaml: no such file; built-in recipes: ",
    "prepare dem": "recipe dem: no such file; did you mean the built-in demo?",
    "prepare .": "recipe .: no such file",
    "prepare": "Missing argument 'recipe'",
    "prepar tiny.yaml": "No such command 'prepar'. Did you mean 'prepare'?",
    "prepare tiny.yaml --stor x": "No such option",
    "prepare tiny.yaml --set": "--set",
    "init dmo": "recipe dmo: not built in; did you mean demo?",
    "train tiny.yaml cop": "training cop: not in the recipe; did you mean cpo?",
    "train tiny.yaml whatever": "training whatever: not in the recipe; choose from start, cpo",
    "prepare tiny.yaml --store tiny.yaml/store": "--store tiny.yaml/store: cannot be made (Not a directory)",
    "prepare tiny.yaml --run-dir tiny.yaml": "tiny.yaml: file exists; give a path that can be used",
    "prepare tiny.yaml --run-dir tiny.yaml/run": "tiny.yaml/run: not a directory; give a path that can be used",
}  # fmt: skip


@pytest.mark.parametrize("line", ARGUMENTS)
def test_bad_arguments(made, line: str) -> None:
    before = made.made()
    result = made.cli(*line.split())
    assert result.status == 2
    assert ARGUMENTS[line] in result.error()
    assert made.made() == before


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_vllm_where_it_is_not_installed(made) -> None:
    result = made.cli(
        "generate-negatives",
        "tiny.yaml",
        "--set",
        "negatives.sources.autoregressive.engine=vllm",
        "--set",
        "negatives.seed=1",
    )
    assert result.status == 2
    assert "engine is vllm, which is not installed: pip install 'cpo-pipe[vllm]'" in result.error()


# ── the data ─────────────────────────────────────────────────────────────────────────────────────────────────────

DATA_FILES = {
    "empty.jsonl": (b"", "data.source empty.jsonl: has no rows"),
    "header.csv": (b"prompt,target\n", "data.source header.csv: has no rows"),
    "empty.csv": (b"", "data.source empty.csv: has no rows"),
    "other.csv": (
        b"question,target\na,b\n",
        "its columns (question, target) are those of no known format; set data.columns.prompt",
    ),
    "open.csv": (b'prompt,target\na,"b\nc,d\n', "the quote opened at open.csv:2 is not closed"),
    "text.jsonl": (b"hello\n" * 9, "9 of 9 rows were rejected (9 not JSON), more than data.max_rejected 0.1 allows"),
    "bad.parquet": (b"PAR1 and no more", "data.source bad.parquet: not a Parquet file"),
    "plain.txt": (b"an article", "a .txt file holds articles, not pairs; set data.preset: text"),
    "rows.json": (b"[]", "data.source rows.json: has no rows"),
}


@pytest.mark.parametrize("name", DATA_FILES)
def test_bad_data(made, name: str) -> None:
    content, message = DATA_FILES[name]
    before = made.made()
    result = made.cli("run", "tiny.yaml", "--set", f"data.source={made.write(name, content)}")
    assert result.status == 2
    assert message in result.error()
    assert made.made() == before


# ── models and tokenizers ────────────────────────────────────────────────────────────────────────────────────────


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def pickled_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def no_weights_at_all(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")


def a_shard_is_absent(folder: Path) -> None:
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def a_tensor_is_absent(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def bad_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def unknown_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "of-tomorrow"}))


def own_code(folder: Path) -> None:
    """As a hub repository with an architecture of its own has it; the code leaves a file behind."""
    config = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoConfig": "own.Config", "AutoModel": "own.Model", "AutoModelForCausalLM": "own.Model"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": auto_map}))
    (folder / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")


def short_context(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 6}))


def small_vocabulary(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(100)
    model.save_pretrained(folder)


def other_tokenizer(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


MODELS: dict[Callable[[Path], None], str] = {
    without_weights: "model mine: no *.safetensors there; weights are read from safetensors only",
    pickled_weights: "model mine: no *.safetensors there; weights are read from safetensors only",
    cut_weights: "model mine: model.safetensors is damaged",
    no_weights_at_all: "model mine: model.safetensors is damaged",
    a_shard_is_absent: "model mine: model-00002-of-00002.safetensors is missing, but model.safetensors.index.json",
    a_tensor_is_absent: "model mine: its weights lack 1 tensors of its architecture, such as model.norm.weight",
    no_config: "model mine: no config.json there",
    bad_config: "mine/config.json: not valid JSON",
    unknown_architecture: "model mine: cannot be loaded",
    own_code: "model mine: config.json asks to run Python code that comes with the model, and cpo-pipe runs no such",
    short_context: "tokens and the context of mine is 6: lower data.max_prompt_tokens and data.max_target_tokens",
    small_vocabulary: "model mine: its vocabulary has 100 entries",
    other_tokenizer: "data.tokenizer is not that of the model mine: the token id",
}


@pytest.mark.parametrize("spoil", MODELS, ids=lambda spoil: spoil.__name__)
def test_a_bad_model_folder(made, spoil: Callable[[Path], None]) -> None:
    spoil(Path(shutil.copytree(made.model, made.root / "mine")))
    before = made.made()
    result = made.cli("train", "tiny.yaml", "start", "--set", "train.start.init=mine")
    assert result.status == 2, result.err
    assert MODELS[spoil] in result.error()
    assert made.made() == before


PLACES = {
    "train.start.init=mine": ["train", "start"],
    "train.cpo.reference=mine": ["train", "cpo"],
    "negatives.sources.autoregressive.model=mine": ["generate-negatives"],
    "negatives.sources.p={strategy: pool, model: mine}": ["generate-negatives"],
    "rank={model: mine}": ["rank"],
    "evaluate.systems.cpo.model=mine": ["evaluate"],
    "evaluate.systems.cpo={merge: {mine: 0.5, start: 0.5}}": ["evaluate"],
    "evaluate.judges={j: {kind: local, model: mine}}": ["evaluate"],
    "evaluate.judges={j: {kind: likelihood, model: mine}}": ["evaluate"],
    "evaluate.judges=[similarity]": ["evaluate", "--set", "evaluate.embedder=mine"],
    "evaluate.mauve_seeds=1": ["evaluate", "--set", "evaluate.mauve_model=mine"],
}
"""Where a recipe names a model, and the command that looks at it."""


@pytest.mark.parametrize("place", PLACES)
def test_wherever_a_model_is_named_its_own_code_is_refused_before_any_work(
    made, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(question: str = "") -> str:
        raise AssertionError(f"asked: {question}")

    monkeypatch.setattr("builtins.input", asked)
    mine = Path(shutil.copytree(made.model, made.root / "mine"))
    own_code(mine)
    before = made.made()
    command, *options = PLACES[place]
    result = made.cli(command, "tiny.yaml", *options, "--set", place)
    assert result.status == 2, result.err
    assert "model mine: config.json asks to run Python code that comes with the model" in result.error()
    assert made.made() == before
    assert not (mine / "ran").exists()


def no_eos(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)


def bad_json(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"model": ')


def no_tokenizer(folder: Path) -> None:
    for file in folder.glob("*tokenizer*"):
        file.unlink()


TOKENIZERS: dict[Callable[[Path], None], str] = {
    no_eos: "data.tokenizer mine: it has no EOS token, so no text can end; set eos_token in its tokenizer_config.json",
    bad_json: "tokenizer mine: cannot be loaded",
    no_tokenizer: "tokenizer mine: no tokenizer files there",
}


@pytest.mark.parametrize("spoil", TOKENIZERS, ids=lambda spoil: spoil.__name__)
def test_a_bad_tokenizer(made, spoil: Callable[[Path], None]) -> None:
    spoil(Path(shutil.copytree(made.model, made.root / "mine")))
    before = made.made()
    result = made.cli("prepare", "tiny.yaml", "--set", "data.tokenizer=mine")
    assert result.status == 2, result.err
    assert TOKENIZERS[spoil] in result.error()
    assert made.made() == before


def test_an_ensemble_of_two_architectures(made, new_model: Callable[..., Path]) -> None:
    other = new_model(architecture="gpt2")
    before = made.made()
    merge = f"evaluate.systems.both={{merge: {{start: 0.5, '{other}': 0.5}}}}"
    result = made.cli("evaluate", "tiny.yaml", "--set", merge)
    assert result.status == 2
    said = f"system both: start and {other} are not of one architecture: the tensor model.embed_tokens.weight is float"
    assert said in result.error()
    assert made.made() == before


def test_a_typo_in_a_models_name_gets_the_nearest_training(made) -> None:
    result = made.cli("train", "tiny.yaml", "cpo", "--set", "train.cpo.init=stat")
    assert "did you mean the training start?" in result.error()


# ── the store ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a tmpfs with the given options; called again, changes the options of the same one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = []

    def mount(options: str) -> Path:
        remount = ["remount"] if mounted else []
        command = ["mount", "-t", "tmpfs", "-o", ",".join([*remount, options]), "tmpfs", str(folder)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("a small disk needs root and the right to mount")
        mounted.append(True)
        return folder

    yield mount
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_loses_nothing_and_the_same_command_goes_on(project, small_disk: Callable[[str], Path]) -> None:
    """The disk grows bit by bit: each time the run gets further, and finds all that it made before."""
    kept: dict[str, str] = {}
    failures = 0
    for kilobytes in (4, 60, 140, 400, 600, 800, 8000):
        project.store = small_disk(f"size={kilobytes}k") / "store"
        result = project.cli("run", "tiny.yaml", "--store", project.store)
        assert kept.items() <= project.made().items()
        kept = project.made()
        if result.status == 0:
            break
        assert result.status == 1, result.err
        assert result.error() == (
            "error: the disk is full; what was made before is kept: free some space and run the same command again"
        )
        failures += 1
    assert result.status == 0
    assert failures >= 3
    assert not list(project.store.rglob(".tmp-*"))


def test_a_store_without_write_permission(project, small_disk: Callable[[str], Path]) -> None:
    project.store = small_disk("size=8m") / "store"
    assert project.cli("prepare", "tiny.yaml", "--store", project.store).status == 0
    before = project.made()
    small_disk("size=8m,ro")
    assert project.cli("prepare", "tiny.yaml", "--store", project.store).status == 0  # what is there needs no writing
    result = project.cli("train", "tiny.yaml", "start", "--store", project.store)
    assert result.status == 2
    assert "--store: no permission to write checkpoints/" in result.error()
    assert project.made() == before


def shard(project, kind: str) -> Path:
    """The largest shard of a kind."""
    return max((project.store / kind).glob("*/shards/*.parquet"), key=lambda path: path.stat().st_size)


def spoil_middle(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(bytes(content))


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("spoil", [spoil_middle, cut_in_half, Path.unlink])
@pytest.mark.parametrize(
    ("kind", "maker", "reader"), [("negatives", "generate-negatives", "rank"), ("groups", "rank", "train")]
)
def test_a_corrupt_shard_is_named_and_made_again(made, kind: str, maker: str, reader: str, spoil: Callable) -> None:
    before, damaged = made.made(), shard(made, kind)
    spoil(damaged)
    names = ["cpo"] if reader == "train" else []
    result = made.cli(reader, "tiny.yaml", *names)
    assert result.status == 2
    assert f"run `cpo-pipe {maker} tiny.yaml`" in result.error()
    assert f"shard {damaged.stem} is damaged" in result.err
    assert made.cli(maker, "tiny.yaml").status == 0
    assert made.cli(reader, "tiny.yaml", *names).status == 0
    lost = {path for path in before if damaged.stem in path}
    assert {path: sha for path, sha in before.items() if path not in lost}.items() <= made.made().items()
    assert Store(made.store).rows(kind, json.loads((damaged.parents[1] / "spec.json").read_text())).num_rows() > 0


@pytest.mark.parametrize("kind", ["examples", "checkpoints", "metrics"])
def test_a_corrupt_artifact_is_named_and_made_again(made, kind: str) -> None:
    files = [*(made.store / kind).rglob("*.parquet"), *(made.store / kind).rglob("*.safetensors")]
    cut_in_half(max(files, key=lambda path: path.stat().st_size))
    result = made.cli("run", "tiny.yaml")
    assert result.status == 0, result.err
    assert "damaged" in result.err


def test_the_recipe_of_these_tests_is_sound(made) -> None:
    """Otherwise every test above would pass for the wrong reason."""
    assert yaml.safe_load((made.root / "tiny.yaml").read_text())["name"] == "tiny"
    assert made.cli("run", "tiny.yaml").status == 0
