"""Errors that the user can mend: ValueError, and one line where a command of fairseq runs."""

import subprocess
from types import SimpleNamespace

import pytest
import torch
from fairseq.distributed import utils as distributed_utils
from hydra.core.utils import JobReturn, JobStatus

import pkm_fairseq
from pkm_fairseq.compat.commands import Stoppable, Stopped
from pkm_fairseq.errors import for_command, line_of, running_command
from pkm_fairseq.memory import MemoryConfig, product_topk

pkm_fairseq.register()
LINE = "knn is 9, must be at most n_keys, which is 4"


def mistake(*args, **kwargs):
    return MemoryConfig(n_keys=4, knn=9)


def bug(*args, **kwargs):
    """A ValueError in our code that nobody meant: of int(), for want of a bytes-like object."""
    return eval(compile("int('x')", "there.py", "eval"), {"__name__": "pkm_fairseq.there"})


def others(*args, **kwargs):
    raise ValueError("not ours")


def command(function, *args, **kwargs):
    """Call a function as a command of fairseq does."""
    names = {"function": function, "args": args, "kwargs": kwargs}
    code = compile(
        "def cli_main():\n    return function(*args, **kwargs)\n", "fairseq_cli/x.py", "exec"
    )
    exec(code, names)
    return names["cli_main"]()


def caught(function, *args):
    try:
        function(*args)
    except Exception as error:
        return error
    raise AssertionError("it must fail")


def covered(function, module="fairseq.trainer", by="Exception('Cannot load')"):
    """The error by which fairseq covers another."""
    code = f"try:\n    function()\nexcept Exception:\n    raise {by}\n"
    names = {"function": function, "__name__": module}
    return caught(exec, compile(code, "x.py", "exec"), names)


def test_an_error_of_ours_has_a_line():
    assert line_of(caught(mistake)) == LINE
    nothing = torch.empty(0, 1, 2, 2)
    assert line_of(caught(product_topk, nothing, torch.empty(1, 2, 4, 2), 9)) is not None


@pytest.mark.parametrize("error", [bug, others, lambda: {}[0]])
def test_any_other_error_has_none(error):
    assert line_of(caught(error)) is None
    assert line_of(covered(error)) is None


def test_what_fairseq_covers_comes_through():
    assert line_of(covered(mistake)) == LINE
    assert line_of(covered(mistake, module="elsewhere")) is None


def test_an_error_in_our_own_handling_is_not_covered_up():
    assert line_of(covered(mistake, module="pkm_fairseq.there", by="KeyError(1)")) is None


def test_a_command_is_one_of_fairseqs():
    assert not running_command()
    assert command(running_command)
    assert isinstance(for_command(ValueError("x")), ValueError)
    assert command(for_command, ValueError("x")).args == ("x",)
    assert isinstance(command(for_command, ValueError("x")), SystemExit)


def config():
    training = SimpleNamespace(distributed_world_size=1, distributed_init_method=None, tpu=False)
    training.pipeline_model_parallel = False
    return SimpleNamespace(
        distributed_training=training, common=SimpleNamespace(cpu=True, tpu=False)
    )


def test_a_command_ends_with_the_line_and_a_program_does_not():
    with pytest.raises(SystemExit) as stopped:
        command(distributed_utils.call_main, config(), mistake)
    assert stopped.value.code == LINE
    assert stopped.value.__suppress_context__
    with pytest.raises(ValueError, match=LINE):
        distributed_utils.call_main(config(), mistake)


@pytest.mark.parametrize("error", [bug, others])
def test_a_command_shows_where_a_bug_is(error):
    with pytest.raises(ValueError):
        command(distributed_utils.call_main, config(), error)


def test_what_main_returns_and_takes_is_passed_on():
    assert Stoppable(lambda *args, **kwargs: (args, kwargs))(1, a=2) == ((1,), {"a": 2})
    with pytest.raises(Stopped, match=LINE):
        Stoppable(mistake)(1)


def job(error):
    """As hydra keeps what a job has raised."""
    done = JobReturn()
    done.overrides = []
    done.return_value = error
    done.status = JobStatus.FAILED
    return done


def test_a_job_of_hydra_ends_with_the_line_and_a_program_does_not(capsys):
    with pytest.raises(SystemExit, match=LINE):
        command(job, caught(mistake))
    with pytest.raises(ValueError, match=LINE):
        _ = job(caught(mistake)).return_value
    with pytest.raises(ValueError, match="not ours"):
        _ = command(job, caught(others)).return_value
    done = JobReturn()
    done.return_value, done.status = 3, JobStatus.COMPLETED
    assert done.return_value == 3


def test_nothing_in_the_library_ends_the_process():
    """But for what is called where a command runs only."""
    found = subprocess.run(
        [
            "grep",
            "-rlE",
            r"raise SystemExit|sys\.exit|os\._exit",
            pkm_fairseq.__path__[0],
            "--include=*.py",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    names = sorted(line.split("pkm_fairseq/", 1)[1] for line in found.stdout.splitlines())
    assert names == ["compat/commands.py"]
