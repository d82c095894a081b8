"""Whole models through fairseq's own trainer: RoBERTa with and without memories."""

import gc
import tempfile
from argparse import Namespace
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
from fairseq import options
from fairseq.data import Dictionary
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.tasks import TASK_REGISTRY
from fairseq.trainer import Trainer
from fairseq.utils import import_user_module

from ...memory.hosts import new_usage, observing, with_memories
from ..runs.folders import PACKAGE
from .layer import shortage
from .output import Report
from .settings import Settings
from .subjects import SLACK
from .timing import compare, interleave

TRAIN, FORWARD = "model_train_step", "model_forward"
SENTENCES, LENGTH = 8, 128  # tokens per batch
MASKED = 0.15
SYMBOLS = 50_265  # RoBERTa's vocabulary, including special symbols
BATCHES = 4
CLIP_NORM = "1.0"
PLAIN = {"task": "masked_lm", "criterion": "masked_lm", "optimizer": "adam"}
WITH_MEMORY = {"task": "pkm_masked_lm", "criterion": "pkm_masked_lm", "optimizer": "pkm_adam"}
NARROW = ("--memory-value-dtype", "bfloat16", "--memory-moment-dtype", "bfloat16")


@dataclass(frozen=True)
class Model:
    """A model as fairseq-train would build it.

    Attributes:
        arch: fairseq's architecture.
        n_keys: sub-keys per half of its memories; None without memories.
        gib: approximate peak memory of training.
        flags: further options of fairseq-train.
        symbols: size of its vocabulary.
        counts: whether to count memory usage, as in the first updates of every training, and
            record times of reads.
    """

    arch: str
    n_keys: Optional[int]
    gib: float
    flags: Tuple[str, ...] = ()
    symbols: int = SYMBOLS
    counts: bool = True

    def command(self, save_dir: str) -> List[str]:
        """The options of fairseq-train, without data."""
        chosen = {
            "arch": self.arch,
            "clip-norm": CLIP_NORM,
            "tokens-per-sample": str(LENGTH),
            "lr": "1e-4",
            "save-dir": save_dir,
            **(PLAIN if self.n_keys is None else WITH_MEMORY),
            **({} if self.counts else {"memory-usage-interval": "0"}),
        }
        flags = [part for name, value in chosen.items() for part in (f"--{name}", value)]
        return ["no-data", "--cpu", "--no-save", *flags, *self.flags]


MODELS = {
    "roberta_base": Model("roberta_base", None, 3.5),
    "roberta_large": Model("roberta_large", None, 7.0),
    "pkm_base": Model("pkm_roberta_base", 512, 7.0),
    "resm_base": Model("resm_roberta_base", 512, 7.5),
    "resm_base_bfloat16": Model("resm_roberta_base", 512, 5.2, NARROW),
    "resm_base_uncounted": Model("resm_roberta_base", 512, 7.5, counts=False),
}
PAIRS = [
    ("resm_base", "roberta_base"),
    ("resm_base_bfloat16", "roberta_base"),
    ("pkm_base", "roberta_base"),
    ("resm_base", "roberta_large"),
]
COUNTED = ("resm_base", "resm_base_uncounted")
SMALL = ("--encoder-layers", "3", "--encoder-embed-dim", "128", "--encoder-ffn-embed-dim", "512")
SMALL += ("--encoder-attention-heads", "4", "--max-positions", str(LENGTH))
SMALL_MODELS = {  # only to test that everything runs
    "roberta_tiny": Model("roberta", None, 0.2, SMALL, 1000),
    "pkm_tiny": Model("pkm_roberta_tiny", 64, 0.2, SMALL, 1000),
    "resm_tiny": Model("resm_roberta_tiny", 64, 0.2, SMALL, 1000),
    "resm_tiny_bfloat16": Model("resm_roberta_tiny", 64, 0.2, (*SMALL, *NARROW), 1000),
    "resm_tiny_uncounted": Model("resm_roberta_tiny", 64, 0.2, SMALL, 1000, counts=False),
}
SMALL_PAIRS = [
    ("resm_tiny", "roberta_tiny"),
    ("resm_tiny_bfloat16", "roberta_tiny"),
    ("pkm_tiny", "roberta_tiny"),
]
SMALL_COUNTED = ("resm_tiny", "resm_tiny_uncounted")


@dataclass
class TrainedModel:
    """A model with fairseq's trainer around it.

    Attributes:
        trainer: fairseq's.
        samples: batches, masked.
        masked: which tokens of each batch are masked.
    """

    trainer: Trainer
    samples: List[Dict[str, Any]]
    masked: List[torch.Tensor]

    def train_step(self, turn: int) -> Callable[[], object]:
        """Forward, backward, clipping and update, as fairseq-train does them."""
        return partial(self.trainer.train_step, [self.samples[turn % len(self.samples)]])

    def forward(self, turn: int) -> Callable[[], object]:
        """Inference: the logits of the masked tokens."""
        sample = self.samples[turn % len(self.samples)]
        model = self.trainer.get_model().eval()
        masked = self.masked[turn % len(self.samples)]

        @torch.no_grad()
        def infer() -> None:
            model(**sample["net_input"], masked_tokens=masked)

        return infer

    @torch.no_grad()
    def distinct_slots(self) -> List[int]:
        """The number of slots that a training step reads, for each memory layer."""
        model = self.trainer.get_model().train()
        host = with_memories(model)
        if host is None:
            return []
        usage = new_usage(host)
        with observing(host, usage):
            model(**self.samples[0]["net_input"], masked_tokens=self.masked[0])
        return [int((counts.read_count.sum(0) > 0).sum()) for _, counts in sorted(usage.items())]


