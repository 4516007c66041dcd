// The page: a bundle is loaded and checks itself, then a picked image is classified.
//
// ?bundle=URL loads one that is served; ?ort=URL takes onnxruntime-web from a folder in place of the CDN.

import { Bundle, readPicked, readServed } from "./bundle.js";
import { loadRuntime, Model, softmax, VERSION } from "./model.js";
import { fit, normalise } from "./preprocess.js";

const TOLERANCE = 1e-5; // PARITY_TOLERANCE of runtimes/parity.py
const SHOWN_CLASSES = 5;

const element = (id) => document.getElementById(id);
const query = new URLSearchParams(location.search);
const runtime = loadRuntime(query.get("ort") ?? undefined);
runtime.catch(() => {}); // told when a bundle is loaded
let model = null;

element("folder").addEventListener("change", ({ target }) => {
  if (target.files.length) attempt("Loading …", () => loadBundle(readPicked(target.files)));
});
element("file").addEventListener("change", ({ target }) => {
  if (target.files.length) attempt("Classifying …", () => classify(target.files[0]));
});
if (query.has("bundle")) attempt("Loading …", () => loadBundle(readServed(query.get("bundle"))));
else element("folder").disabled = false;

/** Runs what was asked for, with nothing else to be asked for meanwhile; shows its error. */
async function attempt(status, work) {
  element("error").hidden = true;
  element("status").textContent = status;
  element("folder").disabled = element("file").disabled = true;
  try {
    await work();
  } catch (error) {
    element("error").textContent = error.message;
    element("error").hidden = false;
  }
  element("status").textContent = "";
  element("folder").disabled = false;
  element("file").disabled = model === null;
}

async function loadBundle(read) {
  await model?.release();
  model = null;
  element("facts").replaceChildren();
  element("result").hidden = true;
  element("file").value = "";
  const bundle = await Bundle.open(read);
  const loaded = await Model.open(await runtime, bundle);
  const golden = await bundle.golden();
  const error = await loaded.parityError(golden);
  show(bundle.manifest, golden.images.shape[0], error);
  if (!(error <= TOLERANCE)) {
    const found = error.toExponential(1);
    throw new Error(`parity error ${found} is above ${TOLERANCE}: this is not the exported model`);
  }
  model = loaded;
}

function show({ name, model: facts, classes, input }, goldenImages, error) {
  const colours = input.channels === 3 ? "RGB" : "grey";
  const rows = {
    Bundle: name,
    Model: `${facts.name}, ${facts.method}`,
    Parameters: facts.parameters.toLocaleString("en"),
    Classes: classes.length.toLocaleString("en"),
    Input: `${input.width} × ${input.height}, ${colours}`,
    "Parity error": `${error.toExponential(1)}, on ${goldenImages} golden images`,
    Runtime: `onnxruntime-web ${VERSION}`,
  };
  for (const [term, value] of Object.entries(rows)) {
    element("facts").append(made("dt", term), made("dd", value));
  }
}

async function classify(file) {
  element("result").hidden = true;
  const { manifest } = model;
  const pixels = await readPixels(file);
  const start = performance.now();
  const seen = fit(pixels, manifest.input);
  const input = normalise(seen, manifest.input);
  const middle = performance.now();
  const shares = softmax(await model.run(input));
  const end = performance.now();
  const best = shares.map((_, index) => index).sort((a, b) => shares[b] - shares[a]);
  element("classes").replaceChildren(
    ...best.slice(0, SHOWN_CLASSES).map((index) => {
      const row = made("li", made("span", manifest.classes[index]), made("span", percent(shares[index])));
      row.style.setProperty("--share", shares[index]);
      return row;
    }),
  );
  draw(element("seen"), seen);
  element("time").textContent =
    `model ${milliseconds(end - middle)}, preprocessing ${milliseconds(middle - start)}`;
  element("result").hidden = false;
}

/** Returns the RGBA pixels of an image file; rotation and colour profile are left alone, as by Pillow. */
async function readPixels(file) {
  const options = { imageOrientation: "none", colorSpaceConversion: "none", premultiplyAlpha: "none" };
  const bitmap = await createImageBitmap(file, options).catch(() => {
    throw new Error(`${file.name} is not an image that this browser reads`);
  });
  const { width, height } = bitmap;
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  return context.getImageData(0, 0, width, height);
}

function draw(canvas, { width, height, channels, data }) {
  const image = new ImageData(width, height);
  for (let pixel = 0; pixel < width * height; pixel++) {
    for (let k = 0; k < 3; k++) image.data[pixel * 4 + k] = data[pixel * channels + (k % channels)];
    image.data[pixel * 4 + 3] = 255;
  }
  Object.assign(canvas, { width, height });
  canvas.getContext("2d").putImageData(image, 0, 0);
}

function made(tag, ...children) {
  const node = document.createElement(tag);
  node.append(...children);
  return node;
}

function percent(share) {
  return `${(100 * share).toFixed(1)} %`;
}

function milliseconds(time) {
  return `${time.toFixed(1)} ms`;
}
