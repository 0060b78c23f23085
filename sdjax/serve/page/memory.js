/** What stands in the form, kept for a reload of this tab. */

const KEY = "sdjax.form";
const PICTURES = "sdjax.form.pictures";

/** What was kept under a key; null where nothing is, or nothing that can be read. */
function kept(key) {
  try {
    return JSON.parse(sessionStorage.getItem(key));
  } catch {
    return null;
  }
}

/** Keep a value; a browser that has no room for it keeps nothing. */
function keep(key, value) {
  try {
    sessionStorage.setItem(key, JSON.stringify(value));
  } catch {
    sessionStorage.removeItem(key);
  }
}

export const keptFields = () => kept(KEY);
export const keepFields = (fields) => keep(KEY, fields);

/** The start picture and the mask, as data URIs. */
export const keepPictures = (pictures) => keep(PICTURES, pictures);

/** The start picture and the mask, as blobs. */
export function keptPictures() {
  const { picture, mask } = kept(PICTURES) ?? {};
  return { picture: picture && blob(picture), mask: mask && blob(mask) };
}

function blob(uri) {
  const [head, data] = uri.split(",");
  const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
  return new Blob([bytes], { type: head.slice(5).split(";")[0] });
}
