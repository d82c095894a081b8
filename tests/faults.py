"""Kill a training again and again, and compare it with the same training left alone."""

import contextlib
import json
import random
import re
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import torch

from pkm_fairseq.experiments.runs.folders import PACKAGE
from pkm_fairseq.experiments.runs.logs import read_log
from pkm_fairseq.experiments.runs.processes import Children
from pkm_fairseq.experiments.runs.trainings import LAST, updates_of
from pkm_fairseq.memory.files import write_file
from pkm_fairseq.memory.observe.log import FILE, load_initial_values, read_usage_log
from pkm_fairseq.memory.parts import has_parts
from pkm_fairseq.models.checkpoints import read_checkpoint
from pkm_fairseq.models.merge import merge

MOMENTS = ("starting", "training", "saving")
SHARES = (1, 3, 3)  # of kills at these moments
POLL = 0.001  # seconds
PATIENCE = 600.0  # seconds without a new update
LOADED = re.compile(r"Loaded checkpoint .*checkpoint_last\.pt \(epoch \d+ @ (\d+) updates\)")
UPDATE = re.compile(r'\| train_inner \| .*"num_updates": "(\d+)"')
WRITING = re.compile(r"\(writing took ([\d.]+) seconds\)")

# a ResM with enough slots that saving takes a while; dropout and counts of usage are on, for they
# must survive too, and no validation has the tokens of a whole count
FLAGS = (
    f"--user-dir {PACKAGE} --task pkm_masked_lm --criterion pkm_masked_lm --tokens-per-sample 32 "
    "--batch-size 8 --arch resm_roberta_tiny --encoder-layers 2 --encoder-embed-dim 32 "
    "--encoder-ffn-embed-dim 64 --encoder-attention-heads 2 --memory-layers 1 "
    "--memory-n-keys 128 --memory-heads 2 --memory-knn 8 --memory-k-dim 32 "
    "--memory-usage-interval 10 --memory-usage-tokens 1000 --optimizer pkm_adam --lr 1e-3 "
    "--seed 1 --num-workers 0 --cpu --log-format json --log-interval 1 --max-valid-steps 2 "
    "--no-epoch-checkpoints --keep-interval-updates 2"
)


@dataclass(frozen=True)
class Choices:
    """What to do.

    Args:
        data: a folder that fairseq-preprocess made.
        out: a new folder; gets checkpoints, logs and ``result.json``.
        kills: how many.
        seed: of the moments.
        updates: of the whole training.
        interval: updates between checkpoints.
        further: flags for fairseq-train that win over those of the tiny model.

    Raises:
        ValueError: the numbers do not fit together, or the folder is not new.
    """

    data: Path
    out: Path
    kills: int
    seed: int
    updates: int
    interval: int
    further: Tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kills < 1 or self.interval < 1:
            raise ValueError(
                f"{self.kills} kills, a checkpoint every {self.interval} updates: "
                "both must be at least 1"
            )
        if self.updates < 10 * self.interval:
            raise ValueError(
                f"{self.updates} updates are too few: with a checkpoint every {self.interval} "
                f"they must be at least {10 * self.interval}"
            )
        if not (self.data / "dict.txt").is_file():
            raise ValueError(f"{self.data / 'dict.txt'}: no such file; prepare the data first")
        if self.out.exists() and any(self.out.iterdir()):
            raise ValueError(f"{self.out} is not empty: choose a new folder")


@dataclass(frozen=True)
class Pace:
    """Seconds that the training left alone took: to begin, for an interval, for a save."""

    start: float
    interval: float
    save: float


