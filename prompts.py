"""What the model reads and what is made of its answer: prompts, demonstrations, and the parser f.

    prompt = build_prompt(info)                                           # v_in, without the picture
    answer = demonstration(info, "hit")                                   # an expert's v_out, for SFT
    action, was_legal = parse_action(answer, info["legal_actions"], rng)  # the paper's f

An answer is a JSON object: key-state fields that say what the picture shows, "thoughts", then "action".
All up to the key `"action":` is the chain of thought (CoT), the rest is the action (paper, section 4).
`action_start` finds that place in the *text*, so that it holds for any tokenizer.

`python prompts.py --env blackjack` prints a prompt, an answer and what the parser makes of it.
"""
import itertools
import json
import re
import zlib
from dataclasses import dataclass
from typing import Callable

import numpy as np

import env

# ---------------------------------------------------------------------------------------------------
# The tasks in words


@dataclass(frozen=True)
class Task:
    """How a task is told to the model. Every function takes the environment's `info` and nothing else."""
    rules: str                          # the task, the same in every state
    fields: dict                        # key-state fields: name -> (what to write there, function: the truth)
    thoughts: Callable[[dict], str]     # what an expert thinks here
    state: Callable[[dict], str] = lambda info: ""  # what the text tells of this state beside the picture


def points_task(count, target, entries):
    def thoughts(info):
        # The whole plan at every step, split where the formula stands, then the entry that follows from it.
        hand, formula = " ".join(map(str, sorted(info["numbers"]))), info["formula"]
        plan = env.solve(info["numbers"], target, formula)
        if plan is None:
            return f"{hand} cannot make {target}, write ="
        rest = [*plan, "="][len(formula):]
        return f"{hand} make {target}: {''.join(formula)} > {''.join(rest)}, write {rest[0]}"

    return Task(
        rules=f"The picture shows {count} playing cards. Write a formula that uses each card once and equals {target}, "
              f"one entry at a time: a number or one of {entries}. A counts 1; J, Q and K count 10. "
              "The entry = hands it in",
        fields={"cards": (["rank of each card"], lambda info: [card[:-1] for card in info["cards"]]),
                "formula": ("the formula so far", lambda info: "".join(info["formula"]))},
        thoughts=thoughts,
        state=lambda info: f"Formula so far: {''.join(info['formula'])}\n")


def blackjack_thoughts(info):
    # Longer hands are added up card by card, aces as 1: "12, 19, hard 20 against 10, may bust".
    sums = list(itertools.accumulate(map(env.card_number, info["player"])))
    total, dealer = info["player_total"], env.card_number(info["dealer_card"])
    return ("".join(f"{so_far}, " for so_far in sums[1:-1])
            + f"{'soft' if total > sums[-1] else 'hard'} {total} against {'A' if dealer == 1 else dealer}, "
              f"{'may' if sums[-1] > 11 else 'cannot'} bust")


TASKS = {
    "numberline": Task(
        rules="The picture shows a target number and a current number. Make them equal, one step at a time: "
              "+ adds 1 to the current number and - takes 1 away",
        fields={"target": ("the target number", lambda info: info["target"]),
                "current": ("the current number", lambda info: info["current"])},
        thoughts=lambda info: f"the target is {'above' if info['target'] > info['current'] else 'below'}"),
    "ezpoints": points_task("two", 12, "+ *"),
    "points24": points_task("four", 24, "+ - * / ( )"),
    "blackjack": Task(
        rules="The picture shows a hand of blackjack. Come closer to 21 than the dealer without going over: "
              "hit draws a card and stand ends your turn",
        fields={"dealer": ("rank of the dealer's card", lambda info: info["dealer_card"][:-1]),
                "hand": (["rank of each of your cards"], lambda info: [card[:-1] for card in info["player"]])},
        thoughts=blackjack_thoughts),
    # About 560 characters a prompt (1100 in the data set's rooms), half of them rules and form, and 130 an answer.
    "alfworld": Task(
        rules="The picture shows a task at the top, below it what is in front of you, then a map of the room and what "
              "you carry. Do the task: go to places, open them, find things, carry them",
        fields={"seen": (["each thing in front"], lambda info: info["visible"]),
                "carrying": ("what you carry", lambda info: info["carried"] or "nothing")},
        thoughts=lambda info: f"{info['subgoal']}: {info['expert']}",
        state=lambda info: f"Task: {info['task']}\n{info['observation']}\n"),
}
CARD_TASKS = tuple(name for name in TASKS if name != "alfworld")  # those that need no engine


STYLES = ("full", "thoughts", "vision", "action", "chatty")
CHATTER = "well now so then okay right fine hmm".split()


def chatter(info):
    """Four words that say nothing, a different four in every state: 8.3 nats that no policy can know better."""
    number = zlib.crc32(repr(info).encode())
    return " - ".join(CHATTER[number >> 3 * i & 7] for i in range(4))


