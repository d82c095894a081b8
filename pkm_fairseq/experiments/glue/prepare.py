"""Prepare tasks: turn their rows into data for fairseq's sentence_prediction."""

import json
import multiprocessing
import shutil
import signal
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

import torch
from fairseq.data import Dictionary, indexed_dataset

from ...memory.files import write_file
from ..runs.folders import key_of, key_of_files
from ..runs.progress import progress_bars
from .read import Rows, files_of, read_task
from .tasks import TOKENIZER, TaskSpec
from .tokenizers import Tokenizer, encode, load_dictionary

CODE = [Path(__file__).with_name(f"{name}.py") for name in ("prepare", "read", "tokenizers")]
CHUNK = 200  # rows per call of a worker

Ids = List[List[int]]  # of the one or two sentences of a row


def prepare(
    glue_data: Path,
    out: Path,
    specs: Sequence[TaskSpec],
    tokenizer: Tokenizer,
    dictionary: Path,
    workers: int = 1,
) -> None:
    """Read, check, tokenise and binarise tasks; skip tasks that are finished with these inputs.

    It prints each step and every warning, and shows a progress bar on a terminal.

    Args:
        glue_data: folder with one folder per task, as in the official download.
        out: folder for the tasks' folders, and for ``tokenizer/``.
        specs: the tasks.
        tokenizer: the tokenizer of the pretrained model.
        dictionary: the dictionary of the pretrained model.
        workers: number of tokenising processes.

    Raises:
        ValueError: an option or a file is wrong; finished tasks stay.
    """
    if workers < 1:
        raise ValueError(f"--workers is {workers}, must be at least 1")
    if not glue_data.is_dir():
        raise ValueError(f"--glue-data {glue_data}: no such folder")
    symbols = load_dictionary(dictionary)
    tokenizer.load()  # raise errors here, not in a worker
    for spec in specs:
        if not (glue_data / spec.name).is_dir():
            raise ValueError(f"{glue_data / spec.name}: no such folder; choose tasks with --tasks")
    tokenizer.save(out / TOKENIZER)
    with _pool(tokenizer, symbols, workers) as pool:
        for spec in specs:
            folder = glue_data / spec.name
            settings = [tokenizer.settings, key_of_files(dictionary, *CODE), asdict(spec)]
            key = key_of(settings, key_of_files(*files_of(folder, spec)))
            if is_prepared(out / spec.name, key):
                print(f"{spec.name}: already prepared")
            else:
                about = {"bpe": tokenizer.settings, "key": key}
                _prepare_task(folder, out / spec.name, spec, dictionary, symbols, pool, about)


def is_prepared(folder: Path, key: str) -> bool:
    """Whether a task is prepared with these inputs.

    Raises:
        ValueError: prepare_glue.py did not make the folder.
    """
    if not folder.exists():
        return False
    file = folder / "task.json"
    if not file.is_file():
        raise ValueError(
            f"{folder} exists without task.json: prepare_glue.py did not make it, remove it"
        )
    try:
        return bool(json.loads(file.read_text(encoding="utf-8"))["key"] == key)
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{file} is not a file of prepare_glue.py: remove {folder}") from None


def _prepare_task(
    folder: Path,
    out: Path,
    spec: TaskSpec,
    dictionary: Path,
    symbols: Dictionary,
    pool: Optional[Pool],
    about: Dict[str, Any],
) -> None:
    splits, notes = read_task(folder, spec)
    part, old = (out.with_name(f"{out.name}.{suffix}") for suffix in ("part", "old"))
    for left in (part, old):  # by an interrupted run
        shutil.rmtree(left, ignore_errors=True)
    inputs = [part / f"input{number}" for number in range(1 + spec.is_pair)]
    for inputs_folder in inputs:
        inputs_folder.mkdir(parents=True)
        shutil.copyfile(dictionary, inputs_folder / "dict.txt")
    n_symbols = n_unknown = 0
    with progress_bars() as progress:
        for split, rows in splits.items():
            bar = progress.add_task(f"{spec.name} {split}", total=len(rows.texts))
            ids = progress.track(_tokenise(rows.texts, pool), task_id=bar)
            counted = _write_inputs(inputs, split, ids, symbols)
            n_symbols, n_unknown = n_symbols + counted[0], n_unknown + counted[1]
            _write_targets(part, split, rows, spec)
    if 2 * n_unknown > n_symbols:
        notes.append(
            f"{spec.name}: {n_unknown:,} of {n_symbols:,} symbols are not in the dictionary: "
            "is this the tokenizer of its model?"
        )
    _write_description(part, splits, spec, about)
    if out.exists():
        out.replace(old)  # in one step, since half a folder would look like somebody else's
        print(f"{spec.name}: files or settings changed, prepared again")
    part.replace(out)
    shutil.rmtree(old, ignore_errors=True)
    for note in notes:
        print(f"warning: {note}")
    print(f"{spec.name}: " + ", ".join(f"{s} {len(r.texts):,}" for s, r in splits.items()))


