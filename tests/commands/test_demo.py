"""demo: the story is told, the proof is a proof, nothing is left behind."""

from __future__ import annotations

import json
import signal

import pytest

from tests.conftest import no_process_is_left
from xsave.commands.story import Story, judge
from xsave.compare import Comparison
from xsave.errors import GuestStateError

FINE = Comparison(10, 10, 6, 3, 1, 0, (), ())


def told(**facts):
    story = Story(ticks={"a": [1, 2], "b": [3], "c": [4, 5]}, hashes={"x"})
    story.facts = {"image_identical": True} | facts
    return story


def test_a_sound_story_passes():
    judge(told(), FINE)


@pytest.mark.parametrize(
    "ticks", [{"a": [1, 2], "b": [4]}, {"a": [1, 2], "b": [2, 3]}, {"a": [2, 3]}, {"a": [2, 1]}]
)
def test_missing_and_repeated_ticks_fail(ticks):
    """A tick left out, counted twice, or not begun at 1 is a gap."""
    story = told()
    story.ticks = ticks
    with pytest.raises(GuestStateError, match="gap"):
        judge(story, FINE)


def test_another_hash_fails():
    """The guest's memory did not survive if its hash changed."""
    story = told()
    story.hashes = {"x", "y"}
    with pytest.raises(GuestStateError):
        judge(story, FINE)


def test_a_page_that_differs_fails():
    with pytest.raises(GuestStateError, match="0x2a"):
        judge(told(), Comparison(10, 10, 5, 3, 1, 0, (0x2A,), ()))


def test_another_image_fails():
    with pytest.raises(GuestStateError, match="image"):
        judge(told(image_identical=False), FINE)


def test_the_whole_story(xsave, xsave_home):
    """In seconds: saved, restored, migrated, proven; stdout is the JSON, stderr the story."""
    result = xsave.ok("demo", "--memory", "32M", "--touch", "4M", "--json")
    answer = json.loads(result.out)
    assert answer["gapless"]
    assert answer["image_identical"]
    assert answer["different"] == []
    assert answer["nr_pages"] == 32 << 8
    assert list(answer["ticks"]) == ["created on a", "restored on b", "migrated to a"]
    assert "* migrate from b to a" in result.err
    assert list(xsave_home.iterdir()) == []
    assert no_process_is_left(xsave_home)


def test_an_interrupted_story_leaves_nothing(xsave, xsave_home):
    """Ctrl-C in the middle: 130, no process, no file."""
    process = xsave.start("demo", "--memory", "32M")
    for line in process.stdout:
        if b"TICK 1" in line:
            break
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert list(xsave_home.iterdir()) == []
    assert no_process_is_left(xsave_home)
