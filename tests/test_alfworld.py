"""ALFWorld: rooms, expert, rewards, pictures that hide what is not seen, data set, engine."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

import env
import prompts

KINDS = list(env.ALFRED_TASKS)
ROOT = Path(env.__file__).parent


def begin(kind, number, split="train"):
    """A game in its first state, with its walkthrough by the expert."""
    game = env.ALFWorldEnv(split=split)
    game.reset(seed=0)
    game.game = f"{kind}/{number}"
    loaded = env.kept_game(split, game.game)
    game._begin(*loaded)
    return game, loaded[0]["walkthrough"]


def same(info, other):
    """Whether two infos are the same; their masks are arrays."""
    return str(info) == str(other)


def play(game, command):
    return game.step(game.legal_actions().index(command))


def python(code, **variables):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | variables, capture_output=True, text=True)


@pytest.mark.parametrize("split", ["train", "unseen"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_expert_solves_built_in_games_also_after_random_actions(kind, split):
    rng = np.random.default_rng(0)
    for number in range(2):
        game, walkthrough = begin(kind, number, split)
        assert 0 < len(walkthrough) <= 30
        for _ in range(15):  # on the way it opens, carries, heats, cools and leaves things anywhere
            if not game._won:
                game._act(str(rng.choice(game.legal_actions())))
        steps = 0
        while not game._won:
            game._act(game.expert(game.state()))
            steps += 1
            assert steps <= 40


@pytest.mark.parametrize("kind", KINDS)
def test_the_expert_turns_to_receptacles_at_the_same_place(kind):
    rng = np.random.default_rng(1)
    game, _ = begin(kind, 1)
    loaded, trajectory = env.kept_game("train", game.game)
    problem = loaded["pddl_problem"]
    for other in (2, 4, 6):  # as in the data set, where a place may have several
        problem = problem.replace(f"loc_bar_{other})", f"loc_bar_{other - 1})")
    game._begin(loaded | {"pddl_problem": problem, "sas": None}, trajectory)
    turned = 0
    for step in range(50):
        if not game._won:
            command = str(rng.choice(game.legal_actions())) if step < 10 else game.state()["expert"]
            turned += command.startswith("examine")
            game._act(command)
    assert game._won and turned


def test_the_kept_grounding_serves_its_own_problem_alone():
    import fast_downward
    (mine, _), (other, _) = env.kept_game("train", "pick/1"), env.kept_game("train", "heat/77")
    begin("pick", 1)
    assert fast_downward.pddl2sas(mine["pddl_domain"], mine["pddl_problem"])[1] == mine["sas"]
    assert fast_downward.pddl2sas(other["pddl_domain"], other["pddl_problem"] + "\n")[1] != mine["sas"]


def test_built_in_games_come_from_their_seeds_and_unseen_rooms_are_other_rooms():
    def rooms(split):
        games = [env.built_in_game(split, kind, number)[0] for kind in KINDS for number in range(env.ALFWorldEnv.games[split])]
        return {" ".join(sorted(re.findall(r"\(receptacleType (?!\?)\S+ (\w+)Type\)", game["pddl_problem"]))) for game in games}
    train, unseen = rooms("train"), rooms("unseen")
    assert not train & unseen and len(train) > 80 and len(unseen) > 30
    assert all(len(room.split()) == 6 for room in train | unseen)
    assert env.built_in_game("train", "heat", 3) == env.built_in_game("train", "heat", 3) != env.built_in_game("train", "heat", 4)
    assert python("import env; print(env.built_in_game('train', 'heat', 3))").stdout.strip() == str(env.built_in_game("train", "heat", 3))


def test_task_types_come_equally_often():
    game = env.ALFWorldEnv()
    game._load, game._begin = lambda name: ({}, None), lambda *_: None
    rng, drawn = np.random.default_rng(0), []
    game.np_random = rng
    for _ in range(1200):
        game.deal()
        drawn.append(game.game.split("/")[0])
    assert all(160 < drawn.count(kind) < 240 for kind in KINDS)


# For each type, what the walkthrough earns a step: (before, from which command on, then); 51 at the end.
@pytest.mark.parametrize("kind, verb, share", [("pick", None, 0), ("light", "take", 1 / 2), ("two", "move", 1 / 2),
                                               ("clean", "clean", 1 / 3), ("heat", "heat", 1 / 3), ("cool", "cool", 1 / 3)])
def test_rewards_of_a_walkthrough(kind, verb, share):
    game, walkthrough = begin(kind, 1)
    reached = False
    for command in walkthrough:
        _, reward, terminated, truncated, info = play(game, command)
        reached |= command.split()[0] == verb
        won = command is walkthrough[-1]
        assert reward == pytest.approx(51 if won else share * reached)
        assert terminated == info["success"] == info["won"] == won and not truncated
    assert game.illegal_penalty == 1 and env.BlackjackEnv.illegal_penalty == 0


def test_goal_conditions_by_hand():
    game, _ = begin("heat", 1)

    def rate(where, carried, hot):
        game._receptacle_of, game._carried = where, carried
        game._facts = {("ishot", o) for o in hot}
        return game._goal_conditions()
    game._target, game._goal = "mug", "countertop"
    assert rate({"mug 1": "shelf 1"}, "", []) == 0 and rate({}, "mug 1", []) == 0
    assert rate({}, "mug 1", ["mug 1"]) == pytest.approx(1 / 3)                       # hot, not yet placed
    assert rate({"mug 1": "countertop 2"}, "", []) == pytest.approx(1 / 3)            # placed, not hot
    assert rate({"mug 1": "countertop 1"}, "mug 2", ["mug 2"]) == pytest.approx(2 / 3)  # one is placed, another hot
    assert rate({"mug 1": "countertop 1"}, "", ["mug 1"]) == 1
    assert rate({"apple 1": "countertop 1"}, "", ["apple 1"]) == 0
    game._task_type = "two"
    assert rate({"mug 1": "countertop 1", "mug 2": "countertop 2"}, "", []) == 0.5  # both have to be in the same receptacle
    assert rate({"mug 1": "countertop 1", "mug 2": "countertop 1", "mug 3": "countertop 1"}, "", []) == 1


def test_fifty_steps_truncate():
    game, _ = begin("cool", 0)
    for step in range(50):
        _, reward, terminated, truncated, info = play(game, next(c for c in game.legal_actions() if c.startswith("go to")))
        assert not terminated and truncated == (step == 49) and reward == 0
    assert not info["success"]
    with pytest.raises(gym.error.ResetNeeded):
        game.step(0)


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_and_infos_hide_what_was_not_seen(kind):
    game, walkthrough = begin(kind, 2)
    closed = 0
    for command in [None, *walkthrough]:
        if command:
            play(game, command)
        info, picture = game.state(), game.render()
        assert "goal" not in info["observation"] and "task is" not in info["observation"]
        if shut := bool(game._place) and game._shut(game._place):
            assert info["visible"] == [] and not any(c.startswith("take") for c in game.legal_actions())
        closed += shut
        where = game._receptacle_of
        game._receptacle_of = {o: r for o, r in where.items() if r in game._seen}
        hidden = len(where) - len(game._receptacle_of)
        assert (game.render() == picture).all() and game.state() == info  # the expert knows no more
        game._receptacle_of = where | {"apple 9": game._place} if game._place else where
        assert (game.render() == picture).all() == (shut or not game._place)
        game._receptacle_of = where
        assert command or hidden
    assert kind != "cool" or closed


def test_what_is_opened_carried_or_changed_shows():
    game, walkthrough = begin("heat", 0)
    pictures = [game.render()]
    for command in walkthrough:
        play(game, command)
        pictures.append(game.render())
    assert all((a != b).any() for a, b in zip(pictures, pictures[1:]))


def test_games_that_take_turns_do_not_disturb_each_other():
    (one, first), (other, second) = begin("two", 0), begin("heat", 0)
    alone = []
    for command in first:
        one._act(command)
        alone.append((one.state(), one.legal_actions()))
    one, _ = begin("two", 0)
    for i, command in enumerate(first):
        if i < len(second):
            other._act(second[i])
        one._act(command)
        assert (one.state(), one.legal_actions()) == alone[i]
    assert one._won and (other._won or len(second) > len(first))


def test_a_snapshot_goes_on_exactly():
    game = env.ALFWorldEnv(split="unseen")
    rng = np.random.default_rng(0)
    game.reset(seed=3)
    for _ in range(12):
        game.step(int(rng.integers(len(game.legal_actions()))))
    kept = json.loads(json.dumps(game.snapshot()))
    again = env.ALFWorldEnv(split="unseen")
    again.reset(seed=8)
    picture, info = again.restore(kept)
    assert (picture == game.render()).all() and same(info, game._info()) and again.snapshot() == kept
    for _ in range(5):
        action = int(rng.integers(len(info["legal_actions"])))
        (p, r, *ends, i), (q, s, *others, info) = game.step(action), again.step(action)
        assert (p == q).all() and r == s and ends == others and same(i, info)
    assert (game.reset()[0] == again.reset()[0]).all() and game.game == again.game  # chance goes on, too


@pytest.mark.parametrize("kind", ["light", "clean", "two"])
def test_commands_and_words_are_those_of_alfworlds_own_environment(kind):
    import textworld
    from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
    from textworld.envs.pddl import PddlEnv
    game, walkthrough = begin(kind, 1)
    theirs = AlfredDemangler(PddlEnv(textworld.EnvInfos(admissible_commands=True, won=True)), shuffle=False)
    theirs.load(str(env.game_cache() / "train" / kind / "1" / "game.tw-pddl"))
    state, rng = theirs.reset(), np.random.default_rng(0)
    assert f"Your task is to: {game._task}." in state.feedback
    assert game._observation in state.feedback
    for step in range(25):
        assert game.legal_actions() == sorted(state["admissible_commands"])
        assert {"look", "inventory", "help"} < set(game.legal_actions())
        command = game.expert(game.state()) if step % 2 else str(rng.choice(game.legal_actions()))
        game._act(command)
        state, _, _ = theirs.step(command)
        assert state.feedback == game._observation and state["won"] == game._won
        if game._won:
            break


@pytest.mark.parametrize("command", ["look", "inventory", "help", "examine"])
def test_commands_that_only_tell_something_change_nothing_else(command):
    game, walkthrough = begin("heat", 1)
    for step in walkthrough[:4]:
        play(game, step)
    before = game.state()
    command = next(c for c in game.legal_actions() if c.startswith(command))
    _, reward, *_, info = play(game, command)
    told = {"observation"}
    assert {k: v for k, v in game.state().items() if k not in told} == {k: v for k, v in before.items() if k not in told}
    assert reward == before["goal_conditions"] and len(game.played) == 5


def test_an_index_beyond_the_legal_actions_plays_nothing():
    game, walkthrough = begin("pick", 1)
    play(game, walkthrough[0])
    before, picture = game.state(), game.render()
    image, reward, terminated, truncated, info = game.step(255)
    assert info["observation"] == "Nothing happens." and (image == picture).all()
    assert all(info[key] == value for key, value in before.items() if key != "observation") and len(game.played) == 2
    kept = json.loads(json.dumps(game.snapshot()))
    again = env.ALFWorldEnv()
    assert same(again.restore(kept)[1], info)


def test_unseen_games_are_played_in_turn_each_once():
    import eval as eval_module
    played = []

    class Unseen(env.ALFWorldEnv):
        def _begin(self, game, trajectory):
            super()._begin(game, trajectory)
            played.append(self.game)

    games = {kind: [f"{kind}/{i}" for i in range(2)] for kind in KINDS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Unseen, "games", {"train": 2, "unseen": 2})
        patch.setattr(env, "GAMES", env.GAMES | {"alfworld": Unseen})
        patch.setattr(env, "env_id", lambda name: "GymCards/Unseen-v0")
        gym.register("GymCards/Unseen-v0", entry_point=Unseen)
        orders = []
        for num_envs, seed in ((1, 0), (5, 1)):
            played.clear()
            result = eval_module.evaluate(eval_module.expert_agent, "alfworld", 14, seed, num_envs, "text")
            assert result["success_rate"] == 1
            orders.append(played[:14])
            assert result["by_task_type"] == {kind: [1, 3 if kind in KINDS[:2] else 2] for kind in sorted(KINDS)}
    every = [f"{kind}/{i}" for i in range(2) for kind in KINDS]
    assert orders[0] == orders[1] == every + every[:2] and sorted(every) == sorted(sum(games.values(), []))
    gym.registry.pop("GymCards/Unseen-v0")

    game = env.ALFWorldEnv(split="unseen")
    game._begin = lambda *_: None
    game._load = lambda name: ({}, None)
    seeds, order = env.episode_seeds("evaluation", 0), []
    for _ in range(301):
        game._number = next(seeds) % env.STREAM_LENGTH
        game.deal()
        order.append(game.game)
    assert len(set(order[:300])) == 300 and order[300] == order[0]


def test_a_game_cannot_be_copied_or_pickled():
    import copy
    import pickle
    game, _ = begin("pick", 1)
    for use in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"an ALFWorld game cannot be copied or pickled.*snapshot\(\)"):
            use(game)


def test_threads_do_not_disturb_each_other():
    from concurrent.futures import ThreadPoolExecutor

    def run(kind):
        game = env.ALFWorldEnv(obs="text")
        trace = []
        for seed in range(2):
            _, info = game.reset(seed=seed)
            while not game.over:
                *_, info = game.step(info["legal_actions"].index(info["expert"]))
                trace.append(str(info))
        return trace

    alone = run(0)
    with ThreadPoolExecutor(4) as pool:
        assert all(trace == alone for trace in pool.map(run, range(4)))


def test_the_data_set_is_used_where_the_variable_points(tmp_path, monkeypatch):
    loaded = env.kept_game("train", "heat/0")
    for split, thing in (("train", "Egg"), ("valid_unseen", "Mug"), ("valid_unseen", "AppleSliced")):
        folder = tmp_path / "json_2.1.1" / split / f"pick_heat_then_place_in_recep-{thing}-None-Shelf-7" / "trial_T2019"
        folder.mkdir(parents=True)
        for name, content in zip(("game.tw-pddl", "traj_data.json"), loaded):
            (folder / name).write_text(json.dumps(content))
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path))
    game = gym.make("GymCards/ALFWorld-v0", split="unseen")
    for seed in range(5):
        _, info = game.reset(seed=seed)
        assert game.unwrapped.game.startswith("pick_heat_then_place_in_recep-Mug-") and info["task_type"] == "heat"
    over = False
    while not over:
        *_, terminated, truncated, info = game.step(info["legal_actions"].index(env.expert_action(info)))
        over = terminated or truncated
    assert info["success"] and os.environ["ALFWORLD_DATA"] == str(tmp_path)
    with pytest.raises(ValueError, match="valid_seen.*alfworld-download"):
        env.ALFWorldEnv(split="seen")


@pytest.mark.parametrize("make", [lambda path: path, lambda path: path / "nowhere"])
def test_a_folder_without_games_says_what_to_do(tmp_path, monkeypatch, make):
    monkeypatch.setenv("ALFWORLD_DATA", str(make(tmp_path)))
    with pytest.raises(ValueError, match="alfworld-download"):
        env.ALFWorldEnv()


def test_wrong_splits_are_named():
    for split in ("seen", "valid"):
        with pytest.raises(ValueError, match=split):
            env.ALFWorldEnv(split=split)


def test_the_grammar_as_mended_for_python_3_13_says_the_same_words():
    code = ("import env, sys; env.alfworld_engine()\n"
            "if len(sys.argv) > 1:\n"
            "    sys.version_info = (3, 13)\n"
            "    env.mend_textworld()\n"
            "    from textworld.envs.pddl import textgen\n"
            "    assert textgen.EvalSymbol.derive.__module__ == 'env'\n"
            "game = env.ALFWorldEnv()\n"
            "for seed in range(3):\n"
            "    _, info = game.reset(seed=seed)\n"
            "    while not game.over:\n"
            "        print(info['observation'])\n"
            "        *_, info = game.step(info['legal_actions'].index(info['expert']))\n")
    plain, mended = (
        subprocess.run([sys.executable, "-c", code, *flag], cwd=ROOT, capture_output=True, text=True)
        for flag in ([], ["mended"])
    )
    assert mended.returncode == 0, mended.stderr
    assert plain.stdout == mended.stdout and plain.stdout.count("you") > 10


def test_built_in_games_are_kept_in_a_folder_of_their_version():
    assert env.game_cache().name == f"alfworld-{env.ROOMS_VERSION}"


def test_the_engine_of_the_task_can_be_chosen(monkeypatch):
    monkeypatch.setattr(env, "GAMES", dict(env.GAMES))
    env.use_thor()
    assert env.GAMES["alfworld"] is env.ALFWorldThorEnv
    assert env.env_id("alfworld") == "GymCards/ALFWorldThor-v0"
    env.use_text_engine()
    assert env.GAMES["alfworld"] is env.ALFWorldEnv
    assert env.env_id("alfworld") == "GymCards/ALFWorld-v0"


def test_processes_make_the_same_games_at_once_in_silence(tmp_path):
    code = ("import env, os, sys; argv = sys.argv; g = env.ALFWorldEnv(); [g.reset(seed=s) for s in range(3)]; g.step(0)\n"
            "assert sys.argv is argv and 'ALFWORLD_DATA' not in os.environ; sys.stderr.write(g.game + g._task)")
    processes = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)}, text=True,
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    (out, err), (out2, err2) = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], err + err2
    assert out == out2 == "" and err == err2
    assert not list(tmp_path.rglob(".*"))  # no half-written games


class Simulator:
    """A stand-in of `AlfredThorEnv` with one game: the same calls and the same words, a frame of pure blue above, red below."""
    json_file_list = ["data/pick_heat_then_place_in_recep-Mug-None-Shelf-1/trial/traj_data.json"]

    def __init__(self):
        self.action_queues, self.plan = [self], ["go to desk 1", "take mug 1 from desk 1", "put mug 1 in/on shelf 1"]

    def put(self, order):
        action, reset, file = order
        self.at = 0 if reset else self.at + (action == self.plan[self.at])
        said = "Looking quickly around you, you see a desk 1, and a shelf 1.\n\nYour task is to: put a hot mug in shelf."
        self.said = said if reset else "Nothing happens." if not self.at else (
            "You arrive at loc 3. On the desk 1, you see a book 2, and a mug 1.", "You pick up the mug 1 from the desk 1.",
            "You put the mug 1 in/on the shelf 1.")[self.at - 1]

    def wait_and_get_info(self):
        print("the package prints")
        return [self.said], [False], {"admissible_commands": [[*self.plan, "look", "inventory"]], "won": [self.at == 3],
                                      "goal_condition_success_rate": [self.at / 3], "extra.gamefile": ["data/pick_heat_then_place_in_recep-Mug"],
                                      "extra.expert_plan": [[self.plan[min(self.at, 2)]]]}

    def get_frames(self):
        frame = np.zeros((1, 200, 400, 3), np.uint8)
        frame[:, :100, :, 0], frame[:, 100:, :, 2] = 255, 255
        return frame


def test_thor_frames_words_and_rewards(capsys):
    game = env.ALFWorldThorEnv(engine=Simulator())
    image, info = game.reset(seed=0)
    assert image.shape == (300, 300, 3) and image[0, 0].tolist() == [0, 0, 255] and image[-1, 0].tolist() == [255, 0, 0]  # the frame's blue came first
    assert info["task"] == "put a hot mug in shelf" and info["task_type"] == "heat" and info["legal_actions"] == sorted([*Simulator().plan, "look", "inventory"])
    assert info["visible"] == ["desk 1", "shelf 1"] and info["carried"] == ""
    rewards = []
    for carried in ("", "mug 1", ""):
        _, reward, terminated, truncated, info = game.step(info["legal_actions"].index(game.expert(info)))
        rewards.append(reward)
        assert info["carried"] == carried
        assert "alfworld" == info["env"] and prompts.build_prompt(info) and prompts.demonstration(info, info["expert"])
    assert rewards == pytest.approx([1 / 3, 2 / 3, 51]) and terminated and not truncated and info["success"]
    assert capsys.readouterr().out == ""


def test_thor_is_cut_off_after_50_steps_and_restored_by_playing_again():
    game = env.ALFWorldThorEnv(engine=Simulator())
    _, info = game.reset(seed=0)
    game.step(info["legal_actions"].index("go to desk 1"))
    kept = json.loads(json.dumps(game.snapshot()))
    again = env.ALFWorldThorEnv(engine=Simulator())
    again.reset(seed=1)
    assert same(again.restore(kept)[1], game._info())
    ends = [game.step(0)[2:4] for _ in range(49)]
    assert not any(map(any, ends[:-1])) and ends[-1] == (False, True)


def test_thor_without_simulator_or_data_gives_one_line(tmp_path, monkeypatch, capsys):
    import train
    monkeypatch.setattr(env, "GAMES", dict(env.GAMES))
    for data in (None, str(tmp_path)):
        monkeypatch.delenv("ALFWORLD_DATA", raising=False) if data is None else monkeypatch.setenv("ALFWORLD_DATA", data)
        with pytest.raises(SystemExit, match="2"):
            train.main(["--env", "alfworld", "--alfworld", "thor", "--out", str(tmp_path / "run")])
        assert "alfworld-download" in (error := capsys.readouterr().err) and error.count("\n") == 1
    game = tmp_path / "json_2.1.1/train/pick_heat_then_place_in_recep-A/trial/game.tw-pddl"
    game.parent.mkdir(parents=True)
    game.write_text("{}")
    with pytest.raises(ValueError, match="display and pip install"):
        env.thor_engine("train")
