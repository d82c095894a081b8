"""What trainings logged, and how several are scheduled."""

import sys

import pytest

from pkm_fairseq.experiments.runs import trainings
from pkm_fairseq.experiments.runs.logs import last_line, logged_by_update, read_log
from pkm_fairseq.experiments.runs.progress import RunsProgress
from pkm_fairseq.experiments.runs.trainings import LOG, run_all, start_training


def test_the_log_of_a_subset(tmp_path):
    log = tmp_path / LOG
    assert logged_by_update(log, "valid") == {}
    log.write_text(
        'x | valid | {"valid_mcc": "3.5", "valid_gini": null, "valid_num_updates": "10"}\n'
        'x | valid | {"valid_mcc": "1.5", "valid_num_updates": "5"}\n'
        'x | valid | {"valid_mcc": "2.5", "valid_num_updates": null}\n'  # no update was made
        'x | valid1 | {"valid1_mcc": "2.5", "valid1_num_updates": "5"}\n'
        'x | train_inner | {"loss": "7", "num_updates": "5"}\n'
        'x | valid | {"valid_mcc": "4.5", "valid_num_updates": "5"}\n'  # after an interruption
        'x | valid | {"valid_mcc": '
    )
    assert logged_by_update(log, "valid") == {
        5: {"mcc": 4.5, "num_updates": 5},
        10: {"mcc": 3.5, "num_updates": 10},
    }
    assert [numbers["mcc"] for numbers in read_log(log, "valid")] == [4.5, 3.5]
    assert read_log(log, "valid1") == [{"mcc": 2.5, "num_updates": 5}]
    assert read_log(log, "train_inner") == [{"loss": 7, "num_updates": 5}]
    assert last_line(log) == 'x | valid | {"valid_mcc":'


def test_a_line_that_a_kill_cut_off_is_skipped_with_the_one_that_follows_it(tmp_path):
    log = tmp_path / LOG
    good = 'x | valid | {"valid_mcc": "4.5", "valid_num_updates": "5"}\n'
    log.write_text(f'x | valid | {{"valid_mcc": "1{good}{good.replace("5", "6")}')
    assert logged_by_update(log, "valid") == {6: {"mcc": 4.6, "num_updates": 6}}


def test_a_process_that_said_nothing(tmp_path):
    (tmp_path / LOG).touch()
    assert last_line(tmp_path / LOG) == "it printed nothing"


def events(runs, workers, status=lambda run: 0, **more):
    """What happens in a schedule of processes that wait for a file, and make the next one's."""
    happened = []

    def start(children, run, worker):
        happened.append(("start", run, worker))
        code = f"import sys; sys.exit({status(run)})"
        with open("/dev/null", "wb") as out:
            return children.start([sys.executable, "-S", "-c", code], out)

    def finish(run, status):
        happened.append(("finish", run, status))
        if status:
            raise ValueError(f"{run} failed")

    try:
        run_all(runs, workers, start, lambda run: None, finish, **more)
    except ValueError as error:
        happened.append(str(error))
    return happened


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(trainings, "POLL", 0.01)


def test_one_worker_does_the_runs_in_their_order():
    order = [event for run in "abc" for event in (("start", run, 0), ("finish", run, 0))]
    assert events("abc", 1) == order


def test_workers_have_numbers_that_none_else_has_at_the_same_time():
    happened = events("abcdef", 3)
    busy = {}
    for kind, run, number in happened:
        if kind == "start":
            assert number in range(3) and number not in busy.values()
            busy[run] = number
        else:
            assert number == 0
            del busy[run]
    assert not busy and len(happened) == 12
    assert [number for kind, _, number in happened[:3] if kind == "start"] == [0, 1, 2]


def test_what_is_not_ready_is_overtaken():
    done = []

    def is_ready(run):
        return run != "late" or "early" in done

    happened = events(
        ["late", "early"], 2, status=lambda run: done.append(run) or 0, is_ready=is_ready
    )
    assert [run for kind, run, _ in happened if kind == "start"] == ["early", "late"]


def test_without_workers_nothing_can_be_done():
    assert events("ab", 0) == ["workers is 0, must be at least 1"]


def test_runs_that_wait_for_what_no_run_makes_are_named():
    happened = events("abc", 2, is_ready=lambda run: run == "b")
    assert [kind for kind, *_ in happened[:2]] == ["start", "finish"]
    assert happened[2:] == ["a, c cannot start: no run is left that they could wait for"]


def test_nothing_is_started_after_a_failure():
    happened = events("abc", 1, status=lambda run: int(run == "b"))
    assert happened[-2:] == [("finish", "b", 1), "b failed"]
    assert not [event for event in happened if event[1] == "c"]


def test_a_folder_is_trained_in_by_one_process(tmp_path):
    with trainings.Children() as children:
        with (tmp_path / "out").open("wb") as out:
            sleep = [sys.executable, "-S", "-c", "import time; time.sleep(600)"]
            children.start(sleep, out, lock=tmp_path / "lock")
        with pytest.raises(ValueError, match="is being trained by another process"):
            start_training(children, tmp_path, [], {})


def test_progress_without_a_terminal_is_a_line_now_and_then(capsys):
    for interval, lines in ((600, []), (0, ["  a          3/9 updates, good"])):
        with RunsProgress(2, 1, interval) as progress:
            progress.show("a", 3, 9, "good")
            progress.end("a", "very good")
        said = capsys.readouterr().out.splitlines()
        assert said == ["1 of 2 runs are finished already", *lines, "[2/2] a: very good"]
