"""One table and one plot: SFT, PPO and the three projects on three games.

    python docs/projects/compare.py --seeds 1,2,3 --out runs/projects

Every method gets the same SFT policy of a seed and the same number of environment steps (ILQL: as
many demonstrations). Runs that are there are reused, so the same line goes on with a comparison
that stopped. It writes compare.md and compare.png into --out.
"""
import argparse
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import env  # noqa: E402
from eval import (  # noqa: E402
    REFERENCES,
    mean_and_each,
    natural_int,
    plot,
    positive_int,
    read_metrics,
    summary,
)

PROGRAMS = {
    "ppo": "train.py",
    "grpo": "docs/projects/grpo.py",
    "archer": "docs/projects/archer.py",
    "ilql": "docs/projects/ilql.py",
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage=argparse.SUPPRESS)
    add = parser.add_argument
    add("--env", default="numberline,ezpoints,blackjack", help="the games [%(default)s]")
    add("--methods", default=",".join(PROGRAMS), help="[%(default)s]")
    add("--seeds", type=seed_list, default="1,2,3", help="[%(default)s]")
    add("--eval-episodes", type=positive_int, default=2000, help="[%(default)s]")
    add("--out", type=Path, required=True, help="folder for the runs, the table and the plot")
    args = parser.parse_args()
    if not set(args.methods.split(",")) <= set(PROGRAMS):
        parser.error(f"--methods are {', '.join(PROGRAMS)}, with commas between them")
    if not set(args.env.split(",")) <= set(env.GAMES):
        parser.error(f"--env is one of {', '.join(env.GAMES)}, or several with commas between them")

    signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C is for the run, which ends this, too
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {args.out}: {error.strerror}")
    runs = {}  # (game, method) -> `summary` of each seed
    for game in args.env.split(","):
        for method in args.methods.split(","):
            for seed in args.seeds.split(","):
                folder = args.out / f"{method}-{game}-seed{seed}"
                if not (folder / "curve.png").exists():
                    train(method, game, seed, args.eval_episodes, folder)
                run = summary(read_metrics(folder), game) | learning_cost(folder)
                runs.setdefault((game, method), []).append(run)

    text = table(runs, args.seeds)
    (args.out / "compare.md").write_text(text)
    print(text)
    curves = {}
    for (game, method), seeds in runs.items():
        if seeds[0]["curve"]:  # ILQL samples nothing while it learns
            curves[f"{game}, {method}"] = seeds
    if curves:
        figure = plot(curves)
        for axes in figure.axes:
            draw_levels(axes, runs)
        figure.savefig(args.out / "compare.png", dpi=110)


def seed_list(text):
    """The text of --seeds as it is, once each part is a seed."""
    for part in text.split(","):
        natural_int(part)
    return text


def train(method, game, seed, eval_episodes, folder):
    """Train in a process of its own, which also tells the memory that it took."""
    command = [sys.executable, ROOT / PROGRAMS[method]]
    if (folder / "config.json").exists():
        command += ["--resume", folder]
    else:
        command += ["--env", game, "--seed", seed, "--eval-episodes", eval_episodes,
                    "--out", folder]
    process = subprocess.Popen([str(part) for part in command])
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit(f"{method} on {game}, seed {seed}, was stopped, or failed")
    kilobytes = usage.ru_maxrss
    (folder / "memory.json").write_text(json.dumps({"gb": kilobytes * 1024 / 1e9}))


def learning_cost(folder):
    """Seconds between the evaluations of SFT and of RL's end, and the peak memory in GB."""
    seconds = {}
    for row in read_metrics(folder):
        if row["stage"] == "eval" and row["policy"] == "SFT":
            seconds["begin"] = row["seconds"]
        if row["stage"] in ("rl", "ilql"):
            seconds["end"] = row["seconds"]
    gigabytes = math.nan  # of a run that was not started here
    if (folder / "memory.json").exists():
        gigabytes = json.loads((folder / "memory.json").read_text())["gb"]
    return {"learning_seconds": seconds["end"] - seconds["begin"], "gb": gigabytes}


def draw_levels(axes, runs):
    """Add dashed lines to a game's panel: the SFT policy, and trained ones that have no curve."""
    methods = {method: seeds for (game, method), seeds in runs.items() if game == axes.get_title()}
    draw_level(axes, "SFT", "SFT", next(iter(methods.values())))
    for method, seeds in methods.items():
        if not seeds[0]["curve"]:
            draw_level(axes, method, "RL", seeds)
    axes.legend(frameon=False, fontsize=8)


def draw_level(axes, label, policy, seeds):
    """Draw the mean success rate of an evaluated policy as a dashed line."""
    mean = np.mean([run[policy]["success_rate"] for run in seeds])
    axes.axhline(mean, ls="--", lw=1.2, color=REFERENCES[policy], label=f"{label} {mean:.1%}")


def table(runs, seeds_named):
    """A row for each game and method; text in Markdown."""
    text = "| game, method | SFT | trained | illegal | seconds | memory |\n"
    text += "|---|---|---|---|---|---|\n"
    for (game, method), seeds in runs.items():
        sft = mean_and_each([100 * run["SFT"]["success_rate"] for run in seeds])
        rl = mean_and_each([100 * run["RL"]["success_rate"] for run in seeds])
        illegal = 100 * np.mean([run["RL"]["illegal_rate"] for run in seeds])
        seconds = np.mean([run["learning_seconds"] for run in seeds])
        gigabytes = max(run["gb"] for run in seeds)  # the largest peak
        text += (f"| {game}, {method} | {sft} | {rl} | {illegal:.1f} % | {seconds:.0f} "
                 f"| {gigabytes:.1f} GB |\n")
    episodes = sorted({run["RL"]["episodes"] for seeds in runs.values() for run in seeds})
    text += f"\nSuccess on {' or '.join(map(str, episodes))} episodes; "
    text += f"mean of seeds {seeds_named} (each). "
    return text + "Seconds: from the SFT policy to the trained one, on a shared machine.\n"


if __name__ == "__main__":
    main()
