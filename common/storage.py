"""Where does a study keep its queue? In a file, or in a database, which may be away for a while."""

import contextlib
import functools
import re
import time
import warnings
from pathlib import Path
from urllib.parse import unquote_plus

import optuna
import sqlalchemy
from optuna.storages import (
    BaseStorage,
    JournalStorage,
    RDBStorage,
    RetryHeartbeatStaleTrialCallback,
)
from optuna.storages.journal import JournalFileBackend

from common import ROOT

MISSED = 4  # heartbeats, after which a worker is taken for dead
RETRIES = 10  # times that a run whose worker died is queued again by itself
# Methods of a storage that are tried again, and errors of a database that is away.
PATIENT = {name for name in dir(BaseStorage) if name[0] != "_"} | {"record_heartbeat"}
PATIENT |= {"_get_stale_trial_ids", "_get_trials", "_create_new_trial", "_get_best_trial_id"}
AWAY = (sqlalchemy.exc.OperationalError, sqlalchemy.exc.InterfaceError)
AWAY += (optuna.exceptions.StorageInternalError,)


def open_storage(url: str, heartbeat: int):
    """A journal file, or a database, which queues again the runs of workers that died."""
    kind = next((kind for kind in ("sqlite:///", "journal:") if url.startswith(kind)), "")
    if kind:  # a file; its path begins at the repository
        path = ROOT / Path(url.removeprefix(kind)).expanduser()
        if set("%?#") & set(str(path)):
            raise ValueError("a path of a storage must not hold %, ? or #")
        path.parent.mkdir(parents=True, exist_ok=True)
        url = f"{kind}{path}"
    if kind == "journal:":
        return JournalStorage(JournalFileBackend(str(path)))
    sqlite = url.startswith("sqlite")
    arguments = dict(timeout=60, isolation_level=None) if sqlite else dict(connect_timeout=20)
    options = dict(pool_pre_ping=True, connect_args=arguments)
    beat = dict(heartbeat_interval=heartbeat, grace_period=MISSED * heartbeat)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    beat["heartbeat_stale_trial_callback"] = RetryHeartbeatStaleTrialCallback(RETRIES)
    storage = PatientStorage(url, options, **beat)
    if sqlite:
        # It locks at the first write: two workers could read "waiting" and take the same trial.
        begin = lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE")
        sqlalchemy.event.listen(storage.engine, "begin", begin)
    return storage


class PatientStorage(RDBStorage):
    """A database that may be away for a minute: what a worker asks of it is tried again."""

    def __getattribute__(self, name):
        found = super().__getattribute__(name)
        return functools.partial(again, found) if name in PATIENT else found


def again(method, *arguments, **named):
    for wait in (1, 2, 4, 8, 15, 30):
        with contextlib.suppress(*AWAY):
            return method(*arguments, **named)
        time.sleep(wait)
    return method(*arguments, **named)


def without_secrets(text: str, url: str) -> str:
    """A text without what a storage's address holds before its last @, and after its first ?."""
    kind, marks, address = url.partition("://")
    address = address if marks else kind
    secrets = f"{address.rpartition('@')[0]}:{address.partition('?')[2]}"
    words = {*re.split(r"[:/@?&=]+", secrets), *re.split(r"[:/@?&=]+", unquote_plus(secrets))}
    for word in sorted(words - {"", kind if marks else ""}, key=len, reverse=True):
        text = re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", "***", text)
    return text
