"""What takes too long for the tests: random kills, a million hostile strings, many random steps.

    python tests/faults.py               # half an hour on 2 cores, a third of it the kills
    python tests/faults.py --kills 5 --strings 10000 --steps 1000

Prints a line a check; exit code 1 where one fails.
"""
import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import env  # noqa: E402
from eval import natural_int  # noqa: E402
from prompts import action_start, parse_action  # noqa: E402
from test_env import RULES, blind_points24, check_rules  # noqa: E402


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        usage=argparse.SUPPRESS,  # without a usage text an error is one line
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--kills", type=natural_int, default=20, help="random kills of a training run")
    add("--strings", type=natural_int, default=1_000_000,
        help="hostile strings for the parser and the formulas")
    add("--steps", type=natural_int, default=100_000,
        help="random steps in each game against a second implementation of the rules")
    args = parser.parse_args()

    passed = True
    if args.steps:
        rules(args.steps)
        passed &= blind()
    if args.strings:
        passed &= strings(args.strings)
    if args.kills:
        passed &= kills(args.kills)
    sys.exit(0 if passed else 1)


def blind():
    """The success rate of Points24 without looking, computed again: half a minute."""
    rate = blind_points24(brackets=2)
    print(f"Points24 without looking: {rate:.2%}, in the table {env.BLIND['points24']:.2%}")
    return rate == env.BLIND["points24"]


def rules(count):
    """Play `count` steps of each game; an AssertionError shows the first that is wrong."""
    for name in [*RULES, "blackjack"]:
        steps, episodes = check_rules(name, count)
        print(f"{name}: {steps} steps in {episodes} episodes, "
              "all rewards and ends as in the second implementation", flush=True)


# -------------------------------------------------------------------------------------------------
# Hostile strings

PIECES = [
    '"action":', "'action':", "action:", '"thoughts":', "action", "hit", "stand", "HIT", "1", "10",
    '"', "'", "\\", '\\"', "{", "}", "[", "]", "(", ")", ",", ":", "+", "-", "*", "/", "=", "**",
    "\n", "\r", "\t", " ", "\x00", "\x1b[2J", "\u202e", "\u201c", "\u2212", "\uff11", "\u0661",
    "\U0001f0a1", "\ud800", "__import__('os')", "null", "9" * 40, "<image>", "</s>",
]
ALFWORLD_ACTIONS = ["go to drawer 1", "go to drawer 12", "take mug 1 from desk 1"]
MEGABYTE = 1_000_000
MAX_SECONDS = 0.5  # for a megabyte; it takes 0.2, and hours where the time grows with the square


def hostile_string(rng):
    """Random bytes, or pieces that mean something to the parser in a random order."""
    kind = rng.random()
    if kind < 0.2:
        return rng.randbytes(rng.randrange(60)).decode("latin-1")
    if kind < 0.3:
        return rng.randbytes(rng.randrange(60)).decode("utf-8", "surrogateescape")
    return "".join(rng.choice(PIECES) for _ in range(rng.randrange(20)))


def hostile_formula(rng):
    """A list of entries of Points24, of which one in ten is a hostile string."""
    entries = []
    for _ in range(rng.randrange(12)):
        if rng.random() < 0.9:
            entries.append(rng.choice(env.Points24Env.actions[:-1]))
        else:
            entries.append(hostile_string(rng))
    return entries


def strings(count):
    """Whether every string gives a legal action, and a megabyte takes less than MAX_SECONDS.

    No list of entries may raise an exception as a formula.
    """
    rng = random.Random(0)
    parser_rng = np.random.default_rng(0)
    menus = [list(game.actions) for name, game in env.GAMES.items() if name != "alfworld"]
    menus.append(ALFWORLD_ACTIONS)

    num_legal = 0
    for _ in range(count):
        text = hostile_string(rng)
        legal_actions = rng.choice(menus)
        action, was_legal = parse_action(text, legal_actions, parser_rng)
        assert action in legal_actions, text
        assert 0 <= action_start(text) <= len(text), text
        num_legal += was_legal
        env.evaluate_formula(hostile_formula(rng))

    slowest = 0.0
    for piece in PIECES:
        megabyte = piece * (MEGABYTE // len(piece))
        for text in (megabyte, '"action": "' + megabyte):
            times = []
            for _ in range(3):  # the fastest counts: others may share the machine
                began = time.process_time()
                action, _ = parse_action(text, ALFWORLD_ACTIONS, parser_rng)
                env.evaluate_formula(list(text))
                times.append(time.process_time() - began)
                assert action in ALFWORLD_ACTIONS
            slowest = max(slowest, min(times))

    print(f"{count} hostile strings: no exception, no action that is not legal "
          f"({num_legal} named one); slowest megabyte {slowest:.3f} s of processor time",
          flush=True)
    return slowest < MAX_SECONDS


# -------------------------------------------------------------------------------------------------
# Kills

SMALL_RUN = (
    "--env ezpoints --sft-steps 250 --sft-batch 8 --env-steps 768 --rollout-steps 64 "
    "--num-envs 16 --epochs 2 --eval-episodes 64 --max-new-tokens 40"
).split()


def kills(count):
    """Whether a run that is killed and resumed ends with the weights and metrics of another one.

    SIGKILL comes at `count` random moments. A run that came to its end makes place for a new one.
    """
    rng = random.Random(0)
    scratch = Path(tempfile.mkdtemp())

    # An undisturbed run, with a cache of SFT weights of its own
    undisturbed = scratch / "undisturbed/run"
    began = time.time()
    assert start(undisturbed).wait() == 0
    longest_wait = max(4, 0.4 * (time.time() - began))
    expected = content(undisturbed)

    num_killed = 0
    num_ended = 0
    all_same = True
    stages = Counter()
    while num_killed < count:
        run = scratch / f"killed{num_ended}/run"
        process = start(run)
        while process.poll() is None:
            # A resumed run must get past its start now and then, or it would never end
            if num_killed == count:
                time.sleep(1)
                continue
            time.sleep(rng.uniform(2, longest_wait))
            if process.poll() is None:
                process.kill()
                process.wait()
                num_killed += 1
                stages[last_stage(run)] += 1
                if not is_finished(run):  # else the process was about to end
                    process = start(run)
        assert is_finished(run), process.communicate()[1].decode()
        num_ended += 1
        all_same &= content(run) == expected

    verdict = "the same" if all_same else "OTHER"
    print(f"killed {num_killed} times (last line of the metrics then: {dict(stages)}), "
          f"{num_ended} runs came to their end: {verdict} weights and metrics as undisturbed")
    return all_same


def start(run):
    """A process that trains in the directory `run`, or goes on there."""
    flags = [*SMALL_RUN, "--out", run]
    if (run / "config.json").exists():
        flags = ["--resume", run]
    return subprocess.Popen([sys.executable, ROOT / "train.py", *flags],
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def is_finished(run):
    return (run / "curve.png").exists()


def last_stage(run):
    """The stage that the last whole line of the metrics names; "start" where there is none."""
    metrics = run / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines() if metrics.exists() else []
    if lines and lines[-1].endswith(b"}"):
        return json.loads(lines[-1])["stage"]
    return "start"


def content(run):
    """Metrics without times, and the bytes of all weights, of a finished run."""
    rows = []
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows.append({key: value for key, value in row.items() if "seconds" not in key})
    files = ("adapter/adapter_model.safetensors", "value_head.safetensors", "sft/model.safetensors")
    return rows, [(run / file).read_bytes() for file in files]


if __name__ == "__main__":
    main()
