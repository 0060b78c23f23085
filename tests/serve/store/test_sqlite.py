"""What only this store has: a folder with files in it."""

import os
import sqlite3

import pytest

from sdjax.errors import SdjaxError
from sdjax.serve.sqlite import SqliteStore
from tests.serve.store.stores import PICTURE, finish, lease_one, submit


def test_half_written_and_forgotten_files_are_cleaned_at_start(tmp_path):
    store = SqliteStore(tmp_path)
    job = submit(store)
    finish(store, lease_one(store))
    store.close()
    files = tmp_path / "files"
    half = files / "staging" / "abc"
    half.write_bytes(b"hal")
    os.utime(half, (0, 0))
    fresh = files / "staging" / "def"
    fresh.write_bytes(b"another process is writing this")
    orphan = files / "ff" / ("ff" * 32)
    orphan.parent.mkdir(exist_ok=True)
    orphan.write_bytes(b"no job has it")
    again = SqliteStore(tmp_path)
    assert not half.exists()
    assert fresh.exists()
    assert not orphan.exists()
    assert again.image(job.id, 0) == ("png", PICTURE)
    again.close()


def test_deleted_pictures_leave_the_disk(tmp_path):
    store = SqliteStore(tmp_path)
    submit(store)
    finish(store, lease_one(store))
    store.retain(seconds=0, total_bytes=None)
    assert [path for path in (tmp_path / "files").rglob("*") if path.is_file()] == []
    store.close()


def test_a_folder_of_another_version_is_refused(tmp_path):
    SqliteStore(tmp_path).close()
    with sqlite3.connect(tmp_path / "jobs.sqlite3") as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(SdjaxError, match="99"):
        SqliteStore(tmp_path)


def test_a_closed_store_says_so(tmp_path):
    store = SqliteStore(tmp_path)
    store.close()
    with pytest.raises(SdjaxError, match="closed"):
        store.jobs()


def test_a_killed_write_leaves_nothing(tmp_path, monkeypatch):
    store = SqliteStore(tmp_path)
    job = submit(store)
    lease = lease_one(store)
    monkeypatch.setattr(store._files, "keep", lambda parts: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="space"):
        finish(store, lease)
    monkeypatch.undo()
    assert store.job(job.id).state == "running"
    assert list((tmp_path / "files" / "staging").iterdir()) == []
    assert finish(store, lease)
    store.close()


def test_a_lease_reads_as_little_when_a_thousand_wait(tmp_path):
    """In instructions of SQLite's machine, which a busy computer doesn't change."""
    store = SqliteStore(tmp_path)
    few, many = (_instructions_of_a_lease(store, waiting) for waiting in (50, 1000))
    assert 0 < many < 1.2 * few
    store.close()


def _instructions_of_a_lease(store, waiting):
    for _ in range(waiting - sum(store.waiting().values())):
        submit(store)
    (connection,) = store._database._idle
    run = []
    connection.set_progress_handler(lambda: run.append(1), 1)
    lease_one(store)
    connection.set_progress_handler(None, 1)
    return len(run)
