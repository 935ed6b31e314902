"""Does training un-learn? Prints, for finished runs, how far each fell after its best time.

    for seed in 1 2 3; do for n in 300 301 1000; do
        python train.py --env numberline --seed $seed --eval-episodes $n --out DIR/$seed-$n
    done; done
    python tests/streams.py DIR

Another number of evaluation episodes shifts the random numbers of PPO: it is another run from the
same SFT policy, whose weights are reused. DIR and all folders in it are searched for runs.

A run's success rate is taken over a fifth of its rollouts at a time, a moving window: single
rollouts have too few episodes. The fall is the rate of the best window minus that of the last one.
The best of many windows is the best by chance, too. So a fall of a few points means nothing in
Blackjack, where a fifth has about 1,500 episodes.
"""
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from eval import read_metrics  # noqa: E402
from policy import read_config  # noqa: E402


def main():
    folders = [Path(name) for name in sys.argv[1:]]
    if not folders:
        raise SystemExit(__doc__)

    # Collect the runs: task -> (seed, success of the evaluation, best window, last window)
    runs = {}
    for folder in folders:
        for file in sorted(folder.rglob("curve.png")):
            config = read_config(file.parent)
            rows = read_metrics(file.parent)
            if not any(row["stage"] == "rl" for row in rows):
                continue  # ILQL samples nothing while it learns
            final = [row["success_rate"] for row in rows if row.get("policy") in ("RL", "CNN + RL")][0]
            windows = window_rates([row for row in rows if row["stage"] == "rl"])
            runs.setdefault(config.env, []).append((config.seed, final, max(windows), windows[-1]))
    if not runs:
        raise SystemExit("no finished run is in " + ", ".join(map(str, folders)))

    print("| task, its runs | RL: mean | lowest | largest fall | each run's success |")
    print("|---|---|---|---|---|")
    for task, results in runs.items():
        _, finals, best, last = np.array(sorted(results)).T
        falls = best - last
        each = ", ".join(f"{100 * rate:.1f}" for rate in finals)
        print(f"| {task}, {len(finals)} | {finals.mean():.1%} | {finals.min():.1%} "
              f"| {100 * falls.max():.1f} points | {each} |")


def window_rates(rows):
    """Success rates over a fifth of the rollouts, one for each place where the window can stand."""
    size = max(len(rows) // 5, 1)
    successes = [(row["success_rate"] or 0) * row["episodes"] for row in rows]
    episodes = [row["episodes"] for row in rows]
    rates = []
    for start in range(len(rows) - size + 1):
        window = slice(start, start + size)
        rates.append(sum(successes[window]) / sum(episodes[window]))
    return rates


if __name__ == "__main__":
    main()
