/** Stories of jobs, as server-sent events. An EventSource can't send a key, so they are read from a fetch. */

import { ApiError, request } from "./api.js";

const ENDS = new Set(["complete", "error", "cancelled"]);
const FIRST_PAUSE = 500;
const LONGEST_PAUSE = 10_000;

/** Browsers open six connections to a host, for all tabs together: a few streams must not take them all. */
const MOST_STREAMS = 2;

/** The events of a job after `last`, to its end, over as many connections as it takes. */
async function* story(id, last, signal) {
  let pause = FIRST_PAUSE;
  while (!signal.aborted) {
    try {
      const headers = { Accept: "text/event-stream", ...(last ? { "Last-Event-ID": last } : {}) };
      const answer = await request(`v1/jobs/${id}/stream`, { headers, signal });
      if (answer.status === 204) return;
      for await (const event of parsed(answer.body)) {
        pause = FIRST_PAUSE;
        last = event.id ?? last;
        yield event;
        if (ENDS.has(event.name)) return;
      }
    } catch (error) {
      if (signal.aborted || (error instanceof ApiError && error.status < 500)) return;
    }
    await new Promise((resolve) => setTimeout(resolve, pause));
    pause = Math.min(2 * pause, LONGEST_PAUSE);
  }
}

/** Cut a stream of bytes into `{id, name, data}`. */
async function* parsed(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (text + value).split(/\r?\n\r?\n/);
    text = parts.pop();
    for (const part of parts) {
      const event = fields(part);
      if (event) yield event;
    }
  }
}

function fields(block) {
  const found = {};
  for (const line of block.split(/\r?\n/)) {
    const [, name, value] = /^([^:]+):? ?(.*)$/.exec(line) ?? [];
    if (name) found[name] = name === "data" && name in found ? `${found[name]}\n${value}` : value;
  }
  return found.data === undefined ? null : { id: found.id, name: found.event, data: JSON.parse(found.data) };
}

/**
 * Listen to jobs, the first few of those that are asked for, while somebody looks.
 *
 * @param onEvent called with a job's id and each of its events.
 * @returns a function that takes the ids of the jobs to follow, the most urgent first.
 */
export function streams(onEvent) {
  const open = new Map(); // id -> AbortController
  const heard = new Map(); // id -> last event
  let wanted = [];

  async function listen(id) {
    const control = new AbortController();
    open.set(id, control);
    for await (const event of story(id, heard.get(id), control.signal)) {
      if (control.signal.aborted) return;
      if (event.id) heard.set(id, event.id);
      onEvent(id, event);
    }
    if (open.get(id) === control) open.delete(id);
  }

  function adjust() {
    const now = new Set(document.hidden ? [] : wanted.slice(0, MOST_STREAMS));
    for (const [id, control] of open) {
      if (now.has(id)) continue;
      open.delete(id);
      control.abort();
    }
    for (const id of now) if (!open.has(id)) listen(id);
  }

  document.addEventListener("visibilitychange", adjust);
  return (ids) => {
    wanted = ids;
    for (const id of heard.keys()) if (!ids.includes(id)) heard.delete(id);
    adjust();
  };
}
