"""Cells of a study: trained once, kept whole, not mixed up, and worked off by several processes."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from experiments import cells, files, locks
from experiments.errors import ExperimentError
from experiments.status import StatusConfig, status

REPOSITORY = Path(__file__).parents[2]


def cell(path, settings=None, run=lambda: {"accuracy": 0.5}):
    return cells.Cell(path, settings or {}, run)


def test_a_finished_cell_is_not_run_again(tmp_path):
    path, settings, calls = tmp_path / "cells" / "one.json", {"strength": 0.1}, []

    def run():
        calls.append(1)
        return {"accuracy": 0.5}

    for _ in range(2):
        assert cell(path, settings, run).result() == {"accuracy": 0.5}
    assert len(calls) == 1
    assert json.loads(path.read_text())["settings"] == settings
    assert list(path.parent.iterdir()) == [path]


def test_a_lock_that_a_killed_process_left_of_a_finished_cell_is_removed(tmp_path):
    path = tmp_path / "one.json"
    cell(path).result()
    for file in (cells.lock_of(path), locks.told_in(cells.lock_of(path))):
        file.touch()
    assert cell(path).result() == {"accuracy": 0.5}
    assert list(tmp_path.iterdir()) == [path]
    with locks.held(cells.lock_of(path), path):
        cell(path).result()
        assert locks.is_held(cells.lock_of(path))


def test_a_cell_that_fails_has_no_result(tmp_path):
    def run():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cell(tmp_path / "one.json", run=run).result()
    assert not (tmp_path / "one.json").exists()
    assert cell(tmp_path / "one.json").result() == {"accuracy": 0.5}  # the lock is free again


def test_a_cell_of_other_settings_is_an_error(tmp_path):
    path = tmp_path / "one.json"
    cell(path, {"strength": 0.1, "seed": 0}).result()
    with pytest.raises(ExperimentError, match=r"strength was 0\.1 and is now 0\.2\. Choose another --folder"):
        cell(path, {"strength": 0.2, "seed": 0}).result()


@pytest.mark.parametrize("content", ["", '{"settings": {}, "res', '{"settings": {}}', "[]"])
def test_a_damaged_cell_is_told_and_run_again(content, tmp_path, capsys):
    path = tmp_path / "one.json"
    path.write_text(content)
    assert cell(path).result() == {"accuracy": 0.5}
    assert "is damaged" in capsys.readouterr().err
    assert json.loads(path.read_text())["result"] == {"accuracy": 0.5}


def test_a_cell_that_is_held_is_left_for_later(tmp_path, monkeypatch):
    """Another process holds the first cell, so the second is taken first, and the first when it is free."""
    first, second = cell(tmp_path / "first.json"), cell(tmp_path / "second.json", run=lambda: {"accuracy": 0.6})
    monkeypatch.setattr(locks, "PATIENCE", 0.0)
    monkeypatch.setattr(cells, "PAUSE", 0.0)
    order = []
    with locks.held(cells.lock_of(first.path), first.path):
        pass
    other = locks.held(cells.lock_of(first.path), first.path)
    other.__enter__()

    def tell(place, result):
        order.append((place, result["accuracy"]))
        if place == 1:
            other.__exit__(None, None, None)

    assert cells.work_off([first, second], tell) == [{"accuracy": 0.5}, {"accuracy": 0.6}]
    assert order == [(1, 0.6), (0, 0.5)]


WORKER = """
import os, sys
from pathlib import Path
from experiments import cells

cells.PAUSE = 0.02
folder, log, dies_in = Path(sys.argv[1]), sys.argv[2], sys.argv[3]

def run(name):
    with open(log, "a") as file:
        file.write(name + "\\n")
    if name == dies_in:
        os.kill(os.getpid(), 9)
    return {"name": name, "sum": sum(range(100_000))}

works = [cells.Cell(folder / "cells" / f"{i}.json", {"i": i}, lambda i=i: run(str(i))) for i in range(12)]
print([result["name"] for result in cells.work_off(works, lambda place, result: None)])
"""


def worked_off(folder, dies_in=""):
    """What three processes print that run twelve cells together, and how often each cell was run."""
    log = folder / "log"
    deaths = [dies_in, "", ""]
    command = [sys.executable, "-c", WORKER, str(folder), str(log)]
    options = {"cwd": REPOSITORY, "stdout": subprocess.PIPE, "text": True}
    started = [subprocess.Popen([*command, death], **options) for death in deaths]
    ended = [(process.communicate(timeout=60)[0], process.returncode) for process in started]
    return ended, Counter(log.read_text().split())


NAMES = [str(i) for i in range(12)]


def test_three_processes_run_each_cell_once_and_have_all_results(tmp_path):
    ended, runs = worked_off(tmp_path)
    assert ended == [(f"{NAMES}\n", 0)] * 3
    assert runs == Counter(NAMES)
    assert sorted(path.name for path in (tmp_path / "cells").iterdir()) == sorted(f"{name}.json" for name in NAMES)


def test_what_a_killed_process_held_is_free(tmp_path):
    ended, runs = worked_off(tmp_path, dies_in="0")
    died = [returned for _, returned in ended].count(-signal.SIGKILL)
    assert died <= 1  # none, if another one was first
    assert [out for out, returned in ended if returned == 0] == [f"{NAMES}\n"] * (3 - died)
    assert runs == Counter([*NAMES, *["0"] * died])


def test_what_a_killed_process_left_unfinished_is_removed(tmp_path):
    path = tmp_path / "one [0.5].json"
    for file in (path, locks.told_in(cells.lock_of(path))):
        files.unfinished_name(file).write_text("half")
    cell(path).result()
    assert list(tmp_path.iterdir()) == [path]


def test_what_cells_are_at_is_told(tmp_path, capsys):
    cell(tmp_path / "cells" / "done.json").result()
    with pytest.raises(ZeroDivisionError):
        cell(tmp_path / "cells" / "failed.json", run=lambda: 1 / 0).result()
    at = tmp_path / "cells" / "at, 0.5.json"
    with locks.held(cells.lock_of(at), at):
        rows = status(StatusConfig(str(tmp_path)))
    assert {row["run"]: row["state"] for row in rows} == {"done": "finished", "failed": "stopped", "at, 0.5": "running"}
    assert next(row["process"] for row in rows if row["state"] == "running") == str(os.getpid())
    assert "1 finished, 1 running, 1 stopped" in capsys.readouterr().out


def test_a_cell_of_a_table():
    assert cells.percent([0.25, 0.75]) == "50.00 ± 35.36"
    assert cells.percent([0.25]) == "25.00"
