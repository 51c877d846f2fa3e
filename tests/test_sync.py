"""Ranks in step: threads as ranks, over the stores that torch jobs have."""

import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from engine import errors
from engine.errors import CheckpointCorrupt, PeerError, StorageError
from engine.sync import Ranks, job_name
from engine.timed import TimedStore

WORLD = 4


@pytest.fixture(params=["hash", "file", "tcp"])
def store(request, tmp_path):
    """A function that gives each rank its own way to one store."""
    if request.param == "hash":
        shared = dist.HashStore()
        return lambda: shared
    if request.param == "file":
        return lambda: dist.FileStore(str(tmp_path / "store"), WORLD)
    host = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=10))
    return lambda: dist.TCPStore("localhost", host.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=10))


@pytest.fixture
def hash_store():
    """For what does not depend on the kind of store: the quickest."""
    shared = dist.HashStore()
    return lambda: shared


def together(store, act, ranks=range(WORLD), timeout_seconds=20.0):
    """``act(Ranks)`` on each of ``ranks`` at once; what each returned or raised, by rank."""

    def one(rank):
        try:
            return act(Ranks(rank, WORLD, store(), timeout_seconds))
        except BaseException as e:  # noqa: BLE001 - is what the tests look at
            return e

    with ThreadPoolExecutor(WORLD) as pool:
        return dict(zip(ranks, pool.map(one, ranks), strict=True))


def fail_on(rank, failing, error):
    if rank == failing:
        raise error
    return rank


def test_values_come_in_rank_order_on_every_rank(store):
    def act(ranks):
        time.sleep(0.02 * (WORLD - ranks.rank))
        return [ranks.gather("a", lambda: [ranks.rank, "x", None]), ranks.gather("b", lambda: {"rank": ranks.rank, "bytes": b"\0\xff"})]

    expected = [[[r, "x", None] for r in range(WORLD)], [{"rank": r, "bytes": b"\0\xff"} for r in range(WORLD)]]
    assert together(store, act) == dict.fromkeys(range(WORLD), expected)


def test_first_runs_on_rank_0_only(hash_store):
    ran = []
    assert together(hash_store, lambda ranks: ranks.first("one", lambda: ran.append(ranks.rank) or 42)) == dict.fromkeys(range(WORLD), 42)
    assert ran == [0]


@pytest.mark.parametrize("kind", errors.EngineError.__subclasses__())
def test_one_ranks_error_is_every_ranks_with_its_class_and_rank(hash_store, kind):
    found = together(hash_store, lambda ranks: ranks.gather("write", lambda: fail_on(ranks.rank, 2, kind("disk 7 is full"))))
    assert {type(error) for error in found.values()} == {kind}
    assert str(found[2]) == "disk 7 is full"
    for rank in (0, 1, 3):
        assert "write" in str(found[rank])
        assert "rank 2" in str(found[rank])
        assert "disk 7 is full" in str(found[rank])


@pytest.mark.parametrize("failing", [0, WORLD - 1])
def test_an_error_travels_over_every_store(store, failing):
    found = together(store, lambda ranks: ranks.gather("write", lambda: fail_on(ranks.rank, failing, StorageError("full"))))
    assert all(type(error) is StorageError for error in found.values())
    assert all(f"rank {failing} failed" in str(error) for rank, error in found.items() if rank != failing)


def test_a_foreign_error_arrives_as_a_peer_error_with_its_traceback(store):
    found = together(store, lambda ranks: ranks.gather("plan", lambda: fail_on(ranks.rank, 1, KeyError("bias"))))
    assert {type(error) for error in found.values()} == {PeerError}
    assert isinstance(found[1].__cause__, KeyError)
    assert all("plan: rank 1 failed" in str(error) for error in found.values())
    for rank in (0, 2, 3):
        assert "KeyError: 'bias'" in str(found[rank])
        assert "fail_on" in str(found[rank])


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_a_rank_that_is_being_ended_tells_the_others_at_once(hash_store, kind):
    began = time.monotonic()
    found = together(hash_store, lambda ranks: ranks.gather("save", lambda: fail_on(ranks.rank, 1, kind())))
    assert time.monotonic() - began < 5
    assert type(found[1]) is kind
    assert all(type(found[rank]) is PeerError and "save: rank 1 failed" in str(found[rank]) for rank in (0, 2, 3))


