"""The tasks: Gymnasium environments whose observation is a picture and whose actions are short texts.

    env = gymnasium.make("GymCards/Blackjack-v0")
    image, info = env.reset(seed=0)              # image: (300, 300, 3) uint8
    image, reward, terminated, truncated, info = env.step(info["legal_actions"].index("hit"))

`info`, at every reset and step, holds `legal_actions` (list of str; an action is an index into it),
`success` (bool: the episode is over and its return is positive; ALFWorld: the task is done) and the true state behind
the picture, under the names that each class lists. The model never sees the state; prompts and experts do.

`python env.py --env points24` plays a game in the terminal.
"""
import argparse
import ast
import contextlib
import inspect
import io
import itertools
import json
import math
import operator
import os
import re
import sys
import tempfile
import zlib
from collections import Counter
from fractions import Fraction
from functools import cache, lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import gymnasium as gym
import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

SIZE = 300  # height and width of every picture, in pixels
RANKS = ["A", "2", "3", "4", "5", "6", "7", "8", "9", "10", "J", "Q", "K"]
SUITS = ["S", "H", "D", "C"]
PAPER, INK, TABLE = "#f4f1ea", "#101820", "#1d6b4f"  # the table is green felt
NUMBERS = [str(n) for n in range(1, 11)]

# ---------------------------------------------------------------------------------------------------
# Drawing


font = cache(ImageFont.load_default)  # of so many pixels; Pillow's built-in scalable font: no font file to ship


