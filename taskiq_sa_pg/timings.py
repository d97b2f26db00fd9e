"""Internal timings of a backend and a broker, in one record, so that tests can shorten them."""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Timings:
    """Times in seconds, except for the last two. No argument sets them; the reasons are here.

    Attributes:
        keep_connection: How long a connection stays checked out between statements. Afterwards it
            returns to the pool, so that pool_recycle and pool_pre_ping take effect.
        between_looks: Interval of polls while listening: finds rows stored without a notification.
        between_unheard_looks: The same without a listener; taskiq's own interval is 0.2.
        between_any_looks: Minimum interval between two polls, whatever requests them.
        between_probes: Interval of the listener's probes, and the time limit of each.
        first_reconnect: Delay before a lost listener reconnects; each failure doubles it.
        last_reconnect: Maximum of that delay.
        after_notification: Pause after a notification of one task. A notification takes a
            database-wide lock, so under load the ids of several batches share one.
        after_notifications: Pause after a notification of several tasks.
        after_hint: Pause after a notification of new tasks. Only idle workers need it.
        lock: How long a step of the schema waits for a lock. Other transactions queue behind it, so
            the step gives up and retries.
        status_retry: How long storing a status is retried; the task waits for it.
        between_polls: Interval of a worker's polls while listening: finds tasks whose notification
            was lost.
        between_unheard_polls: The same without a listener.
        between_busy_polls: Pause before a worker polls again if another worker is claiming tasks.
        unused_claim: How long a worker keeps claimed tasks that it has not begun to execute;
            then it returns them for other workers.
        end_of_claim: How long a stopping worker waits for its last claim, and then tries to return
            its tasks. If PostgreSQL is unreachable, they are redelivered when their lease ends.
        between_beats: Interval of a worker's heartbeats.
        beat: How long one heartbeat is retried; the next one follows soon.
        end_of_beat: How long a stopping worker tries to delete its row.
        max_pending_notifications: With more ids than this, they are not notified one by one,
            because a poll costs less.
        pruned_at_once: Maximum number of rows that one pruning transaction deletes. With 200,
            storing a result meanwhile takes 1.2 ms instead of 1.5 (p50), and pruning takes twice as
            long.
    """

    keep_connection: float = 5.0
    between_looks: float = 3.0
    between_unheard_looks: float = 0.1
    between_any_looks: float = 0.02
    between_probes: float = 3.0
    first_reconnect: float = 0.1
    last_reconnect: float = 30.0
    after_notification: float = 0.005
    after_notifications: float = 0.01
    after_hint: float = 0.02
    lock: float = 3.0
    status_retry: float = 5.0
    between_polls: float = 5.0
    between_unheard_polls: float = 1.0
    between_busy_polls: float = 0.1
    unused_claim: float = 0.1
    end_of_claim: float = 5.0
    between_beats: float = 15.0
    beat: float = 10.0
    end_of_beat: float = 2.0
    max_pending_notifications: int = 100_000
    pruned_at_once: int = 500


DEFAULT_TIMINGS: Final = Timings()
