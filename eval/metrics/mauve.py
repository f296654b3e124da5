"""MAUVE (Pillutla et al. 2021): the similarity of two sets of texts, as the area under a divergence curve.

Both sets' features are quantized together by k-means; the two histograms P and Q are compared with every mixture
R = w·P + (1 − w)·Q, and the curve of exp(−c·KL(Q|R)) against exp(−c·KL(P|R)) encloses an area between 0 (nothing in
common) and 1 (the same). Any features can be used; only values on the same features are comparable. Evaluation uses
sentence embeddings, or hidden states of a causal model, as the paper does (GPT-2 large).

Legend: N texts, D features, T tokens, k clusters.
"""

import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cpo_pipe.data.batching import batches_by_length
from cpo_pipe.data.fingerprint import Spec
from cpo_pipe.data.models import templates
from cpo_pipe.data.models.embedder import Embedded, Encoder
from cpo_pipe.data.models.model import Model
from cpo_pipe.data.models.tokenizer import TokenizerFiles
from cpo_pipe.eval.generate import Outputs
from cpo_pipe.eval.metrics.figures import Figures

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MIN_TEXTS = 100
"""With fewer texts per side there are fewer than ten clusters, and the score is meaningless."""

MAUVE_METRICS = {
    "MAUVE": "similarity of the distribution of outputs to that of targets, 0 to 1, ± standard deviation over k-means "
    "seeds, on sentence embeddings or the hidden states of `mauve_model`; higher is better; differences within the "
    "spread are noise"
}

SCALING = 5.0
MIXTURES = 25
EXPLAINED_VARIANCE = 0.9
RESTARTS = 5
_EPSILON = 1e-6

BATCH_TOKENS = 1 << 12
"""Tokens per forward pass of `causal_features`, with padding."""

Histogram = NDArray[np.float64]


def measure_mauve(
    figures: Figures,
    system: str,
    decoding: str,
    outputs: Outputs,
    targets: Outputs,
    encode: Callable[[Sequence[str]], NDArray[np.float32]],
    seeds: Sequence[int],
) -> None:
    """Add MAUVE of the outputs against the targets, and its standard deviation; needs MIN_TEXTS examples."""
    assert len(targets.texts) >= MIN_TEXTS
    scores = mauve(encode(targets.texts), encode(outputs.texts), seeds)
    figures.add_value(system, decoding, "MAUVE", statistics.fmean(scores))
    if len(scores) > 1:
        figures.add_value(system, decoding, "MAUVE sd", statistics.stdev(scores))


def mauve(p_ND: NDArray[np.float32], q_ND: NDArray[np.float32], seeds: Sequence[int]) -> list[float]:
    """Return MAUVE between the features of two sets of texts, by k-means seed.

    Differences smaller than the standard deviation over the seeds are noise of the quantization.
    """
    clusters = max(2, round(min(len(p_ND), len(q_ND)) / 10))
    reduced = _reduce(np.concatenate([p_ND, q_ND]))
    return [_score(reduced, len(p_ND), clusters, seed) for seed in seeds]


def causal_features(network: "PreTrainedModel", token_ids: Sequence[Sequence[int]]) -> NDArray[np.float32]:
    """Return features of texts, (N, D): a causal model's last hidden state, after the final norm, of the last token.

    Texts of similar length share a forward pass, padded at the end, which no token before it attends to.

    Args:
        network: in eval mode; its body is run, without the head.
        token_ids: of each text, one at least (give an empty text the token that ends texts), and no more than the
            model's context.
    """
    import torch

    body: Any = network.base_model  # which transformers types as any module
    lengths = np.array([len(ids) for ids in token_ids])
    assert lengths.all()
    features: NDArray[np.float32] | None = None
    for rows in batches_by_length(lengths, BATCH_TOKENS):
        texts_T = [torch.tensor(token_ids[row]) for row in rows]
        padded_NT, mask_NT = (
            torch.nn.utils.rnn.pad_sequence(parts, batch_first=True).to(body.device)
            for parts in (texts_T, [torch.ones_like(ids) for ids in texts_T])
        )
        with torch.no_grad():
            hidden_NTD = body(input_ids=padded_NT, attention_mask=mask_NT, use_cache=False).last_hidden_state
        if features is None:  # sized by the states: configs differ in the name of their size
            features = np.zeros((len(lengths), hidden_NTD.shape[-1]), np.float32)
        last_ND = hidden_NTD[torch.arange(len(rows)), torch.tensor(lengths[rows]) - 1]
        features[rows] = last_ND.float().cpu().numpy()
    assert features is not None
    return features


