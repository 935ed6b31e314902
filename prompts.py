"""What the model reads, and what is made of its answer: prompts, demonstrations, the parser f.

    info = {"env": "blackjack", "obs": "image", "legal_actions": ["stand", "hit"],
            "player": ["KH", "6S"], "player_total": 16, "dealer_card": "9D", "success": False}
    prompt = build_prompt(info)                     # v_in, without the picture
    answer = demonstration(info, "hit")             # v_out for SFT
    action, was_legal = parse_action(answer, info["legal_actions"], rng)    # the paper's f

An answer is a JSON object: key-state fields that say what the picture shows, then "thoughts", then
"action". `info` is what an environment tells of its state. Everything before the key `"action":` is
the chain of thought (CoT), the rest is the action (paper, section 4). `action_start` finds that
place in the *text*, so it holds for any tokenizer.

Read to the heading "Idle words": the tasks come first, then the prompt, then the parser.

`python prompts.py --env blackjack` prints a prompt, an answer, and what the parser makes of it.
"""
import argparse
import json
import re
import zlib
from dataclasses import dataclass
from typing import Callable

import numpy as np

import env

# -------------------------------------------------------------------------------------------------
# The tasks in words


@dataclass(frozen=True)
class Field:
    """A key-state field of an answer, such as "cards"."""

    # The prompt's words for it. A str: the answer has one value here. A list with one str, such as
    # ["rank of each card"]: the answer has a JSON list here.
    description: object
    truth: Callable[[dict], object]  # info -> what an agent that sees right writes


def nothing_to_tell(info):
    return ""


@dataclass(frozen=True)
class Task:
    """How a task is told to the model. Every function takes the environment's `info`."""

    rules: str                          # the task, the same in every state
    fields: dict                        # key-state fields: name -> Field
    thoughts: Callable[[dict], str]     # what an expert thinks in this state
    state: Callable[[dict], str] = nothing_to_tell  # what the text tells beside the picture


def ranks_of(cards):
    """The ranks of cards such as "10H": everything but the letter of the suit."""
    return [card[:-1] for card in cards]


def numberline_thoughts(info):
    if info["target"] > info["current"]:
        return "the target is above"
    return "the target is below"


def blackjack_thoughts(info):
    """What the hand is worth, and how strong the dealer is.

    For 7 5 7 against a king: "7+5=12, +7=hard 19, good, strong dealer". The cards are added up one
    by one, and each step names both numbers: a small model cannot do more at once.

    In the sums an ace counts 1. If it can count 11, the hand is called soft and is worth 10 more:
    for A 6 "1+6=soft 17". To bust is to have more than 21: a hand may bust if one more card can do
    that. From 17 on a hand is called good instead, even a soft 17. A dealer who shows 2 to 6 often
    busts, and is weak.
    """
    numbers = [env.card_number(card) for card in info["player"]]    # aces count 1
    sums = f"{numbers[0]}+{numbers[1]}="
    for i in range(2, len(numbers)):
        sums += f"{sum(numbers[:i])}, +{numbers[i]}="

    total = sum(numbers)
    kind = "soft" if info["player_total"] > total else "hard"
    outlook = "may bust" if total > 11 else "cannot bust"  # with 11, even a ten makes only 21
    if info["player_total"] >= 17:
        outlook = "good"
    dealer = env.card_number(info["dealer_card"])
    strength = "weak" if 2 <= dealer <= 6 else "strong"
    return f"{sums}{kind} {info['player_total']}, {outlook}, {strength} dealer"


def points_task(game, count, entries):
    """The task of EZPoints or Points24, a class of env.py: a formula of `count` cards."""
    target = game.target

    def thoughts(info):
        # Plan all entries that are left, then name the next one. With the cards 3 and 4 and the
        # formula "3" so far: "3 4 make 12: *4=, write *".
        # (The action of a demonstration may be another one: SFT teaches the thoughts, RL to act.)
        hand = " ".join(str(number) for number in sorted(info["numbers"]))
        formula = info["formula"]
        plan = env.solve(info["numbers"], target, formula, game.max_entries)
        if plan is None:
            return f"{hand} cannot make {target}, write ="  # nothing can be won: end the game
        rest = [*plan, "="][len(formula):]  # the plan begins with the formula
        return f"{hand} make {target}: {''.join(rest)}, write {rest[0]}"

    return Task(
        rules=f"The picture shows {count} playing cards. Write a formula that uses each card once "
              f"and equals {target}, one entry at a time: a number or one of {entries}. "
              "A counts 1; J, Q and K count 10. The entry = hands it in. "
              f"A number that no unused card shows leaves a blank {env.BLANK}",
        fields={
            "cards": Field(["rank of each card"], lambda info: ranks_of(info["cards"])),
            "formula": Field("the formula so far", lambda info: "".join(info["formula"])),
        },
        thoughts=thoughts,
        state=lambda info: f"Formula so far: {''.join(info['formula'])}\n",
    )


