"""Evaluation: the same episodes for all, recognition, animations, tables, and the command line."""
import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

import env
import eval as evaluation
import prompts
import train

torch.set_num_threads(1)
QUICK = ["--sft-steps", "3", "--sft-batch", "8", "--env-steps", "32", "--rollout-steps", "16", "--num-envs", "8", "--minibatch", "8",
         "--epochs", "2", "--max-new-tokens", "30", "--eval-episodes", "8", "--seed", "3"]


def run(out, *flags):
    return train.main(["--out", str(out), *QUICK, *flags])


def call_eval(monkeypatch, *flags):
    monkeypatch.setattr("sys.argv", ["eval.py", *map(str, flags)])
    evaluation.main()


def error_line(monkeypatch, capsys, *flags):
    """The one line in which eval.py ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call_eval(monkeypatch, *flags)
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.out == "" and captured.err.count("\n") == 1 and "error: " in captured.err
    return captured.err


@pytest.fixture(scope="module")
def points_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("points") / "run"
    run(out, "--env", "ezpoints")
    return out


# -- evaluation ---------------------------------------------------------------------------------------


def test_eval_prints_one_json_object(tmp_path, capsys, monkeypatch):
    results = run(tmp_path / "run", "--env", "numberline")["numberline"]
    capsys.readouterr()
    for policy, row in (("rl", "RL"), ("sft", "SFT")):
        call_eval(monkeypatch, "--run", tmp_path / "run", "--policy", policy, "--episodes", 8, "--seed", 3, "--num-envs", 8, "--json")
        result = json.loads(capsys.readouterr().out)
        assert {"env", "policy", "episodes", "success_rate", "ci95", "mean_return", "illegal_rate", "episode_length", "seconds"} <= set(result)
        assert 0 <= result["success_rate"] <= 1 and result["episodes"] == 8 and result["env"] == "numberline"
    assert set(results["RL"]) - {"stage"} <= set(result)


def test_a_model_is_evaluated_zero_shot(monkeypatch, capsys):
    call_eval(monkeypatch, "--env", "numberline", "--model", "tiny", "--device", "cpu", "--episodes", 3, "--max-new-tokens", 96, "--json")
    result = json.loads(capsys.readouterr().out)
    assert result["policy"] == "tiny" and result["illegal_rate"] > 0.9  # nobody has taught it the format


def test_evaluation_plays_the_same_episodes_whatever_the_number_of_environments():
    one, other = (evaluation.evaluate(evaluation.expert_agent, "points24", 40, seed=1, num_envs=n) for n in (3, 40))
    assert {**one, "seconds": 0} == {**other, "seconds": 0}


def test_an_illegal_answer_costs_its_penalty_and_is_counted():
    def agent(images, infos):
        return [("stand", False) for _ in infos]

    def legal_agent(images, infos):
        return [("stand", True) for _ in infos]

    illegal, legal = (evaluation.evaluate(player, "blackjack", 30, num_envs=7) for player in (agent, legal_agent))
    assert illegal["illegal_rate"] == 1 and legal["illegal_rate"] == 0 and illegal["episode_length"] == legal["episode_length"] == 1
    assert legal["mean_return"] - illegal["mean_return"] == pytest.approx(env.GAMES["blackjack"].illegal_penalty)


def test_wilson_interval():
    low, high = evaluation.wilson_interval(0, 100)
    assert low == 0 and high == pytest.approx(0.037, abs=1e-3)
    low, high = evaluation.wilson_interval(50, 100)
    assert (low + high) / 2 == pytest.approx(0.5) and high - low == pytest.approx(0.19, abs=0.01)


# -- recognition --------------------------------------------------------------------------------------

TRUTH = {"target": "3", "cards": ["9", "10"]}


@pytest.mark.parametrize("text", [
    '{"target": 3, "cards": ["9", "10"], "thoughts": "", "action": "+"}',
    '```json\n{"target": "3", "cards": [9, 10], "action": "+"}\n```',
    'Here it is: {"target": 3, "cards": ["9", "10"], "action": "+"}',
    '{"target": 3, "cards": ["9", "10"], "action": "+"} That is what I see: a target, and cards.',
    "{'target': 3, 'cards': ['9', '10'], 'action': '+'}",
    "{'target': '3', 'cards': ['9', '10'], 'action': '+'}",
    "{\u201ctarget\u201d: \u201c3\u201d, \u201ccards\u201d: [\u201c9\u201d, \u201c10\u201d]}",
    "{target: 3, cards: [9, 10], action: +}",
    '{"target": 3, "cards": ["9", "10"], "thoughts": "the target is',
    '{"target": 3,\n "cards": ["9", "10"',
    '{"target": 3, "cards": ["9", "10"], "thoughts": "the cards: 7", "action": "+"',
    '{"target": " 3 ", "cards": [" 9", "10 "], "thoughts": "it\'s here", "target": 4',
    '"target": 3\n"cards": ["9", "10"]\n'])
def test_fields_are_read_however_the_answer_is_written(text):
    said = evaluation.read_fields(text)
    assert all(evaluation.same_value(said[name], truth) for name, truth in TRUTH.items()), said


@pytest.mark.parametrize("text", ["", "nonsense", "}{", "{", "}", '{"target"', "[1, 2]", "\ud800", "{}", '{"target": ' + "9" * 5000 + "}", '{"cards": []}'])
def test_where_nothing_is_said_nothing_is_true(text):
    said = evaluation.read_fields(text)
    assert not any(evaluation.same_value(said.get(name), truth) for name, truth in TRUTH.items())


@pytest.mark.parametrize("said, truth, same", [
    ("3", 3, True), ("3", "3", True), ("k", "K", True), (" K ", "K", True), ("4", 3, False), (None, 3, False), ("", "", True), (["9"], ["9"], True),
    (["k", "2"], ["K", "2"], True), (["2", "K"], ["K", "2"], False), (["9"], ["9", "9"], False), ("9", ["9"], False), (["9"], "9", False), ([], [], True)])
def test_a_value_is_compared_without_type_case_and_spaces(said, truth, same):
    assert evaluation.same_value(said, truth) == same


def test_every_demonstration_is_read_as_it_was_written():
    for name in prompts.CARD_TASKS:
        info = env.Games(name, 1, 0).infos[0]
        said = evaluation.read_fields(prompts.demonstration(info, info["legal_actions"][0]))
        truth = {key: field.truth(info) for key, field in prompts.answer_fields(info).items()}
        assert set(said) == {*truth, "action"} and all(evaluation.same_value(said[key], value) for key, value in truth.items())


@pytest.mark.parametrize("piece", ["a", '"', "'", "{", "[", "a:", '"a": [', '"a": "', "{'a': ", " ", "a ", '"a' + " " * 9, "word" * 10 + " ", "\\", "},{", "[[", '{"a":', '"a": ["b", '])
def test_hostile_answers_are_read_in_linear_time(piece):
    for text in (piece * (1_000_000 // len(piece)), '{"target": 3, ' + piece * (1_000_000 // len(piece)) + "}"):
        began = time.process_time()
        fields = evaluation.read_fields(text)
        assert isinstance(fields, dict) and time.process_time() - began < 0.2


def test_recognition_counts_the_fields_that_are_true():
    class Blind:
        """Sees every target right and every current number as 0."""
        def act(self, images, prompts):
            return [Namespace(text=f'{{"target": {info["target"]}, "current": 0, "thoughts": "", "action": "+"}}') for info in games.infos]

    games = None

    class Games(env.Games):
        def __init__(self, *args, **kwargs):
            nonlocal games
            super().__init__(*args, **kwargs)
            games = self

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(env, "Games", Games)
        shares = evaluation.recognition(Blind(), "numberline", 200, num_envs=20)
    assert shares["target"] == 1 and 0 < shares["current"] < 0.4 and shares["all"] == shares["current"]


@pytest.mark.parametrize("style", ["action", "thoughts"])
def test_where_a_prompt_asks_for_no_fields_there_is_nothing_to_recognise(style):
    with pytest.raises(ValueError, match=f"--prompt {style} asks for no fields: there is nothing to recognise"):
        evaluation.recognition(None, "numberline", 10, style=style)


def test_recognition_of_a_run_and_its_animation(points_run, tmp_path, capsys, monkeypatch):
    call_eval(monkeypatch, "--run", points_run, "--policy", "sft", "--recognition", "--trials", 10, "--json")
    shares = json.loads(capsys.readouterr().out)["recognition"]
    assert set(shares) == {"cards", "formula", "all"} and all(0 <= share <= 1 for share in shares.values())
    call_eval(monkeypatch, "--run", points_run, points_run, "--recognition", "--trials", 10, "--json")
    table = json.loads(capsys.readouterr().out)
    assert list(table) == ["untrained", "sft", "rl"] and table["sft"] == [shares, shares]
    call_eval(monkeypatch, "--run", points_run, "--recognition", "--trials", 10)
    assert f"| sft | {100 * shares['cards']:.1f} % |" in capsys.readouterr().out
    call_eval(monkeypatch, "--run", points_run, "--gif", tmp_path / "x.gif")
    with Image.open(tmp_path / "x.gif") as animation:
        assert animation.n_frames >= 8  # four episodes: at least a step and an end each


# -- animation ----------------------------------------------------------------------------------------


def test_an_animation_shows_the_pictures_that_were_answered(tmp_path):
    seen = []

    def act(images, texts):
        seen.append(images[0].copy())
        return [Namespace(text='{"action": "+"}', value=0.0)]

    evaluation.animate(Namespace(act=act), "numberline", 2, 0, tmp_path / "x.png")
    sheet, frames = np.asarray(Image.open(tmp_path / "x.png").convert("RGB")).astype(int), []
    for y, x in ((y, x) for y in range(0, len(sheet), env.SIZE) for x in (0, 2 * env.SIZE + 60)):
        frames.append(sheet[y: y + env.SIZE, x: x + env.SIZE])
    assert len(seen) > 3 and abs(seen[0].astype(int) - seen[1]).mean() > 2
    for image in seen:  # in their order, with the ends of the episodes between them
        while abs(frames.pop(0) - image).mean() > 1:
            assert frames


def test_what_an_expert_would_not_say_is_marked():
    truth = {"target": 3, "cards": ["9", "10"], "thoughts": "up", "action": "+"}
    marked = evaluation.mark_answer('{"target": "3", "cards": [9, 7], "thoughts": "\u4e0a", "mood": "good", "action": "+"}', truth)
    assert marked == [("target", "3", True), ("cards", "['9', '7']", False), ("thoughts", "?", False), ("mood", "good", False), ("action", "+", True)]
    assert evaluation.mark_answer("nonsense", truth) == [("answer", "nonsense", False)]


# -- tables -------------------------------------------------------------------------------------------


def results(rate):
    return {"success_rate": rate, "illegal_rate": 0.25, "episodes": 50}


def test_the_table_of_a_sweep():
    runs = {"points24, ratio step": [{"task": "points24", "curve": [], "random": results(0.5), "RL": results(rate)} for rate in (0.6, 0.7)],
            "cnn": [{"task": "blackjack", "curve": [], "random": results(0.4), "CNN + RL": results(0.25)}]}
    assert evaluation.sweep_table(runs, "1,2", "python train.py --x").splitlines() == [
        "| | random | RL | CNN + RL | RL: illegal | paper, 7B, other pictures |", "|---|---|---|---|---|---|",
        "| points24, ratio step | 50.0 % (50.0, 50.0) | 65.0 % (60.0, 70.0) |  | 25.0 % | 2.3 % |",
        "| cnn | 40.0 % (40.0) |  | 25.0 % (25.0) | 25.0 % |  |", "",
        "Success on 50 episodes, mean of seeds 1,2 (in brackets each).", "`python train.py --x`"]


def test_a_figure_has_a_panel_for_each_task_and_lines_for_other_policies():
    rows = [{"stage": "rl", "env_steps": 16, "success_rate": None}, {"stage": "rl", "env_steps": 32, "success_rate": 0.5},
            {"stage": "eval", "env": "blackjack", "policy": "random", "success_rate": 0.4}, {"stage": "eval", "env": "blackjack", "policy": "RL", "success_rate": 0.5}]
    one, other = evaluation.summary(rows, "blackjack"), evaluation.summary(rows[:2], "numberline")
    assert one["curve"] == [[16, None], [32, 0.5]] and one["RL"]["success_rate"] == 0.5
    figure = evaluation.plot({"blackjack, lr 1": [one, one], "blackjack, lr 2": [one], "numberline": [other]})
    labels = [[line.get_label() for line in axes.get_lines()] for axes in figure.axes]
    assert labels == [
        ["lr 1 (mean of 4 rollouts)", "lr 2 (mean of 4 rollouts)", "random 40.0%",  # dots of a single run alone
          "best possible 43.16%", "best without looking 38.07%"],
        ["numberline (mean of 4 rollouts)", "each rollout", "best possible 100.00%", "best without looking 50.00%"]]


def test_a_curve_is_the_mean_of_the_last_four_rollouts_that_had_episodes():
    rates = np.array([[np.nan, 0.2, 0.4, 0.6, 0.8, 1.0], [0.0, 0.0, np.nan, 0.0, 0.0, 1.0]])
    np.testing.assert_allclose(evaluation.moving_mean(rates), [[np.nan, 0.2, 0.3, 0.4, 0.5, 0.7], [0, 0, 0, 0, 0, 1 / 3]])


# -- the command line ---------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [["--run", "/no/such/dir"], [], ["--policy", "random"], ["--env", "blackjack", "--policy", "x"], ["--episodes", "0"],
                                   ["--model", "tiny"], ["--env", "blackjack", "--model", "/no/such/model"],
                                   ["--env", "blackjack", "--policy", "expert", "--gif", "x.gif"], ["--run", "a", "b"], ["--run", "a", "--model", "tiny"],
                                   ["--run", "a", "--gif", "x.jpg"], ["--run", "a", "--gif", "gif"], ["--env", "blackjack", "--model", "tiny", "--device", "mps"],
                                   ["--env", "blackjack", "--model", "tiny", "--temperature", "0"], ["--env", "blackjack", "--policy", "expert", "--seed", "4294967296"],
                                   ["--env", "blackjack", "--policy", "expert", "--recognition"], ["--env", "blackjack", "--policy", "expert", "--episodes", "1\n2"],
                                   ["--env", "blackjack", "--api-base", "file:///x", "--api-model", "m"], ["--env", "blackjack", "--api-base", "http://x"],
                                   ["--env", "blackjack", "--api-base", "http://x", "--api-model", "m", "--temperature", "1"]])
def test_eval_bad_flags(flags, capsys, monkeypatch):
    error_line(monkeypatch, capsys, *flags)


@pytest.mark.parametrize("kind, low, high, good, bad", [
    (int, 1, float("inf"), ["1", "99999999999"], ["0", "1.5", "x", "", "-1"]), (int, 0, 2**32 - 1, ["0", "4294967295"], ["4294967296", "-1", "nan"]),
    (float, 0, 1, ["0", "0.5", "1"], ["1.1", "-0.1", "nan", "inf"]), (float, 0, float("inf"), ["1e9"], ["inf", "nan", "-inf"])])
def test_numbers_of_the_command_line(kind, low, high, good, bad):
    parse = evaluation.number(kind, low, high)
    assert [parse(text) for text in good] == [kind(text) for text in good]
    for text in bad:
        with pytest.raises(evaluation.argparse.ArgumentTypeError, match="is not a"):
            parse(text)


def test_flags_have_the_last_word_over_a_run(points_run, monkeypatch, capsys):
    config = json.loads((points_run / "config.json").read_text())
    (points_run / "config.json").write_text(json.dumps(config | {"device": "cuda", "dtype": "bfloat16"}))  # as a run on a GPU leaves it
    try:
        if not torch.cuda.is_available():
            assert "there is no cuda here" in error_line(monkeypatch, capsys, "--run", points_run)
        call_eval(monkeypatch, "--run", points_run, "--device", "cpu", "--episodes", 4, "--json", "--max-new-tokens", 1)
        assert json.loads(capsys.readouterr().out)["illegal_rate"] == 1  # no action is that short
        args = evaluation.make_parser().parse_args(["--run", str(points_run), "--device", "cpu", "--temperature", "0.7"])
        policy, config = evaluation.load(args, points_run, "rl")
        assert policy.model.dtype == torch.float32 and policy.temperature == 0.7 and policy.max_new_tokens == 30
    finally:
        (points_run / "config.json").write_text(json.dumps(config if isinstance(config, dict) else vars(config)))


@pytest.mark.parametrize("device, dtype", [("cpu", "bfloat16"), ("mps", "float32")])
def test_the_device_of_the_run_keeps_its_precision(device, dtype):
    config = Namespace(device="cpu", dtype="bfloat16", temperature=1.0, max_new_tokens=30)
    evaluation.override(config, evaluation.make_parser().parse_args(["--device", device]))
    assert config.device == device and config.dtype == dtype


def test_too_little_memory_for_so_many_games_is_one_line(points_run, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "evaluate", Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory")))
    assert "--num-envs" in error_line(monkeypatch, capsys, "--run", points_run)
    assert evaluation.evaluate.call_args.args[4] == 8  # as many games at a time as the run had


def test_a_cnn_plays_its_own_task_only(tmp_path, monkeypatch, capsys):
    run(tmp_path / "run", "--env", "blackjack", "--policy", "cnn")
    assert "its own task, blackjack" in error_line(monkeypatch, capsys, "--run", tmp_path / "run", "--env", "numberline")
    assert "no SFT" in error_line(monkeypatch, capsys, "--run", tmp_path / "run", "--policy", "sft")
    call_eval(monkeypatch, "--run", tmp_path / "run", "--env", "blackjack", "--episodes", 4, "--json")
    assert json.loads(capsys.readouterr().out)["episodes"] == 4


def test_an_expert_is_evaluated_without_the_libraries_of_models():
    script = ("import sys; import eval; sys.argv = 'eval.py --env numberline --policy expert --episodes 2 --json'.split(); eval.main(); "
              "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'train', 'httpx2')))")
    folder = os.path.dirname(evaluation.__file__)
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and json.loads(done.stdout)["success_rate"] == 1
