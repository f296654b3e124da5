"""The model card of a checkpoint."""

from pathlib import Path

from cpo_pipe.data.models.model import Model
from cpo_pipe.data.store import Artifact
from tests.support.training import Bench


def test_the_hub_reads_the_card(bench: Bench, tiny_model: Path) -> None:
    from huggingface_hub import ModelCard

    artifact = bench.train("cpo-ranked", max_steps=1)
    assert "README.md" in artifact.manifest["files"]
    card = ModelCard.load(artifact.path / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.tags == ["cpo-pipe", "cpo-ranked"]
    assert card.data.base_model is None, "a folder is no address on the hub"
    assert card.data.license is None
    assert "max_steps: 1\n" in card.text
    assert str(tiny_model) not in card.content


def test_the_base_model_is_the_hub_model_of_the_first_training(bench: Bench, tiny_model: Path) -> None:
    from huggingface_hub import ModelCard

    def trained(init: Model) -> Artifact:
        return bench.train("mle", init=init, max_steps=1)

    first = trained(Model("org/base", tiny_model, "f1"))
    then = trained(Model("sft", first.path, "f2"))
    assert [ModelCard.load(made.path / "README.md").data.base_model for made in (first, then)] == ["org/base"] * 2
