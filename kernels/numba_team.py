"""The threads that run one kernel call together: who they are, how they share out items, how they wait for each other.

A call is an array of int64. It begins with counters, each on a cache line of its own, that are 0 when the call
starts and when it ends; what follows them is the kernels' business (``numba_call.py``).
"""

from .numba_simd import atomic_add, atomic_load, call_function, jit, pause

# int64 values on a cache line of 64 bytes
LINE = 8
(TICKET, BARRIER, PACKING, PROJECTING, PARTS_TAKEN, PRODUCTS, SUMMING, LEAVING, COUNTERS) = range(0, 9 * LINE, LINE)
# Addresses of C functions, 0 where there is none: omp_get_num_threads and sched_yield.
TEAM_SIZE, YIELD = COUNTERS, COUNTERS + 1
FIRST_FIELD = COUNTERS + 2

# Looks at a barrier before a thread offers its core to others: a few microseconds.
SPINS = 2000


@jit
def team_size(call):
    """How many threads run this call: never more than were asked for, sometimes fewer."""
    return call_function(call[TEAM_SIZE]) if call[TEAM_SIZE] != 0 else 1


@jit
def take(call, counter):
    """The number of the next item of a list that the threads share out among themselves."""
    return atomic_add(call, counter, 1)


@jit
def leave(call, team):
    """The last thing that a thread does: the last one of the team makes the call ready to be run again."""
    if take(call, LEAVING) + 1 == team:
        for counter in range(0, COUNTERS, LINE):
            call[counter] = 0


@jit
def wait_for(call, barrier, arrivals):
    """Arrive at a barrier, and wait until ``arrivals`` threads have done so since the call began.

    All of them run already, each on a thread of its own: none can keep the others waiting for good.
    """
    atomic_add(call, barrier, 1)
    spins = 0
    while atomic_load(call, barrier) < arrivals:
        pause()
        spins += 1
        if spins >= SPINS and call[YIELD] != 0:
            call_function(call[YIELD])