def test_a_message_that_utf8_cannot_carry_still_arrives(hash_store):
    found = together(hash_store, lambda ranks: ranks.gather("save", lambda: fail_on(ranks.rank, 1, StorageError("cannot write \udcff.bin"))))
    assert all(type(error) is StorageError and "cannot write" in str(error) for error in found.values())


def test_of_several_errors_the_lowest_ranks_is_told(hash_store):
    def act(ranks):
        return ranks.gather("read", lambda: fail_on(ranks.rank, ranks.rank, CheckpointCorrupt(f"seen by {ranks.rank}")))

    found = together(hash_store, act)
    assert all("seen by 0" in str(error) and type(error) is CheckpointCorrupt for error in found.values())


def test_after_an_error_the_ranks_are_still_in_step(hash_store):
    def act(ranks):
        with pytest.raises(StorageError):
            ranks.gather("write", lambda: fail_on(ranks.rank, 1, StorageError("full")))
        return ranks.gather("again", lambda: ranks.rank)

    assert together(hash_store, act) == {rank: list(range(WORLD)) for rank in range(WORLD)}


def test_a_difference_is_every_ranks_error_and_names_who_differs(hash_store):
    found = together(
        hash_store, lambda ranks: ranks.agree("save", lambda: {"are at another step": [7 if ranks.rank == 2 else 5], "have other names": b"x"})
    )
    for error in found.values():
        assert type(error) is PeerError
        assert "save: ranks [2] are at another step than rank 0 ([7] and [5])" in str(error)


def test_a_rank_that_never_comes_is_named_within_the_timeout(store):
    began = time.monotonic()
    found = together(store, lambda ranks: ranks.gather("save", lambda: None), [0, 1, 3], timeout_seconds=0.8)
    assert time.monotonic() - began < 0.8 * 1.25 + 2
    for error in found.values():
        assert type(error) is PeerError
        assert "ranks [2] did not report within" in str(error)
        assert "rank 2 failed" in str(error)


def test_without_rank_0_the_others_give_up_within_the_timeout(store):
    began = time.monotonic()
    found = together(store, lambda ranks: ranks.gather("save", lambda: None), [1, 2, 3], timeout_seconds=0.8)
    assert time.monotonic() - began < 0.8 * 1.25 + 2
    assert all(type(error) is PeerError and "for rank 0" in str(error) and "rank 0 failed" in str(error) for error in found.values())


def test_rank_0_that_comes_after_the_others_gave_up_learns_of_it(hash_store):
    """One decision: rank 0 cannot commit what the others have already aborted."""
    gone = together(hash_store, lambda ranks: ranks.gather("save", lambda: None), [1, 2, 3], timeout_seconds=0.8)
    late = together(hash_store, lambda ranks: ranks.gather("save", lambda: None), [0])
    assert {type(error) for error in (gone | late).values()} == {PeerError}


def test_a_rank_that_comes_after_the_decision_learns_of_it(hash_store):
    present = together(hash_store, lambda ranks: ranks.gather("save", lambda: None), [0, 1, 3], timeout_seconds=0.8)
    late = together(hash_store, lambda ranks: ranks.gather("save", lambda: None), [2])
    assert all("ranks [2] did not report" in str(error) for error in (present | late).values())


def test_a_rank_that_did_not_come_is_waited_for_less_long_the_next_time(hash_store):
    def act(ranks):
        for patience in ("8 s", "2 s"):
            with pytest.raises(PeerError, match=rf"ranks \[3\] did not report within {patience}"):
                ranks.gather("save", lambda: None)

    assert together(hash_store, act, [0, 1, 2], timeout_seconds=8.0) == dict.fromkeys(range(3))


def test_after_rounds_that_were_given_up_a_late_rank_finds_each_decision_and_all_go_on(hash_store):
    late, shared = threading.Event(), hash_store()

    def act(ranks):
        if ranks.rank == 2:
            late.wait(60)
        for _ in range(2):
            with pytest.raises(PeerError, match="did not report"):
                ranks.gather("save", lambda: None)
        if ranks.rank == 0:
            late.set()
        ranks.timeout_seconds = 80.0
        return ranks.gather("save", lambda: ranks.rank)

    assert together(hash_store, act, timeout_seconds=0.3) == {rank: [0, 1, 2, 3] for rank in range(WORLD)}
    assert not any(shared.check([f"lockstep/{past}/decision"]) for past in (1, 2)), "all have read them"


