"""The training step beside TRL's DPOTrainer on the same groups as K − 1 pairs: `just bench-train`.

Every figure comes from pairs of steps that take turns in one process on one thread, by CPU time. TRL's side is its own
trainer with reference log-probs computed beforehand, pair by pair (its best case on a CPU) and a group's pairs as one
batch, as it ships and with its head restricted to the positions that are scored. Gradient checkpointing is alike on
both sides. A tiny Llama with a body of 12 million parameters and a vocabulary of 32,000, float32.
"""

import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
import trl
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from cpo_pipe.data.execution.base import LocalExecutor
from cpo_pipe.data.fingerprint import candidate_id
from cpo_pipe.data.models.locate import locate_model
from cpo_pipe.data.models.tokenizer import locate_tokenizer
from cpo_pipe.data.schemas import EXAMPLES
from cpo_pipe.data.store import Store
from cpo_pipe.trainer.checkpoint import METRICS_FILE
from cpo_pipe.trainer.groups import Group
from cpo_pipe.trainer.objectives import OBJECTIVES
from cpo_pipe.trainer.objectives.base import Normalizers
from cpo_pipe.trainer.scoring.scorer import Scorer
from cpo_pipe.trainer.train import Inputs, train
from tests.support.models import make_tokenizer
from tests.support.trl_side import make_trl, peak_bytes

PAIRS = 7
VOCABULARY, HIDDEN, LAYERS = 32_000, 384, 7
SHAPE = {
    "hidden_size": HIDDEN, "intermediate_size": 1024, "num_hidden_layers": LAYERS, "num_attention_heads": 6,
    "num_key_value_heads": 6, "vocab_size": VOCABULARY, "max_position_embeddings": 2048, "use_cache": False,
}  # fmt: skip
SMOLLM2 = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49_152, "tie_word_embeddings": True,
}  # fmt: skip
"""The shape of SmolLM2-135M."""
CONFIG = OBJECTIVES.parse({"init": "m", "objective": "cpo", "reference": "m", "beta": 0.1})
Texts = tuple[list[int], list[list[int]]]
Step = Callable[[int], Any]

DOLLY = [
    (38, [127, 13, 14, 153, 93, 165, 15, 11, 136, 95, 158, 89]),
    (41, [231, 68, 203, 44, 31, 15, 73, 26, 78, 73, 29, 59]),
    (64, [34, 347, 11, 122, 93, 57, 103, 23, 8, 23, 150, 206]),
    (212, [119, 11, 65, 111, 15, 29, 61, 57, 4, 4, 16, 40]),
]
GSM8K = [
    (45, [60, 53, 61, 59, 102, 28, 55, 163, 41, 24, 105, 43]),
    (59, [102, 116, 156, 58, 104, 26, 123, 68, 92, 93, 78, 52]),
    (74, [112, 73, 156, 96, 116, 224, 86, 66, 89, 58, 125, 100]),
    (110, [97, 84, 102, 89, 80, 131, 95, 58, 52, 83, 88, 37]),
]
"""Tokens of prompt and candidates (target first) of four groups of each data set, spread over its prompt lengths: rows
of the data set, and samples of a small model trained on it."""


def group(prompt: int, candidates: Sequence[int], rng: random.Random) -> Texts:
    """Random token ids of these numbers."""
    return [rng.randrange(2, VOCABULARY) for _ in range(prompt)], [
        [rng.randrange(2, VOCABULARY) for _ in range(count)] for count in candidates
    ]


def cases() -> Iterator[tuple[str, list[Texts]]]:
    """What is measured, by name."""
    rng = random.Random(0)
    yield "Dolly, K 12", [group(*sizes, rng) for sizes in DOLLY]
    yield "GSM8K, K 12", [group(*sizes, rng) for sizes in GSM8K]
    for prompt in (30, 200, 1000):
        for candidates in (2, 6, 12):
            yield (
                f"P {prompt}, K {candidates}",
                [group(prompt, [rng.randrange(30, 91) for _ in range(candidates)], rng)],
            )


def new_model(**changed: Any) -> PreTrainedModel:
    config = AutoConfig.for_model("llama", **SHAPE | changed)
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model.train(False)


