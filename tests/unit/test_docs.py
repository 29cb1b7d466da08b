"""What the documents show is run: a command or an example that is not executed decays."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import scripts.generate
import scripts.merge_adapter
import scripts.push_run
import scripts.score_pairs
from tests.workspaces import recipe_keys, save_workspace, write_recipe

ROOT = Path(__file__).parents[2]
KEYS = {
    "preprocessing": "exact", "use_cpu": True, "max_length": 160, "max_prompt_length": 80, "learning_rate": 1e-3,
    "per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
    "margin": 0.5,
}  # fmt: skip


def test_the_objective_that_the_guide_adds_trains(tmp_path):
    """Its four pieces in one file, as an entry point, on a tiny model."""
    guide = (ROOT / "docs/add-an-objective.md").read_text(encoding="utf-8")
    assert len(guide.splitlines()) < 75
    script = tmp_path / "run_toy.py"
    script.write_text("\n".join(re.findall(r"```python\n(.*?)```", guide, re.DOTALL)), encoding="utf-8")
    save_workspace(tmp_path, 8, 3, initializer_range=0.1)
    recipe = write_recipe(tmp_path, {**KEYS, **recipe_keys(tmp_path), "output_dir": str(tmp_path / "run")})
    environment = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, str(script), str(recipe)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "Objective: Toy, loss = relu(margin - (mean logp_w - mean logp_l)), margin = 0.5" in done.stdout
    assert json.loads((tmp_path / "run/environment.json").read_text())["objective"]["name"] == "Toy"
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert any("rewards/margins" in record for record in records)


def test_the_commands_for_after_a_run_are_read_by_their_entry_points():
    page = (ROOT / "docs/after-a-run.md").read_text(encoding="utf-8")
    parsers = {
        "generate": scripts.generate.short_help(),
        "merge_adapter": scripts.merge_adapter.parser(),
        "push_run": scripts.push_run.parser(),
        "score_pairs": scripts.score_pairs.parser(),
    }
    read = []
    for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL):
        for line in block.splitlines():
            _, script, *words = shlex.split(re.sub(r"[\[\]]|\.\.\.", "", line), comments=True)
            assert (ROOT / script).is_file()
            if (parser := parsers.get(Path(script).stem)) is not None:
                _, unknown = parser.parse_known_args(words)
                assert set(unknown) <= ({"--key=value", "--preprocessing=exact"} if "score" in script else set())
                read.append(Path(script).stem)
    assert {*read} == {*parsers}
