/** One job as a card: what is drawn, how far it is, what it was made with. Text is only ever set as text. */

import { imagePath, pictureUrl } from "./api.js";
import { failure } from "./words.js";

/** Pictures up to this side are shown as the pixels that they are. */
const SMALL = 128;

const isLive = (state) => state === "queued" || state === "running";

/**
 * Make a card.
 *
 * @param job as the server describes it.
 * @param actions functions that take the job: reuse, cancel, remove, and those that take a picture's number beside:
 *   startFrom, look.
 * @returns `{element, update(job), tell(event), pictures()}`; `tell` takes the events of the job's story.
 */
export function jobCard(job, actions) {
  const template = document.getElementById("card");
  const element = template.content.firstElementChild.cloneNode(true);
  const part = (name) => element.querySelector(`.${name}`);
  const bar = element.querySelector("progress");
  let shown = 0;
  let urls = [];

  element.dataset.job = job.job_id;
  part("frame").style.aspectRatio = `${job.request.width} / ${job.request.height}`;
  part("prompt").textContent = job.request.prompt;
  element.setAttribute("aria-label", job.request.prompt);
  if (job.request.negative_prompt) {
    part("negative").hidden = false;
    part("negative").textContent = job.request.negative_prompt;
  }
  part("reuse").addEventListener("click", () => actions.reuse(job));
  part("continue").addEventListener("click", () => actions.startFrom(job, shown));
  part("cancel").addEventListener("click", () => actions.cancel(job));
  part("delete").addEventListener("click", () => actions.remove(job));
  part("open").addEventListener("click", () => actions.look(job, shown));
  for (const name of ["words", "notes"]) fold(part(name).firstElementChild, part(name).lastElementChild);

  function update(next) {
    const hadPictures = urls.length > 0;
    job = next;
    element.dataset.state = job.state;
    element.setAttribute("aria-busy", String(isLive(job.state)));
    part("live").hidden = !isLive(job.state);
    part("delete").hidden = isLive(job.state);
    part("continue").hidden = part("download").hidden = job.images.length === 0;
    part("facts").replaceChildren(...facts(job, seedOf(job, shown)));
    part("problem").hidden = job.error === null;
    part("problem").textContent = job.error ? failure(job.error) : "";
    part("notes").hidden = !job.warnings?.length;
    part("warnings").replaceChildren(...(job.warnings ?? []).map(warning));
    part("headline").textContent = { cancelled: "Cancelled", error: "Failed" }[job.state] ?? "";
    if (job.state === "queued") say(waiting(job));
    if (job.state === "running" && !bar.hasAttribute("value")) say("Drawing");
    if (!isLive(job.state)) part("preview").hidden = true;
    if (job.images.length && !hadPictures) showPictures();
  }

  function say(text, percent) {
    part("stage").textContent = text;
    if (percent === undefined) bar.removeAttribute("value");
    else bar.value = percent;
  }

  function tell({ name, data }) {
    if (name === "progress") {
      element.dataset.state = "running";
      say(data.step < data.total ? `Step ${data.step} of ${data.total}` : "Finishing", data.percent);
    } else if (name === "preview") {
      const preview = part("preview");
      preview.src = `data:image/${data.format};base64,${data.image}`;
      preview.hidden = false;
    }
  }

  async function showPictures() {
    urls = await Promise.all(job.images.map((_, number) => pictureUrl(imagePath(job, number))));
    if (urls.length > 1) {
      part("strip").hidden = false;
      part("strip").replaceChildren(...urls.map(thumbnail));
    }
    select(0);
  }

  function thumbnail(url, number) {
    const button = document.createElement("button");
    button.type = "button";
    button.ariaLabel = `Picture ${number + 1}`;
    const image = new Image();
    Object.assign(image, { src: url, alt: "", loading: "lazy", onload: sharpen });
    button.append(image);
    button.addEventListener("click", () => select(number));
    return button;
  }

  function select(number) {
    shown = number;
    const image = part("open").querySelector("img");
    Object.assign(image, { onload: sharpen, loading: "lazy", alt: job.request.prompt, src: urls[number] });
    part("open").hidden = false;
    Object.assign(part("download"), { href: urls[number], download: fileName(job, number) });
    [...part("strip").children].forEach((button, i) => (button.ariaPressed = String(i === number)));
    const seed = element.querySelector("[data-fact=Seed] dd");
    seed.textContent = seedOf(job, number);
  }

  const pictures = () =>
    urls.map((url, number) => ({ url, job, number, seed: seedOf(job, number), download: fileName(job, number) }));

  update(job);
  return { element, update, tell, pictures };
}

function fileName({ job_id: id, request }, number) {
  const extension = { jpeg: "jpg" }[request.response] ?? request.response;
  return `${id}-${number}.${extension}`;
}

/** Show a few lines of a long text, and a button for the rest. */
function fold(text, button) {
  let isOpen = false;
  const look = () => (button.hidden = !isOpen && text.scrollHeight <= text.clientHeight + 1);
  button.addEventListener("click", () => {
    isOpen = !isOpen;
    text.classList.toggle("whole", isOpen);
    button.textContent = isOpen ? "Show less" : "Show all";
    button.ariaExpanded = String(isOpen);
  });
  new ResizeObserver(look).observe(text);
}

function warning(text) {
  const item = document.createElement("li");
  item.textContent = text.charAt(0).toUpperCase() + text.slice(1);
  return item;
}

/** Pictures after the first have the seeds that follow. */
const seedOf = ({ request }, number) => String((BigInt(request.seed) + BigInt(number)) % 2n ** 64n);

export function sharpen({ target }) {
  target.classList.toggle("pixels", Math.max(target.naturalWidth, target.naturalHeight) <= SMALL);
}

function waiting({ position, eta_seconds: eta }) {
  if (position === null) return "Waiting";
  const place = position === 1 ? "Next in the queue" : `Number ${position} in the queue`;
  return eta === null ? place : `${place}, ~${duration(eta)}`;
}

const duration = (seconds) => {
  if (seconds < 1) return "a second";
  return seconds < 90 ? `${Math.round(seconds)}\u00a0s` : `${Math.round(seconds / 60)}\u00a0min`;
};

/** What a picture was made with, as elements of a list. */
export function facts({ request, started, finished, timings }, seed) {
  const found = [
    ["Seed", seed],
    ["Size", `${request.width}×${request.height}`],
    ["Steps", request.steps],
    ["Guidance", request.guidance_scale],
    ["Sampler", request.sampler],
  ];
  if (request.schedule) found.push(["Schedule", request.schedule]);
  if (request.strength !== undefined) found.push(["Strength", request.strength]);
  if (request.operation !== "image_generation") found.push(["From", request.mask_image ? "picture and mask" : "picture"]);
  for (const { path, strength } of request.loras) found.push(["Adapter", `${path}:${strength}`]);
  if (Object.keys(timings).length && started && finished) found.push(["Took", `${(finished - started).toFixed(1)} s`]);
  return found.map(([name, value]) => fact(name, value));
}

function fact(name, value) {
  const box = document.createElement("div");
  box.dataset.fact = name;
  const term = document.createElement("dt");
  const said = document.createElement("dd");
  term.textContent = name;
  said.textContent = value;
  box.append(term, said);
  return box;
}
