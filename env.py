"""The tasks: Gymnasium environments that show a picture and take short texts as actions.

    env = gymnasium.make("GymCards/Blackjack-v0")
    image, info = env.reset(seed=0)              # image: (300, 300, 3) uint8
    image, reward, terminated, truncated, info = env.step(info["legal_actions"].index("hit"))

`info`, at every reset and step, holds `legal_actions` (list of str; an action is an index into it),
`action_mask` (what `env.action_space.sample(mask)` takes), `success` (bool) and the true state
behind the picture. The model never sees the state; prompts and experts do.

Read `Game`, `BlackjackEnv` and `Games`. The other games have the same form. Everything below the
line "Machinery" can wait: drawing, the best play of each game, and ALFWorld.

`python env.py --env points24` plays a game in the terminal.
"""
import argparse
import ast
import contextlib
import copy
import io
import itertools
import json
import operator
import os
import re
import sys
import tempfile
import threading
import zlib
from collections import Counter
from fractions import Fraction
from functools import cache, lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import gymnasium as gym
import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

SIZE = 300  # height and width of every picture, in pixels
OBSERVATIONS = ("image", "marked", "text")
CARD_RANKS = ["A", "2", "3", "4", "5", "6", "7", "8", "9", "10", "J", "Q", "K"]
SUITS = ["S", "H", "D", "C"]
NUMBERS = [str(n) for n in range(1, 11)]
BLANK = "_"  # takes a place in a formula, and means nothing

PAPER = "#f4f1ea"
INK = "#101820"
TABLE = "#1d6b4f"  # green felt

# --------------------------------------------------------------------------------------------------
# What all games share


class Game(gym.Env):
    """A game with pictures as observations and short texts as actions. A subclass writes:

    name           the task's name, a key of GAMES (str)
    actions        all actions (tuple of str). If the legal ones change at each step, the subclass
                   also writes the method legal_actions(). Then only the length of `actions` counts:
                   it is the largest number of actions that are ever legal at a time
    saved          the names of the attributes that make up an episode (tuple of str). A checkpoint
                   keeps them as JSON: int, float, bool, str, None, and lists and dicts of these.
                   All other attributes that deal() sets must begin with "_"; they are not kept.
    deal()         begins an episode: sets all attributes in `saved`. All chance comes from
                   self.np_random, so that a seed fixes the episode.
    play(action)   plays the text `action`; returns (reward, terminated, truncated)
    state()        returns the true state behind the picture, as a dict for `info`
    draw()         returns the picture, a new PIL image of SIZE x SIZE. No chance here: what is
                   random is set before, and kept by `saved`. The built-in model sees patches of
                   60 x 60 pixels, so what matters should be about as large.
    marks          boxes for obs="marked"; optional
    expert(info)   returns the best legal action (str) in the state that `info` holds; static

    `info` always has `env` (the name), `obs`, `legal_actions` (list of str), `action_mask` (int8: 1
    at the first len(legal_actions) places, else 0) and `success` (bool: the episode is over and its
    return is positive), and all keys of state().

    obs: "image"; "marked", a picture in which boxes with labels show what matters; or "text", a
    grey picture (the prompt then tells the state in words).

    Raises Gymnasium's own errors: `ResetNeeded` before the first reset and after an episode's end,
    `InvalidAction` for an action outside the action space.
    """
    metadata = {"render_modes": ["rgb_array"], "render_fps": 2}
    observation_space = gym.spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8)  # one for all games
    name: str
    actions: tuple
    saved = ()
    marks = ()             # for obs="marked": pairs of a label and a box (left, top, right, bottom)
    illegal_penalty = 0.0  # the trainer subtracts this if an answer names no legal action
    evaluation = {}        # arguments of __init__ for evaluation, such as another set of games

    def __init__(self, render_mode=None, obs="image"):
        if obs not in OBSERVATIONS:
            raise ValueError(f"obs {obs!r} is not one of {', '.join(OBSERVATIONS)}")
        self.render_mode = render_mode
        self.obs = obs
        self.action_space = gym.spaces.Discrete(len(self.actions))
        self.over = True
        self.episode_return = 0.0
        self._checked = False

    def legal_actions(self):
        return list(self.actions)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)  # makes self.np_random from the seed, if there is one
        self.over = False
        self.episode_return = 0.0

        if self._checked:
            self.deal()
        else:  # at the first reset: does deal() set what `saved` says?
            check_saved(self, names_set_by_deal(self))
            check_contract(self)
            self._checked = True
        return self.render(), self._info()

    def step(self, action):
        if self.over:
            raise gym.error.ResetNeeded("No episode has begun, or it is over: call reset() first")
        if not self.action_space.contains(action):
            last = self.action_space.n - 1
            raise gym.error.InvalidAction(f"{action!r} is not an action: an integer, 0 to {last}")

        reward, terminated, truncated = self.play(self.action_of(action))
        self.episode_return += float(reward)
        self.over = bool(terminated or truncated)
        return self.render(), float(reward), terminated, truncated, self._info()

    def action_of(self, index):
        """Action i of the action space is the i-th legal action (str) of this state."""
        legal_actions = self.legal_actions()
        if index >= len(legal_actions):
            last = len(legal_actions) - 1
            raise gym.error.InvalidAction(f"{index!r} is not a legal action: these are 0 to {last}")
        return legal_actions[index]

    def _info(self):
        legal_actions = self.legal_actions()
        mask = np.zeros(self.action_space.n, np.int8)
        mask[:len(legal_actions)] = 1
        info = {
            "env": self.name,
            "obs": self.obs,
            "legal_actions": legal_actions,
            "action_mask": mask,
            "success": bool(self.over and self.episode_return > 0),
        }
        return info | self.state()

    def render(self):
        """Return the observation, (300, 300, 3) uint8."""
        if self.obs == "text":
            return np.full((SIZE, SIZE, 3), 128, np.uint8)
        picture = self.draw()
        if self.obs == "marked":
            draw_marks(picture, self.marks)
        return np.array(picture)

    def snapshot(self):
        """Return all that the rest of the episode depends on, as a dict that JSON can hold."""
        check_json(self)
        names = ("over", "episode_return", *self.saved)
        snapshot = {name: copy.deepcopy(getattr(self, name)) for name in names}
        snapshot["chance"] = self.np_random.bit_generator.state
        return snapshot

    def restore(self, snapshot):
        """Go on from a `snapshot`; return (picture, info)."""
        for name in ("over", "episode_return", *self.saved):
            setattr(self, name, copy.deepcopy(snapshot[name]))
        self.np_random.bit_generator.state = snapshot["chance"]
        return self.render(), self._info()


# --------------------------------------------------------------------------------------------------
# The games: each with its rule, its reward and its expert


class BlackjackEnv(Game):
    """Blackjack by Gymnasium's rules: an infinite deck, and no bonus for 21 with two cards.

    The dealer draws until the total is 17 or more. Reward: +1, 0 or -1 for a win, a draw or a
    loss. State: `player` (cards such as "JH"), `player_total` (one ace counts 11 if that does not
    bust), `dealer_card`.
    """
    name = "blackjack"
    actions = ("stand", "hit")
    saved = ("player", "dealer")  # cards

    def deal(self):
        self.player = random_cards(self.np_random, 2)
        self.dealer = random_cards(self.np_random, 2)

    def play(self, action):
        # The player draws a card, and loses above 21
        if action == "hit":
            self.player += random_cards(self.np_random, 1)
            if best_total(self.player) > 21:
                return -1, True, False
            return 0, False, False

        # The player stands, so the dealer plays
        while best_total(self.dealer) < 17:
            self.dealer += random_cards(self.np_random, 1)

        # Compare the two hands
        player = best_total(self.player)
        dealer = best_total(self.dealer)
        if dealer > 21 or player > dealer:
            reward = 1
        elif player < dealer:
            reward = -1
        else:
            reward = 0
        return reward, True, False

    def state(self):
        return {
            "player": list(self.player),
            "player_total": best_total(self.player),
            "dealer_card": self.dealer[0],
        }

    @staticmethod
    def expert(info):
        """The action with the larger expected return, by dynamic programming."""
        hard, has_ace = hard_total(info["player"])  # `hard`: aces count 1
        stand, hit = blackjack_values(hard, has_ace, card_number(info["dealer_card"]))
        return "stand" if stand >= hit else "hit"

    def draw(self):
        picture = Image.new("RGB", (SIZE, SIZE), TABLE)
        draw_text(picture, "Dealer", (64, 38), 32, PAPER)
        draw_text(picture, "Player", (64, 164), 32, PAPER)
        ImageDraw.Draw(picture).line([(0, 146), (SIZE, 146)], "#3f8d6f", 2)

        # While the player plays, the dealer's second card lies face down
        dealer = self.dealer if self.over else [self.dealer[0], FACE_DOWN]
        dealer_boxes = draw_cards(picture, dealer, x=2, y=64, pitch=60)
        player_boxes = draw_cards(picture, self.player, x=2, y=186, pitch=60)

        self.marks = [("dealer", dealer_boxes[0])]
        for number, box in enumerate(player_boxes, 1):
            self.marks.append((f"you {number}", box))
        return picture


def random_cards(rng, count):
    """Draw `count` cards, such as "AS" or "JH", from an infinite deck.

    By the authors' rule no card of Blackjack shows 10: in its place comes J, Q or K, which count
    the same.
    """
    ranks = rng.integers(0, 13, count)
    for i, rank in enumerate(ranks):
        if CARD_RANKS[rank] == "10":
            ranks[i] = rng.integers(10, 13)
    return random_suits(rng, ranks)


def random_suits(rng, ranks):
    """Return a card of a random suit for each of `ranks`, which are indices into CARD_RANKS."""
    return [CARD_RANKS[rank] + SUITS[rng.integers(4)] for rank in ranks]


def card_number(card):
    """What a card such as "10H" counts: an ace 1; jack, queen and king 10."""
    return min(CARD_RANKS.index(card[:-1]) + 1, 10)


def hard_total(cards):
    """Return (the hard total of a hand, in which aces count 1; whether it has an ace)."""
    numbers = [card_number(card) for card in cards]
    return sum(numbers), 1 in numbers


def hand_total(hard, has_ace):
    """Best total of a hand worth `hard` with aces as 1: one ace counts 11 if that does not bust."""
    if has_ace and hard <= 11:
        return hard + 10
    return hard


def best_total(cards):
    """Best total of a hand of blackjack."""
    hard, has_ace = hard_total(cards)
    return hand_total(hard, has_ace)


class NumberLineEnv(Game):
    """Walk from `current` to `target`, both in 0..5, by `+` and `-`. At an end, a step stays there.

    Reward: +1 on reaching the target, -1 for a step that does not come closer, else 0. Ten steps
    truncate the episode. State: `target`, `current` (int).
    """
    name = "numberline"
    actions = ("+", "-")
    saved = ("target", "current", "steps")

    def deal(self):
        target, current = self.np_random.choice(6, 2, replace=False)
        self.target = int(target)
        self.current = int(current)
        self.steps = 0

    def play(self, action):
        old_distance = abs(self.target - self.current)
        move = 1 if action == "+" else -1
        self.current = min(max(self.current + move, 0), 5)
        self.steps += 1
        distance = abs(self.target - self.current)

        if distance == 0:
            reward = 1
        elif distance >= old_distance:
            reward = -1
        else:
            reward = 0

        terminated = distance == 0
        truncated = self.steps >= 10 and not terminated
        return reward, terminated, truncated

    def state(self):
        return {"target": self.target, "current": self.current}

    @staticmethod
    def expert(info):
        return "+" if info["target"] > info["current"] else "-"

    marks = (("target", (206, 44, 274, 136)), ("current", (206, 164, 274, 256)))

    def draw(self):
        picture = Image.new("RGB", (SIZE, SIZE), PAPER)
        self._draw_row(picture, 90, "#1f6f54", "Target:", self.target)
        self._draw_row(picture, 210, "#28518f", "Current:", self.current)
        return picture

    def _draw_row(self, picture, y, color, label, number):
        ImageDraw.Draw(picture).rounded_rectangle([8, y - 54, SIZE - 8, y + 54], 16, color)
        draw_text(picture, label, (100, y), 40, PAPER)
        draw_text(picture, str(number), (240, y), 84, "white", bold=3)


