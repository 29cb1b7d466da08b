"""What a library would refuse later is refused with everything else, before anything is loaded."""

import re
from pathlib import Path

import pytest
from transformers import LlamaConfig

from alignment.data.splits import CONVERSATIONS, PAIRS
from alignment.pipeline import Method, recipe_checks
from alignment.recipe.configs import DataArguments, ModelArguments
from alignment.recipe.parser import H4ArgumentParser, RecipeError
from alignment.recipe.ranges import divides
from alignment.recipe.rehearsal import loading_problems
from scripts.sft_config import SFTConfig
from scripts.sft_trainer import SFTTrainer
from scripts.simpo_config import SimPOConfig
from scripts.simpo_trainer import SimPOTrainer
from tests.methods import METHODS

SIMPO = Method(config=SimPOConfig, trainer=SimPOTrainer, data=PAIRS)
SFT = Method(config=SFTConfig, trainer=SFTTrainer, data=CONVERSATIONS)
FOLDER = Path(__file__).parents[3] / "training_configs"
NO_TRAINING = ("ablations", "on-policy")
RECIPES = sorted(path for path in FOLDER.rglob("*.yaml") if path.parent.name not in NO_TRAINING)
EVALUATES = ("--eval_strategy=steps", "--eval_steps=2")


def parse(*words: str, method: Method = SIMPO):
    names = ("--model_name_or_path=policy", "--dataset_mixer", '{"pairs": 1.0}', "--use_cpu")
    parser = H4ArgumentParser((ModelArguments, DataArguments, method.config))
    return parser.parse([*words, *names], recipe_checks(method))[2]


def refused(*words: str, method: Method = SIMPO) -> list[str]:
    with pytest.raises(RecipeError) as error:
        parse(*words, method=method)
    return error.value.complaints


# ---- Numbers ----


@pytest.mark.parametrize("method", [SIMPO, SFT])
@pytest.mark.parametrize(
    "word",
    [
        "--seed=-1", "--seed=4294967296", "--data_seed=-5", "--learning_rate=-1e-6", "--learning_rate=inf", "--weight_decay=-1",
        "--adam_beta1=1.5", "--adam_beta1=1", "--adam_beta2=-0.1", "--adam_epsilon=-1", "--max_grad_norm=-1", "--output_dir=",
        "--output_dir= ", "--num_train_epochs=-1", "--num_train_epochs=inf", "--num_train_epochs=0", "--max_steps=0",
        "--max_steps=-2", "--logging_steps=-1", "--logging_steps=0", "--logging_steps=1.5", "--logging_steps=inf",
        "--eval_delay=-3", "--eval_steps=-2", "--eval_steps=2.5", "--save_steps=-4", "--save_steps=0", "--save_total_limit=0",
        "--save_total_limit=-1", "--warmup_steps=-2", "--warmup_steps=1.5", "--eval_accumulation_steps=0",
        "--torch_empty_cache_steps=0", "--dataloader_num_workers=-1", "--ddp_timeout=0", "--early_stopping_patience=0",
    ],
)  # fmt: skip
def test_a_number_out_of_range_is_refused_by_its_key_and_value(word, method):
    (line,) = refused(word, *EVALUATES[: 1 if "eval_steps" in word else 2], method=method)
    assert line.startswith(f"{word}: ")


def test_all_of_them_stand_in_one_message_with_file_and_line(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "seed: -1\nlearning_rate: -1e-6\nadam_beta1: 1.5\nlr_scheduler_type: cosine_with_min_lr\noutput_dir: ''\n"
        "report_to: wnadb\nmetric_for_best_model: los\neval_strategy: steps\noptim: galore_adamw\n"
        "dataloader_prefetch_factor: 2\n"
    )
    lines = refused(str(recipe))
    places = sorted(int(re.match(rf"{re.escape(str(recipe))}, line (\d+): ", line)[1]) for line in lines)
    assert places == [1, 2, 3, 4, 5, 6, 7, 9, 10]


