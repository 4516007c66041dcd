"""A fresh process of `benchmarks/step_graph.py` that takes the same steps in torch."""

import json
import sys
import time

START = time.perf_counter()

import torch  # noqa: E402  # the clock starts before the imports
import torch.nn.functional as F  # noqa: E402
from step_graph_memory import memory_mib  # noqa: E402
from step_graph_models import make_case  # noqa: E402

from wasi_export.subspace import subspace_layers  # noqa: E402


def main() -> None:
    """Prints what was measured, as JSON."""
    way, case, batch, steps, _ = sys.argv[1:]
    torch.set_num_threads(1)
    imported = memory_mib("VmRSS")
    model, trainable = make_case(case)
    for _, layer in subspace_layers(model):
        layer.plain_autograd = True  # two products, as in the graph: nothing is compressed
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)
    model.set_grad_checkpointing(way == "torch, checkpointing")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-3, momentum=0.9, weight_decay=0.05)
    images, labels = torch.randn(int(batch), 3, 224, 224), torch.randint(0, 10, (int(batch),))
    samples = []
    model.train()
    for _ in range(int(steps) + 1):
        began = time.process_time()
        F.cross_entropy(model(images), labels).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        samples.append(1e3 * (time.process_time() - began))
        if len(samples) == 1:
            start_s = time.perf_counter() - START
    peak = memory_mib("VmHWM")
    found = {"peak_mib": peak, "less_import_mib": peak - imported, "start_s": start_s}
    print(json.dumps({"samples_ms": samples[1:], **found}))


if __name__ == "__main__":
    main()
