/** One picture large, with what it was made with, and the ones before and after it. */

import { facts, sharpen } from "./card.js";

const SWIPE = 50;

const element = (id) => document.getElementById(`viewer-${id}`);

/**
 * Make the viewer work.
 *
 * @param reuse called with a job whose settings are to be used again.
 * @returns a function that shows one of several pictures, `{url, job, number, seed, download}` each.
 */
export function viewer({ reuse }) {
  const dialog = document.getElementById("viewer");
  let pictures = [];
  let at = 0;

  function show(index) {
    if (!(index in pictures)) return;
    at = index;
    const { url, job, seed, download } = pictures[at];
    Object.assign(element("image"), { src: url, alt: job.request.prompt, onload: sharpen });
    element("prompt").textContent = job.request.prompt;
    element("prompt").scrollTop = 0;
    element("facts").replaceChildren(...facts(job, seed));
    element("place").textContent = `${at + 1} of ${pictures.length}`;
    Object.assign(element("download"), { href: url, download });
    element("previous").disabled = at === 0;
    element("next").disabled = at === pictures.length - 1;
  }

  element("previous").addEventListener("click", () => show(at - 1));
  element("next").addEventListener("click", () => show(at + 1));
  element("reuse").addEventListener("click", () => {
    dialog.close();
    reuse(pictures[at].job);
  });
  dialog.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step) show(at + step);
  });
  dialog.addEventListener("click", ({ target }) => target === dialog && dialog.close());

  let from = null;
  element("image").addEventListener("pointerdown", (event) => (from = event.isPrimary ? event.clientX : null));
  element("image").addEventListener("pointerup", (event) => {
    const way = from === null ? 0 : event.clientX - from;
    if (Math.abs(way) > SWIPE) show(at - Math.sign(way));
    from = null;
  });

  return (all, index) => {
    pictures = all;
    show(index);
    if (!dialog.open) dialog.showModal();
  };
}
