"""Weight-space ensembles: θ = Σ w_i θ_i, such as α θ_MLE + (1 − α) θ_CPO (Feng et al. 2025, §4)."""

import logging
from collections.abc import Sequence

from cpo_pipe.data.errors import InputError
from cpo_pipe.data.fingerprint import model_fingerprint, sha256_file
from cpo_pipe.data.models import Model, TokenizerFiles
from cpo_pipe.data.store import Product, Store
from cpo_pipe.trainer.train import checkpoint, copy_tokenizer

log = logging.getLogger(__name__)


def merge(name: str, store: Store, parts: Sequence[tuple[Model, float]], tokenizer: TokenizerFiles) -> Product:
    """The ensemble of models of one architecture, weights summing to 1, made if it is not there.

    Raises:
        InputError: the models' tensors differ in name or shape.
    """
    weights = sorted([model.fingerprint, weight] for model, weight in parts)
    spec = {"merge": weights, "tokenizer": tokenizer.fingerprint}
    product = checkpoint(store, spec)
    if product.complete():
        return product
    import torch

    with product.lock():
        if product.complete():
            return product
        model = parts[0][0].load(torch.float32)
        total = {key: tensor * parts[0][1] for key, tensor in model.state_dict().items()}
        for other, weight in parts[1:]:
            state = other.load(torch.float32).state_dict()
            if {key: t.shape for key, t in state.items()} != {key: t.shape for key, t in total.items()}:
                raise InputError(f"system {name}: {other.name} and {parts[0][0].name} are not of one architecture")
            for key, tensor in state.items():
                total[key] += tensor * weight
        model.load_state_dict(total)
        with product.create() as folder:
            model.save_pretrained(folder.path)
            copy_tokenizer(tokenizer.path, folder.path)
            folder.facts["fingerprint"] = model_fingerprint(folder.path, sha256_file)
    log.info("system %s: merged into %s", name, product.name)
    return product
