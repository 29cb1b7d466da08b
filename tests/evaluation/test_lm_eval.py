"""lm-eval on a run's folder: the documented command on local tasks, offline.

make test-evaluation EXTRAS=dev,eval
"""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignment.run.records import write_jsonl
from tests.workspaces import read_jsonl

pytest.importorskip("lm_eval")
ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")
(COMMAND,) = re.findall(r"^lm_eval run .*--include_path.*$", DOCUMENT, re.MULTILINE)
(EXAMPLE,) = re.findall(r"```yaml\n(task: .*?)```", DOCUMENT, re.DOTALL)
ROWS = [
    {"question": f"the river {number}", "choices": ["mountain", "kettle", "lanterns"], "answer": number % 3}
    for number in range(6)
]
GENERATED = {
    "task": "rivers_said",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{choices[answer]}}",
    "generation_kwargs": {"until": ["<|eot_id|>"], "do_sample": False, "max_gen_toks": 6},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


def prompt_of(row: dict) -> str:
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    return f"<|begin_of_text|>{header.format('user')}{row['question']}<|eot_id|>{header.format('assistant')}"


@pytest.fixture(scope="module")
def evaluated(run_folder, tmp_path_factory) -> tuple[dict, dict[str, list[dict]]]:
    """The results, and the samples of each task by their name."""
    folder = tmp_path_factory.mktemp("lm_eval")
    write_jsonl(folder / "rows.jsonl", ROWS)
    choice = yaml.safe_load(EXAMPLE.replace("QUESTIONS.jsonl", str(folder / "rows.jsonl")))
    data = {key: choice[key] for key in ("dataset_path", "dataset_kwargs", "test_split", "metadata")}
    for task in (choice, {**GENERATED, **data}):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    words = {"RUN": run_folder, "TASKS": folder, "RESULTS": folder / "results"}
    command = re.sub("|".join(words), lambda found: str(words[found[0]]), COMMAND).replace("bfloat16", "float32")
    words = shlex.split(command.replace("--tasks my_task", f"--tasks {choice['task']},{GENERATED['task']}"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
    program = Path(os.sys.executable).with_name(words[0])
    done = subprocess.run(
        [program, *words[1:], "--device", "cpu"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (folder / "results").rglob("results_*.json")
    samples = {path.name.split("_2")[0].removeprefix("samples_"): read_jsonl(path) for path in results.parent.glob("*.jsonl")}
    return json.loads(results.read_text()), samples


@torch.inference_mode()
def own_logp(model, tokenizer, prompt: str, text: str) -> float:
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    both = torch.tensor([ids + tokenizer(text, add_special_tokens=False)["input_ids"]])
    logps = model(both).logits[0, :-1].float().log_softmax(-1).gather(-1, both[0, 1:, None])[:, 0]
    return logps[len(ids) - 1 :].sum().item()


def test_the_documented_command_scores_choices_behind_the_saved_template_with_one_bos(evaluated, run_folder):
    results, samples = evaluated
    model, tokenizer = AutoModelForCausalLM.from_pretrained(run_folder), AutoTokenizer.from_pretrained(run_folder)
    right = 0
    for row, sample in zip(ROWS, sorted(samples["my_task"], key=lambda sample: sample["doc_id"]), strict=True):
        told = [float(response[0][0]) for response in sample["resps"]]
        # lm-eval counts white space at the end of a prompt to what follows it, for every choice alike.
        ours = [own_logp(model, tokenizer, prompt_of(row).rstrip(), f"\n\n{choice}") for choice in row["choices"]]
        assert told == pytest.approx(ours, abs=2e-3)
        right += ours.index(max(ours)) == row["answer"]
    assert results["results"]["my_task"]["acc,none"] == pytest.approx(right / len(ROWS))


def test_the_documented_command_generates_what_the_run_says(evaluated, run_folder):
    _, samples = evaluated
    model, tokenizer = AutoModelForCausalLM.from_pretrained(run_folder), AutoTokenizer.from_pretrained(run_folder)
    for sample in samples["rivers_said"]:
        ids = torch.tensor([tokenizer(prompt_of(sample["doc"]), add_special_tokens=False)["input_ids"]])
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        assert sample["resps"] == [[tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)]]
