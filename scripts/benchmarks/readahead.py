"""How much the kernel should read ahead on the lazy mount: cold starts from a published cache, in turns."""

from __future__ import annotations

import sys

from benchmarks.choices import Question, answer, arguments

DESCRIPTION = """\
Starts real containers on machines that have nothing yet, over an emulated link, from a published cache without a trace,
and takes the time from the pull to the first output, and the bytes over the link: with 16 KiB of readahead by the
kernel on the lazy mount, as it is unless configured, with none, with 64 KiB, and with 128, the kernel's own, in turns.
More of it is fewer requests to the daemon, and more bytes that nobody asked for.
"""
SIZES = (16, 0, 64, 128)  # KiB
QUESTION = Question(
    "readahead",
    "published",
    {f"{size} KiB": f"readahead-kib = {size}\n" for size in SIZES},
    complete=True,  # as it comes
)


def main() -> int:
    """Measure, print; returns the exit status."""
    print(answer(QUESTION, arguments("readahead", DESCRIPTION)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
