// node preprocess.mjs: the inputs of models for an image, by docs/browser/preprocess.js, as JSON.
//
// Reads {image: {width, height, data}, specs}: data are RGBA values, a spec is the `input` of a manifest.

import { readFileSync } from "node:fs";

import { fit, normalise } from "../../docs/browser/preprocess.js";

const { image, specs } = JSON.parse(readFileSync(0));
process.stdout.write(JSON.stringify(specs.map((spec) => Array.from(normalise(fit(image, spec), spec)))));
