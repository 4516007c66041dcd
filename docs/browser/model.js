// The model of a bundle in onnxruntime-web: WebAssembly, one thread.

import { urlIn } from "./bundle.js";

export const VERSION = "1.30.0";
const CDN = `https://cdn.jsdelivr.net/npm/onnxruntime-web@${VERSION}/dist/`;
// Of the files of the npm package, which the CDN gives as they are:
// openssl dgst -sha384 -binary FILE | base64 -w0
const HASHES = {
  "ort.wasm.bundle.min.mjs": "sha384-PLWz+nHEVHpjwBsO0YVdvQj6n5814Iv8E3b8FG0Rp/uIAtjFMCKOpP66iPzedrIG",
  "ort-wasm-simd-threaded.wasm": "sha384-vjBJ1z7qrhkTyYsNqKeF6c7N+nOJSU94czEo+tvZcu8G75JparGq9kB+kTnEUNVM",
};

/** Returns onnxruntime-web from a folder of its files, or from a CDN. */
export async function loadRuntime(folder = CDN) {
  const [code, wasm] = await Promise.all(Object.keys(HASHES).map((name) => checkedFile(folder, name)));
  const url = URL.createObjectURL(new Blob([code], { type: "text/javascript" }));
  const ort = await import(url);
  URL.revokeObjectURL(url);
  ort.env.wasm.wasmBinary = wasm; // else it would look for the file beside its code
  ort.env.wasm.numThreads = 1; // more threads need headers that a plain server does not send
  ort.env.logLevel = "error";
  return ort;
}

export class Model {
  #ort;
  #session;

  constructor(ort, session, manifest) {
    this.#ort = ort;
    this.#session = session;
    this.manifest = manifest;
  }

  static async open(ort, bundle) {
    const bytes = await bundle.model();
    try {
      return new Model(ort, await ort.InferenceSession.create(bytes), bundle.manifest);
    } catch (error) {
      throw new Error(`model.onnx does not load in onnxruntime-web ${VERSION}: ${error.message}`);
    }
  }

  /** Returns the logits for an input [C, H, W]. */
  async run(input) {
    const { name, channels, height, width } = this.manifest.input;
    const images = new this.#ort.Tensor("float32", input, [1, channels, height, width]);
    const found = await this.#session.run({ [name]: images });
    return found[this.manifest.output].data;
  }

  /** Returns max|output - reference| / max|reference| over all golden images. */
  async parityError({ images, outputs }) {
    const [count, classes] = outputs.shape;
    if (count === 0) {
      throw new Error("the golden data holds no images: export with export.golden_images ≥ 1");
    }
    const size = images.data.length / count;
    let [error, scale] = [0, 0];
    for (let index = 0; index < count; index++) {
      const found = await this.run(images.data.slice(index * size, (index + 1) * size));
      const expected = outputs.data.subarray(index * classes, (index + 1) * classes);
      expected.forEach((value, k) => {
        error = Math.max(error, Math.abs(found[k] - value));
        scale = Math.max(scale, Math.abs(value));
      });
    }
    return error / scale;
  }

  release() {
    return this.#session.release();
  }
}

/** Returns the probabilities of logits. */
export function softmax(logits) {
  const largest = Math.max(...logits);
  const powers = Array.from(logits, (logit) => Math.exp(logit - largest));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map((power) => power / sum);
}

async function checkedFile(folder, name) {
  const url = urlIn(folder, name);
  try {
    const response = await fetch(url, { integrity: HASHES[name] });
    return await response.arrayBuffer();
  } catch {
    throw new Error(`${url} cannot be reached or is not of onnxruntime-web ${VERSION}`);
  }
}
