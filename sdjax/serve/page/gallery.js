/** All jobs as cards, newest first. The server remembers them; the page only shows what it says. */

import * as api from "./api.js";
import { jobCard } from "./card.js";
import { streams } from "./events.js";
import { failure, inWords } from "./words.js";

const PAGE = 24;
const MOST = 200;
const LIVE_EVERY = 2_000;
const IDLE_EVERY = 10_000;

const isLive = ({ state }) => state === "queued" || state === "running";

/**
 * The gallery.
 *
 * @param actions what cards can ask for: reuse(job), startFrom(job, blob), look(pictures, index), confirmed().
 * @param announce says something to those who don't see the page.
 * @param onContact called with whether the server answered.
 */
export function gallery({ actions, announce, onContact }) {
  const cards = document.getElementById("cards");
  const older = document.getElementById("older");
  const shown = new Map(); // id -> {job, card}, in no order
  let hasAskedOlder = false;
  let timer;

  const follow = streams((id, event) => {
    const entry = shown.get(id);
    if (!entry) return;
    entry.card.tell(event);
    if (event.name === "progress") announceProgress(entry, event.data);
    else if (event.name !== "preview") refreshOne(id).catch(() => {}); // the next look finds out
  });

  const handlers = {
    ...actions,
    look: (job, number) => {
      const all = [...cards.children].flatMap(({ dataset }) => shown.get(dataset.job).card.pictures());
      actions.look(all, all.findIndex((each) => each.job.job_id === job.job_id && each.number === number));
    },
    startFrom: async (job, number) => actions.startFrom(job, await api.file(api.imagePath(job, number))),
    cancel: (job) => attempt(async () => {
      await api.cancel(job.job_id).catch(unlessStatus(409)); // it was faster than us
      await refreshOne(job.job_id);
    }),
    remove: (job) => attempt(async () => {
      if (!(await actions.confirmed())) return;
      await api.forget(job.job_id).catch(unlessStatus(404));
      const { element } = shown.get(job.job_id).card;
      (element.nextElementSibling ?? element.previousElementSibling ?? document.getElementById("gallery")).focus();
      drop(job.job_id);
      settle();
      announce("Deleted");
    }),
  };

  async function attempt(action) {
    try {
      await action();
    } catch (error) {
      announce(inWords(error));
      onContact(error instanceof api.ApiError);
    }
  }

  /** Show a job where it belongs, or what is new about it. */
  function show(job) {
    const entry = shown.get(job.job_id);
    if (!entry) {
      const card = jobCard(job, handlers);
      shown.set(job.job_id, { job, card });
      const next = [...cards.children].find((other) => shown.get(other.dataset.job).job.created < job.created);
      cards.insertBefore(card.element, next ?? null);
      return;
    }
    const before = entry.job.state;
    entry.job = job;
    entry.card.update(job);
    if (before !== job.state) announceState(job);
  }

  function drop(id) {
    shown.get(id)?.card.element.remove();
    shown.delete(id);
  }

  /** After every change: listen to what is under way, the oldest first. */
  function settle() {
    document.getElementById("empty").hidden = shown.size > 0;
    follow([...cards.children].map(({ dataset }) => shown.get(dataset.job).job).filter(isLive).map((job) => job.job_id).reverse());
  }

  async function refreshOne(id) {
    show(await api.job(id));
    settle();
  }

  /** Look at what is new: other tabs and programs submit and delete jobs too. */
  async function refresh() {
    clearTimeout(timer);
    let isThere = true;
    if (!document.hidden) {
      try {
        const known = [...cards.children].map(({ dataset }) => dataset.job);
        const page = await api.jobs(Math.min(Math.max(PAGE, known.length), MOST));
        const there = new Set(page.jobs.map((job) => job.job_id));
        const last = page.next === null ? -Infinity : page.jobs.at(-1).created;
        for (const id of known) if (!there.has(id) && shown.get(id)?.job.created >= last) drop(id);
        page.jobs.forEach(show);
        if (!hasAskedOlder) older.hidden = page.next === null;
        settle();
        onContact(true);
      } catch {
        isThere = false;
        onContact(false);
      }
    }
    const isBusy = [...shown.values()].some(({ job }) => isLive(job));
    clearTimeout(timer); // two looks may overlap
    timer = setTimeout(refresh, isBusy || !isThere ? LIVE_EVERY : IDLE_EVERY);
  }

  async function showOlder() {
    const last = cards.lastElementChild;
    const page = await api.jobs(PAGE, last?.dataset.job);
    page.jobs.forEach(show);
    hasAskedOlder = true;
    older.hidden = page.next === null;
    settle();
    last?.nextElementSibling?.focus();
  }

  /** Submit a job and show its card. */
  async function submit(fields) {
    const { job_id: id } = await api.submit(fields).catch((error) => {
      if (!(error instanceof api.ApiError)) refresh(); // which finds out when the server answers again
      throw error;
    });
    await refreshOne(id);
    announce("Submitted");
    shown.get(id).card.element.scrollIntoView({ block: "nearest" });
    refresh();
  }

  function announceProgress(entry, { percent, total, step }) {
    const quarter = Math.floor(percent / 25);
    if (quarter > (entry.quarter ?? 0) && step < total) announce(`${25 * quarter} percent drawn`);
    entry.quarter = quarter;
  }

  function announceState(job) {
    const words = { running: "Drawing", complete: "Done", cancelled: "Cancelled", error: job.error && failure(job.error) };
    announce(`${words[job.state] ?? "Waiting"}: ${job.request.prompt}`);
  }

  older.addEventListener("click", () => attempt(showOlder));
  document.addEventListener("visibilitychange", refresh);
  return { refresh, submit };
}

const unlessStatus = (status) => (error) => {
  if (error.status !== status) throw error;
};
