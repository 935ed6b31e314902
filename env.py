"""The tasks: Gymnasium environments whose observation is a picture and whose actions are short texts.

    env = gymnasium.make("GymCards/Blackjack-v0")
    image, info = env.reset(seed=0)              # image: (300, 300, 3) uint8
    image, reward, terminated, truncated, info = env.step(info["legal_actions"].index("hit"))

`info`, at every reset and step, holds `legal_actions` (list of str; an action is an index into it),
`success` (bool: the episode is over and its return is positive) and the true state behind the picture,
under the names that each class lists. The model never sees the state; prompts and experts do.

`python env.py --env points24` plays a game in the terminal.
"""
import argparse
import itertools
import sys
from fractions import Fraction
from functools import lru_cache

import gymnasium as gym
import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = 300  # height and width of every picture, in pixels
RANKS = ["A", "2", "3", "4", "5", "6", "7", "8", "9", "10", "J", "Q", "K"]
SUITS = ["S", "H", "D", "C"]
TABLE = "#1d6b4f"  # green felt
NUMBERS = [str(n) for n in range(1, 11)]

# ---------------------------------------------------------------------------------------------------
# Drawing


@lru_cache(maxsize=None)
def font(pixels):
    return ImageFont.load_default(pixels)  # Pillow's built-in scalable font: no font file to ship


def draw_text(picture, text, center, pixels, color, max_width=SIZE - 16, bold=0):
    """Write `text` centred at (x, y), shrunk until it fits into `max_width` pixels."""
    width = font(pixels).getlength(text)
    if width > max_width:
        pixels = max(8, int(pixels * max_width / width))
    ImageDraw.Draw(picture).text(center, text, color, font(pixels), anchor="mm", stroke_width=bold, stroke_fill=color)


def draw_suit(draw, suit, x, y, r, color):
    """Draw a suit of about 2r x 2r pixels centred at (x, y) from circles and polygons."""
    def circle(cx, cy, radius):
        draw.ellipse([cx - radius, cy - radius, cx + radius, cy + radius], color)

    stem = [(x, y), (x + 0.4 * r, y + r), (x - 0.4 * r, y + r)]
    if suit == "D":
        draw.polygon([(x, y - r), (x + 0.75 * r, y), (x, y + r), (x - 0.75 * r, y)], color)
    elif suit == "C":
        for cx, cy in [(x, y - 0.5 * r), (x - 0.5 * r, y + 0.25 * r), (x + 0.5 * r, y + 0.25 * r)]:
            circle(cx, cy, 0.48 * r)
        draw.polygon(stem, color)
    else:  # a spade is a heart upside down on a stem
        up = 1 if suit == "H" else -1
        # The sides leave each lobe where its tangent passes through the tip, so that no corner shows.
        lobe, tip, middle = 0.5 * r, (x, y + up * r), y - up * 0.3 * r
        for side in (-1, 1):
            circle(x + side * 0.46 * r, middle, lobe)
        draw.polygon([tip, (x - 0.89 * r, middle + up * 0.25 * r), (x - 0.4 * r, middle - up * 0.2 * r),
                      (x + 0.4 * r, middle - up * 0.2 * r), (x + 0.89 * r, middle + up * 0.25 * r)], color)
        if suit == "S":
            draw.polygon([(x, y + 0.2 * r), *stem[1:]], color)