def test_what_others_gave_up_is_not_carried_out(hash_store):
    """Rank 0 comes when the others have decided that it did not."""
    done = []

    def act(ranks):
        return ranks.round("save", lambda: None, lambda _: done.append(1), changes="committed")

    gone = together(hash_store, act, [1, 2, 3], timeout_seconds=0.4)
    late = together(hash_store, act, [0])
    assert {type(error) for error in (gone | late).values()} == {PeerError}
    assert not done
    assert not any("MAY HAVE BEEN" in str(error) for error in (gone | late).values())


def test_ranks_wait_for_what_rank_0_carries_out(store):
    def act(ranks):
        return ranks.round("save", lambda: ranks.rank, lambda values: time.sleep(0.3) or values, changes="committed")

    assert together(store, act) == {rank: [0, 1, 2, 3] for rank in range(WORLD)}


@pytest.mark.parametrize("changes", ["committed", ""])
def test_ranks_that_give_up_while_rank_0_carries_out_its_decision_do_not_say_that_it_failed(hash_store, changes):
    """As where rank 0 is paused between its claim and its word that it is done. What changes nothing is decided by who is first."""
    gave_up = threading.Barrier(WORLD)

    def act(ranks):
        def conclude(values):
            gave_up.wait(60)
            return "done"

        try:
            found = ranks.round("save", lambda: None, conclude, changes=changes)
        except PeerError as e:
            found = str(e)
        if ranks.rank:
            gave_up.wait(60)
        ranks.timeout_seconds = 80.0
        return found, ranks.gather("save", lambda: ranks.rank)

    found = together(hash_store, act, timeout_seconds=0.3)
    assert [again for _, again in found.values()] == [[0, 1, 2, 3]] * WORLD, "they are in step again"
    if changes:
        assert found[0][0] == "done"
        assert all("THE STEP MAY HAVE BEEN COMMITTED all the same" in found[rank][0] for rank in (1, 2, 3))
    else:
        assert all("for rank 0; it is dead, stuck or much slower" in text for text, _ in found.values())


