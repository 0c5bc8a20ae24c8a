"""What to fetch before a program asks for it, when nothing is known of its start: cold starts in turns."""

from __future__ import annotations

import sys

from benchmarks.choices import Question, answer, arguments

DESCRIPTION = """\
Starts real containers on machines that have nothing yet, over an emulated link, and takes the time from the pull to the
first output: with the dynamic loader's look-ahead, with that by references, with both, and with none, in turns. None of
them has a startup trace, and nothing is completed in the background.
"""
SIDES = ("loader", "references", "both", "none")
QUESTION = Question(
    "look-ahead", "stock", {side: f'[fetch]\nlook-ahead = "{side}"\n' for side in SIDES}
)


def main() -> int:
    """Measure, print; returns the exit status."""
    print(answer(QUESTION, arguments("lookahead", DESCRIPTION)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
