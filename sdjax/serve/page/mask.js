/** The mask: what a brush, a rectangle or a file has painted over the start picture. */

const OPAQUE = 128;

/**
 * A mask on a canvas as large as the picture.
 *
 * What was done is a list of marks, each a function that draws itself; undo takes the last one away and draws the rest
 * again.
 */
export class Mask {
  #marks = [];

  constructor(canvas, onChange) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d", { willReadFrequently: true });
    this.onChange = onChange;
  }

  /** Begin anew, for a picture of this size. */
  reset(width, height) {
    Object.assign(this.canvas, { width, height });
    this.#marks = [];
    this.onChange(this);
  }

  get isUntouched() {
    return this.#marks.length === 0;
  }

  undo() {
    this.#marks.pop();
    this.#redraw();
  }

  clear() {
    this.#marks = [];
    this.#redraw();
  }

  /** Begin a stroke; the function that is returned takes it on to further points. */
  stroke(x, y, size, isErasing) {
    const points = [[x, y]];
    this.#add(() => drawStroke(this.context, points, size, isErasing));
    return (nextX, nextY) => {
      const tail = [points.at(-1), [nextX, nextY]];
      points.push(tail[1]);
      drawStroke(this.context, tail, size, isErasing);
    };
  }

  rectangle(x, y, width, height) {
    this.#add(() => this.context.fillRect(x, y, width, height));
  }

  /** White parts of a picture. */
  image(bitmap) {
    const { width, height } = this.canvas;
    const copy = new OffscreenCanvas(width, height);
    const context = copy.getContext("2d");
    context.fillRect(0, 0, width, height); // what is transparent there is black
    context.drawImage(bitmap, 0, 0, width, height);
    const { data } = context.getImageData(0, 0, width, height);
    const [red, green, blue] = rgb(this.color);
    for (let i = 0; i < data.length; i += 4) {
      const isWhite = 0.299 * data[i] + 0.587 * data[i + 1] + 0.114 * data[i + 2] >= OPAQUE;
      data.set([red, green, blue, isWhite ? 255 : 0], i);
    }
    context.putImageData(new ImageData(data, width, height), 0, 0);
    this.#add(() => this.context.drawImage(copy, 0, 0));
  }

  /** White on black as a PNG, with nothing in between; null where nothing is painted. */
  async toBlob() {
    const { width, height } = this.canvas;
    const { data } = this.context.getImageData(0, 0, width, height);
    let painted = 0;
    for (let i = 0; i < data.length; i += 4) {
      const level = data[i + 3] >= OPAQUE ? 255 : 0;
      painted += level;
      data.set([level, level, level, 255], i);
    }
    if (painted === 0) return null;
    const copy = new OffscreenCanvas(width, height);
    copy.getContext("2d").putImageData(new ImageData(data, width, height), 0, 0);
    return copy.convertToBlob({ type: "image/png" });
  }

  get color() {
    return getComputedStyle(this.canvas).color;
  }

  #add(mark) {
    this.#marks.push(mark);
    this.context.fillStyle = this.context.strokeStyle = this.color;
    mark();
    this.onChange(this);
  }

  #redraw() {
    this.context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    this.context.fillStyle = this.context.strokeStyle = this.color;
    for (const mark of this.#marks) mark();
    this.onChange(this);
  }
}

function drawStroke(context, points, size, isErasing) {
  context.globalCompositeOperation = isErasing ? "destination-out" : "source-over";
  Object.assign(context, { lineWidth: size, lineCap: "round", lineJoin: "round" });
  context.beginPath();
  context.arc(...points[0], size / 2, 0, 2 * Math.PI); // a line of no length is not drawn
  context.fill();
  context.beginPath();
  context.moveTo(...points[0]);
  for (const point of points) context.lineTo(...point);
  context.stroke();
  context.globalCompositeOperation = "source-over";
}

const rgb = (color) => color.match(/\d+(\.\d+)?/g).slice(0, 3).map(Number);

/** Paint with whatever points: mouse, pen, finger, or the arrow keys and Space. `tool()` gives `{size, isErasing}`. */
export function brush(mask, cursor, tool) {
  const { canvas } = mask;
  let extend = null;
  let place = null;

  const scale = () => canvas.width / canvas.getBoundingClientRect().width;
  const point = (event) => {
    const box = canvas.getBoundingClientRect();
    return [(event.clientX - box.left) * scale(), (event.clientY - box.top) * scale()];
  };
  const show = ([x, y]) => {
    place = [x, y];
    const size = tool().size / scale();
    cursor.hidden = false;
    Object.assign(cursor.style, {
      width: `${size}px`, height: `${size}px`, left: `${x / scale() - size / 2}px`, top: `${y / scale() - size / 2}px`,
    });
  };
  const dab = () => mask.stroke(...place, tool().size, tool().isErasing);

  canvas.addEventListener("pointerdown", (event) => {
    if (event.button !== 0 || !event.isPrimary) return;
    canvas.setPointerCapture(event.pointerId);
    show(point(event));
    extend = dab();
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!event.isPrimary) return;
    show(point(event));
    if (!extend) return;
    const passed = event.getCoalescedEvents?.() ?? [];
    for (const each of passed.length ? passed : [event]) extend(...point(each));
  });
  for (const name of ["pointerup", "pointercancel", "lostpointercapture"]) {
    canvas.addEventListener(name, () => (extend = null));
  }
  canvas.addEventListener("pointerleave", () => (cursor.hidden = true));
  canvas.addEventListener("blur", () => (cursor.hidden = true));

  const ways = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  canvas.addEventListener("keydown", (event) => {
    place ??= [canvas.width / 2, canvas.height / 2];
    if (event.key in ways) {
      const step = event.shiftKey ? 1 : Math.max(1, tool().size / 2);
      const [dx, dy] = ways[event.key];
      const within = (value, end) => Math.min(Math.max(value, 0), end);
      show([within(place[0] + dx * step, canvas.width), within(place[1] + dy * step, canvas.height)]);
    } else if (event.key === " ") {
      show(place);
      dab();
    } else if (event.key === "z" && (event.ctrlKey || event.metaKey)) {
      mask.undo();
    } else {
      return;
    }
    event.preventDefault();
  });
}
