"""Let hostile guests loose, one seed after the other, for as long as it is asked for.

    python -m tests.fuzz.guest --minutes 60             (make fuzz-guest MINUTES=60)
    python -m tests.fuzz.guest --seed 1234 --lives 1    that guest once more

A finding is printed with the command that repeats it, and ends the run with status 1 (not with
--go-on). Real time decides how far a guest comes between two requests, so what depends on that
may need a few repetitions (--lives 20 --same).
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter

from tests.conftest import end_processes, make_home
from tests.fuzz.guest.deeds import DEEDS
from tests.fuzz.guest.forks import patched_forks
from tests.fuzz.guest.life import Finding, Life, World

_LIFE_S = 0.6
_LONGEST_LIFE_S = 400
_PROGRESS_S = 30


def main():
    """Parse the options, run, report."""
    parser = argparse.ArgumentParser(prog="tests.fuzz.guest", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--lives", type=int, default=1 << 60)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--same", action="store_true", help="the same seed again and again")
    parser.add_argument("--only", action="append", choices=sorted(DEEDS), help="only these deeds")
    parser.add_argument("--seconds", type=float, default=_LIFE_S, help="the longest life")
    parser.add_argument("--go-on", action="store_true", help="after a finding")
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    if options.seed is None:
        options.seed = random.SystemRandom().randrange(1 << 31)
        if options.minutes == 1e9 and options.lives == 1 << 60:
            options.minutes = 1
    signal.signal(signal.SIGALRM, _too_long)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # leave nothing then either
    sys.exit(1 if run(options) else 0)


def _too_long(*_):
    raise Finding(f"a life of more than {_LONGEST_LIFE_S} s")


def run(options):
    """Return how many findings there were."""
    end = time.monotonic() + options.minutes * 60
    seed, done, findings, told = options.seed, 0, 0, time.monotonic()
    longest, what = 0.0, Counter()
    while done < options.lives and time.monotonic() < end:
        with Session() as world:
            for _ in range(200):
                if done >= options.lives or time.monotonic() >= end:
                    break
                life = Life(world, seed, only=options.only)
                signal.alarm(_LONGEST_LIFE_S)
                try:
                    life.live(options.seconds)
                except Exception as error:  # noqa: BLE001 - each is a finding
                    findings += 1
                    report(seed, life, error, options)
                    if not options.go_on:
                        return findings
                    break  # in a fresh world
                finally:
                    signal.alarm(0)
                    done += 1
                    seed += not options.same
                longest = max(longest, life.longest)
                what.update(life.states)
                what.update(text.split(":")[0] for text in life.seen)
                if options.verbose:
                    print(
                        seed - 1,
                        sorted(life.states),
                        life.seen,
                        f"{life.longest:.2f} s",
                        life.crossings,
                        len(life.kernel.names),
                        life.crash,
                    )
                if time.monotonic() - told > _PROGRESS_S:
                    told = time.monotonic()
                    print(
                        f"{done} guests, now seed {seed}; longest answer {longest:.2f} s; "
                        f"{dict(what)}",
                        flush=True,
                    )
    print(
        f"{done} guests, {findings} findings, longest answer {longest:.2f} s of CPU; {dict(what)}"
    )
    return findings


def report(seed, life, error, options):
    """Print a finding and how to see it again."""
    again = "".join(f" --only '{deed}'" for deed in options.only or ())
    print(f"FINDING at seed {seed}: {type(error).__name__}: {error}")
    print(f"  deeds: {Counter(life.kernel.names)}; {life.seen}")
    print(f"  again: python -m tests.fuzz.guest --seed {seed} --lives 1{again}", flush=True)
    if not isinstance(error, Finding):
        import traceback

        traceback.print_exception(error)


class Session:
    """A world of its own, with its home."""

    def __enter__(self):
        self.home = make_home()
        os.environ["XSAVE_HOME"] = str(self.home)
        self.directory = tempfile.mkdtemp(prefix="fuzz-guest-", dir=self.home)
        self.forks = patched_forks()
        return World(self.forks, self.directory)

    def __exit__(self, *_):
        self.forks.kill()
        end_processes(self.home)
        shutil.rmtree(self.home, ignore_errors=True)


if __name__ == "__main__":
    main()
