"""Command `convert`: models of pickles (`pytorch_model.bin`) or in GGUF files as safetensors."""

import logging
import shutil
from pathlib import Path

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.fingerprint import TOKENIZER_FILES
from cpo_pipe.data.models.fetch import PICKLES, fetch_folder
from cpo_pipe.data.models.model import Model
from cpo_pipe.data.models.tokenizer import TokenizerFiles, copy_tokenizer
from cpo_pipe.data.output_folder import check_new, new_folder
from cpo_pipe.pipeline.convert import gguf
from cpo_pipe.pipeline.convert.loading import load_whole
from cpo_pipe.pipeline.convert.pickles import PickledWeights, write_weights
from cpo_pipe.pipeline.convert.sentencepiece import write_tokenizer

log = logging.getLogger(__name__)

SHARD_SIZE = "2GB"
"""Size of the largest file; one file at a time is in memory."""

_COPIED = ("config.json", "generation_config.json", "README.md")


def convert(name: str, out: Path, shard_size: str | int = SHARD_SIZE) -> None:
    """Write a model of pickles, or in a GGUF file, to a new folder as safetensors, with config and tokenizer.

    Of pickles one shard is in memory at a time and, where a pickle has the format of PyTorch before 1.6, that pickle;
    of a GGUF file it is the whole model, in float32.

    Args:
        name: a folder, a hub name or a GGUF file.
        out: a folder that is new or empty.
        shard_size: the largest file, in bytes or such as `2GB`.

    Raises:
        InputError: the model has neither, is damaged or runs code, a tensor has a type that cannot be read, the tensors
            do not match the config, or `out` is not empty.
    """
    check_new(out)
    file = gguf.find_gguf(name)
    if file is not None:
        with new_folder(out) as scratch:
            gguf.write_model(name, file, scratch, shard_size)
    else:
        _convert_pickles(name, out, shard_size)
    log.info("model %s: written to %s", name, out)


def _convert_pickles(name: str, out: Path, shard_size: str | int) -> None:
    folder = fetch_folder(name, "model", weights=PICKLES)
    pickles = PickledWeights.find(name, folder)
    Model(name, folder, "").skeleton()  # refuses a config that it cannot build
    with new_folder(out) as scratch:
        for file in _COPIED:
            if (folder / file).is_file():
                shutil.copyfile(folder / file, scratch / file)
        copy_tokenizer(folder, scratch)
        write_tokenizer(scratch)  # may refuse, so it comes before the long part
        if any((scratch / file).is_file() for file in TOKENIZER_FILES):
            try:
                TokenizerFiles(scratch, "").load()
            except InputError as error:  # the weights are useful without it: the user may give another
                reason = str(error).partition(": ")[2]
                log.warning("model %s: its tokenizer does not load (%s); the weights are converted", name, reason)
        write_weights(pickles, scratch, shard_size)
        # The meta device: only names and shapes are compared.
        load_whole(name, scratch, use_safetensors=True, device_map="meta", trust_remote_code=False)
