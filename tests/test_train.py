"""The commands as a user runs them: a run from nothing, the same run again, evaluation, bad input."""
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from PIL import Image

import env
import eval as evaluation
import prompts
import train
from policy import CNNPolicy, VLMPolicy, build_tiny

torch.set_num_threads(1)
QUICK = ["--sft-steps", "3", "--sft-batch", "8", "--env-steps", "32", "--rollout-steps", "16", "--num-envs", "8", "--minibatch", "8",
         "--epochs", "2", "--max-new-tokens", "30", "--eval-episodes", "8", "--seed", "3"]


def run(out, *flags):
    return train.main(["--out", str(out), *QUICK, *flags])


def metrics(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if "seconds" not in key} for row in rows]


@pytest.mark.parametrize("name", env.GAMES)
def test_a_run_from_nothing(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prompts, "corpus", partial(prompts.corpus, episodes=10))
    results = run(tmp_path / "run", "--env", name, "--cot-scale", "0.3")[name]
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


class LampEnv(env.Game):
    """A lamp is on or off; say which. A course project's first environment."""
    name = "lamp"
    actions = ("dark", "bright")
    saved = ("on",)

    def deal(self):
        self.on = bool(self.np_random.integers(2))

    def play(self, action):
        return (1 if (action == "bright") == self.on else -1), True, False

    def state(self):
        return {"on": self.on}

    @staticmethod
    def expert(info):
        return "bright" if info["on"] else "dark"

    def draw(self):
        return Image.new("RGB", (env.SIZE, env.SIZE), "white" if self.on else "black")


def test_one_class_and_one_prompt_entry_add_an_environment(tmp_path, monkeypatch):
    monkeypatch.setattr(env, "GAMES", dict(env.GAMES))
    env.register(LampEnv)
    monkeypatch.setitem(prompts.TASKS, "lamp", prompts.Task(
        rules="The picture shows a lamp. Say what it is",
        fields={"lamp": prompts.Field("on or off", lambda info: "on" if info["on"] else "off")},
        thoughts=lambda info: "it shines" if info["on"] else "no light"))
    results = run(tmp_path / "run", "--env", "lamp")["lamp"]
    assert results["expert"]["success_rate"] == 1 and len([row for row in metrics(tmp_path / "run") if row["stage"] == "rl"]) == 2


@pytest.mark.parametrize("flags", [["--prompt", "action"], ["--prompt", "vision"], ["--obs", "text"], ["--obs", "marked"], ["--cot-scale", "auto"],
                                   ["--ratio", "token"]], ids=" ".join)
def test_variants_of_the_method_train(tmp_path, flags):
    run(tmp_path / "run", "--env", "ezpoints", *flags)
    rl = [row for row in metrics(tmp_path / "run") if row["stage"] == "rl"]
    assert len(rl) == 2 and all(row["first_ratio_error"] < 1e-4 and row["skipped"] == 0 and 0 <= row["cot_scale"] <= 1 for row in rl)


def test_one_policy_plays_several_tasks(tmp_path, capsys, monkeypatch):
    results = run(tmp_path / "run", "--env", "numberline,blackjack")
    assert list(results) == ["numberline", "blackjack"] and all(set(rows) == {"random", "SFT", "RL", "expert"} for rows in results.values())
    for argv, code in ((["--env", "blackjack"], None), ([], 2)):
        monkeypatch.setattr("sys.argv", ["eval.py", "--run", str(tmp_path / "run"), "--episodes", "8", *argv])
        if code:
            with pytest.raises(SystemExit, match="2"):
                evaluation.main()
        else:
            evaluation.main()
    assert "name one of numberline,blackjack" in capsys.readouterr().err


