"""A run's outward behaviour without its libraries: `python stand_in.py FOLDER STEPS [exit status]`.

It writes the status that runs write, counts steps in a file, goes on where it was, and saves at a signal that asks it to.
"""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path


def write(folder: Path, state: str, **more) -> None:
    (folder / "_run").mkdir(parents=True, exist_ok=True)
    (folder / "_run" / "status.json").write_text(json.dumps({"state": state, **more}))


def train(folder: Path, steps: int, status: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    received = []
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda number, _: received.append(signal.Signals(number).name))
    counted = folder / "steps"
    begun_at = int(counted.read_text()) if counted.exists() else 0
    print(f"begins behind step {begun_at}", flush=True)
    write(folder, "training")
    for step in range(begun_at + 1, steps + 1):
        time.sleep(0.05)
        counted.write_text(str(step))
        if received:
            write(folder, "interrupted", reason=f"stopped by {received[0]} after step {step}")
            print(f"stopped by {received[0]} after step {step}", flush=True)
            sys.exit(75)
    if status:
        write(folder, "failed", reason="it broke down", error="ValueError")
        print("error: it broke\ndown", flush=True)
        sys.exit(status)
    (folder / "model.safetensors").touch()
    write(folder, "finished")


if __name__ == "__main__":
    if sys.argv[1] == "launch":  # as a launcher does, which says no more than 0 or 1
        sys.exit(min(1, subprocess.run([sys.executable, __file__, *sys.argv[2:]]).returncode))
    train(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0)