def measure(settings: Settings, report: Report) -> None:
    """Measure pairs of models; skip a pair that does not fit into memory."""
    models, pairs = choose(settings)
    for pair in pairs:
        measure_pair(models, pair, (FORWARD, TRAIN), settings, report)  # training changes weights


def measure_pair(
    models: Dict[str, Model],
    pair: Tuple[str, str],
    whats: Tuple[str, ...],
    settings: Settings,
    report: Report,
) -> None:
    """Measure a pair of models, subject and against, or record why not."""
    subject, against = pair
    sizes = SENTENCES * LENGTH, models[subject].n_keys
    with built(models, pair, settings.seed) as (problem, runs):
        if problem:
            for what in whats:
                report.skip(what, *sizes, against, problem, subject=subject)
            return
        about = {
            "subject_parameters": parameters(runs[subject]),
            "against_parameters": parameters(runs[against]),
            "distinct_slots": runs[subject].distinct_slots(),
            "turns": "steps",
        }
        for what in whats:
            steps = {name: step_of(run, what) for name, run in runs.items()}
            seconds = interleave(steps, settings.rounds)
            numbers = compare(seconds[subject], seconds[against])
            report.result(what, *sizes, subject, against, **numbers, **about)


@contextmanager
def built(
    models: Dict[str, Model], names: Sequence[str], seed: int
) -> Iterator[Tuple[Optional[str], Dict[str, TrainedModel]]]:
    """Build models together, by name, until the context ends; or report the lack of memory."""
    gc.collect()  # models before
    problem = shortage(int(sum(models[name].gib for name in names) * 2**30) + SLACK)
    with tempfile.TemporaryDirectory(prefix="pkm_benchmark_") as save_dir:
        runs = {} if problem else {name: build(models[name], seed, save_dir) for name in names}
        yield problem, runs
        runs.clear()


def choose(settings: Settings) -> Tuple[Dict[str, Model], List[Tuple[str, str]]]:
    """The models and the pairs of subject and against."""
    return (SMALL_MODELS, SMALL_PAIRS) if settings.quick else (MODELS, PAIRS)


def counted(settings: Settings) -> Tuple[Dict[str, Model], Tuple[str, str]]:
    """The models, and the pair: one counts usage, the other does not."""
    return (SMALL_MODELS, SMALL_COUNTED) if settings.quick else (MODELS, COUNTED)


def count(settings: Settings) -> int:
    """The number of results, including skipped ones."""
    return 2 * len(choose(settings)[1])


def step_of(run: TrainedModel, what: str) -> Callable[[int], Callable[[], object]]:
    """The step to time."""
    return run.train_step if what == TRAIN else run.forward


def build(model: Model, seed: int, save_dir: str) -> TrainedModel:
    """Build a model, its task with a made-up vocabulary, and fairseq's trainer, as fairseq-train.

    Args:
        model: the model to build.
        seed: seed of its weights and of the batches.
        save_dir: the trainer's folder if a step crashes.
    """
    import_user_module(Namespace(user_dir=str(PACKAGE)))
    parser = options.get_training_parser()
    args = options.parse_args_and_arch(parser, model.command(save_dir))
    cfg = convert_namespace_to_omegaconf(args)
    torch.manual_seed(seed)
    dictionary = vocabulary(model.symbols)
    task = TASK_REGISTRY[cfg.task._name](cfg.task, dictionary)  # not setup_task: it reads files
    built = task.build_model(cfg.model)
    if not model.counts:
        built.set_num_updates = lambda updates: None  # as outside a training
    trainer = Trainer(cfg, task, built, task.build_criterion(cfg.criterion))
    generator = torch.Generator().manual_seed(seed)  # the same batches for every model
    samples = [sample(dictionary, generator) for _ in range(BATCHES)]
    masked = [s["target"].ne(dictionary.pad()) for s in samples]
    return TrainedModel(trainer, samples, masked)


def vocabulary(symbols: int) -> Dictionary:
    """A dictionary of this size, including the mask that the task adds."""
    dictionary = Dictionary()
    for index in range(symbols - len(dictionary) - 1):
        dictionary.add_symbol(f"w{index}")
    return dictionary


def sample(dictionary: Dictionary, generator: torch.Generator) -> Dict[str, Any]:
    """Random tokens without padding, some of them masked, in the collater's format."""
    size = (SENTENCES, LENGTH)
    tokens = torch.randint(dictionary.nspecial, len(dictionary) - 1, size, generator=generator)
    masked = torch.rand(size, generator=generator) < MASKED
    return {
        "id": torch.arange(SENTENCES),
        "net_input": {
            "src_tokens": tokens.masked_fill(masked, dictionary.index("<mask>")),
            "src_lengths": torch.full((SENTENCES,), LENGTH),
        },
        "target": tokens.masked_fill(~masked, dictionary.pad()),
        "nsentences": SENTENCES,
        "ntokens": tokens.numel(),
    }


def parameters(run: TrainedModel) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in run.trainer.get_model().parameters())