# ---- Optimizers and schedules ----


@pytest.mark.parametrize(
    "words",
    [
        ["--lr_scheduler_type=cosine_with_min_lr"],
        ["--lr_scheduler_type=warmup_stable_decay"],
        ["--lr_scheduler_type=cosine", '--lr_scheduler_kwargs={"foo": 1}'],
        ["--lr_scheduler_type=cosine", '--lr_scheduler_kwargs={"num_cycles": "many"}'],
        ["--lr_scheduler_type=cosine", "--lr_scheduler_kwargs=num_cycles=2"],
        ["--lr_scheduler_type=constant", '--lr_scheduler_kwargs={"min_lr": 1e-9}'],
        ["--lr_scheduler_type=constant_with_warmup", '--lr_scheduler_kwargs={"min_lr": 1e-9}'],
        ["--lr_scheduler_type=polynomial", '--lr_scheduler_kwargs={"lr_end": 1.0}'],
        ["--lr_scheduler_type=polynomial", '--lr_scheduler_kwargs={"power": "x"}'],
        ["--lr_scheduler_type=reduce_lr_on_plateau", '--lr_scheduler_kwargs={"factor": 2.0}', *EVALUATES],
        ["--lr_scheduler_type=reduce_lr_on_plateau", '--lr_scheduler_kwargs={"patients": 2}', *EVALUATES],
        ["--lr_scheduler_type=reduce_lr_on_plateau"],
        ["--lr_scheduler_type=greedy"],
        ["--optim=galore_adamw", "--optim_target_modules=q_proj"],
        ["--optim=schedule_free_adamw"],
        ["--optim=adamw_torch_npu_fused"],
        ["--optim=lomo"],
        ["--optim=grokadamw"],
        ["--optim=sgd", "--optim_args=nesterov=true"],
        ["--optim=sgd", "--optim_args=momentum=much"],
        ["--optim=sgd", "--optim_args=momentum"],
        ["--optim=adamw_torch", "--optim_args=rank=64"],
        ["--optim=sgd", "--optim_args=momentum=0.9,rank=64"],
        ["--optim_target_modules=q_proj"],
    ],
)
def test_an_optimizer_or_a_schedule_that_cannot_be_made_is_refused(words):
    (line,) = refused(*words)
    assert line.startswith(tuple(words))


@pytest.mark.parametrize(
    "words",
    [
        ["--lr_scheduler_type=cosine_with_min_lr", '--lr_scheduler_kwargs={"min_lr": 1e-9}'],
        ["--lr_scheduler_type=cosine_with_min_lr", '--lr_scheduler_kwargs={"min_lr_rate": 0.1}', "--warmup_steps=0.1"],
        ["--lr_scheduler_type=warmup_stable_decay", '--lr_scheduler_kwargs={"num_decay_steps": 10}'],
        ["--lr_scheduler_type=cosine_with_restarts", '--lr_scheduler_kwargs={"num_cycles": 3}'],
        ["--lr_scheduler_type=reduce_lr_on_plateau", '--lr_scheduler_kwargs={"factor": 0.5}', *EVALUATES],
        ["--lr_scheduler_type=greedy", *EVALUATES],
        ["--lr_scheduler_type=inverse_sqrt", "--warmup_steps=10"],
        ["--optim=sgd", "--optim_args=momentum=0.9, nesterov=true"],
        ["--optim=adafactor"],
        ["--optim=rmsprop", "--optim_args=alpha=0.98"],
        ["--optim=adagrad", "--optim_args=lr_decay=0.1"],
    ],
)
def test_those_that_can_be_made_are_taken(words):
    parse(*words)


def test_trying_them_takes_no_random_number():
    import torch

    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    parse("--optim=sgd")
    assert torch.equal(torch.random.get_rng_state(), before)


# ---- Metrics, evaluation, early stopping ----