TASKS = {
    "numberline": Task(
        rules="The picture shows a target number and a current number. Make them equal, one step "
              "at a time: + adds 1 to the current number and - takes 1 away",
        fields={
            "target": Field("the target number", lambda info: info["target"]),
            "current": Field("the current number", lambda info: info["current"]),
        },
        thoughts=numberline_thoughts,
    ),
    "ezpoints": points_task(env.EZPointsEnv, "two", "+ *"),
    "points24": points_task(env.Points24Env, "four", "+ - * / ( )"),
    "blackjack": Task(
        rules="The picture shows a hand of blackjack. Come closer to 21 than the dealer without "
              "going over: hit draws a card and stand ends your turn",
        fields={
            "dealer": Field("rank of the dealer's card", lambda info: info["dealer_card"][:-1]),
            "hand": Field(["rank of each of your cards"], lambda info: ranks_of(info["player"])),
        },
        thoughts=blackjack_thoughts,
    ),
    "alfworld": Task(
        rules="The picture shows a task at the top, below it what is in front of you, then a map "
              "of the room and what you carry. Do the task: go to places, open them, find things, "
              "carry them",
        fields={
            "seen": Field(["each thing in front"], lambda info: info["visible"]),
            "carrying": Field("what you carry", lambda info: info["carried"] or "nothing"),
        },
        thoughts=lambda info: f"{info['subgoal']}: {info['expert']}",
        state=lambda info: f"Task: {info['task']}\n{info['observation']}\n",
    ),
}

# The built-in model has one tokenizer for these four tasks. Any other task gets one of its own.
CARD_TASKS = ("numberline", "ezpoints", "points24", "blackjack")

# -------------------------------------------------------------------------------------------------
# The prompt v_in and the demonstrations

STYLES = ("full", "thoughts", "vision", "action", "chatty")  # `answer_fields` says what they are


def answer_fields(info, style="full"):
    """The fields of an answer before its action: dict of name -> Field.

    full: key-state fields and thoughts, as in the paper; thoughts: thoughts alone; action: neither;
    vision: as full, but `build_prompt` leaves out what the picture shows;
    chatty: as full, but idle words stand before the thoughts (large models vary their words).
    """
    task = TASKS[info["env"]]
    if style == "action":
        return {}

    thoughts = {"thoughts": Field("what follows from this", task.thoughts)}
    if style == "thoughts":
        return thoughts
    if style == "chatty":
        thoughts = {"thoughts": Field("what follows from this", chatty_thoughts)}
    return task.fields | thoughts


def build_prompt(info, style="full"):
    """The text v_in that goes to the model with the picture (paper, section 4.1).

    info: the environment's `info` in this state. The prompt states the task, the part of the state
    that is told in words, the legal actions and the output format.
    """
    task = TASKS[info["env"]]
    state = task.state(info)
    if style == "vision":
        state = ""
    if info["obs"] == "text":
        seen = {name: field.truth(info) for name, field in task.fields.items()}
        state += f"What you see: {json.dumps(seen, ensure_ascii=False)}\n"

    form = {name: field.description for name, field in answer_fields(info, style).items()}
    form["action"] = "a legal action"
    legal_actions = ", ".join(info["legal_actions"])
    return (
        f"{task.rules}.\n"
        f"{state}"
        f"Legal actions: {legal_actions}\n"
        f"Answer in JSON: {json.dumps(form, ensure_ascii=False)}"
    )


def demonstration(info, action, style="full"):
    """The answer of an agent that sees and thinks right and plays `action`: JSON as text."""
    answer = {name: field.truth(info) for name, field in answer_fields(info, style).items()}
    answer["action"] = action
    return json.dumps(answer, ensure_ascii=False)


# -------------------------------------------------------------------------------------------------
# The parser f: from the text of an answer to a legal action

# In these patterns {QUOTES} is any quote, and {{0,9}} allows up to nine spaces. (Without a limit, a
# text of n spaces would cost n * n steps.) In an f-string (rf"...") a brace is written twice.
# (?<=[{,]) means: just before stands { or a comma.
QUOTES = "\"'`\u201c\u201d\u2018\u2019"
QUOTED_KEY = re.compile(rf"[{QUOTES}]action[{QUOTES}]\s{{0,9}}:", re.IGNORECASE)
BARE_KEY = re.compile(r"(?:^|(?<=[{,]))\s{0,9}action\s{0,9}:", re.IGNORECASE | re.MULTILINE)
QUOTED_VALUE = re.compile(rf"\s*[{QUOTES}]([^{QUOTES}]*)")  # ends at the next quote
BARE_VALUE = re.compile(r"\s*([^,}\n]*)")                   # ends at , or } or the line's end
MAX_VALUE = 200  # characters of a value that are looked at; longer than any action


def find_keys(text):
    """All places of the key, as matches: of `"action":`, else of `action:` where a field begins."""
    quoted = list(QUOTED_KEY.finditer(text))
    if quoted:
        return quoted
    return list(BARE_KEY.finditer(text))


def action_start(text):
    """Index of the first character of `"action":`, where the CoT ends; len(text) without one."""
    keys = find_keys(text)
    if keys:
        return keys[0].start()
    return len(text)