@lru_cache(maxsize=4096)
def text_mask(text, pixels, max_width, bold):
    if (width := font(pixels).getlength(text)) > max_width:
        pixels = max(8, int(pixels * max_width / width))
    mask = Image.new("L", (2 * int(font(pixels).getlength(text) / 2 + bold + 2), 2 * pixels))
    ImageDraw.Draw(mask).text((mask.width // 2, pixels), text, 255, font(pixels), anchor="mm", stroke_width=bold)
    return mask


def draw_text(picture, text, center, pixels, color, max_width=SIZE - 16, bold=0):
    """Write `text` centred at (x, y), shrunk until it fits into `max_width` pixels."""
    mask = text_mask(text, pixels, max_width, bold)
    picture.paste(color, (center[0] - mask.width // 2, center[1] - mask.height // 2), mask)


# Shapes are written as (e)llipses, (r)ectangles and (p)olygons, each with a colour's letter and coordinates; suits on a
# grid of 200 x 200. The sides of heart and spade leave each lobe where its tangent passes through the tip: no corner.
SUIT_SHAPES = {
    "S": "e c 4 80 104 180 e c 96 80 196 180 p c 100 0 11 105 60 150 140 150 189 105 p c 100 120 140 200 60 200",
    "H": "e c 4 20 104 120 e c 96 20 196 120 p c 100 200 11 95 60 50 140 50 189 95",
    "D": "p c 100 0 175 100 100 200 25 100",
    "C": "e c 52 2 148 98 e c 2 77 98 173 e c 102 77 198 173 p c 100 100 140 200 60 200"}


def draw_shape(draw, shape, x, y, scale, colors):
    """Draw a shape with its grid's corner at (x, y), `scale` pixels a unit; colors: letter -> colour."""
    for form, color, numbers in re.findall(r"([erp]) (\w)((?: \d+)+)", shape):
        points = [(x, y)[i % 2] + int(n) * scale for i, n in enumerate(numbers.split())]
        {"e": draw.ellipse, "r": draw.rectangle, "p": draw.polygon}[form](points, colors[color])


@cache
def card_picture(card, width):
    """A card ("10H"; "" is a card face down) on the table, as a picture of width x 1.5 width pixels."""
    s = 4  # drawn four times too large and shrunk, for smooth edges
    w, h = width * s, width * s * 3 // 2
    picture = Image.new("RGBA", (w, h))
    draw = ImageDraw.Draw(picture)
    draw.rounded_rectangle([s, s, w - s, h - s], w // 10, "white", "#555555", s)
    if card:
        rank, suit = card[:-1], card[-1]
        color = "#c8102e" if suit in "HD" else INK
        # A large rank over a large suit: what a card needs to be read at a third of its size.
        for x, digit in [(0.27, "1"), (0.65, "0")] if rank == "10" else [(0.5, rank)]:
            draw.text((x * w, 0.45 * w), digit, color, font(int(0.78 * w)), anchor="mm", stroke_width=s)
        r = 0.26 * w  # the suit is 2 r wide
        draw_shape(draw, SUIT_SHAPES[suit], w / 2 - r, 1.12 * w - r, r / 100, {"c": color})
    else:
        back = Image.new("RGBA", (w, h), "#28518f")
        for x in range(-h, w, w // 6):
            ImageDraw.Draw(back).line([(x, 0), (x + h, h)], "#86abdf", 2 * s)
            ImageDraw.Draw(back).line([(x + h, 0), (x, h)], "#86abdf", 2 * s)
        mask = Image.new("L", (w, h))
        ImageDraw.Draw(mask).rounded_rectangle([w // 11, w // 11, w - w // 11, h - w // 11], w // 16, 255)
        picture.paste(back, mask=mask)
    card = picture.resize((width, width * 3 // 2), Image.LANCZOS)
    return Image.alpha_composite(Image.new("RGBA", card.size, TABLE), card).convert("RGB")


def draw_cards(picture, cards, x, y, pitch):
    """Lay `cards` in a row from (x, y), one every `pitch` pixels, or closer to make them fit; returns their boxes."""
    pitch = min(pitch, (SIZE - x) // len(cards))
    width = pitch - max(pitch // 12, 2)
    boxes = [(x + i * pitch, y, x + i * pitch + width, y + width * 3 // 2) for i in range(len(cards))]
    for card, box in zip(cards, boxes):
        picture.paste(card_picture(card, width), box)
    return boxes


# ---------------------------------------------------------------------------------------------------
# Formulas, exactly

OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
PARSED = dict(zip((ast.Add, ast.Sub, ast.Mult, ast.Div), OPERATORS.values()))
MAX_ENTRIES = 64  # longer than any game allows; keeps exact fractions of hostile input small


def evaluate_formula(entries):
    """Value of a formula given as a list of entries such as ["8", "/", "(", "3", ...], as a Fraction.

    Infix notation with + - * / and brackets, no unary minus. None if it is malformed, divides by zero or
    has more than MAX_ENTRIES entries. Python parses it, which runs nothing: no `eval`.
    """
    def value(node):
        if isinstance(node, ast.BinOp):
            return PARSED[type(node.op)](value(node.left), value(node.right))
        return Fraction(node.value)  # AttributeError for "- 1", "3 ( 4 )" and "( )", which Python would parse, too

    if len(entries) <= MAX_ENTRIES and {*entries} <= {*NUMBERS, *OPERATORS, "(", ")"}:
        with contextlib.suppress(SyntaxError, AttributeError, ZeroDivisionError):
            return value(ast.parse(" ".join(entries), mode="eval").body)
    return None


def expressions(numbers):
    """Yield every way to combine the sorted tuple `numbers` as (value, precedence, entries).

    Brackets only where they are needed; precedence 3 marks a lone number. Values are floats: fast, and good
    enough to *find* solutions, which `solutions` then checks exactly.
    """
    if len(numbers) == 1:
        yield float(numbers[0]), 3, (str(numbers[0]),)
    indices = range(len(numbers))
    for picked in itertools.chain.from_iterable(itertools.combinations(indices, k) for k in indices if k):
        left = parts(tuple(numbers[i] for i in picked))
        right = parts(tuple(numbers[i] for i in indices if i not in picked))
        for (a, pa, ea), (b, pb, eb), sign in itertools.product(left, right, OPERATORS):
            if sign == "/" and abs(b) < 1e-9:
                continue
            precedence = 1 if sign in "+-" else 2
            # a-(b-c) and a/(b/c) need their brackets; a+(b-c) and a*(b/c) read the same without.
            bracket = pb < precedence or (pb == precedence and sign in "-/")
            yield (OPERATORS[sign](a, b), precedence,
                   (*(("(", *ea, ")") if pa < precedence else ea), sign, *(("(", *eb, ")") if bracket else eb)))


@cache
def parts(numbers):
    return list(dict.fromkeys(expressions(numbers)))  # without repeats, in a fixed order


@cache
def solutions(numbers, target):
    """All formulas over the sorted tuple `numbers` worth `target`, as tuples of entries, shortest first."""
    found = {entries for value, _, entries in expressions(numbers) if abs(value - target) < 1e-6}
    return sorted((e for e in found if evaluate_formula(e) == target), key=lambda e: (len(e), e))


def solve(numbers, target, formula=()):
    """The shortest formula over all of `numbers` that equals `target` and begins with the entries `formula`.

    Returns a tuple of entries, or None where there is none.
    """
    formula = tuple(formula)
    return next((s for s in solutions(tuple(sorted(numbers)), target) if s[: len(formula)] == formula), None)


# ---------------------------------------------------------------------------------------------------
# Environments


def card_number(card):
    """What a card such as "10H" counts: A 1, J, Q and K 10."""
    return min(RANKS.index(card[:-1]) + 1, 10)


class Game(gym.Env):
    """A game played with short text actions. A subclass has a `name` and `actions`, and writes

    deal()          begin an episode, with randomness from `self.np_random` alone
    play(action)    play the text `action`; returns (reward, terminated, truncated)
    state()         the true state behind the picture, as a dict for `info`
    draw()          the picture as a new PIL image of SIZE x SIZE
    expert(info)    static: the best legal action (str) in the state that `info` holds

    obs: "image"; "marked", what matters boxed and labelled; or "text", a grey picture (the prompt tells the state).

    Raises what Gymnasium raises: `ResetNeeded` before the first reset and after the end, `InvalidAction` for
    an action outside the action space.
    """
    metadata = {"render_modes": ["rgb_array"], "render_fps": 2}
    name: str       # of the task, a key of GAMES
    actions: tuple  # of str
    illegal_penalty = 0.0  # what the trainer subtracts from the reward where an answer named no legal action
    evaluation = {}  # arguments of the environment for evaluation, where it has episodes that training never sees
    marks = ()       # what matters in the last picture: pairs of a label and a box (left, top, right, bottom)

    def __init__(self, render_mode=None, obs="image"):
        self.render_mode, self.obs = render_mode, obs
        self.observation_space = gym.spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8)
        self.action_space = gym.spaces.Discrete(len(self.actions))
        self.fixed = {*vars(self), "fixed", "spec", "marks"}  # the rest belongs to the episode
        self.over = True

    def legal_actions(self):
        return list(self.actions)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.over, self.episode_return = False, 0.0
        self.deal()
        return self.render(), self._info()

    def step(self, action):
        if self.over:
            raise gym.error.ResetNeeded("The episode is over (or has not begun): call reset() first")
        if not self.action_space.contains(action):
            raise gym.error.InvalidAction(f"{action!r} is not an action: an integer in [0, {self.action_space.n})")
        reward, terminated, truncated = self.play(self.legal_actions()[action])
        self.episode_return += reward
        self.over = terminated or truncated
        return self.render(), float(reward), terminated, truncated, self._info()

    def _info(self):
        return {"env": self.name, "obs": self.obs, "legal_actions": self.legal_actions(),
                "success": bool(self.over and self.episode_return > 0), **self.state()}

    def render(self):
        if self.obs == "text":
            return np.full((SIZE, SIZE, 3), 128, np.uint8)
        picture = self.draw()
        for label, box in self.marks if self.obs == "marked" else ():
            ImageDraw.Draw(picture).rounded_rectangle(box, 4, outline="#f0b000", width=4)
            draw_text(picture, label, ((box[0] + box[2]) // 2, box[1] - 11), 18, "#f0b000", bold=1)
        return np.array(picture)

    def snapshot(self):
        """All that the rest of the episode depends on, as a dict that JSON holds: what `deal` and `play` set."""
        kept = {key: value for key, value in vars(self).items() if key not in self.fixed and key[0] != "_"}
        return kept | {"chance": self.np_random.bit_generator.state}

    def restore(self, snapshot):
        """Go on from a `snapshot`; returns (picture, info)."""
        self.np_random.bit_generator.state = snapshot["chance"]
        vars(self).update({key: value for key, value in snapshot.items() if key != "chance"})
        return self.render(), self._info()

    def deal_cards(self, ranks):
        """A card of a random suit for each index into RANKS: "AS" for 0, "10H" for 9, ..."""
        return [RANKS[rank] + SUITS[self.np_random.integers(4)] for rank in ranks]


class NumberLineEnv(Game):
    """Walk from `current` to `target`, both in 0..5, by `+` and `-` (a step past an end stays there).

    Reward +1 on reaching the target, -1 for a step that does not come closer, else 0. Truncated after 10 steps.
    State: `target`, `current` (int).
    """
    name, actions = "numberline", ("+", "-")

    def deal(self):
        self.target, self.current = map(int, self.np_random.choice(6, 2, replace=False))
        self.steps = 0

    def play(self, action):
        before = abs(self.target - self.current)
        self.current = min(max(self.current + (1 if action == "+" else -1), 0), 5)
        self.steps += 1
        reached = self.current == self.target
        reward = 1 if reached else -1 if abs(self.target - self.current) >= before else 0
        return reward, reached, not reached and self.steps >= 10

    def state(self):
        return {"target": self.target, "current": self.current}

    @staticmethod
    def expert(info):
        return "+" if info["target"] > info["current"] else "-"

    marks = (("target", (206, 44, 274, 136)), ("current", (206, 164, 274, 256)))

    def draw(self):
        return self._draw(self.target, self.current).copy()

    @staticmethod
    @cache  # a sixth of the time of drawing
    def _draw(target, current):
        picture = Image.new("RGB", (SIZE, SIZE), PAPER)
        for y, color, name, number in ((90, "#1f6f54", "Target:", target), (210, "#28518f", "Current:", current)):
            ImageDraw.Draw(picture).rounded_rectangle([8, y - 54, SIZE - 8, y + 54], 16, color)
            draw_text(picture, name, (100, y), 40, PAPER)
            draw_text(picture, str(number), (240, y), 84, "white", bold=3)
        return picture


class PointsGame(Game):
    """Write a formula, one entry a step, that uses every card once and equals `target`; `=` ends it.

    Reward: for `=` 10 if the formula is right, else -1; -1 for a number that is not a card still unused (it
    is written down all the same, so the formula is spoilt); else 0. An entry that finds all `max_entries`
    places taken truncates the episode with -1. A counts 1; J, Q, K count 10.
    State: `cards` (such as "10H"), `numbers` (int), `formula` (list of str, the entries so far).
    """
    target: int
    max_entries: int

    def deal(self):
        self.cards = self.deal_cards(self.deal_ranks())  # a subclass chooses the ranks: indices into RANKS, one a card
        self.numbers = [card_number(card) for card in self.cards]
        self.formula = []

    def play(self, action):
        used = sorted(int(entry) for entry in self.formula if entry in NUMBERS)
        if action == "=":
            right = used == sorted(self.numbers) and evaluate_formula(self.formula) == self.target
            return (10 if right else -1), True, False
        if len(self.formula) == self.max_entries:
            return -1, False, True
        self.formula.append(action)
        spare = action not in NUMBERS or used.count(int(action)) < self.numbers.count(int(action))
        return (0 if spare else -1), False, False

    @classmethod
    def expert(cls, info):
        """The next entry of the shortest right formula; `=` where none can be reached any more."""
        formula = solve(info["numbers"], cls.target, info["formula"])
        return "=" if formula is None else (*formula, "=")[len(info["formula"])]

    def state(self):
        return {"cards": list(self.cards), "numbers": list(self.numbers), "formula": list(self.formula)}

    def draw(self):
        picture = Image.new("RGB", (SIZE, SIZE), TABLE)
        pitch = min(120, (SIZE - 4) // len(self.cards))
        boxes = draw_cards(picture, self.cards, (SIZE - pitch * len(self.cards)) // 2 + pitch // 24, 40, pitch)
        paper = (10, 236, SIZE - 10, 288)
        self.marks = [*((f"card {i}", box) for i, box in enumerate(boxes, 1)), ("formula", paper)]
        ImageDraw.Draw(picture).rounded_rectangle(paper, 10, PAPER)
        draw_text(picture, "".join(self.formula) or f"make {self.target}", (SIZE // 2, 262), 36,
                  INK if self.formula else "#a09a8c", SIZE - 32)
        return picture


class EZPointsEnv(PointsGame):
    __doc__ = "Two cards, 12 points, entries 1..10 + * =. Every hand can be solved.\n\n" + PointsGame.__doc__
    name, actions = "ezpoints", (*NUMBERS, "+", "*", "=")
    target, max_entries = 12, 5

    def deal_ranks(self):
        """A uniform number x in 2..10, then 12 - x, or 12 / x half of the time when x divides 12."""
        x = int(self.np_random.integers(2, 11))
        y = 12 // x if 12 % x == 0 and self.np_random.random() < 0.5 else 12 - x
        return [n - 1 if n < 10 else int(self.np_random.integers(9, 13)) for n in (x, y)]  # 10, J, Q or K


class Points24Env(PointsGame):
    __doc__ = "Four cards, 24 points; some hands have no solution.\n\n" + PointsGame.__doc__
    name, actions = "points24", (*NUMBERS, "+", "-", "*", "/", "(", ")", "=")
    target, max_entries = 24, 20

    def deal_ranks(self):
        return self.np_random.integers(0, 13, 4)


CARD_PROBABILITY = {number: (4 if number == 10 else 1) / 13 for number in range(1, 11)}  # an infinite deck


def hand_total(hard, ace):
    """Best total of a hand worth `hard` with aces as 1: one ace counts 11 where that does not bust."""
    return hard + 10 if ace and hard <= 11 else hard


@cache
def dealer_totals(hard, ace):
    """Probability of each final total of a dealer who draws to 17, as a tuple of (total, probability); 22 is bust."""
    total = hand_total(hard, ace)
    if total >= 17:
        return ((min(total, 22), 1.0),)
    totals = dict.fromkeys(range(17, 23), 0.0)
    for number, p in CARD_PROBABILITY.items():
        for final, q in dealer_totals(hard + number, ace or number == 1):
            totals[final] += p * q
    return tuple(totals.items())


@cache
def blackjack_values(hard, ace, dealer, loss=-1.0):
    """Values of (standing, hitting) under best play from there on: a win counts 1, a draw 0, a loss `loss`.

    hard, ace: as for `hand_total`; dealer: the number on the face-up card, 1 to 10. With loss=-1 the value is
    the expected return, with loss=0 the probability of a win.
    """
    total = hand_total(hard, ace)
    stand = sum(p * (1 if final == 22 or total > final else loss if total < final else 0)
                for final, p in dealer_totals(dealer, dealer == 1))
    hit = sum(p * (loss if hard + n > 21 else max(blackjack_values(hard + n, ace or n == 1, dealer, loss)))
              for n, p in CARD_PROBABILITY.items())
    return stand, hit


class BlackjackEnv(Game):
    """Blackjack by Gymnasium's rules: infinite deck, the dealer draws to 17 (and stands on a soft 17), no
    bonus for a natural.

    Reward +1 / 0 / -1 for a win, a draw, a loss. State: `player` (cards such as "10H"), `player_total` (an
    ace counts 11 where that does not bust), `dealer_card`.
    """
    name, actions = "blackjack", ("stand", "hit")

    def deal(self):
        self.player, self.dealer = self._draw_cards(2), self._draw_cards(2)

    def _draw_cards(self, n):
        return self.deal_cards(self.np_random.integers(0, 13, n))

    @staticmethod
    def _hard(cards):
        """(Sum with aces as 1, whether there is an ace): the arguments of `hand_total`."""
        numbers = [card_number(card) for card in cards]
        return sum(numbers), 1 in numbers

    def play(self, action):
        if action == "hit":
            self.player += self._draw_cards(1)
            bust = self._hard(self.player)[0] > 21
            return (-1 if bust else 0), bust, False
        while hand_total(*self._hard(self.dealer)) < 17:
            self.dealer += self._draw_cards(1)
        player, dealer = (hand_total(*self._hard(cards)) for cards in (self.player, self.dealer))
        return (1 if dealer > 21 or player > dealer else -1 if player < dealer else 0), True, False

    def state(self):
        return {"player": list(self.player), "player_total": hand_total(*self._hard(self.player)),
                "dealer_card": self.dealer[0]}

    @staticmethod
    def expert(info):
        """The action of the larger expected return, by dynamic programming."""
        stand, hit = blackjack_values(*BlackjackEnv._hard(info["player"]), card_number(info["dealer_card"]))
        return "stand" if stand >= hit else "hit"

    @staticmethod
    @cache
    def _table():
        picture = Image.new("RGB", (SIZE, SIZE), TABLE)
        for y, name in ((38, "Dealer"), (164, "Player")):
            draw_text(picture, name, (64, y), 32, PAPER)
        ImageDraw.Draw(picture).line([(0, 146), (SIZE, 146)], "#3f8d6f", 2)
        return picture

    def draw(self):
        picture = self._table().copy()
        # While the player plays, the dealer's second card lies face down.
        dealer = draw_cards(picture, self.dealer if self.over else [self.dealer[0], ""], 2, 64, 60)
        player = draw_cards(picture, self.player, 2, 186, 60)
        self.marks = [("dealer", dealer[0]), *((f"you {i}", box) for i, box in enumerate(player, 1))]
        return picture


# ---------------------------------------------------------------------------------------------------
# ALFWorld

ALFRED_TASKS = {"pick": "pick_and_place_simple", "light": "look_at_obj_in_light",
                "clean": "pick_clean_then_place_in_recep", "heat": "pick_heat_then_place_in_recep",
                "cool": "pick_cool_then_place_in_recep", "two": "pick_two_obj_and_place"}
CHANGES = {"clean": ("isclean", "sinkbasin", "Cleanable"), "heat": ("ishot", "microwave", "Heatable"),
           "cool": ("iscool", "fridge", "Coolable")}  # the fact wanted, where it is made, what the tables call it
SPLITS = {"train": "train", "seen": "valid_seen", "unseen": "valid_unseen"}
# The built-in rooms: tasks, receptacles that each has, receptacles of which it has some, objects.
ROOMS = {
    "kitchen": ("pick clean heat cool two", "Fridge Microwave SinkBasin",
                "CounterTop DiningTable Cabinet Cabinet Drawer Drawer Shelf SideTable GarbageCan StoveBurner",
                "Apple Egg Tomato Bread Mug Plate Pan Spoon"),
    "living room": ("pick light two", "Sofa CoffeeTable", "ArmChair SideTable Drawer Drawer Shelf Cabinet DiningTable Safe",
                    "Book KeyChain RemoteControl Pillow Newspaper Vase"),
    "bedroom": ("pick light two", "Bed Desk", "Dresser Drawer Drawer Shelf SideTable Safe ArmChair CounterTop",
                "Book AlarmClock CellPhone CD Pencil Pillow"),
    "bathroom": ("pick clean two", "SinkBasin Toilet", "CounterTop Cabinet Cabinet Drawer BathtubBasin GarbageCan Shelf Cart",
                 "SoapBar Cloth ToiletPaper Candle SprayBottle HandTowel"),
}

# Icons, on a grid of 100 x 100, in the thing's own (c)olour, (d)arker, (l)ighter, blac(k) or (p)aper: the shape's name,
# who looks like it and in which colour (all others are boxes), the shape.
ICONS = re.findall(r"([a-z][a-z ]*\b)(?: \(([^)]*)\))?: ([^;]+)", """
    round (apple d22b2b tomato f26b3a potato a9814f lettuce 6aa83a): e c 14 20 86 92 p k 47 24 60 4 66 6 54 26 e l 28 32 46 50;
    egg (egg f0d9a8): e c 24 10 76 92 e l 34 24 50 48; loaf (bread c98a45): r c 8 44 92 86 e c 8 20 92 68 r d 34 40 38 84 r d 62 40 66 84;
    cup (mug 3c6fc4 cup 3aa89a): e d 48 32 96 78 e p 60 44 84 66 r c 14 20 70 92 r l 14 20 70 32; box: r c 8 24 92 92 r d 8 24 92 42;
    dish (plate 9fb3c8 bowl b06fc0): e c 2 24 98 84 e l 22 36 78 70; can (garbagecan 6f7f6f): p c 20 24 80 24 70 98 30 98 r d 12 12 88 26;
    pan (pan 4a4f57 pot 7a6f66): r k 60 50 100 64 e c 4 22 72 92 e d 16 34 60 80; soft (pillow 7f6fd0): e c 2 20 98 88 e l 22 34 78 74;
    stick (spoon 8d99a6 knife 56606b): p c 8 84 66 28 76 38 18 94 e c 56 2 98 44; ring (cd 3fb8e0): e c 8 8 92 92 e p 36 36 64 64;
    pencil (pencil e8b21e): p c 16 70 70 12 90 30 34 88 p k 16 70 34 88 6 96 p d 70 12 90 30 96 8;
    book (book a03a8c): r c 14 8 86 94 r l 30 22 74 46 r d 14 8 24 94;
    paper (newspaper cfc8b4): r c 10 12 90 92 r k 20 24 80 36 r d 20 46 80 52 r d 20 62 80 68 r d 20 78 60 84;
    device (remotecontrol 33373d cellphone 2f8f4f): r c 28 4 72 98 r l 36 14 64 56 e k 42 70 58 86;
    bottle (spraybottle 2fa0d8 vase d0568c): r c 26 36 74 98 r d 42 6 58 38 r k 38 2 62 14 r l 34 56 66 80;
    cloth (cloth 3fa08f handtowel e88aa0): p c 6 20 94 12 90 88 10 80 r l 20 34 80 42 r l 20 56 80 64;
    roll (toiletpaper c8c8d4): r c 14 30 86 90 e c 14 14 86 50 e d 38 24 62 40;
    key (keychain d8a020): e c 4 26 52 74 e p 18 40 38 60 r c 48 44 98 56 r c 76 50 84 76 r c 90 50 98 70;
    bar (soapbar f09ab8 dishsponge e8c83a): r c 8 30 92 80 r l 20 42 80 66;
    clock (alarmclock d8402f): e c 8 12 92 96 e l 20 24 80 84 r k 47 30 53 56 r k 47 52 70 58 e c 8 2 34 28 e c 66 2 92 28;
    candle (candle e8a83a): r c 34 38 66 96 e k 46 26 54 40 p l 50 2 62 24 50 36 38 24;
    oven (microwave 6f7883): r c 2 16 98 84 r d 8 22 72 78 r l 14 28 66 72 r k 78 28 92 40 r k 78 48 92 54 r k 78 60 92 66;
    oven open: r c 2 16 98 84 r k 8 22 72 78 p d 8 78 72 78 66 100 2 100 r k 78 28 92 40 r k 78 48 92 54 r k 78 60 92 66;
    lamp (desklamp e8902a floorlamp d0a848): p c 28 6 72 6 94 52 6 52 r k 45 52 55 88 r k 24 86 76 96;
    lamp lit: e l 0 0 100 96 p c 28 6 72 6 94 52 6 52 r k 45 52 55 88 r k 24 86 76 96;
    table (diningtable 8a5a33 sidetable b58a5a coffeetable 6f4a2f desk 9c6b3f): r d 12 42 24 98 r d 76 42 88 98 r c 2 28 98 46;
    counter (countertop 8b9aa5 dresser a4713f): r d 8 40 92 98 r k 49 46 51 94 r c 2 24 98 42;
    seat (sofa 4f78b8 armchair b85f4f): r c 10 14 90 66 r d 20 50 80 82 r c 2 38 22 88 r c 78 38 98 88;
    bed (bed 6f8fc8): r d 2 20 10 96 r d 90 56 98 96 r c 6 56 94 82 e l 12 42 44 64;
    basin (sinkbasin 6fb0d0 bathtubbasin 4fa0a8 toilet a8b4bc): r k 44 8 54 44 r k 44 8 72 18 p c 2 42 98 42 80 94 20 94 e l 14 36 86 54;
    shelf (shelf a87f4f cart 8f9fa8): r c 2 24 98 34 r c 2 56 98 66 r c 2 88 98 98 r d 8 10 14 98 r d 86 10 92 98;
    burner (stoveburner d0502a): r k 6 20 94 96 e c 18 26 82 90 e k 32 40 68 76 e c 44 52 56 64;
    door (fridge 9fb8cc cabinet c09058 safe 5a7a6a): r c 16 2 84 98 r d 22 8 78 92 r c 26 12 74 88 r k 64 42 70 62;
    door open: r c 16 2 84 98 r k 24 10 76 90 p d 16 2 0 14 0 100 16 98;
    drawer (drawer b87f48): r c 4 14 96 90 r d 12 24 88 80 r k 38 46 62 56;
    drawer open: r c 4 4 96 60 r k 12 12 88 56 p d 4 56 96 56 100 98 0 98 r k 38 72 62 82""")
SHAPES = {shape: drawing for shape, _, drawing in ICONS}
LOOKS = {name: (shape, f"#{color}") for shape, names, _ in ICONS for name, color in re.findall(r"(\w+) (\w+)", names)}
VERBS = {"pick": ("PUT", "#50606e"), "light": ("LOOK", "#9a7a10"), "clean": ("CLEAN", "#1f8a8a"),
         "heat": ("HEAT", "#b8331f"), "cool": ("COOL", "#2a5fc0"), "two": ("TWO", "#7a3f9a")}


@cache
def icon(name, pixels, state=""):
    """An object or receptacle ("mug", "fridge"; state: "", "open" or "lit") as a picture, transparent around it."""
    shape, color = LOOKS.get(name, ("box", "#%06x" % ((zlib.crc32(name.encode()) & 0x7F7F7F) + 0x303030)))
    paint = np.array(ImageColor.getrgb(color))
    colors = {"c": paint, "d": paint * 0.6, "l": paint * 0.4 + 153, "k": (24, 28, 34), "p": (244, 241, 234)}
    picture = Image.new("RGBA", (pixels * 4, pixels * 4))
    draw_shape(ImageDraw.Draw(picture), SHAPES.get(f"{shape} {state}", SHAPES[shape]), 0, 0, pixels * 4 / 100,
               {letter: tuple(map(int, color)) for letter, color in colors.items()})
    return picture.resize((pixels, pixels), Image.LANCZOS)


@cache
def alfworld_engine():
    """ALFWorld's text engine and tables, as a namespace; loaded when the first ALFWorld game is made.

    One library serves all games of a process, whoever acts loads its state: 0.2 ms, where a library a game is 33 MB.
    """
    # Importing alfworld prints, sets ALFWORLD_DATA and makes that folder; importing the translator reads sys.argv.
    with (contextlib.redirect_stdout(io.StringIO()), mock.patch.object(sys, "argv", ["", "domain", "problem"]),
          mock.patch.dict(os.environ, ALFWORLD_DATA=tempfile.gettempdir())):
        import fast_downward
        from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
        from alfworld.gen import constants, goal_library
        from alfworld.info import ALFRED_PDDL_PATH, ALFRED_TWL2_PATH
        from fast_downward.translate import translate as translator
        from textworld.envs.pddl import PddlEnv, logic, textgen
        from textworld.logic import Rule
    pddl2sas, ground = fast_downward.pddl2sas, translator.pddl_to_sas

    @lru_cache(maxsize=512)  # 0.15 MB each; in the data set's rooms up to 2 MB
    def translate(domain, problem):
        # Grounding the actions takes 25 of 30 ms: a built-in game keeps the result, for its own problem and no other.
        kept = engine.grounded.get(problem)
        grounding = (lambda task: SimpleNamespace(output=lambda file: file.write(kept))) if kept else ground
        with mock.patch.object(translator, "pddl_to_sas", grounding), mock.patch.object(sys, "argv", []):
            return pddl2sas(domain, problem)  # sets sys.argv

    # A state translates its problem twice, for playing and for a planner that is not needed here: 50 ms at every reset.
    fast_downward.pddl2sas = lambda domain, problem, **_: translate(domain, problem)
    # The grammar copies its context at every symbol, deeply, though nothing changes what is in it: a third of a step.
    textgen.copy_context = lambda context: context | {key: dict(context[key]) for key in ("variables", "mapping")}
    # The grammar's few conditions and beginnings are the same at every step: 3 ms to parse.
    Rule.parse_conjunctive_query = lru_cache(maxsize=256)(Rule.parse_conjunctive_query)
    textgen._parse_and_convert = lru_cache(maxsize=256)(textgen._parse_and_convert)
    logic.GameLogic = lru_cache(maxsize=8)(logic.GameLogic)
    engine = SimpleNamespace(
        constants=constants, goals=goal_library.gdict, Atom=logic.Atom, game=AlfredDemangler(PddlEnv()), grounded={},
        domain=Path(ALFRED_PDDL_PATH).read_text(), grammar=Path(ALFRED_TWL2_PATH).read_text())
    return engine


def built_in_game(split, kind, number):
    """A room made from seeds, as (game, trajectory): the contents of ALFWorld's game.tw-pddl and traj_data.json.

    Six receptacles, four or five objects. Rooms whose receptacles have a checksum divisible by four are for `unseen`.
    """
    engine = alfworld_engine()
    rng = np.random.default_rng([SPLITS[split] == "train", list(ALFRED_TASKS).index(kind), number])
    tables, light, (_, appliance, able) = engine.constants, kind == "light", CHANGES.get(kind, ("", "", ""))
    holds, can = tables.VAL_RECEPTACLE_OBJECTS, tables.VAL_ACTION_OBJECTS

    def pick(choices):
        return choices[rng.integers(len(choices))]

    homes = []
    while not homes:  # until the room is one of the split's, and the target can be somewhere and go elsewhere
        _, fixed, others, objects = map(str.split, pick([room for room in ROOMS.values() if kind in room[0].split()]))
        receptacles = sorted(fixed + list(rng.permutation(others)[:6 - len(fixed)]))
        target, place = pick(objects), pick([r for r in receptacles if r.lower() != appliance])
        tops = [r for r in receptacles if r in ("Desk", "SideTable", "Dresser", "CoffeeTable", "DiningTable", "Shelf")]
        unseen = zlib.crc32(" ".join(receptacles).encode()) % 4 == 0
        fits = target in holds[place] and target in can.get(able, objects) and (tops or not light)
        if unseen == (split == "unseen") and fits:
            homes = [r for r in receptacles if target in holds[r] and (r != place or light)]
    things = [(target, pick(homes)) for _ in range(1 + (kind == "two"))]
    things += [("DeskLamp", pick(tops)) for _ in range(light)]
    for name in rng.permutation([o for o in objects if o != target])[:rng.integers(4, 6) - len(things)]:
        things += [(name, pick(spots)) for spots in [[r for r in receptacles if name in holds[r]]] if spots]

    # "Sink_bar_1_bar_SinkBasin" is ALFWorld's way to name what a sink holds.
    ids = [f"{r.removesuffix('Basin')}_bar_{i}" + f"_bar_{r}" * r.endswith("Basin") for i, r in enumerate(receptacles)]
    rtypes, otypes = sorted(set(receptacles)), sorted({o for o, _ in things})
    facts = ["(= (total-cost) 0)", "(atLocation agent1 loc_bar_0)"]
    facts += [f"(canContain {r}Type {o}Type)" for r in rtypes for o in otypes if o in holds[r]]
    for i, (r, at) in enumerate(zip(receptacles, ids), 1):
        facts += [f"(receptacleAtLocation {at} loc_bar_{i}) (receptacleType {at} {r}Type)"]
        facts += [f"(openable {at})"] * (r in tables.OPENABLE_CLASS_LIST)
    for i, (o, r) in enumerate(things):
        o_id, at = f"{o}_bar_{i}", pick([i for i, other in enumerate(receptacles) if other == r])
        facts += [f"(objectType {o_id} {o}Type) (inReceptacle {o_id} {ids[at]}) "
                  f"(objectAtLocation {o_id} loc_bar_{at + 1})"]
        facts += [f"({what} {o_id})" for what in ("Cleanable", "Heatable", "Coolable", "Toggleable") if o in can[what]]
        facts += [f"(pickupable {o_id})"] * (o != "DeskLamp")
    objects = ["agent1 - agent", *(f"{r}Type - rtype" for r in rtypes), *(f"{o}Type - otype" for o in otypes),
               *(f"{at} - receptacle" for at in ids), *(f"{o}_bar_{i} - object" for i, (o, _) in enumerate(things)),
               *(f"loc_bar_{i} - location" for i in range(7))]
    goal, names = engine.goals[ALFRED_TASKS[kind]], dict(obj=target, recep=place, toggle="DeskLamp")
    task = pick(goal["templates"]).format(**{key: name.lower() for key, name in names.items()})
    problem = "\n".join(["(define (problem room) (:domain alfred)", "(:objects", *objects, ")", "(:init", *facts, ")"])
    return ({"pddl_domain": engine.domain, "grammar": engine.grammar.replace("UNKNOWN GOAL", task), "solvable": True,
             "pddl_problem": problem + goal["pddl"].format(**names).replace("#", "-")},
            {"task_type": ALFRED_TASKS[kind], "pddl_params": {
                "object_target": target, "parent_target": "" if light else place,
                "toggle_target": "DeskLamp" * light, "mrecep_target": "", "object_sliced": False}})


class ALFWorldEnv(Game):
    """Household tasks in ALFWorld's text engine: find things, clean, heat or cool them, put them somewhere.

    Reward at every step: 50 on success, plus the share of the goal's conditions that hold; the trainer subtracts
    `illegal_penalty` for an answer that named no legal action. Terminated on success, truncated after 50 steps.
    split: "train", or "unseen": other rooms; with the environment variable ALFWORLD_DATA the games are the data set's
    (also "seen"), else they are made from seeds and kept in the user's cache. The types of tasks come equally often.
    State: `task` (in words), `task_type` (a key of ALFRED_TASKS), `observation` (the engine's words), `place` (what is
    in front, or ""), `visible` (objects there), `carried` (object or ""), `won`, `goal_conditions` (the share), and from
    the expert `subgoal` (in words) and `expert` (a command); it knows no more than what was seen.
    """
    name, actions = "alfworld", ("",) * 256  # at most so many actions; they change
    illegal_penalty, evaluation, max_steps = 1.0, {"split": "unseen"}, 50
    games = {"train": 500, "unseen": 50}  # built-in games a type of task

    def __init__(self, render_mode=None, obs="image", split="train"):
        data = os.environ.get("ALFWORLD_DATA")
        if split not in (splits := SPLITS if data else self.games):
            raise ValueError(f"split {split!r} is not one of {', '.join(splits)}"
                             + " (without ALFWORLD_DATA)" * (not data))
        self.split, self.data = split, data and Path(data).expanduser() / "json_2.1.1" / SPLITS[split]
        self.names = data_set(self.data) if data else [
            [f"{kind}/{i}" for i in range(self.games[split])] for kind in ALFRED_TASKS]  # a list for each type
        alfworld_engine()
        super().__init__(render_mode, obs)

    def deal(self):
        while True:
            names = self.names[self.np_random.integers(len(self.names))]
            self.game = names[self.np_random.integers(len(names))]
            loaded = self._load(self.game)
            if loaded[0].get("solvable", True):  # a few games of the data set are not, and say so
                return self._begin(*loaded)

    def _load(self, name):
        return data_game(self.data / name) if self.data else kept_game(self.split, name)

    def play(self, action):
        self._act(action)
        self.played.append(action)
        return 50 * self._won + self._rate(), self._won, not self._won and len(self.played) >= self.max_steps

    def restore(self, snapshot):
        self._begin(*self._load(snapshot["game"]))
        for action in snapshot["played"]:
            self._act(action)
        return super().restore(snapshot)

    # -- the engine

    def _begin(self, game, trajectory):
        """Load a game: the contents of game.tw-pddl and of traj_data.json."""
        engine, goal = alfworld_engine(), trajectory["pddl_params"]
        # Every game has its task in its grammar. Without it they share one, which takes 80 ms to parse.
        self._task = re.search(r'Your task is to: (.*?)\.?"', game["grammar"])[1]
        grammar = game["grammar"].replace(f"Your task is to: {self._task}", "Your task is to: UNKNOWN GOAL")
        self._kind = next(kind for kind, name in ALFRED_TASKS.items() if name == trajectory["task_type"])
        self._target = goal["object_target"].lower()
        self._goal = (goal["toggle_target"] if self._kind == "light" else goal["parent_target"]).lower()
        engine.grounded = {game["pddl_problem"]: game.get("sas")}
        engine.game.load(game | {"grammar": grammar})
        self._state, self._infos = engine.game._pddl_state, engine.game._entity_infos
        self._receptacles = sorted(info.name for info in self._infos.values() if info.type == "receptacle")
        self._operators, self._seen, self._place, self.played = [], set(), "", []
        self._look("#look.feedback#", {})

    def _act(self, command):
        state, action = self._state, self._commands[command]
        state.downward_lib.load_sas(state.sas.encode())  # another game may have been played meanwhile
        for number, effects in self._operators:
            state.downward_lib.apply_operator(number, (alfworld_engine().Atom * effects)())
        self._operators.append((action.id, state._operators[action.id].nb_effect_atoms))
        state.apply(action)
        self._look(action.feedback_rule, action.mapping)

    def _look(self, rule, mapping):
        """Read the engine's state after an action (mapping: placeholder -> thing): its words by the grammar's `rule`,
        facts by name, and the commands that it takes."""
        variables = {placeholder.name: self._infos[v.name] for placeholder, v in mapping.items()}
        self._feedback = self._state._logic.grammar.derive(rule, {
            "state": self._state, "facts": list(self._state.facts), "variables": variables, "mapping": mapping,
            "entity_infos": self._infos})
        for thing in variables.values():  # whatever it does, the agent faces the receptacle that it names
            self._place = thing.name if thing.type == "receptacle" else self._place
        self._facts = {(fact.name, *(self._infos[v.name].name.strip() for v in fact.arguments if v.name in self._infos))
                       for fact in self._state.facts}
        self._where = dict(sorted(rest for fact, *rest in self._facts if fact == "inreceptacle"))  # object -> place
        self._carried = next((rest[1] for fact, *rest in self._facts if fact == "holds"), "")
        if self._place and not self._shut(self._place):
            self._seen.add(self._place)
        self._won = bool(self._state.check_goal())
        self._commands = {}
        for action in self._state.all_applicable_actions():
            template = "go to {r}" if action.name == "gotolocation" else action.command_template
            command = template.format(**{p.name: self._infos[v.name].name for p, v in action.mapping.items()})
            # These change nothing, and what they tell is in the picture. But where several receptacles are at one place
            # of the data set's rooms, `examine` turns to another of them.
            noise = action.name in ("look", "inventory", "help", "examineobject")
            if not noise and command not in (f"go to {self._place}", f"examine {self._place}"):
                self._commands[command] = action
        self.action_space.n = len(self.legal_actions())

    def _shut(self, receptacle):
        return ("openable", receptacle) in self._facts and ("opened", receptacle) not in self._facts

    def _held_in(self, receptacle):
        return [o for o, r in self._where.items() if r == receptacle]

    def _rate(self):
        """ALFRED's goal-condition success rate, in [0, 1]: the share of the goal's conditions that hold now."""
        targets = [o for o in [*self._where, self._carried] if kind_of(o) == self._target]
        placed = [o for o in targets if kind_of(self._where.get(o, "")) == self._goal]
        if self._kind == "light":
            lit = any(kind_of(o) == self._goal and ("istoggled", o) in self._facts for o in self._held_in(self._place))
            return ((self._carried in targets) + lit) / 2
        if self._kind in ("pick", "two"):
            wanted = 1 + (self._kind == "two")  # in the same receptacle
            return min(max(Counter(self._where[o] for o in placed).values(), default=0), wanted) / wanted
        changed = [o for o in targets if (CHANGES[self._kind][0], o) in self._facts]
        return (bool(placed) + bool(changed) + bool({*placed} & {*changed})) / 3

    def legal_actions(self):
        return sorted(self._commands)[:len(self.actions)]

    def state(self):
        subgoal, command = self._plan()
        return {"task": self._task, "task_type": self._kind, "observation": self._feedback, "place": self._place,
                "visible": self._visible(), "carried": self._carried, "won": self._won, "success": self._won,
                "goal_conditions": self._rate(), "subgoal": subgoal, "expert": command or self.legal_actions()[0]}

    def _visible(self):
        return [] if self._shut(self._place) else self._held_in(self._place)

    @staticmethod
    def expert(info):
        """The next command of a plan that rests on what was seen so far."""
        return info["expert"]

    def _plan(self):
        """(sub-goal in words, command or "") of an expert who looks for what was not seen and then does the task."""
        kind, target, goal, seen, carried = self._kind, self._target, self._goal, self._seen, self._carried
        change, appliance, _ = CHANGES.get(kind, ("", "", ""))
        goals = [r for r in self._receptacles if kind_of(r) == goal]
        known = [o for o, r in self._where.items() if r in seen]
        targets = [o for o in known if kind_of(o) == target]
        undone = {o for o in [*targets, carried] if change and (change, o) not in self._facts}

        def fit(receptacle, what):
            return ("cancontain", kind_of(receptacle) + "type", kind_of(what) + "type") in self._facts

        def at(receptacle, command):
            """Go there, open it, then play `command`: the first of these that the engine takes, or ""."""
            opens = "" if command.startswith(("heat", "cool")) else f"open {receptacle}"
            steps = (f"examine {receptacle}", f"go to {receptacle}", opens, command)
            return next((step for step in steps if step in self._commands), "")

        def find(what):
            unseen = sorted((r for r in self._receptacles if r not in seen), key=lambda r: (not fit(r, what), r))
            return f"find {'an' if what[0] in 'aeiou' else 'a'} {what}", at(unseen[0], "") if unseen else ""

        # Two objects go into the same receptacle: the one that holds most of them.
        spot = max(goals, key=lambda r: sum(self._where[o] == r for o in targets), default="")
        if kind_of(carried) != target and carried:
            places = sorted((r for r in self._receptacles if fit(r, carried)),
                            key=lambda r: (r != self._place, r not in seen, r))
            return f"put down the {kind_of(carried)}", at(places[0], f"move {carried} to {places[0]}") if places else ""
        if carried and kind == "light":
            lamp = next((o for o in known if kind_of(o) == goal), "")
            look = f"look at the {target} under the {goal}"
            return (look, at(self._where[lamp], f"use {lamp}")) if lamp else find(goal)
        if carried and carried in undone:
            tool = next((r for r in self._receptacles if kind_of(r) == appliance), "")
            return f"{kind} the {target}", at(tool, f"{kind} {carried} with {tool}")
        if carried:
            return f"put the {target} in the {goal}", at(spot, f"move {carried} to {spot}")
        wanted = [o for o in targets if o in undone or self._where[o] not in ([spot] if kind == "two" else goals)]
        if not wanted:
            return find(target)
        thing = min(wanted, key=lambda o: (o in undone, self._where[o] != self._place, o))
        return f"take the {target}", at(self._where[thing], f"take {thing} from {self._where[thing]}")

    # -- the picture: five by five cells of 60 pixels, a patch of the embedded model each

    def draw(self):
        """The task in the first row; in the next two the receptacle in front and what lies there; in the last two the
        room's map and what is carried. A cell's colour: hot red, cold blue, clean yellow; on the map dark where nobody
        has looked yet, yellow where the task's object was seen, green where its lamp was."""
        picture = Image.new("RGB", (SIZE, SIZE), PAPER)
        draw = ImageDraw.Draw(picture)

        def cell(x, y, color, width=60, height=60, outline=None):
            draw.rounded_rectangle([x + 2, y + 2, x + width - 3, y + height - 3], 6, color, outline, 3)

        def put(name, x, y, pixels):
            state = "open" if ("opened", name) in self._facts else "lit" if ("istoggled", name) in self._facts else ""
            art = icon(kind_of(name), pixels, state)
            picture.paste(art, (x, y), art)

        def thing(name, x, y):
            colors = {"ishot": "#f4a08c", "iscool": "#9cc8f4", "isclean": "#f4e28c"}
            cell(x, y, next((color for fact, color in colors.items() if (fact, name) in self._facts), "white"))
            put(name, x + 10, y + 4, 40)
            draw_text(picture, name, (x + 30, y + 50), 11, INK, 54)
            # A large number for "mug 2", none for "mug 1".
            draw_text(picture, name.split(" ")[-1].strip("1"), (x + 48, y + 15), 22, INK, bold=1)

        verb, color = VERBS[self._kind]
        cell(0, 0, color, SIZE)
        draw_text(picture, verb, (30, 24), 22, "white", 54, bold=1)
        for x, name in ((60, self._target), (180, self._goal)):
            cell(x, 4, "white", height=42)
            put(name, x + 13, 8, 34)
        draw.polygon([(128, 18), (152, 18), (152, 10), (172, 25), (152, 40), (152, 32), (128, 32)], "white")
        draw_text(picture, self._task, (150, 50), 13, "white")

        place, things = self._place, self._visible()
        shut = self._shut(place)
        words = "closed" if shut else "" if things else "nothing here" if place else "go somewhere"
        cell(0, 60, "#d9dfe4" if shut else "white", 120, 120)
        cell(120, 60, "#3a4450" if shut else "#e3ddd0", 180, 120)
        draw_text(picture, words, (210, 120), 20, "white" if shut else INK)
        if place:
            put(place, 18, 66, 84)
            state = " (closed)" if shut else " (open)" if ("opened", place) in self._facts else ""
            draw_text(picture, place + state, (60, 165), 15, INK, 112)
        for i, name in enumerate(things[:6]):
            thing(name, 120 + i % 3 * 60, 60 + i // 3 * 60)
        if len(things) > 6:
            draw_text(picture, f"+{len(things) - 6}", (210, 120), 16, "#e0261c", bold=1)

        # Six receptacles fill cells of 60 pixels; the data set's rooms have more, in smaller cells.
        columns = next(n for n in (4, 6, 8, 12, 16, 24) if n * n // 2 >= len(self._receptacles))
        size = 240 // columns
        for i, name in enumerate(self._receptacles):
            x, y, seen = i % columns * size, 180 + i // columns * size, name in self._seen
            held = self._held_in(name) if seen else []  # as last seen: nobody else moves things
            kinds = {*map(kind_of, held)}
            color = ("#f7cf4a" if self._target in kinds and kind_of(name) != self._goal else
                     "#9ad29c" if self._goal in kinds else "#fffdf2" if seen else "#87909a")
            cell(x, y, color, size, size, "#e0261c" if name == place else None)
            put(name, x + size // 10, y + size // 10, size * 8 // 15)
            if columns == 4:
                draw_text(picture, "" if seen else "?", (x + 46, y + 22), 22, "white", bold=1)
                draw_text(picture, name, (x + 30, y + 48), 10, INK, 52)
            for j, o in enumerate(held[:3]):
                put(o, x + size * 13 // 20, y + (5 + 13 * j) * size // 60, size // 4)
        cell(240, 180, "#2b5f4b", 60, 120)
        draw_text(picture, "carrying", (270, 212), 12, "white")
        draw_text(picture, "" if self._carried else "nothing", (270, 268), 12, "#a8c8b8")
        if self._carried:
            thing(self._carried, 240, 240)
        return picture


class ALFWorldThorEnv(ALFWorldEnv):
    """ALFWorld in the simulator AI2-THOR: its frames instead of drawings, games of the data set; else as `ALFWorldEnv`.

    engine: an `AlfredThorEnv` of one game, made from ALFWORLD_DATA where it is left out. Of the state, `visible` and
    `carried` are what the engine's words say, and `subgoal` is the expert's next command.
    """
    def __init__(self, render_mode=None, obs="image", split="train", engine=None):
        self.engine = engine or thor_engine(split)
        self.names = [sorted(self.engine.json_file_list)]
        Game.__init__(self, render_mode, obs)

    def _load(self, name):
        return {"file": name}, None

    def _begin(self, game, _):
        self.played, self.carried = [], ""
        self._act(None, True, game["file"])
        self._task = re.search(r"Your task is to: (.*?)\.?$", self._said)[1]

    def _act(self, action, begin=False, file=""):
        """Let the engine's thread play an action, or begin the game of a file."""
        with contextlib.redirect_stdout(io.StringIO()):
            self.engine.action_queues[0].put((action, begin, file))
            said, _, self._infos = self.engine.wait_and_get_info()
        self._said, self._won = said[0], bool(self._infos["won"][0])
        if taken := re.search(r"You pick up the (\w+ \d+)", self._said):
            self.carried = taken[1]
        elif "You put the" in self._said:
            self.carried = ""
        self._commands = sorted({*self._infos["admissible_commands"][0]} - {"look", "inventory", "help"})
        self.action_space.n = len(self.legal_actions())

    def _rate(self):
        return float(self._infos["goal_condition_success_rate"][0])

    def state(self):
        plan = self._infos["extra.expert_plan"][0]
        expert = plan[0] if plan and plan[0] in self._commands else self._commands[0]
        kind = next((kind for kind, task in ALFRED_TASKS.items() if task in str(self._infos["extra.gamefile"][0])), "")
        sight = re.search(r"you see (.*)", self._said)
        return {"task": self._task, "task_type": kind, "observation": self._said, "carried": self.carried,
                "won": self._won, "success": self._won,
                "visible": re.findall(r"an? (\w+ \d+)", sight[1]) if sight else [],
                "goal_conditions": self._rate(), "subgoal": expert, "expert": expert}

    def draw(self):
        frame = self.engine.get_frames()[0]  # (height, width, 3) uint8, blue first
        return Image.fromarray(np.ascontiguousarray(frame[:, :, ::-1])).resize((SIZE, SIZE))


def thor_engine(split):
    """An `AlfredThorEnv` of one game at a time. Raises ValueError where simulator, display or data are missing."""
    if "ALFWORLD_DATA" not in os.environ:
        raise ValueError("the THOR engine plays the data set's games: run alfworld-download and set ALFWORLD_DATA")
    folder = Path(os.environ["ALFWORLD_DATA"]).expanduser() / "json_2.1.1" / SPLITS[split]
    data_set(folder)
    config = {"dataset": {"data_path": str(folder), "num_train_games": -1},
              "env": {"task_types": [1, 2, 3, 4, 5, 6], "goal_desc_human_anns_prob": 0.0, "thor": {
                  "screen_width": SIZE, "screen_height": SIZE, "smooth_nav": False,
                  "save_frames_to_disk": False, "save_frames_path": ""}},
              "controller": {"type": "oracle", "load_receps": True, "debug": False},
              "general": {"training_method": "dagger"},
              "dagger": {"training": {"max_nb_steps_per_episode": ALFWorldEnv.max_steps}}}
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            from alfworld.agents.environment.alfred_thor_env import AlfredThorEnv
            return AlfredThorEnv(config, "train").init_env(1)  # of all splits only this one has the expert
    except Exception as error:  # whatever a simulator without a display may raise
        needs = "it needs a display and pip install 'alfworld[full]'"
        raise ValueError(f"the THOR engine does not start ({error}): {needs}") from None


def kind_of(name):
    return name.split(" ")[0]


@lru_cache(maxsize=8)
def data_set(folder):
    """The games of a split of ALFWorld's data set: for each type of task a list of folders (str) below `folder`."""
    # ALFWorld leaves out the same ones: its text engine knows no things in movable things, and its expert no slices.
    found = sorted(str(file.parent.relative_to(folder)) for file in folder.glob("*/*/game.tw-pddl"))
    games = [[f for f in found if f.startswith(task + "-") and "Sliced" not in f] for task in ALFRED_TASKS.values()]
    if not any(games):
        raise ValueError(f"{folder} holds no ALFWorld games: run alfworld-download, or unset ALFWORLD_DATA")
    return [names for names in games if names]


@lru_cache(maxsize=512)
def data_game(folder):
    """(game, trajectory) of a folder of the data set or of the cache."""
    try:
        game, trajectory = (json.loads((folder / name).read_text()) for name in ("game.tw-pddl", "traj_data.json"))
        return game, {key: trajectory[key] for key in ("task_type", "pddl_params")}  # all that is needed of 100 kB
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder} holds no game that can be read ({error}): delete it, or download again") from None


def kept_game(split, name):
    """(game, trajectory) of the built-in game `name` ("heat/17"): made, played once by the expert, then kept."""
    folder = game_cache() / split / name
    if not folder.exists():
        kind, number = name.split("/")
        game, trajectory = built_in_game(split, kind, int(number))
        player = ALFWorldEnv(split=split)
        player._begin(game, trajectory)
        while not player._won:
            player.play(player.state()["expert"])
            if len(player.played) > 40:
                raise RuntimeError(f"the expert does not solve the built-in game {split}/{name}: {player._task}")
        game |= {"walkthrough": player.played, "sas": player._state.sas}
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".") as part:
            for file, content in (("game.tw-pddl", game), ("traj_data.json", trajectory)):
                Path(part, file).write_text(json.dumps(content))
            with contextlib.suppress(OSError):  # another process was faster, with the same game
                Path(part).rename(folder)
    return data_game(folder)


@cache
def game_cache():
    """The folder for built-in games, another for each version of the code that makes them."""
    code = inspect.getsource(built_in_game) + inspect.getsource(kept_game) + repr(ROOMS)
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = home / "vlm-games" / f"alfworld-{zlib.crc32(code.encode()):08x}"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return folder if os.access(folder, os.W_OK) else Path(tempfile.gettempdir()) / folder.name


GAMES = {}


def register(game):
    """Make a `Game` known to Gymnasium and to the commands, under its `name`."""
    GAMES[game.name] = game
    gym.register(env_id(game.name), entry_point=game)


def env_id(name):
    """Gymnasium id of a task: "blackjack" -> "GymCards/Blackjack-v0"."""
    return f"GymCards/{GAMES[name].__name__.removesuffix('Env')}-v0"


# Where two have one name, the last is its default.
for game in (NumberLineEnv, EZPointsEnv, Points24Env, BlackjackEnv, ALFWorldThorEnv, ALFWorldEnv):
    register(game)


def expert_action(info):
    """The expert's action (str) in the state of `info`."""
    return GAMES[info["env"]].expert(info)


class Games:
    """`num_envs` games of the task `name` in lockstep, behind Gymnasium's vector API; each begins anew when it ends.

    name: of one task, or several with commas between them, which take turns. evaluation: play what is kept for that.

    images (N, 300, 300, 3) uint8, overwritten by the next step; infos: list of N dicts. Both show what to act in next.
    """

    def __init__(self, name, num_envs, seed, obs="image", evaluation=False):
        kinds = [GAMES[kind] for kind in name.split(",")]

        def make(kind):
            game = gym.make(env_id(kind.name), obs=obs, **kind.evaluation if evaluation else {})
            game.action_space = gym.spaces.Discrete(max(len(kind.actions) for kind in kinds))  # equal in a vector
            return game

        # Nothing resets by itself: the last picture of an episode is needed to bootstrap where it was cut off.
        makers = [partial(make, kinds[i % len(kinds)]) for i in range(num_envs)]
        self.vector = gym.vector.SyncVectorEnv(makers, copy=False, autoreset_mode="Disabled")
        images, infos = self.vector.reset(seed=seed)
        self.images, self.infos = images, split_info(infos)

    def step(self, actions, seeds=itertools.repeat(None), restart=False):
        """Play one text action a game, then begin a new episode where one ended, with the next of `seeds` (an
        iterator), or where `restart` (N,) says so.

        Returns a dict of what the step gave, before any new beginning: rewards, terminated, truncated (N,), infos, and
        last_images: index of a game that ended -> its last picture.
        """
        indices = np.array([info["legal_actions"].index(action) for info, action in zip(self.infos, actions)])
        images, rewards, terminated, truncated, infos = self.vector.step(indices)
        step = {"rewards": rewards, "terminated": terminated, "truncated": truncated, "infos": split_info(infos),
                "last_images": {i: images[i].copy() for i in np.flatnonzero(terminated | truncated)}}
        self.infos, over = list(step["infos"]), terminated | truncated | restart
        if over.any():
            _, infos = self.vector.reset(seed=[next(seeds) if ended else None for ended in over],
                                         options={"reset_mask": over})
            self.infos = [new or old for new, old in zip(split_info(infos), self.infos)]
        return step

    def snapshot(self):
        return [game.unwrapped.snapshot() for game in self.vector.envs]

    def restore(self, snapshots):
        images, self.infos = zip(*(game.unwrapped.restore(kept) for game, kept in zip(self.vector.envs, snapshots)))
        self.images[:], self.infos = np.stack(images), list(self.infos)


def split_info(infos):
    """The vector API's dict of arrays as a list of N dicts."""
    plain = {key: values.tolist() for key, values in infos.items() if key[0] != "_"}
    return [{key: values[i] for key, values in plain.items() if infos[f"_{key}"][i]} for i in range(len(infos["_env"]))]


# ---------------------------------------------------------------------------------------------------
# On its own: play in the terminal


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argument parser that shows defaults where there are some; to bad input one line and exit code 2."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=_Help, **kwargs)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(kind, low, high=math.inf):
    """A type for argparse: finite numbers of a `kind`, int or float, from `low` to `high`, both included."""
    def parse(text):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if low <= value <= high and value < math.inf:
                return value
        raise argparse.ArgumentTypeError(f"{text} is not {'a whole number' if kind is int else 'a number'} "
                                         f"of at least {low}" + f" and at most {high}" * (high < math.inf))
    return parse


positive_int, natural_int = number(int, 1), number(int, 0)


def show(image, columns=60):
    """A picture as coloured half-blocks, for terminals."""
    pixels = np.asarray(Image.fromarray(image).resize((columns, columns)))
    for upper, lower in zip(pixels[::2], pixels[1::2]):
        line = ("\033[38;2;{};{};{};48;2;{};{};{}m\u2580".format(*u, *v) for u, v in zip(upper, lower))
        print("".join(line) + "\033[0m")


def main():
    parser = Parser(description="Play a game in the terminal.")
    parser.add_argument("--env", choices=GAMES, default="blackjack", help="the game")
    parser.add_argument("--seed", type=natural_int, default=None, help="fixes the episode")
    parser.add_argument("--picture", default="game.png", help="file for the picture that the model would see")
    args = parser.parse_args()
    game = gym.make(env_id(args.env)).unwrapped
    image, info = game.reset(seed=args.seed)
    while not game.over:
        try:
            Image.fromarray(image).save(args.picture)
        except (OSError, ValueError) as error:
            parser.error(f"cannot write {args.picture}: {error}")
        show(image) if sys.stdout.isatty() else print(f"picture: {args.picture}")
        legal, hint = info["legal_actions"], expert_action(info)
        try:
            action = input(f"your action ({', '.join(legal)}; the expert plays {hint}): ").strip()
        except (EOFError, KeyboardInterrupt):
            return print()
        if action not in legal:
            print("that is not one of the actions")
            continue
        image, reward, _, _, info = game.step(legal.index(action))
        print(f"reward {reward:+.0f}")
    show(image) if sys.stdout.isatty() else None
    print(f"return {game.episode_return:+.0f}, {'success' if info['success'] else 'no success'}")


if __name__ == "__main__":
    main()