class CausalEncoder(Encoder):
    """Features of texts by a causal model, which is loaded at first use; float32.

    A text is cut to the model's context; an empty text is the end token.

    Args:
        model: the causal model.
        tokenizer: the model's own.
    """

    def __init__(self, model: Model, tokenizer: TokenizerFiles):
        self._model, self._tokenizer = model, tokenizer
        self._loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None

    def spec(self) -> Spec:
        """Return everything that decides its features."""
        return {"model": self._model.fingerprint, "tokenizer": self._tokenizer.fingerprint}

    def window(self) -> int | None:
        """Return the model's context."""
        return self._model.context()

    def embed(self, texts: Sequence[str]) -> Embedded:
        """Return the features of the texts.

        Raises:
            InputError: the tokenizer has no token that ends texts, or the model cannot be loaded.
        """
        import torch

        if self._loaded is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            self._loaded = self._model.load(torch.float32).to(device).eval(), self._tokenizer.load()  # type: ignore[arg-type]
        network, tokenizer = self._loaded
        end = templates.eos_token_id(tokenizer, "evaluate.mauve_model")
        encoded = templates.encode_as_text(texts, tokenizer)
        context = self._model.context()
        features = causal_features(network, [ids[:context] or [end] for ids in encoded])
        return Embedded(features, np.array([context is not None and len(ids) > context for ids in encoded], bool))


def divergence_area(p: Histogram, q: Histogram) -> float:
    """Return the area under the divergence curve of two histograms that each sum to 1."""
    weights = np.linspace(_EPSILON, 1 - _EPSILON, MIXTURES)
    mixtures = [w * p + (1 - w) * q for w in weights]
    x = np.exp([-SCALING * _kl(q, r) for r in mixtures])
    y = np.exp([-SCALING * _kl(p, r) for r in mixtures])
    # w → 0 makes R = Q, where KL(Q|R) vanishes: the curve's ends are (1, 0) and (0, 1).
    x, y = np.concatenate([[1.0], x, [0.0]]), np.concatenate([[0.0], y, [1.0]])
    return (_area(x, y) + _area(y, x)) / 2


def _reduce(features: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the features, scaled to unit length, on the principal components that explain 90% of the variance."""
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import normalize

    unit = normalize(features.astype(np.float64))
    pca = PCA(svd_solver="full").fit(unit)
    kept = int(np.searchsorted(np.cumsum(pca.explained_variance_ratio_), EXPLAINED_VARIANCE)) + 1
    components: NDArray[np.float64] = pca.transform(unit)[:, :kept]
    return components


def _score(features: NDArray[np.float64], n_p: int, clusters: int, seed: int) -> float:
    from sklearn.cluster import KMeans

    labels = KMeans(clusters, init="random", n_init=RESTARTS, max_iter=500, random_state=seed % (1 << 32)).fit_predict(
        features
    )
    p = np.bincount(labels[:n_p], minlength=clusters) / n_p
    q = np.bincount(labels[n_p:], minlength=clusters) / (len(labels) - n_p)
    return divergence_area(p, q)


def _kl(p: Histogram, r: Histogram) -> float:
    """Return KL(p|r); r is a mixture of p and another histogram, so it is positive wherever p is."""
    here = p > 0
    # Rounding must not make it negative: the curve's corner would lie beyond its end.
    return max(0.0, float(np.sum(p[here] * np.log(p[here] / r[here]))))


def _area(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    order = np.lexsort((-y, x))  # the curve falls: of points with one x, the highest comes first
    return float(np.trapezoid(y[order], x[order]))
