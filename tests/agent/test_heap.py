"""Old objects are left alone by the collector while rollouts are played, and not a moment longer."""

import gc
import weakref

import pytest

from art_mcp.agent.heap import collect, collections_between_steps


class Cycle:
    def __init__(self):
        self.me = self


@pytest.fixture(autouse=True)
def others():
    """How many objects are frozen though nobody froze any: some of Python's own, in 3.12."""
    before, thresholds = gc.get_freeze_count(), gc.get_threshold()
    assert before < 1000
    gc.set_threshold(700, 10, 10)  # Python's own; these tests' are others
    yield before
    gc.unfreeze()
    gc.set_threshold(*thresholds)


def test_older_objects_are_frozen_until_the_last_of_the_blocks_that_overlap_ends(others):
    first, second = collections_between_steps(), collections_between_steps()
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
    with collections_between_steps():
        del cycle
        younger = weakref.ref(Cycle())
        gc.collect()
        assert (older() is None, younger() is None) == (False, True)
    gc.collect()
    assert older() is None


def test_a_block_that_fails_lets_go():
    with pytest.raises(ValueError, match="world"), collections_between_steps():
        raise ValueError("the world")
    assert gc.get_freeze_count() < 1000


def test_what_the_process_froze_itself_stays_frozen():
    gc.freeze()
    with collections_between_steps():
        pass
    assert gc.get_freeze_count() > 1000


def test_all_younger_objects_are_looked_at_when_asked_for_and_not_in_between():
    def full_collections():
        return gc.get_stats()[2]["collections"]

    before = gc.get_threshold()
    with collections_between_steps():
        collect()
        seen = full_collections()
        kept = [[] for _ in range(300_000)]
        assert (len(kept), full_collections()) == (300_000, seen)
        garbage = weakref.ref(Cycle())
        collect()
        assert (garbage(), full_collections()) == (None, seen + 1)
    assert gc.get_threshold() == before


def test_nothing_is_collected_outside_of_a_block_nor_where_the_process_collects_nothing():
    garbage = weakref.ref(Cycle())
    collect()
    gc.disable()
    try:
        with collections_between_steps():
            collect()
            assert garbage() is not None
    finally:
        gc.enable()
