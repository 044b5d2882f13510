"""Old objects are left alone by the collector while rollouts are played, and not a moment longer."""

import gc
import weakref

import pytest

from art_mcp.agent.heap import older_objects_left_alone


class Cycle:
    def __init__(self):
        self.me = self


@pytest.fixture(autouse=True)
def others():
    """How many objects are frozen though nobody froze any: some of Python's own, in 3.12."""
    before = gc.get_freeze_count()
    assert before < 1000
    yield before
    gc.unfreeze()


def test_older_objects_are_frozen_until_the_last_of_the_blocks_that_overlap_ends(others):
    first, second = older_objects_left_alone(), older_objects_left_alone()
    first.__enter__()
    second.__enter__()
    assert gc.get_freeze_count() > 1000
    first.__exit__(None, None, None)
    assert gc.get_freeze_count() > 1000
    second.__exit__(None, None, None)
    assert gc.get_freeze_count() <= others


def test_garbage_of_the_block_is_collected_in_it_and_older_garbage_after_it():
    cycle = Cycle()
    older = weakref.ref(cycle)
    with older_objects_left_alone():
        del cycle
        younger = weakref.ref(Cycle())
        gc.collect()
        assert (older() is None, younger() is None) == (False, True)
    gc.collect()
    assert older() is None


def test_a_block_that_fails_lets_go():
    with pytest.raises(ValueError, match="world"), older_objects_left_alone():
        raise ValueError("the world")
    assert gc.get_freeze_count() < 1000


def test_what_the_process_froze_itself_stays_frozen():
    gc.freeze()
    with older_objects_left_alone():
        pass
    assert gc.get_freeze_count() > 1000
