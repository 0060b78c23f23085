/** The form: its limits come from the server, and what is wrong stands beside the field. */

import { file } from "./api.js";
import { keepFields, keepPictures, keptFields, keptPictures } from "./memory.js";
import { startPicture } from "./start.js";
import { inWords, mistake } from "./words.js";

const NUMBERS = ["width", "height", "steps", "guidance_scale", "num_images", "strength"];
const MODELS_OWN = ["width", "height", "steps", "guidance_scale", "sampler", "schedule"];
const FIELDS = [...NUMBERS, "prompt", "negative_prompt", "seed", "sampler", "schedule", "response", "loras"];
const SAVE_AFTER = 300;
const PREVIEWS = 10;

const form = document.getElementById("form");
const control = (name) => form.elements[name];

/** The limits of a field in the API's description, whether or not it may be null. */
function schemaOf(document, model, name) {
  const schema = document.components.schemas[model].properties[name];
  return schema.anyOf?.find(({ type }) => type !== "null") ?? schema;
}

/**
 * Make the form work.
 *
 * @param onSubmit called with the fields of a job.
 */
export function jobForm({ onSubmit }) {
  let model = { size: 512, steps: 20, guidance_scale: 7.5 };
  let multiple = 8;
  let before = keptFields();
  let saving;
  const start = startPicture({
    onPaint: save,
    onChange: (picture) => {
      save();
      document.getElementById("size").disabled = picture !== null;
      document.getElementById("size-hint").hidden = picture === null;
      clearProblems();
    },
    onError: showProblem,
  });

  /** Take limits and lists from the API's description. */
  function describe(document) {
    for (const name of ["steps", "guidance_scale", "num_images", "width", "height"]) {
      const { minimum, maximum, multipleOf } = schemaOf(document, "ImageGeneration", name);
      Object.assign(control(name), { min: minimum, max: maximum });
      if (multipleOf) control(name).step = multiple = multipleOf;
    }
    start.limit(Number(control("width").max));
    options(control("sampler"), schemaOf(document, "ImageGeneration", "sampler").enum);
    options(control("response"), schemaOf(document, "ImageGeneration", "response").enum);
    options(control("schedule"), ["", ...schemaOf(document, "ImageGeneration", "schedule").enum]);
    control("schedule").options[0].textContent = "default";
    restore();
    for (const slider of form.querySelectorAll("[data-for]")) {
      const { min, max, step } = control(slider.dataset.for);
      Object.assign(slider, { min, max, step });
    }
    showSliders();
  }

  /** Take the model's own values, where nothing was filled in. */
  function suit(served, name) {
    model = { ...served, name };
    if (before && before.model !== name) for (const field of MODELS_OWN) control(field).value = "";
    before = null;
    control("width").min = control("height").min = model.least_side;
    const own = { ...model, width: model.size, height: model.size };
    for (const name of ["width", "height", "steps", "guidance_scale"]) control(name).value ||= own[name];
    const sampler = [...control("sampler").options].find(({ value }) => value === model.sampler);
    if (sampler) sampler.textContent = `${model.sampler}, default`;
    control("sampler").value ||= model.sampler;
    showSliders();
    save();
  }

  /** Fill in what stood here before a reload. */
  async function restore() {
    if (!before) return;
    for (const name of FIELDS) {
      const isUntouched = control(name).value === (control(name).defaultValue ?? control(name).value);
      if (isUntouched && before[name] !== undefined) control(name).value = before[name];
    }
    document.getElementById("previews").checked = before.previews;
    showSliders();
    const { picture, mask } = keptPictures();
    if (picture && (await start.load(picture)) && mask) await start.loadMask(mask);
  }

  /** Keep what stands here, for a reload. */
  function save() {
    clearTimeout(saving);
    saving = setTimeout(async () => {
      saveFields();
      keepPictures(await start.pictures());
    }, SAVE_AFTER);
  }

  function saveFields() {
    if (before) return; // what was kept is still being filled in
    const fields = Object.fromEntries(FIELDS.map((name) => [name, control(name).value]));
    keepFields({ ...fields, previews: document.getElementById("previews").checked, model: model.name });
  }

  async function submitted() {
    clearProblems();
    const wrong = [...form.elements].find((each) => each.name && mistake(each));
    if (wrong) return showProblem(wrong.name, mistake(wrong));
    const button = document.getElementById("draw");
    button.disabled = true;
    try {
      await onSubmit({ ...values(), ...(await placed()) });
    } catch (error) {
      showProblem(error.field, inWords(error));
    } finally {
      button.disabled = false;
    }
  }

  function values() {
    const number = (name) => (control(name).value === "" ? undefined : Number(control(name).value));
    const text = (name) => control(name).value.trim() || undefined;
    const steps = number("steps");
    return {
      prompt: control("prompt").value,
      negative_prompt: text("negative_prompt"),
      steps,
      guidance_scale: number("guidance_scale"),
      sampler: text("sampler"),
      schedule: text("schedule"),
      seed: text("seed"),
      num_images: number("num_images"),
      response: text("response"),
      loras: control("loras").value.split("\n").filter((line) => line.trim()).map(adapter),
      preview_every: document.getElementById("previews").checked ? Math.max(1, Math.floor((steps || model.steps) / PREVIEWS)) : 0,
    };
  }

  /** What the operation has beside: a size, or a start picture and how much of it goes. */
  async function placed() {
    const fields = await start.fields();
    const names = fields.operation === "image_generation" ? ["width", "height"] : ["strength"];
    for (const name of names) if (control(name).value !== "") fields[name] = Number(control(name).value);
    return fields;
  }

  /** Fill in what a job was made with. */
  async function fill(job) {
    const { request } = job;
    clearProblems();
    for (const name of [...NUMBERS, "prompt", "negative_prompt", "seed", "sampler", "response"]) {
      if (name in request) control(name).value = request[name] ?? "";
    }
    control("schedule").value = request.schedule ?? "";
    control("loras").value = request.loras.map(({ path, strength }) => `${path}:${strength}`).join("\n");
    document.getElementById("previews").checked = request.preview_every > 0;
    showSliders();
    const given = (name) => file(`v1/jobs/${job.job_id}/inputs/${name}`);
    start.remove();
    if (request.input_image) await start.load(await given("input_image"));
    if (request.init_image && (await start.load(await given("init_image")))) await start.loadMask(await given("mask_image"));
    control("prompt").focus();
    save();
  }

  /** Start from a picture that a job drew. */
  async function startFrom(job, blob) {
    await start.load(blob);
    control("prompt").value ||= job.request.prompt;
    control("prompt").focus({ preventScroll: true });
    control("prompt").parentElement.scrollIntoView();
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    submitted();
  });
  form.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
  form.addEventListener("input", ({ target }) => {
    if (target.dataset.for) control(target.dataset.for).value = target.value;
    showSliders();
    save();
  });
  addEventListener("pagehide", saveFields);
  document.getElementById("random-seed").addEventListener("click", () => {
    control("seed").value = crypto.getRandomValues(new Uint32Array(1))[0];
    save();
  });
  for (const button of form.querySelectorAll("[data-shape]")) {
    button.addEventListener("click", () => {
      const [width, height] = sides(button.dataset.shape, model.size, multiple);
      Object.assign(control("width"), { value: width });
      Object.assign(control("height"), { value: height });
      save();
    });
  }
  return { describe, suit, fill, startFrom };
}