def reference(groups: Sequence[Texts]) -> list[list[float]]:
    """Plausible log-probs: what they are changes no amount of work."""
    return [[-10.0 * len(candidate) for candidate in candidates] for _, candidates in groups]


def make_ours(groups: Sequence[Texts], checkpointing: bool, accumulate: bool = False, logits_mb: int = 1024) -> Step:
    """Forward and backward pass of one group through what the training loop calls; returns the tokens computed.

    With `accumulate` gradients are added to those that are there, as in all but the first group of a batch.
    """
    scorer = Scorer(new_model(), logits_mb=logits_mb)
    scorer.set_checkpointing(checkpointing)
    scorer.set_attention("cascade")
    return our_step(scorer, groups, accumulate)


def our_step(scorer: Scorer, groups: Sequence[Texts], accumulate: bool, per_pass: int = 1) -> Step:
    typed = [
        Group(str(number), list(prompt), [list(ids) for ids in candidates], None, logprobs)
        for number, ((prompt, candidates), logprobs) in enumerate(zip(groups, reference(groups), strict=True))
    ]

    def step(index: int) -> int:
        if not accumulate:
            scorer.zero_grad(set_to_none=True)
        chosen = typed[index * per_pass : (index + 1) * per_pass]
        packed = scorer.pack([CONFIG.texts(one) for one in chosen])
        figures = CONFIG.figures(chosen, packed.per_group(scorer(packed)))
        CONFIG.loss(figures, Normalizers.of(chosen)).backward()  # type: ignore[no-untyped-call]
        return packed.tokens()

    return step


def make_theirs(groups: Sequence[Texts], batch: Any, checkpointing: bool, restricted: bool) -> Step:
    return make_trl(new_model(), None, groups, reference(groups), CONFIG.beta, batch, checkpointing, restricted)


def seconds(step: Step, count: int) -> float:
    """CPU time of one step over each group."""
    start = time.process_time()
    for index in range(count):
        step(index)
    return time.process_time() - start


def peak_flops(dtype: torch.dtype = torch.float32) -> float:
    """Of a large matrix product in this process."""
    one, other = torch.randn(2, 2048, 2048, dtype=dtype)
    torch.mm(one, other)
    times = []
    for _ in range(9):
        start = time.process_time()
        torch.mm(one, other)
        times.append(time.process_time() - start)
    return 2 * 2048**3 / min(times)


def operations(groups: Sequence[Texts], tokens: int) -> float:
    """Of the matrix products in our step: 6 per weight and token in the body, 6 per weight and scored position."""
    body = LAYERS * (4 * HIDDEN**2 + 3 * HIDDEN * 1024)
    scored = sum(len(candidate) for _, candidates in groups for candidate in candidates)
    scored -= sum(len(candidates) - 1 for _, candidates in groups)  # the first tokens share a position
    return 6.0 * body * tokens + 6.0 * VOCABULARY * HIDDEN * scored


def compare(name: str, groups: Sequence[Texts], checkpointing: bool, batches: Sequence[str]) -> None:
    """Print a line of the table for each way that TRL can go."""
    ours, count = make_ours(groups, checkpointing), len(groups)
    tokens = sum(ours(index) for index in range(count))
    for batch in batches:
        steps = {restricted: make_theirs(groups, batch, checkpointing, restricted) for restricted in (False, True)}
        theirs = sum(steps[True](index)[1] for index in range(count))
        steps[False](count - 1)
        rounds = []
        for _ in range(PAIRS):
            mine = seconds(ours, count)
            rounds.append((mine, *(seconds(steps[restricted], count) / mine for restricted in (False, True))))
        own, shipped, restricted = zip(*rounds, strict=True)
        share = operations(groups, tokens) / statistics.median(own) / peak_flops()
        print(
            f"| {name} | {'on' if checkpointing else 'off'} | {batch} | {statistics.median(own) / count:.2f} s "
            f"| {share:.0%} | {tokens / count:.0f} : {theirs / count:.0f} | {_ratio(shipped)} | {_ratio(restricted)} |",
            flush=True,
        )


def _ratio(values: Sequence[float]) -> str:
    return f"**{statistics.median(values):.2f}×** ({min(values):.2f}–{max(values):.2f})"


