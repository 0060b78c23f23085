"""The tables of the SQLite store, and how a file of an older format becomes one of today's."""

import sqlite3

VERSION = 2

TABLES = """
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    request TEXT NOT NULL,
    bucket TEXT NOT NULL,
    owner TEXT NOT NULL,
    idempotency_key TEXT,
    state TEXT NOT NULL DEFAULT 'queued',
    attempts INTEGER NOT NULL DEFAULT 0,
    fence INTEGER NOT NULL DEFAULT 0,
    leased_by TEXT,
    renewed REAL,
    expires REAL,
    created REAL NOT NULL,
    started REAL,
    finished REAL,
    images INTEGER NOT NULL DEFAULT 0,
    timings TEXT NOT NULL DEFAULT '{}',
    told INTEGER,
    size INTEGER NOT NULL DEFAULT 0
);
CREATE UNIQUE INDEX jobs_by_key ON jobs (owner, idempotency_key) WHERE idempotency_key IS NOT NULL;
CREATE INDEX jobs_queued ON jobs (number) WHERE state = 'queued';
CREATE INDEX jobs_running ON jobs (expires) WHERE state = 'running';
CREATE INDEX jobs_live ON jobs (owner) WHERE state IN ('queued', 'running');
CREATE INDEX jobs_finished ON jobs (finished) WHERE finished IS NOT NULL;
CREATE INDEX jobs_by_owner ON jobs (owner, number);
CREATE TABLE events (
    job INTEGER NOT NULL REFERENCES jobs ON DELETE CASCADE,
    id INTEGER NOT NULL,
    name TEXT NOT NULL,
    data TEXT NOT NULL,
    PRIMARY KEY (job, id)
) WITHOUT ROWID;
CREATE TABLE images (
    job INTEGER NOT NULL REFERENCES jobs ON DELETE CASCADE,
    number INTEGER NOT NULL,
    format TEXT NOT NULL,
    digest TEXT NOT NULL,
    PRIMARY KEY (job, number)
) WITHOUT ROWID;
CREATE INDEX images_by_digest ON images (digest);
CREATE TABLE blobs (
    job INTEGER NOT NULL REFERENCES jobs ON DELETE CASCADE,
    digest TEXT NOT NULL,
    PRIMARY KEY (job, digest)
) WITHOUT ROWID;
CREATE INDEX blobs_by_digest ON blobs (digest);
"""

STEPS = {
    1: (
        "ALTER TABLE jobs ADD COLUMN renewed REAL",
        "UPDATE jobs SET renewed = expires - 15 WHERE state = 'running'",
    )
}
"""The statements that bring a file from a format to the next."""


def bring_up_to_date(db: sqlite3.Connection) -> int:
    """Make the tables, or add what an older format lacks, inside an open transaction.

    Returns:
        The format that the file has now; a newer one than `VERSION` is left as it is.
    """
    (found,) = db.execute("PRAGMA user_version").fetchone()
    version = found
    if version == 0:
        for statement in TABLES.split(";"):
            db.execute(statement)
        version = VERSION
    while version in STEPS:
        for statement in STEPS[version]:
            db.execute(statement)
        version += 1
    if version != found:
        db.execute(f"PRAGMA user_version = {version}")
    return int(version)