def value_after(key, text):
    """The value behind a key that `find_keys` found, in lower case."""
    span = text[key.end(): key.end() + MAX_VALUE]
    match = QUOTED_VALUE.match(span) or BARE_VALUE.match(span)
    return match[1].strip().lower()


def pattern_of(actions):
    """A regular expression for any of the `actions` (str, lower case), as whole words.

    "1" is not found in "10". "-" is found in "3 - 1" and "3-1", but not in "mid-air" or "->".
    """
    alternatives = []
    for action in sorted(actions, key=len, reverse=True):  # "drawer 12" is tried before "drawer 1"
        name = re.escape(action)
        if action[-1:].isalnum():  # a word: no letter or digit before or behind it
            alternatives.append(rf"(?<!\w){name}(?!\w)")
        else:  # a sign: only spaces or digits before and behind it
            alternatives.append(rf"(?<![^\s\d]){name}(?![^\s\d])")
    return re.compile("|".join(alternatives))


def parse_action(text, legal_actions, rng):
    """The paper's f: the action that `text` names, else a uniformly random legal one.

    text: any string; legal_actions: list of str, not empty; rng: a numpy Generator, used for
    illegal answers only. Returns (action, was_legal). An answer is legal if the value after the key
    `"action":` begins with an action, and names no other. (If the key comes more than once, all
    values must name the same.)
    Quotes, spacing, case, trailing text and missing braces do not matter. Two different actions, or
    none, are illegal. Never raises; the time is linear in the text.
    """
    original = {action.lower(): action for action in legal_actions}
    pattern = pattern_of(original)
    values = {value_after(key, text) for key in find_keys(text)}

    # Legal: every value begins with an action ("hit", "hit me", but not "I hit"), and no second
    # action is named anywhere (not "hit or stand")
    named = {name for value in values for name in pattern.findall(value)}
    if len(named) == 1 and all(pattern.match(value) for value in values):
        return original[named.pop()], True

    random_index = int(rng.integers(len(legal_actions)))
    return legal_actions[random_index], False


# -------------------------------------------------------------------------------------------------
# Idle words, and texts for a tokenizer. The method does not need them.

IDLE_WORDS = "well now so then okay right fine hmm".split()


def chatty_thoughts(info):
    """Four idle words, then the thoughts. Each word is one of the eight IDLE_WORDS.

    The words are a checksum of the state. A model cannot compute it, so for the model they are
    random: it cannot give them a log-probability above -4 log 8 = -8.3 on average.
    """
    state = {name: value for name, value in info.items() if name != "action_mask"}  # an array
    number = zlib.crc32(repr(state).encode())
    words = []
    for _ in range(4):
        number, digit = divmod(number, len(IDLE_WORDS))
        words.append(IDLE_WORDS[digit])
    return " - ".join(words) + " - " + TASKS[info["env"]].thoughts(info)


def corpus(names=CARD_TASKS, style="full", obs="image", episodes=100, seed=0):
    """Prompts and answers of random play: what the built-in model's tokenizer learns from."""
    rng = np.random.default_rng(seed)
    texts = []
    for name in names:
        game = env.GAMES[name](obs="text")  # the game draws no pictures then, which saves time
        for episode in range(episodes):
            _, info = game.reset(seed=seed + episode)
            num_steps = 0
            while not game.over and num_steps < 25:
                action = int(rng.integers(len(info["legal_actions"])))
                texts.append(build_prompt(info | {"obs": obs}, style))
                texts.append(demonstration(info, info["legal_actions"][action], style))
                *_, info = game.step(action)
                num_steps += 1
    return texts


# -------------------------------------------------------------------------------------------------
# On its own: a prompt, an answer, and what the parser makes of it


def main():
    parser = argparse.ArgumentParser(
        description="Print a prompt, an expert's answer and what the parser makes of it.",
        usage=argparse.SUPPRESS)  # without a usage text an error is one line
    add = parser.add_argument
    add("--env", choices=TASKS, default="blackjack", help="the task [blackjack]")
    add("--prompt", choices=STYLES, default="full", help="style of the prompt [full]")
    add("--seed", type=int, default=0, help="fixes the state [0]")
    args = parser.parse_args()
    if args.seed < 0:
        parser.error(f"--seed {args.seed} is negative")

    if args.env not in env.GAMES:
        parser.error(f"--env {args.env}: env.py registers no game of this name")
    try:
        game = env.GAMES[args.env]()
    except ValueError as error:  # ALFWorld is not installed
        parser.error(str(error))
    _, info = game.reset(seed=args.seed)
    answer = demonstration(info, env.expert_action(info), args.prompt)
    start = action_start(answer)
    rng = np.random.default_rng(args.seed)
    action, was_legal = parse_action(answer, info["legal_actions"], rng)

    print(f"--- prompt\n{build_prompt(info, args.prompt)}")
    print(f"--- answer\n{answer}")
    print("--- parsed")
    print(f"thoughts: {answer[:start]!r}")
    print(f"action:   {answer[start:]!r}")
    print(f"played:   {action!r} (legal: {was_legal})")


if __name__ == "__main__":
    main()