@pytest.mark.parametrize(
    ("metric", "meant"),
    [("rewards/accuracy", "rewards/accuracies"), ("eval_rewards/margin", "rewards/margins"), ("los", "loss"), ("f1", None)],
)
def test_a_metric_that_no_evaluation_gives_is_refused_with_what_was_meant(metric, meant):
    (line,) = refused(f"--metric_for_best_model={metric}", *EVALUATES)
    assert line.startswith(f"--metric_for_best_model={metric}: no evaluation gives that figure")
    assert f"did you mean {meant!r}?" in line if meant else "choose one of loss, " in line


def test_a_metric_is_one_of_its_own_method(capsys):
    for metric in ("loss", "eval_loss", "rewards/margins", "eval_logps/chosen", "runtime"):
        assert parse(f"--metric_for_best_model={metric}", *EVALUATES).metric_for_best_model == metric
    assert len(refused("--metric_for_best_model=sft_loss", *EVALUATES)) == 1
    assert parse("--metric_for_best_model=sft_loss", "--sft_weight=0.1", *EVALUATES).metric_for_best_model == "sft_loss"
    assert parse("--metric_for_best_model=mean_token_accuracy", *EVALUATES, method=SFT)
    assert len(refused("--metric_for_best_model=rewards/margins", *EVALUATES, method=SFT)) == 1


@pytest.mark.parametrize("words", [["--no_do_eval"], ["--do_eval=false"], ["--do_eval=no", "--eval_steps=3"]])
def test_do_eval_false_means_no_evaluation(words):
    args = parse(*EVALUATES, *words)
    assert (args.do_eval, str(args.eval_strategy.value)) == (False, "no")


@pytest.mark.parametrize(
    ("words", "evaluates"),
    [([], False), (EVALUATES, True), (["--do_eval"], True), (["--do_eval", *EVALUATES], True), (["--do_eval=null"], False)],
)
def test_without_a_word_on_do_eval_the_strategy_decides(words, evaluates):
    assert parse(*words).do_eval is evaluates


@pytest.mark.parametrize(
    "words",
    [
        ["--load_best_model_at_end", "--do_eval=false", *EVALUATES, "--save_steps=2"],
        ["--load_best_model_at_end"],
        ["--load_best_model_at_end", *EVALUATES, "--save_strategy=epoch"],
        ["--load_best_model_at_end", *EVALUATES, "--save_steps=3"],
        ["--load_best_model_at_end", *EVALUATES, "--save_steps=0.5"],
        ["--early_stopping_patience=2"],
        ["--early_stopping_patience=2", "--do_eval=false", *EVALUATES],
        ["--save_strategy=best", "--metric_for_best_model=loss"],
        ["--eval_on_start", "--do_eval=false"],
    ],
)
def test_what_hangs_on_an_evaluation_is_refused_without_one(words):
    (line,) = refused(*words)
    assert line.startswith(words[0])


def test_early_stopping_is_by_the_loss_unless_another_metric_is_named():
    args = parse("--early_stopping_patience=2", *EVALUATES)
    assert (args.metric_for_best_model, args.greater_is_better) == ("loss", False)
    args = parse("--early_stopping_patience=2", "--metric_for_best_model=rewards/margins", *EVALUATES)
    assert (args.metric_for_best_model, args.greater_is_better) == ("rewards/margins", True)


@pytest.mark.parametrize(
    ("part", "whole", "fits"),
    [(2, 4, True), (2, 3, False), (0.1, 0.2, True), (0.1, 0.3, True), (0.1, 0.25, False), (0.5, 2, False), (2, 2, True)],
)
def test_checkpoints_fall_on_evaluations_where_one_number_is_a_multiple_of_the_other(part, whole, fits):
    assert divides(part, whole) is fits


# ---- Combinations, and what has no effect ----


