"""Several trainings by fairseq-train's entry point in one process, which saves their starts.

Usage: several.py FILE, a JSON list of the arguments of each training. As in processes of their
own, each begins by seeding every generator; workers join a process group once. FILE.states gets a
line for the state of the model at the start of each training and after each update.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from fairseq_cli import train

STATES = Path(sys.argv[1] + ".states")


class WatchedTrainer(train.Trainer):  # type: ignore[misc]
    """fairseq's trainer, which notes what this worker's model is."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.note()

    def train_step(self, *args: Any, **kwargs: Any) -> Any:
        """Do an update, and note the state after it."""
        done = super().train_step(*args, **kwargs)
        self.note()
        return done

    def note(self) -> None:
        """Write a hash of parameters and running statistics; when slots were read is apart."""
        digest = hashlib.sha256()
        for name, tensor in self.get_model().state_dict().items():
            if ".reads." not in name:
                digest.update(name.encode() + tensor.numpy().tobytes())
        with STATES.open("a") as out:
            print(self.get_num_updates(), digest.hexdigest(), file=out)


if __name__ == "__main__":
    train.Trainer = WatchedTrainer
    for arguments in json.loads(Path(sys.argv[1]).read_text()):
        sys.argv = ["fairseq-train", *arguments]
        train.cli_main()
