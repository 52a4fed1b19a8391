// Classifies a drawn digit by an ONNX model of the task `digits`. The drawing never leaves the page.
//
// ?model=  the model's address; by default digits.onnx beside this page.
// ?ort=    where onnxruntime-web lies; by default /node_modules/onnxruntime-web/dist/.

const asked = new URLSearchParams(location.search);
const runtime = new URL(asked.get("ort") ?? "/node_modules/onnxruntime-web/dist/", location.href).href;
const canvas = document.getElementById("drawing");
const pen = canvas.getContext("2d", { willReadFrequently: true });
const say = (text) => (document.getElementById("status").textContent = text);
let ort, session;

// The pixels of the drawing as the training data were made: the ink is scaled to 32 × 32 and each pixel of the
// 8 × 8 picture is the share of ink in its 4 × 4 block.
function picture() {
  const { width, height } = canvas;
  const alpha = pen.getImageData(0, 0, width, height).data;
  const inked = (x, y) => alpha[4 * (y * width + x) + 3] > 127;
  let [left, top, right, bottom] = [width, height, -1, -1];
  for (let y = 0; y < height; y++)
    for (let x = 0; x < width; x++)
      if (inked(x, y)) [left, top, right, bottom] = [Math.min(left, x), Math.min(top, y), Math.max(right, x), Math.max(bottom, y)];
  if (right < 0) return null;
  const side = Math.max(right - left, bottom - top) + 1;
  const [x0, y0] = [(left + right + 1 - side) / 2, (top + bottom + 1 - side) / 2];
  const pixels = new Float32Array(64);
  for (let i = 0; i < 32; i++)
    for (let j = 0; j < 32; j++) {
      const [x, y] = [Math.floor(x0 + ((j + 0.5) * side) / 32), Math.floor(y0 + ((i + 0.5) * side) / 32)];
      const inside = x >= 0 && y >= 0 && x < width && y < height;
      if (inside && inked(x, y)) pixels[8 * (i >> 2) + (j >> 2)] += 1 / 16;
    }
  return pixels;
}

export async function classify(pixels) {
  const x = new ort.Tensor("float32", pixels, [1, 8, 8, 1]);
  return Array.from((await session.run({ x })).y.data);
}

async function show() {
  const pixels = picture();
  if (pixels === null || session === undefined) return;
  const probabilities = await classify(pixels);
  const best = probabilities.indexOf(Math.max(...probabilities));
  document.getElementById("digit").value = String(best);
  const rows = probabilities.map((p, digit) => {
    const row = document.createElement("tr");
    row.insertCell().textContent = digit;
    row.insertCell().append(Object.assign(document.createElement("meter"), { value: p }));
    row.insertCell().textContent = p.toFixed(3);
    return row;
  });
  document.getElementById("probabilities").replaceChildren(...rows);
}

const place = (event) => {
  const box = canvas.getBoundingClientRect();
  return [((event.clientX - box.left) * canvas.width) / box.width, ((event.clientY - box.top) * canvas.height) / box.height];
};
canvas.addEventListener("pointerdown", (event) => {
  canvas.setPointerCapture(event.pointerId);
  Object.assign(pen, { lineWidth: 24, lineCap: "round", lineJoin: "round" });
  pen.beginPath();
  pen.moveTo(...place(event));
});
canvas.addEventListener("pointermove", (event) => {
  if (!event.buttons) return;
  pen.lineTo(...place(event));
  pen.stroke();
});
canvas.addEventListener("pointerup", show);
document.getElementById("clear").addEventListener("click", () => {
  pen.clearRect(0, 0, canvas.width, canvas.height);
  document.getElementById("digit").value = "";
  document.getElementById("probabilities").replaceChildren();
});

try {
  ort = await import(`${runtime}ort.wasm.min.mjs`);
  ort.env.wasm.wasmPaths = runtime;
  ort.env.wasm.numThreads = 1;
  session = await ort.InferenceSession.create(asked.get("model") ?? "digits.onnx");
  say("Ready. The drawing stays in this page.");
  await show();
} catch (error) {
  say(`The model cannot be loaded: ${error.message ?? error}`);
}