def test_a_cnn_trains_without_language_and_is_evaluated_again(tmp_path, capsys, monkeypatch):
    rows = run(tmp_path / "run", "--env", "blackjack", "--policy", "cnn", "--temperature", "1e-4")["blackjack"]  # no chance
    assert set(rows) == {"random", "CNN + RL", "expert"} and rows["CNN + RL"]["illegal_rate"] == 0
    assert all(row["first_ratio_error"] < 1e-4 for row in metrics(tmp_path / "run") if row["stage"] == "rl")
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["eval.py", "--run", str(tmp_path / "run"), "--episodes", "8", "--seed", "3", "--num-envs", "8", "--json"])
    evaluation.main()
    assert json.loads(capsys.readouterr().out)["success_rate"] == rows["CNN + RL"]["success_rate"]


def test_a_sweep_reuses_what_is_there_and_refuses_other_settings(tmp_path, capsys):
    line = [*QUICK[:-2], "--env", "numberline", "--sweep", "cot-scale=1", "ratio=token", "--seeds", "0,1", "--out", str(tmp_path)]
    train.main(line)
    table = (tmp_path / "table.md").read_text()
    assert table.count("| numberline, ") == 2 and Image.open(tmp_path / "curves.png").size[1] > 300
    runs = json.loads((tmp_path / "table.json").read_text())
    assert list(runs) == ["numberline, cot-scale 1", "numberline, ratio token"]
    assert all(len(seeds) == 2 and seeds[0]["RL"]["episodes"] == 8 for seeds in runs.values())
    before = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*/metrics.jsonl")}
    shutil.rmtree(tmp_path / "cot-scale-1-seed1")
    train.main(line)
    changed = [file.parent.name for file in tmp_path.glob("*/metrics.jsonl") if before[file] != file.stat().st_mtime_ns]
    assert changed == ["cot-scale-1-seed1"] and (tmp_path / "table.md").read_text() == table
    with pytest.raises(SystemExit, match="2"):
        train.main([*line, "--lr", "0.5"])
    assert "has other settings" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [
    ["--preset", "paper", "--sft-optimizer", "muon"],
    ["--env", "chess"], ["--cot-scale", "2"], ["--cot-scale", "nan"], ["--cot-scale", "x"], ["--num-envs", "0"], ["--env-steps", "-5"],
    ["--lr", "0"], ["--minibatch", "x"], ["--rollout-steps", "100"], ["--env-steps", "100"], ["--model", "no/such-model"], ["--out", "/proc/none"],
    ["--lora-rank", "0"], ["--dtype", "bfloat16"], ["--value-coef", "-1"], ["--policy", "cnn", "--drift-coef", "0.1"], ["--policy", "cnn", "--model", "no/such-model", "--preset", "small"], ["--quantize", "4bit"], ["--seeds", "1,2"], ["--device", "mps"], ["--policy", "cnn", "--env", "alfworld"], ["--env", "blackjack,chess"], ["--ratio", "word"],
    ["--num-envs", "99999999", "--rollout-steps", "99999999", "--env-steps", "99999999"]])
def test_bad_flags_give_one_line_and_exit_code_2(flags, tmp_path, capsys):
    base = {"--env": "blackjack", "--out": str(tmp_path / "run")} | dict(zip(flags[::2], flags[1::2]))
    with pytest.raises(SystemExit) as stop:
        train.main([x for pair in base.items() for x in pair])
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.out == "" and captured.err.count("\n") == 1 and "error: " in captured.err
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SystemExit) as stop:
        train.main(["--env", "blackjack", "--out", str(tmp_path)])
    assert stop.value.code == 2 and (tmp_path / "config.json").read_text() == "{}"