def memory_case() -> list[Texts]:
    """The group measured (P 200, K 12), and a small one to warm up with."""
    rng = random.Random(0)
    return [group(200, [rng.randrange(30, 91) for _ in range(12)], rng), group(4, [4, 4], rng)]


def our_memory_step(checkpointing: bool, logits_mb: int) -> Step:
    return make_ours(memory_case(), checkpointing, accumulate=True, logits_mb=logits_mb)


def their_memory_step(batch: str, checkpointing: bool, restricted: bool) -> Step:
    (prompt, candidates), warm_up = memory_case()
    if batch == "pair":  # the pair that needs most
        candidates = [candidates[0], max(candidates[1:], key=len)]
    step: Any = make_theirs([(prompt, candidates), warm_up], batch, checkpointing, restricted)
    step.trainer.model.zero_grad = lambda *_, **__: None  # gradients are added to those that are there
    return step  # type: ignore[no-any-return]


def memory() -> None:
    """Print peak memory of one step in the middle of a batch, over what model and gradients take."""
    for checkpointing in (False, True):
        for logits_mb in (1024, 16):
            mine = peak_bytes(our_memory_step, checkpointing, logits_mb, index=0, warm_up=1)
            name = f"a whole group, ours, logits_mb {logits_mb}"
            print(f"| {'on' if checkpointing else 'off'} | {name} | {mine / 2**20:.0f} |", flush=True)
        for batch in ("pair", "group"):
            for restricted in (False, True):
                theirs = peak_bytes(their_memory_step, batch, checkpointing, restricted, index=0, warm_up=1)
                name = f"TRL, {'one pair' if batch == 'pair' else 'a whole group'}{', restricted head' * restricted}"
                print(f"| {'on' if checkpointing else 'off'} | {name} | {theirs / 2**20:.0f} |", flush=True)


def precision() -> None:
    """Print the speed of a step in float32 and bfloat16, on a model of SmolLM2-135M's shape.

    The peak is that of a matrix product in the same dtype. `ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16` measures a processor
    with AMX as one without.
    """
    rng = random.Random(0)
    prompt, candidates = [rng.randrange(49_152) for _ in range(12)], 5
    texts = prompt, [[rng.randrange(49_152) for _ in range(68)] for _ in range(candidates)]
    steps = {}
    for dtype in ("float32", "bfloat16"):
        for attention in ("cascade", "padded"):
            scorer = Scorer(new_model(**SMOLLM2), dtype)
            scorer.set_attention(attention)  # type: ignore[arg-type]
            steps[dtype, attention] = our_step(scorer, [texts], accumulate=True)
    body = sum(of.numel() for name, of in scorer.model.named_parameters() if of.dim() == 2 and "embed" not in name)
    tokens = {key: step(0) for key, step in steps.items()}
    taken: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    for _ in range(PAIRS):
        for key, step in steps.items():
            taken[key].append(seconds(step, 1))
    scored = sum(map(len, texts[1])) - candidates + 1
    for (dtype, attention), times in taken.items():
        needed = 6.0 * (body * tokens[dtype, attention] + 49_152 * 576 * scored)
        peak, median = peak_flops(getattr(torch, dtype)), statistics.median(times)
        print(f"| {dtype} | {attention} | {median:.2f} s | {tokens[dtype, attention] / median:.0f} "
              f"| {peak / 1e9:.0f} GFLOP/s | {needed / median / peak:.0%} |", flush=True)  # fmt: skip


