// A bundle of wasi-export: no file of it is given out before its hash is right.
//
// Its files come from a function: read(name) gives an ArrayBuffer, or null where there is no such file.

const MANIFEST = "manifest.json";
const MANIFEST_DIGEST = "manifest.sha256";
const MODEL = "model.onnx";
const GOLDEN = "golden/golden.safetensors";
const REPAIR = "export it again or copy it again";
const ARRAYS = { F32: Float32Array, I64: BigInt64Array };

export class Bundle {
  #read;

  constructor(read, manifest) {
    this.#read = read;
    this.manifest = manifest;
  }

  /** Returns a bundle whose manifest is right. */
  static async open(read) {
    const [manifest, digest] = [await read(MANIFEST), await read(MANIFEST_DIGEST)];
    for (const [name, data] of [[MANIFEST, manifest], [MANIFEST_DIGEST, digest]]) {
      if (data === null) throw new Error(`no ${name}: give the folder that wasi-export export wrote`);
    }
    await requireHash(MANIFEST, manifest, text(digest).slice(0, 64), MANIFEST_DIGEST);
    return new Bundle(read, JSON.parse(text(manifest)));
  }

  /** Returns the bytes of a file. */
  async bytes(name) {
    const entry = this.manifest.files[name];
    if (entry === undefined) throw new Error(`the manifest lists no ${name}: ${REPAIR}`);
    const data = await this.#read(name);
    if (data === null) throw new Error(`${name} is missing: ${REPAIR}`);
    await requireHash(name, data, entry.sha256, MANIFEST);
    return data;
  }

  model() {
    return this.bytes(MODEL);
  }

  /** Returns {images, outputs, labels}: what the model is checked with. */
  golden() {
    return this.tensors(GOLDEN);
  }

  /** Returns the tensors {data, shape} of a safetensors file by name. */
  async tensors(name) {
    const buffer = await this.bytes(name);
    const headerBytes = Number(new DataView(buffer).getBigUint64(0, true));
    const start = 8 + headerBytes;
    const { __metadata__, ...entries } = JSON.parse(text(buffer.slice(8, start)));
    const tensors = {};
    for (const [key, { dtype, shape, data_offsets: [begin, end] }] of Object.entries(entries)) {
      tensors[key] = { data: new ARRAYS[dtype](buffer.slice(start + begin, start + end)), shape };
    }
    return tensors;
  }
}

/** Reads a folder that is served. */
export function readServed(folder) {
  return async (name) => {
    const response = await fetch(urlIn(folder, name));
    return response.ok ? response.arrayBuffer() : null;
  };
}

/** Returns the URL of a file in a folder that is named relative to the page. */
export function urlIn(folder, name) {
  return new URL(name, new URL(folder.endsWith("/") ? folder : `${folder}/`, document.baseURI));
}

/** Reads a folder that was picked. */
export function readPicked(files) {
  const below = (file) => file.webkitRelativePath.split("/").slice(1).join("/");
  const byName = new Map(Array.from(files, (file) => [below(file), file]));
  return async (name) => byName.get(name)?.arrayBuffer() ?? null;
}

async function requireHash(name, data, expected, source) {
  if (!globalThis.crypto?.subtle) throw new Error("hashes need https, or a page served from localhost");
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", data));
  const found = Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
  if (found !== expected) {
    const [got, wanted] = [found, expected].map((hash) => `${hash.slice(0, 12)}…`);
    throw new Error(`${name} has sha256 ${got}, ${source} says ${wanted}: ${REPAIR}`);
  }
}

function text(buffer) {
  return new TextDecoder().decode(buffer);
}
