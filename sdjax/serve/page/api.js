/** Requests to the server that this page came from. All paths are relative, so that a proxy may serve it anywhere. */

const KEY = "sdjax.key";

/** What the server refused: a sentence, and the field that is wrong, if it is one. */
export class ApiError extends Error {
  constructor(status, { code = "", message = "", field = null } = {}, retryAfter = 0) {
    super(message || `the server answered ${status}`);
    Object.assign(this, { status, code, field, retryAfter });
  }
}

let askForKey = async () => "";

/** Say how a key is asked for: `ask(isWrong)` resolves to one. */
export function onKeyNeeded(ask) {
  askForKey = ask;
}

export const hasKey = () => sessionStorage.getItem(KEY) !== null;
export const forgetKey = () => sessionStorage.removeItem(KEY);

/** Answer `path`, whose status is a good one, asking for a key as long as one is needed. */
export async function request(path, { method = "GET", body, headers = {}, signal } = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const sent = key === null ? headers : { ...headers, Authorization: `Bearer ${key}` };
    const answer = await fetch(path, { method, body, headers: sent, signal, cache: method === "GET" ? "default" : "no-store" });
    if (answer.ok) return answer;
    if (answer.status !== 401) throw await refusal(answer);
    // Another request may have got a key while this one was under way.
    if (sessionStorage.getItem(KEY) === key) sessionStorage.setItem(KEY, await askForKey(key !== null));
  }
}

async function refusal(answer) {
  const { error } = await answer.json().catch(() => ({}));
  return new ApiError(answer.status, error, Number(answer.headers.get("retry-after")));
}

/** A seed has up to 64 bits, a JavaScript number 53: it stays a string of digits here. In JSON no text can look like
 * this key, since its quotes would be escaped. */
const parse = (text) => JSON.parse(text.replace(/"seed":\s*(\d+)/g, '"seed":"$1"'));

function serialize({ seed, ...fields }) {
  const text = JSON.stringify(fields);
  if (seed === undefined) return text;
  return `${text.slice(0, -1)},"seed":${/^\d+$/.test(seed) ? BigInt(seed) : JSON.stringify(seed)}}`;
}

export const read = async (path, options) => parse(await (await request(path, options)).text());

export const submit = (fields) =>
  read("v1/jobs", { method: "POST", body: serialize(fields), headers: { "Content-Type": "application/json" } });

export const job = (id) => read(`v1/jobs/${id}`);

/** A page of jobs, newest first: those after the job `before`. */
export function jobs(limit, before) {
  const query = new URLSearchParams(before ? { limit, before } : { limit });
  return read(`v1/jobs?${query}`);
}

export const cancel = (id) => request(`v1/jobs/${id}`, { method: "DELETE" });
export const forget = (id) => request(`v1/jobs/${id}/record`, { method: "DELETE" });
export const imagePath = ({ job_id: id }, number) => `v1/jobs/${id}/images/${number}`;
export const file = async (path) => (await request(path)).blob();

/** Where a picture can be shown from: images can't send a key, so with one it is fetched first. */
export const pictureUrl = async (path) => (hasKey() ? URL.createObjectURL(await file(path)) : path);
