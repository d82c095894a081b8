"""A process that has imported fairseq, whose children are fairseq's commands.

Usage: commands.py FILE-DESCRIPTOR. Importing takes most of the time of a short run. This process
imports once what the commands import, but for the plugin. Each command is a child of it (fork), and
ends as the command would, by ``sys.exit`` of its ``cli_main``. It is asked by JSON lines on the
standard input, {"argv": [...], "cwd": FOLDER, "output": FILE}, and writes the status of each to the
descriptor.
"""

import gc
import json
import os
import sys

from fairseq_cli import train  # isort: skip  (first: it sets logging up, as in fairseq-train)
import numba  # noqa: F401
import scipy.stats  # noqa: F401
import sklearn.metrics  # noqa: F401
import torch._dynamo  # noqa: F401
from fairseq_cli import hydra_train, preprocess, validate

COMMANDS = {
    "fairseq-train": train.cli_main,
    "fairseq-validate": validate.cli_main,
    "fairseq-hydra-train": hydra_train.cli_main,
    "fairseq-preprocess": preprocess.cli_main,
}


def become(asked: dict) -> None:
    """Be the command; it writes to a file, and reads nothing."""
    output = os.open(asked["output"], os.O_WRONLY | os.O_APPEND)
    for stream, there in ((0, os.open(os.devnull, os.O_RDONLY)), (1, output), (2, output)):
        os.dup2(there, stream)
    os.chdir(asked["cwd"])
    sys.argv = asked["argv"]
    sys.exit(COMMANDS[os.path.basename(sys.argv[0])]())


if __name__ == "__main__":
    sys.path.pop(0)  # the folder of this file, which commands do not see
    gc.freeze()  # children do not copy what they only count
    with os.fdopen(int(sys.argv[1]), "w") as answers:
        for line in sys.stdin:
            child = os.fork()
            if child == 0:
                become(json.loads(line))
            _, ended = os.waitpid(child, 0)
            print(os.waitstatus_to_exitcode(ended), file=answers, flush=True)
