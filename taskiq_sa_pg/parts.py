"""What a backend works with between startup() and shutdown(), made from what it was told."""

from dataclasses import dataclass
from typing import NamedTuple

from taskiq_sa_pg.asking import Asking
from taskiq_sa_pg.codec import Codec
from taskiq_sa_pg.extras import ExtraValues
from taskiq_sa_pg.layout import Layout
from taskiq_sa_pg.models import Models
from taskiq_sa_pg.notifications import Notifier
from taskiq_sa_pg.operations import Operations
from taskiq_sa_pg.pruning import Pruner, Pruning
from taskiq_sa_pg.results import Results
from taskiq_sa_pg.store import Store
from taskiq_sa_pg.telemetry import Telemetry
from taskiq_sa_pg.tracking import Tracking
from taskiq_sa_pg.waiting import Waiting


@dataclass(frozen=True, slots=True)
class Settings:
    """Arguments of SQLAlchemyResultBackend, checked; `codec` has taken in some more."""

    models: Models
    codec: Codec
    extra_values: ExtraValues | None
    keep_results: bool
    notify: bool
    is_tracked: bool
    progress_ttl: float | None
    prune_interval: float | None


class Parts(NamedTuple):
    """They belong to one event loop."""

    layout: Layout
    notifier: Notifier | None
    operations: Operations
    tracking: Tracking
    waiting: Waiting
    results: Results
    asking: Asking
    pruning: Pruning
    pruner: Pruner | None

    @classmethod
    def make(cls, settings: Settings, store: Store, telemetry: Telemetry) -> "Parts":
        """For a store that is open; nothing connects yet."""
        models, codec = settings.models, settings.codec
        layout = Layout(models, is_tracked=settings.is_tracked)
        notifier = Notifier(store) if settings.notify else None
        operations = Operations(
            *(store, codec, layout, notifier),
            extra_values=settings.extra_values,
            telemetry=telemetry,
        )
        waiting = Waiting(models.config, operations.find_ready, store.listening, notifier)
        pruned = store, layout, settings.progress_ttl, telemetry
        return cls(
            layout,
            notifier,
            operations,
            tracking=Tracking(store, layout, telemetry),
            waiting=waiting,
            results=Results(
                operations, waiting, codec, models.config, keep_results=settings.keep_results
            ),
            asking=Asking(store, codec, layout),
            pruning=Pruning(*pruned, is_exclusive=False),
            pruner=None
            if settings.prune_interval is None
            else Pruner(Pruning(*pruned, is_exclusive=True), settings.prune_interval),
        )

    async def close(self) -> None:
        """Ends all waiting, and returns when everything else that was asked for is done."""
        await self.waiting.close()
        if self.pruner is not None:
            await self.pruner.close()
        await self.operations.close()
        await self.tracking.close()
        if self.notifier is not None:
            await self.notifier.close()
