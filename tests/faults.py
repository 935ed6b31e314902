"""What takes too long for the tests: random kills, a million hostile strings, many random steps.

    python tests/faults.py                       # about half an hour on 2 cores, a third of it the kills
    python tests/faults.py --kills 5 --strings 10000 --steps 1000

Prints a line a check; exit code 1 where one fails.
"""
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import env  # noqa: E402
from prompts import action_start, parse_action  # noqa: E402
from test_env import RULES, check_rules  # noqa: E402

PIECES = ['"action":', "'action':", "action:", '"thoughts":', '"', "'", "\\", '\\"', "{", "}", "[", "]", "(", ")", ",", ":", "\n", "\r", "\t", " ", "\x00",
          "\x1b[2J", "\u202e", "\u201c", "\u2212", "\uff11", "\u0661", "\U0001f0a1", "\ud800", "hit", "stand", "HIT", "1", "10", "+", "-", "*", "/", "=", "**",
          "__import__('os')", "null", "9" * 40, "action", "<image>", "</s>"]


def hostile_string(rng):
    kind = rng.random()
    if kind < 0.2:
        return rng.randbytes(rng.randrange(60)).decode("latin-1")
    if kind < 0.3:
        return rng.randbytes(rng.randrange(60)).decode("utf-8", "surrogateescape")
    return "".join(rng.choice(PIECES) for _ in range(rng.randrange(20)))


def strings(count):
    """Every string gives a legal action, every list of entries a value or None; a megabyte takes less than 0.2 s."""
    rng, chance = random.Random(0), np.random.default_rng(0)
    menus = [list(game.actions) for name, game in env.GAMES.items() if name != "alfworld"] + [["go to drawer 1", "go to drawer 12", "take mug 1 from desk 1"]]
    legal_answers = 0
    for i in range(count):
        text, menu = hostile_string(rng), rng.choice(menus)
        action, was_legal = parse_action(text, menu, chance)
        assert action in menu and 0 <= action_start(text) <= len(text), text
        legal_answers += was_legal
        env.evaluate_formula([rng.choice(env.Points24Env.actions[:-1]) if rng.random() < 0.9 else hostile_string(rng) for _ in range(rng.randrange(12))])
    slowest = 0.0
    for piece in PIECES:
        for text in (piece * (1_000_000 // len(piece)), '"action": "' + piece * (1_000_000 // len(piece))):
            began = time.process_time()
            assert parse_action(text, menus[-1], chance)[0] in menus[-1]
            env.evaluate_formula(list(text))
            slowest = max(slowest, time.process_time() - began)
    print(f"{count} hostile strings: no exception, no action that is not legal ({legal_answers} named one); slowest megabyte {slowest:.3f} s of processor time")
    return slowest < 0.2


def kills(count):
    """A run killed with SIGKILL at `count` random moments, and resumed each time, ends as an undisturbed one does."""
    flags = ["--env", "ezpoints", "--sft-steps", "250", "--sft-batch", "8", "--env-steps", "768", "--rollout-steps", "64", "--num-envs", "16", "--epochs", "2",
             "--eval-episodes", "64", "--max-new-tokens", "40"]
    scratch, rng = Path(tempfile.mkdtemp()), random.Random(0)

    def start(*flags):
        return subprocess.Popen([sys.executable, ROOT / "train.py", *flags], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def content(run):
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        weights = [(run / file).read_bytes() for file in ("adapter/adapter_model.safetensors", "value_head.safetensors", "sft/model.safetensors")]
        return [{key: value for key, value in row.items() if "seconds" not in key} for row in rows], weights

    began = time.time()
    assert start(*flags, "--out", scratch / "a/run").wait() == 0
    whole, killed, ended, same, where = time.time() - began, 0, 0, True, {}
    while killed < count:
        run = scratch / f"b{ended}/run"
        process = start(*flags, "--out", run)
        while process.poll() is None:
            # A resumed run must get past its start-up now and then, or it would never end.
            time.sleep(rng.uniform(2, max(4, 0.4 * whole)) if killed < count else 1)
            if process.poll() is None and killed < count:
                process.kill()
                process.wait()
                killed += 1
                rows = (run / "metrics.jsonl").read_bytes().splitlines() if (run / "metrics.jsonl").exists() else []
                stage = json.loads(rows[-1])["stage"] if rows and rows[-1].endswith(b"}") else "start"
                where[stage] = where.get(stage, 0) + 1
                if not (run / "curve.png").exists():  # else the run had ended, and the process was about to
                    process = start("--resume", run) if (run / "config.json").exists() else start(*flags, "--out", run)
        assert (run / "curve.png").exists(), process.communicate()[1].decode()
        ended, same = ended + 1, same and content(scratch / "a/run") == content(run)
    print(f"killed {killed} times (last line of the metrics then: {where}), {ended} runs came to their end: "
          f"{'the same' if same else 'OTHER'} weights and metrics as undisturbed")
    return same


def main():
    parser = env.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=env.natural_int, default=20, help="random kills of a training run")
    parser.add_argument("--strings", type=env.natural_int, default=1_000_000, help="hostile strings for the parser and the formulas")
    parser.add_argument("--steps", type=env.natural_int, default=100_000, help="random steps in each game against a second implementation of the rules")
    args = parser.parse_args()
    passed = True
    if args.steps:
        for name in [*RULES, "blackjack"]:
            print("{}: {} steps in {} episodes, all rewards and ends as in the second implementation".format(name, *check_rules(name, args.steps)), flush=True)
    if args.strings:
        passed &= strings(args.strings)
    if args.kills:
        passed &= kills(args.kills)
    sys.exit(not passed)


if __name__ == "__main__":
    main()
