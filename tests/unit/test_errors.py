"""Errors that the user can mend: ValueError, and one line where a command of fairseq runs."""

import multiprocessing
import subprocess
import sys
import traceback
from types import SimpleNamespace

import pytest
import torch
from fairseq.distributed import utils as distributed_utils
from hydra.core.utils import JobReturn, JobStatus
from torch.multiprocessing.spawn import ProcessRaisedException

import pkm_fairseq
from pkm_fairseq.compat.commands import Stoppable, Stopped, end_in_one_line
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


def of_fairseq(code):
    return caught(exec, compile(code, "x.py", "exec"), {"__name__": "fairseq.trainer"})


@pytest.mark.parametrize(
    ("code", "line"),
    [
        ("raise Exception('the dataset\\n  is empty')", "the dataset is empty"),
        ("raise FloatingPointError('gradients are Nan/Inf')", "gradients are Nan/Inf"),
        ("assert False, 'must specify a batch size'", "must specify a batch size"),
        ("open('/nowhere')", "[Errno 2] No such file or directory: '/nowhere'"),
        ("import no_such_module", "No module named 'no_such_module'"),
        ("assert False", None),
        ("raise NotImplementedError", None),
        ("{}['key']", None),
        ("1 / 0", None),
    ],
)
def test_what_fairseq_refuses_has_a_line(code, line):
    assert line_of(of_fairseq(code)) == line


def test_what_torch_says_of_a_model_that_does_not_fit_is_added():
    error = covered(
        lambda: torch.nn.Linear(1, 2).load_state_dict(torch.nn.Linear(1, 1).state_dict())
    )
    assert line_of(error).startswith("Cannot load Error(s) in loading state_dict for Linear: size")


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
    common = SimpleNamespace(cpu=True, tpu=False)
    return SimpleNamespace(distributed_training=training, common=common)


@pytest.mark.parametrize("call", [lambda f, *args: f(*args), command])
@pytest.mark.parametrize("error", [mistake, bug, others])
def test_whoever_calls_fairseq_gets_the_error_itself(call, error):
    with pytest.raises(ValueError) as caught:
        call(distributed_utils.call_main, config(), error)
    assert type(caught.value) is ValueError


def worker(main):
    """What a spawned worker hands over, as text."""
    try:
        command(main)
    except Exception:  # of any kind, as torch's spawn hands it over
        return ProcessRaisedException(traceback.format_exc(), 0, 1)


def test_what_nobody_catches_is_one_line_in_a_command(capsys, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", lambda *_: print("the traceback", file=sys.stderr))
    end_in_one_line()
    for end in (sys.excepthook, command(end_in_one_line) or sys.excepthook):
        for error in (caught(mistake), caught(bug), worker(Stoppable(bug))):
            end(type(error), error, error.__traceback__)
    told = capsys.readouterr().err.splitlines()
    assert told == [*3 * ["the traceback"], LINE, *2 * ["the traceback"]]


def test_a_worker_hands_over_its_line(capsys, monkeypatch):
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: "the command")
    monkeypatch.setattr(sys, "excepthook", lambda *_: print("the traceback", file=sys.stderr))
    command(end_in_one_line)
    for error in (worker(Stoppable(mistake)), worker(Stoppable(bug)), worker(mistake)):
        sys.excepthook(type(error), error, error.__traceback__)
    assert capsys.readouterr().err.splitlines() == [LINE, "the traceback", "the traceback"]


def test_what_main_returns_and_takes_is_passed_on(monkeypatch):
    assert Stoppable(lambda *args, **kwargs: (args, kwargs))(1, a=2) == ((1,), {"a": 2})
    with pytest.raises(ValueError, match=LINE):
        Stoppable(mistake)(1)
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: "the command")
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