@pytest.mark.parametrize(
    "words",
    [
        ["--dataloader_persistent_workers"],
        ["--dataloader_prefetch_factor=2"],
        ["--dataloader_multiprocessing_context=fork"],
        ["--fp16"],
        ["--fp16", "--bf16"],
        ["--fp16_full_eval", "--bf16_full_eval"],
        ["--fsdp=full_shard"],
        ["--fsdp"],
        ['--fsdp_config={"fsdp_version": 2}'],
        ["--torch_compile_backend=indctor"],
        ["--torch_compile_mode=fast"],
        ["--debug=undrflow"],
        ["--gradient_checkpointing_kwargs", '{"use_reentrent": false}', "--gradient_checkpointing"],
        ["--do_predict"],
        ["--do_train=false"],
        ["--auto_find_batch_size"],
        ["--enable_jit_checkpoint"],
        ["--save_on_each_node"],
        ['--accelerator_config={"split_batches": true}'],
        ["--batch_eval_metrics"],
        ["--include_for_metrics=inputs"],
        ["--include_num_input_tokens_seen=some"],
        ["--use_liger_kernel"],
    ],
)
@pytest.mark.parametrize("method", [SIMPO, SFT])
def test_a_setting_that_would_fail_later_or_do_nothing_is_refused(words, method, monkeypatch):
    monkeypatch.setattr("alignment.recipe.rehearsal.is_liger_kernel_available", lambda: False)
    (line,) = refused(*words, method=method)
    assert line.startswith(words[0])


@pytest.mark.parametrize(
    "word",
    [
        "--no_average_tokens_across_devices", "--label_smoothing_factor=0.1", "--length_column_name=words",
        "--prediction_loss_only", "--no_eval_do_concat_batches", "--eval_use_gather_object", "--label_names=labels",
    ],
)  # fmt: skip
def test_what_the_trainer_would_do_with_rows_is_refused_for_pairs(word):
    (line,) = refused(word)
    assert line.startswith(f"{word}: ")


@pytest.mark.parametrize(
    "word",
    ["--chat_template_path=x", "--dataset_text_field=body", "--assistant_only_loss", "--completion_only_loss"],
)
def test_what_trl_would_do_with_text_is_refused_where_it_is_given_tokens(word):
    (line,) = refused(word, method=SFT)
    assert line.startswith(f"{word}: ")


@pytest.mark.parametrize("method", [SIMPO, SFT])
def test_torch_dtype_among_the_model_s_settings_is_dtype(method):
    args = parse('--model_init_kwargs={"torch_dtype": "bfloat16", "use_cache": false}', method=method)
    assert args.model_init_kwargs == {"dtype": "bfloat16", "use_cache": False}


def test_a_setting_that_neither_loading_nor_the_model_knows_is_refused():
    known = {"dtype": "bfloat16", "attn_implementation": "sdpa", "attention_dropout": 0.1}
    assert loading_problems(known, LlamaConfig()) == []
    assert loading_problems(None, LlamaConfig()) == []
    (problem,) = loading_problems({"atn_implementation": "sdpa"}, LlamaConfig())
    assert "did you mean 'attn_implementation'?" in problem.advice