# --- writing ----------------------------------------------------------------------------------


def _write_inputs(
    folders: List[Path], split: str, ids: Iterable[Ids], symbols: Dictionary
) -> Tuple[int, int]:
    """Write the sentences of a split; return the numbers of symbols and of unknown symbols."""
    builders = [_builder(folder / split, symbols) for folder in folders]
    n_symbols = n_unknown = 0
    for sentences in ids:
        for builder, sentence in zip(builders, sentences, strict=True):
            builder.add_item(torch.tensor(sentence))
            n_symbols += len(sentence) - 1  # the end of the sentence does not count
            n_unknown += sentence.count(symbols.unk())
    for builder, folder in zip(builders, folders, strict=True):
        builder.finalize(str(folder / f"{split}.idx"))
    return n_symbols, n_unknown


def _write_targets(out: Path, split: str, rows: Rows, spec: TaskSpec) -> None:
    if rows.indices:
        write_file(out / f"{split}.index", "".join(f"{index}\n" for index in rows.indices))
        return
    folder = out / "label"
    folder.mkdir(exist_ok=True)
    if spec.label_range is not None:
        low, high = spec.label_range
        scaled = ((score - low) / (high - low) for score in rows.targets)
        write_file(folder / f"{split}.label", "".join(f"{score:.8g}\n" for score in scaled))
        return
    labels = Dictionary()
    ids = [labels.add_symbol(label) for label in spec.labels]  # in the order of the classes
    labels.save(str(folder / "dict.txt"))
    builder = _builder(folder / split, labels)
    for target in rows.targets:
        builder.add_item(torch.tensor([ids[int(target)], labels.eos()]))
    builder.finalize(str(folder / f"{split}.idx"))


def _builder(prefix: Path, symbols: Dictionary) -> Any:
    return indexed_dataset.make_builder(f"{prefix}.bin", impl="mmap", vocab_size=len(symbols))


def _write_description(
    out: Path, splits: Dict[str, Rows], spec: TaskSpec, about: Dict[str, Any]
) -> None:
    description = {
        "name": spec.name,
        "labels": spec.labels,
        "label_range": spec.label_range,
        "metrics": spec.metrics,
        "is_pair": spec.is_pair,
        "splits": {split: len(rows.texts) for split, rows in splits.items()},
        **about,
    }
    write_file(out / "task.json", json.dumps(description, indent=2))


# --- tokenising in several processes ----------------------------------------------------------

_worker: Dict[str, Any] = {}  # this process's tokenizer and dictionary


@contextmanager
def _pool(tokenizer: Tokenizer, symbols: Dictionary, workers: int) -> Iterator[Optional[Pool]]:
    """Processes that tokenise; None if only this one does."""
    if workers == 1:
        _start(tokenizer, symbols)
        yield None
        return
    context = multiprocessing.get_context(
        "fork"
    )  # other methods would import torch and fairseq in each process
    with context.Pool(workers, _start_worker, (tokenizer, symbols)) as pool:
        yield pool


def _start_worker(tokenizer: Tokenizer, symbols: Dictionary) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _start(tokenizer, symbols)


def _start(tokenizer: Tokenizer, symbols: Dictionary) -> None:
    _worker.update(tokenizer=tokenizer.load(), symbols=symbols)


def _tokenise(texts: List[Tuple[str, ...]], pool: Optional[Pool]) -> Iterator[Ids]:
    return map(_ids, texts) if pool is None else pool.imap(_ids, texts, chunksize=CHUNK)


def _ids(texts: Tuple[str, ...]) -> Ids:
    return [encode(_worker["tokenizer"](text), _worker["symbols"]) for text in texts]