/** Sides of a shape such as "2:3", the shorter one the model's own. */
function sides(shape, size, multiple) {
  const [across, down] = shape.split(":").map(Number);
  const unit = size / Math.min(across, down);
  return [across, down].map((part) => Math.round((part * unit) / multiple) * multiple);
}

function adapter(line) {
  const [, path, weight] = /^(.*?)(?::(-?[\d.]+))?$/.exec(line.trim());
  return { path, strength: weight === undefined ? 1 : Number(weight) };
}

function options(select, values) {
  select.replaceChildren(...values.map((value) => new Option(value, value)));
}

function showSliders() {
  for (const slider of form.querySelectorAll("[data-for]")) {
    slider.value = control(slider.dataset.for).value;
    const { min, max, value } = slider;
    slider.style.setProperty("--part", `${(100 * (value - min)) / (max - min)}%`);
  }
}

/** Show beside a field what is wrong with it; beside the button, where it is none in particular. */
function showProblem(name, message) {
  const top = name?.split(".")[0];
  const field = top && form.querySelector(`[data-field~="${CSS.escape(top)}"]`);
  if (!field) {
    document.getElementById("form-problem").textContent = message;
    return;
  }
  field.closest("details")?.setAttribute("open", "");
  const problem = document.createElement("p");
  problem.className = "problem";
  problem.id = `${top}-problem`;
  problem.setAttribute("role", "alert");
  problem.textContent = message;
  field.append(problem);
  const input = control(top) ?? field.querySelector("input, canvas");
  input.setAttribute("aria-invalid", "true");
  input.setAttribute("aria-describedby", problem.id);
  input.focus();
  problem.scrollIntoView({ block: "nearest" });
}

function clearProblems() {
  document.getElementById("form-problem").textContent = "";
  for (const problem of form.querySelectorAll("[data-field] > .problem")) problem.remove();
  for (const input of form.querySelectorAll("[aria-invalid]")) {
    input.removeAttribute("aria-invalid");
    input.removeAttribute("aria-describedby");
  }
}
