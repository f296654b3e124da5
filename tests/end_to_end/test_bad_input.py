"""Bad recipes, options and data get one line that names the field, its value, the rule and the fix."""

import importlib.util

import pytest
import yaml

pytestmark = pytest.mark.usefixtures("offline")


SET_CASES = {
    # value of --set: (stage, part of the message)
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
    "train.start.init={architecture: lama}": ("train", "lama is not known to transformers; did you mean llama?"),
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
    "nothing required": (b"name: a\ntrain: {}\n", "recipe bad.yaml: data is missing"),
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


DATA_FILES = {
    "empty.jsonl": (b"", "data.source empty.jsonl: has no rows"),
    "header.csv": (b"prompt,target\n", "data.source header.csv: has no rows"),
    "empty.csv": (b"", "data.source empty.csv: has no rows"),
    "other.csv": (
        b"question,target\na,b\n",
        "its columns (question, target) are those of no known format; set data.columns.prompt",
    ),
    "open.csv": (b'prompt,target\na,"b\nc,d\n', "the quote opened at open.csv:2 is not closed"),
    "text.jsonl": (b"hello\n" * 9, "all of its first 9 rows are rejected (text.jsonl:1: not JSON"),
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


def test_the_recipe_of_these_tests_is_valid(made) -> None:
    """With an invalid recipe every test above would pass for the wrong reason."""
    assert yaml.safe_load((made.root / "tiny.yaml").read_text())["name"] == "tiny"
    assert made.cli("run", "tiny.yaml").status == 0