class Training:
    """A process of fairseq-train."""

    def __init__(self, children: Children, choices: Choices, save_dir: Path, log: Path) -> None:
        self.save_dir, self.log = save_dir, log
        self.began = time.time()
        self._updates, self._unread = 0, ""
        command = [
            str(Path(sys.executable).parent / "fairseq-train"),
            str(choices.data),
            *FLAGS.split(),
        ]
        command += ["--save-dir", str(save_dir), "--max-update", str(choices.updates)]
        command += ["--save-interval-updates", str(choices.interval), *choices.further]
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as out:
            self._child = children.start(command, out, environment={"OMP_NUM_THREADS": "1"})
        self._children = children
        self._tail = log.open(encoding="utf-8", errors="replace")

    def kill(self) -> None:
        """SIGKILL, to the process and all it may have started."""
        if self._child.status is None:
            self._child.kill()

    def close(self) -> None:
        """Read the log no further."""
        self._tail.close()

    def wait_for(self, happened: Callable[[], bool]) -> None:
        """Wait for something to happen.

        Raises:
            ValueError: the process ended before, or nothing happens.
        """
        deadline = time.monotonic() + PATIENCE
        while not happened():
            if self._child.status is not None:
                raise ValueError(
                    f"the training ended with status {self._child.status} before its kill, "
                    f"see {self.log}"
                )
            if time.monotonic() > deadline:
                raise ValueError(f"nothing happens for {PATIENCE:.0f} seconds, see {self.log}")
            self._children.pause(POLL)

    def finish(self) -> None:
        """Wait for the end; ValueError if it is not a good one."""
        while self._child.status is None:
            self._children.pause(POLL)
        if self._child.status:
            raise ValueError(f"the training ended with status {self._child.status}, see {self.log}")

    def updates(self) -> int:
        """The last update that was logged, 0 before the first."""
        *lines, self._unread = (self._unread + self._tail.read()).split("\n")
        for logged in filter(None, map(UPDATE.search, lines)):
            self._updates = int(logged[1])
        return self._updates

    def is_saving(self) -> bool:
        """Whether a checkpoint is being written, or was when this process was killed."""
        with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
            return any(part.stat().st_mtime > self.began for part in _parts(self.save_dir))
        return False


@contextlib.contextmanager
def started(choices: Choices, save_dir: Path, log: Path) -> Iterator[Training]:
    """A training that is ended with this context, if it has not ended before."""
    with Children() as children:
        training = Training(children, choices, save_dir, log)
        try:
            yield training
        finally:
            training.close()


def kill_training(choices: Choices, say: Callable[[str], None]) -> Dict[str, Any]:
    """Train once in peace and once with kills, and look at what each kill leaves.

    Args:
        choices: what to do.
        say: gets a line of progress now and then.

    Returns:
        The result, which is also in ``result.json``.

    Raises:
        ValueError: something was lost, half-written or different; the message says what.
    """
    began = time.monotonic()
    straight, killed, logs = (choices.out / name for name in ("straight", "killed", "logs"))
    say(f"training {choices.updates} updates without a kill")
    pace = _train_in_peace(choices, straight, logs / "straight.log")
    losses = _losses(logs / "straight.log")
    kills: List[Dict[str, Any]] = []
    resumed = 0  # updates in the checkpoint that the next process must go on from
    for moment, target in _plan(choices):
        number = len(kills) + 1
        log = logs / f"kill{number:03d}.log"
        try:
            hit = _kill_one(choices, killed, log, moment, target, pace)
            found = _examine(killed, straight, log, losses, resumed, choices.interval)
        except ValueError as error:
            raise ValueError(f"kill {number} ({moment}, seed {choices.seed}): {error}") from None
        kills.append({"moment": moment, "hit_a_save": hit, "resumed": resumed, **found})
        resumed = found["kept"]
        say(
            f"kill {number:3d}/{choices.kills} while {moment:8}: had reached update "
            f"{found['reached']}, goes on from {resumed}"
            + (", a save was under way" if hit else "")
        )
    say("training to the end")
    with started(choices, killed, logs / "end.log") as training:
        training.finish()
    _examine(killed, straight, logs / "end.log", losses, resumed, choices.interval)
    result = {
        **{"kills": len(kills), "seed": choices.seed, "updates": choices.updates},
        "further": choices.further,
        **{"interval": choices.interval, "seconds": round(time.monotonic() - began, 1)},
        "by_moment": {m: sum(kill["moment"] == m for kill in kills) for m in MOMENTS},
        "hit_a_save": sum(kill["hit_a_save"] for kill in kills),
        "most_lost": max(kill["reached"] - kill["kept"] for kill in kills),
        "updates_done": sum(kill["done"] for kill in kills) + choices.updates - resumed,
        "equal": _compare_ends(straight, killed),
        "each": kills,
    }
    write_file(choices.out / "result.json", json.dumps(result, indent=2) + "\n")
    return result


