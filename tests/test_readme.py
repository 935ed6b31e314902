"""README and docs/ say what is there: links, names of code, quoted code, command lines."""
import ast
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

import env
import eval as evaluation
import policy
import ppo
import prompts
import train

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
CODE_FILES = sorted(ROOT.glob("*.py"))

NAMES_IN_FILE = re.compile(
    r"((?:`[\w.]+`(?:,\s+|\s+and\s+)?)+)"     # `name`, or several with commas and "and"
    r"\s+in\s+\[?`?((?:\w+/)*\w+\.py)\b")     # in file.py, as text, code or link
LINK = re.compile(r"\]\(([^)\s]+)\)")


def every_page(function):
    return pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)(function)


# -- Reading Markdown


def code_blocks(page):
    """The fenced blocks of a page: a list of (language, text)."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def without_code_blocks(text):
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def sentences(text):
    """The sentences of a page's prose, without tables, code blocks, formulas and headings.

    A sentence ends at a full stop, a question mark or an exclamation mark with a space behind it,
    or at the end of a paragraph or list item. Words are what stands between spaces, in code as
    well. The target of a link is no word.
    """
    # Gather the lines of each paragraph and list item
    paragraphs = [[]]
    for line in without_code_blocks(text).splitlines():
        is_formula = line.startswith("    ")
        if not line.strip() or is_formula or line.startswith(("#", "|", "![")):
            paragraphs.append([])
            continue
        if re.match(r"(\*|\d+\.) ", line):
            paragraphs.append([])
            line = line.partition(" ")[2]
        paragraphs[-1].append(line.strip())

    found = []
    for lines in paragraphs:
        paragraph = re.sub(r"\]\([^)]*\)", "]", " ".join(lines))
        found += re.split(r"(?<=[.!?])[*)]*\s+", paragraph)
    return [sentence for sentence in found if sentence]


def anchors(page):
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", without_code_blocks(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@cache
def names_in(file):
    """All names that a Python file defines: functions, classes, constants, and those of a class as
    Class.method and Class.attribute."""
    names = set()
    for node in ast.parse((ROOT / file).read_text()).body:
        names |= names_of(node)
        if isinstance(node, ast.ClassDef):
            for part in node.body:
                names |= {f"{node.name}.{name}" for name in names_of(part)}
    return names


def names_of(node):
    """The names that a statement defines."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, ast.AnnAssign):
        return {node.target.id}
    if isinstance(node, ast.Assign):
        return {target.id for target in node.targets if isinstance(target, ast.Name)}
    return set()


def commands(page):
    """The command lines in a page's blocks and tables, each as one line."""
    texts = [text for _, text in code_blocks(page)]
    texts += re.findall(r"`([^`\n]*\.py [^`\n]*)`", without_code_blocks(page.read_text()))
    lines = []
    for text in texts:
        lines += text.replace("\\\n", " ").splitlines()
    return lines


# -- The tests


def test_readme_is_short():
    assert len(README.read_bytes()) <= 10_000


@every_page
def test_sentences_have_at_most_25_words(page):
    too_long = [text for text in sentences(page.read_text()) if len(text.split()) > 25]
    assert not too_long


def test_sentences_are_counted_as_a_reader_counts():
    text = (
        "# A heading. Of two\n\n"
        "One two\nthree. `python train.py --env x` runs! See [a page](b.md).\n\n"
        "* An item\n  goes on\n* and another\n\n    a formula. With dots\n\n"
        "| a table. | cells |\n\n```\ncode. Block\n```\n"
    )
    assert sentences(text) == [
        "One two three.", "`python train.py --env x` runs!", "See [a page].", "An item goes on",
        "and another",
    ]


@every_page
def test_lines_have_at_most_100_columns(page):
    # Tables, links, and the two lines that are copied in one piece may be longer
    for line in page.read_text().splitlines():
        may_be_long = line.startswith(("|", "python3 -m venv")) or "](" in line
        assert len(line) <= 100 or may_be_long


@every_page
def test_links_lead_to_what_is_there(page):
    for target in LINK.findall(page.read_text()):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name) if name else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file), target


@every_page
def test_code_that_is_named_is_there(page):
    found = NAMES_IN_FILE.findall(page.read_text())
    assert found or page.name == "running.md"
    for names, file in found:
        for name in re.findall(r"`([\w.]+)`", names):
            assert name in names_in(file), f"{name} in {file}"


def test_names_that_are_not_there_are_found():
    text = "`act`, `VLMPolicy.act` and\n`Answer.tokens` in [policy.py](policy.py)"
    [(names, file)] = NAMES_IN_FILE.findall(text)
    missing = [name for name in re.findall(r"`([\w.]+)`", names) if name not in names_in(file)]
    assert missing == ["act"]


@every_page
def test_code_that_is_quoted_is_there(page):
    lines = {line.strip() for file in CODE_FILES for line in file.read_text().splitlines()}
    # A comment behind the code may be left out
    lines |= {re.sub(r"\s+# .*", "", line) for line in lines}
    for language, text in code_blocks(page):
        if language == "python":
            for line in text.splitlines():
                assert line.strip() in lines


@every_page
def test_command_lines_have_flags_that_exist(page):
    parsers = {"train.py": train.make_parser, "eval.py": evaluation.make_parser}
    for line in commands(page):
        match = re.search(r"(?:python|torchrun .*?) ?(?<!\S)(train\.py|eval\.py) (.*)", line)
        if match and match[2] != "--help":
            flags = match[2].replace("$seed", "1").replace("$n", "300").partition(";")[0]
            parsers[match[1]]().parse_args(shlex.split(flags))
        for file in re.findall(r"tests/\w+\.py", line):
            for flag in re.findall(r"--[a-z-]+", line):
                assert f'"{flag}"' in (ROOT / file).read_text(), line


def test_pictures_are_small():
    pictures = [file for file in (ROOT / "docs").iterdir() if file.suffix != ".md"]
    assert pictures
    assert all(picture.stat().st_size < 500_000 for picture in pictures)


@pytest.mark.parametrize("module, flags, words", [
    (ppo, [], "-0.7337"),
    (policy, ["--env", "numberline"], "log p(thoughts)"),
    (prompts, ["--env", "ezpoints", "--prompt", "vision"], "played:"),
    (env, ["--env", "numberline", "--seed", "1", "--picture", "game.png"], "return +1, success"),
    (evaluation, ["--env", "blackjack", "--policy", "expert", "--episodes", "20"], "expert"),
], ids=["ppo", "policy", "prompts", "env", "eval"])
def test_every_file_shows_what_it_is_for(module, flags, words, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [f"{module.__name__}.py", *flags])
    typed = ["nonsense"]  # first; then what the expert plays, which ends the question

    def answer(question):
        if typed:
            return typed.pop()
        return re.search(r"the expert plays (\S+)\)", question)[1]

    monkeypatch.setattr("builtins.input", answer)
    module.main()
    assert words in capsys.readouterr().out
