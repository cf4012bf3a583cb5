/* Surface viewer: drag to turn, pinch or ctrl + wheel to zoom. */
for (const figure of document.querySelectorAll("figure.surfaces")) (() => {
  const data = JSON.parse(figure.querySelector("script").textContent);
  const canvas = document.createElement("canvas");
  const gl = canvas.getContext("webgl2", {antialias: true});
  if (!gl) return; /* the picture stays */

  const compile = (type, source) => {
    const shader = gl.createShader(type);
    gl.shaderSource(shader, source);
    gl.compileShader(shader);
    return shader;
  };
  const program = gl.createProgram();
  gl.attachShader(program, compile(gl.VERTEX_SHADER, `#version 300 es
    in vec3 place; in vec3 normal;
    uniform mat3 turn; uniform vec3 centre; uniform vec2 zoom;
    out vec3 n;
    void main() {
      vec3 p = turn * (place - centre);
      n = turn * normal;
      gl_Position = vec4(p.xy * zoom, -p.z * 0.4, 1.0 - p.z * 0.25);
    }`));
  gl.attachShader(program, compile(gl.FRAGMENT_SHADER, `#version 300 es
    precision highp float;
    in vec3 n; uniform vec3 ink; out vec4 colour;
    void main() {
      vec3 m = normalize(n);
      float light = 0.2 + 0.75 * max(dot(m, normalize(vec3(-0.5, 0.65, 0.6))), 0.0)
                  + 0.22 * max(dot(m, normalize(vec3(0.8, 0.1, 0.5))), 0.0);
      light *= 0.55 + 0.45 * sqrt(max(m.z, 0.0));
      float shine = 0.25 * pow(max(dot(m, normalize(vec3(-0.5, 0.65, 1.6))), 0.0), 24.0);
      colour = vec4(ink * light + shine, 1.0);
    }`));
  gl.linkProgram(program);
  if (!gl.getProgramParameter(program, gl.LINK_STATUS)) return;
  gl.useProgram(program);
  const uniform = (name) => gl.getUniformLocation(program, name);

  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer;
  const meshes = data.meshes.map((mesh) => {
    const whole = new Uint16Array(bytes(mesh.positions)), faces = new Uint32Array(bytes(mesh.indices));
    const places = Float32Array.from(whole, (v) => v / 65535), normals = new Float32Array(places.length);
    for (let f = 0; f < faces.length; f += 3) {
      const [a, b, c] = [faces[f] * 3, faces[f + 1] * 3, faces[f + 2] * 3];
      const e = [0, 1, 2].map((k) => places[b + k] - places[a + k]), g = [0, 1, 2].map((k) => places[c + k] - places[a + k]);
      const cross = [e[1] * g[2] - e[2] * g[1], e[2] * g[0] - e[0] * g[2], e[0] * g[1] - e[1] * g[0]];
      for (const v of [a, b, c]) for (let k = 0; k < 3; k++) normals[v + k] += cross[k];
    }
    const array = gl.createVertexArray();
    gl.bindVertexArray(array);
    for (const [name, values] of [["place", places], ["normal", normals]]) {
      const where = gl.getAttribLocation(program, name);
      gl.bindBuffer(gl.ARRAY_BUFFER, gl.createBuffer());
      gl.bufferData(gl.ARRAY_BUFFER, values, gl.STATIC_DRAW);
      gl.enableVertexAttribArray(where);
      gl.vertexAttribPointer(where, 3, gl.FLOAT, false, 0, 0);
    }
    gl.bindBuffer(gl.ELEMENT_ARRAY_BUFFER, gl.createBuffer());
    gl.bufferData(gl.ELEMENT_ARRAY_BUFFER, faces, gl.STATIC_DRAW);
    const ink = [1, 3, 5].map((i) => parseInt(mesh.colour.slice(i, i + 2), 16) / 255);
    return {array, count: faces.length, ink, shown: true, ...mesh};
  });

  let [azimuth, elevation] = data.view, zoom = 1;
  const centre = data.extent.map((v) => v / 2), reach = Math.hypot(...data.extent);

  function draw() {
    const ratio = Math.min(devicePixelRatio || 1, 2);
    canvas.width = Math.round(canvas.clientWidth * ratio);
    canvas.height = Math.round(canvas.clientHeight * ratio);
    gl.viewport(0, 0, canvas.width, canvas.height);
    gl.clearColor(0.027, 0.035, 0.047, 1);
    gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
    gl.enable(gl.DEPTH_TEST);
    const a = azimuth * Math.PI / 180, e = elevation * Math.PI / 180;
    const towards = [Math.cos(e) * Math.sin(a), Math.cos(e) * Math.cos(a), Math.sin(e)];
    const right = [-Math.cos(a), Math.sin(a), 0];
    const up = [towards[1] * right[2] - towards[2] * right[1], towards[2] * right[0] - towards[0] * right[2],
                towards[0] * right[1] - towards[1] * right[0]];
    gl.uniformMatrix3fv(uniform("turn"), false, [0, 1, 2].flatMap((k) => [right[k], up[k], towards[k]]));
    gl.uniform3fv(uniform("centre"), centre);
    const side = 2.7 * zoom / reach, aspect = canvas.width / canvas.height;
    gl.uniform2f(uniform("zoom"), side / Math.max(aspect, 1), side * Math.min(aspect, 1));
    for (const mesh of meshes) if (mesh.shown) {
      gl.bindVertexArray(mesh.array);
      gl.uniform3fv(uniform("ink"), mesh.ink);
      gl.drawElements(gl.TRIANGLES, mesh.count, gl.UNSIGNED_INT, 0);
    }
  }

  /* Turns by itself until touched, unless the reader prefers stillness. */
  let turning = !matchMedia("(prefers-reduced-motion: reduce)").matches, before = 0, seen = false;
  const spin = (now) => {
    if (!turning || !seen) { before = 0; return; }
    if (before) azimuth += (now - before) * 0.008;
    before = now;
    draw();
    requestAnimationFrame(spin);
  };
  new IntersectionObserver((entries) => {
    const was = seen;
    seen = entries[entries.length - 1].isIntersecting;
    if (seen && !was) requestAnimationFrame(spin);
  }).observe(canvas);

  const fingers = new Map();
  let spread = 0;
  canvas.addEventListener("pointerdown", (event) => {
    turning = false;
    canvas.setPointerCapture(event.pointerId);
    fingers.set(event.pointerId, [event.clientX, event.clientY]);
    spread = 0;
  });
  for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, (event) => fingers.delete(event.pointerId));
  canvas.addEventListener("pointermove", (event) => {
    const last = fingers.get(event.pointerId);
    if (!last) return;
    if (fingers.size === 1) {
      azimuth -= (event.clientX - last[0]) * 0.4;
      elevation = Math.max(-89, Math.min(89, elevation + (event.clientY - last[1]) * 0.4));
    }
    fingers.set(event.pointerId, [event.clientX, event.clientY]);
    if (fingers.size === 2) {
      const [p, q] = [...fingers.values()], now = Math.hypot(p[0] - q[0], p[1] - q[1]);
      if (spread) zoom = Math.max(0.5, Math.min(6, zoom * now / spread));
      spread = now;
    }
    draw();
  });
  canvas.addEventListener("wheel", (event) => {
    if (!event.ctrlKey) return; /* plain scrolling belongs to the page */
    event.preventDefault();
    zoom = Math.max(0.5, Math.min(6, zoom * Math.exp(-event.deltaY * 0.002)));
    draw();
  }, {passive: false});
  canvas.tabIndex = 0;
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", "Surface that can be turned; arrow keys turn it, plus and minus zoom");
  canvas.addEventListener("keydown", (event) => {
    const turn = {ArrowLeft: [-6, 0], ArrowRight: [6, 0], ArrowUp: [0, 6], ArrowDown: [0, -6]}[event.key];
    const scale = {"+": 1.15, "-": 1 / 1.15}[event.key];
    if (!turn && !scale) return;
    event.preventDefault();
    turning = false;
    if (turn) { azimuth += turn[0]; elevation = Math.max(-89, Math.min(89, elevation + turn[1])); }
    if (scale) zoom = Math.max(0.5, Math.min(6, zoom * scale));
    draw();
  });

  const stage = figure.querySelector(".stage");
  stage.textContent = "";
  stage.append(canvas);
  if (meshes.length > 1) {
    const controls = document.createElement("div");
    controls.className = "controls";
    for (const mesh of meshes) {
      const button = document.createElement("button");
      button.type = "button";
      const dot = document.createElement("span");
      dot.className = "dot";
      dot.style.background = mesh.colour;
      button.append(dot, mesh.name);
      button.setAttribute("aria-pressed", mesh.shown);
      button.addEventListener("click", () => {
        mesh.shown = !mesh.shown;
        button.setAttribute("aria-pressed", mesh.shown);
        draw();
      });
      controls.append(button);
    }
    stage.after(controls);
  }
  new ResizeObserver(draw).observe(canvas);
})();
