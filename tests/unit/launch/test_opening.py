"""The first lines of a run are its own, and Ctrl-C among the imports is one line."""

import logging
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from alignment.launch.opening import DEPRECATIONS, SILENCED, STOPPED, opening

ROOT = Path(__file__).parents[3]
SCRIPTS = sorted(path.name for path in (ROOT / "scripts").glob("run_s*.py"))


def python(script: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", dedent(script)], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_it_needs_nothing_but_python():
    done = python("import sys; before = set(sys.modules); import alignment.launch.opening; print(*set(sys.modules) - before)")
    assert {name.split(".")[0] for name in done.stdout.split()} <= {"alignment", *sys.stdlib_module_names}


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_first_line_of_a_script_is_its_own(script):
    done = subprocess.run(
        [sys.executable, f"scripts/{script}", "--seed=-1"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert (done.stdout + done.stderr).strip().startswith("error: --seed=-1: must be")


@pytest.mark.parametrize("script", ["train_step", "checkpoint"])
def test_the_first_line_of_a_benchmark_is_its_own(script):
    command = [sys.executable, f"benchmarks/{script}.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.stderr, done.stdout.partition(" ")[0]) == ("", "usage:")


def test_the_quickstart_begins_with_its_own_line():
    done = python("import scripts.quickstart.run")
    assert done.stdout + done.stderr == ""


def test_deprecations_among_libraries_are_raised_and_not_shown():
    adapter = """
        from alignment.launch.opening import opening
        {}
            from peft import LoraConfig, get_peft_model
            from tests.builders import tiny_model
        get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM"))
    """
    bare, silent = (python(adapter.format(line)) for line in ("if True:", "with opening():"))
    assert [beginning for beginning in DEPRECATIONS if beginning not in bare.stderr] == []
    assert (silent.returncode, "deprecated" in silent.stderr) == (0, False)


def test_what_is_silenced_is_what_the_libraries_do_log_and_nothing_is_left_of_it():
    libraries = """
        import os
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        from alignment.launch.opening import opening
        {}
            import peft
            from deepspeed.accelerator import get_accelerator
            get_accelerator()
    """
    bare, silent = (python(libraries.format(line)) for line in ("if True:", "with opening():"))
    assert [line.beginning for line in SILENCED if line.beginning not in bare.stdout + bare.stderr] == []
    assert (silent.returncode, [line.beginning for line in SILENCED if line.beginning in silent.stdout + silent.stderr]) == (
        0,
        [],
    )


def test_ctrl_c_among_the_imports_is_one_line_and_a_status_to_start_again():
    done = python("""
        import os, signal, time
        from alignment.launch.opening import opening
        with opening():
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(20)
            except BaseException:
                print("a library took it for its own")
    """)
    assert done.returncode == STOPPED
    assert (done.stdout, done.stderr.strip()) == ("", "error: stopped by SIGINT, before anything was begun.")


def test_ctrl_c_that_came_ignored_stays_ignored():
    done = python("""
        import os, signal
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        from alignment.launch.opening import opening
        with opening():
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    """)
    assert (done.returncode, done.stderr) == (0, "")


def test_only_the_silenced_lines_are_left_out(monkeypatch):
    """Whatever else listens to these loggers, which other tests have made their libraries set up."""
    said, ear = [], logging.Handler()
    monkeypatch.setattr(ear, "emit", lambda record: said.append(record.getMessage()))
    with opening():
        pass
    for line in SILENCED:
        logger = logging.getLogger(line.logger)
        monkeypatch.setattr(logger, "handlers", [ear])
        monkeypatch.setattr(logger, "propagate", False)
        logger.warning("%s", "another line")
        logger.warning(line.beginning + " and what follows")
    assert said == ["another line"] * len(SILENCED)


def test_every_silenced_line_has_its_reason():
    assert all(line.logger and line.beginning and len(line.reason) > 40 for line in SILENCED)
