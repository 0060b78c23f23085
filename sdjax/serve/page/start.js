/** The start picture, and the mask over it. */

import { Mask, brush } from "./mask.js";

/** Formats that the server takes as they are. */
const TAKEN = ["image/png", "image/jpeg", "image/webp"];
const MOST_BYTES = 8 * 2 ** 20;

const element = (id) => document.getElementById(id);

/**
 * The part of the form that holds the start picture.
 *
 * @param onChange called with `{width, height}` of the picture, or null when there is none any more.
 * @param onPaint called when the mask has changed.
 * @param onError called with a field's name and a sentence.
 */
export function startPicture({ onChange, onPaint, onError }) {
  const canvas = element("mask");
  let picture = null;
  let longest = 2048;
  let isErasing = false;

  const mask = new Mask(canvas, ({ isUntouched }) => {
    element("undo").disabled = element("clear").disabled = isUntouched;
    onPaint();
  });
  brush(mask, element("brush"), () => ({ size: Number(element("brush-size").value), isErasing }));

  async function load(blob) {
    try {
      picture = await prepared(blob, longest);
    } catch {
      onError("input_image", "The browser can not read this file as a picture.");
      return false;
    }
    const { url, width, height } = picture;
    element("start-image").src = url;
    mask.reset(width, height);
    const size = element("brush-size");
    size.max = Math.ceil(Math.max(width, height) / 3);
    size.value = Math.ceil(Math.min(width, height) / 6);
    Object.assign(element("rect-width"), { value: Math.round(width / 2), max: width });
    Object.assign(element("rect-height"), { value: Math.round(height / 2), max: height });
    show(true);
    onChange(picture);
    return true;
  }

  function remove() {
    if (picture) URL.revokeObjectURL(picture.url);
    picture = null;
    element("start-file").value = element("mask-file").value = "";
    show(false);
    onChange(null);
  }

  function show(isThere) {
    element("easel").hidden = !isThere;
    element("drop").hidden = isThere;
  }

  async function loadMask(blob) {
    try {
      mask.image(await createImageBitmap(blob));
    } catch {
      onError("mask_image", "The browser can not read this file as a picture.");
    }
  }

  /** What goes into the request: nothing, a picture, or a picture and a mask. */
  async function fields() {
    if (!picture) return { operation: "image_generation" };
    const [painted, data] = await Promise.all([mask.toBlob(), dataUri(picture.blob)]);
    if (!painted) return { operation: "image_transform", input_image: data };
    return { operation: "image_inpaint", init_image: data, mask_image: await dataUri(painted) };
  }

  /** The picture and the mask as data URIs, null each where there is none. */
  async function pictures() {
    const painted = picture && (await mask.toBlob());
    return { picture: picture && (await dataUri(picture.blob)), mask: painted && (await dataUri(painted)) };
  }

  element("start-file").addEventListener("change", ({ target }) => target.files[0] && load(target.files[0]));
  element("mask-file").addEventListener("change", ({ target }) => target.files[0] && loadMask(target.files[0]));
  element("undo").addEventListener("click", () => mask.undo());
  element("clear").addEventListener("click", () => mask.clear());
  element("remove-start").addEventListener("click", () => {
    remove();
    element("start-file").focus();
  });
  element("add-rect").addEventListener("click", () => {
    mask.rectangle(...["x", "y", "width", "height"].map((name) => Number(element(`rect-${name}`).value)));
  });
  for (const name of ["paint", "erase"]) {
    element(name).addEventListener("click", () => {
      isErasing = name === "erase";
      element("paint").ariaPressed = String(!isErasing);
      element("erase").ariaPressed = String(isErasing);
    });
  }
  receive(element("start"), load);

  return { load, loadMask, remove, fields, pictures, limit: (side) => (longest = side) };
}

/** Take files that are dropped on an element, or pasted anywhere. */
function receive(target, load) {
  const file = (data) => [...(data?.files ?? [])].find(({ type }) => type.startsWith("image/"));
  target.addEventListener("dragover", (event) => {
    event.preventDefault();
    target.classList.add("over");
  });
  for (const name of ["dragleave", "drop"]) target.addEventListener(name, () => target.classList.remove("over"));
  target.addEventListener("drop", (event) => {
    event.preventDefault();
    if (file(event.dataTransfer)) load(file(event.dataTransfer));
  });
  document.addEventListener("paste", (event) => {
    if (file(event.clipboardData)) load(file(event.clipboardData));
  });
}

/** The picture as it is sent: its own bytes where the server takes them, else drawn anew, no larger than it draws. */
async function prepared(blob, longest) {
  const bitmap = await createImageBitmap(blob);
  const shrink = Math.min(1, longest / Math.max(bitmap.width, bitmap.height));
  if (shrink === 1 && TAKEN.includes(blob.type) && blob.size <= MOST_BYTES) return described(blob, bitmap);
  const copy = new OffscreenCanvas(Math.round(bitmap.width * shrink), Math.round(bitmap.height * shrink));
  const context = copy.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, copy.width, copy.height);
  const isLarge = copy.width * copy.height > 2 ** 21;
  return described(await copy.convertToBlob(isLarge ? { type: "image/jpeg", quality: 0.95 } : {}), copy);
}

const described = (blob, { width, height }) => ({ blob, width, height, url: URL.createObjectURL(blob) });

function dataUri(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}
