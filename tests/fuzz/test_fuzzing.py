"""The means of fuzzing: an example that does not end is ended, and a spoiled text is another one."""

import re
import subprocess
import sys

import pytest
from fuzzing import EDITS, LONGEST, Hang, limited, spoil


def test_an_example_that_computes_without_end_is_ended():
    def endless():
        while True:
            pass

    with pytest.raises(Hang, match=r"more than 0\.05 seconds of computing"):
        limited(endless, seconds=0.05)()


def test_an_example_that_waits_is_not_ended():
    longer = "import time\nwhile time.process_time() < 1: pass"
    limited(lambda: subprocess.run([sys.executable, "-c", longer], check=True), seconds=0.5)()


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("delete", "one  three"),
        ("double", "one twotwo three"),
        ("insert", "one Xtwo three"),
        ("replace", "one X three"),
        ("swap", "one  twothree"),
        ("repeat", "one twotwotwo three"),
    ],
)
def test_a_change_is_made_at_one_token(kind, text):
    assert spoil("one two three", [(kind, 2 + 6 * 10_007 * (kind == "repeat"), "X")], re.compile(r"(\s)")) == text


def test_a_spoiled_text_has_a_bound():
    assert len(spoil("x" * 9, [(kind, 10_006, "y" * LONGEST) for kind in EDITS] * 9, re.compile("(x)"))) <= LONGEST