def crash(monkeypatch, target, call, error=KeyboardInterrupt):
    """Let the `call`-th call of train's function `target` raise `error`."""
    owner = eval(target.rpartition(".")[0], vars(train)) if "." in target else train
    name, calls, original = target.rpartition(".")[2], [], getattr(owner, target.rpartition(".")[2])

    def wrapper(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise error
        return original(*args, **kwargs)
    monkeypatch.setattr(owner, name, wrapper)


@pytest.mark.parametrize("target, call", [
    ("cosine", 2), ("cosine", 4), ("Collector.collect", 1), ("Collector.collect", 2), ("ppo_update", 2), ("os.fsync", 1), ("os.fsync", 4),
    ("evaluate", 2), ("evaluate", 3), ("expert_agent", 1), ("shutil.copytree", 1)])
def test_a_run_that_crashed_goes_on_exactly(undisturbed, target, call, tmp_path):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        crash(patch, target, call)
        run(tmp_path / "run", "--env", "ezpoints")
    train.main(["--resume", str(tmp_path / "run")])
    assert metrics(tmp_path / "run") == metrics(undisturbed)
    for file in ("adapter/adapter_model.safetensors", "value_head.safetensors", "sft/model.safetensors"):
        assert (tmp_path / "run" / file).read_bytes() == (undisturbed / file).read_bytes()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    run(out, "--env", "ezpoints")
    return out


def stopped_run(out):
    """A run that ended after its first PPO update."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        crash(patch, "Collector.collect", 2)
        run(out, "--env", "ezpoints")
    return sorted(out.glob("checkpoint-*.safetensors"))


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(undisturbed, tmp_path, capsys):
    *_, last = stopped_run(tmp_path / "run")
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes(content)
    train.main(["--resume", str(tmp_path / "run")])
    assert "damaged" in capsys.readouterr().err and last.with_name(last.name + ".broken").exists()
    assert metrics(tmp_path / "run") == metrics(undisturbed)


def test_the_last_two_checkpoints_are_kept_until_the_end(undisturbed, tmp_path):
    assert len(stopped_run(tmp_path / "run")) == 2 and not list(undisturbed.glob("checkpoint-*"))


def error_line(capsys, *flags):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.main([str(flag) for flag in flags])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("error: ") == 1 and "Traceback" not in error
    return error


def test_a_run_goes_on_with_its_own_settings_only(tmp_path, capsys):
    stopped_run(tmp_path / "run")
    error = error_line(capsys, "--resume", tmp_path / "run", "--lr", "0.5")
    assert "--lr 0.5" in error and "0.0004" in error
    assert "no run" in error_line(capsys, "--resume", tmp_path)
    config = json.loads((tmp_path / "run/config.json").read_text())
    (tmp_path / "run/config.json").write_text(json.dumps(config | {"env": "gone"}))
    assert "--env is one of" in error_line(capsys, "--resume", tmp_path / "run")


def test_a_directory_has_one_run_at_a_time(tmp_path, capsys):
    stopped_run(tmp_path / "run")
    with FileLock(tmp_path / "run" / ".lock"):
        assert "another process" in error_line(capsys, "--resume", tmp_path / "run")


def test_metrics_end_where_the_checkpoint_says_however_often_a_run_goes_on(tmp_path):
    config = Namespace(env="blackjack", preset="tiny")
    policy = CNNPolicy(("+", "-"))
    optimizer = torch.optim.Adam(policy.parameters())
    with train.Run(tmp_path, config) as run:
        run.log(stage="sft", step=1)
        run.checkpoint("sft", 1, policy, optimizer, step=1)
        run.log(stage="sft", step=2)  # comes after the checkpoint: it will come again
    for index in (2, 3):
        with train.Run(tmp_path, config) as run:
            run.checkpoint("sft", index, policy, optimizer, step=index)  # before anything is logged
            assert [row["step"] for row in run.rows] == [1]
            assert run.last_step == 1  # where a tracker puts the next evaluation


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, capsys, monkeypatch):
    with pytest.MonkeyPatch.context() as patch:
        crash(patch, "os.fsync", 3, OSError(errno.ENOSPC, "No space left on device"))
        assert "No space left" in error_line(capsys, "--out", tmp_path / "run", *QUICK, "--env", "ezpoints")
    assert not (tmp_path / "run" / "checkpoint.tmp").exists()
    train.main(["--resume", str(tmp_path / "run")])


def test_a_signal_stops_at_the_next_checkpoint(undisturbed, tmp_path, capsys):
    with pytest.MonkeyPatch.context() as patch:
        update = train.ppo_update
        patch.setattr(train, "ppo_update", lambda *args, **kwargs: signal.raise_signal(signal.SIGTERM) or update(*args, **kwargs))
        with pytest.raises(SystemExit) as stop:
            run(tmp_path / "run", "--env", "ezpoints")
    assert stop.value.code == 143 and "--resume" in capsys.readouterr().err
    train.main(["--resume", str(tmp_path / "run")])
    assert metrics(tmp_path / "run") == metrics(undisturbed)


def test_sft_with_muon_goes_on_exactly(tmp_path):
    flags = ("--env", "ezpoints", "--sft-optimizer", "muon")
    undisturbed = tmp_path / "elsewhere" / "run"  # not beside the other run, which would take its SFT weights
    run(undisturbed, *flags)
    with pytest.MonkeyPatch.context() as patch:
        step = train.MuonAndAdamW.step
        patch.setattr(train.MuonAndAdamW, "step", lambda self: signal.raise_signal(signal.SIGTERM) or step(self))
        with pytest.raises(SystemExit):
            run(tmp_path / "run", *flags)
    train.main(["--resume", str(tmp_path / "run")])
    assert (tmp_path / "run/sft/model.safetensors").read_bytes() == (undisturbed / "sft/model.safetensors").read_bytes()


@pytest.mark.parametrize("share", [0, 1])
def test_demo_play_says_whose_actions_sft_plays(share, tmp_path, monkeypatch):
    write, step = train.write_demonstrations, env.Games.step
    expected, played = [], []

    def write_and_watch(policy, games, rng, config):
        answers, actions = write(policy, games, rng, config)
        right = list(actions) if share else [env.expert_action(info) for info in games.infos]

        def watched_step(actions, restart):
            expected.append(right)
            played.append(list(actions))
            return step(games, actions, restart=restart)

        games.step = watched_step
        return answers, actions

    monkeypatch.setattr(train, "write_demonstrations", write_and_watch)
    run(tmp_path / "run", "--env", "blackjack", "--demo-noise", "1", "--demo-play", str(share))
    assert len(played) == 3 and played == expected


def test_muon_has_the_matrices_and_adamw_all_else():
    policy = VLMPolicy(*build_tiny())
    optimizer = train.MuonAndAdamW(policy.model, list(policy.model.parameters()), 0.1)
    matrices, others = [[id(p) for group in part.param_groups for p in group["params"]] for part in (optimizer.muon, optimizer.adamw)]
    assert sorted(matrices + others) == sorted(id(p) for p in policy.model.parameters())
    names = {id(p): name for name, p in policy.model.named_parameters()}
    assert all(re.search(r"(proj|fc\d|linear_\d)\.weight$", names[i]) for i in matrices)
    assert not any("proj" in names[i] and names[i].endswith("weight") for i in others)


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 24)])
def test_nearly_orthogonal_keeps_directions_and_makes_sizes_equal(shape):
    torch.manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    sizes = torch.logspace(0, -1, 8)  # from 1 down to 0.1
    result = left.T @ train.nearly_orthogonal(left @ torch.diag(sizes) @ right) @ right.T
    assert torch.allclose(result, torch.diag(result.diagonal()), atol=1e-5)
    assert 0.68 < result.diagonal().min() and result.diagonal().max() < 1.21


@pytest.mark.parametrize("shape", [(64, 64), (192, 64), (64, 192)])
def test_muon_takes_the_steps_of_the_library(shape):
    torch.manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(shape))
    theirs = torch.nn.Parameter(ours.detach().clone())
    start = ours.detach().clone()
    optimizer = train.Muon([ours], 3e-3)
    library = torch.optim.Muon([theirs], 3e-3, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        library.step()
    assert (ours - theirs).norm() < 0.02 * (ours - start).norm()  # the library rounds to bfloat16, 8 bits


@pytest.mark.parametrize("stops_at_once", [True, False])
def test_a_model_that_never_acts_does_not_break_training(stops_at_once, tmp_path, monkeypatch):
    def mute(config, weights=None, build=train.build_policy):
        policy = build(config, weights)
        word = policy.eos_ids if stops_at_once else [policy.tokenizer.convert_tokens_to_ids("hand")]
        policy.forbidden[:] = -torch.inf  # every other token
        policy.forbidden[word] = 0
        return policy
    monkeypatch.setattr(train, "build_policy", mute)
    monkeypatch.setattr(train, "sft", lambda policy, config, run: None)  # its answers would be impossible
    results = run(tmp_path / "run", "--env", "blackjack")["blackjack"]
    rl = [row for row in metrics(tmp_path / "run") if row["stage"] == "rl"]
    assert results["RL"]["illegal_rate"] == 1 and all(row["illegal_rate"] == 1 and row["skipped"] == 0 for row in rl)
    assert all(torch.isfinite(torch.tensor(row[key])) for row in rl for key in ("policy_loss", "value_loss", "grad_norm"))


def two_processes(script, out):
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, "--env", "blackjack",
                           "--out", out, *QUICK], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)


def test_two_processes_train_one_policy(tmp_path):
    done = two_processes(train.__file__, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    rl = [row for row in metrics(tmp_path / "run") if row["stage"] == "rl"]
    assert [row["env_steps"] for row in rl] == [16, 32] and all(row["first_ratio_error"] < 1e-4 for row in rl)
    assert done.stdout.count("run: ") == 1 and (tmp_path / "run/value_head.safetensors").exists()


def test_a_process_that_dies_ends_the_run_with_a_line(tmp_path):
    (tmp_path / "dies.py").write_text(f"""import os, sys
sys.path.insert(0, {str(Path(train.__file__).parent)!r})
import train
if os.environ["RANK"] == "1":
    train.sum_gradients = lambda parameters: os._exit(1)
train.main()""")
    done = two_processes(tmp_path / "dies.py", tmp_path / "run")
    assert done.returncode and done.stderr.count("process 0: another one died") == 1 and "--resume" in done.stderr
    assert "[rank0]: Traceback" not in done.stderr


def test_a_signal_to_one_of_two_processes_stops_both_at_the_same_step(tmp_path):
    (tmp_path / "stops.py").write_text(f"""import os, signal, sys
sys.path.insert(0, {str(Path(train.__file__).parent)!r})
import train
total = train.sum_gradients
def stop(parameters):
    train.sum_gradients = total
    total(parameters)
    os.kill(os.getpid(), signal.SIGTERM)
if os.environ["RANK"] == "1":
    train.sum_gradients = stop
train.main()""")
    done = two_processes(tmp_path / "stops.py", tmp_path / "run")
    assert done.returncode and done.stderr.count("go on with: torchrun ... train.py --resume") == 1 and "]: Traceback" not in done.stderr
    assert [file.name[:18] for file in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-0000001"]


@pytest.mark.parametrize("flags, words", [
    (["--sweep", "cot-scale=0", "ratoi=token"], "ratoi"),
    (["--sweep", "cot-scale=0", "clip=x"], "x"),
    (["--sweep", "seed=1,2"], "--seeds"),
    (["--sweep", "cot-scale=0", "--seed", "7"], "--seeds"),
    (["--sweep", "cot-scale=0", "--seed=7"], "--seeds"),
    (["--sweep", "cot-scale=0", "out=x"], "--out is no setting"),
    (["--sweep", "seeds=1"], "--seeds is no setting"),
    (["--sweep", "cot-scale=0", "--seeds", "1,1"], "twice")])
def test_a_sweep_checks_all_settings_before_the_first_run(flags, words, tmp_path, capsys):
    line = [*QUICK[:-2], "--env", "numberline", "--out", str(tmp_path / "sweep"), *flags]
    with pytest.raises(SystemExit) as stop:
        train.main(line)
    assert stop.value.code == 2 and words in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


def test_a_sweep_draws_the_curve_of_a_mixture_once(tmp_path):
    train.main([*QUICK[:-2], "--env", "numberline,ezpoints", "--sweep", "cot-scale=1", "--out", str(tmp_path)])
    runs = json.loads((tmp_path / "table.json").read_text())
    lengths = {name: len(seeds[0]["curve"]) for name, seeds in runs.items()}
    assert lengths == {"numberline, cot-scale 1": 0, "ezpoints, cot-scale 1": 0, "numberline,ezpoints, cot-scale 1": 2}
    assert runs["ezpoints, cot-scale 1"][0]["RL"]["episodes"] == 8


def test_a_sweep_over_a_damaged_run_gives_one_line(tmp_path, capsys):
    (tmp_path / "cot-scale-1-seed0").mkdir()
    (tmp_path / "cot-scale-1-seed0/config.json").write_text("{")
    with pytest.raises(SystemExit) as stop:
        train.main([*QUICK[:-2], "--env", "numberline", "--sweep", "cot-scale=1", "--out", str(tmp_path)])
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("obs", ["image", "text"])
def test_other_thoughts_get_other_sft_weights(obs, tmp_path, monkeypatch):
    config, out = train.configure(["--env", "numberline", "--obs", obs, "--out", str(tmp_path / "run")])
    name = train.sft_cache(config, out)
    assert train.sft_cache(config, out) == name
    other = replace(prompts.TASKS["numberline"], thoughts=lambda info: "something else")
    monkeypatch.setitem(prompts.TASKS, "numberline", other)
    assert train.sft_cache(config, out) != name


def test_a_cache_that_cannot_be_written_ends_no_run(tmp_path, capsys):
    (tmp_path / "sft-cache").write_text("in the way")
    run(tmp_path / "run", "--env", "numberline")
    assert "not kept for other runs" in capsys.readouterr().out
    assert (tmp_path / "run/sft/model.safetensors").exists()


def test_zeros_that_mean_off(tmp_path):
    off = ["--value-coef", "0", "--drift-coef", "0", "--target-kl", "0", "--max-grad-norm", "0"]
    run(tmp_path / "run", "--env", "numberline", "--sft-steps", "0", *off)
    rl = [row for row in metrics(tmp_path / "run") if row["stage"] == "rl"]
    assert len(rl) == 2 and all(row["skipped"] == 0 for row in rl)


def test_an_update_whose_mini_batches_all_break_ends_the_run(tmp_path, capsys):
    error = error_line(capsys, "--out", tmp_path / "run", *QUICK, "--env", "numberline",
                       "--lr", "1e6", "--max-grad-norm", "0")
    assert "smaller --lr" in error


def test_a_run_of_a_device_that_is_not_here_goes_on_elsewhere(tmp_path, capsys, undisturbed):
    stopped_run(tmp_path / "run")
    config = json.loads((tmp_path / "run/config.json").read_text())
    (tmp_path / "run/config.json").write_text(json.dumps(config | {"device": "mps"}))
    assert "--device cpu" in error_line(capsys, "--resume", tmp_path / "run")
    train.main(["--resume", str(tmp_path / "run"), "--device", "cpu"])
    assert metrics(tmp_path / "run") == metrics(undisturbed)


def test_the_memory_plan_knows_processes_and_that_no_piece_exceeds_its_batch(monkeypatch):
    config, _ = train.configure(["--env", "blackjack"])
    policy = train.build_policy(config)

    def parts(processes=1, **settings):
        monkeypatch.setattr(train, "world_size", lambda: processes)
        return train.memory_plan(policy, Namespace(**vars(config) | settings))[1]

    alone = parts(num_envs=64, minibatch=64, sft_batch=32, microbatch=64)
    four = parts(4, num_envs=64, minibatch=64, sft_batch=32, microbatch=64)
    assert four["weights"] == alone["weights"]
    assert four["KV cache and prompts"] == pytest.approx(alone["KV cache and prompts"] / 4)
    assert four["activations"] == pytest.approx(alone["activations"] / 4)

    # A piece of 1,000 cannot be cut from batches of 64 and 128
    cut = parts(minibatch=64, sft_batch=128, microbatch=1000)
    assert cut["activations"] == pytest.approx(2 * alone["activations"])


@pytest.mark.parametrize("name, millions, preset", [("tiny", None, "tiny"), ("a", 3999, "small"), ("a", 4000, "paper")])
def test_the_preset_follows_the_size_of_the_model(name, millions, preset, monkeypatch):
    monkeypatch.setattr(train, "count_parameters", lambda *_: millions * 1_000_000)
    config, _ = train.configure(["--env", "blackjack", "--model", name])
    assert config.preset == preset
    assert config.lora_rank == (128 if preset == "paper" else 16)
    config, _ = train.configure(["--env", "blackjack", "--model", name, "--preset", "paper"])
    assert config.preset == "paper" and config.lora_rank == 128


@pytest.mark.parametrize("capabilities, dtype", [({"avx512_bf16": True}, "bfloat16"), ({"avx512_bf16": False, "avx2": True}, "float32")])
def test_a_small_model_is_in_bfloat16_where_the_cpu_has_it(capabilities, dtype, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)

    def best(preset, device="cpu", sft_lora=True, policy="vlm"):
        return train.best_dtype(Namespace(preset=preset, device=device, sft_lora=sft_lora, policy=policy))

    assert best("small") == dtype
    assert best("paper") == best("tiny") == best("small", sft_lora=False) == best("small", "mps") == best("small", policy="cnn") == "float32"
    assert best("paper", "cuda") == best("small", "cuda") == "bfloat16"


def test_the_expected_time_is_the_sum_of_what_is_done(monkeypatch):
    monkeypatch.setattr(train.time, "perf_counter", lambda: 0.0)  # so that play takes no time
    monkeypatch.setattr(train, "seconds_per_answer", lambda *_: (10.0, 1.0))
    config, _ = train.configure(["--env", "blackjack"])

    def plan(sft_is_done=False, processes=1, **settings):
        monkeypatch.setattr(train, "world_size", lambda: processes)
        return train.time_plan(None, Namespace(**vars(config) | settings), sft_is_done)

    # 32 demonstrations a step, each a pass and a gradient of two passes
    assert plan(sft_steps=10)["SFT"] == 10 * 32 * 3
    assert plan(sft_steps=10, gradient_checkpointing=True)["SFT"] == 10 * 32 * 4
    assert plan(sft_steps=10, processes=2)["SFT"] == 10 * 16 * 3
    assert plan(sft_is_done=True)["SFT"] == plan(policy="cnn")["SFT"] == 0
    # A step is sampled, scored by the SFT policy, and learned from in each epoch
    assert plan(env_steps=100, epochs=2, drift_coef=0.1)["RL"] == 100 * (10 + 1 + 2 * 3)
    assert plan(env_steps=100, epochs=2, drift_coef=0.0)["RL"] == 100 * (10 + 2 * 3)
    assert plan(env_steps=100, epochs=2, drift_coef=0.0, dtype="bfloat16")["RL"] == 100 * (10 + 1 + 2 * 3)
    assert plan(env_steps=100, epochs=2, drift_coef=0.0, processes=2)["RL"] == 50 * (10 + 2 * 3)
    # The expert's hands have between 1 and 2 steps; two policies write, of the CNN's one
    assert 2 * 100 * 10 < plan(eval_episodes=100)["evaluation"] < 2 * 100 * 2 * 10
    assert plan(eval_episodes=100, policy="cnn")["evaluation"] == plan(eval_episodes=100)["evaluation"] / 2


class SlowPolicy:
    """8 answers take 2 seconds and 0.5 for each token; a score takes 3 seconds."""

    max_new_tokens = 96

    def __init__(self, clock):
        self.clock = clock

    def act(self, images, questions):
        assert len(images) == len(questions) == 8
        self.clock.append(2 + 0.5 * self.max_new_tokens)
        return [Namespace(tokens=[0] * self.max_new_tokens)] * 8

    def evaluate(self, answers):
        self.clock.append(3.0 * len(answers))
        return Namespace(value=torch.zeros(len(answers)))


@pytest.mark.parametrize("policy, expected", [("vlm", (2 + 0.5 * 30) / 8), ("cnn", (2 + 0.5) / 8)])
def test_the_time_of_an_answer_follows_from_1_and_9_tokens(policy, expected, monkeypatch):
    clock = []
    monkeypatch.setattr(train.time, "perf_counter", lambda: sum(clock))
    demonstrations = [Namespace(tokens=[0] * length) for length in (20, 30, 10, 30, 20, 20, 20, 20)]
    monkeypatch.setattr(train, "write_demonstrations", lambda *_: (demonstrations, []))
    config, _ = train.configure(["--env", "blackjack", "--num-envs", "8", "--rollout-steps", "8"])
    config.policy = policy
    slow = SlowPolicy(clock)
    assert train.seconds_per_answer(slow, config) == (expected, 3.0)
    assert slow.max_new_tokens == 96


@pytest.mark.parametrize("flags", [["--env", "numberline,ezpoints"], ["--env", "blackjack", "--policy", "cnn"]])
def test_to_expect_a_time_changes_nothing(flags, monkeypatch):
    monkeypatch.setattr(prompts, "corpus", partial(prompts.corpus, episodes=10))
    config, _ = train.configure([*flags, "--num-envs", "4", "--rollout-steps", "4"])
    policy = train.build_policy(config)
    weights = {name: x.clone() for name, x in policy.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train.time_plan(policy, config, sft_is_done=False)
    train.warn_of_busy_cores(policy, config)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(x, weights[name]) for name, x in policy.state_dict().items())


@pytest.mark.parametrize("slowness, device, said", [(9, "cpu", True), (1, "cpu", False), (9, "cuda", False)])
def test_threads_that_are_slower_than_one_are_reported(slowness, device, said, monkeypatch, capsys):
    """`slowness`: a step with four threads takes so many seconds; with one thread it takes one."""
    config, _ = train.configure(["--env", "blackjack"])
    config.device = device
    threads = [4]
    clock = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(train.time, "perf_counter", lambda: sum(clock))
    policy = Namespace(value=lambda *_: clock.append(slowness if threads[-1] == 4 else 1))
    train.warn_of_busy_cores(policy, config)
    assert threads[-1] == 4  # as before
    assert ("4 threads take 9 times as long as one" in capsys.readouterr().out) == said


def test_a_time_has_a_unit():
    assert [train.in_words(seconds) for seconds in (45, 720, 12_240)] == ["45 s", "12 min", "3.4 h"]


def test_without_a_terminal_a_bar_is_silent_for_the_first_minute(capsys):
    bar = train.progress_bar("SFT", 10, 0)
    for step in range(10):
        bar.update()
        bar.set_postfix(loss="0.1", refresh=False)
    assert capsys.readouterr().err == ""

    bar.start_t -= 61  # as if a minute had passed
    bar.last_print_t = bar.start_t + 60
    bar.refresh()
    assert "SFT: 100%" in capsys.readouterr().err
    bar.close()
