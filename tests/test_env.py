"""The games: Gymnasium's own checks, seeds, and rules against a second implementation."""
import importlib.util
import json
import os
import subprocess
import sys
from fractions import Fraction
from itertools import combinations_with_replacement, permutations, product
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from PIL import Image

import env

ROOT = Path(env.__file__).parent
GAMES = [name for name in env.GAMES if name != "alfworld" or importlib.util.find_spec("alfworld")]


def python(*arguments, stdin="", **variables):
    """Run Python in the folder of the six files."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT, env=os.environ | variables, input=stdin, capture_output=True, text=True,
    )


@pytest.mark.parametrize("name", GAMES)
def test_gymnasium_accepts_the_environment(name):
    check_env(gym.make(env.env_id(name)).unwrapped)


@pytest.mark.parametrize("name", GAMES)
def test_a_seed_fixes_an_episode(name):
    def episode(seed):
        game, rng, trace = gym.make(env.env_id(name)), np.random.default_rng(0), []
        image, info = game.reset(seed=seed)
        over = False
        while not over:
            image, reward, terminated, truncated, info = game.step(int(rng.integers(len(info["legal_actions"]))))
            trace.append((image.tobytes(), reward, terminated, truncated, str(info)))
            over = terminated or truncated
        return trace
    assert episode(7) == episode(7)
    assert any(episode(7) != episode(seed) for seed in range(8, 12))


@pytest.mark.parametrize("name", GAMES)
def test_wrong_use_raises_gymnasiums_errors(name):
    game = env.GAMES[name]()
    with pytest.raises(gym.error.ResetNeeded):
        game.step(0)
    _, info = game.reset(seed=0)
    for action in (-1, len(info["legal_actions"]), 0.5, "hit"):
        with pytest.raises(gym.error.InvalidAction):
            game.step(action)
    over = False
    while not over:
        over = any(game.step(0)[2:4])
    with pytest.raises(gym.error.ResetNeeded):
        game.step(0)


# -- a second implementation of the rules, from the state before and after a step ---------------------


def numberline_rule(before, action, after, steps):
    position = max(0, min(5, before["current"] + {"+": 1, "-": -1}[action]))
    assert after["current"] == position and after["target"] == before["target"]
    if position == before["target"]:
        return 1, True, False
    closer = abs(position - before["target"]) < abs(before["current"] - before["target"])
    return (0 if closer else -1), False, steps == 10


def points_rule(target, places):
    def rule(before, action, after, steps):
        if action == "=":
            text = "".join(before["formula"])
            numbers = [int(e) for e in before["formula"] if e.isdigit()]
            adjacent = any(a.isdigit() and b.isdigit() for a, b in zip(before["formula"], before["formula"][1:]))
            try:  # few characters, our own alphabet: Python's grammar over exact fractions is a fair judge
                value = None if adjacent else eval("".join(f"F({e})" if e.isdigit() else e for e in before["formula"]), {"F": Fraction})
            except (SyntaxError, TypeError, ZeroDivisionError):
                value = None
            unary = any(a in "(+-*/" and b in "+-" for a, b in zip("(" + text, text))
            call = ")(" in text or any(a.isdigit() and b == "(" or a == ")" and b.isdigit() for a, b in zip(text, text[1:]))
            power = "**" in text or "//" in text
            right = value == target and not (unary or call or power) and sorted(numbers) == sorted(before["numbers"])
            return (10 if right else -1), True, False
        if len(before["formula"]) == places:
            return -1, False, True
        assert after["formula"] == before["formula"] + [action]
        left = list(before["numbers"])
        for entry in before["formula"]:
            if entry.isdigit() and int(entry) in left:
                left.remove(int(entry))
        return (-1 if action.isdigit() and int(action) not in left else 0), False, False
    return rule


def total_of(cards):
    total = sum({"A": 11, "J": 10, "Q": 10, "K": 10}.get(card[:-1]) or int(card[:-1]) for card in cards)
    for card in cards:
        if card[0] == "A" and total > 21:
            total -= 10
    return total


def blackjack_rule(game, before, action, after):
    player, dealer = total_of(after["player"]), total_of(game.dealer)
    assert after["player_total"] == player and after["dealer_card"] == game.dealer[0] == before["dealer_card"]
    if action == "hit":
        assert len(after["player"]) == len(before["player"]) + 1 and len(game.dealer) == 2
        return -int(player > 21), player > 21, False
    assert after["player"] == before["player"] and 17 <= dealer
    assert len(game.dealer) == 2 or total_of(game.dealer[:-1]) < 17
    return (1 if dealer > 21 else np.sign(player - dealer)), True, False


RULES = {"numberline": numberline_rule, "ezpoints": points_rule(12, 5), "points24": points_rule(24, 20)}


def check_rules(name, steps):
    """Play `steps` steps, two thirds of them by the expert, and compare rewards and ends with the second implementation."""
    game, rng, played, episode = env.GAMES[name](), np.random.default_rng(1), 0, 0
    game.draw = lambda: np.zeros((300, 300, 3), np.uint8)
    while played < steps:
        _, before = game.reset(seed=episode)
        count, over, total = 0, False, 0
        while not over:
            action = env.expert_action(before) if rng.random() < 0.7 else str(rng.choice(before["legal_actions"]))
            _, reward, terminated, truncated, after = game.step(before["legal_actions"].index(action))
            count, total, over = count + 1, total + reward, terminated or truncated
            expected = RULES[name](before, action, after, count) if name in RULES else blackjack_rule(game, before, action, after)
            assert (reward, terminated, truncated) == expected, (name, episode, before, action)
            assert after["success"] == (over and total > 0)
            before = after
        played, episode = played + count, episode + 1
    return played, episode


@pytest.mark.parametrize("name", [*RULES, "blackjack"])
def test_rules_against_a_second_implementation(name):
    check_rules(name, 2000)


def deals():
    for a, b, dealer in product(env.CARD_PROBABILITY, repeat=3):
        yield (env.CARD_PROBABILITY[a] * env.CARD_PROBABILITY[b] * env.CARD_PROBABILITY[dealer], a + b, 1 in (a, b), dealer)


def test_blackjack_values_give_the_known_win_rates():
    best = sum(p * max(env.blackjack_values(hard, ace, dealer, 0.0)) for p, hard, ace, dealer in deals())

    def wins(hard, ace, dealer, share):  # share of standing, from the expected returns of (standing, hitting)
        stand = sum(p for final, p in env.dealer_totals(dealer, dealer == 1) if final == 22 or env.hand_total(hard, ace) > final)
        s = share(hard, ace, dealer)
        hit = 0 if s == 1 else sum(p * wins(hard + n, ace or n == 1, dealer, share) for n, p in env.CARD_PROBABILITY.items() if hard + n <= 21)
        return s * stand + (1 - s) * hit
    expert = sum(p * wins(h, a, d, lambda *s: float(env.blackjack_values(*s)[0] >= env.blackjack_values(*s)[1])) for p, h, a, d in deals())
    assert round(100 * best, 2) == 43.16 and round(100 * expert, 2) == 42.95


def test_blackjack_random_play_wins_28_percent():
    from functools import lru_cache

    @lru_cache(None)
    def wins(hard, ace, dealer):
        stand = sum(p for final, p in env.dealer_totals(dealer, dealer == 1) if final == 22 or env.hand_total(hard, ace) > final)
        hit = sum(p * wins(hard + n, ace or n == 1, dealer) for n, p in env.CARD_PROBABILITY.items() if hard + n <= 21)
        return (stand + hit) / 2
    assert round(100 * sum(p * wins(h, a, d) for p, h, a, d in deals()), 2) == 28.06


def test_points24_bound():
    share = solvable = 0
    for hand in combinations_with_replacement(range(1, 11), 4):
        if env.solve(hand, 24):
            solvable += 1
            share += sum(np.prod([env.CARD_PROBABILITY[n] for n in deal]) for deal in set(permutations(hand)))
    assert solvable == 566 and round(100 * share, 2) == 73.09


@pytest.mark.parametrize("text, value", [
    ("8 / ( 3 - 8 / 3 )", 24), ("1 + 2 * 3", 7), ("( 1 + 2 ) * 3", 9), ("10 - 3 - 2", 5), ("8 / 4 / 2", 1), ("2", 2),
    ("1 / ( 2 - 2 )", None), ("2 * * 3", None), ("8 / / 3", None), ("- 1", None), ("1 2", None), ("( 1", None), ("1 )", None),
    ("( )", None), ("", None), ("1 +", None), ("3 ( 4 )", None), ("( 3 ) ( 4 )", None), ("1 + 11", None), ("1 / 3", Fraction(1, 3))])
def test_formulas_are_exact(text, value):
    assert env.evaluate_formula(text.split()) == value


def test_long_formulas_are_refused_at_once():
    assert env.evaluate_formula(["("] * 1_000_000) is None
    assert env.evaluate_formula(["9", *["*", "9"] * 500_000]) is None


def test_the_solver_continues_a_formula():
    assert env.solve([3, 3, 8, 8], 24) == tuple("8/(3-8/3)")
    assert env.solve([4, 6, 1, 1], 24, ["(", "1"])[:2] == ("(", "1")
    assert env.solve([1, 1, 1, 1], 24) is None and env.solve([3, 3, 8, 8], 24, ["3"]) is None


@pytest.mark.parametrize("name", ["numberline", "ezpoints"])
def test_experts_always_succeed_where_they_can(name):
    game = gym.make(env.env_id(name))
    for seed in range(100):
        _, info = game.reset(seed=seed)
        over = False
        while not over:
            action = info["legal_actions"].index(env.expert_action(info))
            _, _, terminated, truncated, info = game.step(action)
            over = terminated or truncated
        assert info["success"]


def test_the_vector_keeps_truncation_and_termination_apart():
    games = env.Games("numberline", 2, seed=0)
    starts = [dict(info) for info in games.infos]
    for step in range(10):  # walk away from the target, so that only the time limit ends the episode
        result = games.step(["+" if env.expert_action(info) == "-" else "-" for info in games.infos])
    assert not result["terminated"].any() and result["truncated"].all()
    assert [info["target"] for info in result["infos"]] == [info["target"] for info in starts]  # the state before the next episode


@pytest.mark.parametrize("name", GAMES)
def test_games_go_on_exactly_from_a_snapshot(name):
    rng = np.random.default_rng(0)

    def step(games):
        done = games.step([info["legal_actions"][i % len(info["legal_actions"])] for info, i in zip(games.infos, rng.integers(99, size=4))])
        return done | {"images": games.images.copy()}

    games = env.Games(name, 4, seed=0)
    for _ in range(3):
        step(games)
    kept, chance = json.loads(json.dumps(games.snapshot())), rng.bit_generator.state
    went_on = [step(games) for _ in range(20)]
    again = env.Games(name, 4, seed=9)
    again.restore(kept)
    rng.bit_generator.state = chance
    for one, other in zip(went_on, (step(again) for _ in range(20))):
        assert one["infos"] == other["infos"] and (one["rewards"] == other["rewards"]).all() and (one["images"] == other["images"]).all()


# -- what a new game gets wrong, and what Gymnasium does with games -----------------------------------


class LampEnv(env.Game):
    """A lamp is on or off; say which."""
    name = "lamp"
    actions = ("dark", "bright")
    saved = ("on",)

    def deal(self):
        self.on = bool(self.np_random.integers(2))

    def play(self, action):
        right = (action == "bright") == self.on
        return (1 if right else -1), True, False

    def state(self):
        return {"on": self.on}

    @staticmethod
    def expert(info):
        return "bright" if info["on"] else "dark"

    def draw(self):
        return Image.new("RGB", (env.SIZE, env.SIZE), "white" if self.on else "black")


def lamp(deal, saved=("on",)):
    """A LampEnv with another deal()."""
    game = type("LampEnv", (LampEnv,), {"deal": deal, "saved": saved})
    return game()


@pytest.mark.parametrize("value, message", [
    (np.int64(1), "LampEnv.on is a numpy int64, which JSON cannot hold: write self.on = int(...)"),
    (np.bool_(1), "LampEnv.on is a numpy bool, which JSON cannot hold: write self.on = bool(...)"),
    (np.float32(1), "LampEnv.on is a numpy float32, which JSON cannot hold: "
                    "write self.on = float(...)"),
    (np.zeros(2), "LampEnv.on is a numpy ndarray, which JSON cannot hold: "
                  "write self.on = array.tolist()"),
    ((1, 2), "LampEnv.on is a tuple, which JSON cannot hold: write self.on = list(...)"),
    ([1, {"a": np.int64(1)}], "LampEnv.on holds a numpy int64, which JSON cannot hold: "
                              "write int(...)"),
    ({1: 2}, "LampEnv.on is a dict, which JSON cannot hold: "
             "use int, float, bool, str, None, and lists and dicts (keys: str) of these"),
])
def test_what_json_cannot_hold_is_said_at_the_first_reset(value, message):
    def deal(self):
        self.on = value

    with pytest.raises(TypeError) as error:
        lamp(deal).reset(seed=0)
    assert str(error.value) == message


def test_what_a_checkpoint_would_lose_is_said_at_the_first_reset():
    def deal(self):
        self.on = True
        self.color = "red"

    with pytest.raises(TypeError, match=r"LampEnv.deal\(\) sets self.color, which a checkpoint would "
                                        r"lose: add 'color' to LampEnv.saved, or call it self._color"):
        lamp(deal).reset(seed=0)
    with pytest.raises(TypeError, match=r"LampEnv.saved names 'off', but deal\(\) sets no self.off"):
        lamp(deal, saved=("on", "color", "off")).reset(seed=0)
    with pytest.raises(TypeError, match=r"LampEnv.saved is a text, not a tuple: write \('on',\)"):
        lamp(deal, saved="on").reset(seed=0)
    with pytest.raises(TypeError, match="LampEnv.deal.. sets self.on, which a checkpoint would lose"):
        lamp(deal, saved=env.Game.saved).reset(seed=0)  # a class that says nothing of `saved`
    lamp(deal, saved=("on", "color")).reset(seed=0)


def test_private_attributes_and_json_values_pass():
    def deal(self):
        self.on = {"a": [None, True, 1, 0.5, "text", np.float64(1)]}
        self._cache = {1, 2}
        self.marks = [("lamp", (0, 0, 9, 9))]

    game = lamp(deal)
    game.reset(seed=0)
    assert json.loads(json.dumps(game.snapshot()))["on"] == game.on and not hasattr(game, "cache")


def test_what_json_cannot_hold_later_is_said_by_the_snapshot():
    game = LampEnv()
    game.reset(seed=0)
    game.on = np.int64(1)
    with pytest.raises(TypeError, match="LampEnv.on is a numpy int64"):
        game.snapshot()


def test_numpy_rewards_and_ends_do_not_reach_a_checkpoint():
    class NumpyEnv(LampEnv):
        def play(self, action):
            return np.float32(1), np.bool_(True), np.bool_(False)

    game = NumpyEnv()
    game.reset(seed=0)
    game.step(0)
    kept = json.loads(json.dumps(game.snapshot()))
    assert kept["over"] is True and kept["episode_return"] == 1


def test_a_snapshot_does_not_change_when_the_game_goes_on():
    game = env.BlackjackEnv()
    game.reset(seed=1)
    kept = game.snapshot()
    before = json.dumps(kept)
    for _ in range(2):  # a search goes on from the same snapshot many times
        game.restore(kept)
        game.step(1)
        assert json.dumps(kept) == before


def test_snapshots_hold_what_the_class_names():
    for name in GAMES:
        game = env.GAMES[name]()
        game.reset(seed=0)
        assert set(game.snapshot()) == {"over", "episode_return", "chance", *game.saved}


def test_other_observations_are_refused_by_name():
    with pytest.raises(ValueError, match="obs 'picture' is not one of image, marked, text"):
        env.BlackjackEnv(obs="picture")


def test_a_games_specification_can_be_written_and_read():
    for name in GAMES:
        game = gym.make(env.env_id(name), obs="text")
        again = gym.make(gym.envs.registration.EnvSpec.from_json(game.spec.to_json()))
        assert type(again.unwrapped) is env.GAMES[name] and again.unwrapped.obs == "text"


def test_a_class_of_another_file_registers(monkeypatch):
    monkeypatch.setattr(env, "GAMES", dict(env.GAMES))
    env.register(LampEnv)
    games = env.Games("lamp,blackjack", 3, seed=0)
    assert [info["env"] for info in games.infos] == ["lamp", "blackjack", "lamp"]
    result = games.step([env.expert_action(info) for info in games.infos])
    assert result["rewards"][[0, 2]].tolist() == [1, 1]


# -- the terminal, and what happens without ALFWorld --------------------------------------------------


def test_a_game_is_played_in_the_terminal(tmp_path):
    done = python("env.py", "--env", "numberline", "--seed", "0", "--picture", str(tmp_path / "a.png"),
                  stdin="nonsense\n" + "+\n" * 5 + "-\n" * 5)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "that is not one of the actions" in done.stdout and "reward +1" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("return ") and (tmp_path / "a.png").exists()


@pytest.mark.parametrize("arguments", [["--seed", "-1"], ["--seed", "x"], ["--env", "chess"],
                                       ["--picture", "nowhere/game.png"]])
def test_bad_input_is_one_line(arguments):
    done = python("env.py", *arguments)
    assert done.returncode == 2 and done.stderr.startswith("env.py: error: ")
    assert done.stderr.count("\n") == 1


def test_without_alfworlds_packages_only_alfworld_is_missing(tmp_path):
    for package in ("alfworld", "textworld", "fast_downward"):
        (tmp_path / f"{package}.py").write_text("raise ImportError('broken')")
    path = str(tmp_path)

    code = ("import prompts, env, sys, gymnasium\n"
            "gymnasium.make('GymCards/Blackjack-v0').reset(seed=0)\n"
            "prompts.corpus(episodes=1)\n"
            "assert not {'alfworld', 'textworld', 'fast_downward'} & set(sys.modules)")
    done = python("-c", code, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr

    done = python("-c", "import env; env.ALFWorldEnv()", PYTHONPATH=path)
    line = ("--env alfworld needs its packages: pip install alfworld==0.4.2 "
            "(see README: it builds from source and needs a compiler)")
    assert done.stderr.splitlines()[-1] == f"ValueError: {line}"
    done = python("env.py", "--env", "alfworld", PYTHONPATH=path)
    assert done.returncode == 2 and done.stderr == f"env.py: error: {line}\n"
