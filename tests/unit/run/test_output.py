"""What a run prints may be read by nobody any more."""

import subprocess
import sys
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).parents[3]
SCRIPT = dedent("""
    import sys, warnings, logging
    from pathlib import Path
    from alignment.run.output import outlast_readers
    outlast_readers()
    logging.basicConfig(stream=sys.stdout)
    print("ready", flush=True)
    sys.stdin.readline()
    for number in range(20_000):
        print("a line for nobody", number)
        print("and another", file=sys.stderr)
    logging.warning("a record")
    warnings.warn("a warning")
    Path(sys.argv[1]).write_text("reached")
""")


def start(tmp_path: Path, **streams) -> subprocess.Popen:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "end")]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, text=True, **streams)


def test_a_reader_that_goes_away_ends_nothing(tmp_path):
    process = start(tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout.readline() == "ready\n"
    process.stdout.close()
    process.stdin.write("go on\n")
    process.stdin.close()
    assert process.wait(60) == 0
    assert (tmp_path / "end").read_text() == "reached"


def test_a_full_disk_under_the_log_ends_nothing(tmp_path):
    with Path("/dev/full").open("w") as full:
        process = start(tmp_path, stdout=full, stderr=full)
        process.communicate("go on\n", timeout=60)
    assert process.returncode == 0
    assert (tmp_path / "end").read_text() == "reached"


def test_everything_is_printed_to_a_reader_that_stays(tmp_path):
    process = start(tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    printed, errors = process.communicate("go on\n", timeout=60)
    assert process.returncode == 0
    assert printed.splitlines()[1] == "a line for nobody 0"
    assert printed.count("a line for nobody") == errors.count("and another") == 20_000
    assert "WARNING:root:a record" in printed


def test_a_stream_that_somebody_has_put_there_is_left_alone(capsys):
    from alignment.run.output import outlast_readers

    before = sys.stdout, sys.stderr
    outlast_readers()
    assert (sys.stdout, sys.stderr) == before
