"""README says what is there."""
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("text, file, line", re.findall(r"\[`([^`]+)`\]\((\w+\.py)#L(\d+)\)", README))
def test_links_lead_to_the_line_they_name(text, file, line):
    assert text in (ROOT / file).read_text().splitlines()[int(line) - 1]


@pytest.mark.parametrize("file", re.findall(r"\]\((docs/[^)]+)\)", README))
def test_pictures_are_there(file):
    assert (ROOT / file).stat().st_size < 500_000
