/** The page, put together. */

import * as api from "./api.js";
import { jobForm } from "./form.js";
import { gallery } from "./gallery.js";
import { viewer } from "./viewer.js";
import { NO_ANSWER, inWords, state } from "./words.js";

const LOOK_EVERY = 2_000;

const element = (id) => document.getElementById(id);

const announce = (text) => (element("announcer").textContent = text);

function status(state, text) {
  element("status").dataset.state = state;
  if (element("status-text").textContent !== text) element("status-text").textContent = text;
}

/** Show a dialog; resolves to the value of the button that closed it. */
function asked(dialog) {
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => dialog.addEventListener("close", () => resolve(dialog.returnValue), { once: true }));
}

let asking = null;

/** Ask for a key, once for all requests that wait for it. */
async function askForKey(wasWrong) {
  asking ??= (async () => {
    element("key-problem").textContent = wasWrong ? "The server doesn't know this key." : "";
    do await asked(element("ask-key"));
    while (!element("key").value.trim());
    element("forget-key").hidden = false;
    return element("key").value.trim();
  })().finally(() => (asking = null));
  return asking;
}

const form = jobForm({ onSubmit: (fields) => pictures.submit(fields) });

let model = "";
const pictures = gallery({
  announce,
  onContact: (isThere) => {
    if (!isThere) status("error", NO_ANSWER);
    else if (model) status("ready", model);
  },
  actions: {
    reuse: (job) => form.fill(job),
    startFrom: (job, blob) => form.startFrom(job, blob),
    look: viewer({ reuse: (job) => form.fill(job) }),
    confirmed: async () => (await asked(element("confirm"))) === "delete",
  },
});

/** Wait for the model; jobs of the past are shown meanwhile. */
async function ready() {
  for (;;) {
    const answer = await fetch("ready").then((response) => response.json()).catch(() => null);
    if (answer?.status === "ready" && (await suited())) return;
    if (answer?.error) status("error", inWords(new api.ApiError(0, answer.error)));
    else if (answer?.status && answer.status !== "ready") status(answer.status, state(answer.status));
    else status("error", NO_ANSWER);
    await new Promise((resolve) => setTimeout(resolve, LOOK_EVERY));
  }
}

/** Fit the form to the model that is served; false where the server stopped to answer. */
async function suited() {
  try {
    const [served] = (await api.read("v1/models")).data;
    model = served.id;
    form.suit(served.sdjax, served.id);
    status("ready", model);
    return true;
  } catch {
    return false;
  }
}

api.onKeyNeeded(askForKey);
element("forget-key").hidden = !api.hasKey();
element("forget-key").addEventListener("click", () => {
  api.forgetKey();
  location.reload();
});

/** The API's description, however long the server takes to answer. */
async function description() {
  for (;;) {
    try {
      return await api.read("openapi.json");
    } catch {
      status("error", NO_ANSWER);
      await new Promise((resolve) => setTimeout(resolve, LOOK_EVERY));
    }
  }
}

form.describe(await description());
await Promise.all([ready(), pictures.refresh()]);