def passes() -> None:
    """Print how much faster eight groups are where a forward pass takes several, on SmolLM2-135M's shape.

    With 8, 4, 2 and 1 passes, which take turns.
    """
    rng = random.Random(0)
    for dtype in ("float32", "bfloat16"):
        scorer = Scorer(new_model(**SMOLLM2), dtype)
        scorer.set_attention("cascade")
        for prompt, candidates, length in ((16, 2, 32), (16, 4, 32), (90, 4, 110), (200, 12, 60)):
            groups = [group(prompt, [length] * candidates, rng) for _ in range(8)]
            steps = {per_pass: our_step(scorer, groups, True, per_pass) for per_pass in (1, 2, 4, 8)}
            tokens = {per_pass: step(0) for per_pass, step in steps.items()}
            taken = [{per_pass: seconds(step, 8 // per_pass) for per_pass, step in steps.items()} for _ in range(3)]
            cells = [f"{statistics.median(of[1] / of[n] for of in taken):.2f}× ({tokens[n]})" for n in (2, 4, 8)]
            one = statistics.median(of[1] for of in taken)
            print(f"| {dtype} | P {prompt}, K {candidates}, {length} tokens | {tokens[1]} | {one:.2f} s | "
                  + " | ".join(cells) + " |", flush=True)  # fmt: skip


def loop() -> None:
    """Print what the loop as a whole takes beside the bare step on the same groups."""
    rng = random.Random(0)
    groups = [group(200, [rng.randrange(30, 91) for _ in range(12)], rng) for _ in range(8)]
    steps = 8
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        make_tokenizer(folder)
        new_model().save_pretrained(folder)
        store = Store(Path(name) / "store")
        model = locate_model(str(folder), store)
        rows = store.rows("groups", {"of": "the benchmark"})
        made = [
            {"example_id": str(number), "prompt_ids": prompt, "candidates": [
                {"candidate_id": candidate_id(prompt, ids), "text": "", "token_ids": ids, "strategy": "s",
                 "similarity": None, "rank": None} for ids in candidates]}
            for number, (prompt, candidates) in enumerate(groups)
        ]  # fmt: skip
        with rows.writer() as writer:
            writer.add(made)
        selection = pa.Table.from_pylist(
            [{"example_id": str(number), "split": "train", "prompt": "", "rendered": "", "target": "",
              "prompt_ids": prompt, "target_ids": candidates[0], "ends": True, "category": None}
             for number, (prompt, candidates) in enumerate(groups)], schema=EXAMPLES,
        )  # fmt: skip
        inputs = Inputs(locate_tokenizer(str(folder), store), model, selection, rows, model)
        config = OBJECTIVES.parse(
            {"init": "m", "objective": "cpo", "reference": "m", "max_steps": steps, "batch_size": len(groups)}, beta=0.1
        )
        product = train("benchmark", config, store, inputs, None, LocalExecutor())
        # The first and the last step measure samples, too.
        taken = pq.read_table(product.path / METRICS_FILE)["seconds"].to_pylist()[1:-1]
    ours = make_ours(groups, False)
    bare = []
    for _ in range(len(taken)):
        start = time.monotonic()
        for index in range(len(groups)):
            ours(index)
        bare.append(time.monotonic() - start)
    ours_s, loop_s = statistics.median(bare), statistics.median(taken)
    print(f"\nThe loop keeps {ours_s / loop_s:.1%} of the bare step's throughput: {ours_s:.2f} s against {loop_s:.2f} "
          f"s a step of {len(groups)} groups (wall time).")  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, trl {trl.__version__}; one thread; "
          f"matrix products reach {peak_flops() / 1e9:.0f} GFLOP/s\n")  # fmt: skip
    asked = sys.argv[1:] or ["time", "memory", "precision", "passes", "loop"]
    if "time" in asked:
        print("| groups | checkpointing | TRL's batch | ours, a group | of the peak | tokens computed | TRL as ships "
              "| with a restricted head |\n| --- | --- | --- | --- | --- | --- | --- | --- |")  # fmt: skip
        for name, groups in cases():
            both = name in ("P 200, K 12", "P 30, K 12")
            compare(name, groups, False, ["pair", "group"] if both else ["pair"])
            if both:
                compare(name, groups, True, ["pair"])
    if "memory" in asked:
        print("\n| checkpointing | one step of | peak MiB |\n| --- | --- | --- |")
        memory()
    if "precision" in asked:
        print("\n| dtype | attention | a group | tokens/s | matrix products | of the peak |\n" + "| --- " * 6 + "|")
        precision()
    if "passes" in asked:
        print("\n| dtype | groups | tokens of one | 8 groups one by one | 2 a pass (tokens) | 4 a pass | 8 a pass |\n"
              + "| --- " * 7 + "|")  # fmt: skip
        passes()
    if "loop" in asked:
        loop()


if __name__ == "__main__":
    main()