class PointsGame(Game):
    """Write a formula, one entry a step, that uses each card once and equals `target`; `=` ends it.

    Reward: 10 for `=` after a right formula, -1 after a wrong one. -1 for a number that is not on
    an unused card: instead of it a blank, `_`, takes the next place, and means nothing. 0 for other
    entries. When `max_entries` + 1 places are taken, any action, `=` too, truncates the episode
    with -1. A counts 1; J, Q and K count 10.

    State: `cards` (such as "10H"), `numbers` (int), `formula` (list of str, the entries so far;
    "_" is a blank). A subclass sets `target` and `max_entries`, and chooses the cards in
    deal_ranks().
    """
    saved = ("cards", "numbers", "formula")
    target: int
    max_entries: int

    def deal(self):
        self.cards = random_suits(self.np_random, self.deal_ranks())
        self.numbers = [card_number(card) for card in self.cards]
        self.formula = []

    def play(self, action):
        # Too many places are taken
        if len(self.formula) > self.max_entries:
            return -1, False, True

        # The formula is handed in
        used = [int(entry) for entry in self.formula if entry in NUMBERS]
        if action == "=":
            uses_each_card_once = sorted(used) == sorted(self.numbers)
            if uses_each_card_once and evaluate_formula(self.formula) == self.target:
                return 10, True, False
            return -1, True, False

        # The number is on no unused card: leave a blank
        unused = Counter(self.numbers) - Counter(used)
        if action in NUMBERS and int(action) not in unused:
            self.formula.append(BLANK)
            return -1, False, False

        # The entry is written down
        self.formula.append(action)
        return 0, False, False

    def state(self):
        return {
            "cards": list(self.cards),
            "numbers": list(self.numbers),
            "formula": list(self.formula),
        }

    @classmethod
    def expert(cls, info):
        """The next entry of the shortest right formula; `=` if none can be handed in any more."""
        solution = solve(info["numbers"], cls.target, info["formula"], cls.max_entries)
        position = len(info["formula"])
        if solution is None or position == len(solution):
            return "="
        return solution[position]

    def draw(self):
        picture = Image.new("RGB", (SIZE, SIZE), TABLE)

        # The cards, in the middle of the picture's width
        pitch = min(120, (SIZE - 4) // len(self.cards))
        left = (SIZE - pitch * len(self.cards)) // 2 + pitch // 24  # half of a gap: see draw_cards
        card_boxes = draw_cards(picture, self.cards, left, 40, pitch)

        # The formula, on a strip of paper
        paper = (10, 236, SIZE - 10, 288)
        ImageDraw.Draw(picture).rounded_rectangle(paper, 10, PAPER)
        if self.formula:
            draw_text(picture, "".join(self.formula), (150, 262), 36, INK, SIZE - 32)
        else:
            draw_text(picture, f"make {self.target}", (150, 262), 36, "#a09a8c", SIZE - 32)

        self.marks = [(f"card {number}", box) for number, box in enumerate(card_boxes, 1)]
        self.marks.append(("formula", paper))
        return picture


class EZPointsEnv(PointsGame):
    """`PointsGame` with two cards and 12 points. Every hand can be solved."""
    name = "ezpoints"
    actions = (*NUMBERS, "+", "*", "=")
    target = 12
    max_entries = 5

    def deal_ranks(self):
        # The first card: any rank but A. It counts 2 to 10.
        first_rank = int(self.np_random.integers(1, 13))
        number = min(first_rank + 1, 10)

        # The second card makes 12 with it: by a product in half of the deals, where that can be
        other = 12 - number
        if number in (2, 3, 4, 6) and self.np_random.random() < 0.5:
            other = 12 // number
        ranks = [first_rank, CARD_RANKS.index(str(other))]

        # In half of the deals they change places
        if self.np_random.random() < 0.5:
            ranks.reverse()
        return ranks


class Points24Env(PointsGame):
    """`PointsGame` with four cards and 24 points. Some hands have no solution."""
    name = "points24"
    actions = (*NUMBERS, "+", "-", "*", "/", "(", ")", "=")
    target = 24
    max_entries = 20

    def deal_ranks(self):
        return self.np_random.integers(0, 13, 4)


# --------------------------------------------------------------------------------------------------
# All games by their names, and many at once

GAMES = {}  # name of a task -> its class


def register(game):
    """Make a `Game` known to Gymnasium and to the commands, under its `name`."""
    GAMES[game.name] = game
    # Gymnasium can write an environment's description as JSON if its class is told by name
    entry_point = f"{game.__module__}:{game.__name__}"
    if "<locals>" in game.__qualname__:  # a class within a function is not found by name
        entry_point = game
    gym.register(env_id(game.name), entry_point=entry_point)


def env_id(name):
    """Gymnasium's id of a task: "blackjack" -> "GymCards/Blackjack-v0"."""
    return f"GymCards/{GAMES[name].__name__.removesuffix('Env')}-v0"


register(NumberLineEnv)
register(EZPointsEnv)
register(Points24Env)
register(BlackjackEnv)  # ALFWorld is registered below its classes


def expert_action(info):
    """The expert's action (str) in the state of `info`."""
    return GAMES[info["env"]].expert(info)


STREAMS = ("sft", "rollout", "evaluation")
STREAM_LENGTH = 2**32  # more episodes than any stream needs


def episode_seeds(stream, seed, process=0):
    """The seeds of a stream's episodes, without end: first, first + 1, first + 2, ...

    stream: one of STREAMS. Each stream, seed and process has a `first` of its own, a random
    multiple of STREAM_LENGTH. The chance that two of them share a deal is one in 10^19.
    """
    # A random number of 64 bits from the three numbers
    sequence = np.random.SeedSequence([STREAMS.index(stream), seed, process])
    block = int(sequence.generate_state(1, np.uint64)[0])
    return itertools.count(block * STREAM_LENGTH)


class Games:
    """N games that step together, by Gymnasium's vector API. A game that ends begins a new episode.

    name: a task, or k tasks with commas between them; game i plays task i % k.
    num_envs: N. seeds: an iterator, such as episode_seeds(...): each game takes one seed for its
    first episode. An int n means the seeds n, n + 1, ... For later episodes see `step`.
    evaluation: make the games with their class's `evaluation` settings. (ALFWorld: unseen rooms.)
    first, total: if several processes share the games, the number of this process's first game,
    and how many they have together.

    Two attributes show the states in which to act next:
    images  (N, 300, 300, 3) uint8; the next step overwrites them
    infos   list of N dicts
    """

    def __init__(self, name, num_envs, seeds, obs="image", evaluation=False, first=0, total=None):
        names = name.split(",")
        total = total or num_envs
        if total < len(names):
            raise ValueError(f"{len(names)} tasks need at least {len(names)} environments, "
                             f"not {total}")
        num_actions = max(len(GAMES[name].actions) for name in names)

        def make(name):
            arguments = GAMES[name].evaluation if evaluation else {}
            game = gym.make(env_id(name), obs=obs, **arguments)
            # Gymnasium's vector demands the same action space in all games
            game.unwrapped.action_space = gym.spaces.Discrete(num_actions)
            return KeepInfo(game)

        # Turn Gymnasium's automatic reset off: it would replace the last picture of a truncated
        # episode, and training needs the value of that picture. With copy=False the vector writes
        # all pictures into one buffer, self.images, at every step and reset.
        makers = [partial(make, names[(first + i) % len(names)]) for i in range(num_envs)]
        self.vector = gym.vector.SyncVectorEnv(makers, copy=False, autoreset_mode="Disabled")
        if isinstance(seeds, int):
            seeds = itertools.count(seeds)
        self.images, _ = self.vector.reset(seed=[next(seeds) for _ in range(num_envs)])

    @property
    def infos(self):
        return [game.info for game in self.vector.envs]

    def step(self, actions, seeds=None, restart=False):
        """Play one text action in each game, then begin new episodes where one ended.

        seeds: an iterator; each new episode takes the next seed (evaluation). None: it goes on with
        the random numbers of its game (training).
        restart: (N,) bool, games that begin a new episode before theirs has ended.

        Returns a dict of what the step gave, before any new episode: `rewards`, `terminated`,
        `truncated` (N,), `infos` (list of N dicts), and `last_images`, a dict from the index of a
        game that ended to its last picture.
        """
        # Gymnasium wants indices into the legal actions
        legal_actions = [info["legal_actions"] for info in self.infos]
        indices = [legal.index(action) for legal, action in zip(legal_actions, actions)]
        images, rewards, terminated, truncated, _ = self.vector.step(np.array(indices))

        # Keep what the step gave, of the old episodes. `images` is the buffer self.images, which
        # the reset below overwrites.
        ended = terminated | truncated  # (N,)
        result = {
            "rewards": rewards,
            "terminated": terminated,
            "truncated": truncated,
            "infos": self.infos,
            "last_images": {i: images[i].copy() for i in np.flatnonzero(ended)},
        }

        # Begin new episodes; the mask tells Gymnasium which games to reset
        begins = ended | restart  # (N,)
        if begins.any():
            new_seeds = [None for _ in begins]
            if seeds is not None:
                new_seeds = [next(seeds) if begin else None for begin in begins]
            # The new pictures are written into self.images
            self.vector.reset(seed=new_seeds, options={"reset_mask": begins})
        return result

    def snapshot(self):
        return [game.unwrapped.snapshot() for game in self.vector.envs]

    def restore(self, snapshots):
        for i, game in enumerate(self.vector.envs):
            self.images[i], game.info = game.unwrapped.restore(snapshots[i])


class KeepInfo(gym.Wrapper):
    """A game that keeps its last info in `info`, and hands out none.

    Gymnasium's vector would put the values of all games into one array, which has one type.
    """

    def reset(self, **kwargs):
        image, self.info = self.env.reset(**kwargs)
        return image, {}

    def step(self, action):
        image, reward, terminated, truncated, self.info = self.env.step(action)
        return image, reward, terminated, truncated, {}


# ==================================================================================================
# Machinery: skip everything from here on at first reading. The method does not need it.
# ==================================================================================================

# --------------------------------------------------------------------------------------------------
# A check of new games: one plain sentence at the first reset, instead of a traceback later

JSON_REMEDIES = [
    (np.bool_, "bool(...)"),
    (np.integer, "int(...)"),
    (np.floating, "float(...)"),
    (np.ndarray, "array.tolist()"),
    (tuple, "list(...)"),
    (set, "sorted(...)"),
]


def names_set_by_deal(game):
    """Call game.deal(); returns the names of the attributes that it sets."""
    names = []

    class Recorder(type(game)):
        def __setattr__(self, name, value):
            names.append(name)
            super().__setattr__(name, value)

    game_class = type(game)
    game.__class__ = Recorder
    try:
        game.deal()
    finally:
        game.__class__ = game_class
    return [name for name in names if name != "__class__"]


def check_saved(game, names_set):
    """Raise TypeError if deal() and `saved` do not agree, or if JSON cannot hold a saved value.

    names_set: the attributes that deal() sets.
    """
    class_name = type(game).__name__
    if isinstance(game.saved, str):
        raise TypeError(f"{class_name}.saved is a text, not a tuple: write ({game.saved!r},)")

    # Everything that deal() sets must be saved, except names with "_" in front and attributes that
    # the class Game has, such as `marks`
    for name in names_set:
        is_exempt = name.startswith("_") or hasattr(Game, name)
        if not is_exempt and name not in game.saved:
            raise TypeError(f"{class_name}.deal() sets self.{name}, which a checkpoint would lose: "
                            f"add {name!r} to {class_name}.saved, or call it self._{name}")

    # Everything that is saved must be set
    for name in game.saved:
        if not hasattr(game, name):
            raise TypeError(f"{class_name}.saved names {name!r}, but deal() sets no self.{name}: "
                            "set it there, or take it out of `saved`")
    check_json(game)


def check_contract(game):
    """Raise TypeError if the actions, the picture or the expert are not what `Game` asks for."""
    class_name = type(game).__name__
    for action in game.legal_actions():
        if not isinstance(action, str):
            raise TypeError(f"{class_name}.actions holds {action!r}: an action is a text, "
                            f"write {str(action)!r}")
        if any(quote in action for quote in "\"'`"):
            raise TypeError(f"{class_name}.actions holds {action!r}: write it without quotes, "
                            "because they end the action in an answer")

    shape = np.shape(np.array(game.draw()))
    if shape != (SIZE, SIZE, 3):
        raise TypeError(f"{class_name}.draw() must return an RGB picture of {SIZE} x {SIZE} "
                        f"pixels; what it returned has the shape {shape}")

    action = game.expert(game._info())
    if action not in game.legal_actions():
        raise TypeError(f"{class_name}.expert() returned {action!r}, which is no legal action")


def check_json(game):
    """Raise TypeError, with a remedy, if JSON cannot hold a saved value."""
    class_name = type(game).__name__
    for name in game.saved:
        value = getattr(game, name)
        wrong = not_json(value)
        if wrong is None:
            continue

        # "is", if it is the value itself; "holds", if it is a part of a list or dict
        verb = "is" if wrong is value else "holds"
        library = "numpy " if isinstance(wrong, (np.generic, np.ndarray)) else ""
        remedy = "use int, float, bool, str, None, and lists and dicts (keys: str) of these"
        for wrong_type, expression in JSON_REMEDIES:
            if isinstance(wrong, wrong_type):
                assignment = f"self.{name} = " if wrong is value else ""
                remedy = f"write {assignment}{expression}"
        raise TypeError(f"{class_name}.{name} {verb} a {library}{type(wrong).__name__}, "
                        f"which JSON cannot hold: {remedy}")


def not_json(value):
    """Return the part of `value` that JSON would not give back as it was, or None."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return None
    if isinstance(value, list):
        parts = value
    elif isinstance(value, dict) and all(isinstance(key, str) for key in value):
        parts = value.values()
    else:
        return value
    wrong_parts = (not_json(part) for part in parts)
    return next((part for part in wrong_parts if part is not None), None)


# --------------------------------------------------------------------------------------------------
# Drawing: texts, shapes and cards. The shapes' coordinates are in the tables at the end.


@cache
def font(pixels):
    """Pillow's built-in font in a size; it can be scaled, so no font file is needed."""
    return ImageFont.load_default(pixels)


@lru_cache(maxsize=4096)
def text_mask(text, pixels, max_width, bold):
    """A text in white on black, as a picture of its size. `draw_text` puts a colour where it is
    white."""
    width = font(pixels).getlength(text)
    if width > max_width:
        pixels = max(8, int(pixels * max_width / width))

    half_width = int(font(pixels).getlength(text) / 2 + bold + 2)
    mask = Image.new("L", (2 * half_width, 2 * pixels))
    draw = ImageDraw.Draw(mask)
    draw.text((half_width, pixels), text, 255, font(pixels), anchor="mm", stroke_width=bold)
    return mask


def draw_text(picture, text, center, pixels, color, max_width=SIZE - 16, bold=0):
    """Write `text` with its centre at (x, y), smaller if it is wider than `max_width` pixels."""
    x, y = center
    mask = text_mask(text, pixels, max_width, bold)
    picture.paste(color, (x - mask.width // 2, y - mask.height // 2), mask)


def draw_marks(picture, marks):
    """Draw a yellow box with a label above it around everything that matters."""
    for label, box in marks:
        left, top, right, _ = box
        ImageDraw.Draw(picture).rounded_rectangle(box, 4, outline="#f0b000", width=4)
        draw_text(picture, label, ((left + right) // 2, top - 11), 18, "#f0b000", bold=1)


def draw_shape(draw, shape, x, y, scale, colors):
    """Draw a shape with the corner of its grid at (x, y), `scale` pixels a unit.

    shape: a list of (form, name of a colour, (x1, y1, x2, y2, ...)) from the tables at the end.
    colors: a dict, name of a colour such as "own" -> the colour.
    """
    functions = {"ellipse": draw.ellipse, "rectangle": draw.rectangle, "polygon": draw.polygon}
    for form, color, coordinates in shape:
        points = []
        for column, row in zip(coordinates[::2], coordinates[1::2]):
            points += [x + column * scale, y + row * scale]
        functions[form](points, colors[color])


FACE_DOWN = ""  # a card whose back is up


@cache
def card_picture(card, width):
    """A card on the table, as a picture of width x 1.5 width pixels."""
    # Draw it four times too large and shrink it at the end, for smooth edges
    scale = 4
    w = width * scale
    h = width * scale * 3 // 2
    picture = Image.new("RGBA", (w, h))
    draw = ImageDraw.Draw(picture)
    edge = [scale, scale, w - scale, h - scale]
    draw.rounded_rectangle(edge, radius=w // 10, fill="white", outline="#555555", width=scale)

    if card == FACE_DOWN:
        back = card_back(w, h, scale)
        mask = Image.new("L", (w, h))
        inside = [w // 11, w // 11, w - w // 11, h - w // 11]
        ImageDraw.Draw(mask).rounded_rectangle(inside, w // 16, 255)
        picture.paste(back, mask=mask)
    else:
        draw_card_face(draw, card, w, scale)

    # Put it on the table's green, because its corners are round
    small = picture.resize((width, width * 3 // 2), Image.LANCZOS)
    table = Image.new("RGBA", small.size, TABLE)
    return Image.alpha_composite(table, small).convert("RGB")


def draw_card_face(draw, card, w, stroke):
    """Draw a large rank above a large suit: both can be read when the card is small."""
    rank = card[:-1]
    suit = card[-1]
    color = "#c8102e" if suit in "HD" else INK

    # The two digits of 10 stand closer together than a font would put them
    digits = [(0.27, "1"), (0.65, "0")] if rank == "10" else [(0.5, rank)]
    for x, digit in digits:
        position = (x * w, 0.45 * w)
        draw.text(position, digit, color, font(int(0.78 * w)), anchor="mm", stroke_width=stroke)

    radius = 0.26 * w  # half the suit's width, which is 100 of the 200 units of SUIT_SHAPES
    left = w / 2 - radius
    top = 1.12 * w - radius
    draw_shape(draw, SUIT_SHAPES[suit], left, top, radius / 100, {"own": color})


def card_back(w, h, scale):
    """The pattern on a card's back: crossing lines."""
    back = Image.new("RGBA", (w, h), "#28518f")
    draw = ImageDraw.Draw(back)
    for x in range(-h, w, w // 6):  # they lean by 45 degrees, so the first begin left of the card
        draw.line([(x, 0), (x + h, h)], "#86abdf", 2 * scale)
        draw.line([(x + h, 0), (x, h)], "#86abdf", 2 * scale)
    return back


def draw_cards(picture, cards, x, y, pitch):
    """Lay `cards` in a row from (x, y), one every `pitch` pixels or closer; return their boxes."""
    pitch = min(pitch, (SIZE - x) // len(cards))
    width = pitch - max(pitch // 12, 2)
    boxes = []
    for i, card in enumerate(cards):
        left = x + i * pitch
        box = (left, y, left + width, y + width * 3 // 2)
        picture.paste(card_picture(card, width), box)
        boxes.append(box)
    return boxes


# --------------------------------------------------------------------------------------------------
# Blackjack: the best play, by dynamic programming

CARD_PROBABILITY = {number: 1 / 13 for number in range(1, 10)}  # what a card counts -> probability
CARD_PROBABILITY[10] = 4 / 13  # 10, jack, queen and king
BUST = 22  # stands for every total above 21


@cache
def dealer_totals(hard, has_ace):
    """Pairs of (final total, probability) for a dealer's hand; arguments as in `hand_total`."""
    # At 17 the dealer stops
    total = hand_total(hard, has_ace)
    if total >= 17:
        return ((min(total, BUST), 1.0),)

    # Below 17 the dealer draws: add up what each card leads to
    totals = dict.fromkeys(range(17, BUST + 1), 0.0)
    for number, card_probability in CARD_PROBABILITY.items():
        for final, probability in dealer_totals(hard + number, has_ace or number == 1):
            totals[final] += card_probability * probability
    return tuple(totals.items())


@cache
def blackjack_values(hard, has_ace, dealer, loss=-1.0):
    """Values of (standing, hitting) if the best play follows.

    hard: the hand's total with aces as 1; has_ace: whether it has one; dealer: the number on the
    dealer's open card, 1 to 10. A win counts 1, a draw 0, a loss `loss`: with -1 a value is the
    expected return, with 0 the probability of a win.
    """
    # Stand: compare the total with each total that the dealer may reach. The dealer's hidden card
    # is as random as a card from the deck, so it counts as the dealer's next draw.
    total = hand_total(hard, has_ace)
    stand = 0.0
    for final, probability in dealer_totals(dealer, dealer == 1):
        if final == BUST or final < total:
            stand += probability
        elif final > total:
            stand += probability * loss

    # Hit: add up what each card leads to
    hit = 0.0
    for number, probability in CARD_PROBABILITY.items():
        if hard + number > 21:
            hit += probability * loss
        else:
            hit += probability * max(
                blackjack_values(hard + number, has_ace or number == 1, dealer, loss)
            )
    return stand, hit


# --------------------------------------------------------------------------------------------------
# What can be reached without a look at the picture: a policy must exceed it to show that it looks

# All are computed; tests/test_env.py computes them again. The prompt tells the formula so far, so a
# player may read that without looking. A blank in it tells that a number is on no card.
# numberline   always "+" (a step back loses the game, so no fixed probability of "+" is better)
# blackjack    always "stand": to hit once, or twice, and then to stand is worse
# ezpoints     the best play of any player who reads the formula alone
# points24     a lower bound: this player tries the numbers 10, 9, ... 1 in this order. One that is
#              on a card stays in the formula. Between them it writes signs, and up to two pairs of
#              brackets. It chooses those that win most of the hands with the numbers found so far.
#              The best formula that is chosen before the game, "10+10+10-6", is right in 0.90 % of
#              the deals.
BLIND = {
    "numberline": 0.5,
    "blackjack": 0.3807,
    "ezpoints": 0.6667,
    "points24": 0.1999,
}

# --------------------------------------------------------------------------------------------------
# Formulas: their exact value, and the solver

# `solve` asks `shortest_formula`, and this asks `shortest_rest`, a search that goes on entry by
# entry. `ways_on` says what may come next. A bracket comes as a whole, from `operands`, which
# chooses among all `expressions` of some numbers.
MAX_ENTRIES = 64  # more than any game allows; a longer formula is refused before it costs time
OPERATORS = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}
SYNTAX = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def evaluate_formula(entries):
    """Exact value (Fraction) of a formula such as ["8", "/", "(", "3", "-", "1", ")"].

    The formula has numbers, + - * / and brackets, but no minus sign in front of a number. Blanks
    mean nothing. Returns None if it is malformed, divides by zero, or has more than MAX_ENTRIES
    entries.
    """
    allowed = {*NUMBERS, *OPERATORS, "(", ")", BLANK}
    if len(entries) > MAX_ENTRIES or not set(entries) <= allowed:
        return None

    # Let Python parse the text; this runs nothing
    text = " ".join(entry for entry in entries if entry != BLANK)
    try:
        tree = ast.parse(text, mode="eval")
    except SyntaxError:
        return None
    return tree_value(tree.body)


def tree_value(node):
    """Value of a node of Python's syntax tree, or None if it is no formula."""
    if isinstance(node, ast.Constant):
        return Fraction(node.value)
    if not isinstance(node, ast.BinOp):  # Python also reads "- 1", "3 ( 4 )" and "( )"
        return None

    left = tree_value(node.left)
    right = tree_value(node.right)
    if left is None or right is None:
        return None
    if isinstance(node.op, ast.Div) and right == 0:
        return None
    return SYNTAX[type(node.op)](left, right)  # spaces stand between entries, so there is no "**"


def solve(numbers, target, formula=(), max_entries=MAX_ENTRIES):
    """The shortest formula over all of `numbers` that equals `target` and begins with `formula`.

    Returns a tuple of entries, or None if there is none of at most `max_entries`. It begins with
    `formula`, blanks included; a blank counts as an entry.
    """
    if len(formula) > max_entries:  # too long already: no search
        return None
    written = tuple(entry for entry in formula if entry != BLANK)
    solution = shortest_formula(tuple(sorted(numbers)), target, written)
    if solution is None:
        return None

    solution = (*formula, *solution[len(written):])
    return solution if len(solution) <= max_entries else None


@lru_cache(maxsize=100_000)
def shortest_formula(numbers, target, beginning):
    """`solve` for a sorted tuple `numbers` and a tuple `beginning` without blanks.

    Of several that are equally short, it is the first in the order of Python's tuples.
    """
    # A formula that begins with `beginning` also begins with `beginning[:-1]`. So if there is none
    # for that, there is none here. And if the best one for that goes on with the last entry of
    # `beginning`, it is the best here, too.
    if beginning:
        earlier = shortest_formula(numbers, target, beginning[:-1])
        if earlier is None or earlier[:len(beginning)] == beginning:
            return earlier

    state = read_beginning(beginning, numbers)
    if state is None:
        return None
    levels, numbers_left = state
    rest = shortest_rest(levels, numbers_left, target, found={})
    return None if rest is None else beginning + rest


# What is written so far is kept as levels: the formula's own, then one for each open bracket. A
# level is (sum of the terms before the last one, the last term, the sign that waits for an
# operand). The entries of 2+3*4 lead to (0, 2, ""), (0, 2, "+"), (2, 3, ""), (2, 3, "*") and
# (2, 12, ""). An empty level is as if "0+" stood there, so that the first operand is added.
# Floats, rounded to nine places, are exact enough: with four cards a value is 24, or it differs
# from 24 by 1/1000 or more (no denominator is above 10 * 10 * 10).
EMPTY_LEVEL = (0.0, 0.0, "+")


def put_operand(level, value):
    """The level after its sign got the operand `value`; None for a division by zero."""
    total, term, sign = level
    if sign == "+":
        return total + term, value, ""
    if sign == "-":
        return total + term, -value, ""
    if sign == "*":
        return total, term * value, ""
    if abs(value) < 1e-9:
        return None
    return total, term / value, ""


def read_beginning(entries, numbers):
    """Return (levels, numbers that are left), or None if no formula over `numbers` begins so."""
    levels = [EMPTY_LEVEL]
    left = list(numbers)
    for entry in entries:
        total, term, sign = levels[-1]
        needs_operand = sign != ""

        if entry == "(" and needs_operand:
            levels.append(EMPTY_LEVEL)
        elif entry in NUMBERS and needs_operand and int(entry) in left:
            left.remove(int(entry))
            levels[-1] = put_operand(levels[-1], float(entry))
        elif entry in OPERATORS and not needs_operand:
            levels[-1] = (total, term, entry)
        elif entry == ")" and not needs_operand and len(levels) > 1:
            bracket = total + term
            levels.pop()
            levels[-1] = put_operand(levels[-1], bracket)
        else:
            return None

        if levels[-1] is None:
            return None
    return tuple(levels), tuple(left)


def shortest_rest(levels, numbers, target, found):
    """The fewest entries that use all of `numbers` and make the value `target`, or None.

    A search over all that may follow. found: a dict of its results so far, (levels, numbers) ->
    entries; it is dropped when the search ends.
    """
    # The formula is complete
    total, term, sign = levels[-1]
    if not sign and not numbers and len(levels) == 1:
        return () if abs(total + term - target) < 1e-6 else None

    # The same levels and numbers come up again and again
    if (levels, numbers) in found:
        return found[levels, numbers]

    # Try each way to go on, unless it must become too long. n numbers need n signs; if one stands
    # already, n - 1. So they take 2 n - 1 entries or more. Open brackets must be closed.
    best = None
    for entries, next_levels, left in ways_on(levels, numbers):
        open_brackets = len(next_levels) - 1
        least_length = len(entries) + 2 * len(left) - 1 + open_brackets
        if best is not None and least_length > len(best):
            continue
        rest = shortest_rest(next_levels, left, target, found)
        if rest is None:
            continue
        if best is None or length_then_order(entries + rest) < length_then_order(best):
            best = entries + rest
    found[levels, numbers] = best
    return best


def ways_on(levels, numbers):
    """Yield all that may follow, as (entries, levels after them, numbers left after them).

    A bracket comes as a whole. So the only open ones are those of the formula's beginning.
    """
    outer = levels[:-1]
    level = levels[-1]
    total, term, sign = level

    # An operand: a number, or some of the numbers in brackets
    if sign:
        for some, left in splits(numbers):
            # On an empty level, a bracket that takes all numbers changes nothing: skip it
            if level == EMPTY_LEVEL and not left and len(some) > 1:
                continue
            for value, entries in operands(some):
                next_level = put_operand(level, value)
                if next_level is not None:
                    yield entries, (*outer, next_level), left
        return

    # An operator, or a closing bracket
    if numbers:
        for next_sign in OPERATORS:
            next_level = (total, term, next_sign)
            yield (next_sign,), (*outer, next_level), numbers
    if outer:
        next_level = put_operand(outer[-1], total + term)
        if next_level is not None:
            yield (")",), (*outer[:-1], next_level), numbers


def length_then_order(entries):
    return len(entries), entries


@cache
def splits(numbers):
    """All ways to divide the tuple `numbers` into (numbers of the next operand, numbers left)."""
    indices = range(len(numbers))
    ways = set()
    for size in range(1, len(numbers) + 1):
        for picked in itertools.combinations(indices, size):
            left = tuple(numbers[i] for i in indices if i not in picked)
            ways.add((tuple(numbers[i] for i in picked), left))
    return sorted(ways, key=lambda way: len(way[0]))  # short operands first: they cut the search


@cache
def operands(numbers):
    """All operands over the sorted tuple `numbers`, as (value, shortest entries).

    An operand is a number, or several in brackets.
    """
    shortest = {}
    for value, precedence, entries in distinct_expressions(numbers):
        if precedence < 3:  # it is not a single number
            entries = ("(", *entries, ")")
        key = round(value, 9)
        if key not in shortest or length_then_order(entries) < length_then_order(shortest[key]):
            shortest[key] = entries
    return list(shortest.items())


def expressions(numbers):
    """Yield all formulas over the sorted tuple `numbers`, as (value, precedence, entries).

    It calls itself for parts of the numbers, through `distinct_expressions`, which keeps results.
    value: a float. precedence: 1 for a sum, 2 for a product, 3 for a single number.
    """
    if len(numbers) == 1:
        yield float(numbers[0]), 3, (str(numbers[0]),)

    # Split the numbers into a left and a right part, in every way
    indices = range(len(numbers))
    for size in range(1, len(numbers)):
        for picked in itertools.combinations(indices, size):
            left = tuple(numbers[i] for i in picked)
            right = tuple(numbers[i] for i in indices if i not in picked)

            # Join every formula of one part with every formula of the other
            for a, b in itertools.product(distinct_expressions(left), distinct_expressions(right)):
                yield from joined(a, b)


@cache
def distinct_expressions(numbers):
    """`expressions` without repeats, as a list in a fixed order."""
    return list(dict.fromkeys(expressions(numbers)))


def joined(left, right):
    """Yield two expressions joined by each operator, with brackets only where they are needed."""
    left_value, left_precedence, left_entries = left
    right_value, right_precedence, right_entries = right
    left_in_brackets = ("(", *left_entries, ")")
    right_in_brackets = ("(", *right_entries, ")")

    for sign, operation in OPERATORS.items():
        if sign == "/" and abs(right_value) < 1e-9:
            continue
        precedence = 1 if sign in "+-" else 2
        a = left_in_brackets if left_precedence < precedence else left_entries

        # a-(b-c) and a/(b/c) need their brackets; a+(b-c) and a*(b/c) do not
        b = right_entries
        if right_precedence < precedence:
            b = right_in_brackets
        elif right_precedence == precedence and sign in "-/":
            b = right_in_brackets
        yield operation(left_value, right_value), precedence, (*a, sign, *b)


# --------------------------------------------------------------------------------------------------
# ALFWorld: a fifth game, for those who have installed its packages

# ALFRED is the data set from which ALFWorld is made. PDDL is the language of its problems: objects,
# facts that hold at first, actions, a goal. Its engine, textworld, hands a problem to the planner
# Fast Downward, which *grounds* it: it writes out each rule for all objects (the form is called
# SAS). The engine's words come from a grammar.
ALFRED_TASKS = {  # type of task -> its name in ALFWorld
    "pick": "pick_and_place_simple",
    "light": "look_at_obj_in_light",
    "clean": "pick_clean_then_place_in_recep",
    "heat": "pick_heat_then_place_in_recep",
    "cool": "pick_cool_then_place_in_recep",
    "two": "pick_two_obj_and_place",
}
SPLITS = {"train": "train", "seen": "valid_seen", "unseen": "valid_unseen"}


class Change(NamedTuple):
    """What a task does to its object before the object is put down."""
    fact: str       # the fact that must become true
    appliance: str  # the receptacle where this happens
    ability: str    # ALFWorld's name for objects with which it can be done


CHANGES = {  # type of task -> its change; the other types have none
    "clean": Change("isclean", "sinkbasin", "Cleanable"),
    "heat": Change("ishot", "microwave", "Heatable"),
    "cool": Change("iscool", "fridge", "Coolable"),
}


class ALFWorldEnv(Game):
    """Household tasks in ALFWorld's text engine: find things, heat or clean them, put them down.

    Reward at every step: the share of the goal's conditions that hold, plus 50 on success. The
    trainer subtracts `illegal_penalty` if an answer named no legal action. Success terminates an
    episode, 50 steps truncate it.

    split: "train", or "unseen" with other rooms. If the environment variable ALFWORLD_DATA is set,
    the games are those of ALFWorld's data set (also "seen"). Else they are made from seeds and kept
    in the user's cache. In "train" all types of tasks come equally often. The other splits are for
    evaluation: seeds n, n + 1, ... play one game each, in a fixed order; behind the last comes the
    first again.

    The legal actions are all that the engine admits. An index beyond them plays nothing: as in the
    engine, nothing happens, and the step counts.

    State:
    task, task_type    the task in words, and its type, a key of ALFRED_TASKS
    observation        the engine's words
    place, visible     the receptacle in front of the agent (at first ""), and what is seen there
    carried            the object that the agent carries, or ""
    won, success       whether the task is done
    goal_conditions    the share of the goal's conditions that hold
    subgoal, expert    the expert's aim in words, and its next command
    """
    name = "alfworld"
    actions = ("",) * 256       # up to 256 legal actions, a different list at each step
    saved = ("game", "played")  # the game's name, and the commands that restore() plays again
    illegal_penalty = 1.0
    evaluation = {"split": "unseen"}
    max_steps = 50
    games = {"train": 500, "unseen": 50}  # built-in games for each type of task

    def __init__(self, render_mode=None, obs="image", split="train"):
        data = os.environ.get("ALFWORLD_DATA")
        splits = SPLITS if data else self.games
        if split not in splits:
            condition = "" if data else " (without ALFWORLD_DATA)"
            raise ValueError(f"split {split!r} is not one of {', '.join(splits)}{condition}")
        with ENGINE_LOCK:  # all games share one engine: one thread at a time
            alfworld_engine()  # raises ValueError if the packages are missing

        # self.names: a list of games for each type of task. self.in_turn: one list of all games, in
        # the order of evaluation.
        self.split = split
        self.data = None
        if data:
            self.data = Path(data).expanduser() / "json_2.1.1" / SPLITS[split]
            self.names = data_set(self.data)
        else:
            self.names = []
            for task_type in ALFRED_TASKS:
                self.names.append([f"{task_type}/{i}" for i in range(self.games[split])])
        self.in_turn = one_of_each(self.names)
        if data and split != "train":
            self.in_turn = [name for name in self.in_turn if self._is_solvable(name)]
        super().__init__(render_mode, obs)

    def reset(self, *, seed=None, options=None):
        self._number = None  # the episode's number among those of its stream
        if seed is not None:
            self._number = seed % STREAM_LENGTH  # a stream begins at a multiple of it
        return super().reset(seed=seed, options=options)

    def deal(self):
        with ENGINE_LOCK:
            # Evaluation plays the games in turn
            if self.split != "train" and self._number is not None:
                self.game = self.in_turn[self._number % len(self.in_turn)]
                self._begin(*self._load(self.game))
                return

            # Training draws a type of task, then a game
            solvable = False
            while not solvable:
                names = self.names[self.np_random.integers(len(self.names))]
                self.game = names[self.np_random.integers(len(names))]
                solvable = self._is_solvable(self.game)
            self._begin(*self._load(self.game))

    def _is_solvable(self, name):
        """A few games of the data set cannot be solved, and their files say so."""
        game, _ = self._load(name)
        return game.get("solvable", True)

    def _load(self, name):
        """(game, trajectory): what a game's two files hold, see `_begin`."""
        if self.data:
            return data_game(self.data / name)
        return kept_game(self.split, name)

    def action_of(self, index):
        legal_actions = self.legal_actions()
        if index >= len(legal_actions):
            return NOTHING
        return legal_actions[index]

    def play(self, action):
        with ENGINE_LOCK:
            self._act(action)
        self.played.append(action)

        reward = self._goal_conditions()
        if self._won:
            reward += 50
        truncated = len(self.played) >= self.max_steps and not self._won
        return reward, self._won, truncated

    def restore(self, snapshot):
        with ENGINE_LOCK:
            self._begin(*self._load(snapshot["game"]))
            for action in snapshot["played"]:
                self._act(action)
        return super().restore(snapshot)

    def __reduce_ex__(self, protocol):
        raise TypeError("an ALFWorld game cannot be copied or pickled, because its engine cannot: "
                        "keep its snapshot(), and restore() that in another game")

    def legal_actions(self):
        return sorted(self._commands)[:len(self.actions)]

    def state(self):
        subgoal, command = self._plan()
        return {
            "task": self._task,
            "task_type": self._task_type,
            "observation": self._observation,
            "place": self._place,
            "visible": self._visible(),
            "carried": self._carried,
            "won": self._won,
            "success": self._won,
            "goal_conditions": self._goal_conditions(),
            "subgoal": subgoal,
            "expert": command or "look",
        }

    def _goal_conditions(self):
        """ALFRED's goal-condition success rate: the share of the conditions that hold, 0 to 1."""
        objects = [*self._receptacle_of, self._carried]
        targets = [o for o in objects if kind_of(o) == self._target]
        placed = []
        for o in targets:
            receptacle = self._receptacle_of.get(o, "")  # "" if it is carried
            if kind_of(receptacle) == self._goal:
                placed.append(o)

        # Two conditions: the object is carried, and a lamp in front of the agent is lit
        if self._task_type == "light":
            lamps = [o for o in self._held_in(self._place) if kind_of(o) == self._goal]
            is_lit = any(("istoggled", lamp) in self._facts for lamp in lamps)
            return ((self._carried in targets) + is_lit) / 2

        # One or two objects are in the same receptacle
        if self._task_type in ("pick", "two"):
            num_wanted = 2 if self._task_type == "two" else 1
            counts = Counter(self._receptacle_of[o] for o in placed)
            return min(max(counts.values(), default=0), num_wanted) / num_wanted

        # Three conditions: an object is placed, one is changed, and one is both
        fact = CHANGES[self._task_type].fact
        changed = [o for o in targets if (fact, o) in self._facts]
        both = set(placed) & set(changed)
        return (bool(placed) + bool(changed) + bool(both)) / 3

    # -- the engine's state

    def _begin(self, game, trajectory):
        """Begin a game, from the contents of its two files.

        game: of game.tw-pddl, with the problem in PDDL and the grammar. trajectory: of
        traj_data.json, with the task.
        """
        # Read the task; in the grammar it ends with a quotation mark, often after a full stop
        goal = trajectory["pddl_params"]
        self._task = re.search(r'Your task is to: (.*?)\.?"', game["grammar"])[1]
        for task_type, alfred_name in ALFRED_TASKS.items():
            if alfred_name == trajectory["task_type"]:
                self._task_type = task_type
        self._target = goal["object_target"].lower()    # the kind of object, such as "mug"
        self._goal = goal["parent_target"].lower()      # the kind of receptacle, or of lamp
        if self._task_type == "light":
            self._goal = goal["toggle_target"].lower()

        # Load the game. Loading a grammar takes 50 ms. Two games' grammars differ only in the task,
        # which was read above. With the same words in its place all games have one grammar, and
        # `speed_up_textworld` loads it once. If the game's file has the grounded problem, GROUNDED
        # holds it for `load`, which then does not call the planner.
        sentence = "Your task is to: "
        grammar = game["grammar"].replace(sentence + self._task, sentence + "UNKNOWN GOAL")
        GROUNDED.clear()
        if game.get("sas"):
            GROUNDED[game["pddl_problem"]] = game["sas"]
        engine = alfworld_engine()
        engine.game.load(game | {"grammar": grammar})
        self._state = engine.game._pddl_state
        self._entities = engine.game._entity_infos

        # Look around
        receptacles = [e.name for e in self._entities.values() if e.type == "receptacle"]
        self._receptacles = sorted(receptacles)
        self._operators = []  # of each action played: its number in the engine, of how many effects
        self._seen = set()    # the receptacles in which the agent has looked
        self._place = ""      # the receptacle in front of the agent
        self.played = []
        self._observe("#look.feedback#", {})

    def _act(self, command):
        """Let the engine play a command."""
        if command == NOTHING:
            self._observation = "Nothing happens."
            return
        state = self._state
        action = self._commands[command]

        # All games share one engine: bring it to this game's state first. Load the grounded
        # problem, then play again what was played. The engine writes each action's effects into an
        # array of C, which is not needed here.
        engine = state.downward_lib
        engine.load_sas(state.sas.encode())
        atom_type = alfworld_engine().Atom
        for number, num_effects in self._operators:
            effects = (atom_type * num_effects)()
            engine.apply_operator(number, effects)

        # Play the command
        num_effects = state._operators[action.id].nb_effect_atoms
        self._operators.append((action.id, num_effects))
        state.apply(action)
        self._observe(action.feedback_rule, action.mapping)

    def _observe(self, feedback_rule, mapping):
        """Read from the engine what is true after an action, and which commands it takes now.

        feedback_rule: the grammar's rule for its words; mapping: placeholder -> thing.
        """
        # What the engine says: a text of the grammar, whose rules use these five names
        things = {placeholder.name: self._entities[v.name] for placeholder, v in mapping.items()}
        self._observation = self._state._logic.grammar.derive(feedback_rule, {
            "state": self._state,
            "facts": list(self._state.facts),
            "variables": things,
            "mapping": mapping,
            "entity_infos": self._entities,
        })

        # Whatever the agent does, it then faces the receptacle that the action names
        for thing in things.values():
            if thing.type == "receptacle":
                self._place = thing.name

        # What is true, as tuples such as ("inreceptacle", "mug 1", "desk 2"). Arguments that are no
        # things, such as locations, are left out.
        self._facts = set()
        for fact in self._state.facts:
            entities = [self._entities[v.name] for v in fact.arguments if v.name in self._entities]
            self._facts.add((fact.name, *(entity.name.strip() for entity in entities)))
        pairs = [names for fact, *names in self._facts if fact == "inreceptacle"]
        self._receptacle_of = dict(sorted(pairs))
        held = [names[1] for fact, *names in self._facts if fact == "holds"]  # agent, object
        self._carried = held[0] if held else ""
        self._won = bool(self._state.check_goal())
        if self._place and not self._shut(self._place):
            self._seen.add(self._place)

        # Which commands the engine takes
        self._commands = {}
        for action in self._state.all_applicable_actions():
            self._commands[self._command(action)] = action

    def _command(self, action):
        """An action of the engine as a command."""
        template = action.command_template
        if action.name == "gotolocation":
            template = "go to {r}"
        names = {p.name: self._entities[v.name].name for p, v in action.mapping.items()}
        return template.format(**names)

    def _shut(self, receptacle):
        is_openable = ("openable", receptacle) in self._facts
        return is_openable and ("opened", receptacle) not in self._facts

    def _held_in(self, receptacle):
        return [o for o, holder in self._receptacle_of.items() if holder == receptacle]

    def _visible(self):
        """The objects that the agent sees in front of it."""
        return [] if self._shut(self._place) else self._held_in(self._place)

    # -- the expert

    @staticmethod
    def expert(info):
        """The next command of a plan that uses only what was seen so far."""
        return info["expert"]

    def _plan(self):
        """Return (aim in words, next command or "") of an expert who knows only what was seen."""
        target = self._target
        goal = self._goal
        carried = self._carried

        # What the expert knows: objects in receptacles that it has seen
        known = [o for o, receptacle in self._receptacle_of.items() if receptacle in self._seen]
        targets = [o for o in known if kind_of(o) == target]
        goals = [r for r in self._receptacles if kind_of(r) == goal]
        unchanged = []  # objects of the task that must still be cleaned, heated or cooled
        if self._task_type in CHANGES:
            fact = CHANGES[self._task_type].fact
            unchanged = [o for o in [*targets, carried] if (fact, o) not in self._facts]

        # Two objects must go into the same receptacle: take the one that holds most of them already
        def num_targets(receptacle):
            return sum(self._receptacle_of[o] == receptacle for o in targets)

        best_goal = max(goals, key=num_targets, default="")

        # 1. It carries something of no use: put it down, nearby if possible
        if carried and kind_of(carried) != target:
            aim = f"put down the {kind_of(carried)}"
            options = [r for r in self._receptacles if self._fits(r, carried)]
            if not options:
                return aim, ""
            # First the place itself, then places that were seen (False sorts before True)
            best = min(options, key=lambda r: (r != self._place, r not in self._seen, r))
            return aim, self._go_and(best, f"move {carried} to {best}")

        # 2. It carries the object that a lamp must shine on: go to the lamp, or look for one
        if carried and self._task_type == "light":
            lamps = [o for o in known if kind_of(o) == goal]
            if not lamps:
                return self._find(goal)
            aim = f"look at the {target} under the {goal}"
            return aim, self._go_and(self._receptacle_of[lamps[0]], f"use {lamps[0]}")

        # 3. It carries an object that must be changed first: go to the appliance
        if carried and carried in unchanged:
            appliance = CHANGES[self._task_type].appliance
            tools = [r for r in self._receptacles if kind_of(r) == appliance]
            tool = tools[0] if tools else ""
            command = f"{self._task_type} {carried} with {tool}"
            return f"{self._task_type} the {target}", self._go_and(tool, command)

        # 4. It carries an object that is ready: put it where it belongs
        if carried:
            command = f"move {carried} to {best_goal}"
            return f"put the {target} in the {goal}", self._go_and(best_goal, command)

        # 5. It carries nothing: take an object that is not yet ready or not yet where it belongs
        right_places = [best_goal] if self._task_type == "two" else goals
        wanted = []
        for o in targets:
            if o in unchanged or self._receptacle_of[o] not in right_places:
                wanted.append(o)
        if not wanted:
            return self._find(target)

        def effort(o):
            return (o in unchanged, self._receptacle_of[o] != self._place, o)

        best = min(wanted, key=effort)
        receptacle = self._receptacle_of[best]
        return f"take the {target}", self._go_and(receptacle, f"take {best} from {receptacle}")

    def _fits(self, receptacle, thing):
        fact = ("cancontain", f"{kind_of(receptacle)}type", f"{kind_of(thing)}type")
        return fact in self._facts

    def _go_and(self, receptacle, command):
        """Return the first command that the engine takes: go there, open it, `command`; or "".

        A step that is done is no longer possible, so the first possible one is the next.
        """
        # In the data set's rooms several receptacles may stand at one place. `examine` turns to
        # another one there.
        steps = []
        if receptacle != self._place:
            steps += [f"examine {receptacle}", f"go to {receptacle}"]
        if not command.startswith(("heat", "cool")):  # these work with a closed appliance
            steps.append(f"open {receptacle}")
        steps.append(command)

        possible = [step for step in steps if step in self._commands]
        return possible[0] if possible else ""

    def _find(self, kind):
        """Return (aim in words, next command or ""): look for a kind of thing that was not seen."""
        article = "an" if kind[0] in "aeiou" else "a"
        aim = f"find {article} {kind}"
        unseen = [r for r in self._receptacles if r not in self._seen]
        if not unseen:
            return aim, ""
        likeliest = min(unseen, key=lambda r: (not self._fits(r, kind), r))
        return aim, self._go_and(likeliest, "")

    # -- the picture: 5 x 5 cells of 60 pixels, because a patch of the built-in model has 60 pixels

    def draw(self):
        """Row 1: the task. Rows 2, 3: what is in front. Rows 4, 5: the map, and what is carried."""
        picture = Image.new("RGB", (SIZE, SIZE), PAPER)
        self._draw_task(picture)
        self._draw_front(picture)
        self._draw_map(picture)
        self._draw_carried(picture)
        return picture

    def _draw_task(self, picture):
        """A word for the type of task, the object, an arrow to the goal, and the whole sentence."""
        word, color = TASK_SIGNS[self._task_type]
        draw_cell(picture, 0, 0, SIZE, 60, color)
        draw_text(picture, word, (30, 24), 22, "white", 54, bold=1)
        for x, name in ((60, self._target), (180, self._goal)):
            draw_cell(picture, x, 4, 60, 42, "white")
            self._draw_icon(picture, name, x + 13, 8, 34)

        arrow = [(128, 18), (152, 18), (152, 10), (172, 25), (152, 40), (152, 32), (128, 32)]
        ImageDraw.Draw(picture).polygon(arrow, "white")
        draw_text(picture, self._task, (150, 50), 13, "white")

    def _draw_front(self, picture):
        """The receptacle in front of the agent; beside it up to six objects. Dark: it is closed."""
        place = self._place
        objects = self._visible()

        # Two cells, and words if there is nothing to show
        if self._shut(place):
            draw_cell(picture, 0, 60, 120, 120, "#d9dfe4")
            draw_cell(picture, 120, 60, 180, 120, "#3a4450")
            draw_text(picture, "closed", (210, 120), 20, "white")
        else:
            draw_cell(picture, 0, 60, 120, 120, "white")
            draw_cell(picture, 120, 60, 180, 120, "#e3ddd0")
            if not objects:
                words = "nothing here" if place else "go somewhere"
                draw_text(picture, words, (210, 120), 20, INK)

        # The receptacle
        if place:
            self._draw_icon(picture, place, 18, 66, 84)
            label = place
            if self._shut(place):
                label += " (closed)"
            elif ("opened", place) in self._facts:
                label += " (open)"
            draw_text(picture, label, (60, 165), 15, INK, 112)

        # The objects, three in a row
        for i, name in enumerate(objects[:6]):
            row, column = divmod(i, 3)
            self._draw_object(picture, name, 120 + 60 * column, 60 + 60 * row)
        if len(objects) > 6:
            draw_text(picture, f"+{len(objects) - 6}", (210, 120), 16, "#e0261c", bold=1)

    def _draw_map(self, picture):
        """All receptacles of the room, with up to three objects that were seen in each."""
        # The map has 240 x 120 pixels, so half as many rows as columns. Take the fewest columns
        # whose cells hold all receptacles: 4 in built-in rooms, more in those of the data set.
        num_columns = 24
        for columns in (16, 12, 8, 6, 4):
            if columns * columns // 2 >= len(self._receptacles):
                num_columns = columns
        size = 240 // num_columns

        for i, name in enumerate(self._receptacles):
            row, column = divmod(i, num_columns)
            x = column * size
            y = 180 + row * size
            is_seen = name in self._seen
            objects = self._held_in(name) if is_seen else []
            kinds = {kind_of(o) for o in objects}

            # The cell is yellow if the task's object was seen there and this is not its goal. It is
            # green if the task's lamp was seen there, and grey if the agent has not looked.
            if self._target in kinds and kind_of(name) != self._goal:
                color = "#f7cf4a"
            elif self._goal in kinds:  # in the task "light" the goal is a lamp, an object
                color = "#9ad29c"
            elif is_seen:
                color = "#fffdf2"
            else:
                color = "#87909a"
            outline = "#e0261c" if name == self._place else None  # red: the agent is there
            draw_cell(picture, x, y, size, size, color, outline)

            # The receptacle, its name if there is room, and its objects
            self._draw_icon(picture, name, x + size // 10, y + size // 10, size * 8 // 15)
            if num_columns == 4:
                if not is_seen:
                    draw_text(picture, "?", (x + 46, y + 22), 22, "white", bold=1)
                draw_text(picture, name, (x + 30, y + 48), 10, INK, 52)
            for j, o in enumerate(objects[:3]):
                top = y + (5 + 13 * j) * size // 60
                self._draw_icon(picture, o, x + size * 13 // 20, top, size // 4)

    def _draw_carried(self, picture):
        draw_cell(picture, 240, 180, 60, 120, "#2b5f4b")
        draw_text(picture, "carrying", (270, 212), 12, "white")
        if self._carried:
            self._draw_object(picture, self._carried, 240, 240)
        else:
            draw_text(picture, "nothing", (270, 268), 12, "#a8c8b8")

    def _draw_object(self, picture, name, x, y):
        """An object in a cell: red if it is hot, blue if it is cold, yellow if it is clean."""
        if ("ishot", name) in self._facts:
            color = "#f4a08c"
        elif ("iscool", name) in self._facts:
            color = "#9cc8f4"
        elif ("isclean", name) in self._facts:
            color = "#f4e28c"
        else:
            color = "white"
        draw_cell(picture, x, y, 60, 60, color)
        self._draw_icon(picture, name, x + 10, y + 4, 40)
        draw_text(picture, name, (x + 30, y + 50), 11, INK, 54)

        # A large number for "mug 2", none for "mug 1"
        number = name.split(" ")[-1]
        if number != "1":
            draw_text(picture, number, (x + 48, y + 15), 22, INK, bold=1)

    def _draw_icon(self, picture, name, x, y, pixels):
        state = ""
        if ("opened", name) in self._facts:
            state = "open"
        elif ("istoggled", name) in self._facts:
            state = "lit"
        image = icon(kind_of(name), pixels, state)
        picture.paste(image, (x, y), image)


def one_of_each(lists):
    """The elements of all lists: the first of each, then the second of each, and so on."""
    rows = itertools.zip_longest(*lists)
    return [element for row in rows for element in row if element is not None]


def kind_of(name):
    """The kind of a thing: "mug 2" -> "mug"."""
    return name.split(" ")[0]


def draw_cell(picture, x, y, width, height, color, outline=None):
    box = [x + 2, y + 2, x + width - 3, y + height - 3]
    ImageDraw.Draw(picture).rounded_rectangle(box, 6, color, outline, 3)


@cache
def icon(kind, pixels, state=""):
    """A kind of thing as a picture, transparent around it; state: "", "open" or "lit"."""
    # Kinds that are not in the table are boxes, in a colour that their name chooses. Its red, green
    # and blue are 48 to 175 each: neither very dark nor very light.
    if kind in LOOKS:
        shape, color = LOOKS[kind]
    else:
        number = (zlib.crc32(kind.encode()) & 0x7F7F7F) + 0x303030
        shape = "box"
        color = f"#{number:06x}"

    own = ImageColor.getrgb(color)
    colors = {
        "own": own,
        "dark": tuple(int(channel * 0.6) for channel in own),
        "light": tuple(int(0.4 * channel + 0.6 * 255) for channel in own),
        "black": (24, 28, 34),
        "paper": (244, 241, 234),
    }

    # Draw it four times too large and shrink it, for smooth edges
    large = Image.new("RGBA", (pixels * 4, pixels * 4))
    parts = SHAPES.get(f"{shape} {state}", SHAPES[shape])  # some look different in a state
    draw_shape(ImageDraw.Draw(large), parts, 0, 0, pixels * 4 / 100, colors)
    return large.resize((pixels, pixels), Image.LANCZOS)


# --------------------------------------------------------------------------------------------------
# ALFWorld's rooms: from seeds, or from its data set

ROOMS_VERSION = 3  # raise it when built_in_game() or ROOMS change, or the cache keeps old games


def built_in_game(split, task_type, number):
    """A room with a task, made from seeds: six receptacles, four or five objects.

    Returns (game, trajectory), the contents of ALFWorld's files game.tw-pddl and traj_data.json.
    """
    engine = alfworld_engine()
    can_hold = engine.constants.VAL_RECEPTACLE_OBJECTS  # receptacle -> objects that it can hold
    abilities = engine.constants.VAL_ACTION_OBJECTS     # "Cleanable", ... -> objects
    is_train = int(split == "train")
    rng = np.random.default_rng([is_train, list(ALFRED_TASKS).index(task_type), number])

    # Choose the room: its receptacles, the object of the task, and where the object shall go
    kinds, receptacles, target, goal, starts = choose_room(rng, split, task_type)

    # Place the things, as pairs of an object and a receptacle: first those of the task, then others
    things = [(target, pick(rng, starts))]
    if task_type == "two":
        things.append((target, pick(rng, starts)))
    if task_type == "light":
        things.append(("DeskLamp", pick(rng, lamp_places(receptacles))))
    others = rng.permutation([kind for kind in kinds if kind != target])
    num_others = rng.integers(4, 6) - len(things)
    for kind in others[:num_others]:
        possible = [r for r in receptacles if kind in can_hold[r]]
        if possible:
            things.append((str(kind), pick(rng, possible)))  # str: it is one of numpy

    # Name them as ALFWorld does, with "_bar_" between the parts of a name. A sink has a basin, and
    # things lie in the basin: "Sink_bar_1_bar_SinkBasin".
    receptacle_ids = []
    for i, receptacle in enumerate(receptacles):
        receptacle_id = f"{receptacle.removesuffix('Basin')}_bar_{i}"
        if receptacle.endswith("Basin"):
            receptacle_id += f"_bar_{receptacle}"
        receptacle_ids.append(receptacle_id)
    object_ids = [f"{kind}_bar_{i}" for i, (kind, _) in enumerate(things)]
    receptacle_types = sorted(set(receptacles))
    object_types = sorted({kind for kind, _ in things})

    # Write the facts, "(name argument ...)": what can be where ...
    facts = ["(= (total-cost) 0)", "(atLocation agent1 loc_bar_0)"]
    for receptacle in receptacle_types:
        for kind in object_types:
            if kind in can_hold[receptacle]:
                facts.append(f"(canContain {receptacle}Type {kind}Type)")

    # ... where each receptacle stands, each at its own location ...
    for i, (receptacle, receptacle_id) in enumerate(zip(receptacles, receptacle_ids), 1):
        facts.append(f"(receptacleAtLocation {receptacle_id} loc_bar_{i}) "
                     f"(receptacleType {receptacle_id} {receptacle}Type)")
        if receptacle in engine.constants.OPENABLE_CLASS_LIST:
            facts.append(f"(openable {receptacle_id})")

    # ... where each object is, and what can be done with it
    for object_id, (kind, receptacle) in zip(object_ids, things):
        # The room may have two receptacles of a type: choose one
        places = [i for i, other in enumerate(receptacles) if other == receptacle]
        position = pick(rng, places)
        facts.append(f"(objectType {object_id} {kind}Type) "
                     f"(inReceptacle {object_id} {receptacle_ids[position]}) "
                     f"(objectAtLocation {object_id} loc_bar_{position + 1})")
        for ability in ("Cleanable", "Heatable", "Coolable", "Toggleable"):
            if kind in abilities[ability]:
                facts.append(f"({ability} {object_id})")
        if kind != "DeskLamp":
            facts.append(f"(pickupable {object_id})")

    # Declare all names with their types
    names = ["agent1 - agent"]
    names += [f"{receptacle}Type - rtype" for receptacle in receptacle_types]
    names += [f"{kind}Type - otype" for kind in object_types]
    names += [f"{receptacle_id} - receptacle" for receptacle_id in receptacle_ids]
    names += [f"{object_id} - object" for object_id in object_ids]
    names += [f"loc_bar_{i} - location" for i in range(7)]  # 0: the agent; 1 to 6: receptacles

    # Write the task, in words and as the engine's goal
    task = engine.goals[ALFRED_TASKS[task_type]]
    arguments = {"obj": target, "recep": goal, "toggle": "DeskLamp"}
    small_letters = {key: name.lower() for key, name in arguments.items()}
    sentence = pick(rng, task["templates"]).format(**small_letters)
    lines = ["(define (problem room) (:domain alfred)", "(:objects", *names, ")"]
    lines += ["(:init", *facts, ")"]
    game = {
        "pddl_domain": engine.domain,
        "grammar": engine.grammar.replace("UNKNOWN GOAL", sentence),
        "solvable": True,
        "pddl_problem": "\n".join(lines) + task["pddl"].format(**arguments).replace("#", "-"),
    }
    trajectory = {
        "task_type": ALFRED_TASKS[task_type],
        "pddl_params": {
            "object_target": target,
            "parent_target": "" if task_type == "light" else goal,
            "toggle_target": "DeskLamp" if task_type == "light" else "",
            "mrecep_target": "",
            "object_sliced": False,
        },
    }
    return game, trajectory


def choose_room(rng, split, task_type):
    """Draw rooms until one belongs to the split and has the task.

    Returns (kinds of objects, receptacles, target, goal, receptacles where the target may start).
    """
    constants = alfworld_engine().constants
    can_hold = constants.VAL_RECEPTACLE_OBJECTS
    change = CHANGES.get(task_type)
    while True:
        # Draw a room of six receptacles, the object of the task, and where it shall go
        room = pick(rng, [room for room in ROOMS.values() if task_type in room["tasks"]])
        optional = [str(r) for r in rng.permutation(room["optional"])]
        receptacles = sorted([*room["always"], *optional][:6])
        target = pick(rng, room["objects"])
        appliance = change.appliance if change else ""
        goal = pick(rng, [r for r in receptacles if r.lower() != appliance])

        # Divide the rooms between the splits: a quarter of them, by a checksum, is for "unseen"
        is_unseen = zlib.crc32(" ".join(receptacles).encode()) % 4 == 0
        if is_unseen != (split == "unseen"):
            continue

        # The task must be possible
        if target not in can_hold[goal]:
            continue
        if change and target not in constants.VAL_ACTION_OBJECTS[change.ability]:
            continue
        if task_type == "light" and not lamp_places(receptacles):
            continue

        # The object must not be at its goal already
        starts = [r for r in receptacles if target in can_hold[r]]
        if task_type != "light":
            starts = [r for r in starts if r != goal]
        if starts:
            return room["objects"], receptacles, target, goal, starts


def lamp_places(receptacles):
    """The receptacles on which a lamp can stand."""
    flat = ("Desk", "SideTable", "Dresser", "CoffeeTable", "DiningTable", "Shelf")
    return [r for r in receptacles if r in flat]


def pick(rng, choices):
    """A random one of `choices`."""
    return choices[rng.integers(len(choices))]


def kept_game(split, name):
    """(game, trajectory) of the built-in game `name` ("heat/17"), from the cache if it is there."""
    folder = game_cache() / split / name
    if folder.exists():
        return data_game(folder)

    # Make it, and let the expert play it once: every game that is kept can be solved
    task_type, number = name.split("/")
    game, trajectory = built_in_game(split, task_type, int(number))
    player = ALFWorldEnv(split=split)
    player._begin(game, trajectory)
    while not player._won:
        player.play(player.state()["expert"])
        if len(player.played) > 40:
            raise RuntimeError(f"the expert does not solve {split}/{name}: {player._task}")
    game["walkthrough"] = player.played  # ALFWorld's files have it too
    game["sas"] = player._state.sas  # the grounded problem, which takes 50 ms to make

    # Write it into a folder of another name, then rename that: no process sees half a game. (After
    # the renaming there is no temporary folder left to be deleted, which is no error.)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".") as unfinished:
        Path(unfinished, "game.tw-pddl").write_text(json.dumps(game))
        Path(unfinished, "traj_data.json").write_text(json.dumps(trajectory))
        with contextlib.suppress(OSError):  # another process was faster, with the same game
            Path(unfinished).rename(folder)
    return data_game(folder)


@cache
def game_cache():
    """The folder for built-in games: in the user's cache, or a temporary one if it is read-only."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = home / "vlm-games" / f"alfworld-{ROOMS_VERSION}"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if os.access(folder, os.W_OK):
        return folder
    return Path(tempfile.gettempdir()) / folder.name


@lru_cache(maxsize=8)
def data_set(folder):
    """The games of a split of ALFWorld's data set: a list of folders for each type of task."""
    # ALFWorld leaves out games with sliced objects, and so do the next lines. It also leaves out
    # those with movable receptacles: their type is not in ALFRED_TASKS.
    files = folder.glob("*/*/game.tw-pddl")
    names = sorted(str(file.parent.relative_to(folder)) for file in files)
    names = [name for name in names if "Sliced" not in name]

    games = []
    for alfred_name in ALFRED_TASKS.values():
        games.append([name for name in names if name.startswith(f"{alfred_name}-")])
    games = [names for names in games if names]
    if not games:
        raise ValueError(f"{folder} holds no ALFWorld games: "
                         "run alfworld-download, or unset ALFWORLD_DATA")
    return games


@lru_cache(maxsize=512)
def data_game(folder):
    """(game, trajectory) of a folder of the data set or of the cache."""
    try:
        game = json.loads((folder / "game.tw-pddl").read_text())
        trajectory = json.loads((folder / "traj_data.json").read_text())
        # Keep two entries; the whole trajectory has 100 kB
        return game, {key: trajectory[key] for key in ("task_type", "pddl_params")}
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder} holds no game that can be read ({error}): "
                         "delete it, or download again") from None


# --------------------------------------------------------------------------------------------------
# ALFWorld's engine: loading it, and functions of its libraries that are replaced

ENGINE_LOCK = threading.RLock()  # one thread at a time: all games of a process share one engine
NOTHING = ""  # the command of an index beyond the legal actions
GROUNDED = {}  # the loaded game's problem -> its grounded form, if the game's file has it
ALFWORLD_MISSING = (
    "--env alfworld needs its packages: pip install alfworld==0.4.2 "
    "(see README: it builds from source and needs a compiler)"
)


@cache
def alfworld_engine():
    """ALFWorld's text engine and tables, as a namespace; loaded for the first ALFWorld game.

    All games of a process share one engine. A game that acts loads its state into it first, which
    takes 0.2 ms; an engine for each game would take 33 MB each.
    """
    try:
        with alfworld_imports_quietly():
            from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
            from alfworld.gen import constants, goal_library
            from alfworld.info import ALFRED_PDDL_PATH, ALFRED_TWL2_PATH
            from textworld.envs.pddl import PddlEnv, logic
    except ImportError:
        raise ValueError(ALFWORLD_MISSING) from None

    mend_textworld()
    speed_up_textworld()
    return SimpleNamespace(
        constants=constants,
        goals=goal_library.gdict,
        domain=Path(ALFRED_PDDL_PATH).read_text(),
        grammar=Path(ALFRED_TWL2_PATH).read_text(),
        game=AlfredDemangler(PddlEnv()),  # the engine, with names such as "mug 1"
        Atom=logic.Atom,
    )


@contextlib.contextmanager
def alfworld_imports_quietly():
    """Undo the side effects of the imports: they print, read sys.argv and set ALFWORLD_DATA."""
    argv = sys.argv
    data = os.environ.get("ALFWORLD_DATA")
    sys.argv = ["", "domain", "problem"]  # one import wants two arguments, whatever they are
    os.environ["ALFWORLD_DATA"] = tempfile.gettempdir()  # alfworld makes this folder
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        sys.argv = argv
        del os.environ["ALFWORLD_DATA"]
        if data is not None:
            os.environ["ALFWORLD_DATA"] = data


def mend_textworld():
    """Let textworld 1.7.0 run on Python 3.13, where its grammar ends with a NameError.

    It writes the variables of an expression such as "o.name" into locals() before eval(). Since
    Python 3.13 (PEP 667) such writes are lost, so this gives the variables to eval() directly.
    """
    if sys.version_info < (3, 13):
        return
    from textworld.envs.pddl import textgen

    def derive(self, context=None):
        context = context or self.context
        value = eval(self.expression, dict(context["variables"]))
        return [textgen.TerminalSymbol(value)]

    textgen.EvalSymbol.derive = derive


def speed_up_textworld():
    """Replace functions of textworld and fast_downward by faster ones with the same results.

    Each comment says how long a reset or a step takes without and with the replacement, if all
    others are in place (built-in rooms, one core). Together: 10 ms for a reset, 1.9 ms for a step.
    """
    with alfworld_imports_quietly():
        import fast_downward
        from fast_downward.translate import normalize
        from fast_downward.translate.pddl_parser import lisp_parser, parsing_functions
        from textworld.envs.pddl import logic, textgen
        from textworld.logic import Rule

    # `pddl2sas` parses a problem and grounds it; it returns both results. The engine calls it twice
    # at every reset. Keep what it returned: 15 ms for a reset without this, 10 with.
    original_pddl2sas = fast_downward.pddl2sas

    @lru_cache(maxsize=512)  # 0.15 MB each; in the data set's rooms up to 2 MB
    def translate(domain, problem):
        # If the game's file has the grounded form, only parse: 61 ms for a reset without this, 10
        # with.
        if problem not in GROUNDED:
            argv = sys.argv
            try:
                return original_pddl2sas(domain, problem)
            finally:
                sys.argv = argv  # the original function overwrites it
        with contextlib.redirect_stdout(io.StringIO()):
            domain_lists = lisp_parser.parse_nested_list(domain.split("\n"))
            problem_lists = lisp_parser.parse_nested_list(problem.split("\n"))
            task = parsing_functions.parse_task(domain_lists, problem_lists)
            normalize.normalize(task)
        return task, GROUNDED[problem]

    def pddl2sas(domain, problem, **_):
        return translate(domain, problem)

    fast_downward.pddl2sas = pddl2sas

    # Copy a grammar's context flat, not deeply, because nothing changes what is in it: 5.3 ms for a
    # step without it, 1.9 with.
    def copy_context(context):
        variables = dict(context["variables"])
        mapping = dict(context["mapping"])
        return context | {"variables": variables, "mapping": mapping}

    textgen.copy_context = copy_context

    # Parse each condition of the grammar once: 5.1 ms for a step without it, 1.9 with.
    Rule.parse_conjunctive_query = lru_cache(maxsize=256)(Rule.parse_conjunctive_query)

    # Parse each sentence of the grammar once: 3.6 ms for a step without it, 1.9 with.
    textgen._parse_and_convert = lru_cache(maxsize=256)(textgen._parse_and_convert)

    # Load each grammar once: 63 ms for a reset without it, 10 with.
    logic.GameLogic = lru_cache(maxsize=8)(logic.GameLogic)


# --------------------------------------------------------------------------------------------------
# ALFWorld in THOR: the same tasks with frames of a simulator


class ALFWorldThorEnv(ALFWorldEnv):
    """ALFWorld in the simulator AI2-THOR: its frames instead of drawings, else as `ALFWorldEnv`.

    It plays the data set's games. `visible` and `carried` are what the engine's words say,
    `subgoal` is the expert's next command, and there is no `place`.

    engine: an `AlfredThorEnv` of one game; left out, it is made from ALFWORLD_DATA.
    """
    saved = ("game", "played", "carried")

    def __init__(self, render_mode=None, obs="image", split="train", engine=None):
        self.engine = engine or thor_engine(split)
        self.split = split
        self.names = [sorted(self.engine.json_file_list)]
        self.in_turn = one_of_each(self.names)
        Game.__init__(self, render_mode, obs)

    def _load(self, name):
        return {"file": name}, None

    def _begin(self, game, trajectory):
        self.played = []
        self.carried = ""
        self._send(None, True, game["file"])
        self._task = re.search(r"Your task is to: (.*?)\.?$", self._observation)[1]

    def _act(self, command):
        self._send(command, False, "")

    def _send(self, command, begin, file):
        """Let the engine's thread play a command, or begin the game of a file; read its answer."""
        with contextlib.redirect_stdout(io.StringIO()):
            self.engine.action_queues[0].put((command, begin, file))
            observations, _, self._answer = self.engine.wait_and_get_info()
        self._observation = observations[0]
        self._won = bool(self._answer["won"][0])

        taken = re.search(r"You pick up the (\w+ \d+)", self._observation)
        if taken:
            self.carried = taken[1]
        elif "You put the" in self._observation:
            self.carried = ""

        self._commands = sorted(set(self._answer["admissible_commands"][0]))

    def _goal_conditions(self):
        return float(self._answer["goal_condition_success_rate"][0])

    def state(self):
        # The expert's next command, if it is legal
        expert = self._commands[0]
        plan = self._answer["extra.expert_plan"][0]
        if plan and plan[0] in self._commands:
            expert = plan[0]

        # The type of task is in the file's name
        task_type = ""
        for key, alfred_name in ALFRED_TASKS.items():
            if alfred_name in str(self._answer["extra.gamefile"][0]):
                task_type = key
                break

        # "..., you see a mug 1, and a book 2."
        visible = []
        sentence = re.search(r"you see (.*)", self._observation)
        if sentence:
            visible = re.findall(r"an? (\w+ \d+)", sentence[1])

        return {
            "task": self._task,
            "task_type": task_type,
            "observation": self._observation,
            "carried": self.carried,
            "won": self._won,
            "success": self._won,
            "visible": visible,
            "goal_conditions": self._goal_conditions(),
            "subgoal": expert,
            "expert": expert,
        }

    def draw(self):
        frame = self.engine.get_frames()[0]  # (height, width, 3) uint8, blue first
        red_first = np.ascontiguousarray(frame[:, :, ::-1])  # a copy: Pillow needs it in order
        return Image.fromarray(red_first).resize((SIZE, SIZE))


def thor_engine(split):
    """An `AlfredThorEnv` of one game. ValueError: the simulator, a display or data are missing."""
    if "ALFWORLD_DATA" not in os.environ:
        raise ValueError("the THOR engine plays the data set's games: "
                         "run alfworld-download and set ALFWORLD_DATA")
    folder = Path(os.environ["ALFWORLD_DATA"]).expanduser() / "json_2.1.1" / SPLITS[split]
    data_set(folder)  # raises ValueError if it holds no games

    # ALFWorld demands all of these keys
    config = {
        "dataset": {"data_path": str(folder), "num_train_games": -1},
        "env": {
            "task_types": [1, 2, 3, 4, 5, 6],
            "goal_desc_human_anns_prob": 0.0,
            "thor": {
                "screen_width": SIZE,
                "screen_height": SIZE,
                "smooth_nav": False,
                "save_frames_to_disk": False,
                "save_frames_path": "",
            },
        },
        "controller": {"type": "oracle", "load_receps": True, "debug": False},
        "general": {"training_method": "dagger"},
        "dagger": {"training": {"max_nb_steps_per_episode": ALFWorldEnv.max_steps}},
    }
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            from alfworld.agents.environment.alfred_thor_env import AlfredThorEnv
            return AlfredThorEnv(config, "train").init_env(1)  # only "train" has the expert
    except Exception as error:  # a simulator without a display may raise anything
        needs = "it needs a display and pip install 'alfworld[full]'"
        raise ValueError(f"the THOR engine does not start ({error}): {needs}") from None


# Both have the name "alfworld". Gymnasium knows both; GAMES keeps the last, until use_thor().
register(ALFWorldThorEnv)
register(ALFWorldEnv)


def use_thor():
    """Play the task "alfworld" in THOR from now on."""
    GAMES["alfworld"] = ALFWorldThorEnv


def use_text_engine():
    """Play the task "alfworld" in ALFWorld's text engine from now on."""
    GAMES["alfworld"] = ALFWorldEnv


# --------------------------------------------------------------------------------------------------
# Tables

# ALFWorld's built-in rooms: types of tasks, the receptacles that are always there, receptacles of
# which some are there (one that is named twice may come twice), and the objects.
ROOMS = {
    "kitchen": {
        "tasks": ["pick", "clean", "heat", "cool", "two"],
        "always": ["Fridge", "Microwave", "SinkBasin"],
        "optional": [
            "CounterTop", "DiningTable", "Cabinet", "Cabinet", "Drawer", "Drawer", "Shelf",
            "SideTable", "GarbageCan", "StoveBurner",
        ],
        "objects": ["Apple", "Egg", "Tomato", "Bread", "Mug", "Plate", "Pan", "Spoon"],
    },
    "living room": {
        "tasks": ["pick", "light", "two"],
        "always": ["Sofa", "CoffeeTable"],
        "optional": [
            "ArmChair", "SideTable", "Drawer", "Drawer", "Shelf", "Cabinet", "DiningTable", "Safe",
        ],
        "objects": ["Book", "KeyChain", "RemoteControl", "Pillow", "Newspaper", "Vase"],
    },
    "bedroom": {
        "tasks": ["pick", "light", "two"],
        "always": ["Bed", "Desk"],
        "optional": [
            "Dresser", "Drawer", "Drawer", "Shelf", "SideTable", "Safe", "ArmChair", "CounterTop",
        ],
        "objects": ["Book", "AlarmClock", "CellPhone", "CD", "Pencil", "Pillow"],
    },
    "bathroom": {
        "tasks": ["pick", "clean", "two"],
        "always": ["SinkBasin", "Toilet"],
        "optional": [
            "CounterTop", "Cabinet", "Cabinet", "Drawer", "BathtubBasin", "GarbageCan", "Shelf",
            "Cart",
        ],
        "objects": ["SoapBar", "Cloth", "ToiletPaper", "Candle", "SprayBottle", "HandTowel"],
    },
}

# Types of ALFWorld's tasks: the word and the colour at the top of the picture
TASK_SIGNS = {
    "pick": ("PUT", "#50606e"),
    "light": ("LOOK", "#9a7a10"),
    "clean": ("CLEAN", "#1f8a8a"),
    "heat": ("HEAT", "#b8331f"),
    "cool": ("COOL", "#2a5fc0"),
    "two": ("TWO", "#7a3f9a"),
}

# Suits, on a grid of 200 x 200. The sides of heart and spade touch their circles without a corner.
SUIT_SHAPES = {
    "S": [
        ("ellipse", "own", (4, 80, 104, 180)), ("ellipse", "own", (96, 80, 196, 180)),
        ("polygon", "own", (100, 0, 11, 105, 60, 150, 140, 150, 189, 105)),
        ("polygon", "own", (100, 120, 140, 200, 60, 200)),
    ],
    "H": [
        ("ellipse", "own", (4, 20, 104, 120)), ("ellipse", "own", (96, 20, 196, 120)),
        ("polygon", "own", (100, 200, 11, 95, 60, 50, 140, 50, 189, 95)),
    ],
    "D": [("polygon", "own", (100, 0, 175, 100, 100, 200, 25, 100))],
    "C": [
        ("ellipse", "own", (52, 2, 148, 98)), ("ellipse", "own", (2, 77, 98, 173)),
        ("ellipse", "own", (102, 77, 198, 173)), ("polygon", "own", (100, 100, 140, 200, 60, 200)),
    ],
}

# How kinds of things look: a shape and a colour. All other kinds are boxes.
LOOKS = {
    "apple": ("round", "#d22b2b"), "tomato": ("round", "#f26b3a"), "potato": ("round", "#a9814f"),
    "lettuce": ("round", "#6aa83a"), "egg": ("egg", "#f0d9a8"), "bread": ("loaf", "#c98a45"),
    "mug": ("cup", "#3c6fc4"), "cup": ("cup", "#3aa89a"), "plate": ("dish", "#9fb3c8"),
    "bowl": ("dish", "#b06fc0"), "garbagecan": ("can", "#6f7f6f"), "pan": ("pan", "#4a4f57"),
    "pot": ("pan", "#7a6f66"), "pillow": ("soft", "#7f6fd0"), "spoon": ("stick", "#8d99a6"),
    "knife": ("stick", "#56606b"), "cd": ("ring", "#3fb8e0"), "pencil": ("pencil", "#e8b21e"),
    "book": ("book", "#a03a8c"), "newspaper": ("paper", "#cfc8b4"),
    "remotecontrol": ("device", "#33373d"), "cellphone": ("device", "#2f8f4f"),
    "spraybottle": ("bottle", "#2fa0d8"), "vase": ("bottle", "#d0568c"),
    "cloth": ("cloth", "#3fa08f"), "handtowel": ("cloth", "#e88aa0"),
    "toiletpaper": ("roll", "#c8c8d4"), "keychain": ("key", "#d8a020"),
    "soapbar": ("bar", "#f09ab8"), "dishsponge": ("bar", "#e8c83a"),
    "alarmclock": ("clock", "#d8402f"), "candle": ("candle", "#e8a83a"),
    "microwave": ("oven", "#6f7883"), "desklamp": ("lamp", "#e8902a"),
    "floorlamp": ("lamp", "#d0a848"), "diningtable": ("table", "#8a5a33"),
    "sidetable": ("table", "#b58a5a"), "coffeetable": ("table", "#6f4a2f"),
    "desk": ("table", "#9c6b3f"), "countertop": ("counter", "#8b9aa5"),
    "dresser": ("counter", "#a4713f"), "sofa": ("seat", "#4f78b8"),
    "armchair": ("seat", "#b85f4f"), "bed": ("bed", "#6f8fc8"), "sinkbasin": ("basin", "#6fb0d0"),
    "bathtubbasin": ("basin", "#4fa0a8"), "toilet": ("basin", "#a8b4bc"),
    "shelf": ("shelf", "#a87f4f"), "cart": ("shelf", "#8f9fa8"),
    "stoveburner": ("burner", "#d0502a"), "fridge": ("door", "#9fb8cc"),
    "cabinet": ("door", "#c09058"), "safe": ("door", "#5a7a6a"), "drawer": ("drawer", "#b87f48"),
}

# Shapes, on a grid of 100 x 100: from back to front, a form, a colour and the form's coordinates.
# "own" is the thing's colour; "dark" and "light" are made from it.
SHAPES = {
    "round": [
        ("ellipse", "own", (14, 20, 86, 92)), ("polygon", "black", (47, 24, 60, 4, 66, 6, 54, 26)),
        ("ellipse", "light", (28, 32, 46, 50)),
    ],
    "egg": [("ellipse", "own", (24, 10, 76, 92)), ("ellipse", "light", (34, 24, 50, 48))],
    "loaf": [
        ("rectangle", "own", (8, 44, 92, 86)), ("ellipse", "own", (8, 20, 92, 68)),
        ("rectangle", "dark", (34, 40, 38, 84)), ("rectangle", "dark", (62, 40, 66, 84)),
    ],
    "cup": [
        ("ellipse", "dark", (48, 32, 96, 78)), ("ellipse", "paper", (60, 44, 84, 66)),
        ("rectangle", "own", (14, 20, 70, 92)), ("rectangle", "light", (14, 20, 70, 32)),
    ],
    "box": [("rectangle", "own", (8, 24, 92, 92)), ("rectangle", "dark", (8, 24, 92, 42))],
    "dish": [("ellipse", "own", (2, 24, 98, 84)), ("ellipse", "light", (22, 36, 78, 70))],
    "can": [
        ("polygon", "own", (20, 24, 80, 24, 70, 98, 30, 98)),
        ("rectangle", "dark", (12, 12, 88, 26)),
    ],
    "pan": [
        ("rectangle", "black", (60, 50, 100, 64)), ("ellipse", "own", (4, 22, 72, 92)),
        ("ellipse", "dark", (16, 34, 60, 80)),
    ],
    "soft": [("ellipse", "own", (2, 20, 98, 88)), ("ellipse", "light", (22, 34, 78, 74))],
    "stick": [
        ("polygon", "own", (8, 84, 66, 28, 76, 38, 18, 94)), ("ellipse", "own", (56, 2, 98, 44)),
    ],
    "ring": [("ellipse", "own", (8, 8, 92, 92)), ("ellipse", "paper", (36, 36, 64, 64))],
    "pencil": [
        ("polygon", "own", (16, 70, 70, 12, 90, 30, 34, 88)),
        ("polygon", "black", (16, 70, 34, 88, 6, 96)), ("polygon", "dark", (70, 12, 90, 30, 96, 8)),
    ],
    "book": [
        ("rectangle", "own", (14, 8, 86, 94)), ("rectangle", "light", (30, 22, 74, 46)),
        ("rectangle", "dark", (14, 8, 24, 94)),
    ],
    "paper": [
        ("rectangle", "own", (10, 12, 90, 92)), ("rectangle", "black", (20, 24, 80, 36)),
        ("rectangle", "dark", (20, 46, 80, 52)), ("rectangle", "dark", (20, 62, 80, 68)),
        ("rectangle", "dark", (20, 78, 60, 84)),
    ],
    "device": [
        ("rectangle", "own", (28, 4, 72, 98)), ("rectangle", "light", (36, 14, 64, 56)),
        ("ellipse", "black", (42, 70, 58, 86)),
    ],
    "bottle": [
        ("rectangle", "own", (26, 36, 74, 98)), ("rectangle", "dark", (42, 6, 58, 38)),
        ("rectangle", "black", (38, 2, 62, 14)), ("rectangle", "light", (34, 56, 66, 80)),
    ],
    "cloth": [
        ("polygon", "own", (6, 20, 94, 12, 90, 88, 10, 80)),
        ("rectangle", "light", (20, 34, 80, 42)), ("rectangle", "light", (20, 56, 80, 64)),
    ],
    "roll": [
        ("rectangle", "own", (14, 30, 86, 90)), ("ellipse", "own", (14, 14, 86, 50)),
        ("ellipse", "dark", (38, 24, 62, 40)),
    ],
    "key": [
        ("ellipse", "own", (4, 26, 52, 74)), ("ellipse", "paper", (18, 40, 38, 60)),
        ("rectangle", "own", (48, 44, 98, 56)), ("rectangle", "own", (76, 50, 84, 76)),
        ("rectangle", "own", (90, 50, 98, 70)),
    ],
    "bar": [("rectangle", "own", (8, 30, 92, 80)), ("rectangle", "light", (20, 42, 80, 66))],
    "clock": [
        ("ellipse", "own", (8, 12, 92, 96)), ("ellipse", "light", (20, 24, 80, 84)),
        ("rectangle", "black", (47, 30, 53, 56)), ("rectangle", "black", (47, 52, 70, 58)),
        ("ellipse", "own", (8, 2, 34, 28)), ("ellipse", "own", (66, 2, 92, 28)),
    ],
    "candle": [
        ("rectangle", "own", (34, 38, 66, 96)), ("ellipse", "black", (46, 26, 54, 40)),
        ("polygon", "light", (50, 2, 62, 24, 50, 36, 38, 24)),
    ],
    "oven": [
        ("rectangle", "own", (2, 16, 98, 84)), ("rectangle", "dark", (8, 22, 72, 78)),
        ("rectangle", "light", (14, 28, 66, 72)), ("rectangle", "black", (78, 28, 92, 40)),
        ("rectangle", "black", (78, 48, 92, 54)), ("rectangle", "black", (78, 60, 92, 66)),
    ],
    "oven open": [
        ("rectangle", "own", (2, 16, 98, 84)), ("rectangle", "black", (8, 22, 72, 78)),
        ("polygon", "dark", (8, 78, 72, 78, 66, 100, 2, 100)),
        ("rectangle", "black", (78, 28, 92, 40)), ("rectangle", "black", (78, 48, 92, 54)),
        ("rectangle", "black", (78, 60, 92, 66)),
    ],
    "lamp": [
        ("polygon", "own", (28, 6, 72, 6, 94, 52, 6, 52)), ("rectangle", "black", (45, 52, 55, 88)),
        ("rectangle", "black", (24, 86, 76, 96)),
    ],
    "lamp lit": [
        ("ellipse", "light", (0, 0, 100, 96)), ("polygon", "own", (28, 6, 72, 6, 94, 52, 6, 52)),
        ("rectangle", "black", (45, 52, 55, 88)), ("rectangle", "black", (24, 86, 76, 96)),
    ],
    "table": [
        ("rectangle", "dark", (12, 42, 24, 98)), ("rectangle", "dark", (76, 42, 88, 98)),
        ("rectangle", "own", (2, 28, 98, 46)),
    ],
    "counter": [
        ("rectangle", "dark", (8, 40, 92, 98)), ("rectangle", "black", (49, 46, 51, 94)),
        ("rectangle", "own", (2, 24, 98, 42)),
    ],
    "seat": [
        ("rectangle", "own", (10, 14, 90, 66)), ("rectangle", "dark", (20, 50, 80, 82)),
        ("rectangle", "own", (2, 38, 22, 88)), ("rectangle", "own", (78, 38, 98, 88)),
    ],
    "bed": [
        ("rectangle", "dark", (2, 20, 10, 96)), ("rectangle", "dark", (90, 56, 98, 96)),
        ("rectangle", "own", (6, 56, 94, 82)), ("ellipse", "light", (12, 42, 44, 64)),
    ],
    "basin": [
        ("rectangle", "black", (44, 8, 54, 44)), ("rectangle", "black", (44, 8, 72, 18)),
        ("polygon", "own", (2, 42, 98, 42, 80, 94, 20, 94)), ("ellipse", "light", (14, 36, 86, 54)),
    ],
    "shelf": [
        ("rectangle", "own", (2, 24, 98, 34)), ("rectangle", "own", (2, 56, 98, 66)),
        ("rectangle", "own", (2, 88, 98, 98)), ("rectangle", "dark", (8, 10, 14, 98)),
        ("rectangle", "dark", (86, 10, 92, 98)),
    ],
    "burner": [
        ("rectangle", "black", (6, 20, 94, 96)), ("ellipse", "own", (18, 26, 82, 90)),
        ("ellipse", "black", (32, 40, 68, 76)), ("ellipse", "own", (44, 52, 56, 64)),
    ],
    "door": [
        ("rectangle", "own", (16, 2, 84, 98)), ("rectangle", "dark", (22, 8, 78, 92)),
        ("rectangle", "own", (26, 12, 74, 88)), ("rectangle", "black", (64, 42, 70, 62)),
    ],
    "door open": [
        ("rectangle", "own", (16, 2, 84, 98)), ("rectangle", "black", (24, 10, 76, 90)),
        ("polygon", "dark", (16, 2, 0, 14, 0, 100, 16, 98)),
    ],
    "drawer": [
        ("rectangle", "own", (4, 14, 96, 90)), ("rectangle", "dark", (12, 24, 88, 80)),
        ("rectangle", "black", (38, 46, 62, 56)),
    ],
    "drawer open": [
        ("rectangle", "own", (4, 4, 96, 60)), ("rectangle", "black", (12, 12, 88, 56)),
        ("polygon", "dark", (4, 56, 96, 56, 100, 98, 0, 98)),
        ("rectangle", "black", (38, 72, 62, 82)),
    ],
}


# --------------------------------------------------------------------------------------------------
# On its own: play in the terminal


def show(image, columns=60):
    """Print a picture: each character is the upper half of a block, in two colours.

    The codes of the terminal are 38;2 for the colour of the half-block, which is the upper pixel,
    and 48;2 for the colour behind it, the lower pixel.
    """
    small = Image.fromarray(image).resize((columns, columns))
    pixels = np.asarray(small).tolist()
    for upper_row, lower_row in zip(pixels[::2], pixels[1::2]):
        line = ""
        for (r, g, b), (r2, g2, b2) in zip(upper_row, lower_row):
            line += f"\033[38;2;{r};{g};{b};48;2;{r2};{g2};{b2}m\u2580"
        print(line + "\033[0m")


def main():
    parser = argparse.ArgumentParser(
        description="Play a game in the terminal.",
        usage=argparse.SUPPRESS,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--env", choices=GAMES, default="blackjack", help="the game")
    parser.add_argument("--seed", type=int, help="fixes the episode")
    parser.add_argument("--picture", default="game.png", help="file for what the model would see")
    args = parser.parse_args()

    try:
        game = GAMES[args.env]()
        image, info = game.reset(seed=args.seed)
    except (ValueError, gym.error.Error) as error:
        parser.error(str(error))

    while not game.over:
        # Show the picture
        try:
            Image.fromarray(image).save(args.picture)
        except (OSError, ValueError) as error:
            parser.error(f"cannot write {args.picture}: {error}")
        if sys.stdout.isatty():
            show(image)
        else:
            print(f"picture: {args.picture}")

        # Ask for an action
        legal_actions = info["legal_actions"]
        choices = f"{', '.join(legal_actions)}; the expert plays {expert_action(info)}"
        try:
            action = input(f"your action ({choices}): ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return

        # Play it
        if action not in legal_actions:
            print("that is not one of the actions")
            continue
        image, reward, _, _, info = game.step(legal_actions.index(action))
        print(f"reward {reward:+.0f}")

    if sys.stdout.isatty():
        show(image)
    outcome = "success" if info["success"] else "no success"
    print(f"return {game.episode_return:+.0f}, {outcome}")


if __name__ == "__main__":
    main()
