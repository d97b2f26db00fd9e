"""How long the parts of a backend wait, in one record: tests shorten what applications cannot."""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds, but for the last two. No argument of the backend: each default has its reason here.

    Attributes:
        keep_connection: How long a connection stays checked out between statements. Afterwards the
            pool's own care, such as pool_recycle and pool_pre_ping, has its turn.
        between_looks: How late what was stored without a notification is noticed at most.
        between_unheard_looks: The same where nothing can be heard; taskiq's own waiting takes 0.2.
        between_any_looks: Whatever asks for looks, they come no faster than this.
        between_probes: How often the listener is probed, and within which time a probe is heard.
        first_reconnect: How soon a lost listener connects again; each failure doubles it.
        last_reconnect: Up to this.
        after_notification: The pause after a notification of one task. It takes a lock of the whole
            database, so under load the ids of several batches share one.
        after_notifications: The pause after one of several tasks.
        after_hint: The pause after workers were told of new tasks. Only idle ones need it.
        lock: For how long a step of the schema waits for a lock: whoever comes meanwhile waits
            behind it, so better to give way and to try again.
        status_retry: For how long a status is tried to be stored: a task waits for it.
        between_polls: How late a worker notices a task whose notification was lost at most.
        between_unheard_polls: The same where nothing can be heard.
        between_busy_polls: The pause before tasks that another worker is claiming are looked at.
        unused_claim: For how long a worker keeps tasks that it has claimed and not begun with;
            then others may have them.
        end_of_claim: How long a worker that stops waits for the answer to its last claim, and then
            tries to give back what it has: in an outage, that comes back when its lease ends.
        between_beats: How often a worker says that it is alive.
        beat: For how long one such statement is tried: another comes soon.
        end_of_beat: For how long a worker that stops tries to delete its row.
        max_pending_notifications: Beyond so many ids nobody is told one by one: a look is cheaper.
        pruned_at_once: Rows that a pruning transaction deletes at most. With 200, those who store
            results meanwhile take 1.2 ms instead of 1.5 (p50), and pruning takes twice as long.
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
