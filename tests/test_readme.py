"""README says what is there."""
import re
from pathlib import Path

import pytest

import env
import policy
import ppo
import prompts

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("text, file, line", re.findall(r"\[`([^`]+)`\]\((\w+\.py)#L(\d+)\)", README))
def test_links_lead_to_the_line_they_name(text, file, line):
    assert text in (ROOT / file).read_text().splitlines()[int(line) - 1]


@pytest.mark.parametrize("file", re.findall(r"\]\((docs/[^)]+)\)", README))
def test_pictures_are_there(file):
    assert (ROOT / file).stat().st_size < 500_000


@pytest.mark.parametrize("module, flags, words", [
    (ppo, [], "-0.7337"), (policy, ["--env", "numberline"], "log p(thoughts)"), (prompts, ["--env", "ezpoints", "--prompt", "vision"], "played:"),
    (env, ["--env", "numberline", "--seed", "1", "--picture", "game.png"], "return +1, success")])
def test_every_file_shows_what_it_is_for(module, flags, words, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [f"{module.__name__}.py", *flags])
    typed = iter(["nonsense"])  # then what the expert plays, which ends the question
    monkeypatch.setattr("builtins.input", lambda question: next(typed, question[-4]))
    module.main()
    assert words in capsys.readouterr().out
