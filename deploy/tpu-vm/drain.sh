#!/usr/bin/env bash
# Stop the server without losing a job, and wait until it has ended: it takes no more, finishes what it draws (for
# SDJAX_DRAIN seconds) and leaves the rest in its queue on disk, for the next start.
#
#   drain.sh          the systemd service; do this before the VM is deleted or upgraded
#   drain.sh PID      a server that was started by hand
set -euo pipefail

if (($# == 0)); then
    exec systemctl stop sdjax.service
fi
pid=$1
kill -TERM "$pid"
while kill -0 "$pid" 2>/dev/null; do
    # One that has ended, and waits for its parent to ask how, is gone.
    [[ $(ps -o stat= -p "$pid") != Z* ]] || break
    sleep 0.2
done
