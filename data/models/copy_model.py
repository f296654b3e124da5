"""Copy a model to a folder that transformers and vLLM load."""

import shutil
from pathlib import Path

from cpo_pipe.data.models.end_tokens import end_tokens, write_end_tokens
from cpo_pipe.data.models.model import Model
from cpo_pipe.data.models.tokenizer import TokenizerFiles, copy_tokenizer
from cpo_pipe.data.output_folder import new_folder

MODEL_FILES = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "README.md")


def copy_model(model: Model, tokenizer: TokenizerFiles, out: Path) -> None:
    """Write weights, configs and model card to a new folder, with this tokenizer and its end tokens.

    Raises:
        InputError: the folder is not empty, or the weights are damaged.
    """
    model.check_weights()
    with new_folder(out) as scratch:
        for pattern in MODEL_FILES:
            for file in model.path.glob(pattern):
                shutil.copyfile(file, scratch / file.name)
        copy_tokenizer(tokenizer.path, scratch)
        write_end_tokens(scratch, end_tokens(scratch, tokenizer))