def _plan(choices: Choices) -> List[Any]:
    """Moments of the kills, and updates at which they are due, in their order."""
    chance = random.Random(choices.seed)
    end = choices.updates - 5 * choices.interval  # no process must end before its kill
    targets = sorted(chance.randint(1, end) for _ in range(choices.kills))
    moments = [MOMENTS[i % 3] for i in range(choices.kills)]  # each, if there are three
    moments[3:] = chance.choices(MOMENTS, SHARES, k=len(moments[3:]))
    return list(zip(moments, targets, strict=True))


def _train_in_peace(choices: Choices, save_dir: Path, log: Path) -> Pace:
    began = time.monotonic()
    with started(choices, save_dir, log) as training:
        training.wait_for(lambda: training.updates() > 0)
        start = time.monotonic()
        training.wait_for(lambda: training.updates() == choices.updates)
        interval = (time.monotonic() - start) * choices.interval / choices.updates
        training.finish()
    saves = [float(seconds) for seconds in WRITING.findall(log.read_text())]
    return Pace(start - began, interval, statistics.median(saves))


def _kill_one(
    choices: Choices, save_dir: Path, log: Path, moment: str, target: int, pace: Pace
) -> bool:
    """Start a process, kill it at a moment that chance chooses, and say whether that hit a save."""
    chance = random.Random(f"{choices.seed} {log.name}")
    with started(choices, save_dir, log) as training:
        if moment != "starting":
            training.wait_for(lambda: training.updates() >= target)
        if moment == "saving":
            training.wait_for(training.is_saving)
        longest = {"starting": pace.start, "training": pace.interval, "saving": pace.save}[moment]
        deadline = time.monotonic() + chance.uniform(0.0, longest)
        # the machine may have become faster meanwhile
        latest = training.updates() + (1 if moment == "starting" else 2 * choices.interval)
        while time.monotonic() < deadline and training.updates() < latest:
            time.sleep(POLL)
        training.kill()
        if training.updates() == choices.updates:
            raise ValueError("the training was faster than its kill: take more updates")
        return training.is_saving()


def _examine(
    save_dir: Path,
    straight: Path,
    log: Path,
    losses: Dict[str, Dict[int, float]],
    resumed: int,
    interval: int,
) -> Dict[str, Any]:
    """What a process leaves behind.

    Returns:
        ``reached``: its last update; ``kept``: updates in its last checkpoint; ``done``: how many
        updates it logged.

    Raises:
        ValueError: a file is not whole, a loss is not that of the training left alone, the process
            did not go on from the last checkpoint, or it lost more than an interval.
    """
    text = log.read_text(encoding="utf-8", errors="replace")
    own = _losses(log)
    for tag, found in own.items():
        for update, loss in found.items():
            if loss != losses[tag].get(update):
                raise ValueError(
                    f"{tag} loss after update {update} is {loss}, without kills "
                    f"{losses[tag].get(update)}, see {log}"
                )
    done = sorted(own["train_inner"])
    from_where = LOADED.search(text)
    if (from_where and int(from_where[1]) != resumed) or (done and done[0] != resumed + 1):
        raise ValueError(f"it did not go on from update {resumed}, see {log}")
    kept = _check_checkpoints(save_dir)
    reached = max([resumed, *done])
    if not resumed <= kept <= reached + 1 or reached - kept > interval:
        raise ValueError(f"had reached update {reached}, but {LAST} has {kept}")
    if (save_dir / FILE).is_file():
        read_usage_log(save_dir / FILE)  # raises if it is damaged
    initial = load_initial_values(save_dir)
    if initial is not None and differing(initial, load_initial_values(straight)):
        raise ValueError(f"the initial values in {save_dir} are not those of the training")
    left = _parts(save_dir)
    if len(left) > 1:
        raise ValueError(f"temporary files pile up: {', '.join(map(str, left))}")
    return {"reached": reached, "kept": kept, "done": len(done)}


