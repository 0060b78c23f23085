"""What befalls a folder: a lost log, an old copy, a clock set back, a full disk, damage. Nothing is deleted by it."""

import hashlib
import logging
import multiprocessing
import os
import shutil
import sqlite3
import stat
import time

import pytest

from sdjax.errors import SdjaxError
from sdjax.serve import database
from sdjax.serve.sqlite import SqliteStore
from sdjax.serve.storage import PictureLostError, StorageError
from sdjax.serve.store import Tick
from tests.serve.conftest import wait_for
from tests.serve.small_disk import small_disk
from tests.serve.store.stores import PICTURE, finish, lease_one, submit

HOUR = 3600.0


def _draw_and_be_killed(folder, count):
    store = SqliteStore(folder)
    for i in range(count):
        submit(store)
        finish(store, lease_one(store), bytes([i]) * 1000)
    os.kill(os.getpid(), 9)


def drawn_by_a_killed_process(folder, count=5):
    process = multiprocessing.get_context("spawn").Process(target=_draw_and_be_killed, args=(folder, count))
    process.start()
    process.join()


def files(folder):
    return {path.name for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def clock(monkeypatch):
    """Set the clock on the wall."""
    now = time.time

    def set_forward(seconds):
        monkeypatch.setattr(time, "time", lambda: now() + seconds)

    return set_forward


def test_pictures_whose_jobs_were_lost_with_the_log_are_set_aside_and_counted(tmp_path, caplog):
    drawn_by_a_killed_process(tmp_path)
    pictures = files(tmp_path / "files")
    assert len(pictures) == 5
    (tmp_path / "jobs.sqlite3-wal").unlink()
    store = SqliteStore(tmp_path)
    lost = 5 - store.counts()["complete"]
    assert lost
    assert files(tmp_path / "files") | files(tmp_path / "orphans") == pictures
    assert len(files(tmp_path / "orphans")) == lost
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert line.startswith(f"{lost} files")
    assert "orphans" in line
    store.close()


def test_what_was_set_aside_comes_back_with_the_database_that_has_its_jobs(tmp_path, caplog):
    SqliteStore(tmp_path).close()
    shutil.copy(tmp_path / "jobs.sqlite3", tmp_path / "old")
    store = SqliteStore(tmp_path)
    job = submit(store)
    finish(store, lease_one(store))
    store.close()
    shutil.move(tmp_path / "jobs.sqlite3", tmp_path / "new")
    shutil.copy(tmp_path / "old", tmp_path / "jobs.sqlite3")
    SqliteStore(tmp_path).close()
    assert files(tmp_path / "files") == set()
    shutil.copy(tmp_path / "new", tmp_path / "jobs.sqlite3")
    caplog.clear()
    again = SqliteStore(tmp_path)
    assert again.image(job.id, 0) == ("png", PICTURE)
    assert files(tmp_path / "orphans") == set()
    assert "1 files that had been set aside were brought back" in caplog.text
    again.close()


def test_a_copy_of_the_file_alone_is_seconds_old(tmp_path, monkeypatch):
    monkeypatch.setattr(database, "CHECKPOINT_SECONDS", 0.02)
    store = SqliteStore(tmp_path / "store")
    job = submit(store)

    def is_copied():
        (tmp_path / "copy").mkdir(exist_ok=True)
        shutil.copy(tmp_path / "store" / "jobs.sqlite3", tmp_path / "copy" / "jobs.sqlite3")
        with sqlite3.connect(tmp_path / "copy" / "jobs.sqlite3") as db:
            has_jobs = db.execute("SELECT name FROM sqlite_master WHERE name = 'jobs'").fetchall()
            return has_jobs and db.execute("SELECT id FROM jobs").fetchall() == [(job.id,)]

    wait_for(is_copied)
    store.close()


def test_a_backup_is_a_store_of_one_moment_made_while_another_writes(tmp_path):
    store = SqliteStore(tmp_path / "store")
    photo = b"photo"
    done = submit(store, blobs={hashlib.sha256(photo).hexdigest(): photo})
    finish(store, lease_one(store))
    waits = submit(store)
    made = store.backup(tmp_path / "backup")
    assert made == (2, 2, 0)
    later = submit(store)
    finish(store, lease_one(store), b"another")
    copy = SqliteStore(tmp_path / "backup")
    assert [job.id for job in copy.jobs()] == [waits.id, done.id]
    assert copy.job(waits.id).state == "queued"
    assert copy.image(done.id, 0) == ("png", PICTURE)
    assert copy.blob(hashlib.sha256(photo).hexdigest()) == photo
    copy.close()
    assert store.backup(tmp_path / "backup") == (3, 3, 0)
    copy = SqliteStore(tmp_path / "backup")
    assert copy.job(waits.id).state == "complete"
    assert copy.job(later.id) is not None
    copy.close()
    with pytest.raises(SdjaxError, match="another folder"):
        store.backup(tmp_path / "store")
    store.close()


@pytest.mark.parametrize("back", [HOUR, 30 * 24 * HOUR])
def test_a_lease_from_before_the_clock_was_set_back_counts_no_more(store, clock, back):
    job = submit(store)
    lease_one(store)
    clock(-back)
    again = lease_one(store)
    assert (again.job.id, again.job.attempts) == (job.id, 2)
    assert finish(store, again)


def test_a_clock_that_is_corrected_by_a_second_takes_no_lease_away(store, clock):
    submit(store)
    lease = lease_one(store)
    clock(-1.0)
    assert store.lease(None, 1, owner="other", seconds=60) == []
    assert store.tick([Tick(lease.job.id, lease.fence, [])], seconds=60) == frozenset()
    assert finish(store, lease)


def test_a_picture_that_is_gone_or_was_changed_is_lost_and_not_missing(tmp_path):
    store = SqliteStore(tmp_path)
    photo, digest = b"photo", hashlib.sha256(b"photo").hexdigest()
    job = submit(store, blobs={digest: photo})
    finish(store, lease_one(store))
    path = tmp_path / "files" / hashlib.sha256(PICTURE).hexdigest()[:2] / hashlib.sha256(PICTURE).hexdigest()
    path.write_bytes(PICTURE[:-1])
    with pytest.raises(PictureLostError, match="changed"):
        store.image(job.id, 0)
    path.unlink()
    with pytest.raises(PictureLostError):
        store.image(job.id, 0)
    assert store.image(job.id, 1) is None
    (tmp_path / "files" / digest[:2] / digest).write_bytes(b"")
    with pytest.raises(PictureLostError):
        store.blob(digest)
    submit(store, blobs={digest: photo})
    assert store.blob(digest) == photo
    store.close()


def test_pictures_that_are_gone_are_counted_in_the_log(tmp_path, caplog):
    store = SqliteStore(tmp_path)
    submit(store)
    finish(store, lease_one(store))
    store.close()
    shutil.rmtree(tmp_path / "files")
    SqliteStore(tmp_path).close()
    assert "1 files that jobs in" in caplog.text
    assert "are gone" in caplog.text


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk", 4) as disk:
        yield disk


def test_a_full_disk_refuses_and_leaves_nothing_behind_and_all_goes_on_when_there_is_room(disk):
    store = SqliteStore(disk.folder / "store")
    waiting, running = submit(store), submit(store)
    lease = lease_one(store)
    assert store.free_bytes() > 2**20
    store.check()
    disk.fill()
    photo = bytes(2**20)
    attempts = {
        "submit": lambda: submit(store, blobs={hashlib.sha256(photo).hexdigest(): photo}),
        "finish": lambda: finish(store, lease, photo),
        "check": store.check,
    }
    for name, attempt in attempts.items():
        with pytest.raises(StorageError, match="no space") as raised:
            attempt()
        assert raised.value.kind == "full", name
        assert str(disk.folder) not in str(raised.value)
    assert list((disk.folder / "store" / "files" / "staging").iterdir()) == []
    assert store.free_bytes() < 2**20
    assert store.job(running.id).state == "queued"
    assert store.job(waiting.id).state == "running"
    disk.make_room()
    store.check()
    assert finish(store, lease, photo)
    assert store.image(lease.job.id, 0) == ("png", photo)
    store.close()


def test_small_writes_to_a_full_disk_are_refused_too(disk):
    store = SqliteStore(disk.folder / "store")
    disk.fill()
    accepted = []

    def submit_until_it_is_full():
        while len(accepted) < 1000:  # the log may have some room left
            accepted.append(submit(store).id)

    with pytest.raises(StorageError) as raised:
        submit_until_it_is_full()
    assert raised.value.kind == "full"
    disk.make_room()
    accepted.append(submit(store).id)
    assert [job.id for job in store.jobs(limit=1000)] == accepted[::-1]
    store.close()


DAMAGE = {
    "a header of another kind": lambda path: path.write_bytes(b"no database" * 1000),
    "pages of noise": lambda path: _overwrite(path, 4096, b"\xa5" * 40_000),
    "half a file": lambda path: os.truncate(path, path.stat().st_size // 2),
}


def _overwrite(path, at, content):
    with path.open("r+b") as file:
        file.seek(at)
        file.write(content)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_database_is_refused_in_one_line_that_names_it(tmp_path, damage):
    store = SqliteStore(tmp_path)
    for _ in range(50):
        submit(store)
    store.close()
    DAMAGE[damage](tmp_path / "jobs.sqlite3")
    with pytest.raises(SdjaxError, match="damaged") as raised:
        SqliteStore(tmp_path)
    assert str(tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_database_that_is_damaged_while_it_is_open_is_a_storage_error(tmp_path):
    store = SqliteStore(tmp_path)
    for _ in range(50):
        submit(store)
    store.close()
    store = SqliteStore(tmp_path)
    _overwrite(tmp_path / "jobs.sqlite3", 4096, b"\xa5" * 100_000)
    with pytest.raises(StorageError) as raised:
        store.check()
    assert raised.value.kind == "damaged"
    store.close()


def test_a_database_that_was_taken_away_is_noticed(tmp_path):
    store = SqliteStore(tmp_path)
    submit(store)
    (tmp_path / "jobs.sqlite3").rename(tmp_path / "elsewhere")
    with pytest.raises(StorageError):
        store.check()
    store.close()


@pytest.mark.parametrize("where", ["file", "file/below"])
def test_a_folder_that_cannot_be_used_is_an_error_in_one_line(tmp_path, where):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(SdjaxError, match="can't be used"):
        SqliteStore(tmp_path / where)


def modes(folder):
    return {stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.rglob("*")) if path.exists()}


def test_folder_and_files_are_for_their_user_alone(tmp_path):
    before = os.umask(0)
    try:
        store = SqliteStore(tmp_path / "new")
        submit(store, blobs={hashlib.sha256(b"photo").hexdigest(): b"photo"})
        finish(store, lease_one(store))
        store.backup(tmp_path / "backup")
        assert modes(tmp_path / "new") == {0o700, 0o600}
        assert modes(tmp_path / "backup") <= {0o700, 0o600}
        store.close()
    finally:
        os.umask(before)


def test_a_folder_that_others_could_read_is_closed_to_them(tmp_path):
    folder = tmp_path / "store"
    SqliteStore(folder).close()
    for path in (folder / "files", folder / "files" / "staging"):
        path.chmod(0o755)
    (folder / "jobs.sqlite3").chmod(0o644)
    SqliteStore(folder).close()
    assert stat.S_IMODE((folder / "files").stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "jobs.sqlite3").stat().st_mode) == 0o600


def test_a_folder_of_the_format_before_is_brought_up_to_date_with_its_leases(tmp_path):
    store = SqliteStore(tmp_path)
    job, other = submit(store), submit(store)
    lease = store.lease(None, 1, owner="engine", seconds=15)[0]
    store.close()
    with sqlite3.connect(tmp_path / "jobs.sqlite3") as db:
        db.execute("ALTER TABLE jobs DROP COLUMN renewed")
        db.execute("PRAGMA user_version = 1")
    db.close()
    store = SqliteStore(tmp_path)
    assert lease_one(store).job.id == other.id
    assert finish(store, lease)
    assert store.job(job.id).state == "complete"
    store.close()