def test_a_round_ends_in_time_where_the_stores_host_is_stopped_and_goes_on_with_it():
    """Torch's own calls wait for as long as the host is stopped."""
    host = subprocess.Popen([sys.executable, "-c", _HOST], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert host.stdout is not None
        port = int(host.stdout.readline())
        ways = [TimedStore(dist.TCPStore("localhost", port, is_master=False, wait_for_workers=False)) for _ in range(2)]
        ranks = [Ranks(rank, 2, ways[rank], 60.0) for rank in range(2)]

        def act(one):
            try:
                return one.round("save", lambda: one.rank, lambda values: values, changes="committed")
            except PeerError as e:
                return str(e)

        with ThreadPoolExecutor(2) as pool:
            assert list(pool.map(act, ranks)) == [[0, 1]] * 2
            host.send_signal(signal.SIGSTOP)
            for one in ranks:
                one.timeout_seconds = 1.0
            began = time.monotonic()
            for text in pool.map(act, ranks):
                assert "in vain for the job's store" in text
                assert "MAY HAVE BEEN COMMITTED" in text
            assert time.monotonic() - began < 30, "not as long as the host is stopped"
            host.send_signal(signal.SIGCONT)
            for one in ranks:
                one.timeout_seconds = 80.0
            assert list(pool.map(act, ranks)) == [[0, 1]] * 2, "the calls that were given up have been made since"
    finally:
        host.kill()
        host.wait()


_HOST = """
import sys, torch.distributed as dist
store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("slow", [0, 2])
def test_a_rank_that_is_slow_but_lives_is_waited_for(hash_store, slow):
    """Longer than the timeout, for as long as it shows signs of life; nothing of them is left in the store."""

    def act(ranks):
        def work():
            end = time.monotonic() + 2.0
            while ranks.rank == slow and time.monotonic() < end:
                ranks.sign()
                time.sleep(0.01)
            return ranks.rank

        return ranks.gather("save", work)

    assert together(hash_store, act, timeout_seconds=0.4) == {rank: [0, 1, 2, 3] for rank in range(WORLD)}
    assert not any(hash_store().check([f"lockstep/1/alive/{rank}"]) for rank in range(WORLD))


class LostStore:
    """A store whose host has ended after some calls."""

    def __init__(self, store, calls) -> None:
        self._store, self._calls, self._lock = store, calls, threading.Lock()

    def __getattr__(self, name):
        with self._lock:
            self._calls -= 1
            if self._calls < 0:
                raise dist.DistNetworkError("connection reset by peer")
        return getattr(self._store, name)


def test_a_lost_store_is_a_peer_error_at_once():
    for calls in range(12):
        shared = dist.HashStore()

        def act(ranks, calls=calls):
            if ranks.rank == 1:
                ranks.store = LostStore(ranks.store, calls % 4)
            return ranks.gather("save", lambda: None)

        found = together(lambda shared=shared: shared, act, timeout_seconds=0.4)
        if isinstance(found[1], Exception):
            assert type(found[1]) is PeerError
            assert "rank 1 lost the job's store" in str(found[1]) or "did not report" in str(found[1])


def test_keys_of_past_rounds_are_deleted():
    shared = dist.HashStore()
    counts = []

    def act(ranks):
        for i in range(10):
            ranks.gather("round", lambda i=i: fail_on(i, 99, None))
            if ranks.rank == 0:
                counts.append(shared.num_keys())

    found = together(lambda: shared, act)
    assert found == dict.fromkeys(range(WORLD))
    assert max(counts) <= 2 * (WORLD + 1), f"keys grow: {counts}"
    for past in range(1, 10):
        assert not any(shared.check([f"lockstep/{past}/{key}"]) for key in (*range(WORLD), "decision"))


def test_many_rounds_keep_their_order(store):
    def act(ranks):
        return [ranks.gather("round", lambda i=i: i * 10 + ranks.rank) for i in range(20)]

    expected = [[i * 10 + rank for rank in range(WORLD)] for i in range(20)]
    assert together(store, act) == dict.fromkeys(range(WORLD), expected)


def named(store, ranks=range(WORLD), timeout_seconds=20.0, delays=(0.0,) * WORLD):
    def one(rank):
        time.sleep(delays[rank])
        try:
            return job_name(store(), rank, WORLD, timeout_seconds)
        except PeerError as e:
            return str(e)

    with ThreadPoolExecutor(WORLD) as pool:
        return dict(zip(ranks, pool.map(one, ranks), strict=True))


@pytest.mark.parametrize("delays", [(0.0,) * WORLD, (0.1, 0, 0, 0), (0, 0.1, 0, 0.1)], ids=["together", "rank 0 late", "others late"])
def test_jobs_that_follow_each_other_on_one_store_have_names_of_their_own(store, delays):
    """torchrun starts a job anew on the store of the last one, in which all its keys still are: pytorch#135712."""
    names = []
    for _ in range(3):
        found = named(store, delays=delays)
        assert len(set(found.values())) == 1, found
        names.append(found[0])
    assert len(set(names)) == 3


def test_a_rank_takes_no_name_of_a_job_that_has_ended(hash_store):
    named(hash_store)
    assert named(hash_store, ranks=(1,), timeout_seconds=0.2) == {
        1: "attach: rank 0 did not answer in time; look at the other ranks' logs for a crash or a hang"
    }


def test_a_rank_that_does_not_attach_is_named(hash_store):
    named(hash_store)
    found = named(hash_store, ranks=(0, 1, 3), timeout_seconds=0.2)
    assert found[0].startswith("attach: ranks [2] did not come in time")
    assert found[1] == found[3]
    assert found[1].startswith("attach: rank 0 did not answer")


def test_one_rank_alone_needs_no_store():
    ranks = Ranks()
    assert ranks.gather("a", lambda: 3) == [3]
    assert ranks.first("b", lambda: 4) == 4
    with pytest.raises(ZeroDivisionError):
        ranks.gather("d", lambda: 1 / 0)


class Slow:
    """A way to a store on which decisions take long to arrive."""

    def __init__(self, store) -> None:
        self._store = store

    def __getattr__(self, name):
        return getattr(self._store, name)

    def get(self, key):
        time.sleep(0.4)
        return self._store.get(key)


def test_rank_0_whose_process_may_host_the_store_leaves_last(hash_store):
    left = []

    def act(ranks):
        if ranks.rank == 3:
            ranks.store = Slow(ranks.store)
        ranks.leave()
        left.append(ranks.rank)
        with pytest.raises(PeerError, match="the ranks have left"):
            ranks.gather("more", lambda: 1)

    assert together(hash_store, act) == dict.fromkeys(range(WORLD))
    assert left[-1] == 0


def test_a_rank_does_not_wait_long_for_others_to_leave(hash_store):
    began = time.monotonic()
    assert together(hash_store, lambda ranks: ranks.leave(0.2), ranks=[0, 2]) == {0: None, 2: None}
    assert time.monotonic() - began < 5