@lru_cache(maxsize=None)
def card_picture(card, width):
    """A card ("10H"; "" is a card face down) as an RGBA picture of width x 1.5 width pixels."""
    s = 4  # drawn four times too large and shrunk, for smooth edges
    w, h = width * s, width * s * 3 // 2
    picture = Image.new("RGBA", (w, h))
    draw = ImageDraw.Draw(picture)
    draw.rounded_rectangle([s, s, w - s, h - s], w // 10, "white", "#555555", s)
    if card:
        rank, suit = card[:-1], card[-1]
        color = "#c8102e" if suit in "HD" else "#101820"
        # A large rank over a large suit: what a card needs to be read at a third of its size.
        digits = [(0.5, rank)] if rank != "10" else [(0.27, "1"), (0.65, "0")]
        for x, digit in digits:
            draw.text((x * w, 0.45 * w), digit, color, font(int(0.78 * w)), anchor="mm", stroke_width=s,
                      stroke_fill=color)
        draw_suit(draw, suit, w / 2, 1.12 * w, 0.26 * w, color)
    else:
        back = Image.new("RGBA", (w, h), "#28518f")
        for x in range(-h, w, w // 6):
            ImageDraw.Draw(back).line([(x, 0), (x + h, h)], "#86abdf", 2 * s)
            ImageDraw.Draw(back).line([(x + h, 0), (x, h)], "#86abdf", 2 * s)
        mask = Image.new("L", (w, h))
        ImageDraw.Draw(mask).rounded_rectangle([w // 11, w // 11, w - w // 11, h - w // 11], w // 16, 255)
        picture.paste(back, mask=mask)
    return picture.resize((width, width * 3 // 2), Image.LANCZOS)


def draw_cards(picture, cards, x, y, pitch):
    """Lay `cards` in a row from (x, y), one every `pitch` pixels, or closer where they would not fit."""
    pitch = min(pitch, (SIZE - x) // len(cards))
    for i, card in enumerate(cards):
        art = card_picture(card, pitch - max(pitch // 12, 2))
        picture.paste(art, (x + i * pitch, y), art)


# ---------------------------------------------------------------------------------------------------
# Formulas, exactly

PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}
MAX_ENTRIES = 64  # longer than any game allows; keeps exact fractions of hostile input small


def evaluate_formula(entries):
    """Value of a formula given as a list of entries such as ["8", "/", "(", "3", ...], as a Fraction.

    Infix notation with + - * / and brackets, no unary minus. None if it is malformed, divides by zero or
    has more than MAX_ENTRIES entries. Dijkstra's shunting-yard algorithm: no recursion, no `eval`.
    """
    if len(entries) > MAX_ENTRIES:
        return None
    values, operators, operand_next = [], [], True

    def apply():
        operator, b, a = operators.pop(), values.pop(), values.pop()
        values.append(combine(operator, a, b))

    try:
        for entry in entries:
            if entry in PRECEDENCE and not operand_next:
                while operators and operators[-1] != "(" and PRECEDENCE[operators[-1]] >= PRECEDENCE[entry]:
                    apply()
                operators.append(entry)
                operand_next = True
            elif entry == "(" and operand_next:
                operators.append(entry)
            elif entry == ")" and not operand_next:
                while operators[-1] != "(":  # IndexError: nothing was opened
                    apply()
                operators.pop()
            elif entry in NUMBERS and operand_next:
                values.append(Fraction(int(entry)))
                operand_next = False
            else:
                return None
        while operators:
            if operators[-1] == "(":
                return None
            apply()
    except (IndexError, ZeroDivisionError):
        return None
    return values[0] if len(values) == 1 and not operand_next else None


def combine(operator, a, b):
    return a + b if operator == "+" else a - b if operator == "-" else a * b if operator == "*" else a / b


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
        for (a, pa, ea), (b, pb, eb), operator in itertools.product(left, right, PRECEDENCE):
            if operator == "/" and abs(b) < 1e-9:
                continue
            precedence = PRECEDENCE[operator]
            # a-(b-c) and a/(b/c) need their brackets; a+(b-c) and a*(b/c) read the same without.
            bracket = pb < precedence or (pb == precedence and operator in "-/")
            yield (combine(operator, a, b), precedence,
                   (*(("(", *ea, ")") if pa < precedence else ea), operator, *(("(", *eb, ")") if bracket else eb)))


@lru_cache(maxsize=None)
def parts(numbers):
    return list(dict.fromkeys(expressions(numbers)))  # without repeats, in a fixed order


@lru_cache(maxsize=None)
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
    """A game played with short text actions; a subclass writes `deal`, `play`, `state` and `draw`.

    Raises what Gymnasium raises: `ResetNeeded` before the first reset and after the end, `InvalidAction` for
    an action outside the action space.
    """
    metadata = {"render_modes": ["rgb_array"], "render_fps": 2}
    actions: tuple  # of str

    def __init__(self, render_mode=None):
        self.render_mode = render_mode
        self.observation_space = gym.spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8)
        self.action_space = gym.spaces.Discrete(len(self.actions))
        self.fixed = {*vars(self), "fixed", "spec"}  # the rest belongs to the episode
        self.over = True

    def deal(self):
        """Begin an episode, with randomness from `self.np_random` alone."""
        raise NotImplementedError

    def play(self, action):
        """Play the text `action`; returns (reward, terminated, truncated)."""
        raise NotImplementedError

    def state(self):
        """The true state behind the picture, as a dict for `info`."""
        raise NotImplementedError

    def draw(self):
        """The picture as a PIL image of SIZE x SIZE."""
        raise NotImplementedError

    @staticmethod
    def expert(info):
        """The best legal action (str) in the state that `info` holds."""
        raise NotImplementedError

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
        return {"legal_actions": self.legal_actions(), "success": bool(self.over and self.episode_return > 0),
                **self.state()}

    def render(self):
        return np.asarray(self.draw(), np.uint8).copy()

    def snapshot(self):
        """All that the rest of the episode depends on, as a dict that JSON holds: what `deal` and `play` set."""
        kept = {key: value for key, value in vars(self).items() if key not in self.fixed and key[0] != "_"}
        return kept | {"chance": self.np_random.bit_generator.state}

    def restore(self, snapshot):
        """Go on from a `snapshot`; returns (picture, info)."""
        snapshot = dict(snapshot)
        self.np_random.bit_generator.state = snapshot.pop("chance")
        vars(self).update(snapshot)
        return self.render(), self._info()

    def deal_cards(self, ranks):
        """A card of a random suit for each index into RANKS: "AS" for 0, "10H" for 9, ..."""
        return [RANKS[rank] + SUITS[self.np_random.integers(4)] for rank in ranks]


class NumberLineEnv(Game):
    """Walk from `current` to `target`, both in 0..5, by `+` and `-` (a step past an end stays there).

    Reward +1 on reaching the target, -1 for a step that does not come closer, else 0. Truncated after 10 steps.
    State: `target`, `current` (int).
    """
    actions = ("+", "-")

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

    def draw(self):
        return self._draw(self.target, self.current)

    @staticmethod
    @lru_cache(maxsize=None)
    def _draw(target, current):
        picture = Image.new("RGB", (SIZE, SIZE), "#f4f1ea")
        for y, color, name, number in ((90, "#1f6f54", "Target:", target), (210, "#28518f", "Current:", current)):
            ImageDraw.Draw(picture).rounded_rectangle([8, y - 54, SIZE - 8, y + 54], 16, color)
            draw_text(picture, name, (100, y), 40, "#f4f1ea")
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
        self.cards = self.deal_cards(self.deal_ranks())
        self.numbers = [card_number(card) for card in self.cards]
        self.formula = []

    def deal_ranks(self):
        """Indices into RANKS, one a card."""
        raise NotImplementedError

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
        draw_cards(picture, self.cards, (SIZE - pitch * len(self.cards)) // 2 + pitch // 24, 40, pitch)
        ImageDraw.Draw(picture).rounded_rectangle([10, 236, SIZE - 10, 288], 10, "#f4f1ea")
        draw_text(picture, "".join(self.formula) or f"make {self.target}", (SIZE // 2, 262), 36,
                  "#101820" if self.formula else "#a09a8c", SIZE - 32)
        return picture


class EZPointsEnv(PointsGame):
    __doc__ = "Two cards, 12 points, entries 1..10 + * =. Every hand can be solved.\n\n" + PointsGame.__doc__
    actions = (*NUMBERS, "+", "*", "=")
    target, max_entries = 12, 5

    def deal_ranks(self):
        """A uniform number x in 2..10, then 12 - x, or 12 / x half of the time when x divides 12."""
        x = int(self.np_random.integers(2, 11))
        y = 12 // x if 12 % x == 0 and self.np_random.random() < 0.5 else 12 - x
        return [n - 1 if n < 10 else int(self.np_random.integers(9, 13)) for n in (x, y)]  # 10, J, Q or K


class Points24Env(PointsGame):
    __doc__ = "Four cards, 24 points; some hands have no solution.\n\n" + PointsGame.__doc__
    actions = (*NUMBERS, "+", "-", "*", "/", "(", ")", "=")
    target, max_entries = 24, 20

    def deal_ranks(self):
        return self.np_random.integers(0, 13, 4)


CARD_PROBABILITY = {number: (4 if number == 10 else 1) / 13 for number in range(1, 11)}  # an infinite deck


def hand_total(hard, ace):
    """Best total of a hand worth `hard` with aces as 1: one ace counts 11 where that does not bust."""
    return hard + 10 if ace and hard <= 11 else hard


@lru_cache(maxsize=None)
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


@lru_cache(maxsize=None)
def blackjack_values(hard, ace, dealer, loss=-1.0):
    """Values of (standing, hitting) under best play from there on: a win counts 1, a draw 0, a loss `loss`.

    hard, ace: as for `hand_total`; dealer: the number on the face-up card, 1 to 10. With loss=-1 the value is
    the expected return, with loss=0 the probability of a win.
    """
    total = hand_total(hard, ace)
    stand = sum(p * (1 if final == 22 or total > final else loss if total < final else 0)
                for final, p in dealer_totals(dealer, dealer == 1))
    hit = sum(p * (loss if hard + number > 21 else max(blackjack_values(hard + number, ace or number == 1, dealer, loss)))
              for number, p in CARD_PROBABILITY.items())
    return stand, hit


class BlackjackEnv(Game):
    """Blackjack by Gymnasium's rules: infinite deck, the dealer draws to 17 (and stands on a soft 17), no
    bonus for a natural.

    Reward +1 / 0 / -1 for a win, a draw, a loss. State: `player` (cards such as "10H"), `player_total` (an
    ace counts 11 where that does not bust), `dealer_card`.
    """
    actions = ("stand", "hit")

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
        player, dealer = hand_total(*self._hard(self.player)), hand_total(*self._hard(self.dealer))
        return (1 if dealer > 21 or player > dealer else -1 if player < dealer else 0), True, False

    def state(self):
        return {"player": list(self.player), "player_total": hand_total(*self._hard(self.player)),
                "dealer_card": self.dealer[0]}

    @staticmethod
    def expert(info):
        """The action of the larger expected return, by dynamic programming."""
        stand, hit = blackjack_values(*BlackjackEnv._hard(info["player"]), card_number(info["dealer_card"]))
        return "stand" if stand >= hit else "hit"

    def draw(self):
        picture = self._table().copy()
        # While the player plays, the dealer's second card lies face down.
        draw_cards(picture, self.dealer if self.over else [self.dealer[0], ""], 2, 64, 60)
        draw_cards(picture, self.player, 2, 186, 60)
        return picture

    @staticmethod
    @lru_cache(maxsize=None)
    def _table():
        picture = Image.new("RGB", (SIZE, SIZE), TABLE)
        for y, name in ((38, "Dealer"), (164, "Player")):
            draw_text(picture, name, (64, y), 32, "#f4f1ea")
        ImageDraw.Draw(picture).line([(0, 146), (SIZE, 146)], "#3f8d6f", 2)
        return picture


GAMES = {"numberline": NumberLineEnv, "ezpoints": EZPointsEnv, "points24": Points24Env, "blackjack": BlackjackEnv}
for game in GAMES.values():
    gym.register(f"GymCards/{game.__name__.removesuffix('Env')}-v0", entry_point=game)


def env_id(name):
    """Gymnasium id of a task: "blackjack" -> "GymCards/Blackjack-v0"."""
    return f"GymCards/{GAMES[name].__name__.removesuffix('Env')}-v0"


def expert_action(name, info):
    """The expert's action (str) for the task `name` in the state of `info`."""
    return GAMES[name].expert(info)


class Games:
    """`num_envs` games of the task `name` in lockstep, behind Gymnasium's vector API; each begins anew when it ends.

    images (N, 300, 300, 3) uint8, infos: list of N dicts. Both are the states to act in next.
    """

    def __init__(self, name, num_envs, seed):
        # Nothing resets by itself: the last picture of an episode is needed to bootstrap where it was cut off.
        self.vector = gym.vector.SyncVectorEnv([lambda: gym.make(env_id(name))] * num_envs, autoreset_mode="Disabled")
        images, infos = self.vector.reset(seed=seed)
        self.images, self.infos = images, split_info(infos)

    def step(self, actions, seeds=itertools.repeat(None), restart=False):
        """Play one text action a game, then begin a new episode where one ended, with the next of `seeds` (an iterator),
        or where `restart` (N,) says so.

        Returns a dict of what the step gave, before any new beginning: rewards, terminated, truncated (N,), images, infos.
        """
        indices = np.array([info["legal_actions"].index(action) for info, action in zip(self.infos, actions)])
        images, rewards, terminated, truncated, infos = self.vector.step(indices)
        step = {"rewards": rewards, "terminated": terminated, "truncated": truncated, "images": images, "infos": split_info(infos)}
        self.images, self.infos, over = images, list(step["infos"]), terminated | truncated | restart
        if over.any():
            self.images, infos = self.vector.reset(seed=[next(seeds) if ended else None for ended in over],
                                                   options={"reset_mask": over})
            infos = split_info(infos)
            for i in np.flatnonzero(over):
                self.infos[i] = infos[i]
        return step

    def snapshot(self):
        return [game.unwrapped.snapshot() for game in self.vector.envs]

    def restore(self, snapshots):
        images, self.infos = zip(*(game.unwrapped.restore(kept) for game, kept in zip(self.vector.envs, snapshots)))
        self.images, self.infos = np.stack(images), list(self.infos)


def split_info(infos):
    """The vector API's dict of arrays as a list of N dicts."""
    plain = {key: values.tolist() for key, values in infos.items() if key[0] != "_"}
    return [dict(zip(plain, row)) for row in zip(*plain.values())]


# ---------------------------------------------------------------------------------------------------
# On its own: play in the terminal


class Parser(argparse.ArgumentParser):
    """An argument parser that answers bad input with one line and exit code 2."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def positive_int(text):
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return int(text)


def natural_int(text):
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return int(text)


def show(image, columns=60):
    """A picture as coloured half-blocks, for terminals."""
    pixels = np.asarray(Image.fromarray(image).resize((columns, columns)))
    for upper, lower in zip(pixels[::2], pixels[1::2]):
        print("".join("\033[38;2;{};{};{};48;2;{};{};{}m\u2580".format(*u, *v) for u, v in zip(upper, lower)) + "\033[0m")


def main():
    parser = Parser(description="Play a game in the terminal.")
    parser.add_argument("--env", choices=GAMES, default="blackjack", help="the game")
    parser.add_argument("--seed", type=int, default=None, help="fixes the episode")
    parser.add_argument("--picture", default="game.png", help="file for the picture that the model would see")
    args = parser.parse_args()
    env = gym.make(env_id(args.env))
    image, info = env.reset(seed=args.seed)
    over, total = False, 0.0
    while not over:
        try:
            Image.fromarray(image).save(args.picture)
        except (OSError, ValueError) as error:
            parser.error(f"cannot write {args.picture}: {error}")
        show(image) if sys.stdout.isatty() else print(f"picture: {args.picture}")
        try:
            action = input(f"your action ({' '.join(info['legal_actions'])}; the expert plays {expert_action(args.env, info)}): ").strip()
        except (EOFError, KeyboardInterrupt):
            return print()
        if action not in info["legal_actions"]:
            print("that is not one of the actions")
            continue
        image, reward, terminated, truncated, info = env.step(info["legal_actions"].index(action))
        over, total = terminated or truncated, total + reward
        print(f"reward {reward:+.0f}")
    show(image) if sys.stdout.isatty() else None
    print(f"return {total:+.0f}, {'success' if info['success'] else 'no success'}")


if __name__ == "__main__":
    main()