def fields(info, style="full"):
    """What an answer holds before its action, a dict of field -> (what to write there, function of info: the truth).

    style: "full" asks for key-state fields and thoughts (the paper's prompt), "thoughts" for thoughts alone, "action"
    for neither; "vision" is "full", but all that the text would tell of the state must be read from the picture;
    "chatty" is "full", with thoughts that begin with chatter, as those of large models vary from answer to answer.
    """
    task = TASKS[info["env"]]
    thought = (lambda info: f"{chatter(info)} - {task.thoughts(info)}") if style == "chatty" else task.thoughts
    thoughts = {"thoughts": ("what follows from this", thought)}
    return {"action": {}, "thoughts": thoughts}.get(style, task.fields | thoughts)


def build_prompt(info, style="full"):
    """The text v_in that goes to the model with the picture.

    info: the environment's `info` in this state. The prompt states the task, the part of the state that is told
    in words, the legal actions and the output format (paper, section 4.1).
    """
    task = TASKS[info["env"]]
    told = "" if style == "vision" else task.state(info)
    if info["obs"] == "text":
        told += f"What you see: {json.dumps({field: truth(info) for field, (_, truth) in task.fields.items()})}\n"
    form = {field: what for field, (what, _) in fields(info, style).items()} | {"action": "a legal action"}
    return f"{task.rules}.\n{told}Legal actions: {', '.join(info['legal_actions'])}\nAnswer in JSON: {json.dumps(form)}"


def demonstration(info, action, style="full"):
    """The answer of an agent that sees right, reasons right and plays `action`: a JSON object as text."""
    return json.dumps({field: truth(info) for field, (_, truth) in fields(info, style).items()} | {"action": action})


def corpus(names=CARD_TASKS, style="full", obs="image", episodes=100, seed=0):
    """Prompts and answers from random play of the tasks `names`: what the tiny model's tokenizer learns from."""
    rng, texts = np.random.default_rng(seed), []
    for name in names:
        game = env.GAMES[name](obs="text")  # draws nothing
        for episode in range(episodes):
            _, info = game.reset(seed=seed + episode)
            for _ in itertools.takewhile(lambda _: not game.over, range(25)):
                action = int(rng.integers(len(info["legal_actions"])))
                texts += [build_prompt(info | {"obs": obs}, style),
                          demonstration(info, info["legal_actions"][action], style)]
                *_, info = game.step(action)
    return texts


# ---------------------------------------------------------------------------------------------------
# The parser

QUOTES = "\"'`\u201c\u201d\u2018\u2019"
SPAN = 200  # characters of an answer's value that are looked at; longer than any action
KEYS = [re.compile(key, re.IGNORECASE) for key in (rf"[{QUOTES}]action[{QUOTES}]\s{{0,9}}:", r"\baction\s{0,9}:")]
# A quoted value ends at the next quote, a bare one at , } or a line's end.
VALUE = re.compile(rf"\s*(?:[{QUOTES}]([^{QUOTES}]*)|([^,}}\n]*))")


def find_keys(text):
    """All places (match objects) of the key `"action":`; without quotes only where none has quotes."""
    return next((found for key in KEYS if (found := list(key.finditer(text)))), [])


def action_start(text):
    """Index of the first character of `"action":` in `text`, where the CoT ends; len(text) if there is none."""
    return next((key.start() for key in find_keys(text)), len(text))


def parse_action(text, legal_actions, rng):
    """The paper's f: the action that `text` names, else a uniformly random legal one.

    text: any string; legal_actions: list of str, not empty; rng: a numpy Generator, used for illegal answers
    only. Returns (action, was_legal). Legal is exactly one action after the key `"action":`; quotes, spacing,
    case, trailing text and missing braces do not matter; two different actions, or none, are illegal. Never
    raises; time is linear in the text.
    """
    spans = {text[key.end(): key.end() + SPAN] for key in find_keys(text)}
    values = {"".join(VALUE.match(span).groups("")).strip().lower() for span in spans}
    names = {action.lower(): action for action in legal_actions}
    # The longest name first, none inside a longer word (10 is not 1), and a sign only where it stands alone.
    name = re.compile("|".join(rf"(?<!\w){re.escape(n)}(?!\w)" if n[-1:].isalnum() else rf"(?<!\S){re.escape(n)}(?!\S)"
                               for n in sorted(names, key=len, reverse=True)))
    found = {n for value in values for n in name.findall(value)}
    if len(found) == 1 and all(map(name.match, values)):
        return names[found.pop()], True
    return legal_actions[int(rng.integers(len(legal_actions)))], False


def main():
    parser = env.Parser(description="Print a prompt, an expert's answer and what the parser makes of it.")
    parser.add_argument("--env", choices=TASKS, default="blackjack", help="the task")
    parser.add_argument("--prompt", choices=STYLES, default="full", help="what the prompt asks for and gives away")
    parser.add_argument("--seed", type=env.natural_int, default=0, help="fixes the state")
    args = parser.parse_args()
    _, info = env.GAMES[args.env]().reset(seed=args.seed)
    answer = demonstration(info, env.expert_action(info), args.prompt)
    at = action_start(answer)
    action, was_legal = parse_action(answer, info["legal_actions"], np.random.default_rng(args.seed))
    print(f"--- prompt\n{build_prompt(info, args.prompt)}\n--- answer\n{answer}\n--- parsed\n"
          f"thoughts: {answer[:at]!r}\naction:   {answer[at:]!r}\nplayed:   {action!r} (legal: {was_legal})")


if __name__ == "__main__":
    main()
