/** What went wrong, in a person's words. */

import { ApiError } from "./api.js";

export const NO_ANSWER = "The server does not answer; trying again";

const LAST_SEED = 2n ** 64n - 1n;

const REFUSALS = {
  queue_full: "The queue is full.",
  busy: "The server is busy.",
  draining: "The server is about to stop.",
  starting: "The model is still being loaded.",
  unavailable: "The model could not be loaded. The server's log has the reason.",
  internal: "The server failed. Its log has the reason.",
  storage_full: "The server's disk is full.",
  storage_failed: "The server can not write to its disk. Its log has the reason.",
  storage_damaged: "The server's database is damaged. Its log has the reason.",
  too_large: "This is too large to send. Use a smaller picture.",
  timeout: "The picture took too long to arrive. Use a smaller one.",
  wrong_origin: "The server does not accept this page's address. Its log has the reason.",
  wrong_host: "The server does not accept this page's address. Its log has the reason.",
  not_found: "The server does not have this any more.",
};

/** Why no jobs are taken, by the status of `/ready`. */
const STATES = {
  starting: "Loading the model",
  draining: "About to stop",
  error: "The model could not be loaded",
  storage_full: "The server's disk is full",
  storage_failed: "The server can not write to its disk",
  storage_damaged: "The server's database is damaged",
};
export const state = (status) => STATES[status] ?? `Not ready: ${status}`;

const FAILURES = {
  internal: "The server failed while it drew this. Its log has the reason.",
  lost: "The server went down each time it drew this.",
  out_of_memory: "The server has too little memory for this. Try a smaller size or fewer pictures.",
  not_finite: "The numbers of this picture went out of range. Try another seed, less guidance or float32.",
};

/** Why a request failed: a sentence for the person who sent it. */
export function inWords(error) {
  if (!(error instanceof ApiError)) return "The server does not answer. What you wrote stays here; try again in a moment.";
  if (error.code in REFUSALS) return after(REFUSALS[error.code], error);
  return sentence(error.message, error.field);
}

/** Why a job failed. */
export const failure = ({ code, message }) => FAILURES[code] ?? sentence(message, null);

const after = (text, { retryAfter }) => (retryAfter ? `${text} Try again in ${retryAfter} s.` : text);

/** The field's name stands beside the message already: "steps: it should be ..." becomes "It should be ...". */
function sentence(message, name) {
  const rest = name && message.startsWith(`${name}: `) ? message.slice(name.length + 2) : message;
  return rest.charAt(0).toUpperCase() + rest.slice(1);
}

/** What is wrong with what stands in a field; null where nothing is. */
export function mistake(control) {
  if (control.disabled || control.closest(":disabled, [hidden]")) return null;
  if (control.name === "prompt" && !control.value.trim()) return "Write a prompt.";
  if (control.name === "seed") return seedMistake(control.value.trim());
  if (control.type !== "number") return null;
  const { badInput, rangeUnderflow, rangeOverflow, stepMismatch } = control.validity;
  const isWhole = Number.isInteger(Number(control.step || 1));
  if (!badInput && !rangeUnderflow && !rangeOverflow && !(stepMismatch && isWhole)) return null;
  const kind = !isWhole ? "a number" : Number(control.step) > 1 ? `a multiple of ${control.step}` : "a whole number";
  return `Use ${kind} from ${control.min} to ${control.max}.`;
}

function seedMistake(text) {
  if (!text || (/^\d+$/.test(text) && BigInt(text) <= LAST_SEED)) return null;
  return `Use a whole number from 0 to ${LAST_SEED}, or nothing for a random seed.`;
}
