/* Scan viewer: three planes through one point; drag in a plane to move it. */
for (const figure of document.querySelectorAll("figure.slices")) (async () => {
  const data = JSON.parse(figure.querySelector("script").textContent);
  const [X, Y, Z] = data.shape, [dx, dy, dz] = data.spacing;

  /* Decode a tiled picture into one value a voxel. */
  const decode = async (uri) => {
    const image = new Image();
    image.src = uri;
    await image.decode();
    const canvas = document.createElement("canvas");
    canvas.width = image.naturalWidth;
    canvas.height = image.naturalHeight;
    const context = canvas.getContext("2d", {willReadFrequently: true});
    context.drawImage(image, 0, 0);
    const pixels = context.getImageData(0, 0, canvas.width, canvas.height).data;
    const out = new Uint8Array(X * Y * Z);
    for (let z = 0; z < Z; z++) {
      const left = (z % data.across) * X, top = Math.floor(z / data.across) * Y;
      for (let y = 0; y < Y; y++)
        for (let x = 0; x < X; x++)
          out[x + X * (y + Y * z)] = pixels[4 * ((top + y) * canvas.width + left + x)];
    }
    return out;
  };
  let grey, labels;
  try {
    [grey, labels] = await Promise.all([decode(data.grey), decode(data.labels)]);
  } catch { return; } /* the picture stays */

  const inks = data.classes.map((c) => [1, 3, 5].map((i) => parseInt(c.colour.slice(i, i + 2), 16)));
  /* Start inside of what is labelled, a little off its middle: there brains have a gap. */
  const areas = [new Uint32Array(X), new Uint32Array(Y), new Uint32Array(Z)];
  let count = 0;
  for (let i = 0; i < labels.length; i++) if (labels[i]) {
    areas[0][i % X]++; areas[1][Math.floor(i / X) % Y]++; areas[2][Math.floor(i / (X * Y))]++; count++;
  }
  const at = areas.map((area) => {
    let sum = 0;
    return count ? area.findIndex((n) => (sum += n) >= 0.4 * count) : area.length >> 1;
  });
  let mode = "prediction";

  const index = (x, y, z) => x + X * (y + Y * z);
  const planes = [
    {name: "sagittal", axis: 0, u: 1, v: 2, west: "P", east: "A", at: (u, v) => index(at[0], u, v)},
    {name: "coronal", axis: 1, u: 0, v: 2, west: "L", east: "R", at: (u, v) => index(u, at[1], v)},
    {name: "axial", axis: 2, u: 0, v: 1, west: "L", east: "R", at: (u, v) => index(u, v, at[2])},
  ];
  const box = figure.querySelector(".planes");
  box.textContent = "";
  box.classList.add("live");
  const size = [X * dx, Y * dy, Z * dz];
  box.style.gridTemplateColumns = planes.map((p) => `minmax(0, ${(size[p.u] / size[p.v]).toFixed(3)}fr)`).join(" ");

  for (const plane of planes) {
    const frame = document.createElement("div");
    frame.className = "plane";
    const canvas = document.createElement("canvas");
    canvas.tabIndex = 0;
    const w = data.shape[plane.u], h = data.shape[plane.v];
    const scale = Math.max(1, Math.round(900 / Math.max(w, h)));
    canvas.width = Math.round(w * scale);
    canvas.height = Math.round(canvas.width * size[plane.v] / size[plane.u]);
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `${plane.name} slice; arrow keys up and down change it`);
    const mark = (className, text) => {
      const b = document.createElement("b");
      b.className = className;
      b.textContent = text;
      frame.append(b);
      return b;
    };
    frame.append(canvas);
    plane.title = mark("n", "");
    mark("w", plane.west);
    mark("e", plane.east);
    box.append(frame);
    plane.canvas = canvas;
    plane.small = new ImageData(w, h);
    plane.buffer = document.createElement("canvas");
    plane.buffer.width = w;
    plane.buffer.height = h;
    const move = (event) => {
      const r = canvas.getBoundingClientRect();
      const clamp = (value, most) => Math.max(0, Math.min(most - 1, Math.floor(value)));
      at[plane.u] = clamp((event.clientX - r.left) / r.width * w, w);
      at[plane.v] = clamp((1 - (event.clientY - r.top) / r.height) * h, h);
      draw();
    };
    canvas.addEventListener("pointerdown", (event) => { canvas.setPointerCapture(event.pointerId); move(event); });
    canvas.addEventListener("pointermove", (event) => { if (event.buttons) move(event); });
    canvas.addEventListener("keydown", (event) => {
      const step = {ArrowUp: 1, ArrowDown: -1}[event.key];
      if (!step) return;
      event.preventDefault();
      at[plane.axis] = Math.max(0, Math.min(data.shape[plane.axis] - 1, at[plane.axis] + step));
      draw();
    });
  }

  /* Colour and strength for a voxel, or nothing. */
  const ink = (value) => {
    const p = value & 15, r = value >> 4;
    if (mode === "difference") return p === r ? null : [[255, 64, 92], 0.9];
    const k = mode === "prediction" ? p : mode === "reference" ? r : 0;
    return k ? [inks[k - 1], 0.42] : null;
  };

  function draw() {
    const table = Array.from({length: 256}, (_, value) => ink(value));
    for (const plane of planes) {
      const w = plane.small.width, h = plane.small.height, out = plane.small.data;
      for (let v = 0; v < h; v++)
        for (let u = 0; u < w; u++) {
          const i = plane.at(u, v), g = grey[i], over = table[labels[i]], o = 4 * ((h - 1 - v) * w + u);
          if (over) {
            const [c, a] = over;
            for (let k = 0; k < 3; k++) out[o + k] = g * (1 - a) + c[k] * a;
          } else out[o] = out[o + 1] = out[o + 2] = g;
          out[o + 3] = 255;
        }
      plane.buffer.getContext("2d").putImageData(plane.small, 0, 0);
      const canvas = plane.canvas, context = canvas.getContext("2d");
      context.imageSmoothingEnabled = true;
      context.imageSmoothingQuality = "high";
      context.drawImage(plane.buffer, 0, 0, canvas.width, canvas.height);
      const x = (at[plane.u] + 0.5) / w * canvas.width, y = (1 - (at[plane.v] + 0.5) / h) * canvas.height;
      context.strokeStyle = "rgba(255,255,255,.35)";
      context.lineWidth = 1.5;
      context.beginPath();
      context.moveTo(x, 0); context.lineTo(x, canvas.height);
      context.moveTo(0, y); context.lineTo(canvas.width, y);
      context.stroke();
      plane.title.textContent = `${plane.name} ${at[plane.axis]}`;
    }
  }

  const controls = document.createElement("div");
  controls.className = "controls";
  const modes = data.reference ? ["prediction", "reference", "difference", "scan only"] : ["prediction", "scan only"];
  for (const name of modes) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = name;
    button.setAttribute("aria-pressed", name === mode);
    button.addEventListener("click", () => {
      mode = name;
      for (const other of controls.querySelectorAll("button")) other.setAttribute("aria-pressed", other === button);
      draw();
    });
    controls.append(button);
  }
  for (const c of data.classes) {
    const key = document.createElement("span");
    key.className = "key";
    const swatch = document.createElement("i");
    swatch.style.background = c.colour;
    key.append(swatch, c.name);
    controls.append(key);
  }
  box.after(controls);
  draw();
})();
