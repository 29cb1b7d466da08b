"""Runs that are killed at 30 changes to their files, a minute or two: each ends as the unbroken run does."""

import random
import shutil

from alignment.run.run_folder import read_status
from tests.integration.test_faults import assert_same_end, go_on


def moments(count: int) -> list[int]:
    """30 of `count` changes to files: a whole save, one after the other, and others anywhere."""
    rng = random.Random(0)
    first = count // 3
    inside = list(range(first, first + 14))
    others = [number for number in range(1, count + 1) if number not in inside]
    return inside + sorted(rng.sample(others, 16))


def test_a_run_killed_at_any_of_30_moments_goes_on_from_a_whole_checkpoint_to_the_same_end(server, recipe, unbroken, tmp_path):
    counted = tmp_path / "counted"
    server.run(
        str(recipe), f"--output_dir={counted}", sabotage="count_file_events", folder=str(counted), into=str(tmp_path / "n")
    )
    count = int((tmp_path / "n").read_text())
    resumed = 0
    for number in moments(count):
        folder = tmp_path / f"killed-{number}"
        killed = server.run(
            str(recipe), f"--output_dir={folder}", sabotage="kill_at_file_event", folder=str(folder), number=number
        )
        assert killed.statuses == [-9], number
        finished = (read_status(folder) or {}).get("state") == "finished"
        ended = go_on(server, recipe, folder)
        resumed += "Resuming from" in ended.printed
        assert "Skipped" not in ended.printed, number  # whole, or not there
        assert finished or "Resuming from" in ended.printed or number < count / 3, number
        assert_same_end(folder, unbroken)
        shutil.rmtree(folder)
    assert resumed > 15