def test_a_recipe_that_names_no_model_or_no_data_is_told_both():
    parser = H4ArgumentParser((ModelArguments, DataArguments, SimPOConfig))
    with pytest.raises(RecipeError) as error:
        parser.parse(["--use_cpu"], recipe_checks(SIMPO))
    lines = error.value.complaints
    assert [next(key for key in ("model_name_or_path", "dataset_mixer") if key in line) for line in lines] == [
        "model_name_or_path", "dataset_mixer",
    ]  # fmt: skip


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_passes_every_check(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    method = SFT if "sft" in path.stem else next(METHODS[name] for name in METHODS if name in path.stem)
    parser = H4ArgumentParser((ModelArguments, DataArguments, method.config))
    parser.parse([str(path), "--report_to=none"], recipe_checks(method))  # the tracker may not be installed


# ---- What would train otherwise than it says ----


@pytest.mark.parametrize(
    "kwargs", ['{"min_lr": -1}', '{"min_lr_rate": 2}', '{"min_lr": 1}', '{"min_lr": NaN}', '{"min_lr": Infinity}']
)
def test_a_schedule_below_0_or_above_the_learning_rate_is_refused(kwargs):
    (line,) = refused("--lr_scheduler_type=cosine_with_min_lr", f"--lr_scheduler_kwargs={kwargs}")
    assert line.startswith("--lr_scheduler_kwargs=")
    parse("--lr_scheduler_type=cosine_with_min_lr", '--lr_scheduler_kwargs={"min_lr": 1e-8}')


def test_optim_args_that_are_no_settings_are_told_how_they_are_written():
    (line,) = refused("--optim=sgd", "--optim_args=momentum")
    assert line.endswith("expected name=value, several with commas")
    parse("--optim=sgd", "--optim_args=momentum=0.9")


def test_a_template_is_given_no_number_that_it_cannot_spell():
    (line,) = refused('--chat_template_kwargs={"a": [1, Infinity]}')
    assert line.endswith("chat_template_kwargs.a = [1, inf]: no template can be given inf or nan")


def test_what_only_a_gpu_can_do_is_refused_on_a_cpu_unless_it_only_prepares():
    assert "processes on a CPU talk by gloo; remove it" in refused("--ddp_backend=nccl")[0]
    assert "needs a GPU" in refused("--fp16")[0]
    assert parse("--ddp_backend=nccl", "--fp16", "--prepare_only").fp16 is False
    assert parse("--ddp_backend=gloo").ddp_backend is None  # one process has nobody to talk to


@pytest.mark.parametrize(
    "kwargs",
    [
        '{"context_fn": "x"}',
        '{"debug": true}',
        '{"determinism_check": "x", "use_reentrant": false}',
        '{"use_reentrant": "maybe"}',
    ],
)
def test_recomputation_that_torch_would_refuse_in_the_first_step_is_refused(kwargs):
    (line,) = refused("--gradient_checkpointing", f"--gradient_checkpointing_kwargs={kwargs}")
    assert line.startswith("--gradient_checkpointing_kwargs=")
    parse("--gradient_checkpointing", '--gradient_checkpointing_kwargs={"use_reentrant": false, "determinism_check": "none"}')


@pytest.mark.parametrize("setting", ["split_batches", "dispatch_batches", "gradient_accumulation_kwargs"])
def test_what_would_divide_steps_otherwise_is_refused(setting):
    value = '{"num_steps": 3}' if setting.endswith("kwargs") else "true"
    (line,) = refused(f'--accelerator_config={{"{setting}": {value}}}')
    assert f"{setting} would make a step of other pairs" in line


@pytest.mark.parametrize(("name", "advice"), [("sdap", "did you mean 'sdpa'?"), ("xyz", "; choose one of eager, ")])
def test_an_attention_that_there_is_not_is_refused_with_the_names_there_are(name, advice):
    (line,) = refused(f"--attn_implementation={name}")
    assert advice in line
    for known in ("eager", "sdpa", "kernels-community/flash-attn"):
        parse(f"--attn_implementation={known}")


def test_a_type_that_torch_has_not_is_refused_among_the_settings_of_the_model():
    (problem,) = loading_problems({"dtype": "bf16"}, LlamaConfig())
    assert "dtype must be one of auto, float32, float16, bfloat16" in str(problem)
    assert loading_problems({"dtype": "bfloat16"}, LlamaConfig()) == []


def test_deepspeed_without_a_launcher_is_refused_and_does_not_hinder_preparation(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    setting = '--deepspeed={"zero_optimization": {"stage": 2}}'
    assert "launch with accelerate_configs/deepspeed_zero3.yaml" in refused(setting)[0]
    args = parse(setting, "--fsdp=full_shard", "--prepare_only")
    assert not args.deepspeed
    assert not args.fsdp


def test_noise_below_0_is_refused_where_noise_is_supported():
    (line,) = refused("--neftune_noise_alpha=-1", method=SFT)
    assert line == "--neftune_noise_alpha=-1: must be finite and not negative"
