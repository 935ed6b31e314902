"""The commands as a user runs them: a run from nothing, the same run again, evaluation, bad input."""
import json
import shutil

import pytest
import torch

import env
import eval as evaluation
import train

torch.set_num_threads(1)
QUICK = ["--sft-steps", "3", "--sft-batch", "8", "--env-steps", "32", "--rollout-steps", "16", "--num-envs", "8", "--minibatch", "8",
         "--epochs", "2", "--max-new-tokens", "30", "--eval-episodes", "8", "--seed", "3"]


def run(out, *flags):
    return train.main(["--out", str(out), *QUICK, *flags])


def metrics(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if "seconds" not in key} for row in rows]


@pytest.mark.parametrize("name", env.GAMES)
def test_a_run_from_nothing(name, tmp_path, capsys):
    results = run(tmp_path / "run", "--env", name, "--cot-scale", "0.3")
    assert set(results) == {"random", "SFT", "RL", "expert"} and results["RL"]["episodes"] == 8
    rows = metrics(tmp_path / "run")
    assert {row["stage"] for row in rows} == {"sft", "rl", "eval"}
    rl = [row for row in rows if row["stage"] == "rl"]
    assert [row["env_steps"] for row in rl] == [16, 32]
    assert all(row["first_ratio_error"] < 1e-4 for row in rl)
    for file in ("config.json", "curve.png", "value_head.safetensors", "adapter/adapter_model.safetensors", "sft/model.safetensors"):
        assert (tmp_path / "run" / file).stat().st_size > 0
    assert name in capsys.readouterr().out


def test_the_same_seed_gives_the_same_run_with_and_without_cached_sft(tmp_path, capsys):
    run(tmp_path / "a", "--env", "blackjack")
    run(tmp_path / "b", "--env", "blackjack")
    assert "reused" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "sft-cache")
    run(tmp_path / "c", "--env", "blackjack")
    later = lambda out: [row for row in metrics(tmp_path / out) if row["stage"] != "sft"]  # noqa: E731
    assert later("a") == later("b") == later("c") and metrics(tmp_path / "a") == metrics(tmp_path / "c")
    adapters = [(tmp_path / out / "adapter/adapter_model.safetensors").read_bytes() for out in "abc"]
    assert adapters[0] == adapters[1] == adapters[2]


def test_eval_prints_one_json_object(tmp_path, capsys, monkeypatch):
    results = run(tmp_path / "run", "--env", "numberline")
    capsys.readouterr()
    for policy, row in (("rl", "RL"), ("sft", "SFT")):
        monkeypatch.setattr("sys.argv", ["eval.py", "--run", str(tmp_path / "run"), "--policy", policy, "--episodes", "8", "--seed", "3",
                                         "--num-envs", "8", "--json"])
        evaluation.main()
        result = json.loads(capsys.readouterr().out)
        assert {"env", "policy", "episodes", "success_rate", "ci95", "mean_return", "illegal_rate", "episode_length", "seconds"} <= set(result)
        assert 0 <= result["success_rate"] <= 1 and result["episodes"] == 8 and result["env"] == "numberline"
    assert set(results["RL"]) <= set(result)


def test_evaluation_plays_the_same_episodes_whatever_the_number_of_environments():
    one, other = (evaluation.evaluate(evaluation.expert_agent("points24"), "points24", 40, seed=1, num_envs=n) for n in (3, 40))
    assert {**one, "seconds": 0} == {**other, "seconds": 0}


def test_wilson_interval():
    low, high = evaluation.wilson_interval(0, 100)
    assert low == 0 and high == pytest.approx(0.037, abs=1e-3)
    low, high = evaluation.wilson_interval(50, 100)
    assert (low + high) / 2 == pytest.approx(0.5) and high - low == pytest.approx(0.19, abs=0.01)


@pytest.mark.parametrize("flags", [
    ["--env", "chess"], ["--cot-scale", "2"], ["--cot-scale", "nan"], ["--cot-scale", "x"], ["--num-envs", "0"], ["--env-steps", "-5"],
    ["--lr", "0"], ["--minibatch", "x"], ["--rollout-steps", "100"], ["--env-steps", "100"], ["--model", "no/such-model"], ["--out", "/proc/none"]])
def test_bad_flags_give_one_line_and_exit_code_2(flags, tmp_path, capsys):
    base = {"--env": "blackjack", "--out": str(tmp_path / "run")} | dict(zip(flags[::2], flags[1::2]))
    with pytest.raises(SystemExit) as stop:
        train.main([x for pair in base.items() for x in pair])
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.out == "" and captured.err.count("\n") == 1 and "error: " in captured.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags", [["--run", "/no/such/dir"], [], ["--policy", "random"], ["--env", "blackjack", "--policy", "x"], ["--episodes", "0"]])
def test_eval_bad_flags(flags, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["eval.py", *flags])
    with pytest.raises(SystemExit) as stop:
        evaluation.main()
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.out == "" and captured.err.count("\n") == 1


def test_a_run_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SystemExit) as stop:
        train.main(["--env", "blackjack", "--out", str(tmp_path)])
    assert stop.value.code == 2 and (tmp_path / "config.json").read_text() == "{}"
