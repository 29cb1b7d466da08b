"""The picture of a run: which panels it has, and what stands in them."""

import json

import pytest

from alignment.report.curves import curves_figure, plot_curves, read_metrics
from scripts.dpo_config import DPOConfig

TRAIN = {"loss": 1.2, "rewards/margins": 0.3, "rewards/accuracies": 0.6, "logps/chosen": -0.4, "logps/rejected": -0.5}
HELD_OUT = {f"eval_{key}": value for key, value in TRAIN.items()}
SIMPO_RUN = [
    {"step": 0, **HELD_OUT},
    {"step": 5, **TRAIN},
    {"step": 10, **TRAIN},
    {"step": 10, **HELD_OUT},
    {"step": 10, "train_loss": 1.2, "train_runtime": 3.0},
]
PREFERENCE_PANELS = ["Loss", "Reward margin", "Reward accuracy", "Mean log-probability"]


def titles(metrics: list[dict]) -> list[str]:
    return [axes.get_title() for axes in curves_figure(metrics, "run").axes]


def legend(axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


@pytest.mark.parametrize(
    ("metrics", "panels"),
    [
        (SIMPO_RUN, PREFERENCE_PANELS),
        ([{"step": 0, **HELD_OUT}], PREFERENCE_PANELS),
        ([{"step": 5, "loss": 1.0}, {"step": 9, "eval_loss": 0.9}], ["Loss"]),
        ([{"step": 9, "train_loss": 1.0}], []),
        ([], []),
    ],
)
def test_a_figure_has_a_panel_for_each_quantity_that_was_logged(metrics, panels):
    assert titles(metrics) == panels


def test_training_and_held_out_figures_stand_at_their_own_steps():
    axes = curves_figure(SIMPO_RUN, "run").axes[0]
    training, held_out = axes.lines
    assert legend(axes) == ["training", "held-out"]
    assert list(training.get_xdata()) == [5, 10]
    assert list(held_out.get_xdata()) == [0, 10]


def test_the_training_probe_stands_beside_the_held_out_curve():
    probe = {
        "probe_rewards/margins": 0.5,
        "probe_rewards/accuracies": 0.7,
        "probe_logps/chosen": -0.3,
        "probe_logps/rejected": -0.6,
    }
    metrics = [{**record, **probe} if "eval_loss" in record else record for record in SIMPO_RUN]
    loss, margin, _, logps = curves_figure(metrics, "run").axes
    assert legend(loss) == ["training", "held-out"]  # the probe's loss is not logged
    assert legend(margin) == ["training", "training probe", "held-out"]
    assert list(margin.lines[2].get_xdata()) == [0, 10]
    assert legend(logps)[1] == "chosen, training probe"


def test_chosen_and_rejected_share_a_panel_in_two_colours():
    axes = curves_figure(SIMPO_RUN, "run").axes[3]
    assert legend(axes) == ["chosen, training", "chosen, held-out", "rejected, training", "rejected, held-out"]
    chosen, chosen_held_out, rejected, rejected_held_out = (line.get_color() for line in axes.lines)
    assert chosen == chosen_held_out != rejected == rejected_held_out
    assert axes.get_ylabel() == "nats per token"


def test_a_single_point_is_visible_and_its_step_a_whole_number():
    for record in ({"step": 5, **TRAIN}, {"step": 5, **HELD_OUT}):
        axes = curves_figure([record], "run").axes[0]
        assert axes.lines[0].get_marker() == "o"
        assert all(tick == int(tick) for tick in axes.get_xticks())


def test_metrics_read_from_a_run_folder_become_a_picture(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f"{json.dumps(record)}\n" for record in SIMPO_RUN), encoding="utf-8")
    assert read_metrics(path) == SIMPO_RUN
    plot_curves(read_metrics(path), tmp_path / "curves.png", "run")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_with_a_reference_shows_its_rewards_around_the_line_of_the_reference():
    record = {"step": 5, **TRAIN, "rewards/chosen": 0.2, "rewards/rejected": -0.1}
    figure = curves_figure([record], "run", DPOConfig(use_cpu=True).objective)
    *others, rewards = figure.axes
    assert [axes.get_title() for axes in others] == [*PREFERENCE_PANELS[:3], "Log-probability"]
    assert rewards.get_title() == "Reward over the reference"
    assert list(rewards.lines[0].get_ydata()) == [0.0, 0.0]
    assert others[-1].get_ylabel() == "nats"
