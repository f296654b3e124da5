"""Instructions: the message that is sent, and what another wording makes anew."""

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cpo_pipe.data.fingerprint import content_hash
from cpo_pipe.data.models.tokenizer import TokenizerFiles
from cpo_pipe.data.store import Store
from cpo_pipe.pipeline.api.config import Api
from cpo_pipe.pipeline.api.model import ApiModel
from cpo_pipe.pipeline.negatives.prompted import TEMPLATES, Message, Prompted
from cpo_pipe.pipeline.negatives.strategy import Inputs
from tests.support.api_run import Run, examples
from tests.support.api_server import serve, written
from tests.support.models import make_tokenizer


def test_the_papers_template_to_the_letter() -> None:
    message = Message("unhelpful")({"prompt": "Name a dog.", "target": "Rex"})
    assert message == (
        "Given the ground truth instruction and response, can you generate a not helpful response?\n"
        " Instruction: Name a dog.\nResponse: Rex\nNot helpful response:"
    )


@pytest.mark.parametrize("template", [*TEMPLATES, "Worse than {target}, for {prompt}: {x} {}"])
def test_braces_in_texts_are_text(template: str) -> None:
    prompt, target = "{target} {0} \\1", "{prompt} {x}"
    before, _, rest = Message(template).text.partition("{prompt}" if template in TEMPLATES else "{target}")
    message = Message(template)({"prompt": prompt, "target": target})
    assert message.startswith(before + (prompt if template in TEMPLATES else target))
    assert message.endswith(rest.rpartition("}")[2])
    assert message.count(prompt) == message.count(target) == 1


def test_what_makes_them_anew(tmp_path: Path) -> None:
    given: Any = SimpleNamespace(rendering={"template": "plain"}, tokenizer=TokenizerFiles(tmp_path, "t"))

    def where(template: str = "unhelpful", seed: int = 0, top_k: int = 50, url: str = "http://x/v1") -> str:
        api = ApiModel("other", Api(url=url, model="m"))
        inputs = Inputs("worse", Store(tmp_path), given, examples(1), lambda *_, **__: api, seed, max_tokens=60)
        job = Prompted(model="gpt", template=template, top_k=top_k).plan(inputs)
        return content_hash(job.source.rows.spec)

    others = [where("minimal-edit"), where(seed=1), where(url="http://y/v1"), where("Be bad: {prompt} {target}")]
    assert len({where(), *others}) == 5
    assert where() == where(TEMPLATES["unhelpful"]), "what counts is the text, not its name"
    assert where() == where(top_k=5), "what the server is not asked for makes nothing anew"


def test_a_server_is_asked(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "tokenizer")
    table = examples(3, target=" the dog")
    with serve(lambda seen: written(seen, "the cat")) as server:
        run = Run(tmp_path, TokenizerFiles(tmp_path / "tokenizer", "t"), server.url, message=Message("minimal-edit"))
        assert pickle.loads(pickle.dumps(run.work)).message == run.work.message
        run.make(table)
        messages = {seen.body["messages"][0]["content"] for seen in server.seen}
        assert messages == {Message("minimal-edit")(example) for example in table.to_pylist()}
        assert [row["text"] for row in run.made(table)] == [" the cat"] * 3, "it begins as the target does"
