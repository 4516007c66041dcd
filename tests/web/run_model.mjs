// node run_model.mjs BUNDLE STEPS RATE: what onnxruntime-web computes of a bundle, as JSON.
//
// {version, outputs, losses, state}: the outputs of the model on the golden images; the loss of each of STEPS
// training steps on them and their labels; parameters and state of the optimiser at the end, by name.

import { readFile } from "node:fs/promises";
import path from "node:path";
import * as ort from "onnxruntime-web";

import { Bundle } from "../../docs/browser/bundle.js";

const [folder, steps, rate] = process.argv.slice(2);
ort.env.wasm.numThreads = 1;

const read = async (name) => Uint8Array.from(await readFile(path.join(folder, name))).buffer;
const bundle = await Bundle.open(read);
const { input, output, training } = bundle.manifest;
const golden = await bundle.golden();
const images = float32(golden.images);

const model = await ort.InferenceSession.create(await bundle.model());
const outputs = (await model.run({ [input.name]: images }))[output];

const step = await ort.InferenceSession.create(await bundle.bytes("train/step.onnx"));
const shapes = Object.fromEntries(step.inputMetadata.map(({ name, shape }) => [name, shape]));
const stored = await bundle.tensors("train/parameters.safetensors");
if (training.bases.length) Object.assign(stored, await bundle.tensors("train/bases.safetensors"));

const given = {
  [step.inputNames[0]]: images,
  targets: new ort.Tensor("int64", golden.labels.data, golden.labels.shape),
  lr: scalar(Number(rate)),
  weight_decay: scalar(0.05),
  clip_norm: scalar(1),
};
let state = {};
for (const name of [...training.parameters, ...training.optimizer]) {
  state[name] = name in stored ? float32(stored[name]) : zeros(shapes[name]);
}
const losses = [];
for (let index = 0; index < Number(steps); index++) {
  const found = await step.run({ ...given, ...state });
  losses.push(found.loss.data[0]);
  state = mapped(state, (name) => found[`${name}.next`]);
}

process.stdout.write(
  JSON.stringify({
    version: ort.env.versions.web,
    outputs: Array.from(outputs.data),
    losses,
    state: mapped(state, (name) => Array.from(state[name].data)),
  }),
);

function float32({ data, shape }) {
  return new ort.Tensor("float32", data, shape);
}

function scalar(value) {
  return float32({ data: Float32Array.of(value), shape: [] });
}

function zeros(shape) {
  return float32({ data: new Float32Array(shape.reduce((a, b) => a * b, 1)), shape });
}

function mapped(object, value) {
  return Object.fromEntries(Object.keys(object).map((name) => [name, value(name)]));
}
