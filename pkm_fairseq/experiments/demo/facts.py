"""The demo's part on facts: how many facts about synthetic people plain and ResM + INIT recall."""

import json
from functools import partial
from pathlib import Path
from typing import Any, Dict, List

from ...memory.files import write_file
from ..facts.people import ATTRIBUTES, NAMES, prepare_people
from ..facts.recall import measure, read_people
from ..facts.training import PLAIN, epoch_of, memory_flags, training_flags
from ..runs.folders import (
    PACKAGE,
    begin,
    finish,
    is_finished,
    key_of,
    key_of_code,
    make_once,
)
from ..runs.logs import last_line, read_log
from ..runs.processes import Child, Children
from ..runs.progress import RunsProgress
from ..runs.trainings import LAST, LOG, clear, run_all, start_training
from .evaluate import Loaded, Words, fill_mask, load, parameter_count
from .presets import TITLES, Preset

ARMS = ("plain", "resm_init")
WORKERS = 2
RESULT = "recall.json"
EXPERIMENTS = tuple(f"experiments/{part}" for part in ("data", "demo", "facts", "runs"))
CODE = ("memory", "models", "tasks", "criterions", "optim", "compat", *EXPERIMENTS)


def run_facts(preset: Preset, out: Path) -> None:
    """Train the arms on facts and measure their recall; skip finished steps.

    Args:
        preset: the settings.
        out: the demo's folder; ``out/facts`` gets ``data``, one folder for each arm, and the recall
            of the arms.

    Raises:
        ValueError: a training failed.
    """
    folder, key = out / "facts", _key(preset)
    if not begin(folder, key):
        return
    folder = folder.resolve()
    print(f"training on facts about {preset.facts.people:,} people in {folder}", flush=True)
    data = folder / "data"
    make_once(data, key, partial(prepare_people, preset.facts.people))
    _train([arm for arm in ARMS if begin(folder / arm, key)], preset, folder, key)
    write_file(folder / RESULT, json.dumps(_measure(preset, folder), indent=2) + "\n")
    finish(folder, key)


def read_facts(preset: Preset, out: Path) -> Dict[str, Any]:
    """The results of ``run_facts``; empty if it has not finished."""
    if not is_finished(out / "facts", _key(preset)):
        return {}
    found: Dict[str, Any] = json.loads((out / "facts" / RESULT).read_text())
    return found


def summary(facts: Dict[str, Any]) -> str:
    """The recall of both arms, as text for the terminal."""
    recalls = (
        f"{TITLES[arm['arm']]} {100 * arm['by_name']['recall']:.1f} % by name, "
        f"{100 * arm['with_others']['recall']:.1f} % with the other attributes given"
        for arm in facts["arms"]
    )
    return f"recall of facts about {facts['people']:,} people: " + "; ".join(recalls)


def _key(preset: Preset) -> str:
    return key_of(vars(preset.facts), preset.seed, key_of_code(*CODE))


def _half_epochs(preset: Preset) -> int:
    """Epochs of plain's first half."""
    return preset.facts.updates // 2 // epoch_of(preset.facts.people)


def _half(preset: Preset, folder: Path) -> Path:
    """Plain's checkpoint after half of its updates."""
    return folder / "plain" / f"checkpoint{_half_epochs(preset)}.pt"


def _flags(arm: str, preset: Preset, folder: Path) -> List[str]:
    facts, starts_at_half = preset.facts, arm == "resm_init"
    flags = [str(folder / "data" / "bin"), "--user-dir", str(PACKAGE)]
    flags += training_flags(
        facts.updates, facts.lr, preset.seed, _half_epochs(preset), starts_at_half
    )
    if not starts_at_half:
        return [*flags, *PLAIN]
    flags += memory_flags("resm_roberta_tiny", facts.n_keys, facts.value_lr)
    return [*flags, "--init-from", str(_half(preset, folder))]


def _train(waiting: List[str], preset: Preset, folder: Path, key: str) -> None:
    """Train arms; an interrupted arm starts again from the beginning."""
    for arm in waiting:  # all before the first arm starts, because ResM waits for plain's half
        clear(folder / arm)

    def start(children: Children, arm: str, worker: int) -> Child:
        flags = _flags(arm, preset, folder)
        return start_training(children, folder / arm, flags, {"OMP_NUM_THREADS": "1"})

    def show(arm: str) -> None:
        logged = read_log(folder / arm / LOG, "train_inner")
        updates = int(logged[-1]["num_updates"]) if logged else 0
        state = f"perplexity {logged[-1]['ppl']:.1f}" if logged else "nothing logged yet"
        own = preset.facts.updates // (2 if arm == "resm_init" else 1)
        progress.show(f"facts, {arm}", updates, own, state)

    def end(arm: str, status: int) -> None:
        log = folder / arm / LOG
        if status or not (folder / arm / LAST).exists():
            raise ValueError(f"training {arm} on facts failed, see {log}: {last_line(log)}")
        finish(folder / arm, key)
        progress.end(f"facts, {arm}", "finished")

    def is_ready(arm: str) -> bool:
        return arm == "plain" or _half(preset, folder).exists()

    with RunsProgress(len(waiting)) as progress:
        run_all(waiting, WORKERS, start, show, end, is_ready)


def _measure(preset: Preset, folder: Path) -> Dict[str, Any]:
    data = folder / "data" / "bin"
    loaded = {arm: load(folder / arm / LAST, data) for arm in ARMS}
    arms = []
    for arm, (model, task) in loaded.items():
        people = read_people(data, "train", task.source_dictionary)
        found = measure(model, task.mask_idx, people, ablate=True)
        checkpoint = str(folder / arm / LAST)
        sizes = {"arm": arm, "checkpoint": checkpoint, "parameters": parameter_count(model)}
        arms.append({**sizes, **found})
    control = read_people(data, "test", task.source_dictionary)
    guessed = max(
        measure(model, task.mask_idx, control)["by_name"]["recall"]
        for model, task in loaded.values()
    )
    return {
        "people": preset.facts.people,
        "updates": preset.facts.updates,
        "guessed": guessed,  # recall of people who are in no training text
        "arms": arms,
        "example": _example(loaded, folder / "data" / "train.pieces"),
    }


def _example(loaded: Dict[str, Loaded], text: Path) -> Dict[str, Any]:
    """The first person, with the first attribute masked."""
    words = text.read_text(encoding="utf-8").splitlines()[0].split()
    assert len(words) == len(NAMES) + len(ATTRIBUTES)
    at = len(NAMES)
    sentence = " ".join([*words[:at], "<mask>", *words[at + 1 :]])
    top = {arm: fill_mask(model, Words(), sentence, top=3) for arm, model in loaded.items()}
    return {"sentence": sentence, "answer": words[at], "top": top}