def _check_checkpoints(save_dir: Path) -> int:
    """See that all checkpoints are whole; the updates of the last one, 0 if there is none."""
    updates = {}
    for file in sorted(save_dir.glob("checkpoint*.pt")):
        updates[file.name] = updates_of(file)
        named = re.fullmatch(r"checkpoint_\d+_(\d+)\.pt", file.name)
        if named and int(named[1]) != updates[file.name]:
            raise ValueError(f"{file} has {updates[file.name]} updates")
    return updates.get(LAST, 0)


def _compare_ends(straight: Path, killed: Path) -> Dict[str, int]:
    """How many tensors and counts of usage of the two trainings are equal: all.

    Raises:
        ValueError: some are not.
    """
    ends = [_whole(folder / LAST) for folder in (straight, killed)]
    states = [{key: end[key] for key in ("model", "last_optimizer_state")} for end in ends]
    different = differing(*states)
    if different:
        raise ValueError(f"the ends differ in {len(different)} tensors: {', '.join(different[:5])}")
    counts = [
        [record for record in read_usage_log(folder / FILE)[1] if record["split"] != "train"]
        for folder in (straight, killed)
    ]
    if counts[0] != counts[1]:
        raise ValueError("the counts of memory usage in validation differ")
    left = [file.name for file in killed.iterdir() if file.suffix in (".part", ".tmp")]
    if left or load_initial_values(killed) is None:
        raise ValueError(f"{killed} holds {', '.join(left) or 'no initial values'}")
    return {"tensors": _count_tensors(states[0]), "validation_counts": len(counts[0])}


def differing(one: Any, other: Any, name: str = "") -> List[str]:
    """Names of what is not equal, to the bit, in two nested dicts and lists of tensors."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [name]
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [d for key in one for d in differing(one[key], other[key], f"{name}/{key}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [d for i, x in enumerate(one) for d in differing(x, other[i], f"{name}/{i}")]
    return [] if type(one) is type(other) and one == other else [name]


def _whole(checkpoint: Path) -> Dict[str, Any]:
    """A checkpoint with its values and moments, wherever they are."""
    stored = read_checkpoint(str(checkpoint), "checkpoint")
    if not has_parts(stored):
        return stored
    merged = checkpoint.parent.with_name(f"{checkpoint.parent.name}_merged.pt")
    merge(checkpoint, merged)
    return read_checkpoint(str(merged), "checkpoint")


def _count_tensors(state: Any) -> int:
    if isinstance(state, (dict, list)):
        return sum(map(_count_tensors, state.values() if isinstance(state, dict) else state))
    return int(isinstance(state, torch.Tensor))


def _losses(log: Path) -> Dict[str, Dict[int, float]]:
    """Losses by update, in training and in validation."""
    return {
        tag: {int(line["num_updates"]): line["loss"] for line in read_log(log, tag)}
        for tag in ("train_inner", "valid")
    }


def _parts(save_dir: Path) -> List[Path]:
    """Temporary files of checkpoints: ours, and those that fairseq itself would write."""
    return [*save_dir.glob("saving*"), *save_dir.glob("*.tmp")]
